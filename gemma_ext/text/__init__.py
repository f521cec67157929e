# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Text from a checkpoint, as it comes."""

from gemma_ext.text._speculative import Draft
from gemma_ext.text._speculative import Speculative
from gemma_ext.text._stream import Stream
from gemma_ext.text._stream import stream
