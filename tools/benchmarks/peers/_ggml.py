# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's own quantisers, from the library inside `xllamacpp`."""

import ctypes

import gguf
import numpy as np

from gemma_ext import errors
from tools.benchmarks.peers import _llama_cpp

_FLOATS = ctypes.POINTER(ctypes.c_float)


def quantize(
  rows: np.ndarray,
  kind: gguf.GGMLQuantizationType,
  importance: np.ndarray | None = None,
) -> np.ndarray:
  """Quantises rows as `llama-quantize` does.

  Args:
    rows: float32 [rows, cols].
    kind: The type; its blocks divide cols.
    importance: float32 [cols]: what an error of a column costs, the diagonal
      of an importance matrix; `None` for the type's own idea.

  Returns:
    uint8 [rows, bytes of a row].

  Raises:
    OptionalDependencyError: If xllamacpp is missing or exports no quantiser.
    CheckpointError: If the quantiser writes another number of bytes.
  """
  library = _llama_cpp.library()
  try:
    chunk = library.ggml_quantize_chunk
  except AttributeError as e:
    raise errors.OptionalDependencyError(
      'The installed xllamacpp does not export ggml_quantize_chunk; version'
      ' 2026.10.11549 does.'
    ) from e
  chunk.restype = ctypes.c_size_t
  chunk.argtypes = [
    ctypes.c_int,
    _FLOATS,
    ctypes.c_void_p,
    *[ctypes.c_int64] * 3,
    _FLOATS,
  ]
  rows = np.ascontiguousarray(rows, np.float32)
  count, cols = rows.shape
  block, nbytes = gguf.GGML_QUANT_SIZES[kind]
  if cols % block:
    raise errors.CheckpointError(
      f'Rows of {cols} are no blocks of {block}, as {kind.name} has.'
    )
  out = np.empty((count, cols // block * nbytes), np.uint8)
  weights = None
  if importance is not None:
    importance = np.ascontiguousarray(importance, np.float32)
    if importance.shape != (cols,):
      raise errors.CheckpointError(
        f'The importance of {cols} columns has shape {importance.shape}.'
      )
    weights = importance.ctypes.data_as(_FLOATS)
  written = chunk(
    int(kind),
    rows.ctypes.data_as(_FLOATS),
    out.ctypes.data,
    0,
    count,
    cols,
    weights,
  )
  if written != out.nbytes:
    raise errors.CheckpointError(
      f'{kind.name}: {written} bytes were written, expected {out.nbytes}.'
    )
  return out
