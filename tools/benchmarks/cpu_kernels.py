# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed matmuls on the CPU against the read bandwidth of the machine.

  python -m tools.benchmarks.cpu_kernels [--json=FILE] [--shapes=4b]

For every format and shape, one row of x times weights larger than the caches:
milliseconds, bytes read a second, and their share of what a plain read of as
many bytes reaches in the same round. The same for 512 rows in operations a
second.
"""

from collections.abc import Callable, Sequence
import statistics
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


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_list(
    'shapes', ['4b'], f'Of {", ".join(_weights.SHAPES)}.', flag_values=values
  )
  flags.DEFINE_integer(
    'rounds', 11, 'Times of each.', lower_bound=1, flag_values=values
  )
  flags.DEFINE_integer(
    'many', 512, 'Rows of the second table; 0 for none.', flag_values=values
  )
  flags.DEFINE_string(
    'formats', '', 'Only formats whose name holds this.', flag_values=values
  )
  flags.DEFINE_string('json', None, 'File for the results.', flag_values=values)


# Of a weight that stays in the last cache.
_NEAR_BYTES = 4 << 20


def _cell(
  fmt: kernels.Format, rows: int, cols: int, n: int, args: Any
) -> dict[str, Any]:
  nbytes = fmt.nbytes((rows,), cols)
  copies = max(1, -(-(96 << 20) // nbytes)) if n == 1 else 1
  # Different weights, so that one is out of the caches when its turn comes.
  weights = [_weights.packed(fmt, rows, cols, i) for i in range(copies)]
  x = jnp.asarray(
    np.random.default_rng(1).standard_normal((n, cols)), jnp.bfloat16
  )

  def contender(x_bits: int, weights: list[Any]) -> Callable[[], float]:
    @jax.jit
    def run(x, weights):
      for p in weights:
        y = kernels.matmul(x, p, fmt, backend='cpu', x_bits=x_bits)
        # One after the other: each waits for the last.
        x = x + (y[:, :1] * 0).astype(x.dtype)
      return x

    call = lambda: run(x, weights).block_until_ready()
    call()
    return lambda: _timing.seconds(call) / len(weights)

  plain = jnp.zeros((copies * nbytes,), jnp.uint8)
  read = jax.jit(_cpu.read)
  read(plain).block_until_ready()
  contenders = {
    'read': lambda: (
      _timing.seconds(lambda: read(plain).block_until_ready()) / copies
    ),
    '16': contender(16, weights),
    '8': contender(8, weights),
  }
  near_rows = min(rows, max(64, rows * _NEAR_BYTES // nbytes))
  if n == 1:
    near = [_weights.packed(fmt, near_rows, cols, 0)] * copies
    contenders |= {
      'near 16': contender(16, near),
      'near 8': contender(8, near),
    }
  found = _timing.rounds(contenders, args.rounds)
  for name in set(found) & {'near 16', 'near 8'}:
    found[name] = [t * rows / near_rows for t in found[name]]
  return {'bytes': nbytes, 'near_rows': near_rows, 'seconds': found}


def _run(args: Any) -> None:
  _cli.check_output(args.json)
  _weights.check_shapes(args.shapes)
  if not _cpu.instructions():
    raise errors.BackendError('The CPU kernels were not built.')
  machine = _timing.machine() | {'instructions': _cpu.instructions()}
  print(machine)
  cells = []
  for n in [1] + ([args.many] if args.many else []):
    table = []
    for shape in args.shapes:
      for part, (rows, cols) in _weights.SHAPES[shape].items():
        for name, fmt in _weights.FORMATS.items():
          if args.formats not in name or (n > 1 and part == 'head'):
            continue
          cell = _cell(fmt, rows, cols, n, args)
          times = cell['seconds']
          cells.append(
            {'shape': shape, 'part': part, 'format': name, 'rows': n, **cell}
          )
          row = [f'{shape} {part}', name]
          for bits in ('16', '8'):
            t = statistics.median(times[bits])
            if n == 1:
              share = _timing.ratio(times['read'], times[bits])
              near = _timing.ratio(times[f'near {bits}'], times[bits])
              row += [
                f'{t * 1e3:.3f}',
                f'{cell["bytes"] / t / 1e9:.1f}',
                f'{share["median"]:.0%}',
                f'{near["median"]:.0%}',
              ]
            else:
              row += [f'{t * 1e3:.1f}', f'{2 * n * rows * cols / t / 1e9:.0f}']
          if n == 1:
            t = statistics.median(times['read'])
            row.append(f'{cell["bytes"] / t / 1e9:.1f}')
          table.append(tuple(row))
          _cli.note(' '.join(row))
    head: tuple[str, ...] = ('weight', 'format')
    for bits in ('16', '8'):
      head += (
        (f'x {bits} bits: ms', 'GB/s', 'of a read', 'in caches')
        if n == 1
        else (f'x {bits} bits: ms', 'GFLOP/s')
      )
    if n == 1:
      head += ('read, GB/s',)
    _cli.print_table(f'{n} row{"s" if n > 1 else ""} of x', head, table)
  if args.json:
    _cli.write_json(args.json, {'machine': machine, 'cells': cells})


if __name__ == '__main__':
  sys.exit(main())
