# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of expected tokens, from end to end on a tiny model."""

import json

import numpy as np
import pytest

from tests import tiny
from tools.benchmarks import expected_tokens


def test_texts_are_told_apart(tmp_path):
  dense = tiny.checkpoint(tmp_path / 'dense')
  for name, words in (('a', 'the capital of a group'), ('b', 'is one river')):
    rng = np.random.default_rng(0)
    rows = [' '.join(rng.choice(words.split(), 60)) for _ in range(12)]
    (tmp_path / f'{name}.jsonl').write_text(
      '\n'.join(json.dumps({'text': row}) for row in rows)
    )
  argv = [
    f'--checkpoint={dense}',
    f'--text={tmp_path}/a.jsonl',
    f'--others={tmp_path}/b.jsonl',
    f'--json={tmp_path}/found.json',
  ]
  assert expected_tokens.main(argv) == 0
  rows = json.loads((tmp_path / 'found.json').read_text())['rows']
  assert len(rows) == 6
  alike, other = (
    next(r for r in rows if key in r['text'] and r['guess'] == 'expected')
    for key in ('a.jsonl', 'b.jsonl')
  )
  assert alike['never_counted'] < 0.1 < other['never_counted']
  assert alike['nats'] < other['nats'] and alike['loss'] < other['loss']


def test_bits_are_what_loses_least():
  guess = np.array([0.5, 0.25, 0.125, 0.125])
  bits = expected_tokens._bits(guess)
  assert bits.mean() == pytest.approx(3.5, abs=1e-6)
  np.testing.assert_allclose(bits[:2] - bits[2], [1, 0.5], atol=1e-6)
