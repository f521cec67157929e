# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Single arrays of orbax directories, as written by orbax itself."""

import ml_dtypes
import numpy as np
from orbax import checkpoint as ocp
import pytest

from gemma_ext import errors
from gemma_ext.ckpts import _compressed
from gemma_ext.ckpts import _store

_RNG = np.random.default_rng(0)
_TREE = {
  'layer_0': {
    'w': _RNG.standard_normal((64, 3, 40)).astype(ml_dtypes.bfloat16),
    'codes': _RNG.integers(-128, 128, (300, 70)).astype(np.int8),
  },
  'scalar': np.float32(2.5),
  'zeros': np.zeros((5, 7), np.uint8),
}
_NAMES = ('layer_0/w', 'layer_0/codes', 'scalar', 'zeros')


def _leaf(name):
  out = _TREE
  for key in name.split('/'):
    out = out[key]
  return np.asarray(out)


def _write(path, handler, chunk_bytes=None):
  save_args = {
    'layer_0': {
      'w': ocp.SaveArgs(chunk_byte_size=chunk_bytes),
      'codes': ocp.SaveArgs(chunk_byte_size=chunk_bytes),
    },
    'scalar': ocp.SaveArgs(),
    'zeros': ocp.SaveArgs(),
  }
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, ocp.args.PyTreeSave(_TREE, save_args=save_args))
  return _store.Store(path)


def _check(store):
  for name in _NAMES:
    want = _leaf(name)
    got = np.empty_like(want)
    store.read(name, got)
    np.testing.assert_array_equal(got, want)


def test_arrays_in_one_piece(tmp_path, monkeypatch):
  monkeypatch.setattr(_store, '_BLOCK_BYTES', 1000)
  _check(_write(tmp_path / 'x', _compressed.handler()))


def test_arrays_in_chunks(tmp_path):
  _check(_write(tmp_path / 'x', _compressed.handler(), chunk_bytes=1024))


def test_compressed_chunks(tmp_path):
  _check(_write(tmp_path / 'x', ocp.PyTreeCheckpointHandler(use_ocdbt=True)))


@pytest.mark.parametrize(
  'shape, dtype', [((300, 71), 'int8'), ((300, 70), 'uint8')]
)
def test_another_shape_or_type(tmp_path, shape, dtype):
  store = _write(tmp_path / 'x', _compressed.handler())
  with pytest.raises(errors.ParamsMismatchError, match=r'int8\[300, 70\]'):
    store.read('layer_0/codes', np.empty(shape, dtype))


def test_missing_bytes(tmp_path):
  store = _write(tmp_path / 'x', _compressed.handler())
  del store._keys['layer_0.codes/0.0']
  with pytest.raises(errors.TruncatedFileError, match='0:21000 of 21000'):
    store.read('layer_0/codes', np.empty((300, 70), np.int8))
