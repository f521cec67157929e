# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of models of suites: how they are compressed, and what is timed."""

import types

import jax
import numpy as np
import psutil
import pytest

import gemma_ext as gx
from gemma_ext import ckpts
from gemma_ext import data
from gemma_ext import errors
from gemma_ext.compress import __main__ as compress_main
from tests import tiny
from tools.benchmarks import _measure
from tools.benchmarks import _speed
from tools.benchmarks import _suite

_RECIPE = '{"version": 1, "rules": [{"match": ".*mlp.*", "method": "ternary"}]}'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('measure')
  tiny.checkpoint(path / 'dense', one_layer=True)
  rng = np.random.default_rng(0)
  words = 'the capital of a group is one river that flows'.split()
  (path / 'text.txt').write_text(' '.join(rng.choice(words, 2000)))
  (path / 'recipe.json').write_text(_RECIPE)
  return path


def _load(folder, **fields):
  spec = _suite.Model(
    name='m',
    kind='checkpoint',
    source=str(folder / 'dense'),
    recipe=str(folder / 'recipe.json'),
    **fields,
  )
  return _measure.load(spec, None)


def _same(a, b):
  return all(
    jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))
  )


def test_a_recipe_is_what_the_command_makes(folder, tmp_path):
  loaded, tokenizer = _load(folder, calibration=str(folder / 'text.txt'))
  argv = [
    f'--checkpoint={folder}/dense',
    f'--recipe={folder}/recipe.json',
    f'--calibration={folder}/text.txt',
    f'--output={tmp_path}/made',
  ]
  assert compress_main.main(argv) == 0
  made = ckpts.load(tmp_path / 'made')
  assert _same(loaded.params, made.params)
  assert loaded.calibration['text'] == f'{folder}/text.txt'
  assert loaded.calibration['tokens'] > 500
  # Its file is gone, and it was read before.
  assert tokenizer.encode('the river') == tiny.tokenizer(3).encode('the river')
  plain, _ = _load(folder, calibration='none')
  assert plain.calibration is None and plain.nbytes == loaded.nbytes
  dense = ckpts.load(folder / 'dense', dtype=jax.numpy.bfloat16)
  recipe = gx.Recipe.of(str(folder / 'recipe.json'), num_layers=1)
  once = gx.compress(dense.model, dense.params, recipe)
  assert _same(plain.params, once) and not _same(plain.params, loaded.params)
  moved, _ = _load(
    folder, calibration=str(folder / 'text.txt'), compensate=True
  )
  assert not _same(moved.params, loaded.params)


def test_what_is_compressed_already_is_not_again(folder, tmp_path):
  argv = [f'--checkpoint={folder}/dense', '--recipe=int8']
  assert compress_main.main([*argv, f'--output={tmp_path}/made']) == 0
  spec = _suite.Model(
    name='m', kind='checkpoint', source=f'{tmp_path}/made', recipe='int8'
  )
  with pytest.raises(errors.ParamsMismatchError, match='compressed already'):
    _measure.load(spec, None)


def test_sizes_that_are_not_compared(monkeypatch):
  task = _suite.Task(name='t', kind='speed', options={'rounds': 1})
  timed = []

  def measure(loaded, beside, options):
    timed.append(beside)
    return {'token_seconds': [1.0]}

  monkeypatch.setattr(_speed, 'measure', measure)
  dense = _measure.Loaded(nbytes=1, dense_bytes=1, model='dense')
  go = lambda **fields: _measure.run(
    task,
    _measure.Loaded(nbytes=1, dense_bytes=1, **fields),
    None,
    None,
    lambda: dense,
  )
  # A shape is of another size than the baseline.
  assert go(shape='27b')['token_seconds'] == [1.0] and timed == [None]
  assert go(model='int8') is not None and timed[1:] == [dense]
  # qwix' weights are run by the dense model.
  assert go(model='qwix', stands_in=True) is None and len(timed) == 2


def test_memory_that_is_free(monkeypatch):
  assert 0 < _speed._free_bytes() <= psutil.virtual_memory().total
  stats = {'bytes_limit': 100, 'bytes_in_use': 30}
  gpu = types.SimpleNamespace(memory_stats=lambda: stats)
  monkeypatch.setattr(jax, 'devices', lambda: [gpu])
  assert _speed._free_bytes() == 70


def test_bytes_are_those_of_the_tokens_that_are_scored(folder):
  tokenizer = ckpts.load(folder / 'dense').tokenizer
  texts = ['The river flows.', 'Zürich 東京 and a group of words. ' * 9]
  documents = [
    data.Document(id=str(i), text=text, source='t')
    for i, text in enumerate(texts)
  ]
  sizes = [len(text.encode()) for text in texts]
  cut = lambda **kwargs: _measure._scored_bytes(
    data.windows(tokenizer, documents, length=16, **kwargs), tokenizer
  )
  # Tokens that windows repeat as context are not scored twice.
  assert cut() == cut(stride=4) == sizes
  some = cut(max_tokens=30)
  assert some[0] == sizes[0] and 30 < some[1] < sizes[1] / 2
