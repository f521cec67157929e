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

# Rows and columns of the gate and up projection together, and of the down one.
SHAPES = {
  '270m': {'gate and up': (4096, 640), 'down': (640, 2048)},
  '1b': {'gate and up': (13824, 1152), 'down': (1152, 6912)},
  '4b': {'gate and up': (20480, 2560), 'down': (2560, 10240)},
  'head': {'head': (262144, 640)},
}
FORMATS = {
  'ternary 2bit, group 128': kernels.TernaryFormat(group=128),
  'ternary 5trit, group 128': kernels.TernaryFormat(group=128, packing='5trit'),
  'ternary 5trit, group 16, ue5m3': kernels.TernaryFormat(
    group=16, packing='5trit', scale='ue5m3'
  ),
  '2 tied planes, group 8, ue5m3': kernels.TernaryFormat(
    group=8, packing='5trit', scale='ue5m3', planes=2, tied=True
  ),
  'int3, group 128': kernels.IntFormat(bits=3, group=128),
  'int4, group 32': kernels.IntFormat(bits=4, group=32),
  'int4, group 128': kernels.IntFormat(bits=4, group=128),
  'int6, group 128': kernels.IntFormat(bits=6, group=128),
  'int8, group 128': kernels.IntFormat(bits=8, group=128),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_list(
    'shapes', ['4b'], f'Of {", ".join(SHAPES)}.', flag_values=values
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


def _packed(
  fmt: kernels.Format, rows: int, cols: int, copies: int
) -> list[dict[str, jax.Array]]:
  """Different weights, so that one is out of the caches when its turn comes."""
  make = jax.jit(kernels.random_codes, static_argnums=(1, 2, 3))
  rng = np.random.default_rng(0)
  scale = np.abs(rng.standard_normal(fmt.scale_shape((rows,), cols)))
  return [
    {
      'codes': make(jax.random.key(i), fmt, (rows,), cols),
      'scale': fmt.pack_scale(jnp.asarray(scale, jnp.float32)),
    }
    for i in range(copies)
  ]


def _cell(
  fmt: kernels.Format, rows: int, cols: int, n: int, args: Any
) -> dict[str, Any]:
  nbytes = fmt.nbytes((rows,), cols)
  copies = max(1, -(-(96 << 20) // nbytes)) if n == 1 else 1
  weights = _packed(fmt, rows, cols, copies)
  x = jnp.asarray(
    np.random.default_rng(1).standard_normal((n, cols)), jnp.bfloat16
  )

  def contender(x_bits: int) -> Callable[[], float]:
    @jax.jit
    def run(x, weights):
      for p in weights:
        y = kernels.matmul(x, p, fmt, backend='cpu', x_bits=x_bits)
        # One after the other: each waits for the last.
        x = x + (y[:, :1] * 0).astype(x.dtype)
      return x

    call = lambda: run(x, weights).block_until_ready()
    call()
    return lambda: _timing.seconds(call) / copies

  plain = jnp.zeros((copies * nbytes,), jnp.uint8)
  read = jax.jit(_cpu.read)
  read(plain).block_until_ready()
  found = _timing.rounds(
    {
      'read': lambda: (
        _timing.seconds(lambda: read(plain).block_until_ready()) / copies
      ),
      '16': contender(16),
      '8': contender(8),
    },
    args.rounds,
  )
  return {'bytes': nbytes, 'seconds': found}


def _run(args: Any) -> None:
  _cli.check_output(args.json)
  for shape in args.shapes:
    if shape not in SHAPES:
      raise errors.ConfigError(f'--shapes: {shape!r} is none of {[*SHAPES]}.')
  if not _cpu.instructions():
    raise errors.BackendError('The CPU kernels were not built.')
  machine = _timing.machine() | {'instructions': _cpu.instructions()}
  print(machine)
  cells = []
  for n in [1] + ([args.many] if args.many else []):
    table = []
    for shape in args.shapes:
      for part, (rows, cols) in SHAPES[shape].items():
        for name, fmt in FORMATS.items():
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
              row += [
                f'{t * 1e3:.3f}',
                f'{cell["bytes"] / t / 1e9:.1f}',
                f'{share["median"]:.0%}',
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
        (f'x {bits} bits: ms', 'GB/s', 'of a read')
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
