# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Evolution of floating leaves: against gradients and optima that are known."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext.train import _evolution
from gemma_ext.train import _noise
from gemma_ext.train import _problem

_TARGET = {
  'a': jnp.array([1.0, -2.0, 0.5, 3.0]),
  'w': jax.random.normal(jax.random.key(7), (4, 6)),
}
_START = jax.tree.map(jnp.ones_like, _TARGET)


def _loss(params, batch):
  del batch
  parts = jax.tree.map(lambda p, t: jnp.sum(jnp.square(p - t)), params, _TARGET)
  return sum(jax.tree.leaves(parts))


_PROBLEM = _problem.Problem(loss=_loss)


def _run(config, problem, params, batch=None, seed=1):
  update = jax.jit(functools.partial(config.update, problem))
  state = config.init(params, jax.random.key(0))
  for i in range(config.steps):
    key = jax.random.fold_in(jax.random.key(seed), i)
    params, state, metrics = update(params, state, batch, key)
  return params, state, metrics


@pytest.mark.parametrize(
  'fields',
  [
    {'shaping': 'rank', 'learning_rate': 0.1},
    {'shaping': 'zscore', 'learning_rate': 0.1},
    {'shaping': 'none', 'optimizer': 'sgd', 'learning_rate': 0.1},
  ],
)
def test_reaches_the_known_optimum(fields):
  config = _evolution.Evolution(steps=300, population=32, **fields)
  params, _, _ = _run(config, _PROBLEM, _START)
  assert float(_loss(params, None)) < 1e-3 * float(_loss(_START, None))
  for name, target in _TARGET.items():
    np.testing.assert_allclose(params[name], target, atol=0.1)


@pytest.mark.parametrize('rank', [1, 2, 8])
def test_mean_estimate_is_the_gradient_within_its_standard_error(rank):
  rate = 1e-3
  config = _evolution.Evolution(
    steps=10**6,
    population=2,
    rank=rank,
    sigma=1e-2,
    shaping='none',
    optimizer='sgd',
    learning_rate=rate,
  )
  state = config.init(_START, jax.random.key(0))
  assert _noise.is_low_rank((4, 6), rank) == (rank <= 2)

  @jax.jit
  def estimate(key):
    new, _, _ = config.update(_PROBLEM, _START, state, None, key)
    diff = jax.tree.map(lambda p, m: (p - m) / rate, _START, new)
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(diff)])

  keys = jax.random.split(jax.random.key(2), 4000)
  found = np.asarray(jax.lax.map(estimate, keys), np.float64)
  gradient = jax.grad(_loss)(_START, None)
  want = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])
  error = found.std(axis=0) / np.sqrt(len(found))
  z = (found.mean(axis=0) - want) / error
  assert np.abs(z).max() < 4.5
  assert 0.4 < np.mean(z**2) < 2.0
  assert np.all(error < 0.5)
  # Power: the estimate tells the gradient from none at all.
  assert np.mean((found.mean(axis=0) / error) ** 2) > 20


def test_pairs_are_antithetic_and_noise_comes_again_from_its_key():
  seen = []

  def loss(params, batch):
    del batch
    jax.debug.callback(lambda x: seen.append(np.array(x)), params['w'])
    return jnp.sum(params['w'])

  config = _evolution.Evolution(steps=1, population=2, sigma=0.5)
  start = {'w': jnp.ones((4, 6))}
  state = config.init(start, jax.random.key(0))
  for _ in range(2):
    config.update(_problem.Problem(loss), start, state, None, jax.random.key(3))
    jax.effects_barrier()
  moves = sorted((x - 1 for x in seen), key=lambda x: x[0, 0])
  assert len(moves) == 4
  np.testing.assert_array_equal(moves[0], moves[1])
  np.testing.assert_array_equal(moves[2], moves[3])
  np.testing.assert_allclose(moves[0], -moves[3], atol=1e-6)
  assert np.abs(moves[0]).max() > 0.1


def test_noise_has_unit_variance_and_no_correlation():
  draw = lambda key: _noise.draw(key, (3, 8), rank=1, dtype=jnp.float32).dense()
  x = jax.vmap(draw)(jax.random.split(jax.random.key(0), 20_000))
  x = np.asarray(x, np.float64).reshape(len(x), -1)
  # Products of two normals have a kurtosis of 9: var(x^2) is 8.
  np.testing.assert_allclose(np.mean(x**2, axis=0), 1, atol=5 * 0.02)
  cross = np.cov(x.T) - np.diag(np.var(x, axis=0))
  assert np.abs(cross).max() < 5 * 3 / np.sqrt(len(x))


@pytest.mark.parametrize('rank', [1, 3, 6])
def test_perturbed_matmul_is_the_product_with_the_perturbed_matrix(rank):
  k = jax.random.split(jax.random.key(0), 4)
  w = jax.random.normal(k[0], (2, 5, 7))
  a = jax.random.normal(k[1], (2, 5, rank))
  b = jax.random.normal(k[2], (7, rank))
  x = jax.random.normal(k[3], (3, 4, 7))
  low = _noise.LowRank(w, a, b, jnp.float32(0.3))
  dense = np.asarray(w, np.float64) + 0.3 * np.einsum('gfr,cr->gfc', a, b)
  np.testing.assert_allclose(low.dense(), dense, rtol=1e-5, atol=1e-5)
  want = np.einsum('abc,gfc->abgf', np.asarray(x, np.float64), dense)
  got = _noise.matmul(x, low)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  got = _noise.matmul(x, low.dense())
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_combine_is_the_weighted_sum_of_dense_noise():
  keys = jax.random.split(jax.random.key(0), 5)
  weights = jax.random.normal(jax.random.key(1), (5,))
  for shape in ((9,), (6, 7), (2, 5, 7)):
    noise = jax.vmap(
      lambda k, s=shape: _noise.draw(k, s, rank=2, dtype=jnp.float32)
    )(keys)
    assert (noise.b is None) == (len(shape) == 1)
    dense = jax.vmap(_noise.Factors.dense)(noise)
    want = np.tensordot(np.asarray(weights, np.float64), dense, 1)
    np.testing.assert_allclose(
      _noise.combine(weights, noise), want, rtol=1e-5, atol=1e-5
    )


def _layer(params, batch):
  h = jax.nn.gelu(_noise.matmul(batch['x'] * params['norm'], params['in/w']))
  return jnp.mean(jnp.square(_noise.matmul(h, params['out/w']) - batch['y']))


def _layer_params(hidden=48, width=32):
  k = jax.random.split(jax.random.key(5), 2)
  return {
    'norm': jnp.ones((width,)),
    'in/w': jax.random.normal(k[0], (hidden, width)) / 6,
    'out/w': jax.random.normal(k[1], (width, hidden)) / 7,
  }


def _layer_batch(width=32):
  k = jax.random.split(jax.random.key(6), 2)
  return {n: jax.random.normal(i, (3, width)) for n, i in zip('xy', k)}


def _sizes(jaxpr) -> list[int]:
  """Sizes of all arrays of a jaxpr, those of inner ones included."""
  out = []
  for eqn in jaxpr.eqns:
    out += [v.aval.size for v in eqn.outvars if hasattr(v.aval, 'size')]
    for inner in jax.tree.leaves(
      list(eqn.params.values()),
      is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        out += _sizes(inner)
  return out


@pytest.mark.parametrize('lazy', ['w', ''])
def test_no_population_of_matrices(lazy):
  config = _evolution.Evolution(steps=1, population=16, lazy=lazy)
  params, batch = _layer_params(), _layer_batch()
  state = config.init(params, jax.random.key(0))
  update = functools.partial(config.update, _problem.Problem(_layer))
  jaxpr = jax.make_jaxpr(update)(params, state, batch, jax.random.key(0))
  largest = max(_sizes(jaxpr.jaxpr))
  matrix = 48 * 32
  assert largest >= matrix
  if lazy:
    assert largest == 16 * 3 * 48  # Activations of all members.
  else:  # The check sees a population of matrices where there is one.
    assert largest == 16 * matrix


def test_lazy_leaves_chunks_and_plain_ones_take_the_same_step():
  params, batch = _layer_params(), _layer_batch()
  problem = _problem.Problem(_layer)
  outs = []
  for fields in ({}, {'lazy': 'w'}, {'lazy': 'w', 'chunk': 6}, {'chunk': 2}):
    config = _evolution.Evolution(
      steps=5, population=16, optimizer='sgd', shaping='none', **fields
    )
    outs.append(_run(config, problem, params, batch)[0])
  moved = float(jnp.abs(outs[0]['in/w'] - params['in/w']).max())
  assert moved > 1e-4
  for other in outs[1:]:
    for name, leaf in outs[0].items():
      np.testing.assert_allclose(other[name], leaf, atol=2e-2 * moved)


def test_same_key_same_bits():
  config = _evolution.Evolution(steps=3, population=8)
  a, sa, _ = _run(config, _PROBLEM, _START)
  b, sb, _ = _run(config, _PROBLEM, _START)
  c, _, _ = _run(config, _PROBLEM, _START, seed=2)
  jax.tree.map(np.testing.assert_array_equal, (a, sa), (b, sb))
  assert not np.array_equal(a['w'], c['w'])


def test_shaped_fitness():
  losses = jnp.array([3.0, 1.0, jnp.nan, 1.0, 7.0])
  rank = _noise.shape_fitness(losses, 'rank')
  np.testing.assert_allclose(rank, [0.0, -0.375, 0.375, -0.375, 0.375])
  zscore = np.asarray(_noise.shape_fitness(losses, 'zscore'))
  filled = np.array([3.0, 1, 7, 1, 7])
  np.testing.assert_allclose(
    zscore, (filled - filled.mean()) / filled.std(), rtol=1e-5
  )


@pytest.mark.parametrize(
  ('bad', 'word'),
  [
    ({'steps': 0}, 'steps'),
    ({'population': 7}, 'population'),
    ({'chunk': 3}, 'chunk'),
    ({'rank': 0}, 'rank'),
    ({'sigma': 0.0}, 'sigma'),
    ({'sigma': float('nan')}, 'sigma'),
    ({'margin': 1.0}, 'margin'),
    ({'density': 1.5}, 'density'),
    ({'shaping': 'best'}, 'shaping'),
    ({'fitness': 'unit'}, 'select'),
    ({'discrete': 'select'}, 'integer'),
  ],
)
def test_bad_field(bad, word):
  with pytest.raises(errors.ConfigError, match=word):
    _evolution.Evolution(**bad)


def test_lazy_that_matches_nothing():
  config = _evolution.Evolution(lazy='v')
  with pytest.raises(errors.TrainError, match=re.escape("'v'")):
    config.init({'in/w': jnp.ones((2, 2))}, jax.random.key(0))


def test_integer_form_without_codes():
  config = _evolution.Evolution(form='integer')
  with pytest.raises(errors.TrainError, match='codes'):
    config.init({'codes': jnp.ones((2, 2))}, jax.random.key(0))
