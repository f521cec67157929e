# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of healing on a tiny model: cells, resume, refusals."""

import json
import pathlib

import pytest

from gemma_ext import _cli
from tests import tiny
from tools.benchmarks import healing


@pytest.fixture(scope='module')
def argv(tmp_path_factory) -> list[str]:
  path = tmp_path_factory.mktemp('bench')
  tiny.folder(path, texts=12, words=300)
  return [
    f'--checkpoint={path / "dense"}',
    f'--text={path / "text_*.txt"}',
    f'--json={path / "out.json"}',
    f'--cache={path / "cache"}',
    '--layers=1',
    *('--tokens=1024', '--test_tokens=512', '--window=64'),
    *('--steps=30', '--batch_tokens=128'),
  ]


def test_cells_and_resume(argv, capsys, tmp_path):
  plot = tmp_path / 'plot.png'
  first = [*argv, '--methods=one_shot,fisher']
  assert healing.main(first) == 0
  file = pathlib.Path(argv[2].removeprefix('--json='))
  cells = json.loads(file.read_text())['cells']
  one_shot, fisher = cells
  assert (one_shot['method'], fisher['method']) == ('one_shot', 'fisher')
  assert one_shot['held_out_losses'] == []
  ((before, after),) = fisher['held_out_losses']
  assert after < before
  low, high = fisher['ci95']
  assert low <= fisher['ratio'] <= high
  again = [*argv, '--methods=one_shot,fisher,closed_form', f'--plot={plot}']
  assert healing.main(again) == 0
  cells = json.loads(file.read_text())['cells']
  assert cells[:2] == [one_shot, fisher]
  assert cells[2]['method'] == 'closed_form'
  assert plot.stat().st_size > 1000
  assert 'geometric mean' in capsys.readouterr().out
  assert healing.main([*first, '--steps=31']) == _cli.EXIT_ERROR
  assert 'Give another --json' in capsys.readouterr().err


def test_unknown_method(argv, capsys):
  assert healing.main([*argv, '--methods=magic']) == _cli.EXIT_ERROR
  assert "'magic' is none of" in capsys.readouterr().err
