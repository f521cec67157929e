# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The confined side of `_sandbox`, of the standard library alone.

Three processes. The first gives up all but a tree of its own, and waits. The
second is the first of a PID namespace: when it ends, the kernel kills every
process in there, and the kernel ends it when the first process ends. The third
has no privileges and runs the program.

The tree holds the interpreter, its library and the system's libraries, read
only, and an empty folder in memory. Nothing else of the disk is in it, and no
/proc: what is needed is shown, rather than what is secret hidden.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

CONFINED = b'confined\n'
NONCE = 16
# The way to and from the harness: standard input at first.
_CHANNEL = 3

# <linux/mount.h>, <linux/prctl.h>, <linux/capability.h>, <asm/unistd.h>.
_MS_NOSUID_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 6, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_ATTR_RDONLY_NOSUID = 3
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAPABILITY_VERSION = 0x20080522
_SIGKILL = 9

# Mounted over while the tree grows; nothing of it is wanted by then.
_STAGE = '/proc'
_TREE = _STAGE + '/tree'
_WORK = '/sandbox'
_NOBODY = 65534
_SYSTEM = (
  *('/usr', '/lib', '/lib32', '/lib64', '/nix/store', '/gnu/store'),
  *('/etc/ld.so.cache', '/dev/null', '/dev/zero', '/dev/urandom'),
)

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
  """Arguments: the harness's process, four limits, bytes of the program."""
  parent, seconds, memory, file, processes, size = map(int, sys.argv[1:])
  os.dup2(0, _CHANNEL)
  null = os.open(os.devnull, os.O_RDWR)
  os.dup2(null, 0)
  os.dup2(null, 1)
  _die_with_parent()
  if os.getppid() != parent:
    os._exit(1)
  source = b''
  while len(source) < size:
    source += os.read(_CHANNEL, size - len(source)) or os._exit(1)
  own_user = _new_namespaces()
  _grow_tree()
  alive, held = os.pipe()
  first = os.fork()
  if first:
    _, status = os.waitpid(first, 0)
    os._exit(_code(status))
  # Did the parent end before the kernel knew what is to follow?
  os.close(held)
  _die_with_parent()
  os.set_blocking(alive, False)
  try:
    os.read(alive, 1)
    os._exit(1)
  except BlockingIOError:
    os.close(alive)
  _call('prctl', _PR_SET_DUMPABLE, 0, 0, 0, 0)
  program = os.fork()
  if program:
    ended = 0
    while ended != program:
      ended, status = os.wait()
    os._exit(_code(status))
  os.setsid()
  for what, most in (
    (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, file),
    (resource.RLIMIT_NPROC, processes),
    (resource.RLIMIT_NOFILE, 64),
    (resource.RLIMIT_CORE, 0),
  ):
    resource.setrlimit(what, (most, most))
  _drop_privileges(own_user)
  # Not to be had for some users, if nobody but them may read it.
  with open(os.__file__, 'rb'):
    pass
  os.dup2(null, 2)
  os.close(null)
  _run(source)


def _run(source: bytes) -> None:
  own = os.getpid()
  status = 1
  os.write(_CHANNEL, CONFINED)
  try:
    code = compile(source, 'program.py', 'exec', dont_inherit=True)
    del source
    exec(code, {'__name__': '__main__'})
    if os.getpid() == own:
      # Read only now: nothing that the program could look at held it before.
      os.write(_CHANNEL, b'\n' + os.read(_CHANNEL, NONCE))
      status = 0
  except BaseException as e:
    os.write(_CHANNEL, f'\n{type(e).__name__}: {e}'.encode()[:1000])
  finally:
    os._exit(status)


def _new_namespaces() -> bool:
  """Returns whether one of users was needed, as it is but for root."""
  spaces = os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC
  user, group = os.geteuid(), os.getegid()
  with open('/proc/self/uid_map') as f:
    initial = f.read().split() == ['0', '0', '4294967295']
  if not user and initial:
    try:
      os.unshare(spaces)
      return False
    except PermissionError:
      # Root of a container, without its privileges.
      pass
  os.unshare(spaces | os.CLONE_NEWUSER)
  for name, value in (
    ('setgroups', 'deny'),
    ('uid_map', f'{_NOBODY} {user} 1'),
    ('gid_map', f'{_NOBODY} {group} 1'),
  ):
    with open(f'/proc/self/{name}', 'w') as f:
      f.write(value)
  return True


def _grow_tree() -> None:
  """Leaves this process in a tree of its own, and no way back."""
  _mount(None, '/', None, _MS_REC | _MS_PRIVATE)
  _mount('tmpfs', _STAGE, 'tmpfs', _MS_NOSUID_NODEV, 'mode=755,size=1m')
  os.mkdir(_TREE)
  for path in (*_SYSTEM, *_interpreter()):
    _show(path)
  os.mkdir(_TREE + _WORK)
  if not os.path.lexists(_TREE + '/tmp'):
    os.symlink(_WORK, _TREE + '/tmp')
  attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY_NOSUID)
  _call(
    *('syscall', _SYS_MOUNT_SETATTR, _AT_FDCWD, _STAGE.encode()),
    *(_AT_RECURSIVE, attributes, ctypes.sizeof(attributes)),
  )
  _mount(
    *('tmpfs', _TREE + _WORK, 'tmpfs', _MS_NOSUID_NODEV),
    f'mode=700,uid={_NOBODY},gid={_NOBODY},size=16m,nr_inodes=4k',
  )
  os.chdir(_STAGE)
  _call('pivot_root', b'.', b'.')
  _call('umount2', b'.', _MNT_DETACH)
  # In a tree that is not the whole of its namespace, the kernel makes no
  # namespaces of users, in which the program would have privileges again.
  os.chroot('/tree')
  os.chdir(_WORK)


def _interpreter() -> list[str]:
  """What Python needs, which may lie in somebody's home."""
  sys.executable = os.path.realpath(sys.executable)
  found = [*sys.path, sys.executable]
  for prefix in (sys.base_prefix, os.path.realpath(sys.base_prefix)):
    found += [f'{prefix}/lib', f'{prefix}/{sys.platlibdir}']
  # A folder before those in it.
  return sorted(found)


def _show(path: str) -> None:
  """Lets a file or folder, if there is one, be seen in the tree."""
  target = _TREE + path
  # Seen already, as a part of another one?
  if not os.path.exists(path) or os.path.lexists(target):
    return
  os.makedirs(os.path.dirname(target), exist_ok=True)
  if os.path.islink(path) and path in _SYSTEM:
    os.symlink(os.readlink(path), target)
    return
  if os.path.isdir(path):
    os.mkdir(target)
  else:
    os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
  _mount(path, target, None, _MS_BIND | _MS_REC)


def _drop_privileges(own_user: bool) -> None:
  if not own_user:
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
  header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION)
  _call('capset', header, (ctypes.c_uint32 * 6)())
  _call('prctl', _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _die_with_parent() -> None:
  _call('prctl', _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def _mount(
  source: str | None,
  target: str,
  kind: str | None,
  flags: int,
  options: str | None = None,
) -> None:
  texts = [t and t.encode() for t in (source, target, kind, options)]
  _call('mount', *texts[:3], ctypes.c_ulong(flags), texts[3])


def _call(name: str, *args: object) -> None:
  if getattr(_libc, name)(*args):
    code = ctypes.get_errno()
    raise OSError(code, f'{name}{args[:3]}: {os.strerror(code)}')


def _code(status: int) -> int:
  """An exit status that tells signals, as a shell's does."""
  code = os.waitstatus_to_exitcode(status)
  return code if code >= 0 else 128 - code
