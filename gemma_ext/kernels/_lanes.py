# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Bit layouts: codes to bytes and back, along the last axis.

Fields (2-bit, 4-bit, trits) go in blocks of 32 bytes: field k of byte j holds
code `32 k + j` of its block, so that one shift of a 32-byte register yields 32
neighbouring codes, and every group that is a multiple of 32 starts on a lane.
A shorter last block of n codes has T = ceil(n / fields) bytes, and field k of
byte j holds its code `T k + j`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK = 32  # bytes: an AVX2 register, a quarter of a GPU cache line


def _pad(x: jax.Array, cols: int, value: int) -> jax.Array:
  pad = cols - x.shape[-1]
  if not pad:
    return x
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)], constant_values=value)


def _pack_blocks(
  x: jax.Array,  # uint8[..., I]
  fields: int,
  zero: int,
  join: Callable[[jax.Array], jax.Array],  # [..., fields, T] -> [..., T]
) -> jax.Array:
  """Packs whole blocks, then the shorter last one."""
  cols = x.shape[-1]
  whole = cols // (BLOCK * fields) * (BLOCK * fields)
  out = []
  if whole:
    blocks = x[..., :whole].reshape(*x.shape[:-1], -1, fields, BLOCK)
    out.append(join(blocks).reshape(*x.shape[:-1], -1))
  if whole < cols:
    size = -(-(cols - whole) // fields)
    tail = _pad(x[..., whole:], size * fields, zero)
    out.append(join(tail.reshape(*x.shape[:-1], fields, size)))
  return out[0] if len(out) == 1 else jnp.concatenate(out, axis=-1)


def _unpack_blocks(
  x: jax.Array,  # uint8[..., bytes]
  fields: int,
  cols: int,
  split: Callable[[jax.Array], jax.Array],  # [..., 1, T] -> [..., fields, T]
) -> jax.Array:
  """Inverse of `_pack_blocks`."""
  whole = cols // (BLOCK * fields) * BLOCK
  out = []
  if whole:
    blocks = x[..., :whole].reshape(*x.shape[:-1], -1, 1, BLOCK)
    out.append(split(blocks).reshape(*x.shape[:-1], -1))
  if whole * fields < cols:
    tail = split(x[..., None, whole:])
    tail = tail.reshape(*x.shape[:-1], -1)
    out.append(tail[..., : cols - whole * fields])
  return out[0] if len(out) == 1 else jnp.concatenate(out, axis=-1)


def pack_bits(codes: jax.Array, bits: int, offset: int) -> jax.Array:
  """Packs int8 codes + offset in `bits` (2 or 4) bits each."""
  fields = 8 // bits

  def join(x):
    out = x[..., 0, :]
    for k in range(1, fields):
      out = out | (x[..., k, :] << (bits * k))
    return out

  stored = (codes + jnp.int8(offset)).astype(jnp.uint8)
  return _pack_blocks(stored, fields, offset, join)


def unpack_bits(
  packed: jax.Array, bits: int, offset: int, cols: int
) -> jax.Array:
  """Inverse of `pack_bits`: int8[..., cols]."""
  fields = 8 // bits
  mask = jnp.uint8((1 << bits) - 1)

  def split(x):
    shifts = (bits * jnp.arange(fields, dtype=jnp.uint8))[:, None]
    return (x >> shifts) & mask

  out = _unpack_blocks(packed, fields, cols, split)
  return out.astype(jnp.int8) - jnp.int8(offset)


def pack_trits(codes: jax.Array) -> jax.Array:
  """Packs codes in {-1, 0, 1} five a byte, base 3, first field lowest."""

  def join(x):
    out = x[..., 4, :]
    for k in (3, 2, 1, 0):
      out = out * jnp.uint8(3) + x[..., k, :]
    return out

  return _pack_blocks((codes + jnp.int8(1)).astype(jnp.uint8), 5, 1, join)


def unpack_trits(packed: jax.Array, cols: int) -> jax.Array:
  """Inverse of `pack_trits`: int8[..., cols]."""

  def split(x):
    # Multiplication by a rounded-up reciprocal is exact division here (a byte
    # by 1, 3, 9, 27, 81) and, unlike integer division, vectorises.
    recip = jnp.array([-(-(1 << 14) // 3**k) for k in range(5)], jnp.uint32)
    q = (x.astype(jnp.uint32) * recip[:, None]) >> 14
    return (q - 3 * ((q * 171) >> 9)).astype(jnp.uint8)

  return _unpack_blocks(packed, 5, cols, split).astype(jnp.int8) - jnp.int8(1)


def pack_stream(codes: jax.Array, bits: int, offset: int) -> jax.Array:
  """Packs 8 codes in `bits` (3, 5, 6, 7) bytes, a little-endian bit stream."""
  cols = codes.shape[-1]
  x = (codes.astype(jnp.int16) + offset).astype(jnp.uint16)
  x = _pad(x, -(-cols // 8) * 8, offset)
  x = x.reshape(*codes.shape[:-1], -1, 8)
  out = []
  for byte in range(bits):
    acc = jnp.zeros(x.shape[:-1], jnp.uint16)
    for i in range(8):
      shift = bits * i - 8 * byte
      if -bits < shift < 8:
        v = x[..., i]
        acc = acc | (v << shift if shift >= 0 else v >> -shift)
    out.append((acc & 255).astype(jnp.uint8))
  return jnp.stack(out, axis=-1).reshape(*codes.shape[:-1], -1)


def unpack_stream(
  packed: jax.Array, bits: int, offset: int, cols: int
) -> jax.Array:
  """Inverse of `pack_stream`: int8[..., cols]."""
  x = packed.reshape(*packed.shape[:-1], -1, bits).astype(jnp.uint32)
  # Four codes at a time fit a 32-bit word, wherever in a byte they start.
  words = []
  for start in (0, 4 * bits):
    first, shift = divmod(start, 8)
    word = jnp.zeros(x.shape[:-1], jnp.uint32)
    for k, byte in enumerate(range(first, min(first + 4, bits))):
      word = word | (x[..., byte] << (8 * k))
    words.append(word >> shift)
  word = jnp.stack(words, axis=-1)[..., None]
  codes = (word >> (bits * jnp.arange(4, dtype=jnp.uint32))) & ((1 << bits) - 1)
  codes = codes.astype(jnp.int8) - jnp.int8(offset)
  return codes.reshape(*packed.shape[:-1], -1)[..., :cols]
