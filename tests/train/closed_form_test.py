# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Closed form: moments against numpy, and what compensation buys a branch."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import compress
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext import train
from gemma_ext.train import _branch
from gemma_ext.train import _closed_form
from gemma_ext.train import _latents
from tests import tiny

_N = 600


_PLAIN = recipe_lib.Ternary(group=64)
_TIED = recipe_lib.Ternary(group=8, planes=2, scale='ue5m3', tied=True)


@pytest.fixture(
  scope='module',
  params=[
    ('gemma2', _PLAIN),
    ('gemma3', _PLAIN),
    ('gemma4', _PLAIN),
    ('gemma3', _TIED),
  ],
  ids=['gemma2', 'gemma3', 'gemma4', 'tied'],
)
def made(request):
  family, method = request.param
  model = tiny.model(family)
  params = tiny.params(model)
  recipe = recipe_lib.Recipe.of({'layer_0/mlp': method})
  packed = compress.compress(model, params, recipe)
  branch = _branch.of_layer(
    gx_nn.Compressed(model=model, recipe=recipe), 'layer_0'
  )
  rng = np.random.default_rng(0)
  # Real residual streams live in few directions.
  mix = rng.standard_normal((128, 128)) * np.geomspace(3, 0.05, 128)[:, None]
  residual = (rng.standard_normal((2 * _N, 128)) @ mix).astype(np.float32)
  return (
    branch,
    _branch.of_layer(model, 'layer_0'),
    _branch.params_of(packed, 'layer_0'),
    _branch.params_of(params, 'layer_0'),
    residual,
  )


def _batches(residual):
  weight = jnp.ones(200, jnp.float32)

  def make():
    for i in range(0, _N, 200):
      yield {'residual': jnp.asarray(residual[i : i + 200]), 'weight': weight}

  return make


def test_fits_better_than_weight_by_weight_on_unseen_inputs(made):
  branch, dense, part, dense_part, residual = made
  moving, fixed = _latents.open_params(branch, part, form='integer')
  fitted = train.ClosedForm().fit(
    branch, dense, dense_part, moving, fixed, _batches(residual), jnp.float32
  )
  unseen = jnp.asarray(residual[_N:])
  want = dense.apply(dense_part, unseen)['branch']

  def error(leaves):
    params = _latents.join(branch, leaves, fixed, dtype=jnp.float32)
    found = branch.apply(params, unseen)['branch']
    return float(jnp.sum(jnp.square(found - want)) / jnp.sum(want**2))

  assert error(fitted) < 0.85 * error(moving)
  for path, leaf in moving.items():
    assert fitted[path].dtype == leaf.dtype
    if 'norm' in path:
      np.testing.assert_array_equal(fitted[path], leaf)
  closed = _latents.close_params(branch, fitted, fixed, dtype=jnp.float32)
  np.testing.assert_allclose(
    branch.apply(closed, unseen)['branch'],
    branch.apply(
      _latents.join(branch, fitted, fixed, dtype=jnp.float32), unseen
    )['branch'],
    atol=1e-5,
  )


def test_moments_equal_float64(made):
  branch, dense, part, dense_part, residual = made
  x = jnp.asarray(residual[:50])
  weight = jnp.asarray(np.linspace(0, 2, 50), jnp.float32)
  found = _closed_form._moments(branch, dense, jnp.float32, True)(
    part, dense_part, x, weight
  )
  ours = branch.apply(part, x)
  theirs = dense.apply(dense_part, x)
  a, b, y = (
    np.asarray(v, np.float64)
    for v in (ours['hidden'], theirs['hidden'], ours['inner'])
  )
  w = np.asarray(weight, np.float64) / np.mean(y**2, axis=-1)
  np.testing.assert_allclose(
    found['inner'], (a * w[:, None]).T @ a, rtol=2e-3, atol=1e-3
  )
  np.testing.assert_allclose(
    found['cross'], (a * w[:, None]).T @ b, rtol=2e-3, atol=1e-3
  )
  np.testing.assert_allclose(found['weight'], w.sum(), rtol=1e-4)


def test_regression_finds_the_weights_that_give_the_dense_outputs():
  rng = np.random.default_rng(0)
  dense_hidden = rng.standard_normal((4000, 24))
  mix = np.eye(24) + 0.2 * rng.standard_normal((24, 24))
  hidden = dense_hidden @ mix
  w = rng.standard_normal((8, 24))
  found = train.ClosedForm(ridge=1e-6)._regress(
    jnp.asarray(w, jnp.float32),
    jnp.asarray(hidden.T @ hidden / 4000),
    jnp.asarray(hidden.T @ dense_hidden / 4000),
  )
  want = dense_hidden @ w.T
  away = hidden @ np.asarray(found, np.float64).T - want
  assert np.linalg.norm(away) < 5e-3 * np.linalg.norm(want)
  # The weights as they are would miss by a hundred times that.
  assert np.linalg.norm(hidden @ w.T - want) > 0.5 * np.linalg.norm(want)
  held = train.ClosedForm(ridge=100)._regress(
    jnp.asarray(w, jnp.float32),
    jnp.asarray(hidden.T @ hidden / 4000),
    jnp.asarray(hidden.T @ dense_hidden / 4000),
  )
  assert np.abs(np.asarray(held) - w).max() < 0.1


def test_no_tokens_and_no_weight(made):
  branch, dense, part, dense_part, residual = made
  moving, fixed = _latents.open_params(branch, part, form='integer')
  fit = lambda batches: train.ClosedForm().fit(
    branch, dense, dense_part, moving, fixed, batches, jnp.float32
  )
  with pytest.raises(errors.TrainError, match='no tokens'):
    fit(lambda: [])
  batch = {'residual': jnp.asarray(residual[:8]), 'weight': jnp.zeros(8)}
  with pytest.raises(errors.TrainError, match='weight 0'):
    fit(lambda: [batch])


@pytest.mark.parametrize('bad', [{'damping': 0}, {'ridge': -1}])
def test_bad_field(bad):
  with pytest.raises(errors.ConfigError, match=next(iter(bad))):
    train.ClosedForm(**bad)


def test_distillation_refuses_it():
  with pytest.raises(errors.ConfigError, match='Block'):
    train.Distill(optimizer=train.ClosedForm())
