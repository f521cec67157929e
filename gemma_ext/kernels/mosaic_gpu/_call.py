# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Kernels as functions of arrays."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from gemma_ext.kernels import _formats
from gemma_ext.kernels import _params
from gemma_ext.kernels.mosaic_gpu import _few_rows
from gemma_ext.kernels.mosaic_gpu import _integers
from gemma_ext.kernels.mosaic_gpu import _many_call
from gemma_ext.kernels.mosaic_gpu import _many_rows
from gemma_ext.kernels.mosaic_gpu import _spec
from gemma_ext.kernels.mosaic_gpu import _whole_rows

# Offsets are numbers of 32 bits, with a sign where they are constants.
_MOST_BYTES = 1 << 31
# Thread blocks that fill a device.
_BLOCKS = 320
# Rows of x up to which reading the weight again costs less than wide tiles.
_FEW = 8
# Rows of x for which it does, where there is nothing else.
_MOST = 32


def why_not(
  x: jax.Array,
  codes: jax.Array,
  scale: jax.Array,
  fmt: _formats.Format,
) -> str:
  """Returns why the kernels cannot take a product; '' if they can.

  Args:
    x: Activations `[N, I]`.
    codes: Packed codes.
    scale: Scales.
    fmt: Their format.
  """
  if x.dtype != jnp.bfloat16:
    return f'x is {x.dtype}, and only bfloat16 is supported'
  if codes.dtype != fmt.codes_dtype or scale.dtype != fmt.scale_dtype:
    return f'codes are {codes.dtype}, scales {scale.dtype}: not as stored'
  if not _spec.most_rows(fmt):
    return f'{fmt} is not supported'
  if math.prod(_rows(scale, fmt)) < 2 * _spec.TILE:
    return f'a weight of {_rows(scale, fmt)} rows is too small'
  cols = x.shape[-1]
  if cols % 8 or (fmt.code_range == (-128, 127) and cols % _spec.BLOCK):
    return f'an input axis of {cols} weights is no multiple of 8'
  if math.prod(codes.shape) >= _MOST_BYTES:
    return f'codes of {math.prod(codes.shape)} bytes are too many'
  xs = math.prod(x.shape[:-1])
  if xs > _MOST and (reason := _many_rows.why_not(_many(xs, cols, scale, fmt))):
    return f'{reason}, of {xs} rows of x; up to {_MOST} it can'
  return ''


def matmul(
  x: jax.Array,
  codes: jax.Array,
  scale: jax.Array,
  fmt: _formats.Format,
  *,
  gated: bool = False,
) -> jax.Array:
  """Multiplies rows of x with a packed weight, in the way that suits them.

  Args:
    x: bfloat16 `[N, I]`.
    codes: Codes of a weight `[O, I]`, as stored.
    scale: Its scales, as stored.
    fmt: The format of both.
    gated: Whether the weight is gate and up `[2 H, I]`, and the result is
      `gelu(gate) * up`, `[N, H]`.

  Returns:
    bfloat16 `[N, O]`, accumulated in float32.
  """
  if x.shape[0] > _FEW:
    spec = _many(x.shape[0], x.shape[1], scale, fmt)
    if not _many_rows.why_not(spec):
      y = _many_call.many_rows(x, codes, scale, spec)
      if not gated:
        return y
      gate, up = jnp.split(y, 2, axis=-1)
      return jax.nn.gelu(gate) * up
  return few_rows(x, codes, scale, fmt, gated=gated)


def _many(
  xs: int, cols: int, scale: jax.Array, fmt: _formats.Format
) -> _many_rows.Spec:
  rows = math.prod(_rows(scale, fmt))
  return _many_rows.choose(rows, cols, xs, fmt, _processors())


def _processors() -> int:
  """Multiprocessors of the device; those of an H100 where there is none."""
  if jax.default_backend() != 'gpu':
    return 132
  return int(getattr(jax.devices()[0], 'core_count', 132))


def few_rows(
  x: jax.Array,
  codes: jax.Array,
  scale: jax.Array,
  fmt: _formats.Format,
  *,
  gated: bool = False,
  tiles: int | None = None,
  slices: int | None = None,
  split: int | None = None,
  integers: bool | None = None,
) -> jax.Array:
  """Multiplies a few rows of x with a packed weight.

  Args:
    x: bfloat16 `[N, I]`; N is best at most 8.
    codes: Codes of a weight `[O, I]`, as stored.
    scale: Its scales, as stored.
    fmt: The format of both.
    gated: Whether the weight is gate and up `[2 H, I]`, and the result is
      `gelu(gate) * up`, `[N, H]`.
    tiles: Tiles of 16 rows of the weight a thread block; `None` chooses.
    slices: Slices in shared memory; `None` chooses.
    split: Thread blocks that share the columns of a tile: 1, 2, 4 or 8; `None`
      chooses.
    integers: Whether x is rounded to 16 bits, in blocks of at most 128 that
      share a scale; `None` does so where it is faster.

  Returns:
    bfloat16 `[N, O]`, accumulated in float32.
  """
  rows = math.prod(_rows(scale, fmt))
  if integers is tiles is slices is split is None:
    whole = _whole_rows.choose(
      rows, x.shape[1], x.shape[0], fmt, gated, _processors()
    )
    if whole is not None:
      return _compiled_whole(whole)(x, codes, scale)
  if integers is None:
    integers = _integers.fits(fmt) and x.shape[0] <= _integers.MOST_ROWS
  most = _integers.MOST_ROWS if integers else _spec.most_rows(fmt)
  out = []
  for start in range(0, x.shape[0], most):
    part = x[start : start + most]
    spec = _choose(
      _spec.Spec(
        rows=rows,
        cols=x.shape[1],
        xs=part.shape[0],
        fmt=fmt,
        gated=gated,
        integers=integers,
      ),
      tiles=tiles,
      slices=slices,
      split=split,
    )
    out.append(_compiled(spec)(part, codes, scale))
  return out[0] if len(out) == 1 else jnp.concatenate(out)


def _choose(spec: _spec.Spec, **given: int | None) -> _spec.Spec:
  """Fills in what was not given, as measured on Hopper.

  Tiles share x, which has to be read, and rounded, by each thread block. What
  is lost to tiles that do not fill the device, splitting columns wins back.
  """

  def with_(**chosen: Any) -> _spec.Spec:
    chosen |= {k: v for k, v in given.items() if v is not None}
    return dataclasses.replace(spec, **chosen)

  chosen = {'tiles': 4, 'warps': 4, 'unroll': 1, 'slices': 2, 'split': 1}
  if with_(**chosen).grid < _BLOCKS:
    chosen['tiles'] = 2
  found = with_(**chosen)
  while found.split < 4 and found.grid * found.split < _BLOCKS:
    if found.steps < 3:
      break
    chosen['split'] *= 2
    found = with_(**chosen)
  return found


def _rows(scale: jax.Array, fmt: _formats.Format) -> tuple[int, ...]:
  return _params.rows_of({'scale': scale}, fmt)


@functools.lru_cache(maxsize=256)
def _compiled_whole(spec: _whole_rows.Spec):
  from gemma_ext.kernels.mosaic_gpu import _ptx

  ref = plgpu.RefType()

  def body(*refs):
    @plgpu.inline_mgpu(arg_types=(ref,) * len(refs))
    def emit(ctx, x, codes, scale, out, *shared):
      del ctx
      _whole_rows.run(_ptx.Ptx(*shared), spec, x, codes, scale, out)

    emit(*refs)

  words = lambda count: plgpu.SMEM((-(-count // 16) * 4,), jnp.int32)
  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((spec.xs, spec.out_rows), jnp.bfloat16),
    scratch_types=[
      plgpu.SMEM((spec.shared,), jnp.float32),
      words(spec.staged),
      words(spec.ring),
      words(spec.rounded),
      plgpu.SMEM((spec.rounded_scales,), jnp.float32),
    ],
    grid=(spec.grid,),
    grid_names=('block',),
    num_threads=spec.warps // 4,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
  )


@functools.lru_cache(maxsize=256)
def _compiled(spec: _spec.Spec):
  # Here, not above: what is beneath is there on no machine without a GPU.
  from gemma_ext.kernels.mosaic_gpu import _ptx

  ref = plgpu.RefType()

  def body(*refs):
    @plgpu.inline_mgpu(arg_types=(ref,) * len(refs))
    def emit(ctx, x, codes, scale, out, *shared):
      del ctx
      ops = _ptx.Ptx(*shared, split=spec.split)
      _few_rows.run(ops, spec, x, codes, scale, out)

    emit(*refs)

  cluster: dict[str, Any] = {}
  if spec.split > 1:
    cluster = {'cluster': (spec.split,), 'cluster_names': ('part',)}
  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((spec.xs, spec.out_rows), jnp.bfloat16),
    scratch_types=[
      plgpu.SMEM((spec.shared,), jnp.float32),
      plgpu.SMEM((-(-spec.staged // 16) * 4,), jnp.int32),
      plgpu.SMEM((spec.ring // 4,), jnp.int32),
      plgpu.SMEM((spec.rounded // 4 if spec.integers else 1,), jnp.int32),
      plgpu.SMEM((spec.rounded_scales if spec.integers else 1,), jnp.float32),
    ],
    grid=(spec.grid,),
    grid_names=('block',),
    **cluster,
    num_threads=spec.warps // 4,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
  )
