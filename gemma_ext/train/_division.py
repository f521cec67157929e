# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Division and removal of experts, in place of a layer of fixed shapes.

An expert divides into an empty slot such that the layer computes what it did.
How depends on what the router does with two that are alike:

- One expert a token (`k` 1; any router that tokens choose by): the new one is a
  copy, and its logit differs from the old one's by something tiny, which is
  above zero for half of the tokens of the old one. The larger one is chosen,
  with the weight one, whichever it is. What is so tiny an optimiser's next step
  undoes; if a share of the tokens may change hands, the two are moved as far
  apart as that allows, and what is cut is the gap between their tokens.
- 'norm' and a threshold, `k` no limit: both have the same logit, so that both
  run where the old one did, and each has half of its neurons. The others of
  both start anew, with nothing in the down projection.
- 'softmax' and every expert runs: the same, the halves twice as strong and the
  logits smaller by log 2.

Elsewhere the twin would take the place of another expert, and division is
refused.

Reference: Net2Net, arXiv 1511.05641, for growth that keeps the function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.nn import _moe

# By how much the logits of two copies differ, in deviations over tokens.
_TINY = 1e-4
# And at most, where some tokens may change hands: farther apart they would take
# tokens that no sample shows.
_FAR = 1.0

# Routers that may divide, as `_rule` has it.
_DIVIDE = ('norm', 'softmax', 'sigmoid')

_Edit = Callable[[str, jax.Array], jax.Array]


def live(params: Mapping[str, Any], mixture: gx_nn.Mixture) -> np.ndarray:
  """Slots of a layer that hold an expert, bool `[E]`."""
  bias = _layer(params, mixture)[_moe.ROUTER]['bias']
  return np.asarray(bias, np.float32) > _moe.DEAD / 2


def check_router(mixture: gx_nn.Mixture) -> None:
  """Raises `TrainError` if experts of such a router never divide."""
  if mixture.method.router not in _DIVIDE:
    raise errors.TrainError(
      f'{mixture.path!r} with router {mixture.method.router!r} cannot divide an'
      f' expert and compute the same; expected one of {_DIVIDE}.'
    )


def check(
  params: Mapping[str, Any],
  mixture: gx_nn.Mixture,
  *,
  least: int,
  most: int | None,
) -> None:
  """Refuses a layer that cannot divide an expert, with all it may grow to.

  Args:
    params: The parameters.
    mixture: The layer.
    least: Experts that it may fall to.
    most: Experts that it may grow to; all its slots by default.

  Raises:
    TrainError: If a division on the way would change the function, or the
      weights are packed.
  """
  slots = mixture.method.num_experts
  most = min(most or slots, slots)
  count = int(live(params, mixture).sum())
  if min(count, least) < most:
    # What holds for the last division does for those before.
    _rule(mixture, _layer(params, mixture)[_moe.ROUTER], most - 1)


def keep(
  params: Mapping[str, Any], mixture: gx_nn.Mixture, count: int
) -> dict[str, Any]:
  """Empties all slots of a layer but the first ones.

  Args:
    params: The parameters.
    mixture: The layer.
    count: Experts to keep.
  """
  for e in range(count, mixture.method.num_experts):
    params, _ = remove(params, None, mixture, e)
  return dict(params)


def divide(
  params: Mapping[str, Any],
  opt_state: Any,
  mixture: gx_nn.Mixture,
  parent: int,
  child: int,
  *,
  rng: np.random.Generator,
  inputs: Any = None,
  slip: float = 0.0,
) -> tuple[dict[str, Any], Any]:
  """Divides an expert into two; the layer computes what it did.

  Args:
    params: The parameters.
    opt_state: Of an optimiser, or `None`. Leaves that are named and shaped as
      those of the layer are carried along with the neurons, and are zero for
      neurons that start anew.
    mixture: The layer.
    parent: Who divides.
    child: An empty slot.
    rng: Chooses the neurons, or the direction.
    inputs: What the layer reads, `[N, D]`: copies then divide the parent's
      tokens in halves, across the direction in which they differ most.
    slip: Share of `inputs` that may go from one of the others to one of the
      two, or the other way round. With copies and routers that are not
      'sigmoid'; elsewhere there is no need, or no way.

  Returns:
    Both, with the same shapes.

  Raises:
    TrainError: If the router cannot, the weights are packed, or the slots are
      not as said.
  """
  layer = _layer(params, mixture)
  alive = live(params, mixture)
  if not alive[parent] or alive[child]:
    raise errors.TrainError(
      f'{mixture.path!r}: expert {parent} is to divide into slot {child}, but'
      f' slots in use are {np.flatnonzero(alive).tolist()}.'
    )
  router = layer[_moe.ROUTER]
  factor, shift = _rule(mixture, router, int(alive.sum()))
  pair = jnp.array([parent, child])
  back = 0.0  # Share of the direction that the parent moves back.
  if factor is None:
    edit = _copy(mixture, parent, child)
    direction, offset = _direction(mixture, router, parent, rng, inputs)
    if slip and inputs is not None and mixture.method.router != 'sigmoid':
      back = 0.5
      direction, offset, shift = _apart(
        router, parent, direction, np.asarray(inputs, np.float64), slip
      )
  else:
    first = np.zeros(mixture.size, bool)
    half = rng.permutation(mixture.size)[: mixture.size // 2]
    first[half] = True
    edit = _halve(mixture, parent, child, first)
    direction, offset = np.zeros(mixture.features), 0.0

  def final(name: str, leaf: jax.Array) -> jax.Array:
    leaf = edit(name, leaf)
    if name == 'w':
      w = leaf[child].astype(jnp.float32)
      both = jnp.stack([w - back * direction, w + (1 - back) * direction])
      return leaf.at[pair].set(both.astype(leaf.dtype))
    if name == 'bias':
      parts = jnp.array([back * offset, (back - 1) * offset]) - shift
      return leaf.at[pair].add(parts.astype(leaf.dtype))
    if factor is not None and name in (_moe.GATE, _moe.DOWN):
      return _anew(mixture, name, leaf, parent, child, first, factor, rng)
    return leaf

  # Moments first: they see the layer as it was.
  return _edited(params, mixture, final), _edited(opt_state, mixture, edit)


def remove(
  params: Mapping[str, Any],
  opt_state: Any,
  mixture: gx_nn.Mixture,
  expert: int,
) -> tuple[dict[str, Any], Any]:
  """Empties a slot: it never runs again, and its moments are zero.

  Args:
    params: The parameters.
    opt_state: As for `divide`.
    mixture: The layer.
    expert: The slot.
  """

  def kill(name: str, leaf: jax.Array) -> jax.Array:
    if name == 'bias':
      return leaf.at[expert].set(jnp.asarray(_moe.DEAD, leaf.dtype))
    return leaf

  def clear(name: str, leaf: jax.Array) -> jax.Array:
    if name in (_moe.GATE, _moe.DOWN):
      neurons = jnp.moveaxis(leaf, _axis(mixture, leaf), 0)
      neurons = neurons.at[_slice(mixture, expert)].set(0)
      return jnp.moveaxis(neurons, 0, _axis(mixture, leaf))
    return leaf.at[expert].set(0)

  return _edited(params, mixture, kill), _edited(opt_state, mixture, clear)


def weights(tree: Mapping[str, Any], mixture: gx_nn.Mixture) -> tuple[Any, Any]:
  """Gate and down of a layer, in parameters or gradients."""
  layer = _layer(tree, mixture)
  return layer[_moe.GATE], layer[_moe.DOWN]


def norms(
  gate: jax.Array, down: jax.Array, mixture: gx_nn.Mixture
) -> jax.Array:
  """Norm of the weights of every expert, or of their gradients, `[E]`."""
  total = jnp.zeros(mixture.method.num_experts)
  for leaf in (gate, down):
    square = jnp.square(leaf.astype(jnp.float32))
    neurons = jnp.moveaxis(square, _axis(mixture, leaf), 0)[mixture.shared :]
    total += neurons.reshape(mixture.method.num_experts, -1).sum(axis=1)
  return jnp.sqrt(total)


def similarity(
  params: Mapping[str, Any], mixture: gx_nn.Mixture, x: Any
) -> np.ndarray:
  """Cosines between what experts put out for the same inputs, `[E, E]`.

  Of two experts what counts is the inputs that one of them is chosen for.

  Args:
    params: The parameters.
    mixture: The layer.
    x: Inputs `[N, D]`.
  """
  layer = _layer(params, mixture)
  gate = layer[_moe.GATE]
  if _axis(mixture, gate) == 2:
    gate = jnp.swapaxes(gate, 1, 2)
  x = jnp.asarray(x, jnp.float32)
  # Routers of gates read the gates of all neurons.
  read = x if mixture.method.router != 'gate' else x @ gate[0].T
  choice = gx_nn.route(mixture.method, layer[_moe.ROUTER], read)
  return np.asarray(
    _cosines(
      x,
      gate[:, mixture.shared :].astype(jnp.float32),
      layer[_moe.DOWN][mixture.shared :].astype(jnp.float32),
      choice.gates() != 0,
    ),
    np.float64,
  )


@jax.jit
def _cosines(x, gate, down, chosen):
  count = chosen.shape[1]
  hidden = jax.nn.gelu(x @ gate[0].T) * (x @ gate[1].T)
  hidden = hidden.reshape(len(x), count, -1)
  down = down.reshape(count, -1, down.shape[-1])
  out = jnp.einsum('neh,ehd->ned', hidden, down)

  def add(total, each):
    out, mine = each
    products = out @ out.T
    either = mine[:, None] | mine[None]
    squares = jnp.broadcast_to(jnp.diag(products), products.shape)
    new = jnp.stack([products, squares, squares.T])
    return total + jnp.where(either, new, 0), None

  start = jnp.zeros((3, count, count))
  (products, one, other), _ = jax.lax.scan(add, start, (out, chosen))
  return products / jnp.sqrt(jnp.maximum(one * other, 1e-30))


def _rule(
  mixture: gx_nn.Mixture, router: Mapping[str, Any], count: int
) -> tuple[float | None, float]:
  """How the layer's experts divide, see the file.

  Returns:
    What halves are multiplied by, `None` for copies; what logits fall by.
  """
  method = mixture.method
  check_router(mixture)
  k = min(int(router['k']), method.top_k)
  threshold = float(router['threshold']) > _moe.NONE / 2
  if k == 1:
    return None, 0.0
  if k > count and mixture.size > 1:
    if method.router == 'norm':
      return 1.0, 0.0
    if method.router == 'softmax' and not threshold:
      return 2.0, math.log(2)
  raise errors.TrainError(
    f'{mixture.path!r} with router {method.router!r}, k={k} and {count} experts'
    ' cannot divide one and compute the same. It can with k=1, and with k above'
    " the number of experts if the router is 'norm', or 'softmax' without a"
    ' threshold.'
  )


def _direction(
  mixture: gx_nn.Mixture,
  router: Mapping[str, Any],
  parent: int,
  rng: np.random.Generator,
  inputs: Any,
) -> tuple[np.ndarray, float]:
  """What is added to a copy's row, and taken from its bias."""
  direction = rng.standard_normal(mixture.features)
  direction /= np.linalg.norm(direction)
  if inputs is None:
    return _TINY * direction, 0.0
  x = jnp.asarray(inputs)
  choice = gx_nn.route(mixture.method, router, x)
  mine = np.asarray(x, np.float64)[np.asarray(choice.chosen)[:, 0] == parent]
  if len(mine) < 2:
    return _TINY * direction, 0.0
  centred = mine - mine.mean(axis=0)
  values, vectors = np.linalg.eigh(centred.T @ centred / len(mine))
  direction = vectors[:, -1] * rng.choice([-1, 1])
  direction *= _TINY / math.sqrt(max(values[-1], 1e-12))
  if mixture.method.router != 'sigmoid':
    return direction, float(np.median(mine @ direction))
  # There the bias is added to the sigmoid.
  logit = mine @ np.asarray(router['w'], np.float64)[parent]
  score = special.expit(logit + mine @ direction) - special.expit(logit)
  return direction, float(np.median(score))


def _apart(
  router: Mapping[str, Any],
  parent: int,
  direction: np.ndarray,
  x: np.ndarray,
  slip: float,
) -> tuple[np.ndarray, float, float]:
  """A longer direction, where it is cut, and by how much both logits fall."""
  w, bias = (np.asarray(router[n], np.float64) for n in ('w', 'bias'))
  logits = x @ w.T + bias
  mine = logits.argmax(axis=1) == parent
  along = x @ direction
  spread = along[mine].std() if mine.any() else 0.0
  if mine.sum() < 2 or not spread:
    return direction, 0.0, 0.0
  cut = _gap(along[mine])
  along = np.abs(along - cut) / spread
  typical = np.median(along[mine])
  rest = np.delete(logits, parent, axis=1).max(axis=1, initial=_moe.DEAD)
  found = 0.0
  for scale in np.geomspace(_TINY, _FAR, 24):
    best = logits[:, parent] + scale / 2 * (along - typical)
    if ((best > rest) != mine).mean() > slip:
      break
    found = scale
  factor = found / spread
  return factor * direction, factor * cut, found / 2 * typical


def _gap(values: np.ndarray) -> float:
  """The cut of numbers in two groups of least variance, a tenth or more each.

  Reference: Otsu, "A threshold selection method from gray-level histograms",
  IEEE Transactions on Systems, Man and Cybernetics 9, 1979.
  """
  values = np.sort(values)
  total = len(values)
  first = np.arange(1, total)
  sums = np.cumsum(values)[:-1]
  means = sums / first - (values.sum() - sums) / (total - first)
  between = first * (total - first) * means**2
  least = min(max(1, total // 10), total // 2)
  part = slice(least - 1, total - least)
  at = least - 1 + int(np.argmax(between[part]))
  return float(values[at] + values[at + 1]) / 2


def _copy(mixture: gx_nn.Mixture, parent: int, child: int) -> _Edit:
  def edit(name: str, leaf: jax.Array) -> jax.Array:
    if name not in (_moe.GATE, _moe.DOWN):
      return leaf.at[child].set(leaf[parent])
    axis = _axis(mixture, leaf)
    neurons = jnp.moveaxis(leaf, axis, 0)
    neurons = neurons.at[_slice(mixture, child)].set(
      neurons[_slice(mixture, parent)]
    )
    return jnp.moveaxis(neurons, 0, axis)

  return edit


def _halve(
  mixture: gx_nn.Mixture, parent: int, child: int, first: np.ndarray
) -> _Edit:
  """Copies, and zeros for the neurons that the other one has."""
  copy = _copy(mixture, parent, child)

  def edit(name: str, leaf: jax.Array) -> jax.Array:
    leaf = copy(name, leaf)
    if name not in (_moe.GATE, _moe.DOWN):
      return leaf
    axis = _axis(mixture, leaf)
    neurons = jnp.moveaxis(leaf, axis, 0)
    for expert, mine in ((parent, first), (child, ~first)):
      mask = jnp.asarray(mine, leaf.dtype)
      mask = mask.reshape(-1, *(1,) * (neurons.ndim - 1))
      neurons = neurons.at[_slice(mixture, expert)].multiply(mask)
    return jnp.moveaxis(neurons, 0, axis)

  return edit


def _anew(
  mixture: gx_nn.Mixture,
  name: str,
  leaf: jax.Array,
  parent: int,
  child: int,
  first: np.ndarray,
  factor: float,
  rng: np.random.Generator,
) -> jax.Array:
  """Halves as strong as they have to be; gates drawn for the new neurons."""
  axis = _axis(mixture, leaf)
  neurons = jnp.moveaxis(leaf, axis, 0)
  for expert, mine in ((parent, first), (child, ~first)):
    part = neurons[_slice(mixture, expert)]
    if name == _moe.DOWN:
      part = part * jnp.asarray(factor, leaf.dtype)
    else:
      old = np.asarray(part, np.float32)[mine]
      drawn = rng.normal(old.mean(), old.std(), part.shape)
      mask = mine.reshape(-1, *(1,) * (part.ndim - 1))
      part = jnp.where(mask, part, jnp.asarray(drawn, leaf.dtype))
    neurons = neurons.at[_slice(mixture, expert)].set(part)
  return jnp.moveaxis(neurons, 0, axis)


def _slice(mixture: gx_nn.Mixture, expert: int) -> slice:
  start = mixture.shared + expert * mixture.size
  return slice(start, start + mixture.size)


def _axis(mixture: gx_nn.Mixture, leaf: Any) -> int:
  """Axis of the neurons: official models have gates either way round."""
  if leaf.ndim == 2:
    return 0
  return 2 - (leaf.shape[1:] == (mixture.hidden, mixture.features))


def _layer(tree: Mapping[str, Any], mixture: gx_nn.Mixture) -> Mapping:
  for name in mixture.path.split('/'):
    tree = tree[name]
  packed = [n for n in (_moe.GATE, _moe.DOWN) if isinstance(tree[n], Mapping)]
  if packed:
    raise errors.TrainError(
      f'{mixture.path}/{packed[0]} is packed; experts divide and die while'
      ' weights are dense. Compress them afterwards.'
    )
  return tree


def _edited(tree: Any, mixture: gx_nn.Mixture, edit: _Edit) -> Any:
  """Edits all leaves that are named and shaped as those of the layer."""
  count = mixture.method.num_experts
  shapes: dict[tuple[str, ...], set[tuple[int, ...]]] = {
    (_moe.GATE,): {
      (2, mixture.hidden, mixture.features),
      (2, mixture.features, mixture.hidden),
    },
    (_moe.DOWN,): {(mixture.hidden, mixture.features)},
    (_moe.ROUTER, 'w'): {(count, mixture.features)},
    (_moe.ROUTER, 'bias'): {(count,)},
  }
  place = tuple(mixture.path.split('/'))

  def one(path: Any, leaf: Any) -> Any:
    names = tuple(str(getattr(key, 'key', '')) for key in path)
    for name, fitting in shapes.items():
      whole = (*place, *name)
      if names[-len(whole) :] == whole and np.shape(leaf) in fitting:
        return edit(name[-1], jnp.asarray(leaf))
    return leaf

  return jax.tree_util.tree_map_with_path(one, tree)
