# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Kills a suite at random moments, and says whether a result was lost.

  python -m tools.benchmarks.run_killed --suite=FILE.json --output=DIR \
      [--kills=6] [--json=FILE]

Starts `tools.benchmarks.run`, kills it (SIGKILL) after a time by chance, starts
it again, and lets it end after the last kill. After every kill the whole lines
of the results must begin with those that were there before, byte for byte; at
the end every pair of model and task must have one line. A last run must add
nothing. The exit status is 1 if any of that is not so.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
import json
import pathlib
import subprocess
import sys
from typing import Any

from absl import flags
import numpy as np

from gemma_ext import _cli
from gemma_ext import errors
from tools.benchmarks import _suite


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
  flags.DEFINE_list(
    'seconds',
    ['20', '90'],
    'Least and most seconds before a kill.',
    flag_values=values,
  )
  flags.DEFINE_integer('seed', 0, 'Of the moments.', flag_values=values)


def _run(args: Any) -> list[str]:
  if not args.suite or not args.output:
    raise errors.ConfigError('Give --suite=FILE.json and --output=DIR.')
  suite = _suite.read(args.suite)
  _cli.check_output(args.json)
  try:
    least, most = map(float, args.seconds)
  except ValueError as e:
    raise errors.ConfigError(
      f'--seconds: two numbers, got {args.seconds}.'
    ) from e
  results = pathlib.Path(args.output) / 'results.jsonl'
  if results.exists():
    raise errors.DataError(f'{results} is there already; give another folder.')
  command = [sys.executable, '-m', 'tools.benchmarks.run']
  command += [f'--suite={args.suite}', f'--output={args.output}']
  rng = np.random.default_rng(args.seed)
  wrong: list[str] = []
  kills: list[dict[str, Any]] = []
  before = b''
  while True:
    seconds = float(rng.uniform(least, most)) if len(kills) < args.kills else 0
    status = _start(command, seconds)
    now = _whole(results)
    if not now.startswith(before):
      wrong.append(f'after {len(kills)} kills, lines were lost or changed')
    if status is not None:
      break
    lines = now.count(b'\n')
    kills.append({'seconds': seconds, 'lines': lines})
    _cli.note(f'killed after {seconds:.0f} s: {lines} lines')
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
  if _start(command, 0) or results.read_bytes() != whole:
    wrong.append('a run after the last one measured something again')
  _cli.print_table(
    f'{len(kills)} kills, {len(pairs)} of {len(expected)} lines',
    ('kill', 'after, s', 'lines then'),
    [
      (str(i), f'{kill["seconds"]:.0f}', str(kill['lines']))
      for i, kill in enumerate(kills, 1)
    ],
  )
  print('; '.join(wrong) or 'No line was lost, changed or doubled.')
  if args.json:
    found = {'kills': kills, 'lines': len(pairs), 'wrong': wrong}
    _cli.write_json(args.json, found)
  return wrong


def _start(command: Sequence[str], seconds: float) -> int | None:
  """The status of a run; `None` of one that was killed after `seconds`."""
  with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
    try:
      return process.wait(seconds or None)
    except subprocess.TimeoutExpired:
      process.kill()
      return None


def _whole(path: pathlib.Path) -> bytes:
  """The lines of a file that have an end."""
  data = path.read_bytes() if path.exists() else b''
  return data[: data.rfind(b'\n') + 1]


if __name__ == '__main__':
  sys.exit(main())
