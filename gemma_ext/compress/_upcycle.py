# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Upcycling: a dense model becomes a wider mixture, to be trained on.

Every feed-forward layer is copied once for each expert. As copies they would
all learn the same, so that a share of the hidden neurons of each starts anew.

Reference: sparse upcycling, arXiv 2212.05055; Drop-Upcycling, arXiv 2502.19261.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.nn import _config
from gemma_ext.nn import _moe

# Fields of the official configs that say how wide feed-forward layers are.
_WIDTHS = ('hidden_dim', 'override_kv_shared_ffw_hidden')
_RULE = r'layer_\d+/mlp'
# The weights of what these choose add up to the same for every token.
_ROUTERS = ('softmax', 'sigmoid', 'norm')


def upcycle(
  model: nn.Module,
  params: Mapping[str, Any],
  *,
  num_experts: int,
  top_k: int,
  shared: int = 0,
  router: str = 'softmax',
  reinitialise: float = 0.5,
  seed: int = 0,
) -> tuple[nn.Module, dict[str, Any], recipe_lib.Recipe]:
  """Makes every feed-forward layer a mixture of copies of itself.

  With `reinitialise=0` the mixture computes what the dense model did, whatever
  its routers choose: the weights of the chosen experts add up to one. With
  shared experts, or with routers whose weights are all one, the copies' down
  projections are made smaller accordingly.

  Args:
    model: The official dense model.
    params: Its parameters.
    num_experts: Experts that a router chooses from.
    top_k: How many of them a token gets.
    shared: Copies that every token gets.
    router: 'softmax', 'sigmoid' or 'norm', see `gx.MoE`.
    reinitialise: Share of the hidden neurons of each expert that are drawn
      anew, of the mean and the deviation of the weights that they replace. The
      first copy, if it is shared, keeps all.
    seed: Of these and of the routers.

  Returns:
    The official model with wider layers, its parameters, and the recipe that
    makes it the mixture: `gx.nn.Compressed(model=model, recipe=recipe)`. Biases
    of routers are float32.

  Raises:
    RecipeError: If a value is out of range, or the router none of the three.
    ParamsMismatchError: If the model has no dense feed-forward layers whose
      width its config gives, or the parameters are not its own.
  """
  method = recipe_lib.MoE(
    num_experts=num_experts, top_k=top_k, shared=shared, router=router
  )
  if router not in _ROUTERS:
    raise errors.RecipeError(
      f'upcycle(router=...) must be one of {_ROUTERS}, got {router!r}: what'
      " 'expert_choice' chooses does not add up to one."
    )
  if not 0 <= reinitialise <= 1:
    raise errors.RecipeError(
      f'upcycle(reinitialise=...) must be in [0, 1], got {reinitialise!r}.'
    )
  model = _config.strip(model)
  _config.check(model)
  recipe = recipe_lib.Recipe.of({_RULE: method})
  wider = _wider(model, method.slices)
  layers = _layers(model, wider, recipe)
  flat = dict(traverse_util.flatten_dict(dict(params), sep='/'))
  rng = np.random.default_rng(seed)
  for number, (path, (mixture, axis)) in enumerate(layers.items()):
    _layer(flat, mixture, axis, reinitialise, rng)
    key = jax.random.fold_in(jax.random.key(seed), number)
    made = _moe.initial(mixture, key)
    made['w'] = made['w'].astype(flat[f'{path}/{_moe.DOWN}'].dtype)
    for name, value in made.items():
      flat[f'{path}/{_moe.ROUTER}/{name}'] = value
  return wider, traverse_util.unflatten_dict(flat, sep='/'), recipe


def _wider(model: nn.Module, count: int) -> nn.Module:
  config = model.config
  wide = {
    name: getattr(config, name) * count
    for name in _WIDTHS
    if getattr(config, name, None)
  }
  if 'hidden_dim' not in wide or getattr(config, 'enable_moe', False):
    raise errors.ParamsMismatchError(
      f'{type(model).__name__} has no dense feed-forward layers whose width is'
      " its config's `hidden_dim`, so that it cannot be upcycled."
    )
  return model.clone(config=dataclasses.replace(config, **wide))


def _layers(
  model: nn.Module, wider: nn.Module, recipe: recipe_lib.Recipe
) -> dict[str, tuple[gx_nn.Mixture, int]]:
  """The mixtures to be, and the axis of the neurons in their gates."""
  old = {site.path: site.layout for site in gx_nn.sites(model)}
  found = {}
  for path, mixture in gx_nn.mixtures_of(wider, recipe).items():
    down = old.get(f'{path}/{_moe.DOWN}')
    want = (mixture.size, mixture.features)
    if down is None or down.shape != want:
      raise errors.ParamsMismatchError(
        f'{path!r} of {type(model).__name__} does not follow the width in its'
        f' config: expected {want}, got {down and down.shape}.'
      )
    # Official models have gates either way round.
    (contracted,) = old[f'{path}/{_moe.GATE}'].in_axes
    found[path] = (mixture, 3 - contracted)
  return found


def _layer(
  flat: dict[str, Any],
  mixture: gx_nn.Mixture,
  axis: int,
  reinitialise: float,
  rng: np.random.Generator,
) -> None:
  """Copies one layer, in place; no other is in memory twice."""
  method = mixture.method
  neurons, features = mixture.size, mixture.features
  want = {
    _moe.GATE: (2, neurons, features) if axis == 1 else (2, features, neurons),
    _moe.DOWN: (neurons, features),
  }
  for name, shape in want.items():
    leaf = flat.get(f'{mixture.path}/{name}')
    got = getattr(leaf, 'shape', None)
    if got != shape:
      raise errors.ParamsMismatchError(
        f'{mixture.path}/{name} must have shape {shape}, got {got}. Are the'
        ' parameters dense, and those of the model?'
      )
  names = [f'{mixture.path}/{name}' for name in (_moe.GATE, _moe.DOWN)]
  gate, down = (np.asarray(flat[name]) for name in names)
  gates, downs = [], []
  for number in range(method.slices):
    g, d = gate, down
    if reinitialise and not (number == 0 and method.shared):
      g, d = _fresh(gate, down, axis, reinitialise, rng)
    gates.append(jnp.asarray(g))
    share = _share(method, shared=number < method.shared)
    downs.append(jnp.asarray(d) * jnp.asarray(share, d.dtype))
  flat[names[0]] = jnp.concatenate(gates, axis=axis)
  flat[names[1]] = jnp.concatenate(downs, axis=0)


def _share(method: recipe_lib.MoE, *, shared: bool) -> float:
  """What the down projection of a copy is multiplied by."""
  run = method.shared + method.top_k
  if shared or method.router == 'norm':
    return 1 / run
  # The weights of the chosen ones are one together.
  return method.top_k / run


def _fresh(
  gate: np.ndarray,
  down: np.ndarray,
  axis: int,
  share: float,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
  """A copy, some of its neurons drawn anew: the same ones in all matrices."""
  count = len(down)
  some = rng.choice(count, round(share * count), replace=False)
  gate, down = gate.copy(), down.copy()
  for matrix, along in ((gate[0], axis - 1), (gate[1], axis - 1), (down, 0)):
    rows = np.moveaxis(matrix, along, 0)
    old = np.asarray(rows[some], np.float32)
    if old.size:
      drawn = rng.normal(float(old.mean()), float(old.std()), old.shape)
      rows[some] = np.asarray(drawn).astype(matrix.dtype)
  return gate, down
