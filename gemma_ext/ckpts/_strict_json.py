# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""JSON from files that nobody vouches for: bounded, no duplicate keys."""

import json
import os
from typing import Any

from gemma_ext import errors


def read_object(path: os.PathLike | str, *, limit: int) -> dict[str, Any]:
  """Reads a JSON object of at most `limit` bytes from a file.

  Args:
    path: A local file.
    limit: The largest size accepted, in bytes.

  Returns:
    The parsed object.

  Raises:
    HeaderTooLargeError: If the file is larger than `limit`.
    HeaderError: If it is not UTF-8 JSON, not an object, or names a key twice.
    MissingTensorError: If there is no such file.
  """
  try:
    with open(path, 'rb') as f:
      data = f.read(limit + 1)
  except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
    raise errors.MissingTensorError(f'{path}: no such file.') from e
  if len(data) > limit:
    raise errors.HeaderTooLargeError(
      f'{path} is larger than {limit} bytes, the most that is accepted for'
      ' a file of its kind.'
    )
  return parse_object(data, what=str(path))


def parse_object(data: bytes, *, what: str) -> dict[str, Any]:
  """Parses a JSON object; `what` names it in errors."""
  try:
    out = json.loads(
      data.decode('utf-8'),
      object_pairs_hook=lambda pairs: _unique(pairs, what),
      parse_constant=lambda name: _refuse_constant(name, what),
    )
  except errors.GemmaExtError:
    raise
  # Too many digits in an integer is a ValueError, too deep a nest the other.
  except (ValueError, RecursionError) as e:
    raise errors.HeaderError(f'{what}: not valid JSON: {e}') from e
  if not isinstance(out, dict):
    raise errors.HeaderError(
      f'{what}: expected a JSON object, got {type(out).__name__}.'
    )
  return out


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
  """Builds a dict, refusing a key that appears twice."""
  out = dict(pairs)
  if len(out) != len(pairs):
    seen = set()
    for key, _ in pairs:
      if key in seen:
        raise errors.HeaderError(f'{what}: key {key!r} appears twice.')
      seen.add(key)
  return out


def _refuse_constant(name: str, what: str) -> None:
  """NaN and Infinity are not JSON, though Python reads them."""
  raise errors.HeaderError(f'{what}: {name} is not JSON.')
