# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Mixtures: routers, what they choose, and the layers that they make."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import nn as gx_nn
from gemma_ext.kernels import _cpu
from gemma_ext.nn import _moe
from tests import tiny

FAMILIES = ('gemma2', 'gemma3', 'gemma3n', 'gemma4')


def recipe_of(**kwargs) -> gx.Recipe:
  fields = dict(num_experts=6, top_k=6, shared=2) | kwargs
  return gx.Recipe.of({r'layer_\d+/mlp': gx.MoE(**fields)})


@functools.lru_cache
def made(family: str, recipe: gx.Recipe):
  dense = tiny.model(family)
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  tokens = tokens_of()
  params = gx.compress(
    dense, tiny.params(dense, seed=0), recipe, calibration=tokens
  )
  return dense, model, params


def tokens_of(rows: int = 2, length: int = 24) -> np.ndarray:
  return np.random.default_rng(0).integers(3, 500, (rows, length))


def logits(model, params, tokens=None) -> np.ndarray:
  tokens = tokens_of() if tokens is None else tokens
  out = model.apply({'params': params}, jnp.asarray(tokens))
  return np.asarray(out.logits, np.float32)


@pytest.mark.parametrize(
  ('family', 'router'),
  [*((family, 'norm') for family in FAMILIES), ('gemma3', 'gate')],
)
def test_with_every_expert_it_is_the_dense_model(family, router):
  dense, model, params = made(family, recipe_of(router=router))
  want = logits(dense, tiny.params(dense, seed=0))
  got = logits(model, params)
  np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())
  # The neurons really moved.
  path = 'layer_0', 'mlp', 'linear'
  was, now = (
    functools.reduce(lambda t, k: t[k], path, tree)
    for tree in (tiny.params(dense, seed=0), params)
  )
  assert not np.array_equal(was, now)


def test_fewer_experts_are_another_model_and_k_is_read_at_run_time():
  _, model, params = made('gemma3', recipe_of())
  traces = 0

  @jax.jit
  def run(params):
    nonlocal traces
    traces += 1
    return model.apply({'params': params}, jnp.asarray(tokens_of())).logits

  found = {}
  for k in (6, 3, 1):
    of = jax.tree_util.tree_map_with_path(
      lambda path, leaf, k=k: (
        jnp.int32(k)
        if path[-1].key == 'k' and path[-2].key == 'router'
        else leaf
      ),
      params,
    )
    found[k] = np.asarray(run(of))
  assert traces == 1
  assert not np.allclose(found[6], found[3])
  assert not np.allclose(found[3], found[1])


def _layer(method, seed=0, features=16, hidden=32):
  mixture = gx_nn.Mixture(
    path='mlp', method=method, features=features, hidden=hidden
  )
  router = _moe.initial(mixture, jax.random.key(seed))
  return mixture, router


@pytest.mark.parametrize('router', ['norm', 'softmax', 'sigmoid'])
def test_choice_is_the_best_logits(router):
  method = gx.MoE(num_experts=8, top_k=3, router=router)
  _, params = _layer(method)
  params['bias'] = jnp.linspace(-0.3, 0.3, 8)
  x = jax.random.normal(jax.random.key(1), (2, 5, 16))
  got = gx_nn.route(method, params, x)
  raw = np.asarray(x, np.float64) @ np.asarray(params['w'], np.float64).T
  bias = np.asarray(params['bias'])
  score = 1 / (1 + np.exp(-raw)) + bias if router == 'sigmoid' else raw + bias
  order = np.argsort(-score, axis=-1)[..., :3]
  np.testing.assert_array_equal(got.chosen, order)
  if router == 'norm':
    want = np.ones(order.shape)
  else:
    of = 1 / (1 + np.exp(-raw)) if router == 'sigmoid' else np.exp(raw + bias)
    want = np.take_along_axis(of, order, -1)
    want /= want.sum(-1, keepdims=True)
  np.testing.assert_allclose(got.weight, want, atol=1e-5)


def test_threshold_dead_experts_and_k():
  method = gx.MoE(num_experts=8, top_k=5)
  _, params = _layer(method)
  x = jax.random.normal(jax.random.key(1), (40, 16))
  logits = gx_nn.route(method, params, x).logits
  params['threshold'] = jnp.float32(0.2)
  got = gx_nn.route(method, params, x)
  want = np.minimum((np.asarray(logits) > 0.2).sum(-1), 5)
  np.testing.assert_array_equal((np.asarray(got.chosen) >= 0).sum(-1), want)
  assert want.min() < 5
  params['threshold'] = jnp.float32(_moe.NONE)
  params['bias'] = params['bias'].at[jnp.array([1, 4])].set(_moe.DEAD)
  params['k'] = jnp.int32(2)
  got = np.asarray(gx_nn.route(method, params, x).chosen)
  assert (got[:, 2:] == -1).all()
  assert not np.isin(got, [1, 4]).any()


@pytest.mark.parametrize('k', [1, 3, 8])
def test_gates_without_a_list_are_those_of_the_list(k):
  method = gx.MoE(num_experts=8, top_k=8)
  _, params = _layer(method)
  params |= {'k': jnp.int32(k), 'threshold': jnp.float32(-0.3)}
  params['bias'] = params['bias'].at[2].set(_moe.DEAD)
  x = jax.random.normal(jax.random.key(1), (3, 40, 16))
  got, _ = _moe.gates_of(method, params, x)
  want = gx_nn.route(method, params, x).gates()
  np.testing.assert_array_equal(got, want)

  def gradient(of):
    total = lambda w: jnp.sum(of(params | {'w': w}) * jnp.arange(8))
    return jax.grad(total)(params['w'])

  grads = (
    gradient(lambda params: _moe.gates_of(method, params, x)[0]),
    gradient(lambda params: gx_nn.route(method, params, x).gates()),
  )
  np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-5)


def test_experts_choose_tokens():
  method = gx.MoE(num_experts=4, top_k=1, router='expert_choice')
  _, params = _layer(method)
  x = jax.random.normal(jax.random.key(1), (2, 12, 16))
  got = gx_nn.route(method, params, x)
  taken = np.asarray(got.gates()) > 0
  # A quarter of the tokens each, in every sequence.
  np.testing.assert_array_equal(taken.sum(axis=1), np.full((2, 4), 3))


def test_gates_choose_single_neurons():
  recipe = recipe_of(num_experts=256, shared=0, top_k=64, router='gate')
  dense, model, params = made('gemma3', recipe)
  want = logits(dense, tiny.params(dense, seed=0))
  got = logits(model, params)
  assert not np.allclose(got, want)
  # By hand, in the last layer.
  layer = params['layer_2']['mlp']
  _, state = model.apply(
    {'params': params}, jnp.asarray(tokens_of()), mutable=['intermediates']
  )
  (routing,) = state['intermediates']['layer_2']['mlp']['routing']
  np.testing.assert_allclose(routing['active'], 64 / 256, rtol=1e-5)
  # A neuron that adds nothing is never chosen.
  w = layer['router']['w']
  x = jax.random.normal(jax.random.key(0), (5, 256))
  choice = gx_nn.route(
    recipe.rules[0][1], layer['router'] | {'w': w.at[:200].set(0)}, x
  )
  score = np.abs(np.asarray(jax.nn.gelu(x)) * np.asarray(w.at[:200].set(0)))
  best = np.argsort(-score, axis=1)[:, :40]
  for row, chosen in zip(best, np.asarray(choice.chosen)):
    assert set(row) <= set(chosen)


def test_gates_are_the_weights_of_neurons():
  method = gx.MoE(num_experts=4, top_k=2, shared=2, router='softmax')
  mixture, params = _layer(method, hidden=24)
  x = jax.random.normal(jax.random.key(1), (3, 16))
  choice = gx_nn.route(method, params, x)
  got = np.asarray(_moe.mask(mixture, choice.gates(), jnp.float32))
  assert got.shape == (3, 24)
  np.testing.assert_array_equal(got[:, :8], 1)
  want = np.zeros((3, 4))
  np.put_along_axis(want, np.asarray(choice.chosen), choice.weight, axis=1)
  np.testing.assert_allclose(got[:, 8:], np.repeat(want, 4, axis=1), rtol=1e-6)


@pytest.mark.parametrize('router', ['norm', 'softmax', 'sigmoid'])
def test_gradients_reach_the_router(router):
  method = gx.MoE(num_experts=8, top_k=3, router=router)
  _, params = _layer(method)
  x = jax.random.normal(jax.random.key(1), (40, 16))
  value = jax.random.normal(jax.random.key(2), (8,))

  def loss(w):
    choice = gx_nn.route(method, params | {'w': w}, x)
    return jnp.mean(choice.gates() @ value)

  grad = np.asarray(jax.grad(loss)(params['w']))
  assert np.abs(grad).max() > 1e-4
  # Downhill is downhill.
  w = params['w']
  if router != 'norm':
    step = 1e-2 / np.abs(grad).max()
    assert loss(w - step * grad) < loss(w)


def test_counts_are_sown():
  _, model, params = made('gemma3', recipe_of(top_k=3))
  _, state = model.apply(
    {'params': params}, jnp.asarray(tokens_of()), mutable=['intermediates']
  )
  (found,) = state['intermediates']['layer_1']['mlp']['routing']
  np.testing.assert_allclose(found['load'].sum(), 3, rtol=1e-5)
  np.testing.assert_allclose(found['probability'].sum(), 1, rtol=1e-5)
  np.testing.assert_allclose(found['active'], 5 / 8, rtol=1e-5)


@pytest.mark.parametrize(
  'weights',
  [gx.Ternary(group=32), gx.Int(bits=8)],
  ids=['ternary', 'int8'],
)
def test_experts_are_packed_and_saved(weights, tmp_path):
  recipe = recipe_of(top_k=3, weights=weights)
  dense, model, params = made('gemma3', recipe)
  leaf = params['layer_0']['mlp']['linear']
  assert leaf['codes'].dtype in (jnp.uint8, jnp.int8)
  # Slice by slice where whole blocks of codes let it; these hold 128 trits.
  cut = isinstance(weights, gx.Int)
  assert leaf['codes'].shape == ((8, 128, 32) if cut else (1, 128, 64))
  gx.ckpts.save(tmp_path / 'moe', model=model, params=params)
  back = gx.ckpts.load(tmp_path / 'moe')
  assert back.recipe == recipe
  for got, want in zip(
    jax.tree.leaves(back.params), jax.tree.leaves(params), strict=True
  ):
    np.testing.assert_array_equal(got, want.astype(got.dtype))
  assert np.isfinite(logits(back.model, back.params)).all()
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert 0.999 < gx.plan(dense, recipe).nbytes / size < 1.001


@pytest.mark.parametrize(
  ('rules', 'message'),
  [
    ({'attn': gx.MoE(num_experts=4, top_k=2)}, 'no weight of a feed-forward'),
    ({'linear': gx.MoE(num_experts=4, top_k=2)}, 'both'),
    ({'mlp': gx.MoE(num_experts=7, top_k=2)}, 'do not divide'),
  ],
)
def test_bad_rules(rules, message):
  model = tiny.model('gemma3')
  with pytest.raises(errors.RecipeError, match=message):
    gx_nn.Compressed(model=model, recipe=gx.Recipe.of(rules)).init(
      jax.random.key(0), jnp.ones((1, 2), jnp.int32)
    )


def test_native_mixtures_and_missing_routers_are_refused():
  recipe = recipe_of()
  with pytest.raises(errors.RecipeError, match='no weight of a feed-forward'):
    gx_nn.mixtures_of(tiny.model('gemma4_moe'), recipe)
  dense = tiny.model('gemma3')
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  with pytest.raises(errors.ParamsMismatchError, match='router'):
    logits(model, tiny.params(dense, seed=0))
  with pytest.raises(errors.RecipeError, match='needs text'):
    gx.compress(dense, tiny.params(dense, seed=0), recipe)


def test_recipe_json():
  recipe = recipe_of(weights=gx.Ternary(group=32), router='sigmoid')
  assert gx.Recipe.from_json(recipe.to_json()) == recipe
  (rule,) = recipe.to_json()['rules']
  for change in (
    {'num_experts': 0},
    {'top_k': 7},
    {'router': 'hash'},
    {'weights': {'method': 'moe', 'num_experts': 2, 'top_k': 1}},
  ):
    with pytest.raises(errors.RecipeError):
      gx.Recipe.from_json({'version': 1, 'rules': [rule | change]})
  assert dataclasses.replace(recipe.rules[0][1], top_k=2).slices == 8


@pytest.mark.skipif(
  _cpu.library() is None, reason='the C++ library was not built'
)
def test_few_tokens_read_only_their_experts(monkeypatch):
  recipe = recipe_of(top_k=3, shared=2, weights=gx.Int(bits=8, group=32))
  _, model, params = made('gemma3', recipe)
  tokens = tokens_of(2, 4)
  want = logits(model, params, tokens)
  seen = []
  inner = kernels.experts_ffn
  monkeypatch.setattr(
    kernels, 'experts_ffn', lambda *a, **k: seen.append(k) or inner(*a, **k)
  )
  monkeypatch.setenv('GEMMA_EXT_BACKEND', 'cpu')
  jax.clear_caches()
  got = logits(model, params, tokens)
  jax.clear_caches()
  assert len(seen) == 3 and seen[0]['shared'] == 2
  np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())
  # These rows are stored slice by slice: many tokens as well.
  want = logits(model, params, tokens_of())
  seen.clear()
  monkeypatch.setenv('GEMMA_EXT_BACKEND', 'cpu')
  jax.clear_caches()
  got = logits(model, params, tokens_of())
  jax.clear_caches()
  assert len(seen) == 3
  np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


@pytest.mark.skipif(
  _cpu.library() is None, reason='the C++ library was not built'
)
def test_decoding_with_a_cache_asks_the_router(monkeypatch):
  weights = gx.Int(bits=8, group=32)
  recipe = gx.Recipe.of(
    {
      r'layer_\d+/mlp': gx.MoE(num_experts=8, top_k=2, weights=weights),
      '.*': weights,
    }
  )
  dense = tiny.model('gemma3', dtype=jnp.float32)
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  params = gx.compress(
    dense, tiny.params(dense), recipe, calibration=tokens_of()
  )
  config = dense.config
  tokens = tokens_of(1, 3)

  def decode():
    cache = config.init_cache(batch_size=1, dtype=jnp.float32, cache_length=8)
    return model.apply(
      {'params': params},
      tokens=jnp.asarray(tokens),
      positions=jnp.arange(3)[None],
      attention_mask=jnp.tril(jnp.ones((1, 3, 8), bool)),
      cache=cache,
    ).logits

  want = np.asarray(decode())
  monkeypatch.setenv('GEMMA_EXT_BACKEND', 'cpu')
  jax.clear_caches()
  got = np.asarray(decode())
  jax.clear_caches()
  np.testing.assert_allclose(got, want, atol=5e-3 * np.abs(want).max())


@pytest.mark.skipif(
  _cpu.library() is None, reason='the C++ library was not built'
)
def test_neurons_that_gates_choose_are_read_alone(monkeypatch):
  weights = gx.Int(bits=8, group=32)
  recipe = recipe_of(
    num_experts=252, shared=4, top_k=100, router='gate', weights=weights
  )
  _, model, params = made('gemma3', recipe)
  # By neuron, groups along the outputs.
  width = model.config.embed_dim
  down = params['layer_0']['mlp']['linear']
  assert down['scale'].shape == (256, width // 32)
  tokens = tokens_of(1, 2)
  want = logits(model, params, tokens)
  seen = []
  inner = kernels.neurons_ffn
  monkeypatch.setattr(
    kernels, 'neurons_ffn', lambda *a, **k: seen.append(k) or inner(*a, **k)
  )
  monkeypatch.setenv('GEMMA_EXT_BACKEND', 'cpu')
  jax.clear_caches()
  got = logits(model, params, tokens)
  # Many tokens, or someone who wants to know the routing: official code.
  logits(model, params, tokens_of(2, 4))
  jax.clear_caches()
  assert len(seen) == 3 and seen[0]['shared'] == 4
  np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())
