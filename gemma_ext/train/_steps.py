# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`EvolutionStep` and `MezoStep`: kauldron's training step without gradients.

They take the place of `kd.train.TrainStep` in a `kd.train.Trainer`, whose data,
losses, checkpoints, metrics and evaluators stay as they are:

    kd.train.Trainer(
      ...,
      optimizer=None,
      trainstep=gx.train.MezoStep(method=gx.train.Mezo(steps=1000)),
    )
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from kauldron import kd
from kauldron.train import train_step
from kauldron.utils import utils
import optax

from gemma_ext import _patterns
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.train import _branch
from gemma_ext.train import _evolution
from gemma_ext.train import _mezo
from gemma_ext.train import _problem
from gemma_ext.train import _reward

_Flat = dict[str, jax.Array]
# Evolution moves codes by whole steps between these.
_TERNARY = (-1, 1)


@dataclasses.dataclass(kw_only=True, eq=False, frozen=True)
class _ForwardStep(kd.train.TrainStep):
  """A step that knows the model by its losses only; see the subclasses."""

  method: Any
  weights: str = '.*'
  # The trainer's own would be one of gradients: nothing reads it here.
  optimizer: optax.GradientTransformation = dataclasses.field(
    default_factory=optax.identity
  )

  def __post_init__(self):
    _patterns.check(self.weights)

  def update_from_root_cfg(self, root_cfg: Any) -> Any:
    """Takes what it needs from the trainer.

    Raises:
      ConfigError: If the trainer has an optimizer, has no losses, or takes
        more steps than the method is made for.
    """
    name = type(self).__name__
    if root_cfg.optimizer is not None:
      raise errors.ConfigError(
        f'Trainer.optimizer would do nothing: {name} takes its own steps. Set'
        ' optimizer=None.'
      )
    if not root_cfg.train_losses:
      raise errors.ConfigError(
        f'Trainer.train_losses is empty, so {name} has nothing to lower.'
      )
    steps = root_cfg.num_train_steps
    if steps is not None and steps > self.method.steps:
      raise errors.ConfigError(
        f'Trainer.num_train_steps={steps}, but the learning rate of {name}'
        f' falls over {self.method.steps} steps. Set {name}.method.steps to'
        ' cfg.ref.num_train_steps.'
      )
    return super().update_from_root_cfg(root_cfg)

  def step(self, state: Any, batch: Any, **kwargs: Any) -> Any:
    """As that of `kd.train.TrainStep`.

    Raises:
      RewardError: If a `TaskReward` among the losses failed.
    """
    rewards = [
      x for x in self.aux.losses.values() if isinstance(x, _reward.TaskReward)
    ]
    out = super().step(state, batch, **kwargs)
    if rewards:
      # What failed on the host is only known once the step is done.
      jax.block_until_ready(out)
    for reward in rewards:
      reward.reraise()
    return out

  @utils.checkify_ignore
  @functools.partial(
    jax.jit, static_argnames='self', donate_argnames=('state',)
  )
  def _init_optimizer(self, state: Any) -> Any:
    moving = self._open(state.params)
    key = jax.random.key(self.rng_streams.seed)
    opt_state = {'moving': moving, 'method': self.method.init(moving, key)}
    state = state.replace(opt_state=opt_state)
    return kd.sharding.with_sharding_constraint(state, self.sharding.state)

  def _step(self, state: Any, batch: Any) -> tuple[Any, Any]:
    context = kd.train.Context.from_state_and_batch(state=state, batch=batch)
    forward = functools.partial(
      train_step.forward_with_loss,
      model=self.model,
      losses=self.aux.losses,
      # The same for all trials, so that they differ by their weights only.
      rngs=self.rng_streams.train_rngs(state.step),
      is_training=True,
    )

    def loss(moving: _Flat, context: Any) -> jax.Array:
      trial = self._trial(context.params, moving)
      value, _ = forward(context.replace(params=trial))
      return value.astype(jnp.float32)

    # Of the seed and the step alone, so that a resumed run draws the same.
    key = jax.random.key(self.rng_streams.seed)
    moving, method, _ = self.method.update(
      _problem.Problem(loss=loss),
      state.opt_state['moving'],
      state.opt_state['method'],
      context,
      jax.random.fold_in(key, state.step),
    )
    params = self._close(state.params, moving)
    # One pass as the weights are, for metrics; XLA drops it where none is read.
    _, context = forward(context)
    next_state = state.replace(
      step=state.step + 1,
      params=params,
      opt_state={'moving': moving, 'method': method},
      collections=context.collections,
    )
    context = context.replace(
      updates=jax.tree.map(_difference, params, state.params)
    )
    return next_state, self.aux.update_context(context)

  def _open(self, params: Mapping[str, Any]) -> _Flat:
    """What moves, by path, in the form that the method moves."""
    form = self.method.codes
    packed = self._packed()
    flat = _branch.flatten(params)
    found: _Flat = {}
    for path, leaf in flat.items():
      if not _patterns.matches(self.weights, path):
        continue
      if path in packed:
        fmt, cols = packed[path]
        if form == 'latent':
          found[path] = fmt.unpack(leaf, cols).astype(jnp.float32)
        elif form == 'integer' and fmt.code_range == _TERNARY:
          found[path] = fmt.unpack(leaf, cols)
      elif jnp.issubdtype(leaf.dtype, jnp.floating):
        # A copy also of float32: the step donates both.
        found[path] = jnp.array(leaf, jnp.float32, copy=True)
    if not found:
      raise errors.TrainError(
        f'{type(self).__name__}.weights={self.weights!r} matches nothing that'
        f' moves; the nearest: {_patterns.near_misses(self.weights, [*flat])}.'
        f' Integers stay as they are unless the method moves codes, and'
        f' {type(self.method).__name__}.form is {form!r}.'
      )
    return found

  def _trial(self, params: Mapping[str, Any], moving: _Flat) -> dict[str, Any]:
    """Parameters with what moves in place, codes not packed."""
    flat = _branch.flatten(params)
    packed = self._packed()
    for path, leaf in moving.items():
      # Unpacked codes are floats, which the model rounds.
      dtype = jnp.float32 if path in packed else flat[path].dtype
      flat[path] = leaf.astype(dtype)
    return _branch.unflatten(flat)

  def _close(self, params: Mapping[str, Any], moving: _Flat) -> dict[str, Any]:
    """Parameters with what moves in place, as a checkpoint has them."""
    flat = _branch.flatten(params)
    packed = self._packed()
    for path, leaf in moving.items():
      if path in packed:
        fmt, _ = packed[path]
        codes = fmt.round(leaf)
        flat[path] = fmt.pack(codes.astype(jnp.int8))
      else:
        flat[path] = leaf.astype(flat[path].dtype)
    return _branch.unflatten(flat)

  def _packed(self) -> dict[str, tuple[Any, int]]:
    """Format and columns by the path of packed codes."""
    model = self.model
    while not isinstance(model, gx_nn.Compressed):
      model = vars(model).get('model')
      if model is None:
        return {}
    return {
      f'{path}/codes': (
        gx_nn.format_of(method, site.layout.cols),
        site.layout.cols,
      )
      for path, (site, method) in gx_nn.methods_of(
        model.model, model.recipe
      ).items()
    }


@dataclasses.dataclass(kw_only=True, eq=False, frozen=True)
class EvolutionStep(_ForwardStep):
  """One update of a population, its losses those of the trainer.

  The trainer's `optimizer` is `None`. Master copies of what moves, in float32,
  are in `opt_state`, and parameters are made from them at every step; noise is
  made from the trainer's seed and the number of the step. A run that goes on
  from a checkpoint so ends in the same bits.

  What moves: floating leaves always. Packed codes with `form='latent'` as
  floats that are rounded, and ternary ones with `form='integer'` as integers.
  No other integer ever moves, nor does a mixture's router, unless `weights`
  names it. Gradients are never taken: `context.grads` is `None`.

  Attributes:
    method: The population. `lazy` and `axis` are of no use to a whole model.
    weights: Regular expression on the paths of the parameters that move
      (whole segments, as in `Recipe`).
  """

  method: _evolution.Evolution

  def __post_init__(self):
    super().__post_init__()
    _check_type(self, _evolution.Evolution)
    for name in ('lazy', 'axis'):
      if getattr(self.method, name):
        raise errors.ConfigError(
          f"EvolutionStep runs whole models: Evolution.{name} must be '', got"
          f' {getattr(self.method, name)!r}.'
        )
    if self.method.fitness != 'global':
      raise errors.ConfigError(
        'The losses of a trainer do not factor by row: Evolution.fitness must'
        f" be 'global', got {self.method.fitness!r}."
      )


@dataclasses.dataclass(kw_only=True, eq=False, frozen=True)
class MezoStep(_ForwardStep):
  """One update of MeZO, its loss the sum of the trainer's losses.

  Everything else is as for `EvolutionStep`; with `form='latent'` codes move as
  floats that are rounded.

  Attributes:
    method: How trials are made.
    weights: Regular expression on the paths of the parameters that move
      (whole segments, as in `Recipe`).
  """

  method: _mezo.Mezo

  def __post_init__(self):
    super().__post_init__()
    _check_type(self, _mezo.Mezo)


def _check_type(step: _ForwardStep, expected: type) -> None:
  if not isinstance(step.method, expected):
    raise errors.ConfigError(
      f'{type(step).__name__}.method must be a {expected.__name__}, got'
      f' {step.method!r}.'
    )


def _difference(new: jax.Array, old: jax.Array) -> jax.Array:
  """What the step added; zero for packed codes, which have no difference."""
  if jnp.issubdtype(new.dtype, jnp.floating):
    return new - old
  return jnp.zeros_like(new)
