# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Store`: the state of a run on disk, whole or not at all.

A step is a folder of one safetensors file and a manifest with the hashes of
that file and of itself. It is written under another name, flushed to disk and
renamed; what a kill leaves half-written never has the name of a step. Older
steps stay until the new one is there, so that a torn one costs the last minutes
and not the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
from typing import Any

from absl import logging
import jax
import numpy as np
import safetensors
import safetensors.numpy

from gemma_ext import errors

_ARRAYS = 'arrays.safetensors'
_MANIFEST = 'manifest.json'
_LOCK = '.lock'
_STEP = re.compile(r'step_(\d{10})')
_VERSION = 2
_MAX_MANIFEST = 16 << 20
_MAX_DIFFERENCES = 5


@dataclasses.dataclass(frozen=True)
class Saved:
  """One state.

  Attributes:
    number: Of the step, increasing.
    arrays: By name.
    metadata: JSON values.
  """

  number: int
  arrays: dict[str, np.ndarray]
  metadata: dict[str, Any]


class Store:
  """Steps of one run in a directory."""

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    fingerprint: str,
    config: Mapping[str, Any] | None = None,
    keep: int = 2,
  ):
    """Opens or makes the directory.

    Args:
      directory: Where steps are kept.
      fingerprint: Of the config; steps of another one are refused.
      config: JSON values, kept so that a refusal can name what differs.
      keep: Steps to keep.
    """
    self.path = pathlib.Path(directory).expanduser().absolute()
    self._fingerprint = fingerprint
    self._config = _plain(config)
    self._keep = max(1, keep)
    try:
      self.path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise errors.StateError(f'Cannot make {self.path}: {e.strerror}.') from e

  @contextlib.contextmanager
  def lock(self) -> Iterator[None]:
    """Keeps other runs out; the system lets go of it when a process dies.

    Raises:
      StateError: If another run holds it.
    """
    path = self.path / _LOCK
    try:
      handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
      raise errors.StateError(f'Cannot open {path}: {e.strerror}.') from e
    try:
      try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as e:
        holder = os.read(handle, 300).decode(errors='replace').strip()
        raise errors.StateError(
          f'Another run is at work on {self.path}: {holder or "unknown"}. Wait'
          ' for it, stop it, or choose another output.'
        ) from e
      except OSError as e:
        raise errors.StateError(
          f'{path} cannot be locked ({e.strerror}), so that two runs could'
          ' write at once. Choose an output on another file system.'
        ) from e
      # For the message alone: a full disk must not keep a run from going on.
      with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f'pid {os.getpid()} on {os.uname()[1]}'.encode(), 0)
      yield
    finally:
      os.close(handle)

  def save(
    self,
    number: int,
    arrays: Mapping[str, Any],
    metadata: Mapping[str, Any],
  ) -> None:
    """Writes a step; earlier ones go once it is safely on disk.

    Args:
      number: Of the step.
      arrays: By name.
      metadata: JSON values.

    Raises:
      StateError: If the disk is full or cannot be written, or the metadata is
        no JSON. Earlier steps are as they were.
    """
    target = self.path / f'step_{number:010d}'
    partial = self.path / f'.{target.name}.partial'
    host = {k: np.asarray(v, order='C') for k, v in arrays.items()}
    try:
      self._clear_partials()
      partial.mkdir()
      safetensors.numpy.save_file(host, partial / _ARRAYS)
      body = {
        'version': _VERSION,
        'number': number,
        'fingerprint': self._fingerprint,
        'config': self._config,
        'bytes': (partial / _ARRAYS).stat().st_size,
        'sha256': _sha256(partial / _ARRAYS),
        'metadata': _plain(metadata),
      }
      text = json.dumps({'body': body, 'sha256': _sha256_of(body)})
      if len(text) > _MAX_MANIFEST:  # It would be refused when read.
        raise ValueError(f'its metadata takes {len(text):,} bytes')
      (partial / _MANIFEST).write_text(text)
      for name in (_ARRAYS, _MANIFEST):
        _sync(partial / name)
      _sync(partial)
      shutil.rmtree(target, ignore_errors=True)  # Torn, if it is there at all.
      os.rename(partial, target)
      _sync(self.path)
    except (TypeError, ValueError) as e:
      shutil.rmtree(partial, ignore_errors=True)
      raise errors.StateError(
        f'Cannot save the state of the run in {self.path}: {e}.'
      ) from e
    except (OSError, safetensors.SafetensorError) as e:
      shutil.rmtree(partial, ignore_errors=True)
      free = shutil.disk_usage(self.path).free
      raise errors.StateError(
        f'Cannot save the state of the run in {self.path}: {e}.'
        f' {free / 1e6:,.0f} MB are free. The states before it are intact;'
        ' free some space and start the same command again.'
      ) from e
    numbers = self._numbers()
    # Later ones were torn, or the run would have gone on from them.
    whole = [n for n in numbers if n <= number]
    for old in sorted(set(numbers) - set(whole[-self._keep :])):
      shutil.rmtree(self.path / f'step_{old:010d}', ignore_errors=True)

  def latest(self) -> Saved | None:
    """Returns the last state that is whole, or `None` if there is none.

    Raises:
      StateError: If it belongs to another config.
    """
    for number in reversed(self._numbers()):
      folder = self.path / f'step_{number:010d}'
      try:
        return self._read(folder, number)
      except _TornError as e:
        logging.warning('%s is damaged (%s); trying the one before.', folder, e)
    return None

  def clear(self) -> None:
    """Removes all steps, and what a killed write left."""
    self._clear_partials()
    for number in self._numbers():
      shutil.rmtree(self.path / f'step_{number:010d}', ignore_errors=True)

  def _clear_partials(self) -> None:
    """Done by the writer alone: to a reader they may be under way."""
    for partial in self.path.glob('.step_*.partial'):
      shutil.rmtree(partial, ignore_errors=True)

  def _numbers(self) -> list[int]:
    found = (_STEP.fullmatch(p.name) for p in self.path.iterdir())
    return sorted(int(m[1]) for m in found if m)

  def _read(self, folder: pathlib.Path, number: int) -> Saved:
    try:
      with open(folder / _MANIFEST, 'rb') as file:
        text = file.read(_MAX_MANIFEST + 1)
      manifest = json.loads(text)
      body = manifest['body']
      if manifest['sha256'] != _sha256_of(body) or body['number'] != number:
        raise _TornError('the manifest is not the one that was written')
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
      raise _TornError(f'manifest: {e}') from e
    if body['version'] != _VERSION:
      raise errors.StateError(
        f'{folder} was written by another version of gemma_ext. Remove'
        f' {self.path} to start again.'
      )
    if body['fingerprint'] != self._fingerprint:
      differences = list(_differences(body['config'], self._config))
      raise errors.StateError(
        f'{folder} is of a run with another config'
        + _listed(differences)
        + f'. Choose another output, or remove {self.path} to start again.'
      )
    path = folder / _ARRAYS
    try:
      # The size first: what is there may be larger than is worth hashing.
      if (
        path.stat().st_size != body['bytes'] or _sha256(path) != body['sha256']
      ):
        raise _TornError('the arrays are not those that were written')
      arrays = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as e:
      raise _TornError(str(e)) from e
    return Saved(number, arrays, body['metadata'])


class _TornError(Exception):
  """A step is not what was written."""


def flatten(tree: Any) -> dict[str, np.ndarray]:
  """Leaves of any pytree by number, for `Store.save`."""
  leaves = jax.tree.leaves(tree)
  return {f'{i:06d}': np.asarray(leaf) for i, leaf in enumerate(leaves)}


def unflatten(like: Any, arrays: Mapping[str, np.ndarray]) -> Any:
  """Inverse of `flatten`.

  Raises:
    StateError: If shapes or types are not those of `like`.
  """
  leaves, structure = jax.tree.flatten(like)
  out = []
  for i, leaf in enumerate(leaves):
    value = arrays.get(f'{i:06d}')
    if value is None or value.shape != leaf.shape or value.dtype != leaf.dtype:
      raise errors.StateError(
        f'Leaf {i} of the saved state is'
        f' {None if value is None else (value.dtype, value.shape)}, expected'
        f' {(leaf.dtype, leaf.shape)}. It is of another version.'
      )
    out.append(jax.numpy.asarray(value))
  return jax.tree.unflatten(structure, out)


def _plain(value: Any) -> Any:
  """The value as it comes back from JSON, so that both compare equal."""
  return json.loads(json.dumps(value, default=_mapping, allow_nan=False))


def _mapping(value: Any) -> dict[str, Any]:
  if isinstance(value, Mapping):
    return dict(value)
  raise TypeError(f'{value!r} is no JSON value')


def _differences(old: Any, new: Any, at: str = '') -> Iterator[str]:
  """Names the fields in which two JSON values differ."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted(old.keys() | new.keys()):
      inner = f'{at}.{key}' if at else key
      yield from _differences(old.get(key), new.get(key), inner)
  elif isinstance(old, list) and isinstance(new, list):
    for i in range(max(len(old), len(new))):
      a, b = (x[i] if i < len(x) else None for x in (old, new))
      yield from _differences(a, b, f'{at}[{i}]')
  elif (type(old), old) != (type(new), new):
    yield f'{at or "config"} was {old!r}, is {new!r}'


def _listed(differences: list[str]) -> str:
  if not differences:
    return ''
  shown = '; '.join(differences[:_MAX_DIFFERENCES])
  more = len(differences) - _MAX_DIFFERENCES
  return f': {shown}' + (f'; and {more} more' if more > 0 else '')


def _sha256_of(body: Any) -> str:
  text = json.dumps(body, sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _sync(path: pathlib.Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
