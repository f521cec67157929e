# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Known data sets: what their rows look like, and how they are asked.

Rows are those of the files that the authors of a set publish, of TFDS, or of
the Hugging Face hub as JSON lines; where these differ, each is taken.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import re
from typing import Any

from gemma_ext import errors
from gemma_ext.evals import _items

Row = Mapping[str, Any]
_LETTERS = 'ABCDEFGHIJ'
_FEVER = ('SUPPORTS', 'REFUTES', 'NOT ENOUGH INFO')
_FEVER_WORDS = (' supported', ' refuted', ' not decidable')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """How a data set is asked.

  Attributes:
    kind: `Choice`, `Question` or `Program`.
    convert: From a row to the fields of an item, and 'solution', the text that
      answers it where the item is an example of a few-shot prompt.
    check: How what was written is judged; '' of choices.
    stops: What ends an answer.
  """

  kind: type[Any]
  convert: Callable[[Row], dict[str, Any]]
  check: str = ''
  stops: tuple[str, ...] = ()


def _gsm8k(row: Row) -> dict[str, Any]:
  """Cobbe et al., arXiv 2110.14168: {"question", "answer": "... #### 42"}."""
  answer = row['answer'].rsplit('####', 1)[-1].strip()
  # The set marks its sums, <<2+3=5>>, for a calculator.
  worked = re.sub(r'<<[^>]*>>', '', row['answer'].rsplit('####', 1)[0]).strip()
  return {
    'prompt': f'Question: {row["question"].strip()}\nAnswer:',
    'answer': answer,
    'solution': f' {worked} The answer is {answer}.',
  }


def _math(row: Row) -> dict[str, Any]:
  """Hendrycks et al., arXiv 2103.03874: {"problem", "solution"}.

  Subjects are fixed strata, not passages that were drawn: no clusters.
  """
  answer = boxed(row['solution'])
  if answer is None:
    raise ValueError("'solution' has no \\boxed{...}")
  return {
    'prompt': f'Problem: {row["problem"].strip()}\nSolution:',
    'answer': answer,
    'solution': f' {row["solution"].strip()}',
  }


def _arc(row: Row) -> dict[str, Any]:
  """Clark et al., arXiv 1803.05457: {"question", "choices", "answerKey"}."""
  question, choices = row['question'], row.get('choices')
  if isinstance(question, Mapping):
    question, choices = question['stem'], question['choices']
  if isinstance(choices, Mapping):
    texts, labels = choices['text'], choices['label']
  elif isinstance(choices, Sequence):
    texts = [c['text'] for c in choices]
    labels = [c['label'] for c in choices]
  else:
    raise KeyError('choices')
  key = row['answerKey']
  if key not in labels and isinstance(key, str) and key in _LETTERS:
    key = _LETTERS.index(key)  # Labels of TFDS are numbers.
  return {
    'prompt': f'Question: {question.strip()}\nAnswer:',
    'choices': [f' {text.strip()}' for text in texts],
    'answer': list(labels).index(key),
  }


def _truthful_qa(row: Row) -> dict[str, Any]:
  """Lin et al., arXiv 2109.07958, one right answer (MC1)."""
  if 'mc1_targets' in row:
    targets = row['mc1_targets']
    choices, labels = targets['choices'], targets['labels']
    if sum(labels) != 1:
      raise ValueError(f"'mc1_targets' has {sum(labels)} right answers")
    answer = list(labels).index(1)
  else:
    choices = [row['best_answer'], *row['incorrect_answers']]
    answer = 0
  return {
    'prompt': f'Q: {row["question"].strip()}\nA:',
    'choices': [f' {text.strip()}' for text in choices],
    'answer': answer,
  }


def _fever(row: Row) -> dict[str, Any]:
  """Thorne et al., arXiv 1803.05355: {"claim", "label"}, without evidence."""
  label = str(row['label']).strip().upper()
  return {
    'prompt': f'Claim: {row["claim"].strip()}\nThis claim is',
    'choices': [*_FEVER_WORDS],
    'answer': _FEVER.index(label),
  }


def _mbpp(row: Row) -> dict[str, Any]:
  """Austin et al., arXiv 2108.07732: {"text", "code", "test_list"}."""
  tests = row['test_list']
  name = _entry_point(row['code'], tests[0])
  setup = row.get('test_setup_code') or row.get('test_imports') or ''
  if not isinstance(setup, str):
    setup = '\n'.join(setup)
  asked = (row.get('text') or row['prompt']).strip()
  checks = ''.join(f'  {line}\n' for test in tests for line in test.split('\n'))
  return {
    'prompt': f'"""\n{asked}\n{tests[0]}\n"""\ndef {name}(',
    'test': f'{setup}\ndef check(candidate):\n{checks}',
    'entry_point': name,
  }


def _entry_point(code: str, test: str) -> str:
  """The function of `code` that a test calls; read, never run."""
  defined = {
    node.name
    for node in ast.walk(ast.parse(code))
    if isinstance(node, ast.FunctionDef)
  }
  for node in ast.walk(ast.parse(test)):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
      if node.func.id in defined:
        return node.func.id
  raise ValueError(f'the test {test!r} calls none of {sorted(defined)}')


def _human_eval(row: Row) -> dict[str, Any]:
  """Chen et al., arXiv 2107.03374: {"prompt", "test", "entry_point"}."""
  return {key: row[key] for key in ('prompt', 'test', 'entry_point')}


FORMATS: dict[str, Format] = {
  'gsm8k': Format(
    kind=_items.Question,
    convert=_gsm8k,
    check='last_number',
    stops=('\nQuestion:',),
  ),
  'math': Format(
    kind=_items.Question, convert=_math, check='boxed', stops=('\nProblem:',)
  ),
  'arc': Format(kind=_items.Choice, convert=_arc),
  'truthful_qa': Format(kind=_items.Choice, convert=_truthful_qa),
  'fever': Format(kind=_items.Choice, convert=_fever),
  'mbpp': Format(kind=_items.Program, convert=_mbpp, check='code'),
  'human_eval': Format(kind=_items.Program, convert=_human_eval, check='code'),
}


def converted(name: str, row: Row, place: str) -> dict[str, Any]:
  """Returns the fields of an item, with its 'solution'.

  Args:
    name: Of the format.
    row: A row of the set.
    place: Where it is from, for errors.

  Raises:
    DataError: If the row is not of that format; says what is wrong with it.
  """
  try:
    fields = FORMATS[name].convert(row)
  except (KeyError, ValueError, TypeError, AttributeError, IndexError) as e:
    why = f'no {e}' if isinstance(e, KeyError) else str(e)
    raise errors.DataError(
      f'{place}: no row of {name!r}: {why}; its fields are {sorted(row)}.'
    ) from e
  except SyntaxError as e:
    raise errors.DataError(f'{place}: not Python: {e}.') from e
  for key in ('id', 'task_id', 'cluster'):
    if key in row:
      fields.setdefault(key, str(row[key]))
  return fields


def boxed(text: str) -> str | None:
  r"""Returns what the last `\boxed{...}` holds, braces balanced.

  Args:
    text: Of a solution; without a box, what follows 'answer is'.
  """
  at = text.rfind('\\boxed{')
  if at < 0:
    found = re.findall(r'answer is:?\s*([^\n]+)', text, re.IGNORECASE)
    return found[-1].strip().rstrip('.') if found else None
  depth = 0
  for end in range(at + len('\\boxed'), len(text)):
    depth += {'{': 1, '}': -1}.get(text[end], 0)
    if not depth:
      return text[at + len('\\boxed{') : end]
  return None


def same_math(answer: str, written: str) -> float:
  r"""1 if the last `\boxed{...}` that was written is the answer.

  Spacing, sizes of brackets and of fractions, units in `\text` and dollars do
  not count; numbers are compared as numbers.

  Args:
    answer: The right answer.
    written: What the model wrote.
  """
  found = boxed(written)
  if found is None:
    return 0.0
  want, got = _plain_math(answer), _plain_math(found)
  try:
    return float(float(want) == float(got))
  except ValueError:
    return float(want == got)


def _plain_math(text: str) -> str:
  text = re.sub(r'\\(?:left|right|displaystyle)\b|\\[!,;: ]|[$\s]', '', text)
  text = re.sub(r'\\[dt]frac', r'\\frac', text)
  text = re.sub(r'\\(?:text|mathrm|mbox)\{([^{}]*)\}', r'\1', text)
  text = re.sub(r'\\frac(\d)(\d)', r'\\frac{\1}{\2}', text)
  text = re.sub(r'(?<=\d),(?=\d{3}\b)', '', text)
  return text.replace('\\%', '').replace('^\\circ', '').rstrip('.')
