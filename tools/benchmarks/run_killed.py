# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Kills a suite at random moments, and says whether a result was lost.

  python -m tools.benchmarks.run_killed --suite=FILE.json --output=DIR \
      [--kills=6] [--json=FILE]

Starts `tools.benchmarks.run`, kills it (SIGKILL) once it has written a number
of lines, by chance, and some time has gone by, starts it again, and lets it end
after the last kill. Every other kill comes at once, while a line may be under
way. After every kill the whole lines of the results must begin with those that
were there before, byte for byte; at the end every pair of model and task must
have one line. A last run must add nothing. The exit status is 1 if any of that
is not so.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

from absl import flags
import numpy as np

from gemma_ext import _cli
from gemma_ext import errors
from tools.benchmarks import _suite

# Of every other kill, the most seconds after a line.
_AT_ONCE = 0.05


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  string = lambda name, text: flags.DEFINE_string(
    name, None, text, flag_values=values
  )
  string('suite', 'The suite, a .json file.')
  string('output', 'Directory for results, empty.')
  string('json', 'File for what was found.')
  flags.DEFINE_integer('kills', 6, 'How often.', 1, flag_values=values)
  flags.DEFINE_float(
    'seconds',
    45.0,
    'The most seconds between a line and a kill.',
    0.0,
    flag_values=values,
  )
  flags.DEFINE_integer('seed', 0, 'Of the moments.', flag_values=values)


def _run(args: Any) -> list[str]:
  if not args.suite or not args.output:
    raise errors.ConfigError('Give --suite=FILE.json and --output=DIR.')
  suite = _suite.read(args.suite)
  _cli.check_output(args.json)
  results = pathlib.Path(args.output) / 'results.jsonl'
  if results.exists():
    raise errors.DataError(f'{results} is there already; give another folder.')
  command = [sys.executable, '-m', 'tools.benchmarks.run']
  command += [f'--suite={args.suite}', f'--output={args.output}']
  rng = np.random.default_rng(args.seed)
  wrong: list[str] = []
  kills: list[dict[str, Any]] = []
  before = b''
  total = len(suite.models) * len(suite.tasks)
  # Sorted: a run never has fewer lines than the one before.
  wanted = [*np.sort(rng.integers(0, total, args.kills)).tolist(), None]
  while True:
    lines = wanted[len(kills)]
    most = args.seconds if len(kills) % 2 == 0 else _AT_ONCE
    seconds = float(rng.uniform(0, most))
    status = _start(command, lines, seconds, results)
    now = _whole(results)
    if not now.startswith(before):
      wrong.append(f'after {len(kills)} kills, lines were lost or changed')
    if status is not None:
      break
    kills.append(
      {'at_line': lines, 'seconds': seconds, 'lines': now.count(b'\n')}
    )
    _cli.note(f'killed {seconds:.2f} s after line {lines}')
    before = now
  if status:
    wrong.append(f'the run ended with status {status}')
  pairs = collections.Counter(
    (found['model'], found['task'])
    for found in map(json.loads, _whole(results).splitlines())
  )
  expected = {(m, t) for m in suite.models for t in suite.tasks}
  for name, some in (
    ('lost', expected - set(pairs)),
    ('unknown', set(pairs) - expected),
    ('doubled', {pair for pair, count in pairs.items() if count > 1}),
  ):
    if some:
      wrong.append(f'{name}: {sorted(some)}')
  whole = results.read_bytes()
  if _start(command, None, 0, results) or results.read_bytes() != whole:
    wrong.append('a run after the last one measured something again')
  _cli.print_table(
    f'{len(kills)} kills, {len(pairs)} of {len(expected)} lines',
    ('kill', 'once there were', 'after, s', 'lines then'),
    [
      (
        str(i),
        f'{kill["at_line"]} lines',
        f'{kill["seconds"]:.2f}',
        str(kill['lines']),
      )
      for i, kill in enumerate(kills, 1)
    ],
  )
  print('; '.join(wrong) or 'No line was lost, changed or doubled.')
  if args.json:
    found = {'kills': kills, 'lines': len(pairs), 'wrong': wrong}
    _cli.write_json(args.json, found)
  return wrong


def _start(
  command: Sequence[str],
  lines: int | None,
  seconds: float,
  results: pathlib.Path,
) -> int | None:
  """The status of a run; `None` of one that was killed.

  Args:
    command: What is run.
    lines: How many lines it has written when it is killed; `None`: it is not.
    seconds: What it is left after that.
    results: Where lines are.
  """
  with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
    if lines is None:
      return process.wait()
    while process.poll() is None and _whole(results).count(b'\n') < lines:
      time.sleep(0.01)
    try:
      return process.wait(seconds)
    except subprocess.TimeoutExpired:
      process.kill()
      return None


def _whole(path: pathlib.Path) -> bytes:
  """The lines of a file that have an end."""
  data = path.read_bytes() if path.exists() else b''
  return data[: data.rfind(b'\n') + 1]


if __name__ == '__main__':
  sys.exit(main())
