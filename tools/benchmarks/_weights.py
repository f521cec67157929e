# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights to time kernels with: shapes of Gemma 3, formats, random contents."""

from collections.abc import Collection, Sequence

import jax

from gemma_ext import errors
from gemma_ext import kernels

# Width of the residual stream and of the hidden layer.
_FFN = {
  '270m': (640, 2048),
  '1b': (1152, 6912),
  '4b': (2560, 10240),
  '12b': (3840, 15360),
  '27b': (5376, 21504),
}
# Rows and columns of the gate and up projection together, and of the down one.
SHAPES = {
  name: {'gate and up': (2 * hidden, width), 'down': (width, hidden)}
  for name, (width, hidden) in _FFN.items()
} | {'head': {'head': (262144, 640)}}
FORMATS = {
  'ternary 2bit, group 128': kernels.TernaryFormat(group=128),
  'ternary 5trit, group 128': kernels.TernaryFormat(group=128, packing='5trit'),
  'ternary 3of4, group 128': kernels.TernaryFormat(group=128, packing='3of4'),
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
_codes = jax.jit(kernels.random_codes, static_argnums=(1, 2, 3))


def check_shapes(names: Sequence[str], known: Collection[str] = SHAPES) -> None:
  """Raises `ConfigError` if one of `--shapes` is not known."""
  for name in names:
    if name not in known:
      raise errors.ConfigError(f'--shapes: {name!r} is none of {[*known]}.')


def packed(
  fmt: kernels.Format, rows: int | tuple[int, ...], cols: int, seed: int = 0
) -> dict[str, jax.Array]:
  """A packed weight `[*rows, cols]` of random codes and small scales."""
  rows = (rows,) if isinstance(rows, int) else rows
  key, other = jax.random.split(jax.random.key(seed))
  scale = jax.random.uniform(
    other, fmt.scale_shape(rows, cols), minval=0.01, maxval=0.03
  )
  return {
    'codes': _codes(key, fmt, rows, cols),
    'scale': fmt.pack_scale(scale),
  }
