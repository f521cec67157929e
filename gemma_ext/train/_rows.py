# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`EvolveRows`: selection by rows, each mutant evaluated by what it changes.

A mutant of a row differs from it in one code, so its forward pass differs in
one column of the inputs: the outputs of all rows are kept, and a mutant of
every row costs one column a row instead of a matrix product. Thousands of
mutants of every row then fit into the time of a hundred forward passes. Losses
are compared, nothing is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.train import _branch
from gemma_ext.train import _latents

WEIGHTS = ('gating_einsum', 'linear')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvolveRows:
  """Every output row is a population of its own; ternary codes and scales.

  Rows of 'linear' are judged by their dimension of the branch's output, the
  gate and up rows of a hidden unit by its activation against the dense one.

  Attributes:
    steps: Batches of tokens.
    generations: Generations on one batch.
    population: Mutants of every row in a generation; the best of them takes
      the place of the row if it is better.
    z: How many standard errors, over the tokens of the batch, the loss of a
      row must fall by for its mutant to be better. One code in a thousand
      moves a loss by less than a batch of tokens can tell; without this, rows
      would fit the batch.
    scale_trials: Mutants of every scale on one batch.
    scale_sigma: Their relative size.

  Reference: selection as in Rechenberg, "Evolutionsstrategie" (1973); the
  factoring over rows is our own.
  """

  steps: int = 10
  generations: int = 500
  population: int = 2
  z: float = 2.5
  scale_trials: int = 4
  scale_sigma: float = 0.03

  def __post_init__(self):
    for name, least in (
      ('steps', 1),
      ('generations', 1),
      ('population', 1),
      ('scale_trials', 0),
    ):
      value = getattr(self, name)
      if type(value) is not int or value < least:
        raise errors.ConfigError(
          f'EvolveRows.{name} must be an integer of at least {least}, got'
          f' {value!r}.'
        )
    for name, most in (('z', 100), ('scale_sigma', 1)):
      value = getattr(self, name)
      if not isinstance(value, (int, float)) or not 0 <= value < most:
        raise errors.ConfigError(
          f'EvolveRows.{name} must be a number in [0, {most}), got {value!r}.'
        )

  @property
  def codes(self) -> str:
    """Form of the codes that it moves."""
    return 'integer'

  @property
  def mutants(self) -> int:
    """Mutants of every row in all, each a forward pass of its own row."""
    return self.steps * self.generations * self.population

  def init(self, params: Any, key: jax.Array) -> Any:
    """There is no state but the parameters."""
    del params, key
    return ()

  def compile(
    self, branch: _branch.Branch, dtype: Any
  ) -> Callable[..., tuple[Any, Any, Any]]:
    """Returns `(moving, state, batch, key)` to the same after one batch.

    Args:
      branch: The compressed branch.
      dtype: Type of activations.
    """
    return _compiled(self, branch, dtype)


def check(
  branch: _branch.Branch,
  moving: Mapping[str, jax.Array],
  fixed: Mapping[str, jax.Array],
  residual: jax.Array,
  dtype: Any,
) -> str:
  """Returns the weight whose rows evolve.

  Raises:
    TrainError: If it is not exactly one ternary weight, or the family's
      activation is not a gated gelu.
  """
  names = [n for n in WEIGHTS if f'mlp/{n}/codes' in moving]
  if len(names) != 1:
    raise errors.TrainError(
      f'EvolveRows moves the rows of one weight, got {names or "none"}. Give'
      f' the stage weights={WEIGHTS[0]!r}, then another {WEIGHTS[1]!r}.'
    )
  codes = moving[f'mlp/{names[0]}/codes']
  if codes.ndim != (4 if names[0] == 'gating_einsum' else 3):
    raise errors.TrainError(
      f'EvolveRows needs ternary codes of {names[0]}, got an array of'
      f' {codes.shape}.'
    )
  method = dict(branch.methods)[names[0]][1]
  if method.tied or method.scale != 'bf16':
    raise errors.TrainError(
      f"EvolveRows moves scales that are stored in 'bf16', one for every plane;"
      f' {names[0]} has {method!r}. Use Evolution(discrete="select").'
    )
  params = _latents.join(branch, moving, fixed, dtype=jnp.float32)
  found = branch.apply(params, residual.astype(jnp.float32))
  gates = found['gates']
  if gates.ndim < 2 or gates.shape[-2] != 2:
    raise errors.TrainError(f'Gates have shape {gates.shape}.')
  hidden = jax.nn.gelu(gates[..., 0, :]) * gates[..., 1, :]
  away = jnp.linalg.norm((hidden - found['hidden']).astype(jnp.float32))
  if not away <= 0.02 * jnp.linalg.norm(found['hidden'].astype(jnp.float32)):
    raise errors.TrainError(
      'The hidden activations of this layer are not gelu(gate) * up (Gemma 3n'
      ' has sparse ones). Use Evolution(discrete="select", fitness="unit").'
    )
  return names[0]


@functools.lru_cache(maxsize=8)
def _compiled(config: EvolveRows, branch: _branch.Branch, dtype: Any):
  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(moving, state, batch, key):
    linear = 'mlp/linear/codes' in moving
    path = f'mlp/{"linear" if linear else "gating_einsum"}'
    params = _latents.join(branch, moving, batch['fixed'], dtype=dtype)
    found = branch.apply(params, batch['residual'].astype(dtype))
    make = _linear_rows if linear else _gating_rows
    columns, rows, judge = make(branch, found, batch)
    codes, scale = moving[f'{path}/codes'], moving[f'{path}/scale']
    shape = codes.shape
    # Rows first: [rows, planes * cols], and scales alike.
    flat = lambda x: jnp.moveaxis(
      x.reshape(x.shape[0], -1, x.shape[-1]), 0, 1
    ).reshape(math.prod(shape[1:-1]), -1)
    new_codes, new_scale, taken = _evolve(
      config, flat(codes), flat(scale), shape[-1], columns, rows, judge, key
    )
    back = lambda x, like: jnp.moveaxis(
      x.reshape(-1, like.shape[0], like.shape[-1]), 1, 0
    ).reshape(like.shape)
    out = dict(moving)
    out[f'{path}/codes'] = back(new_codes, codes).astype(codes.dtype)
    out[f'{path}/scale'] = back(new_scale, scale)
    return out, state, {'changed': taken}

  return step


def _linear_rows(branch, found, batch):
  """Columns `[F, N]`, outputs `[D, N]`, and the losses of each row by token.

  The norm after the projection divides by the size of the whole output, which
  one code does not change; so a row's error moves with its own output alone.
  """
  y = found['inner'].astype(jnp.float32)
  b = found['branch'].astype(jnp.float32)
  size = jnp.ones(len(y), jnp.float32)
  gain = jnp.ones(y.shape[-1], jnp.float32)
  if any(name == 'post_ffw_norm' for name, _ in branch.modules):
    size = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1) + 1e-6)
    scaled = y * size[:, None]
    # The norm's own gain, whatever the family adds to its parameter.
    gain = jnp.sum(b * scaled, axis=0) / jnp.maximum(
      jnp.sum(jnp.square(scaled), axis=0), 1e-30
    )
  error = batch['residual'].astype(jnp.float32) + b
  error = error - batch['target'].astype(jnp.float32)
  per_token = jnp.sqrt(batch['weight'])
  safe = jnp.where(jnp.abs(gain) > 1e-6, gain, 1e30)
  away = (error / safe * per_token[:, None]).T  # [D, N]
  columns = (
    found['hidden'].astype(jnp.float32) * (size * per_token)[:, None]
  ).T

  def judge(row_output: jax.Array) -> jax.Array:
    return jnp.square(row_output)

  return columns, away, judge


def _gating_rows(branch, found, batch):
  """Columns `[D, N]`, outputs `[2 F, N]`, and the losses of hidden units."""
  del branch
  gates = found['gates'].astype(jnp.float32)  # [N, 2, F]
  size = jax.lax.rsqrt(
    jnp.mean(jnp.square(found['inner'].astype(jnp.float32)), axis=-1) + 1e-6
  )
  weight = batch['weight'] * jnp.square(size)
  want = batch['hidden'].astype(jnp.float32).T  # [F, N]
  outputs = jnp.concatenate([gates[:, 0].T, gates[:, 1].T])
  columns = found['input'].astype(jnp.float32).T

  def judge(outputs: jax.Array) -> jax.Array:
    gate, up = jnp.split(outputs, 2)
    away = jax.nn.gelu(gate) * up - want
    return weight * jnp.square(away)

  return columns, outputs, judge


def _evolve(config, codes, scale, cols, columns, outputs, judge, key):
  """Generations on one batch.

  Args:
    config: An `EvolveRows`.
    codes: int8 `[R, planes * cols]`.
    scale: `[R, planes * groups]`.
    cols: Of the weight.
    columns: What a unit of weight in a column adds to an output, `[cols, N]`.
    outputs: Of all rows, up to what does not depend on the weight, `[R, N]`.
    judge: Outputs to losses `[U, N]`; rows u, U + u, ... make unit u.
    key: Of the noise.

  Returns:
    Codes, scales, and the share of generations in which a row changed.
  """
  rows, wide = codes.shape
  group = wide // scale.shape[1]
  units = jax.eval_shape(judge, outputs).shape[0]
  parts = rows // units
  row = jnp.arange(units)

  def mutant(key, codes, scale, outputs):
    """Losses `[U, N]` of a mutant, and what it is."""
    k1, k2, k3 = jax.random.split(key, 3)
    which = row + units * jax.random.randint(k1, (units,), 0, parts)
    place = jax.random.randint(k2, (units,), 0, wide)
    old = codes[which, place].astype(jnp.int32)
    new = (old + 1 + jax.random.randint(k3, (units,), 1, 3)) % 3 - 1
    step = (new - old) * scale[which, place // group]
    # Other rows of the unit stay: one column is added to one of them.
    shift = step[:, None] * columns[place % cols]
    moved = outputs
    if parts == 1:
      moved = outputs + shift
    else:
      part = (which // units)[:, None]
      pieces = [
        outputs[p * units : (p + 1) * units] + jnp.where(part == p, shift, 0)
        for p in range(parts)
      ]
      moved = jnp.concatenate(pieces)
    return judge(moved), (which, place, new.astype(codes.dtype), step)

  def fall(loss, found):
    """By how much losses fall, `[U]`; 0 where that may be chance."""
    gain = loss - found
    mean = jnp.mean(gain, axis=-1)
    error = jnp.std(gain, axis=-1) / gain.shape[-1] ** 0.5
    return jnp.where(mean > config.z * error, jnp.maximum(mean, 0), 0)

  def generation(i, carry):
    codes, outputs, loss, taken = carry
    best = jnp.zeros(units, jnp.float32)
    # No change: the first code of each unit's first row, as it is.
    still = jnp.zeros(units, jnp.int32)
    choice = (row, still, codes[row, 0], jnp.zeros(units, scale.dtype))
    for p in range(config.population):
      k = jax.random.fold_in(jax.random.fold_in(key, i), p)
      found, what = mutant(k, codes, scale, outputs)
      gain = fall(loss, found)
      better = gain > best
      best = jnp.where(better, gain, best)
      which, place, new, step = (
        jnp.where(better, a, b) for a, b in zip(what, choice, strict=True)
      )
      choice = (which, place, new, step)
    which, place, new, step = choice
    codes = codes.at[which, place].set(new)
    outputs = outputs.at[which].add(step[:, None] * columns[place % cols])
    changed = jnp.mean((step != 0).astype(jnp.float32))
    return codes, outputs, judge(outputs), taken + changed

  carry = (codes, outputs, judge(outputs), jnp.float32(0))
  codes, outputs, loss, taken = jax.lax.fori_loop(
    0, config.generations, generation, carry
  )

  def scales(g, carry):
    """Trials of one group's scale in every row."""
    scale, outputs, loss = carry
    start = g * group
    piece = jax.lax.dynamic_slice_in_dim(codes, start, group, 1)
    into = jax.lax.dynamic_slice_in_dim(columns, start % cols, group, 0)
    gives = piece.astype(jnp.float32) @ into  # [R, N], for a scale of 1.
    for t in range(config.scale_trials):
      for p in range(parts):
        k = jax.random.fold_in(jax.random.fold_in(key, -1 - g), t * parts + p)
        z = config.scale_sigma * jax.random.normal(k, (units,))
        mine = (jnp.arange(rows) // units == p) * jnp.tile(z, parts)
        step = scale[:, g] * mine
        moved = outputs + step[:, None] * gives
        better = fall(loss, judge(moved)) > 0
        accept = jnp.tile(better, parts)
        step = jnp.where(accept, step, 0)
        scale = scale.at[:, g].add(step)
        outputs = outputs + step[:, None] * gives
        loss = judge(outputs)
    return scale, outputs, loss

  if config.scale_trials:
    scale, outputs, loss = jax.lax.fori_loop(
      0, scale.shape[1], scales, (scale, outputs, loss)
    )
  return codes, scale, taken / config.generations
