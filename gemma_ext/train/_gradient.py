# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Gradient`: straight-through gradients and Adam."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_ext import errors
from gemma_ext.train import _problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient:
  """Adam on latent codes, scales and norms; codes go straight through.

  Attributes:
    steps: Number of updates.
    learning_rate: Of latent codes, in units of one code.
    scale_rate: Of scales, relative to their size.
    integer_rate: Of weights in whole numbers (see `Distill.integers`), relative
      to their root mean square.
    dense_rate: Of feed-forward weights that are not packed and of routers,
      relative to their root mean square.
    norm_rate: Of norm scales and of what else is not packed.
    warmup: Steps until the full rate; it then falls to 5% as a cosine.
    beta2: Of Adam. Few steps want a shorter memory than the usual 0.999.
    clip: Largest global norm of a gradient.
    margin: How near to the next code a latent may start, in steps. Codes of
      `ClosedForm` are often not the nearest to their weight, and with little
      margin the first steps undo them. Planes with free scales keep 0.01.
    remat: Whether end-to-end steps keep one residual stream a layer and make
      the other activations again (`nn.remat`): less memory, one more forward
      pass.

  Reference: Bengio et al., "Estimating or Propagating Gradients Through
  Stochastic Neurons", arXiv 1308.3432; Kingma, Ba, "Adam", arXiv 1412.6980.
  """

  steps: int = 200
  learning_rate: float = 4e-3
  scale_rate: float = 2e-3
  integer_rate: float = 1e-3
  dense_rate: float = 1e-3
  norm_rate: float = 1e-3
  warmup: int = 10
  beta2: float = 0.98
  clip: float = 1.0
  margin: float = 0.01
  remat: bool = False

  def __post_init__(self):
    for name in ('steps', 'warmup'):
      value = getattr(self, name)
      if type(value) is not int or value < (name == 'steps'):
        raise errors.ConfigError(
          f'Gradient.{name} must be a positive integer, got {value!r}.'
        )
    for name in (
      *('learning_rate', 'scale_rate', 'integer_rate', 'dense_rate'),
      *('norm_rate', 'clip'),
    ):
      value = getattr(self, name)
      if not isinstance(value, (int, float)) or not 0 <= value < 1e3:
        raise errors.ConfigError(
          f'Gradient.{name} must be a number in [0, 1000), got {value!r}.'
        )
    if not 0 < self.margin <= 0.5:
      raise errors.ConfigError(
        f'Gradient.margin must be in (0, 0.5], got {self.margin!r}.'
      )
    if not 0 < self.beta2 < 1:
      raise errors.ConfigError(
        f'Gradient.beta2 must be in (0, 1), got {self.beta2!r}.'
      )
    if not isinstance(self.remat, bool):
      raise errors.ConfigError(
        f'Gradient.remat must be a bool, got {self.remat!r}.'
      )

  @property
  def codes(self) -> str:
    """Form of the codes that it moves."""
    return 'latent'

  def init(self, params: _problem.Params, key: jax.Array) -> Any:
    """Returns the state of Adam."""
    del key
    return self._optax(params).init(params)

  def update(
    self,
    problem: _problem.Problem,
    params: _problem.Params,
    state: Any,
    batch: Any,
    key: jax.Array,
  ) -> tuple[_problem.Params, Any, _problem.Metrics]:
    """One step; see `Optimizer`."""
    del key
    loss, grads = jax.value_and_grad(problem.loss)(params, batch)
    updates, state = self._optax(params).update(grads, state, params)
    params = optax.apply_updates(params, updates)
    metrics = {'loss': loss, 'gradient_norm': optax.global_norm(grads)}
    return params, state, metrics

  def _optax(self, params: _problem.Params) -> optax.GradientTransformation:
    labels = jax.tree_util.tree_map_with_path(_label, params)
    adam = lambda rate: optax.adam(self._schedule(rate), b2=self.beta2)
    return optax.chain(
      optax.clip_by_global_norm(self.clip),
      optax.multi_transform(
        {
          'codes': adam(self.learning_rate),
          'scale': optax.chain(adam(self.scale_rate), _relative()),
          'integers': optax.chain(
            adam(self.integer_rate), optax.scale_by_param_block_rms()
          ),
          'dense': optax.chain(
            adam(self.dense_rate), optax.scale_by_param_block_rms()
          ),
          'other': adam(self.norm_rate),
        },
        labels,
      ),
    )

  def _schedule(self, rate: float) -> optax.Schedule:
    warmup = min(self.warmup, self.steps // 2)
    return optax.warmup_cosine_decay_schedule(
      0.0 if warmup else rate, rate, warmup, self.steps, 0.05 * rate
    )


def _label(path: Any, leaf: Any) -> str:
  del leaf
  name = str(getattr(path[-1], 'key', path[-1]))
  if name.endswith('/codes') or name == 'codes':
    # Branches begin with the name of their module, models with their layer.
    inside = name.startswith('mlp/') or '/mlp/' in name or '/' not in name
    return 'codes' if inside else 'integers'
  if name.endswith(('gating_einsum', 'linear', 'router/w')):
    return 'dense'
  # Norms call their parameter 'scale', too.
  if name.endswith('/scale') and 'norm' not in name:
    return 'scale'
  return 'other'


def _relative() -> optax.GradientTransformation:
  """Multiplies updates by the size of what they update."""

  def update(updates, state, params):
    return jax.tree.map(lambda u, p: u * jnp.abs(p), updates, params), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
