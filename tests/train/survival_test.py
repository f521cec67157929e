# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole command killed at random moments, in one process and in two.

A moment is drawn in two steps: a phase of the run, in turn, few kills spread
over the run, and a time within what the phase took when nothing was killed.

Most of a start is imports. Runs that are to be killed later are therefore
forked from a process that has done them, and read what the first run compiled.
`SURVIVAL_FORK=0` starts all of them as a user does, `SURVIVAL_KILLS=20` sets
the number of kills, and `-s` shows where they fell.
"""

from collections.abc import Iterator
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from gemma_ext import ckpts
from gemma_ext.train import _branch
from tests import tiny

_ROOT = pathlib.Path(__file__).parents[2]
_KILLS = int(os.environ.get('SURVIVAL_KILLS', 3))
_PAIR_KILLS = int(os.environ.get('SURVIVAL_KILLS', 1))
_FORK = os.environ.get('SURVIVAL_FORK', '1') != '0'
_HEARTBEAT = 10
_SERVER = """
import os, sys
from gemma_ext.train import __main__ as command

for line in sys.stdin:
  verb, *rest = line.rstrip('\\n').split('\\t')
  if verb == 'poll':
    pid, status = os.waitpid(int(rest[0]), os.WNOHANG)
    print(os.waitstatus_to_exitcode(status) if pid else '', flush=True)
    continue
  log, *argv = rest
  pid = os.fork()
  if not pid:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
      os.dup2(file, number)
    sys.exit(command.main(argv))
  print(pid, flush=True)
"""
_CONFIG = """
from kauldron import konfig
with konfig.imports():
  from gemma_ext import recipe
  from gemma_ext import train

def get_config():
  return train.Heal(
    checkpoint={folder!r} + '/dense',
    recipe=recipe.Recipe(
      rules=(('layer_[01]/mlp', recipe.Ternary(group=128)),)
    ),
    output={folder!r} + '/out',
    cache={folder!r} + '/cache',
    text={folder!r} + '/text.txt',
    tokens=2048,
    window=64,
    fit_tokens=512,
    dtype='float32',
    save_seconds=0.0,
    overwrite=False,
    stages=(
      train.Block(
        layers='layer_0',
        batch_tokens=128,
        optimizer=train.Gradient(steps=20, learning_rate=1e-2),
      ),
      train.Block(
        layers='layer_1',
        batch_tokens=128,
        optimizer=train.Evolution(steps=20, population=8, form='latent'),
      ),
    ),
  )
"""


def _environment(folder: pathlib.Path, *, fill: bool) -> dict[str, str]:
  out = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(_ROOT),
    'XLA_FLAGS': '',
  }
  if _FORK:
    out |= {
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
      # A kill while JAX writes there is not what is tested.
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0' if fill else '1e9',
    }
  return out


class _Server:
  """Forks commands from a process that has done the imports."""

  def __init__(self, folder: pathlib.Path):
    self._process = subprocess.Popen(
      [sys.executable, '-W', 'ignore', '-c', _SERVER],
      env=_environment(folder, fill=False),
      cwd=folder,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def ask(self, *words: str) -> str:
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    self._process.stdin.write('\t'.join(words) + '\n')
    self._process.stdin.flush()
    return self._process.stdout.readline().strip()

  def close(self) -> None:
    self._process.communicate()


class _Forked:
  """As much of `Popen` as is needed, for a command of a server."""

  def __init__(self, server: _Server, log: pathlib.Path, argv: list[str]):
    self._server, self._code = server, None
    log.write_bytes(b'')
    self.pid = int(server.ask('start', str(log), *argv))

  def poll(self) -> int | None:
    if self._code is None:
      answer = self._server.ask('poll', str(self.pid))
      self._code = int(answer) if answer else None
    return self._code

  def wait(self, timeout: float = 60) -> int:
    end = time.monotonic() + timeout
    while self.poll() is None:
      if time.monotonic() > end:
        raise subprocess.TimeoutExpired(str(self.pid), timeout)
      time.sleep(0.002)
    assert self._code is not None
    return self._code

  def send_signal(self, number: int) -> None:
    os.kill(self.pid, number)


class _Run:
  """The command's processes, on one output."""

  # What is seen once a phase has begun: in the folder, or on stderr.
  phases = (
    'start',
    'calibrate',
    'fisher',
    'compress',
    'layer_0',
    'layer_1',
    'result',
    'report',
  )

  def __init__(
    self,
    folder: pathlib.Path,
    count: int = 1,
    server: _Server | None = None,
    *,
    fill: bool = False,
    first_log: int = 0,
  ):
    self.folder, self._log = folder, first_log
    extra: list[list[str]] = [[] for _ in range(count)]
    if count > 1:
      with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
      extra = [
        [
          f'--coordinator=localhost:{port}',
          f'--num_processes={count}',
          f'--process_id={i}',
          f'--heartbeat_seconds={_HEARTBEAT}',
        ]
        for i in range(count)
      ]
    self.processes: list[subprocess.Popen | _Forked] = []
    for i, more in enumerate(extra):
      argv = [f'--config={folder}/config.py', *more]
      log = self._file(i)
      if server is not None:
        self.processes.append(_Forked(server, log, argv))
        continue
      with open(log, 'wb') as file:
        self.processes.append(
          subprocess.Popen(
            # For `stacks`.
            [sys.executable, '-X', 'faulthandler', '-m', 'gemma_ext.train']
            + argv,
            env=_environment(folder, fill=fill),
            stdout=file,
            stderr=file,
            cwd=folder,
          )
        )
    self.begun = time.monotonic()

  def _file(self, index: int) -> pathlib.Path:
    return self.folder / f'stderr_{self._log + index}.txt'

  def text(self, index: int = 0) -> str:
    return self._file(index).read_text(errors='replace')

  def running(self) -> bool:
    return any(p.poll() is None for p in self.processes)

  def reached(self, phase: str) -> bool:
    if phase == 'start':
      return True
    if phase == 'result':
      return bool([*self.folder.glob('.out.*'), *self.folder.glob('out')])
    if phase == 'report':
      return (self.folder / 'out.healing.json').exists()
    return f'{phase}: ' in self.text()

  def wait_for(self, phase: str) -> bool:
    """Waits until a phase, or a later one, has begun; `False` at the end."""
    later = self.phases[self.phases.index(phase) :]
    while self.running():
      if any(self.reached(p) for p in later):
        return True
      time.sleep(0.002)
    return False

  def finish(self, timeout: float = 600) -> list[int]:
    try:
      return [p.wait(timeout) for p in self.processes]
    except subprocess.TimeoutExpired as e:
      raise AssertionError(f'{e}\n{self.stacks()}') from e
    finally:
      self.kill()

  def stacks(self) -> str:
    """What the processes still at work are doing; ends them."""
    found = []
    for i, process in enumerate(self.processes):
      if process.poll() is None:
        process.send_signal(signal.SIGABRT)
        time.sleep(1)
        found.append(f'process {i}:\n{self.text(i)[-6000:]}')
    return '\n'.join(found)

  def kill(self, index: int | None = None) -> None:
    for i, process in enumerate(self.processes):
      if index in (None, i) and process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _make(folder: pathlib.Path) -> None:
  tiny.checkpoint(folder / 'dense')
  words = 'the river flows city was founded in France capital of a set'.split()
  text = ' '.join(np.random.default_rng(0).choice(words, 1500))
  (folder / 'text.txt').write_text(text)
  (folder / 'config.py').write_text(_CONFIG.format(folder=str(folder)))


def _clear(folder: pathlib.Path) -> None:
  for path in folder.iterdir():
    if path.name.startswith(('out', '.out', 'cache')):
      shutil.rmtree(path) if path.is_dir() else path.unlink()


def _result(folder: pathlib.Path) -> dict[str, object]:
  """All that a run leaves, but for times and versions of files."""
  found: dict[str, object] = {}
  flat = _branch.flatten(ckpts.load(folder / 'out').params)
  for name, leaf in flat.items():
    leaf = np.asarray(leaf)
    found[name] = (leaf.dtype, leaf.shape, leaf.tobytes())
  for name in ('out/tokenizer.model', 'out/recipe.json', 'out.healing.json'):
    data = (folder / name).read_bytes()
    found[name] = re.sub(rb'"seconds": [0-9.e-]+', b'', data)
  for file in sorted(folder.glob('cache/*/*')):
    if file.suffix == '.npz':
      with np.load(file) as arrays:
        found[file.name] = {k: arrays[k].tobytes() for k in arrays}
    else:
      found[file.name] = file.read_bytes()
  assert (folder / 'out.report' / 'report.html').exists()
  left = [p.name for p in folder.iterdir() if p.name.startswith('.out')]
  assert left == [] and os.listdir(folder / 'out.state') == ['.lock']
  return found


def _whole(folder: pathlib.Path, count: int, server: _Server | None):
  """An uninterrupted run: its result, and how long its phases took."""
  began: dict[str, float] = {}
  run = _Run(folder, count, server if count > 1 else None, fill=True)
  for phase in run.phases:
    run.wait_for(phase)
    began[phase] = time.monotonic() - run.begun
  codes = run.finish()
  assert codes == [0] * count, run.text()[-3000:]
  ends = [*began.values(), time.monotonic() - run.begun][1:]
  lengths = {p: e - b for (p, b), e in zip(began.items(), ends, strict=True)}
  return _result(folder), lengths


def _assert_same(got: dict[str, object], want: dict[str, object]) -> None:
  assert got.keys() == want.keys()
  assert [k for k in want if got[k] != want[k]] == []


def _kill(run: _Run, phase: str, delay: float, index: int | None) -> bool:
  """Kills at a moment; whether there was something left to kill."""
  if not run.wait_for(phase):
    return False
  end = time.monotonic() + delay
  while time.monotonic() < end and run.running():
    time.sleep(0.002)
  running = run.running()
  run.kill(index)
  return running


def _spread(phases: tuple[str, ...], count: int) -> list[str]:
  """Some of the phases, from all over the run."""
  count = min(count, len(phases))
  return [
    phases[(2 * i + 1) * len(phases) // (2 * count)] for i in range(count)
  ]


def _survive(
  folder: pathlib.Path, count: int, kills: int, server: _Server | None
) -> None:
  want, lengths = _whole(folder, count, server)
  rng = np.random.default_rng(kills)
  done: list[tuple[str, float, int | None]] = []
  rounds = 0
  while len(done) < kills:
    _clear(folder)
    rounds += 1
    assert rounds <= 3 + kills // 2, done
    # Imports have nothing to lose, and are slow; and who waits for a process
    # that never came does so for minutes.
    for phase in _spread(_Run.phases[count > 1 or rounds > 1 :], kills):
      delay = float(rng.uniform(0, lengths[phase]))
      run = _Run(folder, count, None if phase == 'start' else server)
      # Of several processes one or all of them.
      index = None if count == 1 else [None, *range(count)][rng.integers(3)]
      if _kill(run, phase, delay, index):
        done.append((phase, round(delay, 2), index))
        begun = time.monotonic()
        codes = run.finish(_HEARTBEAT + 60)
        if index is not None:
          assert 0 not in codes, codes
          text = run.text(1 - index)
          assert re.search('cannot go on|Terminating process', text), text
          print(f'the other one ended after {time.monotonic() - begun:.1f} s')
      if len(done) == kills:
        break
    last = count == 1 and len(done) == kills
    run = _Run(folder, count, None if last else server)
    assert run.finish() == [0] * count, (done, run.text()[-3000:])
    _assert_same(_result(folder), want)
  print(f'{len(done)} kills in {rounds} rounds, bits equal: {done}')


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('survival')
  _make(folder)
  return folder


@pytest.fixture(scope='module')
def server(made) -> Iterator[_Server | None]:
  server = _Server(made) if _FORK else None
  yield server
  if server is not None:
    server.close()


@pytest.fixture
def folder(made) -> pathlib.Path:
  _clear(made)
  return made


def test_killed_at_random_moments_ends_in_the_same_bits(folder, server):
  _survive(folder, 1, _KILLS, server)
  # A command that is given again has nothing to do, and says so.
  again = _Run(folder, 1, server)
  assert again.finish() == [0]
  assert 'result of this config already' in again.text()


def test_two_processes_killed_at_random_moments(folder, server):
  _survive(folder, 2, _PAIR_KILLS, server)


def test_sigterm_to_one_of_two_processes_stops_both(folder, server):
  run = _Run(folder, 2, server)
  assert run.wait_for('layer_0')
  run.processes[1].send_signal(signal.SIGTERM)
  assert run.finish() == [0, 0], run.text()
  assert 'goes on from here' in run.text()
  assert list(folder.glob('out.state/step_*')) and not (folder / 'out').exists()


def test_sigterm_during_calibration_and_a_second_run(folder, server):
  run = _Run(folder, 1, server)
  (process,) = run.processes
  assert run.wait_for('calibrate')
  process.send_signal(signal.SIGSTOP)
  try:
    second = _Run(folder, 1, server, first_log=2)
    assert second.finish() == [2]
    held = re.search(r'Another run is at work on .*: pid (\d+) ', second.text())
    assert held and int(held[1]) == process.pid
  finally:
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
  assert run.finish() == [0], run.text()
  assert 'goes on from here' in run.text() and 'fisher: ' not in run.text()
  (journal,) = folder.glob('cache/*/done.json')
  assert 0 <= json.loads(journal.read_text())['windows'] < 33
