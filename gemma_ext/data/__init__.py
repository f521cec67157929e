# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Text sources, splits that never overlap, windows of tokens."""

from gemma_ext.data._documents import Document
from gemma_ext.data._documents import load_documents
from gemma_ext.data._documents import rows
from gemma_ext.data._splits import documents_sha256
from gemma_ext.data._splits import NAMES as SPLIT_NAMES
from gemma_ext.data._splits import Split
from gemma_ext.data._splits import split
from gemma_ext.data._splits import Splits
from gemma_ext.data._windows import token_batches
from gemma_ext.data._windows import Windows
from gemma_ext.data._windows import windows
