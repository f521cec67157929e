# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed matmul on TPUs: codes stay packed until they are in VMEM.

A byte holds several codes, whose columns are 32 apart. Nothing is moved between
lanes for that: field k of all bytes of a block is one matrix, and x is laid out
beforehand so that the columns of field k are side by side. A product is then a
sum over fields of dense products on the matrix unit. Scales are spread over the
columns of their group by a product with a matrix of zeros and ones.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from gemma_ext.kernels import _formats
from gemma_ext.kernels import _lanes
from gemma_ext.kernels import _params

# Rows of x and of the weight, and bytes of a row of codes, in one step.
_XS = 256
_ROWS = 256
_BYTES = 512
# Columns of what one register holds.
_LANES = 128
_FEWEST_XS = 16
# Numbers of a spread matrix that fit beside everything else: 4 MiB of float32.
_MOST_SPREAD = 1 << 20


def why_not(
  x: jax.Array, codes: jax.Array, scale: jax.Array, fmt: _formats.Format
) -> str:
  """Returns why the kernel cannot take a product; '' if it can.

  Args:
    x: Activations `[..., I]`.
    codes: Packed codes.
    scale: Scales.
    fmt: Their format.
  """
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'x is {x.dtype}, and only bfloat16 and float32 are supported'
  if codes.dtype != fmt.codes_dtype or scale.dtype != fmt.scale_dtype:
    return f'codes are {codes.dtype}, scales {scale.dtype}: not as stored'
  if not _fields(fmt):
    return f'{fmt} is a stream of bits, which has no fields'
  width = _block(codes.shape[-1])
  if scale.shape[-1] * width > _MOST_SPREAD:
    return f'{scale.shape[-1]} groups in rows of {codes.shape[-1]} bytes'
  return ''


def matmul(
  x: jax.Array,
  codes: jax.Array,
  scale: jax.Array,
  fmt: _formats.Format,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Multiplies x with a packed weight.

  Args:
    x: bfloat16 or float32 `[N, I]`.
    codes: Codes of a weight `[*rows, I]`, as stored.
    scale: Its scales, as stored.
    fmt: The format of both.
    interpret: Whether to run without a TPU, slowly.

  Returns:
    `[N, O]` in the type of x, accumulated in float32; weights are rounded to
    the type of x.
  """
  fields = _fields(fmt)
  rows = math.prod(_params.rows_of({'scale': scale}, fmt))
  planes = getattr(fmt, 'planes', 1)
  nbytes = codes.shape[-1]
  codes = codes.reshape(planes, rows, nbytes)
  if codes.dtype == jnp.uint8:
    codes = jax.lax.bitcast_convert_type(codes, jnp.int8)
  opened = fmt.unpack_scale(scale).reshape(planes, rows, -1)
  n, cols = x.shape
  x = _by_field(x, fields, nbytes)
  width = _block(nbytes)
  xs = min(_XS, -(-n // _FEWEST_XS) * _FEWEST_XS)
  x = _pad(x, 1, xs)
  count = min(_ROWS, -(-rows // _LANES) * _LANES)
  codes, opened = _pad(codes, 1, count), _pad(opened, 1, count)
  spread = jnp.asarray(_spread(fmt, cols, nbytes))
  groups = opened.shape[-1]
  out = pl.pallas_call(
    functools.partial(_kernel, fields=_decoders(fmt), dtype=x.dtype),
    grid=(x.shape[1] // xs, codes.shape[1] // count, nbytes // width),
    in_specs=[
      pl.BlockSpec((fields, xs, width), lambda i, j, k: (0, i, k)),
      pl.BlockSpec((planes, count, width), lambda i, j, k: (0, j, k)),
      pl.BlockSpec((planes, count, groups), lambda i, j, k: (0, j, 0)),
      pl.BlockSpec((fields, groups, width), lambda i, j, k: (0, 0, k)),
    ],
    out_specs=pl.BlockSpec((xs, count), lambda i, j, k: (i, j)),
    out_shape=jax.ShapeDtypeStruct((x.shape[1], codes.shape[1]), jnp.float32),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    interpret=interpret,
  )(x, codes, opened, spread)
  return out[:n, :rows].astype(x.dtype)


def _kernel(x, codes, scale, spread, out, *, fields, dtype):
  """Adds the product of one block of bytes to `out`."""

  @pl.when(pl.program_id(2) == 0)
  def _():
    out[...] = jnp.zeros_like(out)

  packed = codes[...].astype(jnp.int32) & 255
  total = jnp.zeros(out.shape, jnp.float32)
  for k, decode in enumerate(fields):
    w = jnp.zeros(packed.shape[1:], jnp.float32)
    for plane in range(packed.shape[0]):
      # Exact: every column takes one scale.
      own = jax.lax.dot(
        scale[plane],
        spread[k],
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
      )
      w += decode(packed[plane]).astype(jnp.float32) * own
    total += jax.lax.dot_general(
      x[k],
      w.astype(dtype),
      (((1,), (1,)), ((), ())),
      precision=(jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None),
      preferred_element_type=jnp.float32,
    )
  out[...] += total


def _fields(fmt: _formats.Format) -> int:
  """Codes of a byte; 0 of a format that has none."""
  if isinstance(fmt, _formats.TernaryFormat):
    return {'2bit': 4, '5trit': 5}.get(fmt.packing, 0)
  return {8: 1, 4: 2, 2: 4}.get(fmt.bits, 0)


def _decoders(
  fmt: _formats.Format,
) -> tuple[Callable[[jax.Array], jax.Array], ...]:
  """For every field, bytes in int32 to codes."""
  fields = _fields(fmt)
  if isinstance(fmt, _formats.TernaryFormat) and fmt.packing == '5trit':
    trit = lambda power, x: ((((x * power) & 255) * 3) >> 8) - 1
    return tuple(functools.partial(trit, 3**k) for k in range(fields))
  if fields == 1:
    return (lambda x: x - 2 * (x & 128),)
  bits = 8 // fields
  offset = -fmt.code_range[0]

  def bit(shift: int, x: jax.Array) -> jax.Array:
    return ((x >> shift) & ((1 << bits) - 1)) - offset

  return tuple(functools.partial(bit, bits * k) for k in range(fields))


def _by_field(x: jax.Array, fields: int, nbytes: int) -> jax.Array:
  """Columns `[N, I]`, those of each field side by side: `[fields, N, B]`."""
  x = jnp.pad(x, ((0, 0), (0, fields * nbytes - x.shape[1])))
  if fields == 1:
    return x[None]
  x = x.reshape(x.shape[0], -1, fields, _lanes.BLOCK)
  return jnp.moveaxis(x, 2, 0).reshape(fields, x.shape[0], nbytes)


@functools.lru_cache(maxsize=64)
def _spread(fmt: _formats.Format, cols: int, nbytes: int) -> np.ndarray:
  """By field, `[groups, bytes]`: 1 where the column of a byte is of a group."""
  fields = _fields(fmt)
  group = fmt.group or cols
  size = _lanes.BLOCK if fields > 1 else nbytes
  column = np.arange(fields * nbytes).reshape(-1, fields, size)
  column = np.moveaxis(column, 1, 0).reshape(fields, 1, nbytes)
  groups = np.arange(cols // group)[:, None]
  return (column // group == groups).astype(np.float32)


def _block(nbytes: int) -> int:
  """Bytes of a row in one step: a divisor in whole lanes, or all of them."""
  for width in range(_BYTES, 0, -_LANES):
    if nbytes % width == 0:
      return width
  return nbytes


def _pad(x: Any, axis: int, multiple: int) -> jax.Array:
  """Adds zeros after the end along an axis."""
  more = -x.shape[axis] % multiple
  if not more:
    return x
  return jnp.pad(x, [(0, more * (i == axis)) for i in range(x.ndim)])
