# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`graceful`: a request to stop becomes a flag that a loop looks at.

with _signals.graceful() as stop:
  for step in steps:
    ...
    if stop.requested:
      break
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclasses.dataclass
class Stop:
  """Whether the process was asked to stop.

  Attributes:
    requested: Set by SIGTERM and by the first SIGINT.
  """

  requested: bool = False


@contextlib.contextmanager
def graceful() -> Iterator[Stop]:
  """Turns SIGTERM and the first SIGINT into a flag.

  The second SIGINT does what it did before, so that Ctrl-C twice ends a step
  that takes too long. The handlers of before are back when the block is left.

  Yields:
    The flag.

  Raises:
    ValueError: Outside the main thread, where Python allows no handlers.
  """
  stop = Stop()
  # None is a handler that was not installed from Python: not ours to set again.
  before = {s: signal.getsignal(s) or signal.SIG_DFL for s in _SIGNALS}

  def handle(number: int, _: FrameType | None) -> None:
    stop.requested = True
    if number == signal.SIGINT:
      signal.signal(number, before[signal.SIGINT])

  try:
    for number in _SIGNALS:
      signal.signal(number, handle)
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
