# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts outside of the device give what experts inside give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from tests import tiny

TOKENS = np.random.default_rng(0).integers(3, 500, (1, 12))


@functools.lru_cache
def made(weights=None, **kwargs):
  weights = weights or gx.Keep()
  fields = dict(num_experts=8, top_k=3, weights=weights) | kwargs
  recipe = gx.Recipe.of({r'layer_\d+/mlp': gx.MoE(**fields)})
  dense = tiny.model('gemma3', dtype=jnp.float32)
  params = gx.compress(dense, tiny.params(dense), recipe, calibration=TOKENS)
  return gx_nn.Compressed(model=dense, recipe=recipe), params


def run(model, params, tokens, state=None):
  """Logits of one token at a time, each by itself, and the last state."""

  @jax.jit
  def step(params, state, token):
    variables = {'params': params} | ({'experts': state} if state else {})
    out, new = model.apply(variables, token, mutable=['experts'])
    return out.logits[0, -1], new.get('experts', {})

  out = []
  for token in tokens:
    logits, state = step(params, state, jnp.array([[token]]))
    out.append(np.asarray(logits))
  return np.stack(out), state


@pytest.mark.parametrize(
  'weights',
  [gx.Keep(), gx.Ternary(group=32, planes=2)],
  ids=['dense', 'ternary'],
)
def test_numbers_are_the_same_and_slots_fill(weights, tmp_path):
  model, params = made(weights)
  tokens = [5, 6, 5, 7, 5, 6, 8, 5]
  want, _ = run(model, params, tokens)
  away, few, state = gx_nn.offload(model, params, slots=4, directory=tmp_path)
  assert 'linear' not in few['layer_0']['mlp']
  nbytes = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  # Rows of 32 codes fill a quarter of a block of two bits.
  gone = nbytes(params) - nbytes(few)
  assert gone <= away.store.nbytes <= 4 * gone
  assert any(tmp_path.iterdir())
  got, state = run(away, few, tokens, state)
  np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())
  for i in range(3):
    cache = state[f'layer_{i}']['mlp']['cache']
    # What is where is known from both sides.
    for slot, e in enumerate(np.asarray(cache['expert_in'])):
      if e >= 0:
        assert cache['slot_of'][e] == slot
    assert cache['hits'] + cache['misses'] == 3 * len(tokens)
  assert 0 < gx_nn.hit_rate(state) < 1
  # The same token again finds all of its experts.
  _, after = run(away, few, [5, 5], state)
  rate = lambda s: int(s['layer_1']['mlp']['cache']['hits'])
  assert rate(after) - rate(state) >= 3
  # Layers 1 and 2 were announced, and some of it came in time to be used.
  store = away.store
  assert store.announced > 0
  assert 0 < store.read_ahead <= store.fetched


def test_prompts_stream_every_expert():
  model, params = made()
  away, few, state = gx_nn.offload(model, params, slots=3)
  want = model.apply({'params': params}, jnp.asarray(TOKENS)).logits
  got = away.apply(
    {'params': few, 'experts': state}, jnp.asarray(TOKENS)
  ).logits
  np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


def test_least_recently_used_goes_first():
  model, params = made(num_experts=8, top_k=1)
  away, few, state = gx_nn.offload(model, params, slots=2)
  _, state = run(away, few, list(range(5, 25)), state)
  cache = state['layer_0']['mlp']['cache']
  used = np.asarray(cache['used'])
  assert used.max() == cache['clock'] == 20
  assert used.min() < used.max()


def test_bad_requests():
  model, params = made()
  for slots in (2, 9):
    with pytest.raises(errors.RecipeError, match='3 .top_k. to 8'):
      gx_nn.offload(model, params, slots=slots)
  shared, its = made(num_experts=7, shared=1)
  with pytest.raises(errors.RecipeError, match='none of them shared'):
    gx_nn.offload(shared, its, slots=4)
