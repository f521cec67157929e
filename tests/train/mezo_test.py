# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""MeZO against gradients that are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext import train
from gemma_ext.train import _mezo

_TARGET = {
  'a': jnp.array([1.0, -2.0, 0.5, 3.0]),
  'b': jnp.array([[0.5, 1.5], [-1.0, 2.0]]),
}


def _loss(params, batch):
  del batch
  parts = jax.tree.map(lambda p, t: jnp.sum(jnp.square(p - t)), params, _TARGET)
  return sum(jax.tree.leaves(parts))


_PROBLEM = train.Problem(loss=_loss)
_START = jax.tree.map(jnp.ones_like, _TARGET)


def test_reaches_the_known_optimum():
  mezo = train.Mezo(steps=400, pairs=4, learning_rate=2e-2, sigma=1e-3)
  update = jax.jit(functools.partial(mezo.update, _PROBLEM))
  params, state = _START, mezo.init(_START, jax.random.key(0))
  for i in range(mezo.steps):
    params, state, metrics = update(
      params, state, None, jax.random.fold_in(jax.random.key(1), i)
    )
  assert float(metrics['loss']) < 1e-4 * float(_loss(_START, None))
  for name, target in _TARGET.items():
    np.testing.assert_allclose(params[name], target, atol=2e-2)


def test_mean_update_is_the_gradient_within_its_standard_error():
  rate = 1e-3
  mezo = train.Mezo(steps=10**6, pairs=1, learning_rate=rate, sigma=1e-2)
  state = mezo.init(_START, jax.random.key(0))

  @jax.jit
  def estimate(key):
    moved, _, _ = mezo.update(_PROBLEM, _START, state, None, key)
    diff = jax.tree.map(lambda p, m: (p - m) / rate, _START, moved)
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(diff)])

  keys = jax.random.split(jax.random.key(2), 4000)
  found = np.asarray(jax.lax.map(estimate, keys), np.float64)
  gradient = jax.grad(_loss)(_START, None)
  want = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])
  error = found.std(axis=0) / np.sqrt(len(found))
  z = (found.mean(axis=0) - want) / error
  assert np.abs(z).max() < 4.5
  assert np.mean(z**2) < 2.5
  assert np.all(error < 0.5)


def test_same_key_same_step():
  mezo = train.Mezo(steps=10)
  state = mezo.init(_START, jax.random.key(0))
  a, _, _ = mezo.update(_PROBLEM, _START, state, None, jax.random.key(5))
  b, _, _ = mezo.update(_PROBLEM, _START, state, None, jax.random.key(5))
  c, _, _ = mezo.update(_PROBLEM, _START, state, None, jax.random.key(6))
  np.testing.assert_array_equal(a['a'], b['a'])
  assert not np.array_equal(a['a'], c['a'])


def test_noise_of_equal_leaves_differs():
  z = _mezo.noise(jax.random.key(0), {'a': jnp.ones(9), 'b': jnp.ones(9)})
  assert not np.array_equal(z['a'], z['b'])


@pytest.mark.parametrize(
  'bad', [{'steps': 0}, {'pairs': 0}, {'sigma': 0}, {'form': 'integer'}]
)
def test_bad_field(bad):
  with pytest.raises(errors.ConfigError, match=next(iter(bad))):
    train.Mezo(**bad)
