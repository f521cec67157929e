# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of routers: losses, balancing, and what is watched meanwhile.

All of it reads what mixtures sow as 'routing'. Kauldron collects that by itself
and has it at `interms`, so that a config needs no more than

    cfg.train_losses['balance'] = gx.train.LoadBalance(weight=1e-2)
    cfg.train_metrics['entropy'] = gx.train.RoutingEntropy()
    cfg.trainstep = gx.train.BalancedStep(rate=1e-3)  # 'sigmoid' routers
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from kauldron import kd
from kauldron import kontext
import numpy as np

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.nn import _moe
from gemma_ext.train import _branch

Routing = dict[str, dict[str, jax.Array]]


def routing(intermediates: Mapping[str, Any]) -> Routing:
  """Finds what mixtures have sown.

  Args:
    intermediates: The collection, as `apply(..., mutable=['intermediates'])`
      returns it; `context.interms` in kauldron.

  Returns:
    By the path of a feed-forward layer: 'load' `[E]`, the share of tokens that
    an expert got; 'probability' `[E]`; 'live' `[E]`, 0 for an empty slot; 'z';
    'active'. Means, where a layer ran more than once.

  Raises:
    ParamsMismatchError: If there is nothing, as the model has no mixture.
  """
  found: Routing = {}

  def walk(tree: Mapping[str, Any], path: tuple[str, ...]) -> None:
    for name, value in tree.items():
      if name == _moe.SOWN and isinstance(value, tuple):
        mean = lambda *x: sum(x) / len(x)
        found['/'.join(path)] = dict(jax.tree.map(mean, *value))
      elif isinstance(value, Mapping):
        walk(value, (*path, name))

  walk(intermediates, ())
  if not found:
    raise errors.ParamsMismatchError(
      'No router has run: expected a model with `MoE` rules, and'
      " 'intermediates' among the collections that are mutable."
    )
  return found


def load_balance(found: Routing) -> jax.Array:
  """Returns the load-balancing loss of every layer `[N]`.

  `E * sum_e f_e p_e`, f being the shares of the choices that the experts got,
  p the mean probabilities. One if all experts are alike, E if there is but one
  in use. Gradients pass through p.

  Args:
    found: As `routing` returns it.

  Reference: Switch Transformers, arXiv 2101.03961, section 2.2; with more than
  one expert a token, f is divided by how many it got.
  """
  losses = []
  for each in found.values():
    load = each['load'] / jnp.maximum(each['load'].sum(), 1e-9)
    load = jax.lax.stop_gradient(load)
    losses.append(_live(each).sum() * (load * each['probability']).sum())
  return jnp.stack(losses)


def router_z(found: Routing) -> jax.Array:
  """Returns the mean squared log-partition of every router `[N]`.

  Keeps logits small enough for their rounding not to matter.

  Args:
    found: As `routing` returns it.

  Reference: ST-MoE, arXiv 2202.08906, equation 5.
  """
  return jnp.stack([each['z'] for each in found.values()])


def balance(
  params: Mapping[str, Any],
  intermediates: Mapping[str, Any],
  rate: float = 1e-3,
) -> dict[str, Any]:
  """Moves the biases of routers towards equal loads, without any loss.

  Made for 'sigmoid' routers, whose bias takes part in the choice alone. Call it
  after every step, also under `jit`. Biases should be float32: in bfloat16 a
  step of 1e-3 is lost once they exceed a quarter.

  Args:
    params: The parameters.
    intermediates: What the model has sown in the step.
    rate: By how much a bias moves: up where the load is below the mean of the
      experts that are there, else down.

  Returns:
    The parameters with other biases.

  Reference: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
  """
  flat = dict(_branch.flatten(params))
  for path, each in routing(intermediates).items():
    name = f'{path}/{_moe.ROUTER}/bias'
    bias = flat[name]
    live = bias > _moe.DEAD / 2
    mean = (each['load'] * live).sum() / jnp.maximum(live.sum(), 1)
    step = rate * jnp.sign(mean - each['load'])
    flat[name] = jnp.where(live, bias + step.astype(bias.dtype), bias)
  return _branch.unflatten(flat)


def floating(tree: Any) -> Any:
  """Which leaves an optimiser can move: a mask for `optax.masked`.

  Routers hold an integer, 'k', and packed weights do, whose gradients no
  optimiser takes:

      optax.chain(
        optax.masked(optax.adam(1e-3), gx.train.floating),
        gx.nn.freeze_codes(),
      )

  Args:
    tree: Parameters, or gradients.
  """
  return jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), tree)


def measure(model: Any, params: Mapping[str, Any], tokens: Any) -> Routing:
  """Returns the routing of a model on some text, see `routing`.

  Args:
    model: A `gx.nn.Compressed` with mixtures.
    params: Its parameters.
    tokens: Token ids `[batch, length]`, which run a row at a time.
  """

  @jax.jit
  def step(params, row):
    _, state = model.apply({'params': params}, row, mutable=['intermediates'])
    return routing(state['intermediates'])

  rows = np.asarray(tokens)
  if rows.ndim != 2 or not rows.size:
    raise errors.ShapeError(
      f'Tokens are [batch, length] and not empty, got shape {rows.shape}.'
    )
  parts = [jax.device_get(step(params, row[None])) for row in rows]
  return jax.tree.map(lambda *x: np.mean(x, axis=0), *parts)


# ------------------------------ for a Trainer --------------------------------


@dataclasses.dataclass(eq=True, frozen=True, kw_only=True)
class LoadBalance(kd.losses.Loss):
  """`load_balance`, the mean over the layers. A weight of 1e-2 is usual."""

  interms: kontext.Key = 'interms'

  def get_values(self, interms: Any) -> Any:
    return load_balance(routing(interms))


@dataclasses.dataclass(eq=True, frozen=True, kw_only=True)
class RouterZ(kd.losses.Loss):
  """`router_z`, the mean over the layers. A weight of 1e-3 is usual."""

  interms: kontext.Key = 'interms'

  def get_values(self, interms: Any) -> Any:
    return router_z(routing(interms))


@dataclasses.dataclass(kw_only=True, eq=False, frozen=True)
class BalancedStep(kd.train.TrainStep):
  """Kauldron's training step, and `balance` after it.

  Attributes:
    rate: See `balance`.
  """

  rate: float = 1e-3

  def __post_init__(self):
    if not 0 < self.rate < 1:
      raise errors.ConfigError(
        f'BalancedStep.rate must be in (0, 1), got {self.rate!r}.'
      )

  def update_from_root_cfg(self, root_cfg: Any) -> Any:
    """Takes what it needs from the trainer.

    Raises:
      ConfigError: If the model has a router that is not 'sigmoid': its bias
        would change what the model computes, not only where.
    """
    model = root_cfg.model
    while model is not None and not isinstance(model, gx_nn.Compressed):
      model = vars(model).get('model')
    layers = {} if model is None else _mixtures(model)
    other = [p for p, m in layers.items() if m.method.router != 'sigmoid']
    if other or not layers:
      raise errors.ConfigError(
        "BalancedStep needs a model whose mixtures have 'sigmoid' routers, got"
        f' {other[:3] or "no mixture"}. For others there is `LoadBalance`.'
      )
    return super().update_from_root_cfg(root_cfg)

  def _step(self, state: Any, batch: Any) -> tuple[Any, Any]:
    after, context = super()._step(state, batch)
    params = balance(after.params, context.interms, self.rate)
    return after.replace(params=params), context


def _mixtures(model: gx_nn.Compressed) -> dict[str, gx_nn.Mixture]:
  return gx_nn.mixtures_of(model.model, model.recipe)


@dataclasses.dataclass(eq=True, frozen=True, kw_only=True)
class _RoutingMetric(kd.metrics.Metric):
  """A number of each layer's routing; of all batches, the layers' mean."""

  interms: kontext.Key = 'interms'

  @struct.dataclass
  class State(kd.metrics.AutoState):
    """Sums over batches."""

    found: Any = kd.metrics.sum_field()
    count: Any = kd.metrics.sum_field()

    def compute(self) -> Any:
      final = super().compute()
      mean = {
        path: {k: np.asarray(v) / final.count for k, v in each.items()}
        for path, each in final.found.items()
      }
      return self.parent.summary([self.parent.of(x) for x in mean.values()])

  def get_state(self, interms: Any) -> Any:
    return self.State(found=routing(interms), count=jnp.float32(1))

  @abc.abstractmethod
  def of(self, each: Mapping[str, Any]) -> float:
    """The number of one layer."""

  def summary(self, values: list[float]) -> float:
    """The number of all layers."""
    return float(np.mean(values))


@dataclasses.dataclass(eq=True, frozen=True, kw_only=True)
class RoutingEntropy(_RoutingMetric):
  """Entropy of the loads over log E: 1 if equal, 0 if one expert has all."""

  def of(self, each: Mapping[str, Any]) -> float:
    return entropy(each)


@dataclasses.dataclass(eq=True, frozen=True, kw_only=True)
class ExpertUtilisation(_RoutingMetric):
  """Share of the experts that are in use.

  Attributes:
    least: Of the mean load, what an expert in use gets.
  """

  least: float = 0.5

  def of(self, each: Mapping[str, Any]) -> float:
    return float((relative_load(each) >= self.least).mean())


@dataclasses.dataclass(eq=True, frozen=True, kw_only=True)
class LargestLoad(_RoutingMetric):
  """Load of the busiest expert of all layers, relative to its layer's mean."""

  def of(self, each: Mapping[str, Any]) -> float:
    return float(relative_load(each).max())

  def summary(self, values: list[float]) -> float:
    return max(values)


@dataclasses.dataclass(eq=True, frozen=True, kw_only=True)
class SmallestLoad(_RoutingMetric):
  """Load of the idlest expert of all layers, relative to its layer's mean."""

  def of(self, each: Mapping[str, Any]) -> float:
    return float(relative_load(each).min())

  def summary(self, values: list[float]) -> float:
    return min(values)


@dataclasses.dataclass(eq=True, frozen=True, kw_only=True)
class ActiveShare(_RoutingMetric):
  """Share of the neurons of mixtures that ran."""

  def of(self, each: Mapping[str, Any]) -> float:
    return float(each['active'])


def relative_load(each: Mapping[str, Any]) -> np.ndarray:
  """Loads of the experts that are there, relative to their mean.

  Args:
    each: The routing of a layer.
  """
  load = np.asarray(each['load'], np.float64)[np.asarray(_live(each)) > 0]
  return load / max(load.mean(), 1e-12)


def entropy(each: Mapping[str, Any]) -> float:
  """Entropy of the loads of a layer, over that of equal ones.

  Args:
    each: The routing of the layer.
  """
  share = relative_load(each)
  if len(share) < 2:
    return 1.0
  share = share[share > 0] / share.sum()
  return float(-(share * np.log(share)).sum() / np.log(len(_used(each))))


def _used(each: Mapping[str, Any]) -> np.ndarray:
  return np.flatnonzero(np.asarray(_live(each)))


def _live(each: Mapping[str, Any]) -> Any:
  """1 for the experts that are there, in use or not."""
  return (each['live'] > 0).astype(each['probability'].dtype)


def plot(found: Mapping[str, Mapping[str, Any]], path: Any) -> None:
  """Writes a PNG: load and entropy by layer.

  Args:
    found: As `measure` returns it.
    path: The file.

  Raises:
    OptionalDependencyError: If matplotlib is not installed.
  """
  try:
    import matplotlib.figure
  except ImportError as e:
    raise errors.OptionalDependencyError(
      "The picture needs matplotlib: pip install 'gemma_ext[notebook]'."
    ) from e
  figure = matplotlib.figure.Figure(figsize=(8.4, 5.4), layout='constrained')
  top, bottom = figure.subplots(2, sharex=True, height_ratios=(2, 1))
  layers = range(len(found))
  for layer, each in zip(layers, found.values(), strict=True):
    load = relative_load(each)
    top.plot([layer] * len(load), load, 'o', color='#0072B2', ms=5, alpha=0.6)
  for level in (0.5, 1, 2):
    top.axhline(level, color='#767676', lw=0.8, ls='-' if level == 1 else '--')
  top.set_yscale('log', base=2)
  top.set_ylabel("load of an expert\nrelative to the layer's mean")
  bottom.plot(
    layers, [entropy(each) for each in found.values()], 'o-', color='#D55E00'
  )
  bottom.set_ylim(min(0.8, *(entropy(x) for x in found.values())) - 0.02, 1.02)
  bottom.set_ylabel('entropy / log E')
  bottom.set_xlabel('layer')
  bottom.set_xticks(list(layers))
  for axis in (top, bottom):
    axis.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=120)
