# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding of sparse feed-forward layers against dense ones, on the CPU.

  python -m tools.benchmarks.moe_kernels [--json=FILE] [--experts=16]

The feed-forward part of a model, packed, larger than the caches: all neurons,
and half and a quarter of them as experts that a float32 router and a top-k
choose (their time is in), in the layouts of `kernels.experts_ffn`; and single
neurons that their gates choose (`kernels.neurons_ffn`), of which all gates are
read. One token, layer after layer, in turn.
"""

from collections.abc import Sequence
import sys
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import _cli
from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext.kernels import _cpu
from tools.benchmarks import _timing
from tools.benchmarks import _weights

_FORMATS = ('ternary 2bit, group 128', 'int4, group 128')
_BYTES = 200 << 20  # of the weights of all layers


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_string('shape', '4b', 'Of a model.', flag_values=values)
  flags.DEFINE_integer(
    'experts', 16, 'Slices of the neurons.', lower_bound=4, flag_values=values
  )
  flags.DEFINE_integer(
    'rounds', 25, 'Times of each.', lower_bound=1, flag_values=values
  )
  flags.DEFINE_string('json', None, 'File for the results.', flag_values=values)


def _cell(fmt: kernels.Format, args: Any) -> dict[str, Any]:
  hidden = _weights.SHAPES[args.shape]['down'][1]
  width = _weights.SHAPES[args.shape]['down'][0]
  size = hidden // args.experts
  nbytes = fmt.nbytes((2, hidden), width) + fmt.nbytes((width,), hidden)
  count = max(2, -(-_BYTES // nbytes))
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((1, width)), jnp.bfloat16)

  def layers(gate: tuple[int, ...], down: tuple[int, ...], cols: int) -> Any:
    # In large pages, as the parameters of checkpoints are.
    return kernels.side_by_side(
      [
        (
          _weights.packed(fmt, gate, width, 2 * i),
          _weights.packed(fmt, down, cols, 2 * i + 1),
        )
        for i in range(count)
      ]
    )

  wide = layers((2, hidden), (width,), hidden)
  stacked = layers((args.experts, 2, size), (args.experts, width), size)
  routers = [
    jnp.asarray(rng.standard_normal((args.experts, width)), jnp.float32) / 50
    for _ in range(count)
  ]

  def dense(x, gate, down):
    return kernels.gated_ffn(x, gate, fmt, down, fmt, backend='cpu')

  def sparse(k):
    def run(x, gate, down, router):
      # A dot would wait for threads of XLA that wait for work of the kernels.
      scores = jnp.sum(x.astype(jnp.float32) * router, axis=-1)[None]
      weight, chosen = jax.lax.top_k(jax.nn.sigmoid(scores), k)
      return kernels.experts_ffn(
        *(x, gate, fmt, down, fmt, chosen, weight), size=size, backend='cpu'
      )

    return run

  def contender(layer, layers):
    @jax.jit
    def run(x, layers):
      for params in layers:
        # One after the other: each waits for the last.
        x = x + (layer(x, *params) * 1e-9).astype(x.dtype)
      return x

    call = lambda: run(x, layers).block_until_ready()
    call()
    return lambda: _timing.seconds(call) / count

  def gated(k):
    router = {
      'w': jnp.ones(hidden, jnp.float32),
      'bias': jnp.zeros(hidden, jnp.float32),
      'k': jnp.int32(k),
      'threshold': jnp.float32(-1e30),
    }

    def run(x, gate, down):
      return kernels.neurons_ffn(
        *(x, gate, fmt, down, fmt, router), backend='cpu'
      )

    return run

  contenders = {'dense': contender(dense, wide)}
  own = layers((2, hidden), (hidden,), width)
  for share in (1, 2, 4):
    contenders[f'neurons {args.experts // share}'] = contender(
      gated(hidden // share), own
    )
  cut = [(gate, down) for (gate, _), (_, down) in zip(wide, stacked)]
  for name, weights in (('stacked', stacked), ('cut', cut), ('wide', wide)):
    routed = [(*w, r) for w, r in zip(weights, routers)]
    for share in (1, 2, 4):
      k = args.experts // share
      contenders[f'{name} {k}'] = contender(sparse(k), routed)
  times = _timing.rounds(contenders, args.rounds)
  return {
    'bytes': nbytes,
    'layers': count,
    'seconds': {key: _timing.summary(t) for key, t in times.items()},
    'of_dense': {
      key: _timing.ratio(t, times['dense']) for key, t in times.items()
    },
  }


def _run(args: Any) -> None:
  _cli.check_output(args.json)
  _weights.check_shapes([args.shape])
  if not _cpu.instructions():
    raise errors.BackendError('The CPU kernels were not built.')
  hidden = _weights.SHAPES[args.shape]['down'][1]
  if hidden % args.experts:
    raise errors.ConfigError(
      f'--experts: {args.experts} does not divide {hidden} neurons.'
    )
  result: dict[str, Any] = {
    'machine': _timing.machine() | {'instructions': _cpu.instructions()},
    'shape': args.shape,
    'experts': args.experts,
    'formats': {},
  }
  print(result['machine'])
  rows = []
  for name in _FORMATS:
    cell = result['formats'][name] = _cell(_weights.FORMATS[name], args)
    for key, found in cell['of_dense'].items():
      low, high = found['ci95']
      ends = '' if low is None else f' [{low:.3f}, {high:.3f}]'
      ms = 1e3 * cell['seconds'][key]['median']
      layout, _, k = key.partition(' ')
      active = f'{int(k) / args.experts:.0%}' if k else '100%'
      rows.append(
        (name, layout, active, f'{ms:.3f}', f'{found["median"]:.3f}{ends}')
      )
  _cli.print_table(
    f'feed-forward layers of {args.shape}, {args.experts} experts, one token',
    ('format', 'layout', 'active', 'ms a layer', 'of dense'),
    rows,
  )
  if args.json:
    _cli.write_json(args.json, result)


if __name__ == '__main__':
  sys.exit(main())
