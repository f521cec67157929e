# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Fits and packs one weight."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _compensate
from gemma_ext.compress import _registry
from gemma_ext.compress import _statistics

# Weights that are fitted at a time, so that the float32 copy and the sorted
# intermediates of the fit stay small beside the model.
_BLOCK = 1 << 24
_COMPENSATED_ROWS = 2048
# Shares of a product that rows are not fitted again for.
_NEAR_ONE = 2e-3


def fitting(
  site: gx_nn.Site,
  statistics: _statistics.Statistics,
  order: np.ndarray | None = None,
) -> dict[str, Any]:
  """Returns what `compress_weight` is to know of a weight.

  Args:
    site: The weight, or some rows of a table.
    statistics: Statistics of the model.
    order: Of the rows of the table; by default those of `statistics`.
  """
  if site.whole not in statistics.inputs:
    return {}
  rows = None
  if statistics.is_table(site.whole):
    if order is None and site.ordered:
      order = statistics.order(site.whole)
    rows = site.part(np.arange(len(statistics.outputs[site.whole])), order)
  return {
    'hessian': _compensate.Factored.of(statistics.hessian(site.whole, rows)),
    'slopes': statistics.slopes(site.whole),
  }


@jax.jit
def mean_of(table: jax.Array) -> jax.Array:
  """Mean of the rows of a table `[V, D]`, float32 `[D]`."""
  return jnp.mean(table, axis=0, dtype=jnp.float32)


def compress_weight(
  w: jax.Array,
  site: gx_nn.Site,
  method: recipe_lib.Method,
  *,
  curvature: jax.Array | None = None,
  hessian: Any = None,
  slopes: np.ndarray | None = None,
) -> dict[str, jax.Array]:
  """Fits and packs one weight.

  Args:
    w: Dense weight in the shape of the official tree.
    site: Its site.
    method: How to compress it.
    curvature: Weights of the squared error along the input axis, `[cols]`, of
      all slices.
    hessian: Second moments of the inputs, `[cols, cols]`, or `Factored`, to
      compensate errors with, where the method leaves its codes free.
    slopes: `[cols, cols]`: rows w are fitted so that, on average, their product
      with `slopes @ w` stays what it is, see `Statistics.slopes`.

  Returns:
    `{'codes', 'scale'}`, see `gemma_ext.kernels`.

  Raises:
    NonFiniteError: If the weight holds NaN or infinity.
  """
  # Errors may move from slice to slice, so that these are cut afterwards.
  layout = site.layout.uncut
  fmt = gx_nn.format_of(method, layout.cols)
  fit = _registry.fit_of(method)
  if hessian is not None:
    if not isinstance(hessian, _compensate.Factored):
      hessian = _compensate.Factored.of(hessian)
    curvature = jnp.diagonal(hessian.hessian)
    if _compensate.is_free(method):
      fit = functools.partial(_compensated, hessian=hessian)
  cols = layout.cols
  matrix = layout.to_rows(jnp.asarray(w)).reshape((-1, cols))
  step = max(1, _BLOCK // cols)
  if hessian is not None:
    # Fewer, and always as many: each number of rows compiles anew.
    step = min(step, _COMPENSATED_ROWS)
  codes, scales = [], []
  for start in range(0, matrix.shape[0], step):
    block = matrix[start : start + step].astype(jnp.float32)
    # Not by the maximum, in which XLA may lose a NaN.
    if not bool(jnp.all(jnp.isfinite(block))):
      raise errors.NonFiniteError(
        f'{site.path!r} holds NaN or infinity in rows {start} to'
        f' {start + block.shape[0]}. The checkpoint is damaged, or was'
        ' trained to divergence.'
      )
    count = block.shape[0]
    if hessian is not None:
      many = step if start else min(step, 1 << (count - 1).bit_length())
      block = jnp.pad(block, ((0, many - count), (0, 0)))
    code, scale = fit(block, method, fmt, curvature)
    if slopes is not None:
      kept = float(_kept(block, code, scale, slopes))
      if abs(kept - 1) > _NEAR_ONE:
        code, scale = fit(block / kept, method, fmt, curvature)
    code, scale = (site.layout.cut(x[..., :count, :]) for x in (code, scale))
    codes.append(fmt.pack(code))
    scales.append(fmt.pack_scale(scale))
  # Codes and scales end in [rows, bytes]; planes come before the rows.
  code, scale = (
    parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-2)
    for parts in (codes, scales)
  )
  rows, cols = site.layout.rows, site.layout.cols
  return {
    'codes': code.reshape(fmt.codes_shape(rows, cols)),
    'scale': scale.reshape(fmt.scale_shape(rows, cols)),
  }


@jax.jit
def _kept(w, codes, scale, slopes):
  """Q S w over w S w, of all rows [N, I] together."""
  wide = jnp.repeat(
    scale.astype(jnp.float32), w.shape[1] // scale.shape[-1], -1
  )
  q = codes * wide
  q = q if q.ndim == 2 else jnp.sum(q, axis=0)
  along = w @ slopes
  whole = jnp.sum(w * along)
  # A share that no fit comes near is that of nothing.
  share = jnp.sum(q * along) / jnp.where(whole > 0, whole, 1)
  return jnp.where((whole > 0) & (share > 0.5), share, 1.0)


def _compensated(block, method, fmt, curvature, *, hessian):
  del curvature
  return _compensate.compensate(block, method=method, fmt=fmt, hessian=hessian)
