# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Ternary fit: exact for one plane, alternating least squares for several.

All of it minimises `sum h (w - sum_p scale_p code_p)^2` per group, with the
scales already rounded to bfloat16.
"""

import functools

import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.compress import _groups
from gemma_ext.compress import _planes

relative_error = _groups.relative_error


def fit_ternary(
  w: jax.Array,
  *,
  group: int,
  planes: int = 1,
  density: float | None = None,
  pattern: tuple[int, int] | None = None,
  curvature: jax.Array | None = None,
  iterations: int = 12,
) -> tuple[jax.Array, jax.Array]:
  """Fits codes in {-1, 0, 1} and one scale per group and plane to `w`.

  One free plane: the exact minimum over all codes and all bfloat16 scales.
  Given a scale the best codes keep the weights above half of it, so only the
  `group + 1` thresholds of the sorted magnitudes need comparing, by prefix
  sums. A fixed density or pattern is exact without curvature; with it, and
  with several planes, alternating least squares from several starts finds a
  local minimum, and no iteration increases the error.

  Args:
    w: Weights `[..., I]`, the input axis last.
    group: Weights that share one scale; divides I.
    planes: Ternary tensors that are summed, 1 to 4.
    density: Fraction of nonzero codes, in (0, 1]: exactly
      `max(1, round(density * group))` in every group of every plane.
    pattern: `(n, m)`: exactly n nonzero codes in every m neighbours of every
      plane, as in 3:4. m divides `group`. Excludes `density`.
    curvature: Diagonal Hessian of the layer's inputs, `[I]` (or a shape that
      broadcasts to `w`), >= 0. `None` weighs all alike.
    iterations: Rounds of alternating least squares.

  Returns:
    int8 codes `[planes, ..., I]` and bfloat16 scales `[planes, ..., I/group]`.
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
  if iterations < 0:
    raise errors.RecipeError(f'{iterations=}; expected at least 0.')
  h = _groups.check(w, group, curvature)
  fit = functools.partial(
    _fit_chunk, planes=planes, keep=keep, iterations=jnp.int32(iterations)
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


@functools.partial(jax.jit, static_argnames=('planes', 'keep'))
def _fit_chunk(
  w: jax.Array,  # float32[N, group]
  h: jax.Array | None,  # float32[N, group]
  *,
  planes: int,
  keep: tuple[int, int] | None,
  iterations: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # int8[P, N, group], bf16[P, N]
  # Scaling by a power of two is exact, commutes with rounding to bfloat16 and
  # keeps squares of tiny and huge weights in range.
  peak = jnp.max(jnp.abs(w), axis=-1)
  unit = jax.lax.reduce_precision(peak, exponent_bits=8, mantissa_bits=0)
  unit = jnp.where(unit > 0, unit, 1.0)
  w = w / unit[:, None]
  if h is not None:
    # Inputs that never fired: any code will do, the nearest is best.
    h = jnp.where(jnp.max(h, axis=-1, keepdims=True) > 0, h, 1.0)
    h = h / jnp.max(h, axis=-1, keepdims=True)
  if keep is None:
    codes, scale = _planes.fit_free(w, h, planes, iterations)
  else:
    codes, scale = _planes.fit_kept(w, h, planes, keep, iterations)
  codes = jnp.where(peak[:, None] > 0, codes, 0).astype(jnp.int8)
  return codes, (scale * unit).astype(jnp.bfloat16)
