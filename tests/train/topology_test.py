# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Ternary codes that evolve: recovery of known codes, budgets, rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext.train import _evolution
from gemma_ext.train import _problem
from gemma_ext.train import _topology

_ROWS, _COLS = 32, 16
_PATH = 'mlp/linear/codes'


def _ternary(key, shape, density=0.6):
  k1, k2 = jax.random.split(key)
  nonzero = jax.random.uniform(k1, shape) < density
  return (nonzero * jax.random.rademacher(k2, shape)).astype(jnp.int8)


_TARGET = _ternary(jax.random.key(1), (_ROWS, _COLS))
_X = jax.random.normal(jax.random.key(2), (64, _COLS))


def _unit_loss(params, batch):
  del batch
  codes = params[_PATH][0].astype(jnp.float32)
  error = _X @ (codes - _TARGET).T
  return {'linear': jnp.mean(jnp.square(error), axis=0)}


_PROBLEM = _problem.Problem(
  loss=lambda p, b: jnp.mean(_unit_loss(p, b)['linear']), unit_loss=_unit_loss
)
_START = {_PATH: _ternary(jax.random.key(3), (1, _ROWS, _COLS))}


def _evolve(passes, params=_START, problem=_PROBLEM, **fields):
  config = _evolution.Evolution(form='integer', population=16, **fields)
  config = _evolution.Evolution(
    **{**_fields(config), 'steps': max(1, passes // config.passes)}
  )
  update = jax.jit(functools.partial(config.update, problem))
  state, metrics = config.init(params, jax.random.key(0)), {}
  for i in range(config.steps):
    key = jax.random.fold_in(jax.random.key(4), i)
    params, state, metrics = update(params, state, None, key)
  assert params[_PATH].dtype == jnp.int8
  assert set(np.unique(params[_PATH])) <= {-1, 0, 1}
  return params, metrics


def _fields(config):
  return {f: getattr(config, f) for f in config.__dataclass_fields__}


def test_unit_fitness_recovers_every_code():
  params, metrics = _evolve(6000, discrete='select', fitness='unit')
  np.testing.assert_array_equal(params[_PATH][0], _TARGET)
  assert float(metrics['loss']) == 0


def test_unit_fitness_beats_global_fitness_at_equal_passes():
  passes = 1900
  start = float(_PROBLEM.loss(_START, None))
  loss = lambda **f: float(_PROBLEM.loss(_evolve(passes, **f)[0], None))
  unit = loss(discrete='select', fitness='unit')
  # Global selection at its best: few rows a mutant, or all of them.
  chosen = [
    loss(discrete='select', fitness='global', share=s)
    for s in (1 / _ROWS, 4 / _ROWS, 1.0)
  ]
  estimated = [
    loss(discrete='estimate', shaping='zscore', code_rate=r)
    for r in (0.2, 0.5, 1.0)
  ]
  assert min(chosen + estimated) < 0.9 * start  # They do work.
  assert unit < 0.1 * min(chosen + estimated)


def test_estimate_with_error_feedback_comes_near_the_codes():
  params, _ = _evolve(
    16_000, discrete='estimate', shaping='zscore', code_rate=0.1
  )
  loss = float(_PROBLEM.loss(params, None))
  assert loss < 0.2 * float(_PROBLEM.loss(_START, None))
  # No sign is wrong: what is left are codes that waver between two values,
  # because at the better one there is no slope to keep them.
  wrong = np.abs(np.asarray(params[_PATH][0]) - np.asarray(_TARGET))
  assert wrong.max() <= 1
  start = np.abs(np.asarray(_START[_PATH][0]) - np.asarray(_TARGET))
  assert np.mean(start == 2) > 0.1 and np.mean(wrong) < 0.5 * np.mean(start)


@pytest.mark.parametrize('discrete', ['select', 'estimate'])
def test_density_budget_is_kept_exactly(discrete):
  limit = 6
  fitness = 'unit' if discrete == 'select' else 'global'
  assert int(jnp.sum(_START[_PATH] != 0, axis=-1).max()) > limit
  first, _ = _evolve(1, discrete=discrete, fitness=fitness, density=0.4)
  params, _ = _evolve(
    2000, discrete=discrete, fitness=fitness, density=0.4, changes=2
  )
  before = np.sum(np.asarray(first[_PATH]) != 0, axis=-1)
  after = np.sum(np.asarray(params[_PATH]) != 0, axis=-1)
  assert before.max() == after.max() == limit == int(0.4 * _COLS)
  assert np.any(np.asarray(params[_PATH] != first[_PATH]))
  if discrete == 'select':
    np.testing.assert_array_equal(before, after)
    loss = float(_PROBLEM.loss(params, None))
    assert loss < 0.8 * float(_PROBLEM.loss(first, None))


def test_least_useful_codes_go_first():
  codes = jnp.array([[1, -1, 0, 1, -1], [0, 0, 1, 0, 0]], jnp.int8)
  useful = jnp.array([[5.0, 1, 9, 3, 2], [0, 0, 0, 0, 0]])
  kept = _topology.enforce(codes, useful, 2)
  np.testing.assert_array_equal(kept, [[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]])


@pytest.mark.parametrize('budget', [True, False])
def test_mutants_change_what_they_say(budget):
  codes = _ternary(jax.random.key(5), (200, 24), 0.5)
  codes = codes.at[0].set(0).at[1].set(1)  # Nothing to prune; nor to regrow.
  harm = jnp.zeros(codes.shape)
  order = _topology.harm_order(jax.random.key(6), codes, harm, budget=budget)
  places, values = _topology.propose(
    jax.random.key(7), codes, *order, changes=3, budget=budget, share=1.0
  )
  new = np.asarray(_topology.apply(codes, places, values))
  old = np.asarray(codes)
  changed = np.sum(new != old, axis=-1)
  if budget:
    np.testing.assert_array_equal(
      np.sum(new != 0, axis=-1), np.sum(old != 0, axis=-1)
    )
    assert changed[0] == 0
    assert changed.max() <= 6
    assert np.mean(changed) > 2
    assert np.any(new * old == -1) and np.any((old == 0) & (new != 0))
  else:
    assert changed.max() == 3 and changed.min() >= 1
    for pair in ((-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0)):
      assert np.any((old == pair[0]) & (new == pair[1])), pair


def test_harmful_places_are_drawn_less():
  codes = jnp.zeros((500, 10), jnp.int8)
  harm = jnp.zeros(codes.shape).at[:, 3].set(1.0)
  order = _topology.harm_order(jax.random.key(0), codes, harm, budget=False)
  places, _ = _topology.propose(
    jax.random.key(1), codes, *order, changes=1, budget=False, share=1.0
  )
  share = np.bincount(np.ravel(places), minlength=10) / 500
  assert share[3] < 0.1 * 0.85  # 1 - sqrt(0.9) = 0.051 is expected.
  assert np.delete(share, 3).min() > 0.06


def test_error_feedback_is_unbiased_and_loses_nothing():
  codes = jnp.zeros((64,), jnp.int8)
  step = jnp.linspace(-0.04, 0.04, 64)
  count, rounds = 10, 4000

  def run(key):
    first = _topology.first_residual(key, (64,))

    def body(_, carry):
      return _topology.feed_back(carry[0], step, carry[1])

    return *jax.lax.fori_loop(0, count, body, (codes, first)), first

  new, rest, first = (
    np.asarray(x, np.float64)
    for x in jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), rounds))
  )
  np.testing.assert_allclose(
    new + rest - first, np.tile(count * step, (rounds, 1)), atol=1e-5
  )
  p = np.abs(count * np.asarray(step, np.float64))  # Of having moved by one.
  error = np.sqrt(p * (1 - p) / rounds)
  z = (new.mean(axis=0) - count * np.asarray(step)) / error
  assert np.abs(z).max() < 4.5
  assert 0.5 < np.mean(z**2) < 1.7


def test_without_a_step_no_code_moves():
  codes = _ternary(jax.random.key(0), (1000,))
  rest = _topology.first_residual(jax.random.key(1), (1000,))
  new, again = _topology.feed_back(codes, jnp.zeros(1000), rest)
  np.testing.assert_array_equal(new, codes)
  np.testing.assert_allclose(again, rest, atol=1e-6)


def test_code_at_its_bound_does_not_store_up_steps():
  codes, rest = jnp.ones((8,), jnp.int8), jnp.zeros(8)
  for _ in range(50):
    codes, rest = _topology.feed_back(codes, jnp.full(8, 0.9), rest)
  np.testing.assert_array_equal(codes, 1)
  np.testing.assert_array_equal(rest, 0.5)


def test_integer_noise_has_mean_zero_and_is_sparse():
  noise = _topology.integer_noise(jax.random.key(0), (200_000,), 0.25)
  x = np.asarray(noise, np.float64)
  assert abs(x.mean()) < 4.5 * x.std() / np.sqrt(x.size)
  # E|sigma z| = 0.25 * sqrt(2 / pi) of the codes move.
  np.testing.assert_allclose(np.mean(x != 0), 0.1995, atol=0.005)


def test_units_hold_all_planes_and_both_rows_of_a_hidden_unit():
  leaf = jnp.arange(2 * 2 * 3 * 4).reshape(2, 2, 3, 4)
  units = _topology.to_units(leaf, 3)
  assert units.shape == (3, 16)
  np.testing.assert_array_equal(units[1].reshape(2, 2, 4), leaf[:, :, 1])
  np.testing.assert_array_equal(_topology.from_units(units, leaf.shape), leaf)


def test_scales_evolve_with_their_rows():
  scale = jnp.linspace(0.5, 2, _ROWS)[:, None]
  want = _X @ (_TARGET * scale).T

  def unit_loss(params, batch):
    del batch
    w = jnp.sum(params[_PATH] * params['mlp/linear/scale'], axis=0)
    return {'linear': jnp.mean(jnp.square(_X @ w.T - want), axis=0)}

  problem = _problem.Problem(
    lambda p, b: jnp.mean(unit_loss(p, b)['linear']), unit_loss
  )
  start = {_PATH: _TARGET[None], 'mlp/linear/scale': jnp.ones((1, _ROWS, 1))}
  params, metrics = _evolve(
    4000, start, problem, discrete='select', fitness='unit', sigma=0.05
  )
  np.testing.assert_allclose(params['mlp/linear/scale'][0], scale, rtol=5e-3)
  assert float(metrics['loss']) < 1e-4 * float(problem.loss(start, None))


def test_rows_that_lean_on_each_other_never_raise_the_loss():
  def loss(params, batch):
    del batch
    return jnp.square(jnp.sum(params[_PATH].astype(jnp.float32)) - 7)

  def unit_loss(params, batch):  # Every row takes all the credit.
    return {'linear': jnp.full((_ROWS,), loss(params, batch))}

  problem = _problem.Problem(loss, unit_loss)
  config = _evolution.Evolution(
    form='integer', discrete='select', fitness='unit', population=8
  )
  params, state = _START, config.init(_START, jax.random.key(0))
  update = jax.jit(functools.partial(config.update, problem))
  losses = [float(loss(params, None))]
  for i in range(20):
    params, state, metrics = update(params, state, None, jax.random.key(i))
    losses.append(float(loss(params, None)))
    assert losses[-1] == float(metrics['loss'])
  assert np.all(np.diff(losses) <= 0)


def test_unit_loss_that_is_missing_or_unknown():
  config = _evolution.Evolution(
    form='integer', discrete='select', fitness='unit'
  )
  state = config.init(_START, jax.random.key(0))
  whole = _problem.Problem(_PROBLEM.loss)
  with pytest.raises(errors.TrainError, match='does not'):
    config.update(whole, _START, state, None, jax.random.key(0))
  other = _problem.Problem(
    _PROBLEM.loss, lambda p, b: {'gating': _unit_loss(p, b)['linear']}
  )
  with pytest.raises(errors.TrainError, match="'gating'"):
    config.update(other, _START, state, None, jax.random.key(0))
