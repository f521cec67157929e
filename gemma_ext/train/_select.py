# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Selection: thousands of small populations, one for each output row.

Where the loss is a sum over output rows, a mutant that changes every row at
once is judged row by row: one forward pass tries one mutant of every row.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.train import _topology

_Leaves = dict[str, jax.Array]
# One mutant in so many moves scales.
_SCALE_EVERY = 4


def select(
  config: Any,
  leaves: _Leaves,
  memory: _Leaves,
  losses: Callable[[_Leaves], _Leaves],
  evaluate: Callable[..., _Leaves],
  key: jax.Array,
) -> tuple[_Leaves, _Leaves, jax.Array]:
  """One generation of every row's own population, in as few forward passes.

  Every mutant changes all rows at once; each row then takes the best of its
  own mutants, if that is better than itself by the margin. One mutant in four
  moves the scales of the row instead of its codes.

  Args:
    config: An `Evolution`.
    leaves: Parameters by path.
    memory: Harm by path of codes, in their shape.
    losses: Leaves to losses by path of codes, `[units]`.
    evaluate: `(member, count)` to the stacked results of `member(index)`.
    key: Of this generation.

  Returns:
    New leaves, new memory, and the share of units that changed. Nothing changes
    where the choices of all units together would raise the sum of their losses.
  """
  units = {p: v.shape[0] for p, v in jax.eval_shape(losses, leaves).items()}
  budget = config.density is not None
  start, places = dict(leaves), {}
  for i, (path, size) in enumerate(units.items()):
    rows = _topology.to_units(leaves[path], size)
    harm = _topology.to_units(memory[path], size)
    if budget:
      rows = _topology.enforce(rows, harm, int(config.density * rows.shape[1]))
      start[path] = _topology.from_units(rows, leaves[path].shape)
    tie = jax.random.fold_in(key, i)
    places[path] = _topology.harm_order(tie, rows, harm, budget=budget)

  def mutant(index: jax.Array, path: str) -> tuple[Any, Any, Any]:
    """Places, codes there, and factors of the scales or `None`."""
    mine = jax.random.fold_in(key, list(units).index(path))
    k1, k2 = jax.random.split(jax.random.fold_in(mine, index))
    rows = _topology.to_units(start[path], units[path])
    where, values = _topology.propose(
      k1,
      rows,
      *places[path],
      changes=config.changes,
      budget=budget,
      share=config.share,
    )
    scale = _scale_of(path, start, units[path])
    if scale is None:
      return where, values, None
    turn = index % _SCALE_EVERY == _SCALE_EVERY - 1
    z = turn * config.sigma * jax.random.normal(k2, scale.shape)
    return jnp.where(turn, rows.shape[1], where), values, 1 + z

  def changed(path: str, where: Any, values: Any, factors: Any) -> Any:
    rows = _topology.apply(
      _topology.to_units(start[path], units[path]), where, values
    )
    out = {path: _topology.from_units(rows, start[path].shape)}
    scale = _scale_of(path, start, units[path])
    if scale is not None:
      name = _scale_path(path)
      new = (scale * factors).astype(start[name].dtype)
      out[name] = _topology.from_units(new, start[name].shape)
    return out

  def member(index: jax.Array) -> _Leaves:
    now = dict(start)
    for path in units:
      now.update(changed(path, *mutant(index, path)))
    return losses(now)

  base = losses(start)
  found = evaluate(member, config.population)
  out, new_memory, taken_units = dict(start), dict(memory), []
  for path, size in units.items():
    worth = jnp.maximum(jnp.abs(base[path]), 1e-30)
    cost = (found[path] - base[path]) / worth  # [members, units]
    cost = jnp.where(jnp.isfinite(cost), cost, jnp.inf)
    best, row = jnp.argmin(cost, axis=0), jnp.arange(size)
    gain = -cost[best, row]
    accept = gain > config.margin
    where, values, factors = jax.vmap(functools.partial(mutant, path=path))(
      jnp.arange(config.population)
    )
    n = start[path].size // size
    taken = jnp.where(accept[:, None], where[best, row], n)
    if factors is not None:
      factors = jnp.where(accept[:, None], factors[best, row], 1)
    out.update(changed(path, taken, values[best, row], factors))
    harm = _topology.remember(
      _topology.to_units(memory[path], size), where, cost, taken, gain
    )
    new_memory[path] = _topology.from_units(harm, memory[path].shape)
    taken_units.append(accept)
  share = jnp.mean(jnp.concatenate(taken_units).astype(jnp.float32))
  after = losses(out)
  ratios = [
    jnp.sum(after[p]) / jnp.maximum(jnp.sum(base[p]), 1e-30) for p in units
  ]
  # Where units do lean on each other, their gains need not add up.
  worse = ~(sum(ratios) <= len(ratios))
  out = {p: jnp.where(worse, start[p], x) for p, x in out.items()}
  return out, new_memory, jnp.where(worse, 0, share)


def _scale_path(path: str) -> str:
  return path.removesuffix('codes') + 'scale'


def _scale_of(path: str, leaves: _Leaves, units: int) -> jax.Array | None:
  """The scales that go with codes, `[units, n]`."""
  scale = leaves.get(_scale_path(path))
  if scale is None or not jnp.issubdtype(scale.dtype, jnp.floating):
    return None
  if scale.ndim < 2 or (scale.size // scale.shape[-1]) % units:
    return None
  return _topology.to_units(scale, units)


def by_path(losses: Any, codes: list[str]) -> _Leaves:
  """Losses by path of codes, from losses by the name of a weight.

  Raises:
    TrainError: If a name does not belong to exactly one of them.
  """
  out = {}
  for name, value in losses.items():
    found = [p for p in codes if f'/{p}'.endswith(f'/{name}/codes')]
    if len(found) != 1:
      raise errors.TrainError(
        f'The unit loss {name!r} belongs to {found or "no codes"}; expected'
        f' one of {codes}.'
      )
    out[found[0]] = value
  return out
