# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""How scales are stored: `bf16`, or `ue5m3` in half of the bits.

`ue5m3` has no sign, 5 bits of exponent and 3 of mantissa, in one byte u:

    value = 2^((u >> 3) - 20) * (1 + (u & 7) / 8),  0 for u = 0

from 1.1e-6 to 3840, eight values an octave. `u << 20` is the value's float32,
but for the bias of the exponent: reading one takes a shift and an addition.
"""

import jax
import jax.numpy as jnp

SCALES = ('bf16', 'ue5m3')
_BIAS = 20
# What the exponent of float32 has more, at the place of the lowest bit of u.
_OFFSET = (127 - _BIAS) << 3
_MOST = 3840.0
_LEAST = 1.125 * 2.0**-_BIAS


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
  near = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
  near = jnp.clip(near, _LEAST, _MOST)
  return jnp.where(x < _LEAST / 2, 0.0, near)


@jax.custom_jvp
def round_through(x: jax.Array) -> jax.Array:
  """Rounds to `ue5m3`; the gradient passes straight through."""
  return round_scale(x, 'ue5m3')


@round_through.defjvp
def _round_through_jvp(primals, tangents):
  return round_through(*primals), tangents[0].astype(jnp.float32)


def encode(x: jax.Array) -> jax.Array:
  """Rounds to `ue5m3`: uint8."""
  near = round_scale(x, 'ue5m3')
  bits = jax.lax.bitcast_convert_type(near, jnp.uint32)
  u = (bits >> 20).astype(jnp.int32) - _OFFSET
  return jnp.where(near > 0, u, 0).astype(jnp.uint8)


def decode(u: jax.Array) -> jax.Array:
  """Inverse of `encode`: float32, exact."""
  bits = (u.astype(jnp.uint32) + _OFFSET) << 20
  value = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return jnp.where(u > 0, value, 0.0)
