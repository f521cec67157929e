# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder for files that are made once, and atomic writing into it."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import tempfile
from typing import BinaryIO

from gemma_ext import errors

CACHE_ENV = 'GEMMA_EXT_CACHE'


def cache_dir() -> pathlib.Path:
  """Returns the cache folder: $GEMMA_EXT_CACHE, else ~/.cache/gemma_ext."""
  folder = os.environ.get(CACHE_ENV) or '~/.cache/gemma_ext'
  return pathlib.Path(folder).expanduser().absolute()


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Opens a file for writing that appears at `path` only when complete.

  Several processes may do so at once; the last to finish wins.

  Args:
    path: Where the file shall appear; its folder is made.

  Yields:
    The file, opened for reading and writing in binary.

  Raises:
    CheckpointError: If the folder cannot be made or written to.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix='.partial-', dir=path.parent)
  except OSError as e:
    raise errors.CheckpointError(
      f'Cannot write to the cache {path.parent}: {e}. Set {CACHE_ENV} to a'
      ' folder that can be written to.'
    ) from e
  try:
    with os.fdopen(handle, 'w+b') as file:
      yield file
    # mkstemp makes files private; a shared cache is read by others.
    os.chmod(name, 0o644)
    os.replace(name, path)
  except BaseException:
    pathlib.Path(name).unlink(missing_ok=True)
    raise
