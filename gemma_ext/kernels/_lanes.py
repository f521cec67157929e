# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Bit layouts: codes to bytes and back, along the last axis.

Fields (2-bit, 4-bit, trits) go in blocks of 32 bytes: field k of byte j holds
code `32 k + j` of its block, so that one shift of a 32-byte register yields 32
neighbouring codes, and every group that is a multiple of 32 starts on a lane.
The last block of a row is filled up with code 0, so that rows start on lanes.
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


def blocked(cols: int, fields: int) -> int:
  """Bytes of a row of `cols` codes, `fields` a byte, in whole blocks."""
  return -(-cols // (BLOCK * fields)) * BLOCK


def _pack_blocks(
  x: jax.Array,  # uint8[..., I]
  fields: int,
  zero: int,
  join: Callable[[jax.Array], jax.Array],  # [..., fields, 32] -> [..., 32]
) -> jax.Array:
  x = _pad(x, blocked(x.shape[-1], fields) * fields, zero)
  blocks = x.reshape(*x.shape[:-1], -1, fields, BLOCK)
  return join(blocks).reshape(*x.shape[:-1], -1)


def _unpack_blocks(
  x: jax.Array,  # uint8[..., bytes]
  cols: int,
  split: Callable[[jax.Array], jax.Array],  # [..., 1, 32] -> [..., fields, 32]
) -> jax.Array:
  """Inverse of `_pack_blocks`."""
  blocks = split(x.reshape(*x.shape[:-1], -1, 1, BLOCK))
  return blocks.reshape(*x.shape[:-1], -1)[..., :cols]


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

  out = _unpack_blocks(packed, cols, split)
  return out.astype(jnp.int8) - jnp.int8(offset)


def pack_trits(codes: jax.Array) -> jax.Array:
  """Packs codes in {-1, 0, 1} five a byte, as a fraction of 256 in base 3.

  The number of five digits, the first field's highest, is scaled from 243 to
  256 and rounded up. Three times the byte is then the next digit in units of
  256, and the rest: no division to decode. As TQ1_0 of llama.cpp.
  """

  def join(x):
    out = x[..., 0, :].astype(jnp.uint16)
    for k in range(1, 5):
      out = out * 3 + x[..., k, :]
    return ((out * 256 + 242) // 243).astype(jnp.uint8)

  return _pack_blocks((codes + jnp.int8(1)).astype(jnp.uint8), 5, 1, join)


def unpack_trits(packed: jax.Array, cols: int) -> jax.Array:
  """Inverse of `pack_trits`: int8[..., cols]."""

  def split(x):
    power = jnp.array([1, 3, 9, 27, 81], jnp.uint8)[:, None]
    rest = x * power  # Modulo 256.
    return ((rest.astype(jnp.uint16) * 3) >> 8).astype(jnp.uint8)

  return _unpack_blocks(packed, cols, split).astype(jnp.int8) - jnp.int8(1)


def pack_quads(codes: jax.Array) -> jax.Array:
  """Packs codes in {-1, 0, 1}, one 0 in every four, in 5 bits a four.

  Two bits say where the 0 is, three are the signs of the others, in order. Of
  other fours the first 0 counts, or the first code, and what is left is 1 or
  -1. After Sherry, arXiv 2601.07892.
  """
  four = codes.reshape(*codes.shape[:-1], -1, 4)
  zero = jnp.argmax(four == 0, axis=-1).astype(jnp.uint8)
  quad, seen = zero, jnp.zeros_like(zero)
  for i in range(4):
    other = (zero != i).astype(jnp.uint8)
    sign = (four[..., i] >= 0).astype(jnp.uint8)
    quad = quad + ((sign * other) << (seen + 2))
    seen = seen + other
  return pack_stream(quad.astype(jnp.int8), 5, 0)


def unpack_quads(packed: jax.Array, cols: int) -> jax.Array:
  """Inverse of `pack_quads`: int8[..., cols]."""
  quad = unpack_stream(packed, 5, 0, cols // 4).astype(jnp.uint8)
  zero, signs = quad & 3, quad >> 2
  codes = []
  for i in range(4):
    before = jnp.uint8(i) - (zero < i).astype(jnp.uint8)
    sign = (2 * ((signs >> before) & 1)).astype(jnp.int8) - jnp.int8(1)
    codes.append(jnp.where(zero == i, jnp.int8(0), sign))
  return jnp.stack(codes, axis=-1).reshape(*packed.shape[:-1], cols)


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
