# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed kernels on a GPU against cuBLAS and the copy bandwidth of the device.

  python -m tools.benchmarks.gpu_kernels [--json=FILE] [--shapes=4b,12b,27b]

Builds every kernel, compares it with a reference in float64, and times it: the
seconds that the kernels of a call take on the device, as CUPTI has them, in
turn with the same product in bfloat16 as XLA compiles it, and with that of the
kernel for a few rows, 'few rows' in the JSON. Weights are more than
the caches hold. Needs jax with CUDA, numpy, scipy, absl-py and a Hopper GPU or
newer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import os
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
from gemma_ext.kernels import _dequantize
from gemma_ext.kernels import mosaic_gpu
from gemma_ext.kernels.mosaic_gpu import _integers
from tools.benchmarks import _timing
from tools.benchmarks import _weights

# Shapes with feed-forward layers.
_SHAPES = tuple(name for name in _weights.SHAPES if name != 'head')
FORMATS = (
  'ternary 2bit, group 128',
  'ternary 5trit, group 128',
  'ternary 5trit, group 16, ue5m3',
  '2 tied planes, group 8, ue5m3',
  'int4, group 128',
  'int8, group 128',
)
# What a second-level cache can hold, times three.
_SPREAD = 192 << 20
# Of the 2-norm, relative to that of the product of absolute values.
_TOLERANCE = 1e-5


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  # In a graph, products that do not depend on each other run side by side.
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_gpu_enable_command_buffer='
  )
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_list(
    'shapes',
    ['4b', '12b', '27b'],
    f'Of {", ".join(_SHAPES)}.',
    flag_values=values,
  )
  flags.DEFINE_list(
    'parts',
    ['check', 'products', 'ffn', 'prefill'],
    'Of check, tune, products, ffn, prefill.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'rounds', 11, 'Times of each.', lower_bound=1, flag_values=values
  )
  flags.DEFINE_string(
    'formats', '', 'Only formats whose name holds this.', flag_values=values
  )
  flags.DEFINE_string('json', None, 'File for the results.', flag_values=values)


@dataclasses.dataclass(frozen=True)
class _Product:
  """A weight of a feed-forward layer."""

  shape: str
  part: str
  rows: int
  cols: int


def _products(shapes: Sequence[str]) -> Iterator[_Product]:
  for shape in shapes:
    for part, (rows, cols) in _weights.SHAPES[shape].items():
      yield _Product(shape, part, rows, cols)


def _x(rows: int, cols: int) -> jax.Array:
  return jax.random.normal(jax.random.key(99), (rows, cols), jnp.bfloat16)


def _kernel_seconds(run: Callable[..., Any], *args: Any) -> Callable[[], float]:
  """Seconds that the kernels of a call take on the device."""
  from jax.experimental.mosaic.gpu import profiler

  call = profiler.measure(run)

  def seconds() -> float:
    _, milliseconds = call(*args)
    return milliseconds / 1e3

  return seconds


def _packed(fmt: kernels.Format, **how: Any) -> Callable[..., list[jax.Array]]:
  """Products of x with packed weights."""
  return jax.jit(
    lambda x, ws: [
      mosaic_gpu.few_rows(x, p['codes'], p['scale'], fmt, **how) for p in ws
    ]
  )


def _packed_ffn(fmt: kernels.Format) -> Callable[..., jax.Array]:
  """Feed-forward layers, one after the other."""

  @jax.jit
  def run(x, ws):
    for a, b in ws:
      h = mosaic_gpu.few_rows(x, a['codes'], a['scale'], fmt, gated=True)
      x = mosaic_gpu.few_rows(h, b['codes'], b['scale'], fmt)
    return x

  return run


@jax.jit
def _plain_ffn(x, gates, downs):
  for a, b in zip(gates, downs):
    gate, up = (jnp.dot(x, w.T) for w in jnp.split(a, 2))
    x = jnp.dot(jax.nn.gelu(gate) * up, b.T)
  return x


def _in_turn(
  packed: Callable[[], float],
  copies: int,
  plain: Callable[[], float],
  few: int,
  rounds: int,
) -> dict[str, list[float]]:
  """Seconds of a product, of calls that make several."""
  return _timing.rounds(
    {'packed': lambda: packed() / copies, 'bfloat16': lambda: plain() / few},
    rounds,
  )


def _copy_bandwidth(rounds: int) -> float:
  """Bytes read and written a second by a plain kernel."""
  x = jnp.ones((1 << 28,), jnp.uint32)
  seconds = _kernel_seconds(jax.jit(lambda x: x ^ jnp.uint32(1)), x)
  return 2 * x.nbytes / statistics.median(seconds() for _ in range(rounds))


def _bfloat16(weights: Sequence[Mapping[str, jax.Array]], fmt, cols):
  dense = jax.jit(lambda p: _dequantize.dense(p, fmt, cols, jnp.bfloat16))
  return [dense(p) for p in weights]


def _check(formats: Mapping[str, kernels.Format]) -> list[dict[str, Any]]:
  """Compares with float64, at an odd shape and at a large one."""
  found = []
  for name, fmt in formats.items():
    for rows, cols, n, gated in itertools.chain(
      ((328, 768, n, gated) for n in (1, 2, 8) for gated in (False, True)),
      [(1280, 5120, 1, False), (1280, 10240, 1, False), (8192, 3840, 1, True)],
      ((1280, 5120, n, gated) for n in (9, 300) for gated in (False, True)),
    ):
      p, x = _weights.packed(fmt, rows, cols, seed=n), _x(n, cols)
      if n > 32 and mosaic_gpu.why_not(x, p['codes'], p['scale'], fmt):
        continue
      run = jax.jit(
        lambda x, p, fmt=fmt, gated=gated: mosaic_gpu.matmul(
          x, p['codes'], p['scale'], fmt, gated=gated
        )
      )
      got = run(x, p)
      w = np.asarray(_dequantize.dense(p, fmt, cols, jnp.float32), np.float64)
      x64 = np.asarray(x, np.float64)
      want, size = x64 @ w.T, np.abs(x64) @ np.abs(w).T
      if gated:
        gate, up = np.split(want, 2, axis=1)
        z = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        want = 0.5 * gate * (1 + np.tanh(z)) * up
        size = np.split(size, 2, axis=1)[1] * np.abs(gate)
      error = np.linalg.norm(np.asarray(got, np.float64) - want)
      # Many rows round weights, and of gate and up the products, too.
      most = 2.0**-8 * np.linalg.norm(want) * (1 if n <= 8 else 2)
      most += _TOLERANCE * np.linalg.norm(size)
      ok = bool(error <= most)
      found.append(
        {
          'format': name,
          'rows': rows,
          'cols': cols,
          'n': n,
          'gated': gated,
          'error': float(error / np.linalg.norm(want)),
          'ok': ok,
        }
      )
      if not ok:
        _cli.note(f'WRONG: {found[-1]}')
  return found


def _tune(products: Sequence[_Product], args: Any) -> list[dict[str, Any]]:
  """Times the kernel's own choices against each other."""
  found = []
  for product in products:
    for name, fmt in _formats(args).items():
      copies = max(2, _SPREAD // fmt.nbytes((product.rows,), product.cols) + 1)
      weights = [
        _weights.packed(fmt, product.rows, product.cols, i)
        for i in range(copies)
      ]
      x = _x(1, product.cols)
      best = []
      for tiles, slices, split in itertools.product(
        (2, 4), (2, 3, 4), (1, 2, 4)
      ):
        if split > 1 and product.part != 'down':
          continue
        seconds = _kernel_seconds(
          _packed(fmt, tiles=tiles, slices=slices, split=split), x, weights
        )
        try:
          t = min(seconds() for _ in range(3)) / copies
        except Exception as e:  # A choice that does not fit the device.
          _cli.note(f'{tiles=} {slices=} {split=}: {e!s:.200}')
          continue
        rate = fmt.nbytes((product.rows,), product.cols) / t / 1e9
        best.append((t, tiles, slices, split))
        found.append(
          dataclasses.asdict(product)
          | {
            'format': name,
            'tiles': tiles,
            'slices': slices,
            'split': split,
            'seconds': t,
          }
        )
        _cli.note(
          f'{product.shape} {product.part} {name} {tiles=} {slices=} {split=}'
          f' {t * 1e6:.2f} us {rate:.0f} GB/s'
        )
      _cli.note(f'BEST {product} {name}: {sorted(best)[:3]}')
  return found


def _formats(args: Any) -> dict[str, kernels.Format]:
  return {k: _weights.FORMATS[k] for k in FORMATS if args.formats in k}


_COLUMNS = ('us', 'GB/s', 'of a copy', 'bfloat16, us', 'ratio')


def _columns(
  seconds: Mapping[str, Sequence[float]], nbytes: int, copy: float
) -> tuple[str, ...]:
  """`_COLUMNS` of a row of a table."""
  packed, plain = seconds['packed'], seconds['bfloat16']
  t = statistics.median(packed)
  return (
    f'{t * 1e6:.2f}',
    f'{nbytes / t / 1e9:.0f}',
    f'{nbytes / t / copy:.0%}',
    f'{statistics.median(plain) * 1e6:.2f}',
    _timing.spread([a / b for a, b in zip(plain, packed)]),
  )


def _time_products(
  products: Sequence[_Product], copy: float, args: Any
) -> list[dict[str, Any]]:
  """One row of x, packed and in bfloat16."""
  found, table = [], []
  for product in products:
    for name, fmt in _formats(args).items():
      cols = product.cols
      nbytes = fmt.nbytes((product.rows,), cols)
      copies = max(2, _SPREAD // nbytes + 1)
      weights = [
        _weights.packed(fmt, product.rows, cols, i) for i in range(copies)
      ]
      few = max(2, _SPREAD // (2 * product.rows * cols) + 1)
      dense = _bfloat16(weights[:few], fmt, cols)
      x = _x(1, cols)
      packed = _kernel_seconds(_packed(fmt), x, weights)
      whole = _integers.fits(fmt)
      few_rows = _kernel_seconds(_packed(fmt, integers=whole), x, weights)
      plain = _kernel_seconds(
        jax.jit(lambda x, ws: [jnp.dot(x, w.T) for w in ws]), x, dense
      )
      seconds = _timing.rounds(
        {
          'packed': lambda f=packed, n=copies: f() / n,
          'few rows': lambda f=few_rows, n=copies: f() / n,
          'bfloat16': lambda f=plain, n=few: f() / n,
        },
        args.rounds,
      )
      found.append(
        dataclasses.asdict(product)
        | {'format': name, 'bytes': nbytes, 'seconds': seconds}
      )
      table.append(
        (
          f'{product.shape} {product.part}',
          name,
          *_columns(seconds, nbytes, copy),
        )
      )
  _cli.print_table(
    'one row of x',
    ('weight', 'format', *_COLUMNS),
    table,
  )
  return found


def _time_ffn(args: Any, copy: float) -> list[dict[str, Any]]:
  """The whole feed-forward layer, one row of x."""
  found, table = [], []
  for shape in args.shapes:
    width, hidden = _weights.SHAPES[shape]['down']
    for name, fmt in _formats(args).items():
      nbytes = fmt.nbytes((2 * hidden,), width) + fmt.nbytes((width,), hidden)
      copies = max(2, _SPREAD // nbytes + 1)
      weights = [
        (
          _weights.packed(fmt, 2 * hidden, width, i),
          _weights.packed(fmt, width, hidden, i),
        )
        for i in range(copies)
      ]
      few = weights[: max(2, _SPREAD // (6 * width * hidden) + 1)]
      gates = _bfloat16([a for a, _ in few], fmt, width)
      downs = _bfloat16([b for _, b in few], fmt, hidden)
      x = _x(1, width)
      packed = _kernel_seconds(_packed_ffn(fmt), x, weights)
      dense = _kernel_seconds(_plain_ffn, x, gates, downs)
      seconds = _in_turn(packed, copies, dense, len(few), args.rounds)
      found.append(
        {'shape': shape, 'format': name, 'bytes': nbytes, 'seconds': seconds}
      )
      table.append((shape, name, *_columns(seconds, nbytes, copy)))
  _cli.print_table(
    'feed-forward layer, one row of x',
    ('shape', 'format', *_COLUMNS),
    table,
  )
  return found


def _time_prefill(
  products: Sequence[_Product], args: Any
) -> list[dict[str, Any]]:
  """Many rows of x: packed, unpacked by XLA, and in bfloat16."""
  found, table = [], []
  for product in products:
    for name, fmt in _formats(args).items():
      cols = product.cols
      p = _weights.packed(fmt, product.rows, cols)
      (dense,) = _bfloat16([p], fmt, cols)
      for rows in (512, 2048):
        x = _x(rows, cols)
        if mosaic_gpu.why_not(x, p['codes'], p['scale'], fmt):
          continue
        packed = lambda x, p, fmt=fmt: mosaic_gpu.matmul(
          x, p['codes'], p['scale'], fmt
        )
        xla = lambda x, p, fmt=fmt: kernels.matmul(x, p, fmt, backend='xla')
        plain = lambda x, w: jnp.dot(x, w.T)
        seconds = _timing.rounds(
          {
            'packed': _kernel_seconds(jax.jit(packed), x, p),
            'xla': _kernel_seconds(jax.jit(xla), x, p),
            'bfloat16': _kernel_seconds(jax.jit(plain), x, dense),
          },
          args.rounds,
        )
        found.append(
          dataclasses.asdict(product)
          | {'format': name, 'n': rows, 'seconds': seconds}
        )
        t = statistics.median(seconds['packed'])
        ratios = [
          _timing.spread([a / b for a, b in zip(seconds[k], seconds['packed'])])
          for k in ('xla', 'bfloat16')
        ]
        table.append(
          (
            f'{product.shape} {product.part}',
            name,
            str(rows),
            f'{t * 1e6:.1f}',
            f'{2 * product.rows * cols * rows / t / 1e12:.0f}',
            f'{statistics.median(seconds["xla"]) * 1e6:.1f}',
            f'{statistics.median(seconds["bfloat16"]) * 1e6:.1f}',
            *ratios,
          )
        )
  _cli.print_table(
    'many rows of x',
    (
      'weight',
      'format',
      'rows',
      'us',
      'TFLOP/s',
      'XLA, us',
      'bfloat16, us',
      'over XLA',
      'over bfloat16',
    ),
    table,
  )
  return found


def _run(args: Any) -> None:
  _cli.check_output(args.json)
  _weights.check_shapes(args.shapes, _SHAPES)
  if jax.default_backend() != 'gpu':
    raise errors.BackendError(
      f'JAX runs on {jax.default_backend()!r}; this benchmark needs a GPU.'
    )
  device = jax.devices()[0].device_kind
  found: dict[str, Any] = {'device': device, 'jax': jax.__version__}
  copy = _copy_bandwidth(args.rounds)
  found['copy_bytes_per_second'] = copy
  _cli.note(f'{device}: a copy moves {copy / 1e9:.0f} GB/s')
  products = list(_products(args.shapes))
  if 'check' in args.parts:
    found['check'] = _check(_formats(args))
    wrong = sum(not c['ok'] for c in found['check'])
    _cli.note(f'{len(found["check"])} checks, {wrong} wrong')
  if 'tune' in args.parts:
    found['tune'] = _tune(products, args)
  if 'products' in args.parts:
    found['products'] = _time_products(products, copy, args)
  if 'ffn' in args.parts:
    found['ffn'] = _time_ffn(args, copy)
  if 'prefill' in args.parts:
    found['prefill'] = _time_prefill(products, args)
  if args.json:
    _cli.write_json(args.json, found)


if __name__ == '__main__':
  sys.exit(main())
