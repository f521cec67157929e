# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Compressed`: every family, every way in which people run a model."""

from flax import linen as nn
from flax import traverse_util
from gemma import gm
from gemma.gm.nn.gemma4 import _moe
import jax
import jax.numpy as jnp
from kauldron import kd
from kauldron import kontext
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from tests import tiny

TOKENS = jnp.array([[2, 5, 6, 7, 8, 9, 10, 11], [2, 20, 21, 22, 23, 0, 0, 0]])
RECIPES = {
  'tssn': gx.Recipe.of('tssn'),
  'mixed': gx.Recipe.of(
    {
      r'layer_0/attn': gx.Keep(),
      r'layer_1/mlp2?': gx.Ternary(group=8, planes=2, scale='ue5m3', tied=True),
      r'layer_\d+/mlp2?': gx.Ternary(group=64, planes=2, packing='5trit'),
      r'embedder': gx.Int(bits=4, group=32),
      r'.*': gx.Int(bits=3, group=64),
    }
  ),
}


def _compress(model, recipe, seed=0):
  """A compressed model with random codes, of weights that keep their size."""
  flat = traverse_util.flatten_dict(tiny.params(model, seed), sep='/')
  rng = np.random.default_rng(seed)
  codes, formats = {}, {}
  for path, (site, method) in gx.nn.methods_of(model, recipe).items():
    del flat[path]
    rows, cols = site.layout.rows, site.layout.cols
    fmt = formats[path] = gx.nn.format_of(method, cols)
    low, high = fmt.code_range
    shape = fmt.latent_shape(rows, cols)
    codes[path] = rng.integers(low, high, shape, np.int8, endpoint=True)
    scale = rng.uniform(0.5, 1.5, fmt.scale_shape(rows, cols))
    scale *= 3 / (high - low) * 128**-0.5
    flat[f'{path}/scale'] = fmt.pack_scale(jnp.asarray(scale, jnp.float32))
  # One compilation for all: each would take longer than the test.
  packed = jax.jit(lambda c: {p: formats[p].pack(c[p]) for p in c})(codes)
  flat |= {f'{path}/codes': leaf for path, leaf in packed.items()}
  params = traverse_util.unflatten_dict(flat, sep='/')
  return gx.nn.Compressed(model=model, recipe=recipe), params


def _logits(model, params, tokens=TOKENS):
  return np.asarray(model.apply({'params': params}, tokens).logits, np.float32)


@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_equals_dense_model_of_dequantised_weights(family, recipe):
  recipe = RECIPES[recipe]
  model = tiny.model(family)
  compressed, params = _compress(model, recipe)
  expected = _logits(model, tiny.unpacked(compressed, params))
  actual = _logits(compressed, params)
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_both_official_moe_classes(monkeypatch):
  # Blocks build `MoERagged`; `MoE` has the same parameters and computes every
  # expert for every token, through einsums with an expert axis.
  recipe = RECIPES['mixed']
  compressed, params = _compress(tiny.model('gemma4_moe'), recipe)
  expected = _logits(compressed, params)
  monkeypatch.setattr(_moe, 'MoERagged', _moe.MoE)

  class WithMoE(type(tiny.model('gemma4_moe'))):
    pass

  model = WithMoE(dtype=jnp.float32, text_only=True)
  kinds = {site.path: site.kind for site in gx.nn.sites(model)}
  assert kinds['layer_0/mlp/gating_einsum/w'] is gx.nn.Kind.EINSUM
  other = gx.nn.Compressed(model=model, recipe=recipe)
  np.testing.assert_allclose(_logits(other, params), expected, atol=1e-4)


def test_every_ffn_einsum_and_table_is_packed():
  for family in tiny.FAMILIES:
    compressed = gx.nn.Compressed(model=tiny.model(family), recipe='int8')
    params = jax.eval_shape(compressed.init, jax.random.key(0), TOKENS)
    flat = traverse_util.flatten_dict(params['params'], sep='/')
    dense = [
      path
      for path, leaf in flat.items()
      if leaf.ndim > 1 and not path.endswith(('/codes', '/scale'))
    ]
    # Routers, and the coefficients of AltUp which no einsum module reads.
    assert all('router' in p or '_coefs' in p for p in dense), dense


def test_dense_then_recipe_a_then_b_then_dense_in_one_process():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  # Same shapes and types in both: only the meaning of the codes differs.
  recipe_a = gx.Recipe.of({'mlp': gx.Int(bits=2, group=64)})
  recipe_b = gx.Recipe.of({'mlp': gx.Int(bits=2, group=64), 'attn': gx.Keep()})
  recipe_c = gx.Recipe.of({'mlp': gx.Ternary(group=64)})
  first = _logits(model, params)
  answers = []
  for recipe in (recipe_a, recipe_b, recipe_c):
    compressed, packed = _compress(model, recipe)
    np.testing.assert_allclose(
      _logits(compressed, packed),
      _logits(model, tiny.unpacked(compressed, packed)),
      atol=1e-4,
    )
    answers.append(_logits(compressed, packed))
  np.testing.assert_array_equal(_logits(model, params), first)
  assert np.abs(answers[0] - first).max() > 1e-2
  assert np.abs(answers[2] - first).max() > 1e-2
  assert np.abs(answers[0] - answers[2]).max() > 1e-2


def test_equal_leaves_unequal_methods_do_not_share_a_trace():
  # One byte, one scale a group either way: only the recipe tells them apart.
  model = tiny.model('gemma3')
  site = {s.path: s for s in gx.nn.sites(model)}['layer_0/mlp/linear']
  rows, cols = site.layout.rows, site.layout.cols
  int2 = gx.nn.format_of(gx.Int(bits=2, group=64), cols)
  ternary = gx.nn.format_of(gx.Ternary(group=64), cols)
  assert int2.codes_shape(rows, cols) == ternary.codes_shape(rows, cols)[1:]


def test_params_of_another_recipe_are_refused():
  model = tiny.model('gemma3')
  _, params = _compress(model, gx.Recipe.of('int8'))
  other = gx.nn.Compressed(model=model, recipe='int4')
  with pytest.raises(errors.ParamsMismatchError, match='embedder'):
    other.apply({'params': params}, TOKENS)


def test_dense_params_are_refused():
  model = tiny.model('gemma4')
  compressed = gx.nn.Compressed(model=model, recipe='int8')
  with pytest.raises(errors.ParamsMismatchError, match='gx.compress'):
    compressed.apply({'params': tiny.params(model)}, TOKENS)


def test_rule_that_matches_nothing_is_an_error():
  model = tiny.model('gemma4')
  compressed = gx.nn.Compressed(
    model=model, recipe={r'layer_\d+/mpl': gx.Ternary()}
  )
  with pytest.raises(errors.UnmatchedRuleError, match='layer_0/mlp'):
    compressed.init(jax.random.key(0), TOKENS)


def test_wrappers_go_outside():
  with pytest.raises(errors.ParamsMismatchError, match='LoRA go around'):
    gx.nn.Compressed(
      model=gm.nn.LoRA(rank=2, model=tiny.model('gemma3')), recipe='int8'
    )


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_init_has_the_structure_of_compressed_params(family):
  recipe = RECIPES['mixed']
  compressed, params = _compress(tiny.model(family), recipe)
  init = jax.eval_shape(compressed.init, jax.random.key(0), TOKENS)['params']
  spec = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
  assert spec(init) == spec(params)


def test_bfloat16_model_gives_bfloat16_logits_near_float32():
  recipe = gx.Recipe.of('int8')
  model = tiny.model('gemma3', dtype=jnp.bfloat16)
  compressed, params = _compress(model, recipe)
  out = compressed.apply({'params': params}, TOKENS).logits
  assert out.dtype == jnp.bfloat16
  expected = _logits(model, tiny.unpacked(compressed, params))
  error = np.abs(np.asarray(out, np.float32) - expected).max()
  assert error < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize('family', ['gemma2', 'gemma3', 'gemma3n'])
def test_official_sampler(family):
  model = tiny.model(family)
  recipe = RECIPES['tssn']
  compressed, params = _compress(model, recipe)
  tokenizer = tiny.tokenizer(model.INFO.tokenizer_version)
  out = []
  for m, p in (
    (compressed, params),
    (model, tiny.unpacked(compressed, params)),
  ):
    sampler = gm.text.Sampler(
      model=m,
      params=p,
      tokenizer=tokenizer,
      cache_length=64,
      max_out_length=16,
      pad_length=16,
    )
    out.append(
      sampler.sample(
        'A river is', max_new_tokens=6, return_state=True
      ).tokens.tolist()
    )
  assert out[0] == out[1]
  assert len(out[0]) == 16 and any(out[0])


@pytest.mark.parametrize('family', ['gemma3', 'gemma4_e2b', 'gemma4_moe'])
def test_chat_sampler_and_gemma4_sampler(family):
  model = tiny.model(family)
  compressed, params = _compress(model, RECIPES['tssn'])
  sampler = gm.text.ChatSampler(
    model=compressed,
    params=params,
    tokenizer=tiny.tokenizer(model.INFO.tokenizer_version),
    cache_length=512,
    max_out_length=16,
  )
  reply = sampler.chat('Hi', max_new_tokens=4)
  assert isinstance(reply, str)
  assert len(sampler.turns) == 2


@pytest.mark.parametrize('family', ['gemma3', 'gemma4'])
def test_decode_with_cache_equals_full_forward(family):
  model = tiny.model(family)
  compressed, params = _compress(model, RECIPES['tssn'])
  full = _logits(compressed, params, TOKENS[:1])
  cache = compressed.init_cache(
    batch_size=1, dtype=jnp.float32, cache_length=16
  )
  for i in range(4):
    out = compressed.apply(
      {'params': params},
      TOKENS[:1, i : i + 1],
      positions=jnp.array([[i]]),
      cache=cache,
      attention_mask=(jnp.arange(16) <= i)[None, None],
    )
    cache = out.cache
    np.testing.assert_allclose(out.logits[0, 0], full[0, i], atol=1e-4)


def test_jit_and_remat():
  model = tiny.model('gemma3')
  compressed, params = _compress(model, RECIPES['tssn'])
  expected = _logits(compressed, params)
  jitted = jax.jit(lambda p, t: compressed.apply({'params': p}, t).logits)
  np.testing.assert_allclose(jitted(params, TOKENS), expected, atol=1e-5)
  remat = nn.remat(gx.nn.Compressed)(model=model, recipe=RECIPES['tssn'])
  np.testing.assert_allclose(_logits(remat, params), expected, atol=1e-5)


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_gradient_with_respect_to_scales(family):
  model = tiny.model(family)
  recipe = gx.Recipe.of({'mlp': gx.Ternary(planes=2), '.*': gx.Int(bits=8)})
  compressed, params = _compress(model, recipe)
  flat = traverse_util.flatten_dict(params, sep='/')
  # In float32: a step that shows in a difference is far below bfloat16's.
  scales = {
    k: v.astype(jnp.float32)
    for k, v in flat.items()
    if k.endswith('/scale') and k[: -len('/scale')] + '/codes' in flat
  }

  def loss(scales):
    tree = traverse_util.unflatten_dict({**flat, **scales}, sep='/')
    return jnp.mean(compressed.apply({'params': tree}, TOKENS).logits ** 2)

  grads = jax.jit(jax.grad(loss))(scales)
  rng = np.random.default_rng(0)
  direction = {
    k: jnp.asarray(v * rng.standard_normal(v.shape), jnp.float32)
    for k, v in scales.items()
  }
  slope = sum(float(jnp.vdot(grads[k], direction[k])) for k in scales)
  at = jax.jit(
    lambda t: loss({k: v + t * direction[k] for k, v in scales.items()})
  )
  step = 5e-4
  difference = float(at(step) - at(-step)) / (2 * step)
  assert abs(slope) > 1e-5
  np.testing.assert_allclose(slope, difference, rtol=0.03)


def test_latent_codes_round_trip_and_straight_through_gradient():
  model = tiny.model('gemma3')
  compressed, params = _compress(model, RECIPES['mixed'])
  latent = gx.nn.to_latent(compressed, params)
  np.testing.assert_allclose(
    _logits(compressed, latent), _logits(compressed, params), atol=1e-5
  )
  packed = gx.nn.from_latent(compressed, latent)
  jax.tree.map(np.testing.assert_array_equal, packed, params)

  codes = latent['layer_1']['mlp']['linear']['codes']

  def loss(codes):
    tree = dict(latent)
    tree['layer_1'] = dict(latent['layer_1'])
    tree['layer_1']['mlp'] = dict(latent['layer_1']['mlp'])
    tree['layer_1']['mlp']['linear'] = {
      **latent['layer_1']['mlp']['linear'],
      'codes': codes,
    }
    return jnp.mean(compressed.apply({'params': tree}, TOKENS).logits ** 2)

  grads = jax.jit(jax.grad(loss))(codes)
  assert grads.shape == codes.shape
  # Steps down the straight-through gradient that flip codes lower the loss.
  before = float(loss(codes))
  flipped = codes - 0.6 * jnp.sign(grads) * (
    jnp.abs(grads) > jnp.quantile(jnp.abs(grads), 0.98)
  )
  assert int(jnp.sum(jnp.round(flipped) != codes)) > 50
  assert float(loss(flipped)) < before


def test_kontext_keys_are_those_of_the_model():
  model = tiny.model('gemma3')
  compressed = gx.nn.Compressed(model=model, recipe='int8')
  assert kontext.get_keypaths(compressed) == kontext.get_keypaths(model)
  keys = kontext.resolve_from_keyed_obj(
    {'batch': {'input': np.asarray(TOKENS)}}, compressed
  )
  np.testing.assert_array_equal(keys['tokens'], TOKENS)


def test_model_is_hashable_and_equal_by_value():
  a = gx.nn.Compressed(model=tiny.model('gemma3'), recipe='int8')
  b = gx.nn.Compressed(model=tiny.model('gemma3'), recipe='int8')
  c = gx.nn.Compressed(model=tiny.model('gemma3'), recipe='int4')
  assert a == b and hash(a) == hash(b) and a != c
  assert a.config.num_embed == tiny.VOCAB_SIZE
  assert a.INFO.tokenizer_version == 3


@pytest.mark.parametrize('family', ['gemma3', 'gemma4_moe'])
def test_sharded_over_eight_devices(family):
  assert jax.device_count() == 8
  model = tiny.model(family)
  compressed, params = _compress(model, RECIPES['tssn'])
  expected = _logits(compressed, params)
  fsdp = kd.sharding.FSDPSharding(min_size_to_shard_mb=0)
  sharded = jax.device_put(params, fsdp(params))
  spread = [
    leaf
    for leaf in jax.tree.leaves(sharded)
    if not leaf.sharding.is_fully_replicated
  ]
  assert any(leaf.dtype == jnp.uint8 for leaf in spread)
  assert any(leaf.dtype == jnp.int8 for leaf in spread)
  forward = jax.jit(lambda p, t: compressed.apply({'params': p}, t).logits)
  np.testing.assert_allclose(forward(sharded, TOKENS), expected, atol=1e-4)
