# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Hashes that identify texts and token arrays in results."""

from collections.abc import Iterable
import hashlib
import unicodedata

import numpy as np


def normalise(text: str) -> str:
  """Returns the text in Unicode NFC, runs of white space as one space."""
  return ' '.join(unicodedata.normalize('NFC', text).split())


def text_sha256(text: str) -> str:
  """Hash of a text that white space does not change."""
  # A JSON string may hold a lone surrogate, which plain UTF-8 refuses.
  data = normalise(text).encode('utf-8', 'surrogatepass')
  return hashlib.sha256(data).hexdigest()


def set_sha256(hashes: Iterable[str]) -> str:
  """Hash of a collection of hashes, the same in any order."""
  return hashlib.sha256('\n'.join(sorted(hashes)).encode()).hexdigest()


def arrays_sha256(*arrays: np.ndarray) -> str:
  """Hash of the values, shapes and types of arrays, in order."""
  digest = hashlib.sha256()
  for array in arrays:
    array = np.ascontiguousarray(array)
    digest.update(f'{array.dtype.str}{array.shape}'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()
