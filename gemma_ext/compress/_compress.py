# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`compress`: dense parameters in, packed parameters out, in one shot."""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _calibrate
from gemma_ext.compress import _carve
from gemma_ext.compress import _compensate
from gemma_ext.compress import _fits
from gemma_ext.compress import _plan
from gemma_ext.compress import _registry
from gemma_ext.compress import _statistics
from gemma_ext.compress import _threads

# Weights that are fitted at a time, so that the float32 copy and the sorted
# intermediates of the fit stay small beside the model.
_BLOCK = 1 << 24
_COMPENSATED_ROWS = 2048
# Shares of a product that rows are not fitted again for.
_NEAR_ONE = 2e-3


def compress(
  model: nn.Module,
  params: Mapping[str, Any],
  recipe: recipe_lib.Recipe | str | dict,
  *,
  calibration: Any = None,
  fits: _fits.Fits | None = None,
  progress: bool = False,
) -> dict[str, Any]:
  """Compresses parameters as a recipe says, one weight at a time.

  Args:
    model: The official model that `params` belong to.
    params: Its dense parameters.
    recipe: The recipe, or what `Recipe.of` takes.
    calibration: Token ids of shape `[batch, length]`, padded with 0. If given,
      the error of every weight counts by the second moment of the input that
      it meets on these tokens, in mixtures that have a router already as they
      route. With `Statistics`, which are of the dense layers, errors are
      compensated, see `compensate`. `None` counts all alike.
    fits: Weights that were fitted for other recipes, with the same arrays and
      `Statistics` or with no calibration; those of this one are added.
    progress: Whether to show a progress bar.

  Returns:
    Parameters for `gx.nn.Compressed(model=model, recipe=recipe)`. Parameters
    that no rule matches are the same arrays as in `params`. Layers that the
    recipe makes mixtures are carved, see `carve`, but for those that `params`
    have a router for.

  Raises:
    RecipeError: If the recipe does not fit the model, or has mixtures to carve
      and there are no calibration tokens, or their routers are neither 'norm'
      nor 'gate'; or if others are to be compensated.
    ParamsMismatchError: If the parameters do not belong to the model.
    NonFiniteError: If a weight holds NaN or infinity.
  """
  model, recipe = _plan.resolve(model, recipe)
  methods = gx_nn.methods_of(model, recipe)
  flat: dict[str, Any] = dict(check_params(model, params))
  layers = _carve.without_router(model, recipe, flat)
  routed = {
    path: mixture
    for path, mixture in gx_nn.mixtures_of(model, recipe).items()
    if path not in layers
  }
  if layers:
    if calibration is None or isinstance(calibration, _statistics.Statistics):
      raise errors.RecipeError(
        'Carving experts needs text: pass calibration tokens, as'
        f' {list(layers)[:3]} have no router yet.'
      )
    params = _carve.carve(model, params, recipe, calibration, progress=progress)
    flat = dict(check_params(model, params))
  ordered = {site.whole for site, _ in methods.values() if site.ordered}
  if ordered and calibration is None:
    raise errors.RecipeError(
      f'The rows of {sorted(ordered)} are to be in the order of what they cost:'
      ' pass calibration, tokens or `gx.compress.statistics`.'
    )
  if ordered or isinstance(calibration, _statistics.Statistics):
    _check_dense(routed)
  if ordered and not isinstance(calibration, _statistics.Statistics):
    calibration = _statistics.statistics(
      model, params, calibration, progress=progress
    )
  orders = {path: calibration.order(path) for path in ordered}
  means = {
    site.whole: mean_of(flat[site.whole])
    for site, _ in methods.values()
    if site.centered
  }
  curvatures: dict[str, jax.Array] = {}
  known = None
  if isinstance(calibration, _statistics.Statistics):
    known = calibration
  elif calibration is not None and methods:
    curvatures = _calibrate.second_moments(
      model, params, calibration, mixtures=routed, progress=progress
    )

  read = {site.path: site.layout for site in gx_nn.sites(model)}

  def pack(found: tuple[gx_nn.Site, recipe_lib.Method]) -> dict[str, Any]:
    if fits is None or curvatures or layers:
      return fitted(*found)
    site, _ = found
    sources = flat[site.whole], known
    return fits.of(found, sources, lambda: fitted(*found))

  def fitted(site: gx_nn.Site, method: recipe_lib.Method) -> dict[str, Any]:
    w = site.part(flat[site.whole], orders.get(site.whole))
    if site.centered:
      w = w.astype(jnp.float32) - means[site.whole]
    if site.rows is None and site.layout.in_axes != read[site.path].in_axes:
      # Stored by neuron: what is known of the inputs is along the other axis.
      weights = known and known.outputs.get(site.path)
      return compress_weight(
        w,
        site,
        method,
        curvature=None if weights is None else jnp.asarray(weights),
      )
    return compress_weight(
      w,
      site,
      method,
      curvature=curvatures.get(site.whole),
      **(fitting(site, known) if known is not None else {}),
    )

  for path, leaf in _threads.each(
    pack, methods, desc='compress', progress=progress
  ):
    flat[path] = leaf
  for path in {site.whole for site, _ in methods.values() if site.rows}:
    del flat[path]
  for path, order in orders.items():
    flat[gx_nn.rank_path(path)] = jnp.asarray(np.argsort(order), jnp.int32)
  for path, mean in means.items():
    flat[gx_nn.mean_path(path)] = mean
  flat |= kernels.side_by_side({path: flat[path] for path in methods})
  return traverse_util.unflatten_dict(flat, sep='/')


def _check_dense(mixtures: Mapping[str, gx_nn.Mixture]) -> None:
  """Raises RecipeError if dense layers do not tell what mixtures meet."""
  for path, mixture in mixtures.items():
    if mixture.method.router not in _carve.ROUTERS:
      raise errors.RecipeError(
        f'Statistics are of the dense layers, and {path!r} is never one: the'
        f' weights of {mixture.method.router!r} add up to one at most. Pass'
        ' calibration tokens, and no tables with ordered rows.'
      )


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


def check_params(
  model: nn.Module, params: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """Returns `params` by path after comparing them with the model.

  Raises:
    ParamsMismatchError: If a parameter is missing, has another shape, or is
      compressed already.
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  for path, leaf in _plan.abstract_params(model).items():
    if path not in flat:
      if f'{path}/codes' in flat:
        raise errors.ParamsMismatchError(
          f'{path!r} is compressed already. Compress the dense parameters.'
        )
      if f'{path}/w' in flat:  # As some Gemma 4 checkpoints nest it.
        flat[path] = flat.pop(f'{path}/w')
      else:
        raise errors.ParamsMismatchError(
          f'The parameters have no {path!r}, which the model expects with'
          f' shape {leaf.shape}. Are they the params of this model?'
        )
    if tuple(np.shape(flat[path])) != tuple(leaf.shape):
      raise errors.ParamsMismatchError(
        f'{path!r} has shape {np.shape(flat[path])}, the model expects'
        f' {leaf.shape}.'
      )
  return flat
