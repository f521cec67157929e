# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Requests to stop: a flag inside, the old handlers outside."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from gemma_ext.train import _signals


@pytest.fixture(autouse=True)
def outside():
  """Handlers that say which signals reached them."""
  seen: list[int] = []
  handler = lambda number, _: seen.append(number)
  numbers = (signal.SIGTERM, signal.SIGINT)
  old = {n: signal.signal(n, handler) for n in numbers}
  yield handler, seen
  for number, value in old.items():
    signal.signal(number, value)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_no_more(number, outside):
  handler, seen = outside
  with _signals.graceful() as stop:
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested
  assert not seen
  assert signal.getsignal(signal.SIGTERM) is handler
  assert signal.getsignal(signal.SIGINT) is handler
  os.kill(os.getpid(), number)
  assert seen == [number]


def test_sigterm_may_come_again(outside):
  with _signals.graceful() as stop:
    for _ in range(3):
      os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
  assert not outside[1]


def test_second_interrupt_is_the_one_of_before(outside):
  with _signals.graceful() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested and not outside[1]
    os.kill(os.getpid(), signal.SIGINT)
    assert outside[1] == [signal.SIGINT]


def test_handlers_return_after_an_error(outside):
  with pytest.raises(KeyError), _signals.graceful():
    raise KeyError
  assert signal.getsignal(signal.SIGTERM) is outside[0]
  assert signal.getsignal(signal.SIGINT) is outside[0]


def test_nested_blocks_have_flags_of_their_own():
  with _signals.graceful() as outer:
    with _signals.graceful() as inner:
      os.kill(os.getpid(), signal.SIGTERM)
    assert inner.requested and not outer.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert outer.requested


def test_other_thread_is_refused():
  caught: list[BaseException] = []

  def run():
    try:
      with _signals.graceful():
        pass
    except ValueError as e:
      caught.append(e)

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert len(caught) == 1


def test_a_process_that_was_asked_to_stop_exits_with_0():
  # By its path, since importing the whole package takes longer than the test.
  script = (
    'import runpy, time\n'
    f'graceful = runpy.run_path({_signals.__file__!r})["graceful"]\n'
    'with graceful() as stop:\n'
    '  print("ready", flush=True)\n'
    '  while not stop.requested:\n'
    '    time.sleep(0.01)\n'
    'print("saved")\n'
  )
  with subprocess.Popen(
    [sys.executable, '-c', script], stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout is not None
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGTERM)
    assert process.stdout.read() == 'saved\n'
  assert process.returncode == 0
