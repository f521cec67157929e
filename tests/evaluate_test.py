# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of `python -m gemma_ext.evaluate` on tiny models."""

import gc
import json

import jax
import numpy as np
import pytest

from gemma_ext import ckpts
from gemma_ext import data
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext import evaluate
from tests import tiny

_RNG = np.random.default_rng(0)
_WORDS = 'the capital of a group is one river that flows'.split()


def _live_bytes():
  gc.collect()
  return sum(x.nbytes for x in jax.live_arrays())


@pytest.fixture(name='loaded')
def _loaded(monkeypatch):
  """Serves tiny checkpoints by name; lists (name, dtype, live bytes)."""
  seen = []

  def locate(name):
    if name == 'missing':
      raise errors.CheckpointNotFoundError("No checkpoint 'missing'. Looked.")

  def load(name, *, dtype, progress):
    del progress
    seen.append((name, str(dtype), _live_bytes()))
    model = tiny.model('gemma2' if name == 'other' else 'gemma3', dtype=dtype)
    version = model.INFO.tokenizer_version
    return ckpts.Checkpoint(
      model=model,
      params=tiny.params(model, seed=len(name)),
      tokenizer=None if name == 'bare' else tiny.tokenizer(version),
      source=f'/models/{name}',
    )

  monkeypatch.setattr(ckpts, 'locate', locate)
  monkeypatch.setattr(ckpts, 'load', load)
  return seen


@pytest.fixture(name='texts')
def _texts(tmp_path):
  folder = tmp_path / 'texts'
  folder.mkdir()
  for i in range(12):
    words = _RNG.choice(_WORDS, 30)
    (folder / f'{i:02}.txt').write_text(' '.join(words))
  return folder


def test_with_baseline(loaded, texts, tmp_path, capsys):
  path = tmp_path / 'out.json'
  before = _live_bytes()
  code = evaluate.main(
    [
      '--checkpoint=mine',
      '--baseline=baseline',
      f'--text={texts}',
      '--window=32',
      '--batch_size=4',
      '--dtype=float32',
      f'--json={path}',
    ]
  )
  captured = capsys.readouterr()
  assert code == 0, captured.err
  found = json.loads(path.read_text())
  for part in (found, found['baseline']):
    assert part['ci95'][0] < part['perplexity'] < part['ci95'][1]
    assert part['documents'] == 12
    assert part['weight_bytes'] == 2 * part['dense_bf16_bytes']
    assert part['recipe'] is None
  assert found['tokens'] == found['baseline']['tokens'] > 12 * 30
  assert (found['split'], found['source']) == ('all', '/models/mine')
  ratio = found['perplexity'] / found['baseline']['perplexity']
  assert found['paired_delta']['ratio'] == pytest.approx(ratio)
  low, high = found['paired_delta']['ci95']
  assert low < ratio < high
  assert f'{found["perplexity"]:,.3f}' in captured.out
  assert f'perplexity ratio {ratio:,.4f}' in captured.out
  # The first checkpoint (1.9 MB) is gone when the second one loads.
  assert [name for name, _, _ in loaded] == ['mine', 'baseline']
  assert loaded[1][2] - before < 0.1 * found['weight_bytes']


def test_with_a_baseline_measured_before(loaded, texts, tmp_path, capsys):
  argv = [f'--text={texts}', '--window=32', '--dtype=float32']
  one, two, three = (tmp_path / f'{x}.json' for x in 'abc')
  assert evaluate.main([*argv, '--checkpoint=baseline', f'--json={one}']) == 0
  argv.append('--checkpoint=mine')
  assert evaluate.main([*argv, '--baseline=baseline', f'--json={two}']) == 0
  del loaded[:]
  assert evaluate.main([*argv, f'--baseline={one}', f'--json={three}']) == 0
  assert [name for name, _, _ in loaded] == ['mine']
  found, direct = (json.loads(x.read_text()) for x in (three, two))
  assert found['paired_delta'] == direct['paired_delta']
  assert found['baseline'].items() <= direct['baseline'].items()
  # Its own baseline is not read: it is the first of the file that counts.
  assert evaluate.main([*argv, f'--baseline={three}', f'--json={two}']) == 0
  assert json.loads(two.read_text())['paired_delta']['ratio'] == 1
  capsys.readouterr()
  # Other tokens are an error before they are measured.
  assert evaluate.main([*argv, f'--baseline={one}', '--max_tokens=64']) == 2
  error = capsys.readouterr().err
  assert 'the documents differ' in error
  assert 'Measuring' not in error


def test_a_file_that_is_no_baseline(loaded, texts, tmp_path, capsys):
  path = tmp_path / 'a.json'
  argv = ['--checkpoint=mine', f'--text={texts}', f'--baseline={path}']
  for content, message in (
    (None, 'Cannot read'),
    ('{', 'is not JSON'),
    ('{"perplexity": 1}', 'Not the JSON of a perplexity'),
  ):
    if content is not None:
      path.write_text(content)
    assert evaluate.main(argv) == 2
    assert message in capsys.readouterr().err
  assert evaluate.main([*argv, '--divergence']) == 2
  assert 'holds no distributions' in capsys.readouterr().err
  assert not loaded


def test_divergence_is_that_of_both_distributions(loaded, texts, tmp_path):
  path = tmp_path / 'out.json'
  argv = [
    *('--checkpoint=mine', f'--text={texts}', '--window=32', '--batch_size=4'),
    *('--divergence', '--dtype=float32', f'--json={path}'),
  ]
  assert evaluate.main([*argv, '--baseline=baseline']) == 0
  found = json.loads(path.read_text())['divergence']
  model = tiny.model('gemma3')
  windows = data.windows(
    tiny.tokenizer(3), data.load_documents(texts), length=32
  )
  p, q = (
    np.asarray(
      jax.nn.log_softmax(
        model.apply(
          {'params': tiny.params(model, seed=len(name))}, windows.tokens
        ).logits
      ),
      np.float64,
    )
    for name in ('baseline', 'mine')
  )
  kl = (np.exp(p) * (p - q)).sum(axis=-1)[:, :-1]
  want = kl[windows.score_mask[:, 1:]].mean()
  assert found['nats'] == pytest.approx(want, rel=1e-3)
  assert found['ci95'][0] < want < found['ci95'][1]
  assert evaluate.main([*argv, '--baseline=mine']) == 0
  found = json.loads(path.read_text())['divergence']
  assert found == {'nats': 0.0, 'ci95': [0.0, 0.0]}


def test_same_as_from_python(loaded, texts, tmp_path):
  path = tmp_path / 'out.json'
  argv = [f'--text={texts}', '--window=32', '--batch_size=4', f'--json={path}']
  assert evaluate.main(['--checkpoint=mine', '--dtype=float32', *argv]) == 0
  model = tiny.model('gemma3')
  windows = data.windows(
    tiny.tokenizer(3), data.load_documents(texts), length=32
  )
  result = evals.perplexity(
    model, tiny.params(model, seed=4), windows, batch_size=4
  )
  found = json.loads(path.read_text())
  assert found['perplexity'] == pytest.approx(result.perplexity, rel=1e-5)
  assert found['windows_sha256'] == windows.sha256
  assert found['baseline'] is None
  assert found['paired_delta'] is None


def test_sample_measures_on_the_test_split(loaded, tmp_path, monkeypatch):
  documents = [
    data.Document(text=f'The river number {i} flows.', id=str(i), source='s')
    for i in range(20)
  ]
  monkeypatch.setattr(data, 'load_documents', lambda *a, **k: documents)
  path = tmp_path / 'out.json'
  argv = ['--checkpoint=mine', '--window=32', '--batch_size=4']
  assert evaluate.main([*argv, f'--json={path}']) == 0
  found = json.loads(path.read_text())
  assert (found['split'], found['documents']) == ('test', 4)
  assert found['data_sha256'] == data.split(documents).test.sha256
  assert found['weight_bytes'] == found['dense_bf16_bytes']
  assert found['baseline'] is None
  code = evaluate.main([*argv, '--split=calibration', f'--json={path}'])
  assert code == 0
  assert json.loads(path.read_text())['documents'] == 12


def test_one_document_is_said_to_be_one(loaded, texts, capsys):
  argv = [f'--text={texts / "00.txt"}', '--window=32', '--batch_size=4']
  assert evaluate.main(['--checkpoint=mine', '--max_tokens=40', *argv]) == 0
  out = capsys.readouterr().out
  assert '40 tokens of 1 documents' in out
  assert 'A single document' in out


def test_tokenizer_of_the_first_serves_a_baseline_without(
  loaded, texts, capsys
):
  argv = [f'--text={texts}', '--window=32', '--batch_size=4', '--max_tokens=64']
  code = evaluate.main(['--checkpoint=mine', '--baseline=bare', *argv])
  assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
  'argv, message',
  [
    (['--checkpoint=mine', '--divergence'], 'from what? Give --baseline'),
    (['--checkpoint=missing'], "No checkpoint 'missing'"),
    (['--checkpoint=bare'], "'bare' has no tokenizer"),
    (['--checkpoint=mine', '--text=nowhere'], "No text at 'nowhere'"),
    (['--checkpoint=mine', '--json=/no/such/x.json'], 'Create it first'),
    (['--checkpoint=mine', '--stride=32'], 'stride must be 1'),
    (['--checkpoint=mine', '--x_bits=8'], "'mine' is dense"),
    (
      ['--checkpoint=mine', '--baseline=other', '--max_tokens=64'],
      'Only results on the same tokens can be paired',
    ),
  ],
)
def test_errors_are_one_line(loaded, texts, capsys, argv, message):
  defaults = [f'--text={texts}', '--window=32', '--batch_size=4']
  assert evaluate.main([*defaults, *argv]) == 2
  err = capsys.readouterr().err.splitlines()
  assert err[-1].startswith('error: ')
  assert message in err[-1]
  assert not any('Traceback' in line for line in err)


def test_a_missing_baseline_costs_no_measurement(loaded, texts, capsys):
  argv = ['--checkpoint=mine', '--baseline=missing', f'--text={texts}']
  assert evaluate.main(argv) == 2
  assert "No checkpoint 'missing'" in capsys.readouterr().err
  assert loaded == []
