# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""One latent for all planes of a ternary weight.

With a latent for each plane, a weight that wants to grow a little must turn
over a code of the first plane, three steps of the second, and turn one of the
second back, and each of the two moves alone makes things worse. One latent that
goes to a sum of planes moves by the smallest step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# How near to the next code a latent may start, in steps. Codes that were chosen
# against rounding (by error compensation) start that far inside of their own
# interval.
MARGIN = 0.01
# Beyond the last code a weight may still say how sure it is.
REACH = 1.4


def merge(
  codes: jax.Array,
  scale: jax.Array,
  w: jax.Array | None = None,
  margin: float = MARGIN,
) -> tuple[jax.Array, jax.Array]:
  """Makes a latent that `split` takes back to the codes.

  Args:
    codes: int8 `[planes, *rows, I]`.
    scale: `[planes, *rows, groups]`, not negative.
    w: Dense weight `[*rows, I]`, which the latent comes near to, as far as the
      codes allow; by default their sum.
    margin: How near to the next code it may come, in steps of the finest plane.

  Returns:
    The latent, float32 `[*rows, I]`, in steps of the finest plane where each
    plane has a third of the scale of the one before; and scales with the
    largest of every group in the first plane. Where a scale is more than half
    of the one before, some sums are not those that `split` finds, and a weight
    may start at another sum near it.
  """
  order = jnp.argsort(-scale, axis=0, stable=True)
  groups = codes.reshape(*scale.shape, -1)
  codes = jnp.take_along_axis(groups, order[..., None], axis=0)
  codes = codes.reshape(*codes.shape[:-2], -1).astype(jnp.float32)
  scale = jnp.take_along_axis(scale, order, axis=0)
  wide = wide_scale(scale, codes.shape[-1])
  parts = codes * wide
  if w is None:
    w = jnp.sum(parts, axis=0)
  rest = w.astype(jnp.float32) - jnp.sum(parts[:-1], axis=0)
  reach = REACH
  for i in reversed(range(len(codes))):
    code, s = codes[i], wide[i]
    # A step is one of the finest plane, whichever code would turn over.
    near = 0.5 - margin * wide[-1] / jnp.where(s > 0, s, 1)
    low = jnp.where(code < 0, -reach, code - near)
    high = jnp.where(code > 0, reach, code + near)
    # Only the finest plane says where beyond the last sum a weight may be.
    reach = jnp.inf
    # inf * 0 would be no bound.
    low = jnp.where(jnp.isinf(low), low, low * s)
    high = jnp.where(jnp.isinf(high), high, high * s)
    rest = jnp.clip(rest, low, high)
    if i:
      rest = rest + parts[i - 1]
  unit = wide[0] / 3 ** (len(codes) - 1)
  return jnp.where(unit > 0, rest / jnp.where(unit > 0, unit, 1), 0), scale


def split(latent: jax.Array, scale: jax.Array) -> jax.Array:
  """Rounds a latent to codes, plane by plane.

  Forward they are whole numbers; backward the sum of planes has the gradient
  of the latent, straight through, where it is within half a step of the range.

  Args:
    latent: float32 `[*rows, I]`, see `merge`.
    scale: `[planes, *rows, groups]`.

  Returns:
    float32 `[planes, *rows, I]` in {-1, 0, 1}.
  """
  planes = len(scale)
  wide = jax.lax.stop_gradient(wide_scale(scale, latent.shape[-1]))
  unit = wide[0] / 3 ** (planes - 1)
  rest = jax.lax.stop_gradient(latent) * unit
  codes = []
  for s in wide:
    code = jnp.clip(jnp.round(rest / jnp.where(s > 0, s, 1)), -1, 1)
    code = jnp.where(s > 0, code, 0)
    rest = rest - code * s
    codes.append(code)
  inside = jnp.abs(rest) <= wide[-1]
  through = jnp.where(inside, latent - jax.lax.stop_gradient(latent), 0)
  # d(sum)/d(latent) is to be the unit, and the first code's share is its scale.
  codes[0] = codes[0] + through / 3 ** (planes - 1)
  return jnp.stack(codes)


def wide_scale(scale: jax.Array, cols: int) -> jax.Array:
  return jnp.repeat(scale, cols // scale.shape[-1], axis=-1)
