# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Mezo`: gradients from pairs of forward passes.

The noise is made again from its key where it is needed, for the two passes and
for the step, and the parameters themselves are never moved by a trial: they
are the master copy, so that nothing has to be restored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.train import _problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mezo:
  """Simultaneous perturbation, without a backward pass.

  Attributes:
    steps: Number of updates.
    pairs: Pairs of forward passes of an update; their estimates are averaged.
    sigma: Size of the trial, relative to the root mean square of each leaf.
    learning_rate: Of the update, in the same units; falls to 5% as a cosine.
    form: What moves: 'latent' codes and all floats, or 'fixed' codes: scales
      and norms only.
    axis: Name of the mapped axis over which the pairs are split; set by
      `sharded_update`.

  Reference: Malladi et al., "Fine-Tuning Language Models with Just Forward
  Passes", arXiv 2305.17333; Spall, "Multivariate Stochastic Approximation
  Using a Simultaneous Perturbation Gradient Approximation" (1992).
  """

  steps: int = 200
  pairs: int = 4
  sigma: float = 1e-2
  learning_rate: float = 1e-3
  form: str = 'fixed'
  axis: str = ''

  def __post_init__(self):
    for name in ('steps', 'pairs'):
      value = getattr(self, name)
      if type(value) is not int or value < 1:
        raise errors.ConfigError(
          f'Mezo.{name} must be a positive integer, got {value!r}.'
        )
    for name in ('sigma', 'learning_rate'):
      value = getattr(self, name)
      if not isinstance(value, (int, float)) or not 0 < value < 1e3:
        raise errors.ConfigError(
          f'Mezo.{name} must be a number in (0, 1000), got {value!r}.'
        )
    if self.form not in ('latent', 'fixed'):
      raise errors.ConfigError(
        f"Mezo.form must be 'latent' or 'fixed', got {self.form!r}."
      )

  @property
  def codes(self) -> str:
    """Form of the codes that it moves."""
    return self.form

  @property
  def members(self) -> int:
    """What divides among devices."""
    return self.pairs

  @property
  def passes(self) -> int:
    """Forward passes of an update."""
    return 2 * self.pairs

  def init(self, params: _problem.Params, key: jax.Array) -> Any:
    """Returns the step, and the size of every leaf at the start."""
    del key
    size = lambda x: jnp.sqrt(jnp.mean(jnp.square(x))) + 1e-8
    return {
      'step': jnp.zeros((), jnp.int32),
      'size': jax.tree.map(size, params),
    }

  def update(
    self,
    problem: _problem.Problem,
    params: _problem.Params,
    state: Any,
    batch: Any,
    key: jax.Array,
  ) -> tuple[_problem.Params, Any, _problem.Metrics]:
    """One step; see `Optimizer`."""
    size = state['size']

    def trial(index: jax.Array, sign: float) -> jax.Array:
      z = noise(jax.random.fold_in(key, index), params)
      moved = jax.tree.map(
        lambda p, s, z: p + sign * self.sigma * s * z, params, size, z
      )
      return problem.loss(moved, batch)

    def pair(index: jax.Array) -> tuple[jax.Array, jax.Array]:
      return trial(index, 1.0), trial(index, -1.0)

    index = jnp.arange(self.pairs)
    if self.axis:
      devices = jax.lax.axis_size(self.axis)
      if self.pairs % devices:
        raise errors.ConfigError(
          f'Mezo.pairs={self.pairs} does not divide among {devices} devices.'
        )
      share = self.pairs // devices
      index = jax.lax.axis_index(self.axis) * share + jnp.arange(share)
    plus, minus = jax.lax.map(pair, index)
    if self.axis:
      plus, minus = jax.lax.all_gather((plus, minus), self.axis, tiled=True)
    slopes = (plus - minus) / (2 * self.sigma)
    done = state['step'].astype(jnp.float32) / self.steps
    rate = self.learning_rate * (0.525 + 0.475 * jnp.cos(jnp.pi * done))

    def apply(index: jax.Array, now: _problem.Params) -> _problem.Params:
      z = noise(jax.random.fold_in(key, index), params)
      step = rate * slopes[index] / self.pairs
      return jax.tree.map(lambda p, s, z: p - step * s * z, now, size, z)

    params = jax.lax.fori_loop(0, self.pairs, apply, params)
    state = {'step': state['step'] + 1, 'size': size}
    return params, state, {'loss': jnp.mean((plus + minus) / 2)}


def noise(key: jax.Array, like: _problem.Params) -> _problem.Params:
  """Standard normal noise in the shape of `like`; the same for the same key."""
  leaves, structure = jax.tree.flatten(like)
  keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
  return jax.tree.unflatten(
    structure,
    [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)],
  )
