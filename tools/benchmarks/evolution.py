# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What an update of `Evolution` costs beside the forward passes that it makes.

  python -m tools.benchmarks.evolution [--json=FILE]

One feed-forward branch of the size of Gemma 3 270M, random weights. The peer is
the same branch applied to as many rows in one batch. Norm scales are perturbed,
too, so that no product is shared between members: both multiply as many rows.
Times alternate, A B A B; peak memory is that of a fresh process each.
"""

from collections.abc import Callable, Sequence
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import _cli
from gemma_ext import errors
from gemma_ext.train import _evolution
from gemma_ext.train import _noise
from gemma_ext.train import _problem

_WIDTH, _HIDDEN = 640, 2048
_SPEED_BAR, _MEMORY_BAR = 0.85, 1.3


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  integer = lambda name, default, text: flags.DEFINE_integer(
    name, default, text, lower_bound=1, flag_values=values
  )
  string = lambda name, default, text: flags.DEFINE_string(
    name, default, text, flag_values=values
  )
  flags.DEFINE_list(
    'populations', ['64', '128'], 'Members.', flag_values=values
  )
  integer('tokens', 64, 'Rows that each member sees.')
  integer('rounds', 15, 'Pairs of times.')
  integer('rank', 1, 'Of the noise.')
  string('optimizer', 'sgd', "'sgd' or 'adam'.")
  string('json', None, 'File for the results.')
  string('peak', None, 'Internal: measure the memory of one side.')


def branch(params: dict[str, Any], x: jax.Array) -> jax.Array:
  """A gated feed-forward branch behind its norm, `[..., width]`."""
  mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  x = x * jax.lax.rsqrt(mean + 1e-6) * params['norm']
  gates = _noise.matmul(x, params['mlp/gating'])
  hidden = jax.nn.gelu(gates[..., 0, :]) * gates[..., 1, :]
  return _noise.matmul(hidden, params['mlp/linear'])


def loss(params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
  """Mean squared error of the branch."""
  error = branch(params, batch['x']) - batch['y']
  return jnp.mean(jnp.square(error))


def _params() -> dict[str, jax.Array]:
  rng = np.random.default_rng(0)
  normal = lambda *s: jnp.asarray(rng.normal(0, 0.03, s), jnp.float32)
  return {
    'norm': jnp.ones((_WIDTH,), jnp.float32),
    'mlp/gating': normal(2, _HIDDEN, _WIDTH),
    'mlp/linear': normal(_WIDTH, _HIDDEN),
  }


def _batch(rows: int) -> dict[str, jax.Array]:
  rng = np.random.default_rng(1)
  normal = lambda: jnp.asarray(rng.normal(size=(rows, _WIDTH)), jnp.float32)
  return {'x': normal(), 'y': normal()}


def _sides(
  population: int, args: Any
) -> dict[str, Callable[[], Callable[[], Any]]]:
  """Makers of the two sides; each compiles, and makes its arrays when called.

  Memory is counted from between the two.
  """
  config = _evolution.Evolution(
    steps=1000,
    population=population,
    rank=args.rank,
    optimizer=args.optimizer,
    lazy='mlp',
  )
  problem = _problem.Problem(loss)

  def evolution() -> Callable[[], Any]:
    update = jax.jit(
      functools.partial(config.update, problem), donate_argnums=(0, 1)
    )
    shapes = (
      jax.eval_shape(_params),
      jax.eval_shape(lambda: _batch(args.tokens)),
    )
    state = jax.eval_shape(
      lambda p: config.init(p, jax.random.key(0)), shapes[0]
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = update.lower(shapes[0], state, shapes[1], key).compile()
    held: dict[str, Any] = {}

    def once() -> Any:
      if not held:
        held['params'], held['batch'] = _params(), _batch(args.tokens)
        held['state'] = config.init(held['params'], jax.random.key(0))
      held['params'], held['state'], out = compiled(
        held['params'], held['state'], held['batch'], jax.random.key(1)
      )
      return jax.block_until_ready((out, held['params']))[0]['loss']

    return once

  def forward() -> Callable[[], Any]:
    rows = args.tokens * population
    shapes = jax.eval_shape(_params), jax.eval_shape(lambda: _batch(rows))
    compiled = jax.jit(loss).lower(*shapes).compile()
    held: dict[str, Any] = {}

    def once() -> Any:
      if not held:
        held['params'], held['batch'] = _params(), _batch(rows)
      return jax.block_until_ready(compiled(held['params'], held['batch']))

    return once

  return {'forward': forward, 'evolution': evolution}


def _run(args: Any) -> None:
  populations = [int(p) for p in args.populations]
  if args.peak:
    print(json.dumps(_peak(args.peak, populations[0], args)))
    return
  _cli.check_output(args.json)
  results = [_measure(p, args) for p in populations]
  percent = lambda x: f'{x:.1%}'
  _cli.print_table(
    f'Evolution against the forward pass: {_WIDTH} x {_HIDDEN}, float32,'
    f' {args.tokens} rows a member, rank {args.rank}, {args.optimizer}',
    ('members', 'forward', 'update', 'throughput', '95%', 'peaks', 'ratio', ''),
    [
      (
        str(r['population']),
        f'{r["forward_seconds"] * 1e3:.0f} ms',
        f'{r["evolution_seconds"] * 1e3:.0f} ms',
        percent(r['throughput']),
        f'{percent(r["low"])} to {percent(r["high"])}',
        f'{_cli.human_bytes(r["forward_bytes"])},'
        f' {_cli.human_bytes(r["evolution_bytes"])}',
        f'{r["memory"]:.2f}',
        'met' if r['met'] else 'MISSED',
      )
      for r in results
    ],
  )
  print(
    f'Bars: throughput at least {_SPEED_BAR:.0%}, memory at most'
    f' {_MEMORY_BAR}x.'
  )
  if args.json:
    _cli.write_json(args.json, {'results': results})


def _measure(population: int, args: Any) -> dict[str, Any]:
  sides = {k: make() for k, make in _sides(population, args).items()}
  times: dict[str, list[float]] = {k: [] for k in sides}
  for once in sides.values():
    once(), once()
  for i in range(args.rounds):
    # Whichever side is first in a pair must not gain by it.
    for name in list(sides)[:: 1 if i % 2 else -1]:
      begun = time.perf_counter()
      sides[name]()
      times[name].append(time.perf_counter() - begun)
    _cli.note(f'population {population}: {i + 1} of {args.rounds}')
  f, e = (np.array(times[k]) for k in ('forward', 'evolution'))
  rng = np.random.default_rng(0)
  again = rng.integers(0, len(f), (2000, len(f)))
  ratios = np.median(f[again], axis=1) / np.median(e[again], axis=1)
  low, high = np.quantile(ratios, [0.025, 0.975])
  peaks = {k: _fresh_peak(k, population, args) for k in sides}
  throughput = statistics.median(f) / statistics.median(e)
  memory = peaks['evolution'] / peaks['forward']
  return {
    'population': population,
    'tokens': args.tokens,
    'forward_seconds': statistics.median(f),
    'evolution_seconds': statistics.median(e),
    'throughput': throughput,
    'low': float(low),
    'high': float(high),
    'forward_bytes': peaks['forward'],
    'evolution_bytes': peaks['evolution'],
    'memory': memory,
    'met': bool(throughput >= _SPEED_BAR and memory <= _MEMORY_BAR),
  }


def _fresh_peak(side: str, population: int, args: Any) -> int:
  command = [
    *(sys.executable, '-m', 'tools.benchmarks.evolution', f'--peak={side}'),
    *(f'--populations={population}', f'--tokens={args.tokens}'),
    *(f'--rank={args.rank}', f'--optimizer={args.optimizer}'),
  ]
  out = subprocess.run(command, capture_output=True, text=True)
  if out.returncode:
    raise errors.TrainError(f'A measurement failed: {out.stderr[-2000:]}')
  return int(out.stdout.splitlines()[-1])


def _peak(side: str, population: int, args: Any) -> int:
  """Bytes that a side takes beyond what compiling it took."""
  once = _sides(population, args)[side]()
  status = pathlib.Path('/proc/self/status')
  if not status.exists():
    raise errors.TrainError('Peak memory is measured on Linux only.')
  # Compiling must not hide the peak: the mark that getrusage shows restarts.
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  before = _status(status, 'VmRSS')
  for _ in range(3):
    once()
  return _status(status, 'VmHWM') - before


def _status(status: pathlib.Path, name: str) -> int:
  for line in status.read_text().splitlines():
    if line.startswith(f'{name}:'):
      return int(line.split()[1]) * 1024
  raise errors.TrainError(f'The system does not tell {name}.')


if __name__ == '__main__':
  sys.exit(main())
