# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts on eight devices give what they give on one."""

import functools
import re

from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import nn as gx_nn
from gemma_ext.kernels import _cpu
from gemma_ext.nn import _sharded
from tests import tiny

# Seven and fifteen tokens do not divide by eight.
TOKENS = np.random.default_rng(0).integers(3, 500, (3, 5))
WEIGHTS = {
  'dense': gx.Keep(),
  'int4': gx.Int(bits=4, group=32),
  'ternary': gx.Ternary(group=32, planes=2),
}


def mesh_of(devices: int = 8, axis: str = 'experts') -> jax.sharding.Mesh:
  return jax.make_mesh((devices,), (axis,), devices=jax.devices()[:devices])


@functools.lru_cache
def made(weights='dense', **kwargs):
  fields = dict(num_experts=8, top_k=3, weights=WEIGHTS[weights]) | kwargs
  recipe = gx.Recipe.of({r'layer_\d+/mlp': gx.MoE(**fields)})
  dense = tiny.shallow()
  params = tiny.routed(dense, recipe, TOKENS)
  return gx_nn.Compressed(model=dense, recipe=recipe), params


def run(model, params, tokens=TOKENS):
  """Logits, and what layers sow of what was sent."""
  out, state = jax.jit(
    lambda params: model.apply(
      {'params': params}, tokens, mutable=['intermediates']
    )
  )(params)
  layers = state.get('intermediates', {}).values()
  counts = [c for layer in layers for c in layer['mlp'].get('dispatch', ())]
  return np.asarray(out.logits, np.float64), counts


def check(got, want, scale=1e-5):
  np.testing.assert_allclose(got, want, atol=scale * np.abs(want).max())


@pytest.mark.parametrize(
  ('weights', 'top_k'),
  [('dense', 1), ('dense', 8), ('int4', 3), ('int4', 8), ('ternary', 3)],
)
def test_logits_are_those_of_one_device(weights, top_k):
  model, params = made(weights, top_k=top_k)
  want, _ = run(model, params)
  spread, its = gx_nn.shard_experts(model, params, mesh=mesh_of())
  got, (counts,) = run(spread, its)
  check(got, want)
  # They really are elsewhere, an eighth each.
  leaf = its['layer_0']['mlp']['experts']['0']
  assert len(leaf.sharding.device_set) == 8
  share = {s.data.nbytes for s in leaf.addressable_shards}
  assert share == {leaf.nbytes // 8}
  assert 'linear' not in its['layer_0']['mlp']
  assert counts['rounds'] == 1
  # At least one device for each token, at most one for each expert.
  assert 15 <= counts['sent'].sum() <= 15 * top_k


@pytest.mark.parametrize('devices', [1, 4])
def test_devices_with_several_experts(devices):
  model, params = made('int4', num_experts=16, top_k=5)
  want, _ = run(model, params)
  mesh = mesh_of(devices, 'there')
  spread, its = gx_nn.shard_experts(model, params, mesh=mesh, axis='there')
  check(run(spread, its)[0], want)


@pytest.mark.parametrize('router', ['softmax', 'sigmoid', 'expert_choice'])
def test_routers_and_shared_experts(router):
  model, params = made('int4', num_experts=8, shared=8, router=router)
  want, _ = run(model, params)
  spread, its = gx_nn.shard_experts(model, params, mesh=mesh_of())
  check(run(spread, its)[0], want)
  shared = its['layer_0']['mlp']['experts']['shared_0']
  assert shared.sharding.is_fully_replicated


def lopsided(params, first=5):
  """Parameters whose tokens all want the same expert."""
  params = jax.tree.map(lambda leaf: leaf, params)
  router = params['layer_0']['mlp']['router']
  router['bias'] = router['bias'].at[first].set(1e4)
  router['k'] = jnp.int32(1)
  return params


@pytest.mark.parametrize(
  ('weights', 'room'), [('dense', 1.0), ('dense', 0.1), ('ternary', None)]
)
def test_nothing_is_dropped_where_all_want_one(weights, room):
  model, params = made(weights)
  params = lopsided(params)
  tokens = np.random.default_rng(1).integers(3, 500, (4, 17))
  want, _ = run(model, params, tokens)
  spread, its = gx_nn.shard_experts(model, params, mesh=mesh_of(), room=room)
  got, (counts,) = run(spread, its, tokens)
  check(got, want)
  # 68 tokens are 9 a device; an even load of 3 experts sends 3.4 of them.
  rounds = {None: 1, 1.0: 3, 0.1: 9}[room]
  np.testing.assert_array_equal(counts['sent'], 68 * (np.arange(8) == 5))
  assert counts['rounds'] == rounds


def test_one_token_and_fewer_experts_at_run_time():
  model, params = made('int4')
  spread, its = gx_nn.shard_experts(model, params, mesh=mesh_of())
  few = gx.compress.with_experts(model, params, 1 / 3)
  its['layer_0']['mlp']['router']['k'] = jnp.int32(1)
  token = TOKENS[:1, :1]
  got, (counts,) = run(spread, its, token)
  check(got, run(model, few, token)[0])
  assert counts['sent'].sum() == 1


@pytest.mark.parametrize('room', [None, 0.3])
def test_gradients_are_those_of_one_device(room):
  key = jax.random.split(jax.random.key(0), 5)
  x = jax.random.normal(key[0], (13, 16))
  gate = jax.random.normal(key[1], (8, 2, 12, 16)) / 4
  down = jax.random.normal(key[2], (8, 12, 16)) / 4
  chosen = jax.random.randint(key[3], (13, 3), -1, 8)
  weight = jax.random.uniform(key[4], (13, 3))
  value = jnp.sin(jnp.arange(16.0))

  def of_arrays(arrays, x, chosen, weight):
    return kernels.experts_dense(x, *arrays, chosen, weight)

  def here(x, weight, *arrays):
    return jnp.sum(jnp.tanh(of_arrays(arrays, x, chosen, weight)) @ value)

  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('experts',))

  def there(x, weight, *arrays):
    y, _ = _sharded.dispatch(
      of_arrays,
      *(x, chosen, weight, arrays, (0, 0)),
      mesh=mesh,
      axis='experts',
      room=room,
    )
    return jnp.sum(jnp.tanh(y) @ value)

  of = (0, 1, 2, 3)
  want = jax.jit(jax.value_and_grad(here, of))(x, weight, gate, down)
  got = jax.jit(jax.value_and_grad(there, of))(x, weight, gate, down)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert np.abs(want[1][2]).max() > 1e-2


def test_gradients_of_a_model():
  model, params = made('dense')
  spread, its = gx_nn.shard_experts(model, params, mesh=mesh_of())

  def loss(params, model):
    out = model.apply({'params': params}, TOKENS).logits
    return jnp.mean(jax.nn.log_softmax(out)[..., 7])

  of = jax.jit(jax.grad(loss, allow_int=True), static_argnums=1)
  want, got = of(params, model), of(its, spread)
  a, b = (tree['layer_0']['mlp'] for tree in (got, want))
  down = np.asarray(a['experts']['1']).reshape(b['linear'].shape)
  check(down, b['linear'], 1e-4)
  check(a['router']['w'], b['router']['w'], 1e-4)
  assert np.abs(down).max() > 0
  check(
    got['embedder']['input_embedding'],
    want['embedder']['input_embedding'],
    1e-4,
  )


@pytest.mark.parametrize(
  ('weights', 'room'), [('dense', None), ('int4', 0.5), ('ternary', None)]
)
def test_experts_of_gemma_4(weights, room):
  dense = tiny.model('gemma4_moe')
  rules = {r'layer_\d+/mlp/(gating_einsum|linear)': WEIGHTS[weights]}
  recipe = gx.Recipe.of(rules)
  params = gx.compress(dense, tiny.params(dense), recipe)
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  want, _ = run(model, params)
  spread, its = gx_nn.shard_experts(model, params, mesh=mesh_of(4), room=room)
  got, counts = run(spread, its)
  check(got, want)
  leaf = its['layer_1']['mlp']['linear']['w']
  leaf = leaf if weights == 'dense' else leaf['codes']
  assert {s.data.nbytes for s in leaf.addressable_shards} == {leaf.nbytes // 4}
  assert len(counts) == 2
  for each in counts:
    assert 15 <= each['sent'].sum() <= 30


def test_bad_requests():
  model, params = made()
  shard = functools.partial(gx_nn.shard_experts, model, params)
  with pytest.raises(errors.ConfigError, match='the mesh has'):
    shard(mesh=mesh_of(), axis='elsewhere')
  for room in (0, -1, float('nan')):
    with pytest.raises(errors.ConfigError, match='above 0'):
      shard(mesh=mesh_of(), room=room)
  with pytest.raises(errors.RecipeError, match='3 devices do not divide'):
    shard(mesh=mesh_of(3))
  gates, its = made(router='gate')
  with pytest.raises(errors.RecipeError, match='cannot be divided'):
    gx_nn.shard_experts(gates, its, mesh=mesh_of())
  plain = gx.Recipe.of({'.*': gx.Int(bits=8)})
  packed = gx_nn.Compressed(model=model.model, recipe=plain)
  with pytest.raises(errors.RecipeError, match='no experts'):
    gx_nn.shard_experts(packed, {}, mesh=mesh_of())
  spread, its = shard(mesh=mesh_of())
  del its['layer_0']['mlp']['experts']
  with pytest.raises(errors.ParamsMismatchError, match='shard_experts'):
    run(spread, its)


def test_tokens_are_sent_and_weights_stay():
  model, params = made('int4')
  spread, its = gx_nn.shard_experts(model, params, mesh=mesh_of())
  apply = lambda params: spread.apply({'params': params}, TOKENS).logits
  text = jax.jit(apply).lower(its).compile().as_text()
  # There, back: rows, numbers and weights of experts, and sums.
  assert len(re.findall(r' all-to-all(?:-start)?\(', text)) >= 2
  gathered = re.findall(r'= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(', text)
  sizes = [int(np.prod([int(n) for n in s.split(',')])) for s in gathered]
  # Nothing larger than the activations of all tokens comes together.
  assert all(size <= 16 * 128 for size in sizes)


def test_meshes_of_more_axes():
  model, params = made('int4', num_experts=16, top_k=5)
  mesh = jax.make_mesh((2, 4), ('data', 'experts'))
  spread, its = gx_nn.shard_experts(model, params, mesh=mesh)
  check(run(spread, its)[0], run(model, params)[0])


def test_text_is_that_of_one_device():
  model, params = made('int4')
  spread, its = gx_nn.shard_experts(model, params, mesh=mesh_of())
  found = [
    gm.text.Sampler(
      model=each, params=p, tokenizer=tiny.tokenizer(3), cache_length=512
    ).sample('The capital', max_new_tokens=6)
    for each, p in ((model, params), (spread, its))
  ]
  assert found[0] == found[1] != ''


@pytest.mark.skipif(_cpu.library() is None, reason='no C++ library')
def test_kernels_of_the_cpu_on_every_device(monkeypatch):
  model, params = made('int4')
  want, _ = run(model, params)
  spread, its = gx_nn.shard_experts(model, params, mesh=mesh_of())
  monkeypatch.setenv('GEMMA_EXT_BACKEND', 'cpu')
  jax.clear_caches()
  apply = jax.jit(lambda params: spread.apply({'params': params}, TOKENS))
  assert 'gemma_ext_experts' in apply.lower(its).as_text()
  # They round activations to 16 bits.
  check(np.asarray(apply(its).logits), want, 1e-3)
  monkeypatch.undo()
  jax.clear_caches()
