# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Programs that a model wrote, run where they can do little harm.

A process of its own, in namespaces without a network and without other
processes, with limits of time, memory, files and processes, an empty
environment and an empty folder that goes away. It is no virtual machine: files
that anyone may read, it may read.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from gemma_ext import errors

_MEMORY = 1 << 30
_FILE = 1 << 20
_PROCESSES = 64
_OUTPUT = 1 << 16
# Python itself takes its time to begin on a busy machine.
_START_SECONDS = 60.0

# Runs before the program, in its process.
_CONFINE = """
import os, resource, sys
seconds, memory, file, processes = map(int, sys.argv[2:6])
os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWIPC)
for what, most in (
  (resource.RLIMIT_CPU, seconds),
  (resource.RLIMIT_AS, memory),
  (resource.RLIMIT_FSIZE, file),
  (resource.RLIMIT_NPROC, processes),
  (resource.RLIMIT_NOFILE, 64),
  (resource.RLIMIT_CORE, 0),
):
  resource.setrlimit(what, (most, most))
with open(sys.argv[1]) as f:
  source = f.read()
print('confined', file=sys.stderr, flush=True)
exec(compile(source, 'program.py', 'exec'), {'__name__': '__main__'})
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """How a program ended.

  Attributes:
    ok: Whether it ended by itself, with status 0, in time.
    why: '' or what it died of.
  """

  ok: bool
  why: str


def run(program: str, *, seconds: float = 10.0) -> Outcome:
  """Runs a program of Python, confined.

  Args:
    program: Its source.
    seconds: Of wall time from its first line on, and of processor time.

  Raises:
    BackendError: If this system cannot confine it. It is not run then.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'program.py'
    path.write_text(program, encoding='utf-8', errors='replace')
    limits = (max(1, round(seconds)), _MEMORY, _FILE, _PROCESSES)
    with open(pathlib.Path(folder) / 'err', 'w+b') as log:
      process = subprocess.Popen(
        [sys.executable, '-I', '-S', '-c', _CONFINE, str(path)]
        + [str(limit) for limit in limits],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        cwd=folder,
        env={},
        start_new_session=True,
      )
      try:
        _await_start(process, log.name)
        status: int | None = process.wait(seconds)
      except subprocess.TimeoutExpired:
        status = None
      finally:
        # Children that it left behind, too.
        try:
          os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
          pass
        process.wait()
      log.seek(0)
      said = log.read(_OUTPUT).decode(errors='replace')
  if not said.startswith('confined'):
    raise errors.BackendError(
      'This system cannot confine programs (Linux with user namespaces can),'
      f' so that what a model wrote is not run: {said[-300:].strip()!r}.'
    )
  if status is None:
    return Outcome(ok=False, why=f'took more than {seconds:g} s')
  lines = said.strip().splitlines()
  return Outcome(ok=status == 0, why='' if status == 0 else lines[-1][:300])


def _await_start(process: subprocess.Popen, log: str) -> None:
  """Waits until the program begins, or cannot."""
  latest = time.monotonic() + _START_SECONDS
  while (
    not os.path.getsize(log)
    and process.poll() is None
    and time.monotonic() < latest
  ):
    time.sleep(0.002)


@functools.cache
def available() -> bool:
  """Whether programs can be confined here."""
  try:
    return run('pass').ok
  except errors.BackendError:
    return False
