# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of confined programs: what they may, and what they may not."""

import os
import pathlib
import time

import pytest

from gemma_ext import errors
from gemma_ext.evals import _sandbox

needs_sandbox = pytest.mark.skipif(
  not _sandbox.available(), reason='This system cannot confine programs.'
)


@needs_sandbox
@pytest.mark.parametrize(
  'program, why',
  [
    ('assert sorted([2, 1]) == [1, 2]', ''),
    ('assert 1 == 2', 'AssertionError'),
    ('def f(:', 'SyntaxError'),
    ('import sys; sys.exit(3)', ''),
    ('x = bytearray(1 << 31)', 'MemoryError'),
    ('open("f", "wb").write(b"x" * (1 << 22))', ''),
    (
      'import socket\n'
      's = socket.socket(); s.settimeout(2); s.connect(("127.0.0.1", 22))',
      'OSError',
    ),
    (
      'import urllib.request\n'
      'urllib.request.urlopen("http://example.com", timeout=2)',
      'Error',
    ),
    ('import numpy', 'ModuleNotFoundError'),
    ('import os\nassert os.environ.get("HOME") is None', ''),
    ('import os\nwhile True: os.fork()', ''),
  ],
)
def test_what_a_program_may(program, why):
  found = _sandbox.run(program, seconds=5)
  fails = why or any(w in program for w in ('exit(3)', '1 << 22', 'fork'))
  assert found.ok == (not fails), found
  assert why in found.why


@needs_sandbox
def test_it_ends_in_time_with_all_that_it_started(tmp_path):
  mark = tmp_path / 'mark'
  mark.touch(mode=0o666)
  os.chmod(tmp_path, 0o777)
  begun = time.monotonic()
  found = _sandbox.run(
    'import os, time\n'
    'if not os.fork():\n'
    f'  time.sleep(3); open({str(mark)!r}, "w").write("alive")\n'
    'time.sleep(60)',
    seconds=1,
  )
  assert not found.ok and 'more than 1 s' in found.why
  assert time.monotonic() - begun < 40
  time.sleep(3)
  assert mark.read_text() == ''


@needs_sandbox
def test_its_folder_goes_away():
  found = _sandbox.run(
    'import os, pathlib\npathlib.Path("x").write_text("y")\n'
    'raise ValueError(os.getcwd())'
  )
  folder = found.why.removeprefix('ValueError: ')
  assert folder.startswith('/') and not pathlib.Path(folder).exists()


def test_where_it_cannot_be_confined_nothing_runs(monkeypatch, tmp_path):
  mark = tmp_path / 'mark'
  broken = _sandbox._CONFINE.replace('os.unshare(', 'os.no_such_call(')
  monkeypatch.setattr(_sandbox, '_CONFINE', broken)
  with pytest.raises(errors.BackendError, match='cannot confine'):
    _sandbox.run(f'open({str(mark)!r}, "w").write("ran")')
  assert not mark.exists()
