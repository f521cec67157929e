# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Ternary fit: exact for one plane, alternating least squares for several.

All of it minimises `sum h (w - sum_p scale_p code_p)^2` per group, with the
scales already rounded to what can be stored.
"""

import functools

import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext.compress import _groups
from gemma_ext.compress import _planes

relative_error = _groups.relative_error
# Rounds of alternating least squares.
ITERATIONS = 12


def fit_ternary(
  w: jax.Array,
  *,
  group: int,
  planes: int = 1,
  density: float | None = None,
  pattern: tuple[int, int] | None = None,
  scale: str = 'bf16',
  tied: bool = False,
  curvature: jax.Array | None = None,
  iterations: int = ITERATIONS,
) -> tuple[jax.Array, jax.Array]:
  """Fits codes in {-1, 0, 1} and one scale per group and plane to `w`.

  One free plane: the exact minimum over all codes and all scales.
  Given a scale the best codes keep the weights above half of it, so only the
  `group + 1` thresholds of the sorted magnitudes need comparing, by prefix
  sums. A fixed density or pattern is exact without curvature; with it, and
  with several planes, alternating least squares from several starts finds a
  local minimum, and no iteration increases the error. Tied planes have one
  scale, of which a grid is searched: all of them that `ue5m3` has.

  Args:
    w: Weights `[..., I]`, the input axis last.
    group: Weights that share one scale; divides I.
    planes: Ternary tensors that are summed, 1 to 4.
    density: Fraction of nonzero codes, in (0, 1]: exactly
      `max(1, round(density * group))` in every group of every plane.
    pattern: `(n, m)`: exactly n nonzero codes in every m neighbours of every
      plane, as in 3:4. m divides `group`. Excludes `density`.
    scale: How scales are stored, 'bf16' or 'ue5m3'.
    tied: Whether each plane's scale is a third of the one before. Excludes
      `density` and `pattern`.
    curvature: Diagonal Hessian of the layer's inputs, `[I]` (or a shape that
      broadcasts to `w`), >= 0. `None` weighs all alike.
    iterations: Rounds of alternating least squares.

  Returns:
    int8 codes `[planes, ..., I]` and scales `[planes, ..., I/group]`: bfloat16,
    float32 if `tied`, of values that the format's `pack_scale` stores exactly.
    Groups of zeros have codes and scales 0, whatever the density.

  Raises:
    RecipeError: If planes, density or pattern are out of range.
    GroupSizeError: If `group` does not divide I, or m does not divide `group`.
    NonFiniteError: If `w` or the curvature is not finite.
    ShapeError: If `w` or the curvature has the wrong shape or type.

  Reference: Li, Zhang, Liu, "Ternary Weight Networks", arXiv 1605.04711
  (threshold and scale); Xu et al., "Alternating Multi-bit Quantization for
  Recurrent Neural Networks", arXiv 1802.00150 (alternation over planes).
  """
  keep = _keep(group, planes, density, pattern)
  if scale not in kernels.SCALES:
    raise errors.RecipeError(f'{scale=}; expected one of {kernels.SCALES}.')
  if tied and keep is not None:
    raise errors.RecipeError(
      f'Tied planes leave no choice of {density=} or {pattern=}.'
    )
  if iterations < 0:
    raise errors.RecipeError(f'{iterations=}; expected at least 0.')
  h = _groups.check(w, group, curvature)
  fit = functools.partial(
    fit_chunk,
    planes=planes,
    keep=keep,
    kind=scale,
    tied=tied,
    iterations=jnp.int32(iterations),
  )
  return _groups.fit_chunks(fit, w, group, h)


def _keep(
  group: int,
  planes: int,
  density: float | None,
  pattern: tuple[int, int] | None,
) -> tuple[int, int] | None:
  """Returns `(n, m)`, the nonzeros in every m neighbours; `None` for free."""
  if planes not in (1, 2, 3, 4):
    raise errors.RecipeError(f'{planes=}; expected 1 to 4.')
  if density is not None and pattern is not None:
    raise errors.RecipeError(
      f'Got {density=} and {pattern=}; expected one of them at most.'
    )
  if density is not None:
    if not 0 < density <= 1:
      raise errors.RecipeError(f'{density=}; expected (0, 1].')
    return max(1, round(density * group)), group
  if pattern is not None:
    n, m = pattern
    if not 1 <= n <= m:
      raise errors.RecipeError(f'{pattern=}; expected (n, m), 1 <= n <= m.')
    if group % m:
      raise errors.GroupSizeError(
        f'{pattern=} does not tile a group of {group}; m must divide it.'
      )
    return n, m
  return None


@functools.partial(jax.jit, static_argnames=('planes', 'keep', 'kind', 'tied'))
def fit_chunk(
  w: jax.Array,  # float32[N, group]
  h: jax.Array | None,  # float32[N, group]
  *,
  planes: int,
  keep: tuple[int, int] | None,
  kind: str,
  tied: bool,
  iterations: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:  # int8[P, N, group], bf16 or f32[P, N]
  """Fits groups that were checked; traceable."""
  # Scaling by a power of two is exact, commutes with rounding and keeps squares
  # of tiny and huge weights in range.
  peak = jnp.max(jnp.abs(w), axis=-1)
  unit = jax.lax.reduce_precision(peak, exponent_bits=8, mantissa_bits=0)
  unit = jnp.where(unit > 0, unit, 1.0)
  w = w / unit[:, None]
  if h is not None:
    # Inputs that never fired: any code will do, the nearest is best.
    h = jnp.where(jnp.max(h, axis=-1, keepdims=True) > 0, h, 1.0)
    h = h / jnp.max(h, axis=-1, keepdims=True)
  if tied and planes > 1:
    codes, scale = _planes.fit_tied(w, h, planes, kind)
  elif keep is None:
    codes, scale = _planes.fit_free(w, h, planes, iterations, kind)
  else:
    codes, scale = _planes.fit_kept(w, h, planes, keep, iterations, kind)
  codes = jnp.where(peak[:, None] > 0, codes, 0).astype(jnp.int8)
  scale = scale * unit
  if tied:
    return codes, scale
  # Only beyond the range of what can be stored does this change anything.
  return codes, kernels.round_scale(scale, kind).astype(jnp.bfloat16)
