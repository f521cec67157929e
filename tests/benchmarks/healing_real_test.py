# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Weightings on the real Gemma 3 270M: too long for every run of the tests.

GEMMA_EXT_SLOW_TESTS=1 pytest -s tests/benchmarks/healing_real_test.py
"""

import json
import os

import pytest

from tools.benchmarks import healing


@pytest.mark.skipif(
  os.environ.get('GEMMA_EXT_SLOW_TESTS') != '1',
  reason='minutes on the real model; GEMMA_EXT_SLOW_TESTS=1 runs it',
)
def test_fisher_heals_where_mse_does_not(tmp_path):
  """Layer 6: mse ends where the one-shot fit was, fisher far below."""
  file = tmp_path / 'weightings.json'
  code = healing.main(
    [
      f'--json={file}',
      f'--cache={tmp_path / "calibration"}',
      '--layers=6',
      '--methods=one_shot,mse,fisher',
    ]
  )
  assert code == 0
  cells = {c['method']: c for c in json.loads(file.read_text())['cells']}
  one_shot, mse, fisher = (
    cells[name] for name in ('one_shot', 'mse', 'fisher')
  )
  assert one_shot['ci95'][0] > 1.05
  # Either interval holds the other's ratio.
  assert mse['ci95'][0] < one_shot['ratio'] < mse['ci95'][1]
  # Most of the damage is gone.
  assert fisher['ci95'][1] < min(one_shot['ci95'][0], mse['ci95'][0])
  assert fisher['ratio'] - 1 < (mse['ratio'] - 1) / 2
