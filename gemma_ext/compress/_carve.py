# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Carving: the neurons of a dense feed-forward layer as experts, no training.

Neurons that run for the same tokens make an expert, the busiest ones the shared
part, and the router is a regression: what an expert is going to contribute,
from what the layer reads. All of it follows from the activations on some text.

Reference: CMoE, arXiv 2502.04416, and MoEfication, arXiv 2110.01786. They route
by representative neurons; a ridge regression on the logarithm of the norm of an
expert's contribution chooses better, see docs/enhancements/sparse_moe.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize
import tqdm

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _calibrate
from gemma_ext.compress import _plan
from gemma_ext.nn import _config
from gemma_ext.nn import _moe
from gemma_ext.nn import _sites

# Chosen experts have the weight one, so that all of them are the dense layer.
ROUTERS = ('norm', 'gate')
_COLLECTION = 'carving'
# Tokens that neurons are compared on, and that routers are fitted on.
_GROUP_TOKENS = 4096
_ROUTER_TOKENS = 32_768
# A neuron runs for a token if it is among this share of the layer's.
_BUSY = 0.25
# Of the mean of the diagonal of the moments of the inputs of a router.
_RIDGE = 1e-3
# Logits below the mean of an expert by more than this are all the same to it.
_FLOOR = 8.0
# Neurons up to which groups are an exact assignment.
_EXACT = 4096
_ROUNDS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carved:
  """A layer's neurons as experts.

  Attributes:
    order: The neurons in their new order, int `[H]`: shared ones, then those of
      each expert.
    router: Parameters of the router, see `gx.nn`.
    explained: Share of the variance of the logits that the router explains, on
      the tokens that it was fitted to; 1 for 'gate', which is not fitted.
  """

  order: np.ndarray
  router: dict[str, Any]
  explained: float


def carve(
  model: nn.Module,
  params: Mapping[str, Any],
  recipe: recipe_lib.Recipe | str | dict,
  tokens: Any,
  *,
  seed: int = 0,
  progress: bool = False,
) -> dict[str, Any]:
  """Makes mixtures of the feed-forward layers that a recipe says so of.

  Args:
    model: The official model.
    params: Its dense parameters.
    recipe: The recipe; what it says of how weights are stored does not matter.
    tokens: Token ids `[batch, length]`, padded with 0.
    seed: Of the choice of tokens and of the first guess of the groups.
    progress: Whether to show a progress bar.

  Returns:
    Dense parameters with the neurons of those layers in the order of their
    experts, and a 'router' beside each. With every expert running they are the
    model that they were. Layers that have a router already stay as they are.

  Raises:
    RecipeError: If the recipe does not fit the model, or has mixtures to carve
      whose routers are neither 'norm' nor 'gate'.
    ShapeError: If `tokens` is not a non-empty integer matrix of real tokens.
  """
  model, recipe = _plan.resolve(model, recipe)
  flat = dict(traverse_util.flatten_dict(dict(params), sep='/'))
  layers = without_router(model, recipe, flat)
  if not layers:
    return traverse_util.unflatten_dict(flat, sep='/')
  tokens = _calibrate.check_tokens(tokens)
  found = inputs_of(model, params, tokens, list(layers), progress=progress)
  bar = tqdm.tqdm(
    found, total=len(layers), desc='carve', unit='layer', disable=not progress
  )
  for path, x in bar:
    mixture = layers[path]
    gate, down = weights_of(flat, path)
    carved = carve_layer(mixture, x, gate, down, seed=seed)
    reorder(flat, mixture, carved.order)
    dtype = flat[f'{path}/{_moe.DOWN}'].dtype
    for name, value in carved.router.items():
      array = jnp.asarray(value)
      if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(dtype)
      flat[f'{path}/{_moe.ROUTER}/{name}'] = array
  return traverse_util.unflatten_dict(flat, sep='/')


def without_router(
  model: nn.Module, recipe: recipe_lib.Recipe, flat: Mapping[str, Any]
) -> dict[str, gx_nn.Mixture]:
  """Returns the mixtures that are still to be carved, by path.

  Args:
    model: The official model.
    recipe: The recipe.
    flat: Dense parameters by path.

  Raises:
    RecipeError: If their routers are of a kind that carving does not make.
  """
  layers = {
    path: mixture
    for path, mixture in gx_nn.mixtures_of(model, recipe).items()
    if f'{path}/{_moe.ROUTER}/w' not in flat
  }
  for path, mixture in layers.items():
    if mixture.method.router not in ROUTERS:
      raise errors.RecipeError(
        f'{path!r} has no router yet, and carving makes those of {ROUTERS}:'
        f' the weights of {mixture.method.router!r} add up to one at most, so'
        ' that slices of a dense layer would never be that layer. Carve with'
        ' one of these, or make the mixture with `gx.compress.upcycle`.'
      )
  return layers


def reorder(
  flat: dict[str, Any], mixture: gx_nn.Mixture, order: np.ndarray
) -> None:
  """Puts the neurons of a layer in another order, in place.

  Args:
    flat: Dense parameters by path.
    mixture: The layer.
    order: The neurons, `[H]`.
  """
  gate, down = (f'{mixture.path}/{name}' for name in (_moe.GATE, _moe.DOWN))
  axis = 2 - (flat[gate].shape[1:] == flat[down].shape)
  flat[gate] = jnp.take(jnp.asarray(flat[gate]), order, axis=axis)
  flat[down] = jnp.take(jnp.asarray(flat[down]), order, axis=0)


def weights_of(
  flat: Mapping[str, Any], path: str
) -> tuple[np.ndarray, np.ndarray]:
  """Gate and up `[2, H, D]` and down `[H, D]` of a layer, float32."""
  down = np.asarray(flat[f'{path}/{_moe.DOWN}'], np.float32)
  gate = np.asarray(flat[f'{path}/{_moe.GATE}'], np.float32)
  return _moe.rows_of_neurons(gate, down), down


def carve_layer(
  mixture: gx_nn.Mixture,
  x: np.ndarray,
  gate: np.ndarray,
  down: np.ndarray,
  *,
  seed: int = 0,
) -> Carved:
  """Chooses the experts of one layer and their router.

  Args:
    mixture: What the layer is to be.
    x: What the layer reads, `[N, D]`.
    gate: Gate and up, `[2, H, D]`.
    down: `[H, D]`.
    seed: See `carve`.
  """
  rng = np.random.default_rng(seed)
  x = x[rng.permutation(len(x))[:_ROUTER_TOKENS]]
  norms = np.linalg.norm(down, axis=1)
  few = np.asarray(_contributions(x[:_GROUP_TOKENS], gate, norms))
  if mixture.method.router == 'gate':
    up = np.asarray(x[:_GROUP_TOKENS] @ gate[1].T)
    norms = norms * np.sqrt(np.square(up).mean(axis=0))
  place = int(_BUSY * mixture.hidden)
  busy = few >= -np.partition(-few, place, axis=1)[:, place, None]
  rate = busy.mean(axis=0)
  # Ties by what a neuron contributes on the whole.
  by_rate = np.lexsort((-np.square(few).mean(axis=0), -rate))
  shared, rest = by_rate[: mixture.shared], by_rate[mixture.shared :]
  group = np.arange(len(rest))
  if mixture.size > 1:
    group = groups(busy[:, rest].T, mixture.method.num_experts, rng)
  order = np.concatenate([shared, rest[np.argsort(group, kind='stable')]])
  if mixture.method.router == 'gate':
    w, bias = norms[order], np.zeros(mixture.method.num_experts, np.float32)
    explained = 1.0
  else:
    logits = _logits(mixture, x, gate[:, order], norms[order])
    w, bias, explained = _regress(x, logits)
  return Carved(
    order=order,
    router={
      'w': w,
      'bias': bias,
      'k': np.int32(mixture.method.top_k),
      'threshold': np.float32(_moe.NONE),
    },
    explained=explained,
  )


def groups(
  busy: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
  """Balanced k-means of neurons by the tokens for which they run.

  Args:
    busy: Which tokens each neuron runs for, bool `[N, T]`.
    count: Number of groups; divides N.
    rng: Chooses the first centres.

  Returns:
    Group of every neuron, int `[N]`, N / count of each.
  """
  v = busy.astype(np.float32)
  v /= np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-9)
  size = len(v) // count
  centres = v[rng.choice(len(v), count, replace=False)]
  group = np.zeros(len(v), int)
  for _ in range(_ROUNDS):
    group = _assign(v @ centres.T, size)
    sums = np.zeros_like(centres)
    np.add.at(sums, group, v)
    sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    centres = sums
  return group


def _assign(likeness: np.ndarray, size: int) -> np.ndarray:
  """Groups of `size` with the largest sum of likenesses `[N, count]`."""
  if len(likeness) <= _EXACT:
    cost = -np.repeat(likeness, size, axis=1)
    return optimize.linear_sum_assignment(cost)[1] // size
  # The pairs that are surest of each other first.
  order = np.argsort(-likeness, axis=None, kind='stable')
  group = np.full(len(likeness), -1)
  room = np.full(likeness.shape[1], size)
  for i, e in zip(*np.unravel_index(order, likeness.shape)):
    if group[i] < 0 and room[e]:
      group[i] = e
      room[e] -= 1
  return group


@jax.jit
def _contributions(x: jax.Array, gate: jax.Array, norms: jax.Array):
  """Norms of what neurons add to the output: `[N, H]`."""
  hidden = jax.nn.gelu(x @ gate[0].T) * (x @ gate[1].T)
  return jnp.abs(hidden) * norms


def _logits(
  mixture: gx_nn.Mixture, x: np.ndarray, gate: np.ndarray, norms: np.ndarray
) -> np.ndarray:
  """What a router is to say: log squared norm of each expert, `[N, E]`."""
  parts = []
  for i in range(0, len(x), _GROUP_TOKENS):
    found = np.square(
      np.asarray(
        _contributions(
          x[i : i + _GROUP_TOKENS],
          gate[:, mixture.shared :],
          norms[mixture.shared :],
        )
      )
    )
    parts.append(found.reshape(len(found), -1, mixture.size).sum(axis=-1))
  logits = np.log(np.concatenate(parts) + 1e-12)
  return np.maximum(logits, logits.mean(axis=0) - _FLOOR)


def _regress(
  x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
  """Ridge regression with an intercept: `[E, D]`, `[E]`, variance explained."""
  wide = x.astype(np.float64)
  target = y.astype(np.float64)
  mean: Any = wide.mean(axis=0)
  bias: Any = target.mean(axis=0)
  wide, target = wide - mean, target - bias
  moments = wide.T @ wide
  ridge = _RIDGE * np.trace(moments) / len(moments) * np.eye(len(moments))
  w = np.linalg.solve(moments + ridge, wide.T @ target)
  left = np.square(target - wide @ w).sum() / max(
    np.square(target).sum(), 1e-30
  )
  return (
    w.T.astype(np.float32),
    (bias - mean @ w).astype(np.float32),
    float(1 - left),
  )


def inputs_of(
  model: nn.Module,
  params: Mapping[str, Any],
  tokens: np.ndarray,
  paths: list[str],
  *,
  most_bytes: int = 1 << 30,
  progress: bool = False,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields what feed-forward layers read, layer by layer.

  Padding and BOS are left out. As many layers are recorded in one pass as fit
  into some memory.

  Args:
    model: The official model.
    params: Its parameters.
    tokens: Token ids `[batch, length]`.
    paths: Paths of the layers.
    most_bytes: Memory for activations of one pass.
    progress: Whether to show a progress bar.

  Yields:
    Path and float32 `[N, D]`.

  Raises:
    ShapeError: If there is no token but padding and BOS.
  """
  real = (tokens != _calibrate.PAD) & (tokens != _calibrate.BOS)
  if not real.any():
    raise errors.ShapeError('Calibration tokens hold nothing but padding.')
  width = model.config.embed_dim
  each = max(1, most_bytes // (int(real.sum()) * width * 2))
  for start in range(0, len(paths), each):
    some = paths[start : start + each]
    parts: dict[str, list[np.ndarray]] = {path: [] for path in some}
    step = _recorder(model, frozenset(some))
    for row, mask in tqdm.tqdm(
      zip(tokens, real), 'activations', len(tokens), disable=not progress
    ):
      found = jax.device_get(step(params, jnp.asarray(row[None])))
      for path in some:
        # Half the memory; the model's own type, mostly.
        kept = found[path][0][mask]
        parts[path].append(kept.astype(jnp.bfloat16))
    for path in some:
      yield path, np.concatenate(parts.pop(path)).astype(np.float32)


def _recorder(model: nn.Module, paths: frozenset[str]) -> Any:
  probe = _config.probe(model)

  def record(next_fun, args, kwargs, context):
    module = context.module
    if (
      context.method_name == '__call__'
      and '/'.join(module.path) in paths
      and not isinstance(module, _sites.EINSUMS)
    ):
      module.sow(_COLLECTION, 'x', args[0], reduce_fn=lambda _, x: x)
    return next_fun(*args, **kwargs)

  @jax.jit
  def step(params, tokens):
    with nn.intercept_methods(record):
      _, state = probe.apply({'params': params}, tokens, mutable=[_COLLECTION])
    flat = traverse_util.flatten_dict(state[_COLLECTION], sep='/')
    return {path.removesuffix('/x'): x for path, x in flat.items()}

  return step
