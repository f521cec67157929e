# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed weights `{'codes', 'scale'}`: checks, initial values, the codes."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.kernels import _formats


def validate(
  p: Mapping[str, Any],
  fmt: _formats.Format,
  rows: tuple[int, ...],
  cols: int,
  *,
  part: bool = False,
) -> None:
  """Checks shapes and types of a packed weight, without looking at values.

  Args:
    p: `{'codes', 'scale'}` of arrays or `jax.ShapeDtypeStruct`s.
    fmt: The format that they should have.
    rows: Leading axes of the dense weight.
    cols: Its input axis.
    part: Whether its codes may be those of a weight that it is the `first` of.

  Raises:
    ParamsMismatchError: If a key, shape or type is not the expected one.
    GroupSizeError: If the format's group does not divide `cols`.
  """
  keys = sorted(p) if isinstance(p, Mapping) else type(p).__name__
  if keys != ['codes', 'scale']:
    raise errors.ParamsMismatchError(
      f"Got {keys}; expected a dict with 'codes' and 'scale' for {fmt}."
    )
  codes, scale = p['codes'], p['scale']
  want = fmt.scale_shape(rows, cols)
  typed = scale.dtype == fmt.scale_dtype or jnp.issubdtype(
    scale.dtype, jnp.floating
  )
  if tuple(scale.shape) != want or not typed:
    raise errors.ParamsMismatchError(
      f'scale is {scale.dtype}{list(scale.shape)}; expected'
      f' {fmt.scale_dtype}{list(want)} for {fmt} and a weight of'
      f' {(*rows, cols)}.'
    )
  if jnp.issubdtype(codes.dtype, jnp.floating):
    want, dtype = fmt.latent_shape(rows, cols), codes.dtype
  else:
    want, dtype = fmt.codes_shape(rows, cols), fmt.codes_dtype
  found = tuple(codes.shape)
  if part and len(found) == len(want):
    axes = min(_part_axes(fmt), len(want) - 1)
    found = tuple(map(min, found[:axes], want)) + found[axes:]
  if found != want or codes.dtype != dtype:
    raise errors.ParamsMismatchError(
      f'codes are {codes.dtype}{list(codes.shape)}; expected'
      f' {dtype}{list(want)} for {fmt} and a weight of {(*rows, cols)}.'
    )


def rows_of(p: Mapping[str, Any], fmt: _formats.Format) -> tuple[int, ...]:
  """Returns the leading axes of the dense weight."""
  planes = isinstance(fmt, _formats.TernaryFormat)
  return tuple(p['scale'].shape[int(planes) : -1])


def _part_axes(fmt: _formats.Format) -> int:
  """Leading axes along which the codes of a larger weight may be longer.

  Scales, which a part has of its own, tell how long they are meant to be; those
  of tied planes do not tell the number of planes.
  """
  if not isinstance(fmt, _formats.TernaryFormat):
    return 1
  return 0 if fmt.tied else 2


def first(
  p: Mapping[str, jax.Array],
  fmt: _formats.Format,
  *,
  planes: int | None = None,
  rows: int | None = None,
) -> tuple[dict[str, jax.Array], _formats.Format]:
  """Returns the weight that is made of the first planes or rows of another.

  The codes are those of the other weight, whole: no memory is copied, and every
  operation reads as many of them as the scales say.

  Args:
    p: Packed weight.
    fmt: Its format.
    planes: Ternary planes to take; all by default.
    rows: Rows to take of the first axis, all by default.

  Returns:
    The packed weight and its format.

  Raises:
    ShapeError: If there are not so many.
  """
  codes, scale = p['codes'], p['scale']
  if planes is not None:
    if not isinstance(fmt, _formats.TernaryFormat) or not (
      1 <= planes <= fmt.planes
    ):
      raise errors.ShapeError(f'{planes=} of {fmt}; expected 1 or more of it.')
    if fmt.tied:
      # Threefold scales have more digits than one byte holds.
      scale = fmt.unpack_scale(scale)
      fmt = dataclasses.replace(fmt, tied=False, scale='bf16')
      scale = fmt.pack_scale(scale)
    scale = scale[:planes]
    fmt = dataclasses.replace(fmt, planes=planes)
  if rows is not None:
    axis = int(isinstance(fmt, _formats.TernaryFormat))
    if not 1 <= rows <= scale.shape[axis]:
      raise errors.ShapeError(
        f'{rows=} of a weight of {scale.shape[axis]}; expected 1 or more of it.'
      )
    tied = isinstance(fmt, _formats.TernaryFormat) and fmt.tied
    if tied and rows < scale.shape[axis]:
      raise errors.ShapeError(f'{rows=} of tied planes, {fmt}.')
    scale = jax.lax.slice_in_dim(scale, 0, rows, axis=axis)
  return {'codes': codes, 'scale': scale}, fmt


def own(
  p: Mapping[str, jax.Array], fmt: _formats.Format
) -> dict[str, jax.Array]:
  """Returns a packed weight whose codes are no more than its own."""
  lead = fmt.codes_shape(rows_of(p, fmt), 1)[:-1]
  lead = lead[: _part_axes(fmt)]
  return {**p, 'codes': p['codes'][tuple(slice(n) for n in lead)]}


def random_codes(
  key: jax.Array, fmt: _formats.Format, rows: tuple[int, ...], cols: int
) -> jax.Array:
  """Draws valid packed codes, uniform over the format's range.

  Args:
    key: PRNG key.
    fmt: Packed format.
    rows: Leading axes of the dense weight.
    cols: Its input axis.

  Returns:
    Codes of shape `fmt.codes_shape(rows, cols)` and type `fmt.codes_dtype`.
  """
  lo, hi = fmt.code_range
  bits = jax.random.bits(key, fmt.latent_shape(rows, cols), jnp.uint8)
  if hi - lo == 255:
    return fmt.pack(jax.lax.bitcast_convert_type(bits, jnp.int8))
  if getattr(fmt, 'packing', '') == '3of4':
    # The remainders would be other patterns, and packing not uniform.
    return fmt.pack(fmt.round(bits / 127.5 - 1.0).astype(jnp.int8))
  draw = (bits % jnp.uint8(hi - lo + 1)).astype(jnp.int8)
  return fmt.pack(draw + jnp.int8(lo))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _round_ste(x: jax.Array, fmt: _formats.Format) -> jax.Array:
  return fmt.round(x)


@_round_ste.defjvp
def _round_ste_jvp(fmt, primals, tangents):
  (x,) = primals
  lo, hi = fmt.code_range
  # A latent that has left the range by more than half a step would never come
  # back into play by itself; past that its gradient only feeds the drift.
  inside = (x >= lo - 0.5) & (x <= hi + 0.5)
  return _round_ste(x, fmt), jnp.where(inside, tangents[0], 0)


def integer_codes(
  codes: jax.Array, fmt: _formats.Format, cols: int
) -> jax.Array:
  """Returns codes `[*, cols]`: unpacked, or latent ones rounded.

  Floating codes are latent: forward rounds and clips to the format's range,
  the gradient passes straight through within half a step of that range.

  Args:
    codes: Packed codes, or latent ones of `fmt.latent_shape`.
    fmt: Packed format.
    cols: Input axis of the dense weight.

  Returns:
    int8 codes, or whole numbers of the latent codes' type.
  """
  if jnp.issubdtype(codes.dtype, jnp.floating):
    return _round_ste(codes, fmt)
  return fmt.unpack(codes, cols)
