# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Branches on their own equal what the whole model does, in every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import compress
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext import train
from gemma_ext.train import _branch
from gemma_ext.train import _capture
from gemma_ext.train import _latents
from tests import tiny

_FAMILIES = ('gemma2', 'gemma3', 'gemma3n', 'gemma4', 'gemma4_e2b')


def _tokens() -> jax.Array:
  return jnp.asarray(
    np.random.default_rng(0).integers(3, 500, (2, 16)), jnp.int32
  )


@pytest.mark.parametrize('family', _FAMILIES)
def test_branch_equals_the_model_and_the_tap_changes_nothing(family):
  model = tiny.model(family)
  params = tiny.params(model)
  plain = model.apply({'params': params}, _tokens()).logits
  probe = _capture.probe(model)
  shifts = {'layer_1': jnp.zeros((2, 16, 128))}
  out, taps = _capture.branches(probe, params, _tokens(), shifts=shifts)
  np.testing.assert_allclose(out.logits, plain, atol=2e-5)
  branch = _branch.of_layer(model, 'layer_1')
  found = branch.apply(
    _branch.params_of(params, 'layer_1'), taps['layer_1']['residual']
  )
  for name in ('inner', 'branch'):
    np.testing.assert_allclose(found[name], taps['layer_1'][name], atol=2e-5)
  # And the official model still answers as before in the same process.
  again = model.apply({'params': params}, _tokens()).logits
  np.testing.assert_array_equal(again, plain)


def test_shift_has_the_gradient_of_the_branch():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  probe = _capture.probe(model)

  def total(shift):
    out, _ = _capture.branches(
      probe, params, _tokens(), shifts={'layer_2': shift}
    )
    return jnp.sum(out.logits[..., 7])

  zero = jnp.zeros((2, 16, 128))
  gradient = jax.grad(total)(zero)
  direction = jax.random.normal(jax.random.key(0), zero.shape)
  step = 1e-2
  slope = (total(step * direction) - total(-step * direction)) / (2 * step)
  np.testing.assert_allclose(
    slope, jnp.sum(gradient * direction), rtol=2e-2, atol=1e-3
  )


@pytest.mark.parametrize('form', _latents.FORMS)
@pytest.mark.parametrize(
  'method',
  [
    recipe_lib.Ternary(group=128, planes=2),
    recipe_lib.Ternary(group=8, planes=2, scale='ue5m3', tied=True),
    recipe_lib.Ternary(group=16, scale='ue5m3'),
  ],
  ids=['planes', 'tied', 'one'],
)
def test_open_and_close_keep_every_bit(form, method):
  dense = tiny.model('gemma3')
  params = tiny.params(dense)
  recipe = recipe_lib.Recipe.of({r'layer_\d+/mlp': method})
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  packed = compress.compress(dense, params, recipe)
  branch = _branch.of_layer(model, 'layer_0')
  part = _branch.params_of(packed, 'layer_0')
  moving, fixed = _latents.open_params(
    branch, part, form=form, dense=_branch.params_of(params, 'layer_0')
  )
  closed = _latents.close_params(branch, moving, fixed, dtype=jnp.float32)
  want, got = _branch.flatten(part), _branch.flatten(closed)
  assert want.keys() == got.keys()
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
  joined = _latents.join(branch, moving, fixed, dtype=jnp.float32)
  x = jax.random.normal(jax.random.key(0), (5, 128))
  np.testing.assert_allclose(
    branch.apply(joined, x)['branch'],
    branch.apply(part, x)['branch'],
    atol=1e-5,
  )


def test_latents_start_at_the_dense_weight():
  dense = tiny.model('gemma3')
  params = tiny.params(dense)
  recipe = recipe_lib.Recipe.of({'layer_0/mlp': recipe_lib.Ternary(group=128)})
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  packed = compress.compress(dense, params, recipe)
  branch = _branch.of_layer(model, 'layer_0')
  moving, _ = _latents.open_params(
    branch,
    _branch.params_of(packed, 'layer_0'),
    form='latent',
    dense=_branch.params_of(params, 'layer_0'),
  )
  latent = np.asarray(moving['mlp/linear/codes'])[0]
  scale = np.asarray(moving['mlp/linear/scale'])[0]
  w = np.asarray(params['layer_0']['mlp']['linear']).T
  ratio = w / np.repeat(scale, 128, axis=-1)
  inside = np.abs(ratio) < 1.4
  assert inside.mean() > 0.7
  near = np.abs(latent - ratio)[inside]
  assert np.quantile(near, 0.95) < 0.02


def test_no_such_layer():
  with pytest.raises(errors.TrainError, match='layer_0 to layer_2'):
    _branch.of_layer(tiny.model('gemma3'), 'layer_9')


def test_mixture_is_refused():
  with pytest.raises(errors.TrainError, match='mixtures of experts'):
    _branch.of_layer(tiny.model('gemma4_moe'), 'layer_0')


def test_unpacked_params_are_refused():
  dense = tiny.model('gemma3')
  params = tiny.params(dense)
  recipe = recipe_lib.Recipe.of({'layer_0/mlp': recipe_lib.Ternary(group=128)})
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  branch = _branch.of_layer(model, 'layer_0')
  with pytest.raises(errors.ParamsMismatchError, match='not packed'):
    _latents.open_params(
      branch, _branch.params_of(params, 'layer_0'), form='latent'
    )


@pytest.mark.parametrize(
  'method',
  [
    recipe_lib.Ternary(group=32),
    recipe_lib.Ternary(group=8, planes=2, scale='ue5m3', tied=True),
  ],
  ids=['one', 'tied'],
)
def test_margin_keeps_latents_away_from_the_next_code(method):
  dense = tiny.model('gemma3')
  params = tiny.params(dense)
  recipe = recipe_lib.Recipe.of({'layer_0/mlp': method})
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  packed = compress.compress(dense, params, recipe)
  branch = _branch.of_layer(model, 'layer_0')
  part = _branch.params_of(packed, 'layer_0')
  moving, fixed = _latents.open_params(
    branch,
    part,
    form='latent',
    dense=_branch.params_of(params, 'layer_0'),
    margin=0.3,
  )
  closed = _latents.close_params(branch, moving, fixed, dtype=jnp.float32)
  jax.tree.map(np.testing.assert_array_equal, closed, part)
  # A quarter of a step does not turn any code over.
  for step in (-0.25, 0.25):
    moved = {
      k: v + step if k.endswith('linear/codes') else v
      for k, v in moving.items()
    }
    same = _latents.close_params(branch, moved, fixed, dtype=jnp.float32)
    same = _branch.flatten(same)['mlp/linear/codes']
    want = _branch.flatten(part)['mlp/linear/codes']
    np.testing.assert_array_equal(same, want)


def test_margin_is_part_of_a_step():
  with pytest.raises(errors.ConfigError, match='margin must be in'):
    train.Gradient(margin=0.6)
