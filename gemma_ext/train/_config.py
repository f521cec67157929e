# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Python configs: a file with `get_config()`, and changes from the command.

A config is a kauldron `konfig.ConfigDict`: a description, out of which the
objects are only made once the changes are in, so that a change of a field goes
through the same checks as the field itself. Only a file that the user named
is ever run.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import runpy
from typing import Any

from kauldron import konfig

from gemma_ext import errors

_PREFIX = '--config.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A config that was read.

  Attributes:
    value: The object that the config describes.
    snapshot: The description with the changes, as JSON values.
  """

  value: Any
  snapshot: dict[str, Any]

  @property
  def fingerprint(self) -> str:
    """Hash of the snapshot."""
    text = json.dumps(self.snapshot, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load(path: str | os.PathLike[str], changes: Sequence[str] = ()) -> Config:
  """Reads a config.

  Args:
    path: A local Python file that defines `get_config()`.
    changes: Such as `--config.stages[0].optimizer.steps=100`.

  Returns:
    The config.

  Raises:
    ConfigError: If the file is not a config, or a change names no field or has
      a value of another type than the field's.
  """
  file = pathlib.Path(path).expanduser()
  if file.suffix != '.py' or not file.is_file():
    raise errors.ConfigError(
      f'A config is a local .py file that defines get_config(); {str(path)!r}'
      f' is {"no .py file" if file.exists() else "not there"}.'
    )
  try:
    names = runpy.run_path(str(file), run_name='gemma_ext_config')
    make = names.get('get_config')
    if not callable(make):
      raise errors.ConfigError(f'{str(path)!r} defines no get_config().')
    config = make()
  except errors.GemmaExtError:
    raise
  # The file may raise anything, and an exit would look like a run well done.
  except (Exception, SystemExit) as e:
    raise errors.ConfigError(
      f'{str(path)!r} fails: {type(e).__name__}: {e}'
    ) from e
  if not isinstance(config, konfig.ConfigDict):
    raise errors.ConfigError(
      f'get_config() of {str(path)!r} must return a konfig.ConfigDict, got'
      f' {type(config).__name__}. Import what it describes inside'
      ' `with konfig.imports():`.'
    )
  for change in changes:
    _apply(config, change)
  snapshot = json.loads(config.to_json())
  try:
    value = konfig.resolve(config)
  except errors.GemmaExtError:
    raise
  except Exception as e:
    inner: BaseException | None = e
    while inner is not None and not isinstance(inner, errors.GemmaExtError):
      inner = inner.__cause__ or inner.__context__
    raise errors.ConfigError(
      f'{str(path)!r} describes what cannot be made: {inner or e}'
    ) from e
  return Config(value=value, snapshot=snapshot)


def split_argv(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Splits arguments into changes of the config and the others."""
  changes = [a for a in argv if a.startswith(_PREFIX)]
  return changes, [a for a in argv if not a.startswith(_PREFIX)]


def _apply(config: Any, change: str) -> None:
  """Sets one field, which must exist."""
  target, equals, text = change.removeprefix(_PREFIX).partition('=')
  if not equals or not target:
    raise errors.ConfigError(
      f'{change!r} is no change; write {_PREFIX}FIELD=VALUE.'
    )
  keys = [
    int(k) if k.isdecimal() else k
    for k in target.replace('[', '.').replace(']', '').split('.')
  ]
  node = config
  for key in keys[:-1]:
    node = _get(node, key, change)
  old = _get(node, keys[-1], change)
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if isinstance(old, str):
    value = text
  elif isinstance(old, float) and type(value) is int:
    value = float(value)
  if old is not None and type(value) is not type(old):
    raise errors.ConfigError(
      f'{change!r}: the field is {old!r}, so its value must be of type'
      f' {type(old).__name__}, got {text!r}.'
    )
  node[keys[-1]] = value


def _get(node: Any, key: str | int, change: str) -> Any:
  is_sequence = isinstance(node, (list, tuple)) or (
    hasattr(node, '__len__') and not hasattr(node, 'keys')
  )
  if is_sequence and isinstance(key, int) and key < len(node):
    return node[key]
  # `__qualname__` says what is made; that is the file's to say.
  named = isinstance(key, str) and not key.startswith('__')
  if hasattr(node, 'keys') and named and key in node:
    return node[key]
  fields = (
    [k for k in node.keys() if not k.startswith('__')]
    if hasattr(node, 'keys')
    else [f'[{i}]' for i in range(len(node) if is_sequence else 0)]
  )
  near = difflib.get_close_matches(str(key), fields, n=3, cutoff=0.4)
  raise errors.ConfigError(
    f'{change!r}: there is no field {key!r}. Did you mean'
    f' {near or fields}? Fields that a config leaves out cannot be changed;'
    ' write them into the file.'
  )
