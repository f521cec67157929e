# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of data sets by name, on rows as their authors publish them."""

import json

import pytest

from gemma_ext import errors
from gemma_ext import evals

_ARC = {
  'id': 'Mercury_1',
  'question': {
    'stem': 'Which is a gas?',
    'choices': [
      {'text': 'iron', 'label': 'A'},
      {'text': 'oxygen', 'label': 'B'},
    ],
  },
  'answerKey': 'B',
}
_ARC_HUB = {
  'id': 'Mercury_1',
  'question': 'Which is a gas?',
  'choices': {'text': ['iron', 'oxygen'], 'label': ['1', '2']},
  'answerKey': '2',
}
_ARC_TFDS = _ARC_HUB | {
  'choices': {'text': ['iron', 'oxygen'], 'label': [0, 1]},
  'answerKey': 1,
}
_GSM8K = {
  'question': 'Tom has 2 bags of 3 pears. How many pears?',
  'answer': 'He has 2*3=<<2*3=6>>6 pears.\n#### 6',
}
_MATH = {
  'problem': 'What is $1/2+1/2$?',
  'level': 'Level 1',
  'type': 'Algebra',
  'solution': 'The halves add to $\\boxed{\\frac{2}{2}}$.',
}
_MBPP = {
  'task_id': 7,
  'text': 'Write a function to add two numbers.',
  'code': 'def helper(x):\n  return x\ndef add(a, b):\n  return a + b',
  'test_setup_code': 'import math',
  'test_list': ['assert add(1, 2) == 3', 'assert math.isclose(add(1, 1), 2)'],
}


def _load(tmp_path, rows, name, **kwargs):
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  kind = evals.FORMATS[name].kind
  return evals.load_items(path, kind, format=name, **kwargs)


@pytest.mark.parametrize('row', [_ARC, _ARC_HUB, _ARC_TFDS])
def test_arc(tmp_path, row):
  (item,) = _load(tmp_path, [row], 'arc')
  assert item.prompt == 'Question: Which is a gas?\nAnswer:'
  assert item.choices == (' iron', ' oxygen') and item.answer == 1
  assert item.id == 'Mercury_1'


def test_gsm8k_and_its_examples(tmp_path):
  other = _GSM8K | {'question': 'And 1 more?', 'answer': '#### 1,007'}
  (item,) = _load(tmp_path, [_GSM8K, other], 'gsm8k', shots=1)
  assert item.prompt == (
    'Question: Tom has 2 bags of 3 pears. How many pears?\nAnswer:'
    ' He has 2*3=6 pears. The answer is 6.\n\nQuestion: And 1 more?\nAnswer:'
  )
  written = [' 1000 + 7. The answer is 1007.']
  assert evals.score([item], written, 'last_number') == [1.0]


@pytest.mark.parametrize(
  'answer, written, right',
  [
    ('\\frac{1}{2}', 'It is $\\boxed{\\dfrac12}$.', True),
    ('\\frac{1}{2}', 'It is $\\boxed{\\frac{1}{3}}$.', False),
    ('1,000', 'so \\boxed{1000.0}', True),
    ('(1, 2)', '\\boxed{\\left(1,2\\right)}', True),
    ('5\\text{ cm}', '\\boxed{5cm}', True),
    ('x^{2}', '\\boxed{3} and \\boxed{x^{2}}', True),
    ('12', 'The answer is 12.', True),
    ('12', 'It is 12.', False),
    ('12', 'never closed \\boxed{12', False),
  ],
)
def test_answers_of_math(tmp_path, answer, written, right):
  row = _MATH | {'solution': f'\\boxed{{{answer}}}'}
  (item,) = _load(tmp_path, [row], 'math')
  # One subject's file is no single cluster.
  assert item.answer == answer and item.cluster == item.id
  assert evals.score([item], [written], 'boxed') == [float(right)]


@pytest.mark.parametrize(
  'row',
  [
    {
      'question': 'Is it?',
      'mc1_targets': {'choices': ['Yes', 'No'], 'labels': [0, 1]},
    },
    {
      'question': 'Is it?',
      'best_answer': 'No',
      'incorrect_answers': ['Yes'],
    },
  ],
)
def test_truthful_qa(tmp_path, row):
  (item,) = _load(tmp_path, [row], 'truthful_qa')
  assert item.prompt == 'Q: Is it?\nA:'
  assert item.choices[item.answer] == ' No' and len(item.choices) == 2


def test_fever(tmp_path):
  rows = [
    {'id': i, 'claim': 'Rain is wet.', 'label': label}
    for i, label in enumerate(('SUPPORTS', 'REFUTES', 'NOT ENOUGH INFO'))
  ]
  items = _load(tmp_path, rows, 'fever')
  assert [item.answer for item in items] == [0, 1, 2]
  assert items[0].prompt + items[0].choices[0] == (
    'Claim: Rain is wet.\nThis claim is supported'
  )


def test_fever_has_a_row_for_each_piece_of_evidence(tmp_path):
  row = {'id': 7, 'claim': 'Rain is wet.', 'label': 'SUPPORTS'}
  rows = [row | {'evidence_id': 1}, row | {'evidence_id': 2}]
  (item,) = _load(tmp_path, rows, 'fever')
  assert item.id == '7'
  with pytest.raises(errors.DataError, match=r"two items of id '7'.*:2"):
    _load(tmp_path, [row, row | {'label': 'REFUTES'}], 'fever')


def test_mbpp_is_run(tmp_path):
  (item,) = _load(tmp_path, [_MBPP], 'mbpp')
  assert item.entry_point == 'add' and item.id == '7'
  assert item.prompt.endswith('"""\ndef add(')
  written = ['a, b):\n  return a + b\n', 'a, b):\n  return a - b\n']
  try:
    got = [evals.score([item], [w], 'code')[0] for w in written]
  except errors.BackendError as e:
    pytest.skip(str(e))
  assert got == [1.0, 0.0]


@pytest.mark.parametrize(
  'name, row, message',
  [
    ('gsm8k', {'question': 'a'}, "no 'answer'; its fields"),
    ('math', _MATH | {'solution': 'none'}, 'has no .*boxed'),
    ('arc', _ARC | {'answerKey': 'Z'}, 'no row of'),
    ('arc', {'question': 'a', 'answerKey': 'A'}, "no 'choices'"),
    ('fever', {'claim': 'a', 'label': 'maybe'}, "no row of 'fever'"),
    ('mbpp', _MBPP | {'code': 'def ('}, 'not Python'),
    ('mbpp', _MBPP | {'test_list': ['assert f(1)']}, 'calls none of'),
    ('truthful_qa', {'question': 'a'}, "no 'best_answer'"),
  ],
)
def test_rows_that_are_none(tmp_path, name, row, message):
  with pytest.raises(errors.DataError, match=message):
    _load(tmp_path, [row], name)


def test_formats_that_are_none(tmp_path):
  path = tmp_path / 'x.jsonl'
  with pytest.raises(errors.DataError, match="format='x'; expected one of"):
    evals.load_items(path, evals.Choice, format='x')
  with pytest.raises(errors.DataError, match='of another kind than choice'):
    evals.load_items(path, evals.Choice, format='gsm8k')
  with pytest.raises(errors.DataError, match='have no examples'):
    evals.load_items(path, evals.Program, format='mbpp', shots=2)
  with pytest.raises(errors.DataError, match='no items after 1 examples'):
    _load(tmp_path, [_GSM8K], 'gsm8k', shots=1)
