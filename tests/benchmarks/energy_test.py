# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Time against energy budgets, on a tiny model and a clock that is made up."""

import json

import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import text
from tests import tiny
from tools.benchmarks import _shapes
from tools.benchmarks import energy


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setitem(_shapes.MODELS, '270m', tiny.TinyGemma3)
  monkeypatch.setattr('tools.benchmarks._shapes.TOKENS', (5, 500))
  monkeypatch.setattr(energy, '_CACHE', 256)
  # Experts of 32 neurons are whole blocks and groups of these.
  monkeypatch.setattr(energy, '_WEIGHTS', gx.Int(bits=8, group=32))
  argv = ['--shape=270m', '--experts=8', '--tokens=1', '--calibration=14%,64%']
  return [*argv, '--budgets=25%,50%,75%,100%']


def test_program(small, tmp_path, monkeypatch):
  seconds = _shapes.Decoding.seconds
  rng = np.random.default_rng(0)

  def clock(self, count):
    # The tokens are really decoded; how long that took would be noise.
    seconds(self, count)
    nbytes = text.cost(self.model, self.params).nbytes
    return 1e-3 + 2e-9 * nbytes * rng.uniform(0.99, 1.01)

  monkeypatch.setattr(_shapes.Decoding, 'seconds', clock)
  files = [f'--json={tmp_path}/r.json', f'--plot={tmp_path}/r.png']
  assert energy.main([*small, '--rounds=6', *files]) == 0
  result = json.loads((tmp_path / 'r.json').read_text())
  # One program for ten budgets.
  assert result['compilations'] == 1
  judged = [c for c in result['settings'].values() if c['judged']]
  assert [c['experts_of_a_layer'] for c in judged] == [[2], [4], [6], [8]]
  assert judged[-1]['bytes'] == result['bytes']
  fitted = result['machine_fitted']
  assert fitted['seconds_per_byte'] == pytest.approx(2e-9, rel=0.1)
  assert result['largest_relative_error'] < 0.02
  found = result['correlation']
  said = [c['predicted_seconds'] for c in judged]
  took = [c['measured_seconds']['median'] for c in judged]
  want = np.cov(said, took)[0, 1] / (np.std(said) * np.std(took) * 4 / 3)
  assert found['pearson'] == pytest.approx(want) and want > 0.99
  assert found['ci95'][0] < want < found['ci95'][1]
  assert result['correlation_of_a_round']['n'] == 6
  for cell in result['asked'].values():
    if 'asked_seconds' in cell:
      assert cell['predicted_seconds'] <= cell['asked_seconds']
    else:
      assert cell['joules'] <= cell['asked_joules']
  assert (tmp_path / 'r.png').read_bytes().startswith(b'\x89PNG')


def test_correlation_that_is_known():
  found = energy.correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])
  assert found['pearson'] == pytest.approx(0.8)
  # Fisher: atanh(0.8) -+ 1.96 / sqrt(2).
  np.testing.assert_allclose(found['ci95'], [-0.2796, 0.9862], atol=1e-4)


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--calibration=25%,64%', 'as many experts as one'),
    ('--shape=9b', '--shape'),
    ('--rounds=500', 'decode more than'),
    ('--budgets=50%', 'two of each'),
  ],
)
def test_bad_flags(small, flag, message, capsys):
  assert energy.main([*small, flag]) == 2
  assert message in capsys.readouterr().err


def test_no_machine_where_time_does_not_grow(small, monkeypatch, capsys):
  monkeypatch.setattr(_shapes.Decoding, 'seconds', lambda self, count: 1e-3)
  assert energy.main([*small, '--rounds=1']) == 2
  assert 'no machine can be fitted' in capsys.readouterr().err
