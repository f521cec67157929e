# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""One MoE layer of Gemma 4 26B-A4B: ours beside the official two, on the CPU.

  python -m tools.benchmarks.moe_layer [--json=FILE] [--prefill=128]

Random weights, the same for all: in bfloat16 through `kernels.experts_dense`
and the official `MoERagged` and `MoE`, and packed through
`kernels.experts_ffn`. Every contender is a process of its own, so that its peak
of resident memory, above its weights, is its own; they take turns, a group at a
time. What a
program needs beside weights, as its compiler says, comes first: one that needs
more than `--most` GB does not run.
"""

from collections.abc import Sequence
import ctypes
import gc
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags
import numpy as np

from gemma_ext import _cli
from gemma_ext import errors
from tools.benchmarks import _timing

_OURS = 'ours, bfloat16'
_RAGGED = 'official MoERagged'
_PACKED = ('ours, int4 group 64', 'ours, ternary 2bit group 64')
# Of bfloat16, rounded several times on the way.
_MOST_ERROR = 0.03
# Contenders that are in memory together; ratios are of the same turns.
_GROUPS = (
  (_RAGGED, _OURS, *_PACKED),
  ('official MoE', _RAGGED),
)
_CHILD = '--child'


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  given = sys.argv[1:] if argv is None else list(argv)
  if given[:1] == [_CHILD]:
    _serve(given[1], pathlib.Path(given[2]))
    return 0
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  for name, default, text in (
    ('prefill', 128, 'Tokens of the second table; 0 for none.'),
    ('rounds', 9, 'Rounds of decoding.'),
    ('prefill_rounds', 3, 'Rounds of the prefill.'),
    ('most', 7, 'GB that a program may need beside weights.'),
  ):
    flags.DEFINE_integer(name, default, text, lower_bound=0, flag_values=values)
  flags.DEFINE_string('json', None, 'File for the results.', flag_values=values)


def _memory(field: str) -> int:
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith(field + ':'):
      return int(line.split()[1]) * 1024
  raise errors.GemmaExtError(f'This system does not say {field}.')


def _give_back() -> None:
  """Gives freed memory back to the system."""
  gc.collect()
  try:
    ctypes.CDLL(None).malloc_trim(0)
  except AttributeError:
    pass  # Not glibc.


def _serve(name: str, folder: pathlib.Path) -> None:
  """Answers questions about one contender, a line of JSON each."""
  # pylint: disable=g-import-not-at-top
  import jax

  from tools.benchmarks import _moe_layer

  run, variables = _moe_layer.contender(name)
  compiled: dict[int, Any] = {}
  tokens: dict[int, Any] = {}
  for line in sys.stdin:
    question, n = line.split()
    n = int(n)
    answer: dict[str, Any] = {}
    if question == 'compile':
      tokens[n] = _moe_layer.tokens(n)
      compiled[n] = jax.jit(run).lower(variables, tokens[n]).compile()
      needs = compiled[n].memory_analysis()
      answer['temporary_bytes'] = needs.temp_size_in_bytes
      answer['weight_bytes'] = sum(
        leaf.nbytes for leaf in jax.tree.leaves(variables)
      )
    elif question == 'time':
      _give_back()
      loaded = _memory('VmRSS')
      # The kernel forgets the peak so far.
      pathlib.Path('/proc/self/clear_refs').write_text('5')
      begun = time.perf_counter()
      y = compiled[n](variables, tokens[n]).block_until_ready()
      answer['seconds'] = time.perf_counter() - begun
      answer['peak_bytes'] = _memory('VmHWM') - loaded
      np.save(folder / f'{name}_{n}.npy', np.asarray(y, np.float32))
    elif question == 'check':
      want = _moe_layer.reference(name, variables, tokens[n])
      np.save(folder / f'{name}_{n}_reference.npy', want)
    print(json.dumps(answer), flush=True)


class _Child:
  """A process for one contender."""

  def __init__(self, name: str, folder: str):
    self._process = subprocess.Popen(
      [
        sys.executable,
        '-m',
        'tools.benchmarks.moe_layer',
        _CHILD,
        name,
        folder,
      ],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def ask(self, question: str, n: int) -> dict[str, Any]:
    """Asks, and waits for the answer."""
    assert self._process.stdin is not None and self._process.stdout is not None
    line = ''
    try:
      print(question, n, file=self._process.stdin, flush=True)
      line = self._process.stdout.readline()
    except BrokenPipeError:
      pass  # It says why.
    if not line:
      raise errors.GemmaExtError('A contender died; its error is above.')
    return json.loads(line)

  def end(self) -> None:
    """Ends the process, which holds much memory."""
    self._process.kill()
    self._process.wait()


def _phase(children: dict[str, _Child], n: int, rounds: int, args: Any) -> Any:
  cells = {name: c.ask('compile', n) for name, c in children.items()}
  running = {
    name: c
    for name, c in children.items()
    if cells[name]['temporary_bytes'] <= args.most * 1e9
  }
  times: dict[str, list[float]] = {name: [] for name in running}
  for child in running.values():
    child.ask('time', n)
  for i in range(rounds):
    for name, child in running.items():
      answer = child.ask('time', n)
      times[name].append(answer['seconds'])
      cells[name]['peak_bytes'] = answer['peak_bytes']
    _cli.note(f'{n} tokens, round {i + 1}: {[t[-1] for t in times.values()]}')
  for name in set(_PACKED) & set(running):
    running[name].ask('check', n)
  for name, taken in times.items():
    cells[name]['seconds'] = _timing.summary(taken)
    if _RAGGED in times:
      cells[name]['times_as_fast_as_ragged'] = _timing.ratio(
        times[_RAGGED], taken
      )
  return cells


def _errors(folder: str, cells: dict[str, Any], n: int) -> None:
  """Adds how far results are from MoERagged's, packed ones from XLA's."""
  load = lambda name: np.load(pathlib.Path(folder) / f'{name}.npy')
  for name, cell in cells.items():
    of = f'{name}_{n}_reference' if name in _PACKED else f'{_RAGGED}_{n}'
    if not all('seconds' in c for c in (cell, cells[_RAGGED])):
      continue
    want = load(of)
    error = np.linalg.norm(load(f'{name}_{n}') - want) / np.linalg.norm(want)
    cell['relative_error'] = float(error)
    if not error < _MOST_ERROR:
      raise errors.GemmaExtError(f'{name} differs by {error:.3g}, {n} tokens.')


def _rows(cells: dict[str, Any]) -> list[tuple[str, ...]]:
  rows = []
  for name, cell in cells.items():
    size = lambda key: _cli.human_bytes(max(cell[key], 0))  # noqa: B023
    row = [name, size('weight_bytes'), size('temporary_bytes')]
    if 'seconds' not in cell:
      rows.append((*row, 'not run', '', '', ''))
      continue
    low, high = cell['seconds']['ci95']
    ends = '' if low is None else f' [{1e3 * low:.1f}, {1e3 * high:.1f}]'
    row += [
      size('peak_bytes'),
      f'{1e3 * cell["seconds"]["median"]:.1f}{ends}',
    ]
    ratio = cell.get('times_as_fast_as_ragged')
    row.append(f'{ratio["median"]:.1f}' if ratio else '')
    error = cell.get('relative_error')
    row.append('' if error is None else f'{error:.2g}')
    rows.append(tuple(row))
  return rows


def _group(
  names: Sequence[str], phases: Sequence[tuple[int, int]], args: Any
) -> dict[int, Any]:
  """What was measured, by number of tokens and contender."""
  found: dict[int, Any] = {}
  with tempfile.TemporaryDirectory() as folder:
    children: dict[str, _Child] = {}
    try:
      for name in names:
        children[name] = _Child(name, folder)
      for n, rounds in phases:
        if n and rounds:
          found[n] = _phase(children, n, rounds, args)
          _errors(folder, found[n], n)
    finally:
      for child in children.values():
        child.end()
  return found


def _run(args: Any) -> None:
  _cli.check_output(args.json)
  result: dict[str, Any] = {'machine': _timing.machine(), 'tokens': {}}
  print(result['machine'])
  phases = ((1, args.rounds), (args.prefill, args.prefill_rounds))
  for group in _GROUPS:
    for n, cells in _group(group, phases, args).items():
      known = result['tokens'].setdefault(n, {})
      known.update({k: v for k, v in cells.items() if k not in known})
  for n, cells in result['tokens'].items():
    _cli.print_table(
      f'one layer, {n} token{"s" if n > 1 else ""}',
      (
        *('', 'weights', 'program needs', 'peak beside weights', 'ms'),
        *('x MoERagged', 'differs'),
      ),
      _rows(cells),
    )
  if args.json:
    _cli.write_json(args.json, result)


if __name__ == '__main__':
  sys.exit(main())
