# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of confined programs: what they may, and what they may not."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext import evals
from gemma_ext.evals import _sandbox

# What the kernel has to permit, and no more: where it does and programs cannot
# be confined all the same, the tests fail.
_PROBE = """
import ctypes, errno, os
spaces = os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC
try:
  os.unshare(spaces)
except PermissionError:
  os.unshare(spaces | os.CLONE_NEWUSER)
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall(442, -1, b'', 0, None, 0)
if ctypes.get_errno() == errno.ENOSYS:
  raise OSError('no mount_setattr')
"""


def _refusal() -> str:
  command = [sys.executable, '-I', '-S', '-c', _PROBE]
  said = subprocess.run(command, capture_output=True, text=True).stderr
  return said.strip().splitlines()[-1] if said else ''


_REFUSAL = _refusal()
needs_sandbox = pytest.mark.skipif(
  bool(_REFUSAL), reason=f'The kernel refuses namespaces: {_REFUSAL}.'
)


def _processes(harness: int) -> list[int]:
  """Those that belong to programs that this harness runs."""
  found = []
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      words = (folder / 'cmdline').read_bytes().split(b'\0')
    except OSError:
      continue
    if _sandbox._CONFINE.encode() in words and b'%d' % harness in words:
      found.append(int(folder.name))
  return found


def _ended(harness: int) -> bool:
  for _ in range(100):
    if not _processes(harness):
      return True
    time.sleep(0.1)
  return False


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
    ('import os; os.abort()', 'status 134'),
  ],
)
def test_what_a_program_may(program, why):
  found = _sandbox.run(program, seconds=5)
  fails = why or any(w in program for w in ('exit(3)', '1 << 22', 'fork'))
  assert found.ok == (not fails), found
  assert why in found.why


@needs_sandbox
@pytest.mark.parametrize(
  'program',
  [
    'import ctypes, decimal, hashlib, json, sqlite3, ssl, zoneinfo',
    'import tempfile\n'
    'with tempfile.TemporaryFile() as f: f.write(b"x" * (1 << 19))',
    'import subprocess, sys\n'
    'said = subprocess.check_output([sys.executable, "-c", "print(6 * 7)"])\n'
    'assert said == b"42\\n"',
    'import threading, time\n'
    'threading.Thread(target=time.sleep, args=(60,)).start()',
    # Not the `from __future__` of the file that runs it.
    'def f(x: int): pass\nassert f.__annotations__["x"] is int',
  ],
)
def test_what_a_program_needs(program):
  found = _sandbox.run(program)
  assert found.ok, found


@needs_sandbox
@pytest.mark.parametrize(
  'end',
  [
    'raise SystemExit',
    'import sys; sys.exit(0)',
    'import os; os._exit(0)',
    'import os, signal; os.kill(os.getpid(), signal.SIGKILL)',
    # The end is reached by a child, of which nobody has asked it.
    'import os\nif os.fork(): os.wait(); os._exit(0)',
    # All the same, not the number.
    'import os; os.write(3, b"x" * 16); os._exit(0)',
  ],
)
def test_to_end_early_is_not_to_pass(end):
  item = evals.Program(
    prompt='def add(a, b):\n',
    test='def check(f):\n  assert f(2, 3) == 5\n',
    entry_point='add',
    id='1',
    cluster='1',
  )
  indented = end.replace('\n', '\n  ')
  written = [
    '  return a + b\n',
    f'  return a + b\n{end}\n',
    f'  {indented}\n  return a + b\n',
  ]
  np.testing.assert_array_equal(
    evals.score([item] * 3, written, 'code'), [1, 0, 0]
  )


_DEEDS = [
  'open(path, "w").write("overwritten")',
  'open(path, "a").write("overwritten")',
  'open(path + "x", "w")',
  'os.unlink(path)',
  'os.rename(path, path + "x")',
  'os.chmod(path, 0o777)',
  'shutil.rmtree(os.path.dirname(path))',
  'os.link(path, "here")',
]


@needs_sandbox
@pytest.mark.parametrize('deed', ['open(path).read()', *_DEEDS])
def test_files_of_the_user_are_hidden(deed, tmp_path):
  private = tmp_path / 'private'
  private.write_text('secret')
  private.chmod(0o600)
  found = _sandbox.run(f'import os, shutil\npath = {str(private)!r}\n{deed}')
  assert not found.ok and 'FileNotFoundError' in found.why, found
  assert private.read_text() == 'secret'
  assert private.stat().st_mode & 0o777 == 0o600
  assert [p.name for p in tmp_path.iterdir()] == ['private']


@needs_sandbox
@pytest.mark.parametrize('deed', _DEEDS)
def test_what_is_shown_is_only_to_be_read(deed, tmp_path, monkeypatch):
  public = tmp_path / 'public'
  public.write_text('known')
  public.chmod(0o666)
  tmp_path.chmod(0o777)
  # As if Python's library were in this folder.
  show = f'sys.path.append({str(tmp_path)!r})\n_confine.main()'
  confine = _sandbox._CONFINE.replace('_confine.main()', show)
  monkeypatch.setattr(_sandbox, '_CONFINE', confine)
  begin = f'import os, shutil\npath = {str(public)!r}\n'
  assert _sandbox.run(begin + 'assert open(path).read() == "known"').ok
  found = _sandbox.run(begin + deed)
  assert not found.ok and 'OSError: [Errno' in found.why, found
  assert public.read_text() == 'known'
  assert public.stat().st_mode & 0o777 == 0o666
  assert [p.name for p in tmp_path.iterdir()] == ['public']


@needs_sandbox
def test_of_the_disk_it_sees_python_and_its_own_folder():
  found = _sandbox.run(
    'import os, sys\n'
    'seen = {"usr", "lib", "lib32", "lib64", "nix", "gnu", "etc", "dev"}\n'
    'own = {"sandbox", "tmp"} | {p.split("/")[1] for p in\n'
    '  [*sys.path, sys.executable, sys.base_prefix]}\n'
    'assert set(os.listdir("/")) <= seen | own, os.listdir("/")\n'
    'assert os.getcwd() == "/sandbox" and os.listdir() == []\n'
    'assert set(os.listdir("/etc")) <= {"ld.so.cache"}\n'
    'open("x", "w").write("y")\n'
    'assert os.listdir("/tmp") == ["x"]\n'
  )
  assert found.ok, found
  assert not pathlib.Path('/sandbox').exists()
  # The folder of the next one is empty.
  assert _sandbox.run('import os; assert os.listdir() == []').ok


@needs_sandbox
def test_its_own_folder_is_bounded():
  found = _sandbox.run(
    'for i in range(64): open(str(i), "wb").write(b"x" * (1 << 19))'
  )
  assert 'No space left' in found.why
  found = _sandbox.run('for i in range(10000): open(str(i), "w").close()')
  assert 'No space left' in found.why


@needs_sandbox
@pytest.mark.parametrize(
  'deed, why',
  [
    ('os.setuid(0)', 'Error: [Errno'),
    ('os.unshare(os.CLONE_NEWUSER)', 'PermissionError'),
    ('os.unshare(os.CLONE_NEWNS)', 'PermissionError'),
    ('os.chroot("/usr")', 'PermissionError'),
    ('os.mknod("x", 0o60666, 0x100)', 'PermissionError'),
    ('resource.setrlimit(resource.RLIMIT_NPROC, (999, 999))', 'ValueError'),
    (
      'libc = ctypes.CDLL(None, use_errno=True)\n'
      'if libc.mount(0, b"/", 0, 32, 0): raise OSError(ctypes.get_errno())',
      'OSError: 1',
    ),
  ],
)
def test_it_has_no_privileges_and_gets_none(deed, why):
  found = _sandbox.run(f'import ctypes, os, resource\n{deed}')
  assert not found.ok and why in found.why, found


@needs_sandbox
def test_it_does_not_see_other_processes():
  begin = 'import os, signal, time\n'
  found = _sandbox.run(f'{begin}os.kill({os.getpid()}, 0)')
  assert 'ProcessLookupError' in found.why, found
  # Neither by their numbers, nor the tree's own first process, which cannot be
  # ended from within.
  found = _sandbox.run(
    f'{begin}'
    'def seen(pid):\n'
    '  try: os.kill(pid, 0)\n'
    '  except ProcessLookupError: return False\n'
    '  except PermissionError: pass\n'
    '  return True\n'
    'own = {os.getpid(), os.getppid()}\n'
    'assert own == {1, 2}\n'
    'assert {p for p in range(1, 70000) if seen(p)} == own\n'
    'assert not os.path.exists("/proc")\n'
    'try: os.kill(os.getppid(), signal.SIGKILL)\n'
    'except PermissionError: pass\n'
    'time.sleep(0.2)\n'
    'assert os.getppid() == 1\n'
  )
  assert found.ok, found


@needs_sandbox
def test_signals_to_its_group_do_not_reach_the_harness():
  found = _sandbox.run(
    'import os, signal\n'
    'signal.signal(signal.SIGTERM, signal.SIG_IGN)\n'
    'os.kill(0, signal.SIGTERM)\n'
    'try: os.kill(-1, signal.SIGTERM)\n'
    'except ProcessLookupError: pass\n'
  )
  assert found.ok, found


@needs_sandbox
@pytest.mark.parametrize('to', ['1', '2', '3'])
def test_floods_of_output_are_bounded(to):
  found = _sandbox.run(
    f'import os\nfor _ in range(3000): os.write({to}, b"x" * (1 << 16))'
  )
  assert found.ok, found
  found = _sandbox.run(
    f'import os\nwhile True: os.write({to}, b"x" * (1 << 16))', seconds=1
  )
  assert not found.ok and len(found.why) <= 300


# Does all to survive: no signal at its parent's end, a session of its own.
_STUBBORN = (
  'import ctypes, os, time\n'
  'def hide():\n'
  '  ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n'
  '  os.closerange(0, 64)\n'
  '  time.sleep(60)\n'
  'if not os.fork():\n'
  '  os.setsid()\n'
  '  os.fork() or hide()\n'
  '  os._exit(0)\n'
  'os.wait()\n'
)


@needs_sandbox
@pytest.mark.parametrize('end', ['hide()', '', 'os._exit(0)', 'os.abort()'])
def test_nothing_that_it_started_outlives_it(end):
  begun = time.monotonic()
  found = _sandbox.run(_STUBBORN + end, seconds=2)
  assert found.ok == (not end), found
  assert ('more than 2 s' in found.why) == (end == 'hide()'), found
  assert time.monotonic() - begun < 40
  assert _ended(os.getpid())


@needs_sandbox
def test_nothing_outlives_the_harness():
  source = (_STUBBORN + 'hide()').encode()
  harness = subprocess.Popen(
    [
      *(sys.executable, '-I', '-S', '-c'),
      'import os, socket, subprocess, sys\n'
      'ours, theirs = socket.socketpair()\n'
      'limits = ["100", str(1 << 30), str(1 << 20), "64", sys.argv[3]]\n'
      'command = [sys.executable, "-I", "-S", "-c", sys.argv[1]]\n'
      'command += [str(os.getpid()), *limits]\n'
      'with subprocess.Popen(command, stdin=theirs, start_new_session=True):\n'
      '  ours.sendall(sys.argv[2].encode())\n'
      '  print(ours.recv(9), flush=True)\n',
      *(_sandbox._CONFINE, source.decode(), str(len(source))),
    ],
    stdout=subprocess.PIPE,
  )
  assert harness.stdout is not None
  with harness:
    assert harness.stdout.readline() == b"b'confined\\n'\n"
    time.sleep(1)
    assert len(_processes(harness.pid)) >= 3
    harness.send_signal(signal.SIGKILL)
  assert _ended(harness.pid)


@pytest.mark.parametrize(
  'broken',
  [
    'def refuse(*_): raise PermissionError("refused")\n'
    '_confine.os.unshare = refuse\n',
    'def refuse(*_): raise OSError("refused")\n_confine._call = refuse\n',
    'sys.exit("refused")\n',
  ],
)
def test_where_it_cannot_be_confined_nothing_runs(
  broken, monkeypatch, tmp_path
):
  mark = tmp_path / 'mark'
  confine = _sandbox._CONFINE.replace(
    '_confine.main()', f'{broken}\n_confine.main()'
  )
  monkeypatch.setattr(_sandbox, '_CONFINE', confine)
  with pytest.raises(errors.BackendError, match='cannot confine.*refused'):
    _sandbox.run(f'open({str(mark)!r}, "w").write("ran")')
  assert not mark.exists()
  with pytest.raises(errors.BackendError, match='user.max_user_namespaces'):
    evals.require_sandbox()


@pytest.mark.skipif(not _REFUSAL, reason='The kernel permits namespaces.')
def test_where_the_kernel_refuses_nothing_runs():
  assert not _sandbox.available()
  with pytest.raises(errors.BackendError, match='user.max_user_namespaces'):
    _sandbox.run('pass')


@needs_sandbox
def test_where_the_kernel_permits_programs_run():
  evals.require_sandbox()
  assert _sandbox.available()


def test_elsewhere_than_on_linux_nothing_runs(monkeypatch):
  monkeypatch.setattr(sys, 'platform', 'darwin')
  with pytest.raises(errors.BackendError, match="it is 'darwin'"):
    evals.require_sandbox()
