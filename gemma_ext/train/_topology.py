# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Ternary codes that evolve: noise on integers, mutation, prune and regrow.

Two ways to move codes in {-1, 0, 1} without gradients:

* an estimate of the gradient from integer noise, taken in whole steps whose
  remainder is kept and fed back (QES, arXiv 2602.03120);
* selection: few codes of a row change at a time, and the best of many such
  mutants replaces the row if it is better than the row as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Share of the changes under a density budget that turn a sign over; the others
# prune a code and regrow another.
_SIGN_SHARE = 0.5
# What a row remembers of harm fades, because the row itself changes.
_FADE = 0.97


def integer_noise(key: jax.Array, shape: Any, sigma: float) -> jax.Array:
  """Gaussian noise of size `sigma`, rounded at random to int8; mean 0."""
  k1, k2 = jax.random.split(key)
  x = sigma * jax.random.normal(k1, shape)
  rounded = jnp.floor(x + jax.random.uniform(k2, shape))
  return jnp.clip(rounded, -2, 2).astype(jnp.int8)


def moved(codes: jax.Array, noise: jax.Array) -> jax.Array:
  """Codes plus noise, within -1 and 1."""
  return jnp.clip(codes + noise, -1, 1)


def first_residual(key: jax.Array, shape: Any) -> jax.Array:
  """Draws what makes `feed_back` round at random: uniform in [-0.5, 0.5).

  Drawn once and not at every step: a remainder that is rounded at random again
  and again keeps turning codes over that no step has moved.
  """
  return jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)


def feed_back(
  codes: jax.Array, step: jax.Array, residual: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Takes a real step in whole codes and keeps the remainder.

  Args:
    codes: int8 in {-1, 0, 1}.
    step: What to add, in the shape of the codes.
    residual: What earlier steps left over; at first `first_residual`, with
      which the codes are, on average, where real ones would be.

  Returns:
    New codes and residual. Away from the bounds their sum is, exactly, the old
    sum plus the step. A code at a bound does not store up steps beyond it.
  """
  wanted = step + residual
  new = jnp.clip(codes + jnp.round(wanted), -1, 1)
  rest = wanted - (new - codes)
  return new.astype(jnp.int8), jnp.clip(rest, -0.5, 0.5)


def slope(
  codes: jax.Array,
  fitness: jax.Array,
  flips: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Regresses fitness on what the noise did to each code.

  At a bound only one side of a pair moves, so that both sides are counted as
  they are and not by their difference.

  Args:
    codes: The codes.
    fitness: `[pairs, 2]`, of mean 0.
    flips: Number of a pair to its noise, in the shape of the codes.

  Returns:
    float32, in the shape of the codes.
  """

  def add(i: Any, carry: tuple[jax.Array, jax.Array]):
    total, square = carry
    noise = flips(i)
    for side, sign in enumerate((1, -1)):
      shift = moved(codes, sign * noise) - codes
      total = total + fitness[i, side] * shift
      square = square + jnp.mean(jnp.square(shift.astype(jnp.float32)))
    return total, square

  zero = jnp.zeros(codes.shape, jnp.float32)
  count = fitness.shape[0]
  total, square = jax.lax.fori_loop(0, count, add, (zero, jnp.float32(0)))
  return total / jnp.maximum(square, 1e-6)


def to_units(leaf: jax.Array, units: int) -> jax.Array:
  """`[*lead, cols]` to `[units, lead / units * cols]`.

  Units are the last of the leading axes: planes of a weight, and the gate and
  up rows of a hidden unit, belong to one.
  """
  split = leaf.reshape(-1, units, leaf.shape[-1])
  return jnp.moveaxis(split, 1, 0).reshape(units, -1)


def from_units(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Inverse of `to_units`."""
  units, cols = rows.shape[0], shape[-1]
  return jnp.moveaxis(rows.reshape(units, -1, cols), 0, 1).reshape(shape)


def enforce(codes: jax.Array, useful: jax.Array, limit: int) -> jax.Array:
  """Prunes the least useful codes of rows that hold more than `limit`.

  Args:
    codes: `[units, n]`.
    useful: `[units, n]`, larger for codes that should stay.
    limit: Largest number of nonzero codes in a row.
  """
  order = jnp.lexsort((-useful, codes == 0), axis=-1)
  place = jnp.argsort(order, axis=-1)
  return jnp.where(place < limit, codes, 0).astype(codes.dtype)


def harm_order(
  key: jax.Array, codes: jax.Array, harm: jax.Array, *, budget: bool
) -> tuple[jax.Array, jax.Array]:
  """Orders the places of each row by what changing them is known to cost.

  Args:
    key: Breaks ties.
    codes: `[units, n]`.
    harm: `[units, n]`.
    budget: Whether nonzero codes come first, and zeros after them.

  Returns:
    Places `[units, n]` and the number of nonzero codes `[units]`.
  """
  tie = jax.random.uniform(key, codes.shape)
  keys = (tie, harm, codes == 0) if budget else (tie, harm)
  return jnp.lexsort(keys, axis=-1), jnp.sum(codes != 0, axis=-1)


def propose(
  key: jax.Array,
  codes: jax.Array,
  order: jax.Array,
  count: jax.Array,
  *,
  changes: int,
  budget: bool,
  share: float,
) -> tuple[jax.Array, jax.Array]:
  """Draws a mutant of every row.

  Places that are known to matter less are drawn more often. Under a budget a
  change is a sign turned over or a code pruned and another regrown, so that
  the count of nonzero codes stays as it is.

  Args:
    key: Of this mutant.
    codes: `[units, n]`.
    order: As `harm_order` returns it.
    count: As `harm_order` returns it.
    changes: Largest number of changes in a row.
    budget: Whether the count stays.
    share: Probability that a row changes at all.

  Returns:
    Places and new codes, `[units, m]`; a place of `n` changes nothing.
  """
  units, n = codes.shape
  k = jax.random.split(key, 5)
  mutates = jax.random.uniform(k[0], (units, 1)) < share

  def pick(key: jax.Array, start: Any, size: Any) -> tuple[Any, Any]:
    # One draw from each stratum: distinct places, but where two strata meet.
    u = jax.random.uniform(key, (units, changes))
    t = (jnp.arange(changes) + u) / changes
    index = jnp.minimum((size * t * t).astype(jnp.int32), size - 1)
    before = jnp.pad(index[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    place = jnp.clip(start + index, 0, n - 1)
    return jnp.take_along_axis(order, place, axis=-1), index > before

  if not budget:
    places, valid = pick(k[1], 0, jnp.full((units, 1), n))
    old = jnp.take_along_axis(codes, places, axis=-1).astype(jnp.int32)
    other = jax.random.randint(k[2], places.shape, 1, 3)
    values = (old + 1 + other) % 3 - 1
    places = jnp.where(valid & mutates, places, n)
    return places, values.astype(jnp.int8)
  filled = count[:, None]
  pruned, valid = pick(k[1], 0, filled)
  grown, grows = pick(k[2], filled, n - filled)
  old = jnp.take_along_axis(codes, pruned, axis=-1)
  turn = jax.random.uniform(k[3], pruned.shape) < _SIGN_SHARE
  sign = jax.random.rademacher(k[4], grown.shape, jnp.int8)
  valid = valid & (turn | grows) & mutates
  places = jnp.concatenate(
    [jnp.where(valid, pruned, n), jnp.where(valid & ~turn, grown, n)], axis=-1
  )
  values = jnp.concatenate([jnp.where(turn, -old, 0), sign], axis=-1)
  return places, values.astype(jnp.int8)


def apply(codes: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
  """Codes with the changes of a mutant, `[units, n]`."""
  rows = jnp.arange(codes.shape[0])[:, None]
  return codes.at[rows, places].set(values, mode='drop')


def remember(
  harm: jax.Array,
  places: jax.Array,
  cost: jax.Array,
  taken: jax.Array,
  gain: jax.Array,
) -> jax.Array:
  """Notes what the changes of all mutants cost their rows.

  Args:
    harm: `[units, n]`.
    places: `[members, units, m]`.
    cost: `[members, units]`, relative rise of the loss; negative is a gain.
    taken: `[units, m]`, places that the rows have just changed.
    gain: `[units]`, relative fall of the loss by that, which is what changing
      them back would cost.
  """
  rows = jnp.arange(harm.shape[0])[:, None]
  rise = jnp.maximum(cost, 0)[..., None]
  harm = _FADE * harm
  harm = harm.at[rows[None], places].max(
    jnp.broadcast_to(rise, places.shape), mode='drop'
  )
  return harm.at[rows, taken].set(
    jnp.broadcast_to(gain[:, None], taken.shape), mode='drop'
  )
