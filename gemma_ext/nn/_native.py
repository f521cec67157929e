# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The mixtures that Gemma 4 checkpoints have, their experts computed by us.

The official layer routes; what it chose goes to the kernels that `MoE` layers
use, so that packed experts are never unpacked together and, where few tokens
come at once, those that were not chosen are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

from flax import linen as nn
from gemma.gm.nn.gemma4 import _moe as gemma4_moe
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import recipe as recipe_lib
from gemma_ext.nn import _moe
from gemma_ext.nn import _packed
from gemma_ext.nn import _sites
from gemma_ext.nn import _stacked

# The official module, and its methods that choose and that compute.
MIXTURE = gemma4_moe.MoERagged
ROUTE, RUN = '_router', '_run_ffw_and_routing'
METHODS = (ROUTE, RUN)
# Where `LoRA` keeps what it adds to the weights of experts.
ADAPTER = '_LoRAExperts'
WEIGHTS = ('gating_einsum', 'linear')


def mixtures(model: nn.Module) -> dict[str, _moe.Mixture]:
  """Returns the mixtures that a model has of its own, by path.

  Args:
    model: The official model.
  """
  found = {}
  for path, site in weights(model).items():
    place, _, name = path.partition(f'/{WEIGHTS[1]}')
    if not name:
      continue
    count, size, features = site.layout.shape
    method = recipe_lib.MoE(
      num_experts=count, top_k=model.config.top_k_experts, router='softmax'
    )
    found[place] = _moe.Mixture(
      path=place, method=method, features=features, hidden=count * size
    )
  return found


def weights(model: nn.Module) -> dict[str, _sites.Site]:
  """Returns the weights of a model's own experts, by path."""
  return {
    site.path: site
    for site in _sites.sites(model)
    if site.kind is _sites.Kind.EXPERTS
  }


def take(
  place: str,
  sites: Mapping[str, _sites.Site],
  methods: Mapping[str, tuple[_sites.Site, recipe_lib.Method]],
  flat: dict[str, Any],
) -> _stacked.Stacked:
  """Takes the experts of one of Gemma 4's own mixtures out of the parameters.

  Args:
    place: Path of the layer.
    sites: The weights of all experts, by path.
    methods: Site and method by path.
    flat: Parameters by path; those of the experts are gone afterwards.

  Raises:
    RecipeError: If one weight is packed and the other is not.
  """
  paths = [
    p for name in WEIGHTS for p in sites if p.startswith(f'{place}/{name}')
  ]
  packed = [path for path in paths if path in methods]
  if not packed:
    arrays = tuple(np.asarray(flat.pop(path)) for path in paths)
    return _stacked.Stacked(formats=None, arrays=arrays, axes=(0, 0), x_bits=16)
  if packed != paths:
    raise errors.RecipeError(
      f'Of the experts of {place!r} {packed} are packed and the others are not;'
      ' let one rule match both weights.'
    )
  each = [methods[path][1] for path in paths]
  formats = tuple(
    _packed.format_of(method, sites[path].layout.cols)
    for method, path in zip(each, paths)
  )
  axes = tuple(_stacked.axis_of(fmt) for fmt in formats for _ in _stacked.LEAF)
  leaves = [
    flat.pop(f'{path}/{leaf}') for path in paths for leaf in _stacked.LEAF
  ]
  return _stacked.Stacked(
    formats=formats,
    arrays=tuple(
      np.moveaxis(np.asarray(a), i, 0) for a, i in zip(leaves, axes)
    ),
    axes=axes,
    x_bits=max(getattr(method, 'x_bits', 16) for method in each),
  )


def route(
  module: Any, logits: jax.Array, weight: jax.Array, chosen: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Holds what the official router chose to a budget, and counts it.

  Args:
    module: The bound module. Its parameters may have `router/k`, int32: how
      many experts a token gets at most (`gx.compress.with_experts`).
    logits: `[..., E]`.
    weight: Of all experts, those that were chosen sum to one: `[..., E]`.
    chosen: Numbers of experts `[..., K]`, the best first.

  Returns:
    `weight`, 0 of those that the budget leaves out and of those that were not
    chosen, and `chosen`.
  """
  experts = logits.shape[-1]
  router = module.get_variable('params', _moe.ROUTER, None)
  keep = jnp.ones(chosen.shape[-1:], bool)
  if router is not None:
    keep = jnp.arange(len(keep)) < jnp.maximum(router['k'], 1)
  taken = jax.nn.one_hot(chosen, experts, dtype=weight.dtype)
  gates = weight * jnp.sum(taken * keep[:, None].astype(weight.dtype), axis=-2)
  if router is not None:
    total = gates.sum(axis=-1, keepdims=True)
    gates /= jnp.where(total > 0, total, 1)
  size = module.hidden_dim
  mixture = _moe.Mixture(
    path='/'.join(module.path),
    method=recipe_lib.MoE(
      num_experts=experts, top_k=chosen.shape[-1], router='softmax'
    ),
    features=module.features,
    hidden=experts * size,
  )
  _moe.sow(module, mixture, gates, logits.astype(jnp.float32))
  return gates, chosen


def guess(
  method: recipe_lib.MoE, params: Mapping[str, Any], x: jax.Array
) -> jax.Array:
  """Which experts a router would choose for what another layer reads.

  Args:
    method: As `mixtures` has it.
    params: Of the module of the router.
    x: `[..., D]`.

  Returns:
    Numbers of experts, the best first, -1 for those beyond a budget: int32
    `[..., K]`.
  """
  wide = functools.partial(jnp.asarray, dtype=jnp.float32)
  # Scales that all logits share change nothing.
  logits = (wide(x) * wide(params['router_scale'])) @ wide(
    params['router_logits']['w']
  )
  chosen = jax.lax.top_k(logits, method.top_k)[1]
  k = params.get(_moe.ROUTER, {}).get('k', method.top_k)
  return jnp.where(jnp.arange(method.top_k) < k, chosen, -1)


def taken(
  module: Any, chosen: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns which experts run and what their outputs are multiplied by.

  Args:
    module: The bound module.
    chosen: Numbers of experts `[..., K]`.
    weight: As `route` returns it, `[..., E]`.

  Returns:
    Numbers of experts, -1 for none, and weights, both `[..., K]`.
  """
  weight = jnp.take_along_axis(weight, chosen, axis=-1)
  chosen = jnp.where(weight > 0, chosen, -1)
  return chosen, weight * module.per_expert_scale[jnp.maximum(chosen, 0)]


def run(
  module: Any,
  both: Sequence[Any],
  x: jax.Array,
  chosen: jax.Array,
  weight: jax.Array,
  send: Callable[..., jax.Array] | None = None,
) -> jax.Array:
  """Computes the experts that were chosen.

  Args:
    module: The bound module.
    both: Weights of `WEIGHTS`, packed ones or `None` for dense ones.
    x: `[..., D]`.
    chosen: Numbers of experts `[..., K]`.
    weight: As `route` returns it, `[..., E]`.
    send: Runs them elsewhere: `send(module, run, x, chosen, weight,
      arrays, axes)`.

  Returns:
    `[..., D]`, in the type of x.
  """
  chosen, weight = taken(module, chosen, weight)
  formats, bits, axes = None, 16, [0, 0]
  if all(_is_packed(w) for w in both):
    formats = (both[0].fmt, both[1].fmt)
    bits = max(w.x_bits for w in both)
    axes = [_stacked.axis_of(w.fmt) for w in both for _ in range(2)]
    arrays = [w.leaf[name] for w in both for name in _stacked.LEAF]
  else:
    # Of two layouts, or trained: as the dense one.
    arrays = [
      dense(getattr(module, name)) if each is None else jnp.asarray(each)
      for name, each in zip(WEIGHTS, both, strict=True)
    ]
  # Arrays of experts as well: those pairs that are there.
  pairs = [
    getattr(module, name).get_variable('params', ADAPTER) for name in WEIGHTS
  ]
  given = tuple(pair is not None for pair in pairs)
  arrays += [p['lora'][name] for p in pairs if p for name in ('a', 'b')]
  axes += [0] * (len(arrays) - len(axes))
  compute = functools.partial(_compute, formats, bits, given)
  if send is not None:
    return send(module, compute, x, chosen, weight, arrays, axes)
  rows = lambda a: a.reshape(-1, a.shape[-1])
  return compute(arrays, rows(x), rows(chosen), rows(weight)).reshape(x.shape)


def _is_packed(weight: Any) -> bool:
  """Whether the kernels read it; latent codes have a gradient of their own."""
  return isinstance(weight, _packed.PackedWeight) and not jnp.issubdtype(
    weight.leaf['codes'].dtype, jnp.floating
  )


def dense(module: Any) -> jax.Array:
  """Returns the weight of one of `WEIGHTS`, a bound module, if it is dense."""
  leaf = module.get_variable('params', module.weight_name)
  # As the official code does.
  return leaf['w'] if isinstance(leaf, Mapping) else leaf


def _compute(formats, bits, given, arrays, x, chosen, weight) -> jax.Array:
  weights = 2 if formats is None else 4
  more = iter(arrays[weights:])
  pairs = [(next(more), next(more)) if there else None for there in given]
  return _stacked.compute(
    *(formats, arrays[:weights], x, chosen, weight),
    x_bits=bits,
    adapters=kernels.Adapters(*pairs),
  )
