# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Evolution`: a population instead of a backward pass.

Members are never stored: each is the parameters and noise that is made again
from a key, and all that a member gives back is its loss. Across devices only
that number travels.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_ext import _patterns
from gemma_ext import errors
from gemma_ext.train import _noise
from gemma_ext.train import _problem
from gemma_ext.train import _select
from gemma_ext.train import _topology

_Leaves = dict[str, jax.Array]
_CHOICES = {
  'optimizer': ('adam', 'sgd'),
  'shaping': ('rank', 'zscore', 'none'),
  'form': ('latent', 'integer', 'fixed'),
  'discrete': ('estimate', 'select'),
  'fitness': ('global', 'unit'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolution:
  """Evolution strategies for floating leaves and for ternary codes.

  Attributes:
    steps: Number of updates.
    population: Members of an update. For estimates they come in antithetic
      pairs, so that it is even.
    chunk: Members that run at once, which bounds memory; 0 runs all.
    rank: Of the noise of a matrix.
    sigma: Size of the noise, relative to the root mean square of each leaf.
    learning_rate: In the same units; falls to 5% as a cosine.
    optimizer: What takes the estimate of the gradient: 'adam' or 'sgd'.
    shaping: Of losses: 'rank', 'zscore', or 'none', which makes the estimate
      that of the gradient itself.
    form: What moves: 'latent' codes and all floats, 'integer' codes and all
      floats, or 'fixed' codes, which leaves scales and norms.
    lazy: Regular expression on the paths of weights that the loss multiplies
      through `matmul`; they arrive as `LowRank` and are never stored.
    discrete: How integer codes move: by an 'estimate' of the gradient and
      error feedback, or by the mutation and the choice of rows ('select').
      The latter moves codes and their scales, and no other leaf. The former
      needs no units, but leaves codes wavering between two values.
    fitness: What chooses rows: the 'global' loss or each 'unit' its own.
    code_sigma: Size of the noise on integer codes.
    code_rate: Learning rate of integer codes.
    changes: Largest number of codes that a mutant changes in a row.
    share: Share of the rows that a mutant changes.
    margin: Relative gain from which on a mutant replaces a row.
    density: Largest share of nonzero codes in a row; `None` sets none.
    axis: Name of the mapped axis over which the population is split; set by
      `sharded_update`.

  Reference: Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv
  2511.16652; Salimans et al., "Evolution Strategies as a Scalable Alternative
  to Reinforcement Learning", arXiv 1703.03864; for integer codes "Quantized
  Evolution Strategies", arXiv 2602.03120.
  """

  steps: int = 200
  population: int = 64
  chunk: int = 0
  rank: int = 1
  sigma: float = 1e-2
  learning_rate: float = 1e-2
  optimizer: str = 'adam'
  shaping: str = 'rank'
  form: str = 'fixed'
  lazy: str = ''
  discrete: str = 'estimate'
  fitness: str = 'global'
  code_sigma: float = 0.25
  code_rate: float = 0.2
  changes: int = 1
  share: float = 1.0
  margin: float = 0.0
  density: float | None = None
  axis: str = ''

  def __post_init__(self):
    for name, least in (
      ('steps', 1),
      ('population', 2),
      ('chunk', 0),
      ('rank', 1),
      ('changes', 1),
    ):
      value = getattr(self, name)
      if type(value) is not int or value < least:
        raise errors.ConfigError(
          f'Evolution.{name} must be an integer of at least {least}, got'
          f' {value!r}.'
        )
    for name in ('sigma', 'learning_rate', 'code_sigma', 'code_rate'):
      _check_range(name, getattr(self, name), 0, 1e3)
    _check_range('share', self.share, 0, 1)
    if self.density is not None:
      _check_range('density', self.density, 0, 1)
    if not isinstance(self.margin, (int, float)) or not 0 <= self.margin < 1:
      raise errors.ConfigError(
        f'Evolution.margin must be a number in [0, 1), got {self.margin!r}.'
      )
    for name, allowed in _CHOICES.items():
      if getattr(self, name) not in allowed:
        raise errors.ConfigError(
          f'Evolution.{name} must be one of {allowed}, got'
          f' {getattr(self, name)!r}.'
        )
    if self.population % 2 or self.chunk % 2:
      raise errors.ConfigError(
        'Evolution.population and Evolution.chunk must be even, got'
        f' {self.population} and {self.chunk}.'
      )
    if self.fitness == 'unit' and self.discrete != 'select':
      raise errors.ConfigError(
        "Evolution.fitness='unit' chooses rows; it needs discrete='select'."
      )
    if self.discrete == 'select' and self.form != 'integer':
      raise errors.ConfigError(
        "Evolution.discrete='select' moves codes; it needs form='integer', got"
        f' {self.form!r}.'
      )
    if self.lazy:
      _patterns.check(self.lazy)

  @property
  def codes(self) -> str:
    """Form of the codes that it moves."""
    return self.form

  @property
  def members(self) -> int:
    """What divides among devices: pairs of an estimate, or members."""
    return self.population // (2 if self.discrete == 'estimate' else 1)

  @property
  def passes(self) -> int:
    """Forward passes of an update."""
    if self.discrete == 'estimate':
      return self.population
    # The rows as they are, all choices together, and the loss of the result.
    return self.population + 3

  def init(self, params: _problem.Params, key: jax.Array) -> Any:
    """Returns the state: step, sizes, the optimiser's, and one of codes.

    Raises:
      TrainError: If a path in `lazy`, or form 'integer', has nothing to it.
    """
    leaves, _ = _split(params)
    floats, codes = _floats(leaves), _codes(leaves)
    if self.form == 'integer' and not codes:
      raise errors.TrainError(
        "Evolution.form='integer' found no int8 leaf called 'codes' in"
        f' {sorted(leaves)}.'
      )
    if self.lazy and not any(_patterns.matches(self.lazy, p) for p in floats):
      raise errors.TrainError(
        f'Evolution.lazy={self.lazy!r} matches no floating leaf; the nearest:'
        f' {_patterns.near_misses(self.lazy, floats)}.'
      )
    size = lambda x: jnp.sqrt(jnp.mean(jnp.square(x))) + 1e-8
    zeros = {p: jnp.zeros_like(leaves[p]) for p in floats}
    memory = {}
    for i, path in enumerate(codes):
      memory[path] = jnp.zeros(leaves[path].shape, jnp.float32)
      if self.discrete == 'estimate':
        dither = jax.random.fold_in(key, i)
        memory[path] = _topology.first_residual(dither, leaves[path].shape)
    return {
      'step': jnp.zeros((), jnp.int32),
      'size': {p: size(leaves[p]) for p in floats},
      'optax': () if self.discrete == 'select' else self._optax().init(zeros),
      'memory': memory,
    }

  def update(
    self,
    problem: _problem.Problem,
    params: _problem.Params,
    state: Any,
    batch: Any,
    key: jax.Array,
  ) -> tuple[_problem.Params, Any, _problem.Metrics]:
    """One step; see `Optimizer`.

    Raises:
      TrainError: If `fitness` is 'unit' and the problem's loss has no units,
        or if one of them belongs to no codes.
      ConfigError: If the population does not divide among the devices.
    """
    leaves, join = _split(params)
    step = self._select if self.discrete == 'select' else self._estimate
    leaves, state, metrics = step(problem, leaves, join, state, batch, key)
    return join(leaves), state | {'step': state['step'] + 1}, metrics

  def _estimate(self, problem, leaves, join, state, batch, key):
    """Estimates the gradient from antithetic pairs and follows it."""
    floats = _floats(leaves)
    codes = _codes(leaves) if self.form == 'integer' else []
    number = {p: i for i, p in enumerate(leaves)}

    def key_of(pair: jax.Array, path: str) -> jax.Array:
      return jax.random.fold_in(jax.random.fold_in(key, pair), number[path])

    def factors(pair: jax.Array, path: str) -> _noise.Factors:
      x = leaves[path]
      return _noise.draw(
        key_of(pair, path), x.shape, rank=self.rank, dtype=x.dtype
      )

    def flips(pair: jax.Array, path: str) -> jax.Array:
      shape = leaves[path].shape
      return _topology.integer_noise(key_of(pair, path), shape, self.code_sigma)

    def both(pair: jax.Array) -> jax.Array:
      noise = {p: factors(pair, p) for p in floats}
      changes = {p: flips(pair, p) for p in codes}

      def trial(sign: jax.Array) -> jax.Array:
        now: dict[str, Any] = dict(leaves)
        for path, z in noise.items():
          step = sign * self.sigma * state['size'][path]
          x, step = leaves[path], step.astype(leaves[path].dtype)
          if z.b is not None and self._is_lazy(path):
            now[path] = _noise.LowRank(x, z.a, z.b, step)
          else:
            now[path] = x + step * z.dense()
        for path, flip in changes.items():
          flip = sign.astype(jnp.int8) * flip
          now[path] = _topology.moved(leaves[path], flip)
        return problem.loss(join(now), batch)

      return jax.vmap(trial)(jnp.array([1.0, -1.0]))

    pairs = jnp.arange(self.population // 2)
    losses = self._evaluate(both, len(pairs), members=2)  # [pairs, 2]
    fitness = _noise.shape_fitness(losses.ravel(), self.shaping)
    fitness = fitness.reshape(losses.shape)
    weights = (fitness[:, 0] - fitness[:, 1]) / self.population
    if self.shaping == 'none':
      weights = weights / self.sigma
    again = lambda p: jax.vmap(functools.partial(factors, path=p))(pairs)
    grads = {p: _noise.combine(weights, again(p)) for p in floats}
    updates, optax_state = self._optax().update(grads, state['optax'])
    out, memory = dict(leaves), dict(state['memory'])
    for path in floats:
      out[path] = leaves[path] + state['size'][path] * updates[path]
    for path in codes:
      slope = _topology.slope(
        leaves[path],
        fitness - jnp.mean(fitness),
        functools.partial(flips, path=path),
      )
      rate = self._schedule(self.code_rate)(state['step'])
      new, rest = _topology.feed_back(leaves[path], -rate * slope, memory[path])
      if self.density is not None:
        lead = new.size // new.shape[-1]
        rows = _topology.enforce(
          _topology.to_units(new, lead),
          # A remainder that pulls a code to zero makes it the first to go.
          _topology.to_units(rest * new, lead),
          int(self.density * new.shape[-1]),
        )
        new = _topology.from_units(rows, new.shape)
      out[path], memory[path] = new, rest
    metrics = {'loss': jnp.mean(losses), 'best': jnp.min(losses)}
    return out, state | {'optax': optax_state, 'memory': memory}, metrics

  def _select(self, problem, leaves, join, state, batch, key):
    """Lets every row choose among its mutants."""
    whole = lambda now: problem.loss(join(now), batch)
    if self.fitness == 'unit':
      if problem.unit_loss is None:
        raise errors.TrainError(
          "Evolution.fitness='unit' needs a loss that factors by output row;"
          " this one does not. Use fitness='global'."
        )
      parts = problem.unit_loss
      losses = lambda now: _select.by_path(parts(join(now), batch), _codes(now))
    else:
      losses = lambda now: {
        p: jnp.broadcast_to(whole(now), (now[p].size // now[p].shape[-1],))
        for p in _codes(now)
      }
    new, memory, share = _select.select(
      self, leaves, state['memory'], losses, self._evaluate, key
    )
    metrics = {'loss': whole(new), 'changed': share}
    return new, state | {'memory': memory}, metrics

  def _evaluate(
    self, member: Callable[[jax.Array], Any], count: int, members: int = 1
  ) -> Any:
    """Stacks `member(index)` for `count` indices, on all devices."""
    index = jnp.arange(count)
    if self.axis:
      devices = jax.lax.axis_size(self.axis)
      if count % devices:
        raise errors.ConfigError(
          f'{count} {"pairs" if members == 2 else "members"} do not divide'
          f' among {devices} devices; change Evolution.population.'
        )
      count //= devices
      index = jax.lax.axis_index(self.axis) * count + jnp.arange(count)
    chunk = self.chunk // members
    if chunk and chunk < count:
      out = jax.lax.map(member, index, batch_size=chunk)
    else:
      out = jax.vmap(member)(index)
    if self.axis:
      out = jax.lax.all_gather(out, self.axis, tiled=True)
    return out

  def _is_lazy(self, path: str) -> bool:
    return bool(self.lazy) and _patterns.matches(self.lazy, path)

  def _schedule(self, rate: float) -> optax.Schedule:
    return optax.cosine_decay_schedule(rate, self.steps, alpha=0.05)

  def _optax(self) -> optax.GradientTransformation:
    make = optax.adam if self.optimizer == 'adam' else optax.sgd
    return make(self._schedule(self.learning_rate))


def _split(
  params: _problem.Params,
) -> tuple[_Leaves, Callable[[dict[str, Any]], _problem.Params]]:
  """Leaves by path, and the way back."""
  found, structure = jax.tree_util.tree_flatten_with_path(params)
  name = lambda path: '/'.join(str(getattr(k, 'key', k)) for k in path)
  leaves = {name(path): leaf for path, leaf in found}
  paths = list(leaves)
  join = lambda new: jax.tree.unflatten(structure, [new[p] for p in paths])
  return leaves, join


def _floats(leaves: _Leaves) -> list[str]:
  return [p for p, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.floating)]


def _codes(leaves: _Leaves) -> list[str]:
  return [
    p
    for p, x in leaves.items()
    if x.dtype == jnp.int8 and p.split('/')[-1] == 'codes'
  ]


def _check_range(name: str, value: Any, low: float, high: float) -> None:
  number = isinstance(value, (int, float)) and math.isfinite(value)
  if not number or not low < value <= high:
    raise errors.ConfigError(
      f'Evolution.{name} must be a number in ({low}, {high}], got {value!r}.'
    )
