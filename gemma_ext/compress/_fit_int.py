# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Integer fit: symmetric codes and the scale that minimises the error."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext.compress import _groups

relative_error = _groups.relative_error

# By bits: smallest clip ratio tried, ratios tried, refinements by least
# squares. Few bits gain from clipping a lot; at 8 bits rounding dominates.
_SEARCH = {
  2: (0.12, 32, 3),
  3: (0.2, 28, 3),
  4: (0.3, 24, 3),
  5: (0.45, 16, 2),
  6: (0.6, 12, 2),
  7: (0.75, 8, 2),
  8: (0.88, 5, 1),
}


def fit_int(
  w: jax.Array,
  *,
  bits: int,
  group: int | None = None,
  scale: str = 'bf16',
  curvature: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Fits integer codes and one scale per group to `w`, without a zero point.

  Searches the clip ratio that minimises the curvature-weighted squared error,
  on a grid refined by least squares, with the scale already rounded to what is
  stored. But in 'ue5m3' it may be negative: the largest weight then takes the
  code -2^(bits-1), which has no positive twin. Never worse than rounding to the
  stored scale nearest to `max |w| / (2^(bits-1) - 1)`.

  Args:
    w: Weights `[..., I]`, the input axis last.
    bits: 2 to 8.
    group: Weights that share one scale, a divisor of I; `None` for all I.
    scale: How scales are stored, 'bf16', 'ue5m3' or 'e4m3'.
    curvature: Diagonal Hessian of the layer's inputs, `[I]` (or a shape that
      broadcasts to `w`), >= 0. `None` weighs all alike.

  Returns:
    int8 codes `[..., I]` in [-2^(bits-1), 2^(bits-1) - 1], and bfloat16
    scales `[..., I / group]`, or `[..., 1]`, which `scale` can store. Groups of
    zeros have scale 0.

  Raises:
    RecipeError: If `bits` is not 2 to 8, or there is no such `scale`.
    GroupSizeError: If `group` does not divide I.
    NonFiniteError: If `w` or the curvature is not finite.
    ShapeError: If `w` or the curvature has the wrong shape or type.
  """
  if bits not in _SEARCH:
    raise errors.RecipeError(f'{bits=}; expected 2 to 8.')
  if scale not in kernels.SCALES:
    raise errors.RecipeError(f'{scale=}; expected one of {kernels.SCALES}.')
  group = (w.shape[-1] if w.ndim else 1) if group is None else group
  h = _groups.check(w, group, curvature)
  fit = functools.partial(fit_chunk, bits=bits, kind=scale)
  return _groups.fit_chunks(fit, w, group, h)


def round_codes(w: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
  """Nearest codes, [N, group] float32."""
  inverse = jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))
  half = float(1 << (bits - 1))
  return jnp.clip(jnp.round(w * inverse[:, None]), -half, half - 1)


@functools.partial(jax.jit, static_argnames=('bits', 'kind'))
def fit_chunk(
  w: jax.Array,  # float32[N, group]
  h: jax.Array | None,  # float32[N, group]
  *,
  bits: int,
  kind: str = 'bf16',
) -> tuple[jax.Array, jax.Array]:  # int8[N, group], bf16[N]
  """Fits groups that were checked; traceable."""
  low, count, refine = _SEARCH[bits]
  half = 1 << (bits - 1)
  if h is None:
    weigh = lambda x: x
  else:
    # Inputs that never fired: any code will do, the nearest is best.
    h = jnp.where(jnp.max(h, axis=-1, keepdims=True) > 0, h, 1.0)
    h = h / jnp.max(h, axis=-1, keepdims=True)
    weigh = lambda x: h * x
  top, bottom = jnp.max(w, axis=-1), jnp.min(w, axis=-1)
  peak = jnp.maximum(top, -bottom)
  # Positive scales give the code -2^(bits-1) to negative weights.
  sign = jnp.where(top > -bottom, -1.0, 1.0)
  if kind == 'ue5m3':
    sign = jnp.ones_like(sign)  # There are no others.

  def error(scale):
    q = round_codes(w, scale, bits)
    return jnp.sum(weigh((w - q * scale[:, None]) ** 2), axis=-1)

  def better(best, scale):
    scale = kernels.round_scale(scale, kind)
    err = error(scale)
    won = err < best[1]
    return jnp.where(won, scale, best[0]), jnp.where(won, err, best[1])

  plain = kernels.round_scale(peak / (half - 1), kind)
  best = plain, error(plain)
  if kind == 'bf16':
    ratios = np.geomspace(low, 1.0, count)
  else:
    # All that can be stored, neighbours being a sixteenth to an eighth apart:
    # some above what clips nothing, which may happen to fit, and more below.
    low, most = 0.8 * low, 1.5 * half / (half - 1)
    count = math.ceil(math.log(most / low) / math.log(1.06)) + 1
    ratios = np.geomspace(low, most, count)
  # The other sign can only pay where clipping does.
  signs = (1.0, -1.0) if bits <= 5 and kind != 'ue5m3' else (1.0,)
  grid = jnp.array([s * r / half for s in signs for r in ratios], jnp.float32)
  best = jax.lax.fori_loop(
    0, len(grid), lambda i, b: better(b, sign * peak * grid[i]), best
  )
  step = float(ratios[1] / ratios[0]) - 1.0
  if bits <= 5 and kind == 'bf16':
    around = jnp.array(1.0 + step * np.linspace(-0.8, 0.8, 9), jnp.float32)
    center = best[0]
    best = jax.lax.fori_loop(
      0, len(around), lambda i, b: better(b, center * around[i]), best
    )

  def least_squares(_, best):
    q = round_codes(w, best[0], bits)
    qq = jnp.sum(weigh(q * q), axis=-1)
    qw = jnp.sum(weigh(q * w), axis=-1)
    return better(best, jnp.where(qq > 0, qw / jnp.where(qq > 0, qq, 1), 0))

  scale, _ = jax.lax.fori_loop(0, refine, least_squares, best)
  return round_codes(w, scale, bits).astype(jnp.int8), scale.astype(
    jnp.bfloat16
  )
