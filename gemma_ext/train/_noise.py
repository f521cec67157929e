# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Noise that is made again from its key, and matrices that carry it.

The noise of a matrix is of low rank, so that a perturbed product costs the
plain one and two thin ones, and no perturbed matrix is ever stored.

Reference: Sarkar et al., "Evolution Strategies at the Hyperscale" (EGGROLL),
arXiv 2511.16652.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

# Up to this rank the second thin product is a sum of outer products, which
# XLA fuses with what follows instead of writing it to memory.
_FUSED_RANK = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
  """A matrix and its perturbation, `w + step * a @ b.T`, kept apart.

  Attributes:
    w: `[*rows, cols]`.
    a: `[*rows, rank]`.
    b: `[cols, rank]`.
    step: Scalar.
  """

  w: jax.Array
  a: jax.Array
  b: jax.Array
  step: jax.Array

  def dense(self) -> jax.Array:
    """Returns the perturbed matrix, `[*rows, cols]`."""
    return self.w + self.step * jnp.tensordot(self.a, self.b, (-1, -1))


def matmul(x: jax.Array, w: jax.Array | LowRank) -> jax.Array:
  """Returns `x @ w.T`, `[..., *rows]`, for `x` `[..., cols]`.

  What a loss calls so that `Evolution` may perturb `w` without storing it.
  """
  if isinstance(w, LowRank):
    return perturbed_matmul(x, w.w, w.a, w.b, w.step)
  return jnp.tensordot(x, w, (-1, -1))


def perturbed_matmul(
  x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, sigma: Any
) -> jax.Array:
  """Returns `x @ w.T + sigma * (x @ b) @ a.T`.

  Under `vmap` over `a`, `b` and `sigma` the first product stays one matrix
  product over all members, and is shared by those that share `x`.

  Args:
    x: `[..., cols]`.
    w: `[*rows, cols]`.
    a: `[*rows, rank]`.
    b: `[cols, rank]`.
    sigma: Scalar.
  """
  base = jnp.tensordot(x, w, (-1, -1))
  thin = sigma * (x @ b)  # [..., rank]
  rank = a.shape[-1]
  if rank > _FUSED_RANK:
    return base + jnp.tensordot(thin, a, (-1, -1))
  lead = thin.shape[:-1] + (1,) * (a.ndim - 1)
  for k in range(rank):
    base = base + thin[..., k].reshape(lead) * a[..., k]
  return base


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
  """Noise of one leaf: `a @ b.T`, or `a` itself where `b` is `None`.

  Elements have mean 0, variance 1 and no correlation.
  """

  a: jax.Array
  b: jax.Array | None

  def dense(self) -> jax.Array:
    """Returns the noise in the shape of the leaf."""
    if self.b is None:
      return self.a
    return jnp.tensordot(self.a, self.b, (-1, -1))


def is_low_rank(shape: tuple[int, ...], rank: int) -> bool:
  """Whether factors are smaller than a leaf of that shape."""
  if len(shape) < 2:
    return False
  rows, cols = math.prod(shape[:-1]), shape[-1]
  return rank * (rows + cols) < rows * cols


def draw(
  key: jax.Array, shape: tuple[int, ...], *, rank: int, dtype: Any
) -> Factors:
  """Draws the noise of a leaf; the same for the same key.

  Args:
    key: Of this member and leaf.
    shape: Of the leaf.
    rank: Of the noise of a matrix; leaves that it would not make smaller get
      one number an element.
    dtype: Of the noise.
  """
  if not is_low_rank(shape, rank):
    return Factors(jax.random.normal(key, shape, dtype), None)
  rows = math.prod(shape[:-1])
  flat = jax.random.normal(key, (rows + shape[-1], rank), dtype)
  # The root of the rank once, so that both readers of the factors agree.
  a = (flat[:rows] / math.sqrt(rank)).reshape(*shape[:-1], rank)
  return Factors(a, flat[rows:])


def combine(weights: jax.Array, noise: Factors) -> jax.Array:
  """Returns `sum_i weights[i] * noise[i]` as one matrix product.

  Args:
    weights: `[pairs]`.
    noise: Factors with a leading axis of pairs.
  """
  if noise.b is None:
    return jnp.tensordot(weights.astype(noise.a.dtype), noise.a, 1)
  pairs, rank = noise.a.shape[0], noise.a.shape[-1]
  lead = noise.a.shape[1:-1]
  scaled = weights.reshape(pairs, *(1,) * len(lead), 1) * noise.a
  left = jnp.moveaxis(scaled, 0, -2).reshape(-1, pairs * rank)
  right = jnp.moveaxis(noise.b, 0, -2).reshape(-1, pairs * rank)
  return (left @ right.T).reshape(*lead, right.shape[0])


def shape_fitness(losses: jax.Array, how: str) -> jax.Array:
  """Makes losses comparable from one update to the next.

  Args:
    losses: `[members]`.
    how: 'rank' (ranks, centred, within -0.5 and 0.5), 'zscore' or 'none'.

  Returns:
    `[members]`, in the order of the losses. Equal losses get equal ranks.
  """
  # A failed member is as bad as the worst one, not a NaN in every weight.
  finite = jnp.isfinite(losses)
  worst = jnp.max(jnp.where(finite, losses, -jnp.inf))
  losses = jnp.where(finite, losses, worst)
  if how == 'none':
    return losses
  if how == 'zscore':
    centred = losses - jnp.mean(losses)
    return centred / (jnp.std(losses) + 1e-12)
  ordered = jnp.sort(losses)
  low = jnp.searchsorted(ordered, losses, side='left')
  high = jnp.searchsorted(ordered, losses, side='right') - 1
  return (low + high) / 2 / (losses.shape[0] - 1) - 0.5
