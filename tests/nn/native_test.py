# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gemma 4's own mixtures, and rows that are sorted by expert."""

import dataclasses
import functools

from flax import linen as nn
from gemma import peft
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import nn as gx_nn
from gemma_ext.kernels import _cpu
from gemma_ext.nn import _native
from tests import tiny

WEIGHTS = {
  'dense': gx.Keep(),
  'int4': gx.Int(bits=4, group=32),
  'ternary': gx.Ternary(group=32),
}
TOKENS = np.random.default_rng(0).integers(3, 500, (2, 12))


@functools.cache
def made(weights: str):
  dense = tiny.model('gemma4_moe')
  rules = {r'layer_\d+/mlp/(gating_einsum|linear)': WEIGHTS[weights]}
  recipe = gx.Recipe.of(rules)
  params = gx.compress(dense, tiny.params(dense), recipe)
  return gx_nn.Compressed(model=dense, recipe=recipe), params


def logits(model, params, tokens=TOKENS):
  return model.apply({'params': params}, jnp.asarray(tokens)).logits


def official(model, params, tokens=TOKENS):
  """With someone who wants to see all calls: the official computation."""
  # The official model keeps its traces, whoever looks on.
  jax.clear_caches()
  with nn.intercept_methods(lambda f, args, kwargs, _: f(*args, **kwargs)):
    found = logits(model, params, tokens)
  jax.clear_caches()
  return found


def check(got, want, bound=2e-3):
  got, want = np.asarray(got), np.asarray(want)
  np.testing.assert_allclose(got, want, atol=bound * np.abs(want).max())


@pytest.mark.parametrize(
  ('weights', 'length'),
  [('dense', 12), ('dense', 1), ('int4', 12), ('ternary', 12)],
)
def test_equals_the_official_computation(weights, length):
  model, params = made(weights)
  tokens = TOKENS[:, :length]
  check(logits(model, params, tokens), official(model, params, tokens))


@pytest.mark.skipif(
  _cpu.library() is None, reason='the C++ library was not built'
)
@pytest.mark.parametrize('weights', ['int4', 'ternary'])
def test_packed_experts_are_never_unpacked(weights, monkeypatch):
  model, params = made(weights)
  want = official(model, params, TOKENS[:1, :2])
  monkeypatch.setenv('GEMMA_EXT_BACKEND', 'cpu')
  refuse = lambda self: pytest.fail('unpacks')
  monkeypatch.setattr(gx_nn.PackedWeight, 'dequantize', refuse)
  jax.clear_caches()
  got = logits(model, params, TOKENS[:1, :2])
  jax.clear_caches()
  # The kernels round activations to 16 bits.
  check(got, want, 1e-2)


def test_gradients():
  model, params = made('dense')

  def loss(run, params):
    return jnp.square(run(model, params)[0, 4:]).mean()

  want = jax.grad(functools.partial(loss, official))(params)
  got = jax.grad(functools.partial(loss, logits))(params)
  for name in ('gating_einsum', 'linear', 'router_logits', 'per_expert_scale'):
    a, b = (
      jax.tree.leaves(grads['layer_0']['mlp'][name]) for grads in (got, want)
    )
    assert np.abs(b[0]).max() > 0
    check(a[0], b[0])


def test_routing_is_counted():
  model, params = made('dense')
  _, sown = model.apply(
    {'params': params}, jnp.asarray(TOKENS), mutable=['intermediates']
  )
  found = [
    leaf['routing'][0]
    for leaf in jax.tree.leaves(
      sown['intermediates'], is_leaf=lambda t: 'routing' in t
    )
  ]
  assert len(found) == 2
  for each in found:
    assert each['load'].shape == (4,)
    assert each['load'].sum() == pytest.approx(2)
    assert each['active'] == pytest.approx(0.5)
    assert each['logits'].shape == (2, 12, 4)


def test_fewer_experts_for_the_same_program():
  model, params = made('int4')
  run = jax.jit(functools.partial(logits, model))

  def held(k):
    out = dict(params)
    for layer in ('layer_0', 'layer_1'):
      router = {'router': {'k': jnp.int32(k)}}
      out[layer] = out[layer] | {'mlp': out[layer]['mlp'] | router}
    return out

  both, one = run(held(2)), run(held(1))
  assert run._cache_size() == 1
  check(both, logits(model, params))
  # The official code with that number.
  config = dataclasses.replace(model.model.config, top_k_experts=1)
  other = gx_nn.Compressed(
    model=model.model.clone(config=config), recipe=model.recipe
  )
  check(one, official(other, params))
  assert np.abs(np.asarray(one - both)).max() > 0.1


def test_mixtures_of_a_model():
  found = _native.mixtures(tiny.model('gemma4_moe'))
  assert list(found) == ['layer_0/mlp', 'layer_1/mlp']
  for path, mixture in found.items():
    assert mixture.path == path
    assert mixture.method.num_experts == 4 and mixture.method.top_k == 2
    assert mixture.features == 128 and mixture.size == 128
  assert _native.mixtures(tiny.model('gemma4')) == {}


@pytest.mark.parametrize(('family', 'shared'), [('gemma2', 0), ('gemma3', 1)])
def test_many_rows_are_sorted_where_experts_are_few(
  family, shared, monkeypatch
):
  """Copies of a layer, of which two run: the same as with a mask."""
  dense = tiny.model(family)
  method = gx.MoE(
    num_experts=8 - shared, top_k=2, shared=shared, router='softmax'
  )
  recipe = gx.Recipe.of({r'layer_\d+/mlp': method})
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  params = model.init(jax.random.key(1), jnp.asarray(TOKENS))['params']
  seen = []
  inner = kernels.experts_dense
  monkeypatch.setattr(
    kernels, 'experts_dense', lambda *a: seen.append(a) or inner(*a)
  )
  want = official(model, params)
  assert not seen
  check(logits(model, params), want)
  assert len(seen) == len(gx_nn.mixtures_of(dense, recipe))
  logits(model, params, TOKENS[:1, :4])
  assert len(seen) == len(gx_nn.mixtures_of(dense, recipe))


def test_layers_that_do_more_are_left_to_the_official_code(monkeypatch):
  """Gemma 3n's sparse activations, which the kernels do not have."""
  weights = gx.Int(bits=8, group=32)
  method = gx.MoE(num_experts=8, top_k=8, weights=weights)
  recipe = gx.Recipe.of({r'layer_\d+/mlp': method})
  dense = tiny.model('gemma3n')
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  params = gx.compress(dense, tiny.params(dense), recipe, calibration=TOKENS)
  few = TOKENS[:1, :4]
  want = logits(model, params, few)
  monkeypatch.setenv('GEMMA_EXT_BACKEND', 'cpu')
  jax.clear_caches()
  got = logits(model, params, few)
  jax.clear_caches()
  check(got, want, 1e-2)


@pytest.mark.parametrize('weights', ['dense', 'ternary'])
def test_experts_outside_of_the_device(weights, tmp_path):
  model, params = made(weights)
  away, few, state = gx_nn.offload(model, params, slots=3, directory=tmp_path)
  assert 'linear' not in few['layer_0']['mlp']
  # All tokens at once: every expert comes once.
  got = away.apply({'params': few, 'experts': state}, jnp.asarray(TOKENS))
  check(got.logits, logits(model, params))

  @jax.jit
  def step(state, token):
    variables = {'params': few, 'experts': state}
    out, new = away.apply(variables, token, mutable=['experts'])
    return out.logits, new['experts']

  for token in (5, 6, 5, 7, 5):
    token = jnp.array([[token]])
    got, state = step(state, token)
    check(got, logits(model, params, token))
  assert 0 < gx_nn.hit_rate(state) < 1
  store = away.store
  assert store.announced > 0
  # What the second layer reads is guessed from what the first one does.
  assert 0 < store.read_ahead <= store.fetched


def test_offloading_needs_both_weights_alike():
  dense = tiny.model('gemma4_moe')
  recipe = gx.Recipe.of({r'layer_\d+/mlp/linear': gx.Int(bits=4, group=32)})
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  params = gx.compress(dense, tiny.params(dense), recipe)
  with pytest.raises(errors.RecipeError, match='match both'):
    gx_nn.offload(model, params, slots=3)


# ----------------------------------- LoRA ------------------------------------


def adapted(model, params, **kwargs):
  """A model with adapters, parameters with random ones, and what they add."""
  lora = gx_nn.LoRA(rank=2, model=model, dtype=jnp.float32, **kwargs)
  adapters = tiny.adapters(lora, jnp.asarray(TOKENS))
  return lora, peft.merge_params(params, adapters), adapters


@pytest.mark.parametrize('weights', ['none', 'dense', 'int4'])
def test_adapters_of_experts(weights, monkeypatch):
  """They equal sums of weights, and packed weights stay packed."""
  if weights == 'none':
    model = tiny.model('gemma4_moe')
    params = tiny.params(model)
  else:
    model, params = made(weights)
  # Not the router, which is an einsum of the same layer.
  target = r'layer_\d+/mlp/(gating_einsum|linear)'
  lora, both, adapters = adapted(model, params, target=target, experts=True)
  dense = tiny.model('gemma4_moe')
  merged = tiny.unpacked(model, params) if weights == 'int4' else params
  for layer, added in adapters.items():
    mlp = dict(merged[layer]['mlp'])
    for name, eqn in (
      ('gating_einsum', 'eir,ercf->ecfi'),
      ('linear', 'efr,ero->efo'),
    ):
      pair = added['mlp'][name]['_LoRAExperts']['lora']
      more = jnp.einsum(eqn, pair['a'], pair['b'])
      mlp[name] = jax.tree.map(lambda w, more=more: w + more, mlp[name])
    merged = merged | {layer: merged[layer] | {'mlp': mlp}}
  want = logits(dense, merged)
  assert np.abs(want - logits(dense, merged, TOKENS[:, ::-1])).max() > 0.1
  if weights == 'int4':
    refuse = lambda self: pytest.fail('unpacks')
    monkeypatch.setattr(gx_nn.PackedWeight, 'dequantize', refuse)
  check(logits(lora, both), want)
  # Not those of other tokens, and not none.
  assert np.abs(logits(model, params) - want).max() > 0.1


def test_attention_is_adapted_beside_packed_experts(monkeypatch):
  model, params = made('int4')
  lora, both, _ = adapted(model, params, target='attn')
  want = logits(lora, both)
  refuse = lambda self: pytest.fail('unpacks')
  monkeypatch.setattr(gx_nn.PackedWeight, 'dequantize', refuse)
  got = jax.jit(functools.partial(logits, lora))(both)
  check(got, want)


def test_adapters_that_would_not_be_read_are_refused():
  model, params = made('dense')
  away, few, state = gx_nn.offload(model, params, slots=3)
  variables = {'params': few, 'experts': state}
  for kwargs, match in (
    ({'experts': True}, 'outside of the device'),
    ({'target': r'layer_\d+/mlp/linear'}, r'LoRA\(experts=True'),
  ):
    lora = gx_nn.LoRA(rank=2, model=away, **kwargs)
    with pytest.raises(errors.RecipeError, match=match):
      lora.apply(variables, jnp.asarray(TOKENS))
