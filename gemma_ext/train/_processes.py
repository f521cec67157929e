# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Group`: what the processes of a run agree on, step by step.

Under `jax.distributed` every process runs the same program over the same files.
The first one writes; a decision that depends on the clock, a signal or the disk
is made once and gathered, so that all take the same way. In a single process
nothing of this costs anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import hashlib
from typing import TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

from gemma_ext import errors

_T = TypeVar('_T')


class Group:
  """The processes of `jax.distributed`, or this one alone.

  Attributes:
    index: Of this process.
    count: Of all processes.
  """

  def __init__(self):
    self.index, self.count = jax.process_index(), jax.process_count()

  @property
  def leads(self) -> bool:
    """Whether this is the process that writes."""
    return self.index == 0

  def any(self, *flags: bool) -> tuple[bool, ...]:
    """Whether a flag is set in any process, one by one."""
    found = self._gather(np.asarray(flags, np.uint8))
    return tuple(bool(x) for x in found.any(axis=0))

  def first(self, value: int) -> int:
    """The value of the first process."""
    return int(self._gather(np.asarray([value], np.int32))[0, 0])

  def lead(self, action: Callable[[], _T]) -> _T | None:
    """Does something in the first process, while the others wait.

    Returns:
      What it returned; `None` in the others.

    Raises:
      ProcessError: In the others, if it failed in the first.
    """
    out, error = None, None
    if self.leads:
      try:
        out = action()
      except Exception as e:
        error = e
    (failed,) = self.any(error is not None)
    if error is not None:
      raise error
    if failed:
      raise errors.ProcessError(
        'The first process of this run failed; its message says why. Start'
        ' the same commands again once that is mended.'
      )
    return out

  def check_same(self, what: str, value: bytes) -> None:
    """Checks that a value is the same in all processes; all must have come.

    Raises:
      ProcessError: If it is not.
    """
    if self.count == 1:
      return
    digest = np.frombuffer(hashlib.sha256(value).digest(), np.uint8)
    found = self._gather(digest)
    others = np.flatnonzero((found != found[0]).any(axis=1))
    if others.size:
      raise errors.ProcessError(
        f'{what} of processes 0 and {others[0]} differ. All processes need the'
        ' same command, the same files and the same kind of machine.'
      )

  @contextlib.contextmanager
  def survived(self) -> Iterator[None]:
    """Turns what a collective says when a process has ended into one error.

    Raises:
      ProcessError: If the others cannot be reached.
    """
    try:
      yield
    except errors.GemmaExtError:
      raise
    except (ValueError, RuntimeError) as e:
      if self.count == 1:
        raise
      raise errors.ProcessError(
        f'Process {self.index} of {self.count} cannot go on: another one has'
        ' ended, or this one failed. Start the same commands again to go on'
        f' from the last state. ({e!s:.300})'
      ) from e

  def _gather(self, value: np.ndarray) -> np.ndarray:
    if self.count == 1:
      return value[None]
    with self.survived():
      return np.asarray(multihost_utils.process_allgather(value))
