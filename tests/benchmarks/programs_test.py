# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Programs that measure, from end to end on tiny models: not what they find."""

import json

import jax
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import evals
from tests import tiny
from tools.benchmarks import _shapes
from tools.benchmarks import candidates
from tools.benchmarks import front
from tools.benchmarks import long_context

_WORDS = 'the capital of a group is one river that flows'.split()


def test_front(tmp_path, monkeypatch, capsys):
  dense = tiny.checkpoint(tmp_path / 'dense', one_layer=True)
  (tmp_path / 'texts').mkdir()
  rng = np.random.default_rng(0)
  for i in range(12):
    text = ' '.join(rng.choice(_WORDS, 60))
    (tmp_path / 'texts' / f'{i}.txt').write_text(text)
  few = gx.Int(bits=4, group=64), gx.Int(bits=8, group=64)
  monkeypatch.setattr('gemma_ext.compress._sensitivity.CANDIDATES', few)
  monkeypatch.setattr('gemma_ext.compress._sensitivity.BANDS', 2)
  monkeypatch.setattr(front, '_CORRECTED', (0.4,))
  argv = [
    f'--checkpoint={dense}',
    f'--text={tmp_path}/texts',
    f'--output={tmp_path}/out',
    '--budgets=40%',
    '--uniform=int4 g32',
    '--tokens=100',
    f'--json={tmp_path}/front.json',
    f'--plot={tmp_path}/front.png',
  ]
  assert front.main(argv) == 0
  result = json.loads((tmp_path / 'front.json').read_text())
  budget, uniform = result['points']
  size = sum(leaf.size for leaf in jax.tree.leaves(tiny.params(tiny.shallow())))
  assert budget['planned_bytes'] < budget['bytes'] <= 0.4 * 2 * size
  assert uniform['name'] == 'int4 g32' and 'predicted_loss' not in uniform
  for point in (budget, uniform):
    assert point['ci95'][0] < point['ratio'] < point['ci95'][1]
  assert (tmp_path / 'front.png').read_bytes().startswith(b'\x89PNG')
  monkeypatch.setattr(candidates, '_INTEGERS', few[:1])
  families = {
    'low rank': (gx.LowRank(weights=few[0], rank=8),),
    'planes': (gx.Ternary(planes=2, group=32),),
  }
  monkeypatch.setattr(candidates, '_FAMILIES', families)
  sensitivities = f'{tmp_path}/out/sensitivities.json'
  more = ['--budgets=40%', f'--json={tmp_path}/more.json']
  assert (
    candidates.main([*argv[:2], f'--sensitivities={sensitivities}', *more]) == 0
  )
  found = json.loads((tmp_path / 'more.json').read_text())
  (order,) = found['activation_order'].values()
  assert order['least'] <= order['ratio'] <= order['most'] <= 1.001
  found = found['budgets']
  assert [row['family'] for row in found] == ['low rank', 'planes']
  for row in found:
    assert 0 < row['loss_with'] <= row['loss'] * 1.001
    assert row['weights'] == len(gx.nn.sites(tiny.shallow())) - 1
  # Given once more, nothing is fitted.
  refuse = lambda *args, **kwargs: pytest.fail('fits again')
  monkeypatch.setattr('gemma_ext.compress._weight.compress_weight', refuse)
  assert front.main(argv) == 0
  again = json.loads((tmp_path / 'front.json').read_text())
  assert again['points'] == result['points']
  monkeypatch.setattr(front, '_seconds_a_token', lambda loaded: 0.5)
  assert front.main([*argv, '--rounds=6']) == 0
  timed = json.loads((tmp_path / 'front.json').read_text())['points']
  assert [p['tokens_per_second']['median'] for p in timed] == [2.0, 2.0]
  assert [p['speedup']['ci95'] for p in timed] == [[1.0, 1.0]] * 2
  rows = [
    dict(point, bytes=size, window_nll=nll)
    for point, size, nll in zip(
      timed, (3, 4), ([1.0, 2], [2.0, 4]), strict=True
    )
  ]
  two = evals.PerplexityResult(
    window_nll=np.ones(2),
    window_tokens=np.array([5, 5]),
    window_document=np.arange(2),
    documents=('a', 'b'),
    window=6,
    stride=5,
    seed=0,
    data_sha256='',
    windows_sha256='',
  )
  front._against(rows, two)
  assert rows[1]['against']['ratio'] == pytest.approx(np.exp(-0.3))
  assert 'against' not in rows[0]


def test_long_context(tmp_path, monkeypatch):
  monkeypatch.setitem(_shapes.MODELS, '270m', tiny.TinyGemma3)
  monkeypatch.setattr('gemma_ext.text._prompt.PIECE', 32)
  monkeypatch.setattr('tools.benchmarks._shapes.TOKENS', (5, 500))
  argv = [
    '--shape=270m',
    '--context=200',
    '--both=100',
    '--rounds=2',
    '--prefill_rounds=1',
    '--tokens=2',
    f'--json={tmp_path}/r.json',
  ]
  assert long_context.main(argv) == 0
  result = json.loads((tmp_path / 'r.json').read_text())
  sizes = {k: v['cache_bytes'] for k, v in result['decoding'].items()}
  assert sizes['rolling'] < 0.6 * sizes['full'] == 0.6 * sizes['official']
  assert result['prefill']['whole']['tokens'] == 200
