# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""One layer's feed-forward branch on its own, dense or compressed.

The official modules themselves are applied, taken out of the model, so that
every family's activation, norm and weight layout is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.nn import _config
from gemma_ext.nn import _sites
from gemma_ext.train import _capture

PARTS = ('pre_ffw_norm', 'mlp', 'post_ffw_norm')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
  """The modules of one branch, and which of its weights are compressed.

  Attributes:
    modules: `pre_ffw_norm`, `mlp` and, where there is one, `post_ffw_norm`,
      unbound.
    methods: Site and method of the compressed weights, by path inside `mlp`.
    dtype: Type of activations.
    mixture: What `mlp` is, if it is a mixture of experts.
  """

  modules: tuple[tuple[str, nn.Module], ...]
  methods: tuple[tuple[str, Any], ...]
  dtype: Any
  mixture: gx_nn.Mixture | None = None

  def apply(
    self, params: Mapping[str, Any], residual: jax.Array
  ) -> dict[str, jax.Array]:
    """Computes the branch.

    Args:
      params: Parameters by module; compressed weights packed or latent.
      residual: Residual stream before the branch, `[..., D]`.

    Returns:
      'input' of `mlp` `[..., D]`, 'gates' `[..., 2, F]` (gate and up, before
      the activation), 'hidden' activations `[..., F]`, 'inner'
      before the post norm and 'branch', `[..., D]`.
    """
    modules = dict(self.modules)
    out: dict[str, jax.Array] = {}
    u = modules['pre_ffw_norm'].apply(
      {'params': params['pre_ffw_norm']}, residual
    )
    out['input'] = u

    def record(next_fun, args, kwargs, context):
      module = context.module
      if isinstance(module, _sites.EINSUMS) and context.method_name == (
        '__call__'
      ):
        # The last einsum of the layer is the one that leaves the hidden space.
        out['hidden'] = args[1]
        value = next_fun(*args, **kwargs)
        out.setdefault('gates', value)
        return value
      return next_fun(*args, **kwargs)

    # Flax asks the interceptor that came first, and this one always goes on.
    mixtures = {'': self.mixture} if self.mixture else None
    with nn.intercept_methods(record):
      with gx_nn.packed_weights(
        dict(self.methods), dtype=self.dtype, mixtures=mixtures
      ):
        y = modules['mlp'].apply({'params': params['mlp']}, u)
    out['inner'] = y
    if 'post_ffw_norm' in modules:
      y = modules['post_ffw_norm'].apply({'params': params['post_ffw_norm']}, y)
    out['branch'] = y
    return out


def of_layer(model: nn.Module, layer: str) -> Branch:
  """Returns the branch of a layer.

  Args:
    model: The official model, or a `gx.nn.Compressed`.
    layer: For example 'layer_8'.

  Raises:
    TrainError: If the model has no such layer or its branch is a mixture.
  """
  _capture.check(model)
  modules = _modules(_bare(model), layer)
  methods, mixture = {}, None
  if isinstance(model, gx_nn.Compressed):
    mixture = gx_nn.mixtures_of(model.model, model.recipe).get(f'{layer}/mlp')
    # As for sites: without the name of the layer.
    mixture = mixture and dataclasses.replace(mixture, path='')
    prefix = f'{layer}/mlp/'
    for path, found in gx_nn.methods_of(model.model, model.recipe).items():
      if path.startswith(prefix):
        # Without the layer's name, branches that are alike share a trace.
        site = dataclasses.replace(found[0], path=path.removeprefix(prefix))
        methods[site.path] = (site, found[1])
  return Branch(
    modules=modules,
    methods=tuple(methods.items()),
    dtype=_bare(model).dtype,
    mixture=mixture,
  )


def _bare(model: nn.Module) -> nn.Module:
  if isinstance(model, gx_nn.Compressed):
    model = model.model
  return _config.strip(model)


@functools.lru_cache(maxsize=256)
def _modules(model: nn.Module, layer: str) -> tuple[tuple[str, nn.Module], ...]:
  return tuple(
    (name, module)
    for name, module in _all_modules(model).get(layer, {}).items()
  ) or _no_layer(model, layer)


def _no_layer(model: nn.Module, layer: str) -> Any:
  raise errors.TrainError(
    f'{type(model).__name__} has no {layer!r}; it has layer_0 to'
    f' layer_{model.config.num_layers - 1}.'
  )


@functools.lru_cache(maxsize=8)
def _all_modules(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
  """Unbound copies of the modules of every branch."""
  found: dict[str, dict[str, nn.Module]] = {}

  def see(next_fun, args, kwargs, context):
    module, path = context.module, context.module.path
    if context.method_name == '__call__' and module.name in PARTS:
      if len(path) >= 2 and path[-2].startswith('layer_'):
        copy = module.clone(parent=None, name=None)
        found.setdefault(path[-2], {})[module.name] = copy
    return next_fun(*args, **kwargs)

  probe = _config.probe(model)
  with nn.intercept_methods(see):
    jax.eval_shape(
      lambda: probe.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    )
  return found


def params_of(params: Mapping[str, Any], layer: str) -> dict[str, Any]:
  """Returns the parameters of a layer's branch, by module."""
  tree = params[layer]
  return {name: tree[name] for name in PARTS if name in tree}


def with_params(
  params: Mapping[str, Any], layer: str, branch: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns `params` with the branch of a layer replaced."""
  return {**params, layer: {**params[layer], **branch}}


def packed_paths(branch: Branch) -> tuple[str, ...]:
  """Paths of the compressed weights inside a branch's parameters."""
  return tuple(f'mlp/{path}' for path, _ in branch.methods)


def flatten(params: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Leaves by path."""
  return traverse_util.flatten_dict(dict(params), sep='/')


def unflatten(flat: Mapping[str, jax.Array]) -> dict[str, Any]:
  """Inverse of `flatten`."""
  return traverse_util.unflatten_dict(dict(flat), sep='/')
