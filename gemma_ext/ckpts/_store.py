# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads single arrays of an orbax directory into buffers of ours.

Orbax itself restores a tree at once and copies each array twice on its way to
JAX, so that loading needs almost twice the memory of the result. Here one
array is read at a time, in blocks, into the memory that JAX takes over.

The layout is the one that orbax documents for OCDBT: one key-value store per
directory, in it a Zarr 2 array per leaf, named by its keys joined by '.'.
"""

import math
import os

import numpy as np
import tensorstore as ts

from gemma_ext import errors

_BLOCK_BYTES = 2 << 20
_INDEX_BYTES = 4 << 20


class Store:
  """The arrays of a directory that orbax wrote.

  Any exception of tensorstore may come out of its methods.
  """

  def __init__(self, folder: os.PathLike | str):
    # Enough for the index; the arrays themselves are read only once.
    self._context = ts.Context(
      {'cache_pool': {'total_bytes_limit': _INDEX_BYTES}}
    )
    self._spec = {
      'driver': 'ocdbt',
      'base': {'driver': 'file', 'path': f'{os.fspath(folder)}/'},
    }
    self._keys = ts.KvStore.open(self._spec, context=self._context).result()

  def read(self, name: str, out: np.ndarray) -> None:
    """Reads an array.

    Args:
      name: Its path, such as 'layer_0/mlp/linear'.
      out: Takes it, has its shape and its type, and is contiguous.

    Raises:
      ParamsMismatchError: If it has another shape or type.
      TruncatedFileError: If its numbers are missing or incomplete.
    """
    key = name.replace('/', '.')
    source = ts.open(
      {
        'driver': 'zarr',
        'kvstore': {**self._spec, 'path': f'{key}/'},
        'fill_missing_data_reads': False,
      },
      open=True,
      read=True,
      context=self._context,
    ).result()
    if source.shape != out.shape or source.dtype.numpy_dtype != out.dtype:
      raise errors.ParamsMismatchError(
        f'{name} is stored as {source.dtype.name}{list(source.shape)};'
        f' expected {out.dtype.name}{list(out.shape)}.'
      )
    if _is_plain(source):
      chunk = '.'.join('0' * out.ndim) or '0'
      self._read_bytes(f'{key}/{chunk}', out)
    else:
      ts.array(out, context=self._context).write(source).result()

  def _read_bytes(self, key: str, out: np.ndarray) -> None:
    """Fills `out` with the value of `key`, block by block."""
    flat = out.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _BLOCK_BYTES):
      stop = min(start + _BLOCK_BYTES, flat.size)
      block = self._keys.read(key, byte_range=slice(start, stop)).result()
      value = block.value  # Every access makes another copy.
      if len(value) != stop - start:
        raise errors.TruncatedFileError(
          f'{key}: bytes {start}:{stop} of {flat.size} are missing.'
        )
      flat[start:stop] = np.frombuffer(value, np.uint8)


def _is_plain(source: ts.TensorStore) -> bool:
  """Whether an array is stored as its bytes, in one piece.

  That is what `save` writes from one device. An array of several chunks, each
  a part of it, is for tensorstore to put together.
  """
  metadata = source.spec().to_json()['metadata']
  return (
    metadata['compressor'] is None
    and metadata['filters'] is None
    and metadata['order'] == 'C'
    and tuple(metadata['chunks']) == source.shape
    and math.prod(source.shape) > 0
    and not metadata['dtype'].startswith('>')
  )
