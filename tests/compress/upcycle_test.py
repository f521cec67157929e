# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Upcycling: a dense model as a wider mixture of its own copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from tests import tiny

_TOKENS = np.random.default_rng(0).integers(3, 500, (2, 12))


def _logits(model, params) -> np.ndarray:
  out = model.apply({'params': params}, jnp.asarray(_TOKENS))
  return np.asarray(out.logits, np.float64)


@pytest.mark.parametrize(
  ('family', 'router', 'shared'),
  [
    ('gemma2', 'softmax', 0),
    ('gemma3', 'softmax', 1),
    ('gemma3n', 'sigmoid', 0),
    ('gemma4', 'norm', 1),
    ('gemma4_e2b', 'sigmoid', 1),
  ],
)
def test_copies_are_the_dense_model_whatever_is_chosen(family, router, shared):
  dense = tiny.model(family)
  params = tiny.params(dense)
  want = _logits(dense, params)
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
  np.testing.assert_allclose(
    _logits(model, made), want, atol=1e-4 * np.abs(want).max()
  )
  # Another router chooses others, and nothing changes.
  other = jax.tree_util.tree_map_with_path(
    lambda path, x: -3 * x if path[-1].key == 'w' and x.ndim == 2 else x, made
  )
  before = gx.train.measure_routing(model, made, _TOKENS)
  after = gx.train.measure_routing(model, other, _TOKENS)
  assert any(
    not np.allclose(before[p]['load'], after[p]['load']) for p in before
  )
  np.testing.assert_allclose(
    _logits(model, other), want, atol=1e-4 * np.abs(want).max()
  )


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
