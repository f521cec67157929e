# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""How many experts each layer gets: what leaving some out costs, and a choice.

Layers differ by an order of magnitude in what it costs to leave experts out. A
router of the kind 'norm' estimates what each expert would contribute, so that
the share of a layer's output that is lost follows from its logits, for every k
at once; what a share costs in nats is measured, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import heapq
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.compress import _calibrate
from gemma_ext.compress import _divergence
from gemma_ext.nn import _moe

# Shares of `top_k` at which a layer's cost is measured.
_MEASURED = (0.75, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves:
  """What running k experts of a layer costs.

  Attributes:
    lost: By layer, the share of the squared norm of what the routed experts
      contribute that is lost if the k best run: float64 `[E + 1]`.
    nats: By layer, what a loss of everything would cost by the slope that was
      measured, in nats a token; times `lost` it is a cost.
    sizes: By layer, parameters of an expert.
    shared: By layer, parameters of the shared experts.
    most: By layer, the most experts that a token may get; all of them in layers
      that are left out.
  """

  lost: dict[str, np.ndarray]
  nats: dict[str, float]
  sizes: dict[str, int]
  shared: dict[str, int]
  most: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def parameters(self) -> int:
    """Parameters of all experts of all layers."""
    return sum(
      self.shared[path] + (len(lost) - 1) * self.sizes[path]
      for path, lost in self.lost.items()
    )

  def active(self, k: Mapping[str, int]) -> float:
    """Returns the share of all these parameters that k experts a layer are."""
    some = sum(self.shared[p] + k[p] * self.sizes[p] for p in self.lost)
    return some / self.parameters

  def cost(self, k: Mapping[str, int]) -> float:
    """Returns the predicted divergence from all experts, nats a token."""
    return float(sum(self.nats[p] * self.lost[p][k[p]] for p in self.lost))

  def limit(self, path: str) -> int:
    """Returns the most experts that a token may get in a layer."""
    return self.most.get(path, len(self.lost[path]) - 1)

  def to_json(self) -> dict[str, Any]:
    """Returns JSON values."""
    return {
      'lost': {p: [float(v) for v in row] for p, row in self.lost.items()},
      'nats': self.nats,
      'sizes': self.sizes,
      'shared': self.shared,
      'most': self.most,
    }


def curves(
  model: gx_nn.Compressed,
  params: Mapping[str, Any],
  tokens: Any,
  *,
  progress: bool = False,
) -> Curves:
  """Measures the curves of every mixture of a model.

  Takes some forward passes for each layer. Divergences are from the model with
  `top_k` experts in every layer; what a layer with one expert costs is not
  known, and taken to be nothing.

  Args:
    model: The model.
    params: Its parameters.
    tokens: Token ids `[batch, length]`, padded with 0; a few windows do.
    progress: Whether to show a progress bar.

  Raises:
    RecipeError: If the model has no mixtures, or their routers are not of the
      kind 'norm'.
    ShapeError: If `tokens` is not a non-empty integer matrix.
  """
  tokens = _calibrate.check_tokens(tokens)
  mixtures = mixtures_in(model)
  params = with_experts(model, params, 1.0)
  lost = _lost(model, params, tokens, mixtures)
  most = {path: m.method.top_k for path, m in mixtures.items()}
  fewer = {
    path: sorted({max(1, round(share * top)) for share in _MEASURED} - {top})
    for path, top in most.items()
  }
  found, counts = _divergence.divergences_of_many(
    model,
    params,
    model,
    {
      f'{path}:{k}': with_experts(model, params, {path: k})
      for path, some in fewer.items()
      for k in some
    },
    tokens,
    progress='cost of experts' if progress else '',
  )
  nats = {}
  for path, some in fewer.items():
    # What `top_k` loses, the model that is compared with has lost as well.
    pairs = [
      (
        found[f'{path}:{k}'].sum() / max(counts.sum(), 1.0),
        lost[path][k] - lost[path][most[path]],
      )
      for k in some
    ]
    # The slope through 0 that fits all.
    top = sum(cost * share for cost, share in pairs)
    nats[path] = top / max(sum(share**2 for _, share in pairs), 1e-12)
  return Curves(
    lost=lost,
    nats=nats,
    sizes={p: 3 * m.size * m.features for p, m in mixtures.items()},
    shared={p: 3 * m.shared * m.features for p, m in mixtures.items()},
    most=most,
  )


def mixtures_in(model: nn.Module) -> dict[str, gx_nn.Mixture]:
  """Returns the mixtures of a model by path.

  Raises:
    RecipeError: If it has none, or their routers estimate no norms.
  """
  found = {}
  if isinstance(model, gx_nn.Compressed):
    found = gx_nn.mixtures_of(model.model, model.recipe)
  kinds = sorted({m.method.router for m in found.values()})
  if not kinds or set(kinds) - {'norm', 'gate'}:
    raise errors.RecipeError(
      "Expected a model with mixtures whose routers are 'norm' or 'gate', as"
      f' carving makes them, got {kinds or "no mixtures"}.'
    )
  return found


def routed(model: nn.Module) -> dict[str, gx_nn.Mixture]:
  """Returns all layers with a router, by path: a recipe's, and Gemma 4's own.

  Args:
    model: The model; one that is not `Compressed` has none.
  """
  if not isinstance(model, gx_nn.Compressed):
    return {}
  return gx_nn.mixtures_of(model.model, model.recipe) | gx_nn.native_mixtures(
    model.model
  )


def choose(found: Curves, active: float) -> dict[str, int]:
  """Chooses k for every layer, at the least predicted cost.

  Args:
    found: The curves.
    active: Share of the parameters of all experts, shared ones among them, that
      a token may use on average over layers, in (0, 1].

  Returns:
    Experts by layer, from one to the most that a token may get there.

  Raises:
    RecipeError: If there is no such choice.
  """
  k = dict.fromkeys(found.lost, 1)
  left = active * found.parameters - found.active(k) * found.parameters
  if not 0 < active <= 1 or left < -1e-6 * found.parameters:
    raise errors.RecipeError(
      f'{active=} cannot be had: one expert in each layer, beside the shared'
      f' ones, already is {found.active(k):.3f}, and 1 is all of them.'
    )

  def gain(path: str) -> float:
    row = found.lost[path]
    drop = row[k[path]] - row[k[path] + 1]
    return found.nats[path] * drop / found.sizes[path]

  # The curves fall ever more slowly, so that the greedy choice is the best.
  heap = [(-gain(p), p) for p in found.lost if found.limit(p) > 1]
  heapq.heapify(heap)
  while heap:
    _, path = heapq.heappop(heap)
    if found.sizes[path] > left + 1e-6:
      continue
    left -= found.sizes[path]
    k[path] += 1
    if k[path] < found.limit(path):
      heapq.heappush(heap, (-gain(path), path))
  return k


def with_experts(
  model: gx_nn.Compressed,
  params: Mapping[str, Any],
  k: Mapping[str, int] | float,
) -> dict[str, Any]:
  """Returns parameters with which tokens get so many experts at most.

  Nothing is compiled anew: the number is one of the parameters. Layers that
  Gemma 4 has of its own get it too; the weights of the experts that are left
  still sum to one.

  Args:
    model: The model.
    params: Its parameters.
    k: Number by layer, others as they are; or a share of `top_k` for all.

  Raises:
    RecipeError: If there is no such layer or number, or its router is
      'expert_choice', which does not ask how many.
  """
  mixtures = routed(model)
  check_number(mixtures, k if isinstance(k, Mapping) else mixtures)
  if isinstance(k, (int, float)):
    k = {p: max(1, round(k * m.method.top_k)) for p, m in mixtures.items()}
  flat = dict(traverse_util.flatten_dict(dict(params), sep='/'))
  for path, number in k.items():
    most = mixtures[path].method.top_k if path in mixtures else 0
    if not 1 <= number <= most:
      raise errors.RecipeError(
        f'{number} experts for {path!r}, which may have 1 to {most}.'
        if most
        else f'{path!r} is no mixture; there are {list(mixtures)[:3]} ...'
      )
    flat[f'{path}/{_moe.ROUTER}/k'] = jnp.int32(number)
  return traverse_util.unflatten_dict(flat, sep='/')


def check_number(
  mixtures: Mapping[str, gx_nn.Mixture], paths: Iterable[str]
) -> None:
  """Raises RecipeError if a layer's experts are not as many as one says.

  Args:
    mixtures: By path.
    paths: Of the layers in question.
  """
  for path in paths:
    method = mixtures[path].method if path in mixtures else None
    if method is not None and method.router == 'expert_choice':
      raise errors.RecipeError(
        f"The router of {path!r} is 'expert_choice': experts take their tokens,"
        ' as many as its `top_k` says, and no number or budget at run time'
        ' changes that.'
      )


def _lost(
  model: gx_nn.Compressed,
  params: Mapping[str, Any],
  tokens: np.ndarray,
  mixtures: Mapping[str, gx_nn.Mixture],
) -> dict[str, np.ndarray]:
  """Mean over tokens of the share beyond the k best, by the router."""
  sums = {p: np.zeros(m.method.num_experts + 1) for p, m in mixtures.items()}
  count = 0
  for window in tokens:
    found = jax.device_get(_compiled(model)(params, jnp.asarray(window[None])))
    real = (window != _calibrate.PAD) & (window != _calibrate.BOS)
    count += int(real.sum())
    for path in sums:
      sums[path] += found[path][0][real].astype(np.float64).sum(axis=0)
  return {path: value / max(count, 1) for path, value in sums.items()}


@functools.lru_cache(maxsize=2)
def _compiled(model: gx_nn.Compressed) -> Any:
  @jax.jit
  def run(params, tokens):
    _, state = model.apply(
      {'params': params}, tokens, mutable=['intermediates']
    )
    flat = traverse_util.flatten_dict(state['intermediates'], sep='/')
    out = {}
    for path, (value,) in flat.items():
      if path.endswith(f'/{_moe.SOWN}'):
        share = jax.nn.softmax(value['logits'], axis=-1)
        falling = -jnp.sort(-share, axis=-1)
        beyond = 1 - jnp.cumsum(falling, axis=-1)
        ones = jnp.ones_like(beyond[..., :1])
        out[path.removesuffix(f'/{_moe.SOWN}')] = jnp.maximum(
          jnp.concatenate([ones, beyond], axis=-1), 0
        )
    return out

  return run
