# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`compress`: dense parameters in, packed parameters out, in one shot."""

from __future__ import annotations

from collections.abc import Mapping
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
from gemma_ext.compress import _fits
from gemma_ext.compress import _low_rank
from gemma_ext.compress import _plan
from gemma_ext.compress import _statistics
from gemma_ext.compress import _threads
from gemma_ext.compress import _weight

_CORRECTED = f'{gx_nn.BASE}/codes'
_Parts = tuple[tuple[gx_nn.Site, recipe_lib.Method], ...]


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
    site.whole: _weight.mean_of(flat[site.whole])
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

  def pack(found: _Parts) -> dict[str, Any]:
    if fits is None or curvatures or layers:
      return fitted(found)
    sources = flat[found[0][0].whole], known
    return fits.of(found, sources, lambda: fitted(found))

  def fitted(found: _Parts) -> dict[str, Any]:
    (site, method), *factors = found
    w = site.part(flat[site.whole], orders.get(site.whole))
    if site.centered:
      w = w.astype(jnp.float32) - means[site.whole]
    curvature = curvatures.get(site.whole)
    if factors:
      costs = _low_rank.Costs.of(site, known, curvature)
      return _low_rank.fit(
        w, {part.role: (part, m) for part, m in found}, costs
      )
    if site.rows is None and site.layout.in_axes != read[site.path].in_axes:
      # Stored by neuron: what is known of the inputs is along the other axis.
      weights = known and known.outputs.get(site.path)
      return _weight.compress_weight(
        w,
        site,
        method,
        curvature=None if weights is None else jnp.asarray(weights),
      )
    return _weight.compress_weight(
      w,
      site,
      method,
      curvature=curvature,
      **(_weight.fitting(site, known) if known is not None else {}),
    )

  together = _together(methods)
  for path, leaf in _threads.each(
    pack, together, desc='compress', progress=progress
  ):
    flat[path] = leaf
  for path in {site.whole for site, _ in methods.values() if site.rows}:
    del flat[path]
  for path, order in orders.items():
    flat[gx_nn.rank_path(path)] = jnp.asarray(np.argsort(order), jnp.int32)
  for path, mean in means.items():
    flat[gx_nn.mean_path(path)] = mean
  flat |= kernels.side_by_side({path: flat[path] for path in together})
  return traverse_util.unflatten_dict(flat, sep='/')


def _together(
  methods: Mapping[str, tuple[gx_nn.Site, recipe_lib.Method]],
) -> dict[str, _Parts]:
  """What is fitted at a time, by the path of the result.

  Bands of a table one by one, a weight and its correction together.
  """
  found: dict[str, _Parts] = {}
  for path, (site, method) in methods.items():
    place = site.whole if site.role else path
    found[place] = (*found.get(place, ()), (site, method))
  return found


def _check_dense(mixtures: Mapping[str, gx_nn.Mixture]) -> None:
  """Raises RecipeError if dense layers do not tell what mixtures meet."""
  for path, mixture in mixtures.items():
    if mixture.method.router not in _carve.ROUTERS:
      raise errors.RecipeError(
        f'Statistics are of the dense layers, and {path!r} is never one: the'
        f' weights of {mixture.method.router!r} add up to one at most. Pass'
        ' calibration tokens, and no tables with ordered rows.'
      )


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
      if any(f'{path}/{leaf}' in flat for leaf in ('codes', _CORRECTED)):
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
