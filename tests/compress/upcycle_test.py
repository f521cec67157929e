# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Upcycling: a dense model as a wider mixture of its own copies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from tests import tiny

_TOKENS = np.random.default_rng(0).integers(3, 500, (2, 12))


def _runner(model):
  """Logits, and what was sown, of parameters."""

  @jax.jit
  def run(params):
    out, state = model.apply(
      {'params': params}, jnp.asarray(_TOKENS), mutable=['intermediates']
    )
    return out.logits, state.get('intermediates')

  return run


@pytest.mark.parametrize(
  ('family', 'router', 'shared'),
  [('gemma2', 'softmax', 1), ('gemma3', 'sigmoid', 0), ('gemma4', 'norm', 1)],
)
def test_copies_are_the_dense_model_whatever_is_chosen(family, router, shared):
  dense = tiny.model(family)
  params = tiny.params(dense)
  want, _ = _runner(dense)(params)
  wider, made, recipe = gx.compress.upcycle(
    dense,
    params,
    num_experts=3,
    top_k=2,
    shared=shared,
    router=router,
    reinitialise=0,
  )
  model = gx.nn.Compressed(model=wider, recipe=recipe)
  run = _runner(model)
  loads = []
  # Another router chooses others, and nothing changes.
  for sign in (1, -3):
    other = jax.tree_util.tree_map_with_path(
      lambda path, x, sign=sign: (
        sign * x if [p.key for p in path[-2:]] == ['router', 'w'] else x
      ),
      made,
    )
    got, sown = run(other)
    np.testing.assert_allclose(
      got, want, atol=1e-4 * float(jnp.abs(want).max()), rtol=0
    )
    loads.append(gx.train.routing(sown)['layer_1/mlp']['load'])
  assert not np.allclose(*loads)
  np.testing.assert_allclose(loads[0].sum(), 2, rtol=1e-5)


def test_some_neurons_start_anew_with_the_same_statistics():
  dense = tiny.model('gemma3')
  params = tiny.params(dense)
  old = np.asarray(params['layer_0']['mlp']['linear'])
  _, made, recipe = gx.compress.upcycle(
    dense, params, num_experts=3, top_k=1, shared=1, reinitialise=0.25
  )
  assert recipe == gx.Recipe.of(
    {
      r'layer_\d+/mlp': gx.MoE(
        num_experts=3, top_k=1, shared=1, router='softmax'
      )
    }
  )
  down = np.asarray(made['layer_0']['mlp']['linear']).reshape(4, 256, 128)
  gate = np.asarray(made['layer_0']['mlp']['gating_einsum'])
  gate = gate.reshape(2, 4, 256, 128)
  was = np.asarray(params['layer_0']['mlp']['gating_einsum'])
  np.testing.assert_array_equal(down[0], old / 2)  # The shared one keeps all.
  moved = []
  for e in (1, 2, 3):
    other = np.flatnonzero((down[e] != old / 2).any(axis=1))
    assert len(other) == 64
    # The same neurons in all three matrices.
    for i in range(2):
      changed = np.flatnonzero((gate[i, e] != was[i]).any(axis=1))
      np.testing.assert_array_equal(changed, other)
    ratio = down[e][other].std() / (old[other] / 2).std()
    assert 0.95 < ratio < 1.05
    moved.append(tuple(other))
  assert len(set(moved)) == 3
  bias = made['layer_0']['mlp']['router']['bias']
  assert bias.dtype == jnp.float32 and bias.shape == (3,)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'router': 'expert_choice'}, 'add up to one'),
    ({'reinitialise': 1.5}, 'reinitialise'),
    ({'top_k': 5}, 'top_k'),
  ],
)
def test_values_out_of_range(change, message):
  fields = {'num_experts': 2, 'top_k': 1} | change
  with pytest.raises(errors.RecipeError, match=message):
    gx.compress.upcycle(tiny.model('gemma3'), {}, **fields)


def test_native_mixtures_and_other_parameters_are_refused():
  with pytest.raises(errors.ParamsMismatchError, match='cannot be upcycled'):
    gx.compress.upcycle(tiny.model('gemma4_moe'), {}, num_experts=2, top_k=1)
  dense = tiny.model('gemma3')
  params = tiny.params(dense)
  params['layer_1']['mlp']['linear'] = jnp.zeros((4, 128))
  with pytest.raises(errors.ParamsMismatchError, match='layer_1/mlp/linear'):
    gx.compress.upcycle(dense, params, num_experts=2, top_k=1)


@pytest.mark.parametrize('router', ['softmax', 'norm'])
def test_mixtures_are_calibrated_as_they_route(router):
  dense = tiny.TinyGemma3Shallow(dtype=jnp.float32)
  wider, params, recipe = gx.compress.upcycle(
    dense,
    tiny.params(dense),
    num_experts=4,
    top_k=1,
    router=router,
    reinitialise=0,
  )
  # Nobody gets the last one.
  leaf = params['layer_0']['mlp']['router']
  leaf['bias'] = leaf['bias'].at[3].set(-1e4)
  mixtures = gx.nn.mixtures_of(wider, recipe)
  path = 'layer_0/mlp/linear'
  found = gx.compress.second_moments(wider, params, _TOKENS, mixtures=mixtures)
  got = np.asarray(found[path]).reshape(4, 256)
  want = gx.compress.second_moments(dense, tiny.params(dense), _TOKENS)[path]
  # Every token goes to one of the copies.
  np.testing.assert_allclose(got.sum(axis=0), want, rtol=1e-4)
  assert not got[3].any() and got[:3].any()
  weights = gx.Int(bits=4, group=32)
  method = dataclasses.replace(recipe.rules[0][1], weights=weights)
  packed = gx.Recipe.of({recipe.rules[0][0]: method})
  made = gx.compress(wider, params, packed, calibration=_TOKENS)
  error = gx.compress.divergence(
    gx.nn.Compressed(model=wider, recipe=recipe),
    params,
    gx.nn.Compressed(model=wider, recipe=packed),
    made,
    _TOKENS,
  )
  assert error < 0.05
  if router == 'softmax':
    known = gx.compress.statistics(wider, params, _TOKENS)
    with pytest.raises(errors.RecipeError, match='Statistics are of the dense'):
      gx.compress(wider, params, packed, calibration=known)
