# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows that evolve: the bookkeeping is exact, and the branch gets better."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import compress
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext import train
from gemma_ext.train import _block
from gemma_ext.train import _branch
from gemma_ext.train import _latents
from gemma_ext.train import _rows
from tests import tiny

_N = 256


def _made(family: str, weights: str, **kwargs):
  model = tiny.model(family)
  params = tiny.params(model)
  recipe = recipe_lib.Recipe.of(
    {'layer_1/mlp': recipe_lib.Ternary(group=64, **kwargs)}
  )
  packed = compress.compress(model, params, recipe)
  branch = _branch.of_layer(
    gx_nn.Compressed(model=model, recipe=recipe), 'layer_1'
  )
  dense = _branch.of_layer(model, 'layer_1')
  dense_part = _branch.params_of(params, 'layer_1')
  moving, fixed = _latents.open_params(
    branch,
    _branch.params_of(packed, 'layer_1'),
    form='integer',
    weights=weights,
  )
  residual = np.random.default_rng(0).standard_normal((_N, 128))
  residual = jnp.asarray(residual, jnp.float32)
  out = dense.apply(dense_part, residual)
  target = residual + out['branch']
  weight = _block.token_weights('norm', np.asarray(target), np.ones(_N, bool))
  root = _block.metric('fisher', np.diag(np.linspace(0.5, 2, 128)))
  batch = {
    'residual': residual,
    'target': target,
    'weight': jnp.asarray(weight),
    'root': jnp.asarray(root),
    'scale': _block.scale_of(
      np.asarray(residual), np.asarray(target), weight, root
    ),
    'fixed': fixed,
    'hidden': out['hidden'],
  }
  return branch, moving, batch


def _copy(tree):
  return jax.tree.map(jnp.array, tree)


@pytest.mark.parametrize('family', ['gemma2', 'gemma3', 'gemma4'])
@pytest.mark.parametrize('weights', _rows.WEIGHTS)
def test_units_get_better_and_no_other_leaf_moves(family, weights):
  branch, moving, batch = _made(family, weights)
  evolve = train.EvolveRows(steps=1, generations=150, z=1.0)
  _rows.check(branch, moving, batch['fixed'], batch['residual'], jnp.float32)
  problem = _block.problem(branch, dtype=jnp.float32)
  before = problem.unit_loss(moving, batch)[weights]
  whole = problem.loss(moving, batch)
  step = evolve.compile(branch, jnp.float32)
  after, _, metrics = step(_copy(moving), (), batch, jax.random.key(0))
  found = problem.unit_loss(after, batch)[weights]
  assert float(jnp.sum(found)) < 0.9 * float(jnp.sum(before))
  # Rows are judged on their own; the norm couples them only weakly.
  assert np.mean(np.asarray(found) <= np.asarray(before) * 1.001) > 0.95
  if weights == 'linear':
    assert float(problem.loss(after, batch)) < 0.9 * float(whole)
  assert 0 < float(metrics['changed']) < 1
  codes = np.asarray(after[f'mlp/{weights}/codes'])
  assert codes.dtype == np.int8 and set(np.unique(codes)) == {-1, 0, 1}
  for path, leaf in moving.items():
    if weights not in path:
      np.testing.assert_array_equal(after[path], leaf)


def test_outputs_that_are_kept_are_those_of_the_codes():
  # After many generations the loss that the rows believe in is the real one.
  branch, moving, batch = _made('gemma3', 'linear', planes=2)
  config = train.EvolveRows(steps=1, generations=200, scale_trials=2, z=0.0)
  codes = moving['mlp/linear/codes']
  flat = jnp.moveaxis(codes, 0, 1).reshape(128, -1)
  scale = jnp.moveaxis(moving['mlp/linear/scale'], 0, 1).reshape(128, -1)
  params = _latents.join(branch, moving, batch['fixed'], dtype=jnp.float32)
  found = branch.apply(params, batch['residual'])
  columns, outputs, judge = _rows._linear_rows(branch, found, batch)
  cols = codes.shape[-1]
  new, new_scale, _ = _rows._evolve(
    config, flat, scale, cols, columns, outputs, judge, jax.random.key(1)
  )

  def dense(codes, scale):
    wide = np.repeat(np.asarray(scale, np.float64), 64, axis=1)
    return (np.asarray(codes, np.float64) * wide).reshape(128, 2, cols).sum(1)

  shift = (dense(new, new_scale) - dense(flat, scale)) @ np.asarray(
    columns, np.float64
  )
  real = np.sum((np.asarray(outputs, np.float64) + shift) ** 2, axis=1)
  start = np.sum(np.asarray(judge(outputs), np.float64), axis=1)
  assert np.all(real <= start * (1 + 1e-5))
  assert real.sum() < 0.95 * start.sum()


def test_recovers_rows_that_are_ternary():
  rng = np.random.default_rng(0)
  want = rng.integers(-1, 2, (16, 24)).astype(np.int8)
  start = rng.integers(-1, 2, (16, 24)).astype(np.int8)
  scale = jnp.ones((16, 1), jnp.float32)
  columns = jnp.asarray(rng.standard_normal((24, 200)), jnp.float32)
  outputs = jnp.asarray(start - want, jnp.float32) @ columns
  config = train.EvolveRows(steps=1, generations=1500, z=0.0, scale_trials=0)
  judge = jnp.square
  found, _, _ = jax.jit(
    lambda codes: _rows._evolve(
      config, codes, scale, 24, columns, outputs, judge, jax.random.key(0)
    )
  )(jnp.asarray(start))
  np.testing.assert_array_equal(found, want)


def test_same_key_same_codes():
  branch, moving, batch = _made('gemma3', 'linear')
  step = train.EvolveRows(steps=1, generations=20).compile(branch, jnp.float32)
  a, b, c = (
    step(_copy(moving), (), batch, jax.random.key(k))[0]['mlp/linear/codes']
    for k in (3, 3, 4)
  )
  np.testing.assert_array_equal(a, b)
  assert not np.array_equal(a, c)


def test_two_weights_are_refused():
  branch, moving, batch = _made('gemma3', '.*')
  with pytest.raises(errors.TrainError, match='rows of one weight'):
    _rows.check(branch, moving, batch['fixed'], batch['residual'], jnp.float32)


def test_scales_that_it_cannot_move_are_refused():
  branch, moving, batch = _made(
    'gemma3', 'linear', planes=2, tied=True, scale='ue5m3'
  )
  with pytest.raises(errors.TrainError, match="'bf16'"):
    _rows.check(branch, moving, batch['fixed'], batch['residual'], jnp.float32)


def test_sparse_activations_are_refused():
  model = tiny.model('gemma3n')
  params = tiny.params(model)
  recipe = recipe_lib.Recipe.of({'layer_0/mlp': recipe_lib.Ternary(group=64)})
  packed = compress.compress(model, params, recipe)
  branch = _branch.of_layer(
    gx_nn.Compressed(model=model, recipe=recipe), 'layer_0'
  )
  moving, fixed = _latents.open_params(
    branch,
    _branch.params_of(packed, 'layer_0'),
    form='integer',
    weights='linear',
  )
  residual = jax.random.normal(jax.random.key(0), (8, 128))
  with pytest.raises(errors.TrainError, match='sparse'):
    _rows.check(branch, moving, fixed, residual, jnp.float32)


@pytest.mark.parametrize(
  'bad',
  [{'steps': 0}, {'generations': 0}, {'population': 0}, {'z': -1}],
)
def test_bad_field(bad):
  with pytest.raises(errors.ConfigError, match=next(iter(bad))):
    train.EvolveRows(**bad)
