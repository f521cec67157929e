# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Fits a weight in few bits together with a correction of low rank.

The correction of rank r that loses least of what an error costs is known in
closed form (LQER, arXiv 2402.02446; EoRA, arXiv 2410.21271): the best
approximation of the error in the space where its norm is that cost. Here the
cost counts the outputs as well, by their Fisher information. The factors are
then stored in few bits, the first one's errors compensated, the second one
solved again for the first as it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from gemma_ext import kernels
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _compensate
from gemma_ext.compress import _statistics
from gemma_ext.compress import _weight

# Share of the mean diagonal of a Hessian that is added before it is factored.
_RIDGE = 1e-6

Part = tuple[gx_nn.Site, recipe_lib.Method]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Costs:
  """What an error of a weight costs, to second order.

  Attributes:
    inputs: Second moments of the inputs, `[I, I]`, or `None` for all alike.
    outputs: Fisher information of the outputs, `[N]`, or `None` likewise.
    curvature: Diagonal of `inputs`, `[I]`, where only that is known.
  """

  inputs: _compensate.Factored | None = None
  outputs: np.ndarray | None = None
  curvature: jax.Array | None = None

  def times(self, rows: np.ndarray) -> np.ndarray:
    """Returns `rows @ H`, `[n, I]`, a little added to what is known of H."""
    if self.inputs is not None:
      return rows @ self._factored[0]
    return rows if self.curvature is None else rows * self._diagonal

  def to_plain(self, rows: np.ndarray) -> np.ndarray:
    """Returns `rows @ L`, `H = L L^T`: their plain norm is what they cost."""
    if self.inputs is not None:
      return rows @ self._factored[1]
    return rows if self.curvature is None else rows * np.sqrt(self._diagonal)

  def of_plain(self, rows: np.ndarray) -> np.ndarray:
    """Returns `rows @ L^-1`, see `to_plain`."""
    if self.inputs is not None:
      lower = self._factored[1]
      return scipy.linalg.solve_triangular(lower, rows.T, lower=True, trans=1).T
    return rows if self.curvature is None else rows / np.sqrt(self._diagonal)

  @functools.cached_property
  def _factored(self) -> tuple[np.ndarray, np.ndarray]:
    """H and its lower Cholesky factor."""
    assert self.inputs is not None
    found = np.asarray(self.inputs.hessian, np.float64)
    ridge = _RIDGE * np.trace(found) / len(found) + 1e-30
    while True:
      # Of fewer tokens than inputs, rounding may have left less than nothing.
      try:
        hessian = found + ridge * np.eye(len(found))
        return hessian, np.linalg.cholesky(hessian)
      except np.linalg.LinAlgError:
        ridge *= 4

  @functools.cached_property
  def _diagonal(self) -> np.ndarray:
    found = np.asarray(self.curvature, np.float64)
    return found + _RIDGE * np.mean(found) + 1e-30

  @classmethod
  def of(
    cls,
    site: gx_nn.Site,
    statistics: _statistics.Statistics | None,
    curvature: jax.Array | None = None,
  ) -> Costs:
    """Returns what is known of a weight.

    Args:
      site: The weight, or a part of it.
      statistics: Of the model, if there are some.
      curvature: As the attribute.
    """
    if statistics is None or site.whole not in statistics.inputs:
      return cls(curvature=curvature)
    return cls(
      inputs=_weight.fitting(site, statistics)['hessian'],
      outputs=statistics.outputs[site.whole],
    )


def parts_of(site: gx_nn.Site, method: recipe_lib.LowRank) -> dict[str, Part]:
  """Returns site and method of every part of a weight, by role.

  Args:
    site: The weight.
    method: Its method.

  Raises:
    RecipeError: If it can have no such correction.
    GroupSizeError: If a group size cannot be had.
  """
  parts = {part.role: (part, way) for part, way in gx_nn.split(site, method)}
  for part, way in parts.values():
    gx_nn.format_of(way, part.layout.cols)
  return parts


def fit(
  w: jax.Array, parts: Mapping[str, Part], costs: Costs
) -> dict[str, dict[str, jax.Array]]:
  """Fits and packs a weight and its correction.

  Args:
    w: Dense weight in the shape of the official tree.
    parts: Site and method by role, see `gx.nn.split`.
    costs: What its errors cost.

  Returns:
    Packed leaves by role.

  Raises:
    NonFiniteError: If the weight holds NaN or infinity.
  """
  site, method = parts[gx_nn.BASE]
  leaf = _weight.compress_weight(
    w, site, method, hessian=costs.inputs, curvature=costs.curvature
  )
  error = residual(w, site, method, leaf)
  rank = parts[gx_nn.DOWN][0].layout.shape[0]
  rows = directions(error, rank, costs)
  down = pack_down(error, rows, parts[gx_nn.DOWN], costs)
  up = pack_up(error, down, parts, costs)
  return {gx_nn.BASE: leaf, gx_nn.DOWN: down, gx_nn.UP: up}


def residual(
  w: jax.Array,
  site: gx_nn.Site,
  method: recipe_lib.Method,
  leaf: Mapping[str, jax.Array],
) -> np.ndarray:
  """Returns what a packed weight lacks, float64 `[N, I]`.

  Args:
    w: Dense weight in the shape of the official tree.
    site: Its site.
    method: How it is packed.
    leaf: The packed weight.
  """
  rows = site.layout.to_rows(jnp.asarray(w, jnp.float32))
  got = _dense(leaf, site, method)
  return np.asarray(rows, np.float64).reshape(got.shape) - got


def directions(error: np.ndarray, rank: int, costs: Costs) -> np.ndarray:
  """Returns what of the inputs the best correction reads, `[rank, I]`.

  Args:
    error: `[N, I]`.
    rank: At most N and I. Fewer rows are those of fewer directions: the first
      ones are the most important.
    costs: What errors cost.
  """
  count, cols = error.shape
  fisher = np.ones(count) if costs.outputs is None else costs.outputs
  root = np.sqrt(np.maximum(fisher, 0))[:, None].astype(np.float64)
  scaled = root * error
  # Of the two Gram matrices of the error, the smaller one.
  if count < cols:
    left = _largest(costs.times(scaled) @ scaled.T, rank)
    return left.T @ scaled
  plain = costs.to_plain(scaled)
  right = _largest(plain.T @ plain, rank)
  return costs.of_plain(right.T)


def pack_down(
  error: np.ndarray, rows: np.ndarray, part: Part, costs: Costs
) -> dict[str, jax.Array]:
  """Packs the first factor.

  Directions do not meet each other where costs are concerned, so that those of
  a smaller rank are the first rows of what this returns, see `first_rows`.

  Args:
    error: What is corrected, `[N, I]`.
    rows: What `directions` returns, `[rank, I]`.
    part: Site and method of the factor.
    costs: What errors cost.
  """
  site, method = part
  # As large in both factors, so that the scales of both can be stored.
  large = lambda x, axis: np.maximum(np.max(np.abs(x), axis=axis), 1e-30)
  share = large(_solve(error, rows, costs), 0) / large(rows, 1)
  rows = rows * np.sqrt(share)[:, None]
  return _weight.compress_weight(
    jnp.asarray(rows.reshape(site.layout.shape), jnp.float32),
    site,
    method,
    hessian=costs.inputs,
    curvature=costs.curvature,
  )


def first_rows(
  leaf: Mapping[str, jax.Array], rank: int
) -> dict[str, jax.Array]:
  """Returns the first factor of a smaller rank."""
  return {name: x[:rank] for name, x in leaf.items()}


def pack_up(
  error: np.ndarray,
  down: Mapping[str, jax.Array],
  parts: Mapping[str, Part],
  costs: Costs,
) -> dict[str, jax.Array]:
  """Packs the second factor, solved for the first one as it is stored.

  Args:
    error: What is corrected, `[N, I]`.
    down: The first factor, packed.
    parts: Site and method by role.
    costs: What errors cost.
  """
  stored = _dense(down, *parts[gx_nn.DOWN])
  site, method = parts[gx_nn.UP]
  solved = _solve(error, stored, costs)
  return _weight.compress_weight(
    jnp.asarray(solved.reshape(site.layout.shape), jnp.float32),
    site,
    method,
    hessian=costs.times(stored) @ stored.T,
  )


def remaining(
  error: np.ndarray,
  leaves: Mapping[str, Mapping[str, jax.Array]],
  parts: Mapping[str, Part],
) -> np.ndarray:
  """Returns the error with the correction, `[N, I]`.

  Args:
    error: The error without it.
    leaves: Packed leaves of both factors, by role.
    parts: Site and method by role.
  """
  down, up = (
    _dense(leaves[role], *parts[role]) for role in (gx_nn.DOWN, gx_nn.UP)
  )
  return error - up @ down


def _largest(gram: np.ndarray, rank: int) -> np.ndarray:
  """Vectors of the largest eigenvalues, the largest first, `[n, rank]`."""
  count = len(gram)
  _, vectors = scipy.linalg.eigh(
    gram, subset_by_index=(count - rank, count - 1)
  )
  return vectors[:, ::-1]


def _solve(error: np.ndarray, rows: np.ndarray, costs: Costs) -> np.ndarray:
  """The `[N, rank]` that, times `rows`, costs least away from the error."""
  along = costs.times(rows)
  gram = along @ rows.T
  ridge = 1e-9 * np.trace(gram) / len(gram) + 1e-30
  gram += ridge * np.eye(len(gram))
  return np.linalg.solve(gram, along @ error.T).T


def _dense(
  leaf: Mapping[str, jax.Array], site: gx_nn.Site, method: recipe_lib.Method
) -> np.ndarray:
  """A packed weight as float64 rows, `[N, I]`."""
  cols = site.layout.cols
  fmt = gx_nn.format_of(method, cols)
  dense = kernels.dequantize(leaf, fmt, cols, dtype=jnp.float32)
  return np.asarray(dense, np.float64).reshape(-1, cols)
