# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The loss of a branch against float64, whole and by units."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import compress
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.train import _block
from gemma_ext.train import _branch
from gemma_ext.train import _latents
from tests import tiny

_N = 48


@pytest.fixture(scope='module')
def made():
  dense = tiny.model('gemma3')
  params = tiny.params(dense)
  recipe = recipe_lib.Recipe.of({'layer_0/mlp': recipe_lib.Ternary(group=128)})
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  packed = compress.compress(dense, params, recipe)
  branch = _branch.of_layer(model, 'layer_0')
  part = _branch.params_of(packed, 'layer_0')
  rng = np.random.default_rng(0)
  residual = rng.standard_normal((_N, 128)).astype(np.float32)
  target = residual + rng.standard_normal((_N, 128)).astype(np.float32)
  g = rng.standard_normal((500, 128)) * np.geomspace(0.1, 3, 128)
  hidden = _branch.of_layer(dense, 'layer_0').apply(
    _branch.params_of(params, 'layer_0'), jnp.asarray(residual)
  )['hidden']
  return branch, part, residual, target, (g.T @ g) / 500, hidden


def _batch(made, weighting, fixed, mask=None):
  _, _, residual, target, fisher, hidden = made
  mask = np.ones(_N, bool) if mask is None else mask
  weight = _block.token_weights(weighting, target, mask)
  root = _block.metric(weighting, fisher)
  scale = _block.scale_of(residual, target, weight, root)
  return {
    'residual': residual,
    'target': target,
    'weight': weight,
    'root': jnp.asarray(root),
    'scale': scale,
    'fixed': fixed,
    'hidden': hidden,
  }


@pytest.mark.parametrize('weighting', _block.WEIGHTINGS)
def test_loss_equals_float64(made, weighting):
  branch, part, residual, target, fisher, _ = made
  moving, fixed = _latents.open_params(branch, part, form='latent')
  mask = np.arange(_N) % 5 != 0
  batch = _batch(made, weighting, fixed, mask)
  problem = _block.problem(branch, dtype=jnp.float32)
  out = np.asarray(branch.apply(part, residual)['branch'], np.float64)
  error = residual + out - target
  metric = {
    'mse': np.eye(128),
    'norm': np.eye(128),
    'fisher': np.diag(np.diag(fisher)),
    'fisher_full': fisher + 0.1 * np.diag(np.diag(fisher)),
  }[weighting]
  norms = np.sum(target.astype(np.float64) ** 2, axis=-1)
  w = mask * (1.0 if weighting == 'mse' else 1 / norms)
  squares = lambda e: np.sum(w * np.einsum('ni,ij,nj->n', e, metric, e))
  want = squares(error) / squares(target.astype(np.float64) - residual)
  np.testing.assert_allclose(problem.loss(moving, batch), want, rtol=2e-4)


def test_units_of_linear_sum_to_the_whole(made):
  branch, part, *_ = made
  moving, fixed = _latents.open_params(
    branch, part, form='integer', weights='linear'
  )
  assert moving['mlp/linear/codes'].dtype == jnp.int8
  assert 'mlp/gating_einsum/codes' in fixed
  problem = _block.problem(branch, dtype=jnp.float32)
  batch = _batch(made, 'fisher', fixed)
  found = problem.unit_loss(moving, batch)
  assert found.keys() == {'linear'}
  assert found['linear'].shape == (128,)
  np.testing.assert_allclose(
    jnp.sum(found['linear']), problem.loss(moving, batch), rtol=1e-4
  )


def test_units_of_gating_see_their_own_rows_only(made):
  branch, part, *_ = made
  moving, fixed = _latents.open_params(
    branch, part, form='integer', weights='gating_einsum'
  )
  problem = _block.problem(branch, dtype=jnp.float32)
  batch = _batch(made, 'fisher', fixed)
  before = problem.unit_loss(moving, batch)['gating_einsum']
  assert before.shape == (256,)
  codes = moving['mlp/gating_einsum/codes']
  changed = codes.at[0, 1, 7].set(-codes[0, 1, 7])
  after = problem.unit_loss(
    moving | {'mlp/gating_einsum/codes': changed}, batch
  )['gating_einsum']
  assert after[7] != before[7]
  same = np.arange(256) != 7
  np.testing.assert_array_equal(after[same], before[same])


def test_dense_hidden_has_no_error(made):
  branch, part, residual, target, _, _ = made
  moving, fixed = _latents.open_params(
    branch, part, form='integer', weights='gating_einsum'
  )
  batch = _batch(made, 'norm', fixed)
  batch['hidden'] = branch.apply(part, jnp.asarray(residual))['hidden']
  problem = _block.problem(branch, dtype=jnp.float32)
  found = problem.unit_loss(moving, batch)['gating_einsum']
  assert float(jnp.max(found)) < 1e-10
  del target


def test_unknown_weighting(made):
  with pytest.raises(errors.ConfigError, match='fisher_full'):
    _block.metric('hessian', np.eye(3))
