# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers as sparse mixtures of experts: the router and its choice.

Experts are slices of the hidden neurons of an official feed-forward layer, so
that its weights keep their names and shapes. Where many tokens come at once the
official code runs, the hidden activations of experts that were not chosen
multiplied by zero; where a few do, `kernels.experts_ffn` reads the chosen ones.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import recipe as recipe_lib
from gemma_ext.nn import _packed
from gemma_ext.nn import _sites

GATE, DOWN, ROUTER = 'gating_einsum', 'linear', 'router'
# The bias of an expert that is not there; below any logit.
DEAD = kernels.DEAD
# What a threshold is when there is none.
NONE = -1e30
# Name of what a layer that routes sows into 'intermediates'.
SOWN = 'routing'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """A layer that a recipe makes a mixture.

  Attributes:
    path: Path of the feed-forward module, such as `layer_0/mlp`.
    method: The method.
    features: Inputs and outputs, D.
    hidden: Hidden neurons, of all experts.
  """

  path: str
  method: recipe_lib.MoE
  features: int
  hidden: int

  @property
  def size(self) -> int:
    """Neurons of an expert."""
    return self.hidden // self.method.slices

  @property
  def by_neuron(self) -> bool:
    """Whether the down projection is stored by neuron, `[H, D]` in rows of D.

    Experts may then be as small as one neuron, and those that do not run are
    not read.
    """
    return self.method.router == 'gate'

  @property
  def router_size(self) -> int:
    """Parameters of the router, about."""
    return math.prod(_shape(self)) + self.method.num_experts

  @property
  def shared(self) -> int:
    """Neurons of all shared experts."""
    return self.size * self.method.shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """Which experts the tokens get.

  Attributes:
    chosen: Numbers of experts `[..., K]`, the best first; -1 for none.
    weight: What their outputs are multiplied by, float32 `[..., K]`.
    logits: Of all experts, float32 `[..., E]`.
  """

  chosen: jax.Array
  weight: jax.Array
  logits: jax.Array

  def gates(self) -> jax.Array:
    """Weights of all experts, 0 of those that are not chosen: `[..., E]`."""
    count = self.logits.shape[-1]
    lead = self.chosen.shape[:-1]
    chosen = self.chosen.reshape(-1, self.chosen.shape[-1])
    rows = jnp.arange(len(chosen))[:, None]
    # What is not there goes to a place of its own.
    gates = jnp.zeros((len(chosen), count + 1), self.weight.dtype)
    gates = gates.at[rows, jnp.where(chosen < 0, count, chosen)].add(
      self.weight.reshape(chosen.shape)
    )
    return gates[:, :count].reshape(*lead, count)


def mixtures(
  methods: Mapping[str, recipe_lib.Method],
  sites: Mapping[str, _sites.Site],
) -> dict[str, Mixture]:
  """Returns the layers that methods make mixtures, by path.

  Args:
    methods: Method by path of a weight.
    sites: Site by path.

  Raises:
    RecipeError: If `MoE` is to hold for another weight than the two of a
      feed-forward layer, for one of them alone, or does not divide them.
  """
  found: dict[str, Mixture] = {}
  for path, method in methods.items():
    if not isinstance(method, recipe_lib.MoE):
      continue
    place, _, name = path.rpartition('/')
    site = sites[path]
    if name not in (GATE, DOWN) or site.kind is not _sites.Kind.EINSUM:
      raise errors.RecipeError(
        f'{path!r} is no weight of a feed-forward layer, which {method!r} is'
        f' for; those end in {GATE!r} and {DOWN!r}.'
      )
    other = f'{place}/{DOWN if name == GATE else GATE}'
    if methods.get(other) != method:
      raise errors.RecipeError(
        f'{path!r} is to be a mixture and {other!r} is not, or another one;'
        f' match {place!r}, that is, both.'
      )
    if name == GATE:
      continue
    hidden, features = site.layout.shape
    if hidden % method.slices:
      raise errors.RecipeError(
        f'{place!r} has {hidden} hidden neurons, which {method.slices} experts'
        f' ({method.shared} of them shared) do not divide.'
      )
    found[place] = Mixture(
      path=place, method=method, features=features, hidden=hidden
    )
  return found


def rows_of_neurons(gate: Any, down: Any) -> Any:
  """Gate and up with a row for every neuron, `[2, H, D]`.

  Args:
    gate: As the model has it, `[2, H, D]` or `[2, D, H]`.
    down: `[H, D]`.
  """
  return gate if gate.shape[1:] == down.shape else gate.swapaxes(1, 2)


def stored(mixture: Mixture, name: str) -> recipe_lib.Method:
  """Returns how a weight of a mixture is stored.

  Groups of the down projection lie within an expert, or, where it is stored by
  neuron, within a row.

  Args:
    mixture: The mixture.
    name: `GATE` or `DOWN`.
  """
  method = mixture.method.weights
  if (
    name != DOWN
    or mixture.by_neuron
    or not isinstance(method, (recipe_lib.Ternary, recipe_lib.Int))
  ):
    return method
  # Where there is no group: a scale for each expert of a row.
  group = math.gcd(method.group or mixture.size, mixture.size)
  return dataclasses.replace(method, group=group)


def place(mixture: Mixture, name: str, site: _sites.Site) -> _sites.Site:
  """Returns a weight of a mixture with the layout that it is stored in.

  Args:
    mixture: The mixture.
    name: `GATE` or `DOWN`.
    site: The weight, as the model reads it.
  """
  if name != DOWN:
    return site
  if mixture.by_neuron:
    layout = dataclasses.replace(site.layout, in_axes=(1,))
  elif _is_cut(mixture):
    layout = dataclasses.replace(site.layout, slices=mixture.method.slices)
  else:
    return site
  return dataclasses.replace(site, layout=layout)


def _is_cut(mixture: Mixture) -> bool:
  """Whether rows of the down projection are stored slice by slice.

  What does not run is then not read, and what runs is read in one piece. Not
  where whole bytes and blocks of codes of each slice would be more of them.
  """
  method = stored(mixture, DOWN)
  if not isinstance(method, (recipe_lib.Ternary, recipe_lib.Int)):
    return False
  rows = (mixture.features,)
  slices = mixture.method.slices
  try:
    apart = _packed.format_of(method, mixture.size)
    whole = _packed.format_of(method, mixture.hidden)
  except errors.GroupSizeError:  # `methods_of` says where.
    return False
  return slices * apart.nbytes(rows, mixture.size) == whole.nbytes(
    rows, mixture.hidden
  )


def router_param(module: nn.Module, mixture: Mixture) -> dict[str, jax.Array]:
  """Declares the router of a feed-forward module and returns it.

  Args:
    module: The official module.
    mixture: What it is to be.

  Returns:
    'w' `[E, D]` and 'bias' `[E]`, of the logits; with 'gate' routers 'w' is
    `[H]`, the norm of what a neuron adds for each unit of its gate; 'k', int32,
    how many of the `top_k` experts a token gets at most, and 'threshold',
    float32, above which the logits of an expert have to be, both to be changed
    at run time.

  Raises:
    ParamsMismatchError: If the parameters have no such router.
  """
  method = mixture.method
  shapes = {
    'w': _shape(mixture),
    'bias': (method.num_experts,),
    'k': (),
    'threshold': (),
  }
  if module.is_initializing() and not module.has_variable('params', ROUTER):
    init = functools.partial(initial, mixture)
    return nn.Module.param(module, ROUTER, init, shapes['w'])
  leaf = module.get_variable('params', ROUTER, None)
  got = {
    name: tuple(each.shape)
    for name, each in (leaf.items() if isinstance(leaf, Mapping) else ())
  }
  if got != shapes:
    raise errors.ParamsMismatchError(
      f'{"/".join(module.path)!r} is a mixture by the recipe, so that it needs'
      f" a 'router' of shapes {shapes}, got {got}. Did you pass the params"
      ' through `gx.compress`, with the same recipe?'
    )
  return leaf


def initial(
  mixture: Mixture,
  key: jax.Array,
  shape: tuple[int, ...] = (),
  dtype: Any = jnp.float32,
) -> dict[str, jax.Array]:
  """A router as it is before anything is known: small random logits."""
  del shape
  method = mixture.method
  w = jax.random.normal(key, _shape(mixture)) * mixture.features**-0.5
  return {
    'w': (jnp.abs(w) if method.router == 'gate' else w).astype(dtype),
    'bias': jnp.zeros((method.num_experts,), dtype),
    'k': jnp.int32(method.top_k),
    'threshold': jnp.full((), NONE, dtype),
  }


def _shape(mixture: Mixture) -> tuple[int, ...]:
  if mixture.method.router == 'gate':
    return (mixture.hidden,)
  return (mixture.method.num_experts, mixture.features)


def route(
  method: recipe_lib.MoE, router: Mapping[str, jax.Array], x: jax.Array
) -> Choice:
  """Chooses experts.

  Gradients reach the router through the weights. Where these are all one
  ('norm', 'gate') they pass as if each were the sigmoid of how far its logit is
  above that of the first expert that was left out.

  Args:
    method: The method.
    router: Its parameters, see `router_param`.
    x: Inputs of the layer `[..., L, D]`; with 'gate' routers, the gates of all
      neurons before the activation, `[..., L, H]`.

  Returns:
    The choice. With 'expert_choice', K is E and an expert may be taken by any
    number of tokens.
  """
  logits = _logits(method, router, x)
  wide = functools.partial(jnp.asarray, dtype=jnp.float32)
  bias = wide(router['bias'])
  if method.router == 'expert_choice':
    return _expert_choice(method, logits + bias)
  if method.router == 'sigmoid':
    # The bias balances; it has no part in the weights. Who is not there has no
    # part in the counts either.
    logits = jnp.where(bias > DEAD / 2, logits, DEAD)
    score = jax.nn.sigmoid(logits)
    select = jax.lax.stop_gradient(score + bias)
  else:
    logits = logits + bias
    select = jax.lax.stop_gradient(logits)
  most = min(method.top_k + 1, method.num_experts)
  values, chosen = jax.lax.top_k(select, most)
  k = jnp.clip(router['k'], 1, method.top_k)
  keep = jnp.arange(most) < k
  keep &= (values > wide(router['threshold'])) & (values > DEAD / 2)
  take = functools.partial(jnp.take_along_axis, indices=chosen, axis=-1)
  if method.router in ('norm', 'gate'):
    # The first one that was left out, by number or by threshold.
    out = jnp.where(keep, -jnp.inf, values).max(axis=-1, keepdims=True)
    out = jnp.maximum(out, wide(router['threshold']))
    out = jnp.where(jnp.isfinite(out) & (out > DEAD / 2), out, values[..., -1:])
    soft = jax.nn.sigmoid(take(logits) - jax.lax.stop_gradient(out))
    weight = 1 + soft - jax.lax.stop_gradient(soft)
  elif method.router == 'sigmoid':
    weight = jnp.where(keep, take(score), 0)
    weight = weight / jnp.maximum(weight.sum(axis=-1, keepdims=True), 1e-20)
  else:
    weight = jax.nn.softmax(
      jnp.where(keep, take(logits), DEAD), axis=-1, where=None
    )
  weight = jnp.where(keep, weight, 0)
  chosen = jnp.where(keep, chosen, -1)
  return Choice(
    chosen=chosen[..., : method.top_k],
    weight=weight[..., : method.top_k],
    logits=logits,
  )


def gates_of(
  method: recipe_lib.MoE, router: Mapping[str, jax.Array], x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the weights of all experts, as `route` chooses them.

  Where the weights are all one there is no list of experts to make, which
  would take longer than the layer where these are thousands.

  Args:
    method: The method.
    router: Its parameters.
    x: As for `route`.

  Returns:
    Weights, 0 of those that are not chosen, and logits, float32 `[..., E]`.
    Experts with the same logit as the last one that is chosen all run.
  """
  if method.router not in ('norm', 'gate'):
    choice = route(method, router, x)
    return choice.gates(), choice.logits
  wide = functools.partial(jnp.asarray, dtype=jnp.float32)
  logits = _logits(method, router, x) + wide(router['bias'])
  k = jnp.minimum(router['k'], method.top_k)
  return kernels.open_gates(logits, k, wide(router['threshold'])), logits


def _logits(
  method: recipe_lib.MoE, router: Mapping[str, jax.Array], x: jax.Array
) -> jax.Array:
  """Logits without their bias, float32 `[..., E]`."""
  if method.router == 'gate':
    w = router['w']
    size = len(w) // method.slices
    return kernels.neuron_logits(x, w, size=size, shared=method.shared)
  return jnp.einsum(
    '...d,ed->...e',
    x,
    router['w'].astype(x.dtype),
    preferred_element_type=jnp.float32,
  )


def _expert_choice(method: recipe_lib.MoE, logits: jax.Array) -> Choice:
  """Every expert takes its best tokens of a sequence."""
  length = logits.shape[-2]
  share = method.top_k / method.num_experts
  capacity = max(1, math.ceil(length * share))
  weight = jax.nn.softmax(logits, axis=-1)
  columns = jax.lax.stop_gradient(jnp.swapaxes(weight, -1, -2))
  least = jax.lax.top_k(columns, capacity)[0][..., -1:]
  taken = jnp.swapaxes(columns >= least, -1, -2) & (logits > DEAD / 2)
  numbers = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
  return Choice(
    chosen=jnp.where(taken, numbers, -1),
    weight=jnp.where(taken, weight, 0),
    logits=logits,
  )


def sow(
  module: nn.Module, mixture: Mixture, gates: jax.Array, logits: jax.Array
) -> None:
  """Leaves counts for losses and metrics, if anyone collects 'intermediates'.

  What is sown as 'routing', of all tokens of the batch: 'load' `[E]`, the share
  of tokens that an expert got; 'probability' `[E]`, the mean of the softmax of
  the logits; 'live' `[E]`, 1 for the experts that are there, else 0; 'z', the
  mean squared log of its denominator; 'active', the share of the layer's
  neurons that ran. And 'logits' `[..., E]`, of every token.
  """
  if not module.is_mutable_collection('intermediates'):
    return
  gates = (gates != 0).astype(jnp.float32)
  lead = tuple(range(gates.ndim - 1))
  method = mixture.method
  load = gates.mean(axis=lead)
  module.sow(
    'intermediates',
    SOWN,
    {
      'load': load,
      'probability': jax.nn.softmax(logits, axis=-1).mean(axis=lead),
      'live': (logits > DEAD / 2).any(axis=lead).astype(jnp.float32),
      'z': jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2),
      'active': (method.shared + load.sum()) / method.slices,
      'logits': logits,
    },
  )


def mask(mixture: Mixture, gates: jax.Array, dtype: Any) -> jax.Array:
  """What the hidden activations are multiplied by, `[..., H]`.

  Args:
    mixture: The layer.
    gates: Weights of its experts `[..., E]`.
    dtype: Type of the result.
  """
  gates = jnp.repeat(gates.astype(dtype), mixture.size, axis=-1)
  if not mixture.shared:
    return gates
  ones = jnp.ones((*gates.shape[:-1], mixture.shared), dtype)
  return jnp.concatenate([ones, gates], axis=-1)


@dataclasses.dataclass(kw_only=True)
class Mask:
  """A mixture under way.

  Attributes:
    module: The feed-forward module.
    mixture: What it is.
    router: Its router.
    values: What multiplies the hidden activations, once experts are chosen.
  """

  module: nn.Module
  mixture: Mixture
  router: Mapping[str, jax.Array]
  values: jax.Array | None = None

  def choose(self, x: jax.Array, dtype: Any) -> None:
    """Chooses by what the router reads."""
    gates, logits = gates_of(self.mixture.method, self.router, x)
    sow(self.module, self.mixture, gates, logits)
    self.values = mask(self.mixture, gates, dtype)

  def experts(self, x: jax.Array) -> Choice:
    """The same as a list."""
    choice = route(self.mixture.method, self.router, x)
    sow(self.module, self.mixture, choice.gates(), choice.logits)
    return choice
