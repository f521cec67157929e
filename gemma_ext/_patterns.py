# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Regular expressions on parameter paths, safe to take from a checkpoint."""

from __future__ import annotations

import difflib
import functools
import math
import re
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from gemma_ext import errors

_MAX_LENGTH = 512
# `re` backtracks: a pattern that it can try in more ways than that may take
# seconds a path.
MAX_WAYS = 1 << 20
_MAX_PATH = 64


def check(pattern: Any) -> None:
  """Raises `RecipeError` unless the pattern is one, and of bounded cost."""
  if not isinstance(pattern, str) or not 0 < len(pattern) <= _MAX_LENGTH:
    raise errors.RecipeError(
      f'A pattern is a string of 1 to {_MAX_LENGTH} characters, got'
      f' {brief(pattern)}.'
    )
  try:
    ways(pattern)
    compiled(pattern)
  except (re.error, OverflowError, RecursionError) as e:
    raise errors.RecipeError(
      f'Pattern {pattern!r} is not a regular expression: {e}.'
    ) from e


@functools.lru_cache(maxsize=8192)
def compiled(pattern: str) -> re.Pattern[str]:
  """The expression that covers whole segments of a path."""
  return re.compile(rf'(?:.*/)?(?:{pattern})(?:/.*)?')


@functools.lru_cache(maxsize=8192)
def ways(pattern: str) -> int:
  """Bounds in how many ways `re` may try the pattern on one path."""
  return _ways(_parser.parse(pattern))


def _ways(parsed: Any) -> int:
  """Bounds in how many ways `re`, which backtracks, may try a pattern."""
  n = 1
  for op, arg in parsed:
    if str(op).endswith('REPEAT'):
      low, high, body = arg
      high = min(high, _MAX_PATH)
      n *= max(1, low) * max(1, high - low + 1) * _ways(body) ** high
    elif str(op) == 'BRANCH':
      n *= sum(map(_ways, arg[1]))
    else:
      parts = arg if isinstance(arg, (list, tuple)) else (arg,)
      n *= math.prod(_ways(p) for p in parts if type(p) is type(parsed))
    n = min(n, MAX_WAYS + 1)
  return n


@functools.lru_cache(maxsize=65536)
def matches(pattern: str, path: str) -> bool:
  """Whether a checked pattern matches a path."""
  # Routers decide which experts run: a few bits saved there cost the most, so
  # a catch-all pattern leaves them alone.
  if 'router' in path and 'router' not in pattern:
    return False
  return compiled(pattern).fullmatch(path) is not None


def near_misses(pattern: str, paths: list[str]) -> str:
  """Returns the paths most like a pattern that matched none."""
  plain = re.sub(r'\\d\+?|\\.|[\^$()\[\]{}|?*+]', '0', pattern)
  near = difflib.get_close_matches(plain, paths, n=5, cutoff=0.0)
  return ', '.join(repr(p) for p in near) or 'none, the model has no weights'


def brief(value: Any) -> str:
  """Returns the value as it may stand in an error message."""
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + '...'
