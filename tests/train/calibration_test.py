# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Calibration stops, goes on, and tells what is damaged from what is whole."""

import errno
import os
import pathlib

import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext.train import _calibration
from tests import tiny

_TOKENS = np.random.default_rng(0).integers(4, tiny.VOCAB_SIZE, (21, 16))


@pytest.fixture(scope='module')
def model():
  model = tiny.model('gemma3')
  return model, tiny.params(model)


def _files(path: pathlib.Path) -> dict[str, object]:
  out: dict[str, object] = {p.name: p.read_bytes() for p in path.iterdir()}
  with np.load(path / 'fisher.npz') as file:
    out['fisher.npz'] = {k: file[k].tobytes() for k in file}
  return out


@pytest.fixture(scope='module')
def whole(model, tmp_path_factory) -> dict[str, object]:
  folder = tmp_path_factory.mktemp('whole')
  path = _calibration.calibrate(*model, _TOKENS, directory=folder).path
  return _files(path)


def test_stopped_calibration_goes_on_to_the_same_bits(model, whole, tmp_path):
  stops = 0
  for left in (0, 3, 17, 4, 9, 100):
    calls = iter(range(left))
    found = _calibration.attempt(
      *model,
      _TOKENS,
      directory=tmp_path,
      stop=lambda calls=calls: next(calls, None) is None,
    )
    stops += found is None
  # 0 + 3 + 17 windows leave one and three of the Fisher, 9 of 16 more.
  assert stops == 5 and found is not None
  assert _files(found.path) == whole


def test_final_states_are_those_of_a_calibration_of_all_layers(model, tmp_path):
  run = lambda layers, tokens=_TOKENS, folder=tmp_path: _calibration.calibrate(
    *model, tokens, directory=folder, layers=layers
  )
  other = run(False, _TOKENS[:5])
  whole = run(True)
  found = run(False)
  assert (found.path, found.layers) == (whole.path, ())
  assert other.path == run(False, _TOKENS[:5]).path != whole.path
  alone = run(False, folder=tmp_path / 'alone')
  np.testing.assert_array_equal(
    *(x.final.astype(np.float32) for x in (found, alone))
  )


def test_final_states_go_on_where_they_were_begun(model, tmp_path):
  calls = iter(range(9))
  stopped = _calibration.attempt(
    *model,
    _TOKENS,
    directory=tmp_path,
    layers=False,
    stop=lambda: next(calls, None) is None,
  )
  assert stopped is None
  (begun,) = tmp_path.iterdir()
  _calibration.calibrate(*model, _TOKENS, directory=tmp_path)
  found = _calibration.calibrate(
    *model, _TOKENS, directory=tmp_path, layers=False
  )
  assert found.path == begun


def test_torn_fisher_is_made_again(model, whole, tmp_path):
  path = _calibration.calibrate(*model, _TOKENS, directory=tmp_path).path
  file = path / 'fisher.npz'
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  for damaged in (data, data[:-9], b''):
    file.write_bytes(damaged)
    _calibration.calibrate(*model, _TOKENS, directory=tmp_path)
    assert _files(path) == whole


def test_full_disk_is_an_error_before_any_work(model, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'posix_fallocate', full)
  with pytest.raises(errors.StateError, match='No space left .* MB are free'):
    _calibration.calibrate(*model, _TOKENS, directory=tmp_path)
