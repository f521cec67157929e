# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Store`: the state of a run on disk, whole or not at all.

A step is a folder of one safetensors file and a manifest with its hash. It is
written under another name, flushed to disk and renamed; what a kill leaves
half-written never has the name of a step. Older steps stay until the new one
is there, so that a torn one costs the last minutes and not the run.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
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
_STEP = re.compile(r'step_(\d{10})')
_VERSION = 1
_MAX_MANIFEST = 16 << 20


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
    self, directory: str | os.PathLike[str], *, fingerprint: str, keep: int = 2
  ):
    """Opens or makes the directory.

    Args:
      directory: Where steps are kept.
      fingerprint: Of the config; steps of another one are refused.
      keep: Steps to keep.
    """
    self.path = pathlib.Path(directory).expanduser().absolute()
    self._fingerprint = fingerprint
    self._keep = max(1, keep)
    try:
      self.path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise errors.StateError(f'Cannot make {self.path}: {e.strerror}.') from e

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
      StateError: If the disk is full or cannot be written. Earlier steps are
        as they were.
    """
    target = self.path / f'step_{number:010d}'
    partial = self.path / f'.{target.name}.partial'
    host = {k: np.asarray(v, order='C') for k, v in arrays.items()}
    try:
      shutil.rmtree(partial, ignore_errors=True)
      partial.mkdir()
      safetensors.numpy.save_file(host, partial / _ARRAYS)
      manifest = {
        'version': _VERSION,
        'number': number,
        'fingerprint': self._fingerprint,
        'bytes': (partial / _ARRAYS).stat().st_size,
        'sha256': _sha256(partial / _ARRAYS),
        'metadata': dict(metadata),
      }
      (partial / _MANIFEST).write_text(json.dumps(manifest, allow_nan=False))
      for name in (_ARRAYS, _MANIFEST):
        _sync(partial / name)
      _sync(partial)
      shutil.rmtree(target, ignore_errors=True)  # Torn, if it is there at all.
      os.rename(partial, target)
      _sync(self.path)
    except (OSError, safetensors.SafetensorError) as e:
      shutil.rmtree(partial, ignore_errors=True)
      free = shutil.disk_usage(self.path).free
      raise errors.StateError(
        f'Cannot save the state of the run in {self.path}: {e}.'
        f' {free / 1e6:,.0f} MB are free. The states before it are intact;'
        ' free some space and start the same command again.'
      ) from e
    for old in self._numbers()[: -self._keep]:
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
    """Removes all steps."""
    for number in self._numbers():
      shutil.rmtree(self.path / f'step_{number:010d}', ignore_errors=True)

  def _numbers(self) -> list[int]:
    found = (_STEP.fullmatch(p.name) for p in self.path.iterdir())
    return sorted(int(m[1]) for m in found if m)

  def _read(self, folder: pathlib.Path, number: int) -> Saved:
    try:
      with open(folder / _MANIFEST, 'rb') as file:
        text = file.read(_MAX_MANIFEST + 1)
      manifest = json.loads(text)
      size, digest = int(manifest['bytes']), str(manifest['sha256'])
      fingerprint, metadata = manifest['fingerprint'], manifest['metadata']
      version = manifest['version']
    except (OSError, ValueError, KeyError, TypeError) as e:
      raise _TornError(f'manifest: {e}') from e
    if fingerprint != self._fingerprint or version != _VERSION:
      raise errors.StateError(
        f'{folder} is of a run with another config. Choose another output, or'
        f' remove {self.path} to start again.'
      )
    path = folder / _ARRAYS
    try:
      if path.stat().st_size != size or _sha256(path) != digest:
        raise _TornError('the arrays are not those that were written')
      arrays = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as e:
      raise _TornError(str(e)) from e
    return Saved(number, arrays, metadata)


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


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _sync(path: pathlib.Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
