# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Programs that a model wrote, run where they can do little harm.

A process of its own, in namespaces without a network and without other
processes, in a tree of files that holds Python and the system's libraries,
read only, and one empty folder in memory that goes away; as nobody, without
privileges, with limits of time, memory, files and processes and an empty
environment. See `_confine` for how.

A program has passed when its end was reached: a random number, which the
confined process reads only then, has come back. To end early is to fail,
whatever the exit status.

What this does not guard against: a program shares its process with its test,
so that one that means to can make the test pass (objects equal to everything,
another `check`) or send the number back itself, if it knows this code. Memory
is limited by process, not in all; for root without CAP_SYS_ADMIN, as in a
container, processes are not counted, so that only time limits them. And a flaw
in the kernel is a way out: it is no virtual machine.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import socket
import subprocess
import sys
import time

from gemma_ext import errors
from gemma_ext.evals import _confine

_MEMORY = 1 << 30
_FILE = 1 << 20
_PROCESSES = 64
_OUTPUT = 1 << 16
# Python itself takes its time to begin on a busy machine.
_START_SECONDS = 60.0
# Imported, not run by its path: then it need not be compiled every time.
_CONFINE = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import _confine
del sys.path[0]
_confine.main()
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """How a program ended.

  Attributes:
    ok: Whether its end was reached, in time.
    why: '' or what it died of.
  """

  ok: bool
  why: str


def run(program: str, *, seconds: float = 10.0) -> Outcome:
  """Runs a program of Python, confined.

  Args:
    program: Its source.
    seconds: Of wall time from its first line on.

  Raises:
    BackendError: If this system cannot confine it. It is not run then.
  """
  if sys.platform != 'linux':
    raise _refusal(f'it is {sys.platform!r}')
  source = program.encode(errors='replace')
  nonce = os.urandom(_confine.NONCE)
  # Of processor time a little more, so that it is the wall time that ends it.
  numbers = (os.getpid(), math.ceil(seconds) + 1, _MEMORY, _FILE, _PROCESSES)
  ours, theirs = socket.socketpair()
  with ours:
    with theirs:
      process = subprocess.Popen(
        [sys.executable, '-I', '-S', '-c', _CONFINE]
        + [str(number) for number in (*numbers, len(source))],
        stdin=theirs.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=theirs.fileno(),
        cwd='/',
        env={},
        start_new_session=True,
      )
    try:
      begun = _begin(ours, source + nonce)
      heard = _listen(ours, seconds) if begun == _confine.CONFINED else None
      if heard is not None:
        process.wait()
    finally:
      # With it go all that it started; see `_confine`.
      process.kill()
      process.wait()
    if begun != _confine.CONFINED:
      said = begun.decode(errors='replace').strip().splitlines()
      raise _refusal(said[-1] if said else 'no answer')
  if heard is None:
    return Outcome(ok=False, why=f'took more than {seconds:g} s')
  if process.returncode == 0 and heard.endswith(nonce):
    return Outcome(ok=True, why='')
  lines = heard.decode(errors='replace').strip().splitlines()
  early = f'ended early, with status {process.returncode}'
  return Outcome(ok=False, why=lines[-1][:300] if lines else early)


def _begin(channel: socket.socket, message: bytes) -> bytes:
  """Returns `CONFINED`, or all that was said instead."""
  heard = b''
  channel.settimeout(_START_SECONDS)
  try:
    channel.sendall(message)
    while heard != _confine.CONFINED:
      # Of what comes after it, not a byte.
      rest = len(_confine.CONFINED) - len(heard)
      more = channel.recv(max(rest, 1))
      if not more:
        break
      heard += more
  except (TimeoutError, ConnectionError):
    pass
  return heard


def _listen(channel: socket.socket, seconds: float) -> bytes | None:
  """Returns the end of what is said until all have ended; `None` if late."""
  heard = b''
  latest = time.monotonic() + seconds
  while (left := latest - time.monotonic()) > 0:
    channel.settimeout(left)
    try:
      more = channel.recv(_OUTPUT)
    except TimeoutError:
      break
    except ConnectionError:
      # It ended without reading all that was sent.
      return heard
    if not more:
      return heard
    heard = (heard + more)[-_OUTPUT:]
  return None


def _refusal(reason: str) -> errors.BackendError:
  return errors.BackendError(
    'This system cannot confine programs, so that what a model wrote is not'
    f' run: {reason}. Expected Linux 5.12 or later, and root or namespaces of'
    ' users (sysctl user.max_user_namespaces above 0; where they are there,'
    ' kernel.unprivileged_userns_clone=1 and'
    ' kernel.apparmor_restrict_unprivileged_userns=0; in a container, a'
    ' profile that permits them).'
  )


def require_sandbox() -> None:
  """Raises an error unless programs can be confined here.

  To be called before a model writes programs, which takes long.

  Raises:
    BackendError: If this system cannot confine programs; says what it needs.
  """
  found = run('pass', seconds=_START_SECONDS)
  if not found.ok:
    raise _refusal(found.why)


@functools.cache
def available() -> bool:
  """Whether programs can be confined here."""
  try:
    require_sandbox()
  except errors.BackendError:
    return False
  return True
