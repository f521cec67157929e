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
from gemma_ext.nn import _offload
from tests import tiny

TOKENS = np.random.default_rng(0).integers(3, 500, (1, 12))
_LAST = 'layer_2/mlp'


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


def test_files_of_another_model_are_not_overwritten(tmp_path):
  model, params = made(num_experts=4, top_k=1)
  token = jnp.array([[5]])

  def logits(away, few, state):
    variables = {'params': few, 'experts': state}
    return away.apply(variables, token, mutable=['experts'])[0].logits

  first = gx_nn.offload(model, params, slots=1, directory=tmp_path)
  want = logits(*first)
  other = jax.tree.map(lambda leaf: leaf * 2, params)
  with pytest.raises(errors.CheckpointExistsError, match='another directory'):
    gx_nn.offload(model, other, slots=1, directory=tmp_path)
  np.testing.assert_array_equal(logits(*first), want)
  gx_nn.offload(model, other, slots=1, directory=tmp_path / 'other')


def test_decoding_says_what_it_needs():
  model, params = made(num_experts=4, top_k=1)
  away, few, state = gx_nn.offload(model, params, slots=1)
  token = jnp.array([[5]])
  with pytest.raises(errors.ParamsMismatchError, match=r'mutable=\[.experts'):
    away.apply({'params': few, 'experts': state}, token)
  with pytest.raises(errors.ParamsMismatchError, match='next call'):
    away.apply({'params': few}, token, mutable=['experts'])
  checkpoint = away, few, tiny.tokenizer(3)
  with pytest.raises(errors.ParamsMismatchError, match='gx.text.stream'):
    ''.join(gx.text.stream(checkpoint, 'The capital', max_new_tokens=2))


def test_reading_ahead_is_bounded_in_bytes(monkeypatch):
  model, params = made()
  store = gx_nn.offload(model, params, slots=3)[0].store
  each = store.nbytes // (3 * 8)
  monkeypatch.setattr(_offload, '_STAGED', 4 * each + each // 2)
  announce = lambda place, experts: store.announce(place, np.array(experts))
  announce(0, [0, 1, 2])
  announce(1, [5, 6, -1])
  # The first of layer 0 had to go.
  assert store.staged_nbytes == 4 * each
  # Then all others do, and one of layer 2 has no room.
  announce(2, [0, 1, 2, 3, 4])
  assert store.staged_nbytes == 4 * each
  assert store.announced == 3 + 2 + 4
  for e in range(4):
    for got, want in zip(store.fetch(2, e), store.layers[_LAST].arrays):
      np.testing.assert_array_equal(got, want[e])
  assert store.read_ahead == 4 and store.staged_nbytes == 0
  # One is read ahead however large it is.
  monkeypatch.setattr(_offload, '_STAGED', 1)
  announce(0, [3, 4])
  announce(1, [3, 4])
  assert store.staged_nbytes == each


def test_bad_requests():
  model, params = made()
  for slots in (2, 9):
    with pytest.raises(errors.RecipeError, match='3 .top_k. to 8'):
      gx_nn.offload(model, params, slots=slots)
  shared, its = made(num_experts=7, shared=1)
  with pytest.raises(errors.RecipeError, match='none of them shared'):
    gx_nn.offload(shared, its, slots=4)
