# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""From the start of a process to its first token, and the memory it takes.

  python -m tools.benchmarks.startup --checkpoint=DIR [--rounds=5] [--json=FILE]

Every round is a new process that imports, loads and streams, with JAX's
persistent cache of compilations (`JAX_COMPILATION_CACHE_DIR`) in a folder that
a first process has filled. Memory is resident and counted by the kernel: what
loading the weights adds, and what there is while decoding.
"""

from collections.abc import Sequence
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from gemma_ext import _cli
from gemma_ext import errors
from tools.benchmarks import _timing

_PHASES = ('imports', 'loading', 'first token')
_PROMPT = 'The history of the city begins in the year'
_CHILD = '_GEMMA_EXT_STARTUP'


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  if _CHILD in os.environ:
    print(json.dumps(_child(os.environ[_CHILD])))
    return 0
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    'checkpoint',
    None,
    'Directory of a compressed checkpoint.',
    required=True,
    flag_values=values,
  )
  flags.DEFINE_integer(
    'rounds', 5, 'Processes.', lower_bound=1, flag_values=values
  )
  flags.DEFINE_string('json', None, 'File for the results.', flag_values=values)


def _resident() -> int:
  """Resident bytes of this process, freed memory given back first."""
  gc.collect()
  try:
    ctypes.CDLL(None).malloc_trim(0)
  except AttributeError:
    pass  # Not glibc.
  with open('/proc/self/status') as f:
    for line in f:
      if line.startswith('VmRSS:'):
        return int(line.split()[1]) * 1024
  raise errors.GemmaExtError('This system does not say its resident memory.')


def _child(checkpoint: str) -> dict[str, Any]:
  """Loads and streams, in a process of its own."""
  # pylint: disable=g-import-not-at-top
  import jax
  import jax.numpy as jnp

  from gemma_ext import ckpts
  from gemma_ext import text

  # What the first array of all brings along is not the weights'.
  jnp.zeros(8).block_until_ready()
  imported = time.time()
  before = _resident()
  found = ckpts.load(checkpoint, dtype=jnp.bfloat16)
  jax.block_until_ready(found.params)
  loaded = time.time()
  after = _resident()
  begun = time.time()
  stream = text.stream(found, _PROMPT, max_new_tokens=32, chunk=1)
  next(stream)
  first = time.time()
  for _ in stream:
    pass
  decoding = _resident()
  # A second copy, now that all code has been imported and compiled.
  again = ckpts.load(checkpoint, dtype=jnp.bfloat16)
  jax.block_until_ready(again.params)
  second = _resident() - decoding
  return {
    'resident_second_copy': second,
    'imported': imported,
    'loaded': loaded,
    'first': first - (begun - loaded),
    'packed_bytes': sum(x.nbytes for x in jax.tree.leaves(found.params)),
    'resident_before': before,
    'resident_loaded': after,
    'resident_decoding': decoding,
  }


def _start(checkpoint: str, cache: str) -> dict[str, Any]:
  env = os.environ | {
    _CHILD: os.path.abspath(checkpoint),
    'JAX_COMPILATION_CACHE_DIR': cache,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    'TF_CPP_MIN_LOG_LEVEL': '3',
  }
  begun = time.time()
  done = subprocess.run(
    [sys.executable, '-m', 'tools.benchmarks.startup'],
    env=env,
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise errors.GemmaExtError(
      f'The process that loads {checkpoint!r} ended with {done.returncode}:'
      f' {done.stderr[-2000:]}'
    )
  found = json.loads(done.stdout.strip().splitlines()[-1])
  times = [begun, found['imported'], found['loaded'], found['first']]
  found['seconds'] = {
    phase: b - a for phase, a, b in zip(_PHASES, times, times[1:], strict=False)
  }
  return found


def _run(args: Any) -> None:
  _cli.check_output(args.json)
  if not os.path.isdir(args.checkpoint):
    raise errors.DataError(
      f'--checkpoint: {args.checkpoint!r} is no directory.'
    )
  with tempfile.TemporaryDirectory() as cache:
    cold = _start(args.checkpoint, cache)
    _cli.note(f'cold: {cold["seconds"]}')
    warm = []
    for i in range(args.rounds):
      warm.append(_start(args.checkpoint, cache))
      _cli.note(f'round {i + 1} of {args.rounds}: {warm[-1]["seconds"]}')
  seconds = {
    phase: [w['seconds'][phase] for w in warm] for phase in _PHASES
  } | {'total': [sum(w['seconds'].values()) for w in warm]}
  added = [w['resident_loaded'] - w['resident_before'] for w in warm]
  packed = warm[0]['packed_bytes']
  second = [w['resident_second_copy'] for w in warm]
  decoding = [w['resident_decoding'] - w['resident_before'] for w in warm]
  cold_seconds = cold['seconds'] | {'total': sum(cold['seconds'].values())}
  _cli.print_table(
    f'to the first token of {args.checkpoint}, seconds',
    ('', 'nothing compiled', 'compilations cached'),
    [
      (phase, f'{cold_seconds[phase]:.2f}', _timing.spread(taken))
      for phase, taken in seconds.items()
    ],
  )
  memory = [
    ('packed weights', packed),
    ('resident, added by a second copy', statistics.median(second)),
    ('resident, added by loading', statistics.median(added)),
    ('resident, added up to decoding', statistics.median(decoding)),
    ('resident, all', statistics.median(w['resident_decoding'] for w in warm)),
  ]
  _cli.print_table(
    'memory',
    ('', 'bytes', 'of the packed weights'),
    [
      (name, _cli.human_bytes(int(size)), f'{size / packed:.3f}')
      for name, size in memory
    ],
  )
  if args.json:
    _cli.write_json(
      args.json,
      {
        'machine': _timing.machine(),
        'cold_seconds': cold_seconds,
        'seconds': {k: _timing.summary(v) for k, v in seconds.items()},
        'packed_bytes': packed,
        'resident_added_by_second_copy': second,
        'resident_added_by_loading': added,
        'resident_added_while_decoding': decoding,
      },
    )


if __name__ == '__main__':
  sys.exit(main())
