# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Text that the dense model writes: its beginnings, its manner, its files."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext.train import _written
from tests import tiny

_LENGTH = 16
_COUNT = 2 * _written._ROWS + 3


@pytest.fixture(scope='module')
def dense():
  model = tiny.model('gemma3')
  rng = np.random.default_rng(0)
  windows = rng.integers(4, tiny.VOCAB_SIZE, (9, _LENGTH)).astype(np.int32)
  windows[:, 0] = 2
  windows[3, 4:] = 0  # Too short to begin from.
  windows[4, 9:] = 0
  return model, tiny.params(model), windows


@pytest.fixture(scope='module')
def whole(dense, tmp_path_factory):
  folder = tmp_path_factory.mktemp('written')
  return _written.attempt(*dense, _COUNT, directory=folder)


def test_windows_go_on_from_words_of_the_text(dense, whole):
  _, _, windows = dense
  assert whole.shape == (_COUNT, _LENGTH) and whole.dtype == np.int32
  assert (whole[:, 0] == 2).all()
  assert not np.isin(whole[:, 1:], (0, 1, 2)).any()
  spans = {
    tuple(row[i : i + 4])
    for row in windows
    for i in range(1, _LENGTH - 3)
    if row[i + 3]
  }
  begun = [tuple(row[1:5]) for row in whole]
  assert set(begun) <= spans
  assert len(set(begun)) > _COUNT // 2
  assert len({tuple(row[5:]) for row in whole}) == _COUNT


def test_words_follow_the_distribution_of_the_model(dense, whole):
  model, params, _ = dense
  out = model.apply({'params': params}, jnp.asarray(whole)).logits
  logits = np.array(out[:, 4:-1], np.float64)
  logits[..., :3] = -np.inf
  logits -= logits.max(axis=-1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  p = np.exp(log_p)
  finite = np.where(p > 0, log_p, 0)
  mean = np.sum(p * finite, axis=-1)
  variance = np.sum(p * (finite - mean[..., None]) ** 2, axis=-1)
  took = np.take_along_axis(finite, whole[:, 5:, None], axis=-1)[..., 0]
  error = np.sum(took - mean) / np.sqrt(np.sum(variance))
  assert abs(error) < 4


def test_stopped_it_goes_on_to_the_same_text(dense, whole, tmp_path):
  stops = 0
  for left in (0, 1, 1, 9):
    calls = iter(range(left))
    found = _written.attempt(
      *dense,
      _COUNT,
      directory=tmp_path,
      stop=lambda calls=calls: next(calls, None) is None,
    )
    stops += found is None
  assert stops == 3 and found is not None
  np.testing.assert_array_equal(found, whole)


def test_damaged_batch_is_written_again(dense, whole, tmp_path):
  _written.attempt(*dense, _COUNT, directory=tmp_path)
  first, second, third = sorted(tmp_path.glob('*/batch_*.npz'))
  first.write_bytes(first.read_bytes()[:-9])
  second.write_bytes(b'')
  np.savez(third, tokens=np.zeros((1, _LENGTH), np.int32))
  found = _written.attempt(*dense, _COUNT, directory=tmp_path)
  np.testing.assert_array_equal(found, whole)


def test_long_windows_hold_several_texts(dense, tmp_path, monkeypatch):
  monkeypatch.setattr(_written, '_LENGTH', 7)
  model, params, windows = dense
  found = _written.attempt(model, params, windows, 40, directory=tmp_path)
  assert found.shape == (40, _LENGTH) and (found[:, 0] == 2).all()
  files = sorted(tmp_path.glob('*/batch_*.npz'))
  texts = np.concatenate([np.load(f)['tokens'] for f in files])
  assert texts.shape == (96, 9)  # Two texts of 8 words after BOS.
  np.testing.assert_array_equal(found[:, 1:9], texts[:80:2, 1:])
  np.testing.assert_array_equal(found[:, 9:], texts[1:80:2, 1:8])


def test_seed_and_text_have_folders_of_their_own(dense, tmp_path):
  model, params, windows = dense
  a = _written.attempt(*dense, 2, directory=tmp_path)
  b = _written.attempt(*dense, 2, directory=tmp_path, seed=1)
  c = _written.attempt(model, params, windows[::-1], 2, directory=tmp_path)
  assert len(list(tmp_path.glob('written-*'))) == 3
  assert (a != b).any() and (a != c).any()


def test_windows_have_room_for_more_than_their_beginning(dense, tmp_path):
  model, params, windows = dense
  with pytest.raises(errors.ConfigError, match='Windows of 5 tokens'):
    _written.attempt(model, params, windows[:, :5], 2, directory=tmp_path)
