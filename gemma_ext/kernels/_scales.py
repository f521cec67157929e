# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""How scales are stored: `bf16`, or in half of the bits.

`ue5m3` has no sign, 5 bits of exponent and 3 of mantissa, in one byte u:

    value = 2^((u >> 3) - 20) * (1 + (u & 7) / 8),  0 for u = 0

from 1.1e-6 to 3840, eight values an octave. `u << 20` is the value's float32,
but for the bias of the exponent: reading one takes a shift and an addition.

`e4m3` has a sign instead of the fifth bit of the exponent, for codes that reach
further on one side of 0: +-2^((u >> 3 & 15) - 15) * (1 + (u & 7) / 8), from
3.4e-5 to 1.875. It is stored as int8, which tells the two apart.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SCALES = ('bf16', 'ue5m3', 'e4m3')
# By kind of one byte: how they are stored, the bias of the exponent, and the
# largest scale.
_BYTES = {'ue5m3': (jnp.uint8, 20, 3840.0), 'e4m3': (jnp.int8, 15, 1.875)}


def dtype(kind: str) -> np.dtype:
  """Type that scales of a kind are stored in."""
  return np.dtype(_BYTES[kind][0] if kind in _BYTES else jnp.bfloat16)


def is_byte(x: jax.Array) -> bool:
  """Whether stored scales are those of one byte."""
  return x.dtype in (jnp.uint8, jnp.int8)


def round_scale(x: jax.Array, kind: str) -> jax.Array:
  """Rounds to the nearest scale that can be stored, kept in float32.

  Args:
    x: Scales. Below 0, `ue5m3` has none but 0.
    kind: One of `SCALES`.
  """
  x = x.astype(jnp.float32)
  # A pair of casts would not do: XLA may drop it as excess precision.
  if kind == 'bf16':
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
  stored, bias, most = _BYTES[kind]
  least = 1.125 * 2.0**-bias
  size = jnp.abs(x) if stored == jnp.int8 else x
  near = jax.lax.reduce_precision(size, exponent_bits=8, mantissa_bits=3)
  near = jnp.clip(near, least, most)
  near = jnp.where(x < 0, -near, near) if stored == jnp.int8 else near
  return jnp.where(size < least / 2, 0.0, near)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def round_through(x: jax.Array, kind: str) -> jax.Array:
  """Rounds to a kind; the gradient passes straight through."""
  return round_scale(x, kind)


@round_through.defjvp
def _round_through_jvp(kind, primals, tangents):
  return round_through(*primals, kind), tangents[0].astype(jnp.float32)


def encode(x: jax.Array, kind: str) -> jax.Array:
  """Rounds to a kind of one byte: uint8 or int8."""
  near = round_scale(x, kind)
  stored, bias, _ = _BYTES[kind]
  bits = jax.lax.bitcast_convert_type(jnp.abs(near), jnp.uint32)
  u = (bits >> 20).astype(jnp.int32) - ((127 - bias) << 3)
  u = jnp.where(near < 0, u - 128, u)
  return jnp.where(near != 0, u, 0).astype(stored)


def decode(u: jax.Array) -> jax.Array:
  """Inverse of `encode`: float32, exact."""
  kind = 'e4m3' if u.dtype == jnp.int8 else 'ue5m3'
  offset = (127 - _BYTES[kind][1]) << 3
  size = u.astype(jnp.int32) & (127 if kind == 'e4m3' else 255)
  bits = (size.astype(jnp.uint32) + offset) << 20
  value = jax.lax.bitcast_convert_type(bits, jnp.float32)
  value = jnp.where(u < 0, -value, value)
  return jnp.where(size > 0, value, 0.0)
