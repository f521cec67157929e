# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed weight formats: their shapes, sizes, and pack / unpack.

A weight is `[*rows, I]`, the input axis last. `docs/formats.md` draws each bit
layout. Nothing here looks at values: whatever was packed is what unpacks.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import errors
from gemma_ext.kernels import _lanes
from gemma_ext.kernels import _scales

PACKINGS = ('2bit', '5trit', '3of4')


def choose_group(cols: int, group: int) -> int:
  """Picks the group size for an input axis of `cols` weights.

  Divisors of `cols` up to `group` are tried, those that are multiples of 32
  first, then of 16, then of 8, then any; the largest of the first kind that
  reaches 16 wins, or 8 if `group` is below 16. Multiples of 32 keep groups
  aligned with the packed lanes.

  Args:
    cols: Length of the input axis.
    group: Largest group wanted.

  Returns:
    A divisor of `cols`, at most `group`.

  Raises:
    GroupSizeError: If the best divisor is below that.
  """
  if cols < 1 or group < 1:
    raise errors.GroupSizeError(
      f'Got {cols=} and {group=}; expected both to be at least 1.'
    )
  divisors = [d for d in range(1, min(cols, group) + 1) if cols % d == 0]
  least = min(16 if group >= 16 else 8, cols)
  for multiple in (32, 16, 8, 1):
    fits = [d for d in divisors if d % multiple == 0 and d >= least]
    if fits:
      return fits[-1]
  above = [d for d in range(least, cols + 1) if cols % d == 0]
  raise errors.GroupSizeError(
    f'No group of {least} to {group} weights divides an input axis of'
    f' {cols}; the best is {divisors[-1]}. Groups that would fit:'
    f' {above[:8]}. Ask for one of these, or keep this weight dense.'
  )


def _check_group(cols: int, group: int) -> None:
  if cols < 1 or cols % group:
    fits = [d for d in range(1, max(cols, 0) + 1) if cols % d == 0]
    raise errors.GroupSizeError(
      f'group={group} does not divide the input axis of {cols} weights.'
      f' Groups that do: {fits[-8:]} (see `kernels.choose_group`).'
    )


def _check_cols(packed: jax.Array, want: int, cols: int) -> None:
  if packed.shape[-1] != want:
    raise errors.ParamsMismatchError(
      f'Packed codes have {packed.shape[-1]} entries a row; {cols} weights'
      f' take {want}.'
    )


def _check_fours(cols: int) -> None:
  if cols % 4:
    raise errors.GroupSizeError(
      f"packing='3of4' takes rows of whole fours, not {cols} weights."
    )


def _check_int8(codes: jax.Array) -> None:
  if codes.dtype != jnp.int8:
    raise errors.ShapeError(f'Codes are {codes.dtype}; expected int8.')


def _check_positive(name: str, value: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise errors.GroupSizeError(f'{name}={value!r}; expected an int >= 1.')


def _check_scale(scale: str, known: tuple[str, ...] = _scales.SCALES) -> None:
  if scale not in known:
    raise errors.RecipeError(f'{scale=}; expected one of {known}.')


class _Sizes:
  """Sizes that follow from the shapes, and scales."""

  scale: str

  def nbytes(self, rows: tuple[int, ...], cols: int) -> int:
    """Returns the bytes of codes and scales together."""
    codes = math.prod(self.codes_shape(rows, cols))
    scales = math.prod(self.scale_shape(rows, cols))
    return codes + self.scale_dtype.itemsize * scales

  def bits_per_weight(self, cols: int) -> float:
    """Returns bits per weight, scales and padding included."""
    return 8 * self.nbytes((), cols) / cols

  @property
  def scale_dtype(self) -> np.dtype:
    """Type of the stored scales."""
    return _scales.dtype(self.scale)

  def pack_scale(self, scale: jax.Array) -> jax.Array:
    """Rounds scales to how they are stored."""
    if self.scale != 'bf16':
      return _scales.encode(scale, self.scale)
    return _scales.round_scale(scale, 'bf16').astype(jnp.bfloat16)

  def open_scale(self, scale: jax.Array) -> jax.Array:
    """Returns stored scales in float32, of the same shape, for an optimiser."""
    if _scales.is_byte(scale):
      return _scales.decode(scale)
    return scale.astype(jnp.float32)

  def unpack_scale(self, scale: jax.Array) -> jax.Array:
    """Stored or moving scales as what codes multiply, float32.

    Those that move are rounded to what can be stored in one byte, with a
    gradient that passes straight through.
    """
    if self.scale != 'bf16' and not _scales.is_byte(scale):
      scale = _scales.round_through(scale, self.scale)
    return self.open_scale(scale)

  def round(self, codes: jax.Array) -> jax.Array:
    """Returns the whole numbers nearest to latent codes that can be packed."""
    return jnp.clip(jnp.round(codes), *self.code_range)

  @property
  def code_range(self) -> tuple[int, int]:
    """Smallest and largest code."""
    raise TypeError(f'{type(self).__name__} is not a format')

  def codes_shape(self, rows: tuple[int, ...], cols: int) -> tuple[int, ...]:
    """Returns the shape of the packed codes."""
    raise TypeError(f'{type(self).__name__} is not a format')

  def scale_shape(self, rows: tuple[int, ...], cols: int) -> tuple[int, ...]:
    """Returns the shape of the scales."""
    raise TypeError(f'{type(self).__name__} is not a format')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TernaryFormat(_Sizes):
  """Codes in {-1, 0, 1}, a sum of planes, one scale per group.

  Attributes:
    planes: Ternary tensors that are summed, each with scales of its own.
    group: Weights along the input axis that share one scale.
    packing: '2bit' (4 codes a byte), '5trit' (5 codes a byte, 1.6 bits) or
      '3of4' (32 codes in 5 bytes, 1.25 bits), of codes with exactly one 0 in
      every four neighbours.
    scale: How scales are stored: 'bf16' or 'ue5m3', in one byte.
    tied: Whether planes share their scales: each has a third of the one
      before, so that their sums are evenly spaced, and the last one's scale is
      stored.
  """

  planes: int = 1
  group: int = 128
  packing: str = '2bit'
  scale: str = 'bf16'
  tied: bool = False

  def __post_init__(self):
    _check_positive('group', self.group)
    if isinstance(self.planes, bool) or not isinstance(self.planes, int):
      raise errors.RecipeError(f'planes={self.planes!r}; expected an int.')
    if not 1 <= self.planes <= 8:
      raise errors.RecipeError(f'planes={self.planes}; expected 1 to 8.')
    if self.packing not in PACKINGS:
      raise errors.RecipeError(
        f'packing={self.packing!r}; expected one of {PACKINGS}.'
      )
    _check_scale(self.scale, ('bf16', 'ue5m3'))  # Signs make no difference.
    if not isinstance(self.tied, bool):
      raise errors.RecipeError(f'tied={self.tied!r}; expected a bool.')
    if self.tied and self.packing == '3of4':
      raise errors.RecipeError("packing='3of4' has no tied planes.")

  @property
  def codes_dtype(self) -> np.dtype:
    return np.dtype(np.uint8)

  @property
  def scale_planes(self) -> int:
    """Planes with scales of their own."""
    return 1 if self.tied else self.planes

  @property
  def code_range(self) -> tuple[int, int]:
    """Smallest and largest code."""
    return -1, 1

  def codes_shape(self, rows: tuple[int, ...], cols: int) -> tuple[int, ...]:
    """Returns `(planes, *rows, bytes)`."""
    if self.packing == '3of4':
      return (self.planes, *rows, -(-cols // 32) * 5)
    per = 4 if self.packing == '2bit' else 5
    return (self.planes, *rows, _lanes.blocked(cols, per))

  def latent_shape(self, rows: tuple[int, ...], cols: int) -> tuple[int, ...]:
    """Returns `(planes, *rows, cols)`, the shape of unpacked codes."""
    return (self.planes, *rows, cols)

  def scale_shape(self, rows: tuple[int, ...], cols: int) -> tuple[int, ...]:
    """Returns `(scale_planes, *rows, cols / group)`.

    Raises:
      GroupSizeError: If `group` does not divide `cols`.
    """
    _check_group(cols, self.group)
    if self.packing == '3of4':
      _check_fours(cols)
    return (self.scale_planes, *rows, cols // self.group)

  def pack_scale(self, scale: jax.Array) -> jax.Array:
    """Rounds scales `[planes or 1, *rows, groups]` to how they are stored.

    Of tied planes the last one's are taken, whatever the others say.
    """
    return super().pack_scale(scale[-1:] if self.tied else scale)

  def unpack_scale(self, scale: jax.Array) -> jax.Array:
    """Returns the scales of every plane, float32 `[planes, *rows, groups]`.

    Args:
      scale: Stored scales; or those of `open_scale`, which are rounded to what
        can be stored in one byte, with a gradient that passes straight through.
    """
    scale = super().unpack_scale(scale)
    if not self.tied or self.planes == 1:
      return scale
    return jnp.concatenate(
      [scale * 3.0**p for p in reversed(range(self.planes))]
    )

  def round(self, codes: jax.Array) -> jax.Array:
    """Returns the whole numbers nearest to latent codes that can be packed."""
    if self.packing != '3of4':
      return super().round(codes)
    _check_fours(codes.shape[-1])
    four = codes.reshape(*codes.shape[:-1], -1, 4)
    # The nearest has its 0 where the smallest is.
    zero = jnp.argmin(jnp.abs(four), axis=-1, keepdims=True)
    sign = jnp.where(four < 0, -1, 1).astype(codes.dtype)
    return jnp.where(jnp.arange(4) == zero, 0, sign).reshape(codes.shape)

  def pack(self, codes: jax.Array) -> jax.Array:
    """Packs int8 codes `[planes, *rows, I]` in {-1, 0, 1} into uint8.

    As '3of4', fours without exactly one 0 become others, see
    `_lanes.pack_quads`: those of groups of zeros, whose scale is 0.

    Raises:
      GroupSizeError: If '3of4' does not divide I.
    """
    _check_int8(codes)
    if self.packing == '3of4':
      _check_fours(codes.shape[-1])
      return _lanes.pack_quads(codes)
    if self.packing == '2bit':
      return _lanes.pack_bits(codes, 2, 1)
    return _lanes.pack_trits(codes)

  def unpack(self, packed: jax.Array, cols: int) -> jax.Array:
    """Unpacks into int8 codes `[planes, *rows, cols]`."""
    _check_cols(packed, self.codes_shape((), cols)[-1], cols)
    if self.packing == '3of4':
      _check_fours(cols)
      return _lanes.unpack_quads(packed, cols)
    if self.packing == '2bit':
      return _lanes.unpack_bits(packed, 2, 1, cols)
    return _lanes.unpack_trits(packed, cols)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntFormat(_Sizes):
  """Two's complement integers of `bits` bits, one scale per group.

  Attributes:
    bits: 2 to 8. Codes take the full range [-2^(bits-1), 2^(bits-1) - 1].
    group: Weights that share one scale; `None` for one scale per row.
    scale: How scales are stored: 'bf16'; or in one byte, 'ue5m3' without and
      'e4m3' with a sign.
  """

  bits: int = 8
  group: int | None = None
  scale: str = 'bf16'

  def __post_init__(self):
    if isinstance(self.bits, bool) or not isinstance(self.bits, int):
      raise errors.RecipeError(f'bits={self.bits!r}; expected an int.')
    if not 2 <= self.bits <= 8:
      raise errors.RecipeError(f'bits={self.bits}; expected 2 to 8.')
    _check_scale(self.scale)
    if self.group is not None:
      _check_positive('group', self.group)

  @property
  def codes_dtype(self) -> np.dtype:
    return np.dtype(np.int8 if self.bits == 8 else np.uint8)

  @property
  def code_range(self) -> tuple[int, int]:
    """Smallest and largest code."""
    return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

  def codes_shape(self, rows: tuple[int, ...], cols: int) -> tuple[int, ...]:
    """Returns `(*rows, bytes)`."""
    if self.bits == 8:
      return (*rows, cols)
    if self.bits in (2, 4):
      return (*rows, _lanes.blocked(cols, 8 // self.bits))
    return (*rows, -(-cols // 8) * self.bits)

  def latent_shape(self, rows: tuple[int, ...], cols: int) -> tuple[int, ...]:
    """Returns `(*rows, cols)`, the shape of unpacked codes."""
    return (*rows, cols)

  def scale_shape(self, rows: tuple[int, ...], cols: int) -> tuple[int, ...]:
    """Returns `(*rows, cols / group)`, or `(*rows, 1)` without groups.

    Raises:
      GroupSizeError: If `group` does not divide `cols`.
    """
    if self.group is None:
      return (*rows, 1)
    _check_group(cols, self.group)
    return (*rows, cols // self.group)

  def pack(self, codes: jax.Array) -> jax.Array:
    """Packs int8 codes `[*rows, I]` within `code_range`."""
    _check_int8(codes)
    if self.bits == 8:
      return codes
    offset = 1 << (self.bits - 1)
    if self.bits in (2, 4):
      return _lanes.pack_bits(codes, self.bits, offset)
    return _lanes.pack_stream(codes, self.bits, offset)

  def unpack(self, packed: jax.Array, cols: int) -> jax.Array:
    """Unpacks into int8 codes `[*rows, cols]`."""
    _check_cols(packed, self.codes_shape((), cols)[-1], cols)
    if self.bits == 8:
      return packed
    offset = 1 << (self.bits - 1)
    if self.bits in (2, 4):
      return _lanes.unpack_bits(packed, self.bits, offset, cols)
    return _lanes.unpack_stream(packed, self.bits, offset, cols)


Format = TernaryFormat | IntFormat
