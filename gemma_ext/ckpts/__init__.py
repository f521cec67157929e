# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: any Gemma in, our own directories out."""

# pylint: disable=g-importing-member

from gemma_ext.ckpts._checkpoint import Checkpoint
from gemma_ext.ckpts._gemma2_tokenizer import Gemma2Tokenizer
from gemma_ext.ckpts._load import load
from gemma_ext.ckpts._load import locate
from gemma_ext.ckpts._save import check_target
from gemma_ext.ckpts._save import directory_bytes
from gemma_ext.ckpts._save import overhead_bytes
from gemma_ext.ckpts._save import save
from gemma_ext.ckpts._search import find
from gemma_ext.ckpts._search import names

__all__ = [
  'Checkpoint',
  'Gemma2Tokenizer',
  'check_target',
  'directory_bytes',
  'find',
  'load',
  'locate',
  'names',
  'overhead_bytes',
  'save',
]
