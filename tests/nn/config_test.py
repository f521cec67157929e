# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of recipes in configs: which models are equal, which traces shared."""

import dataclasses

from gemma import gm
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.nn import _config
from tests import tiny

_TOKENS = jnp.array([[2, 5, 6, 7, 8, 9]])
_INT8 = gx.Recipe.of('int8')
_INT4 = gx.Recipe.of('int4')


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_attach_and_strip(family):
  model = tiny.model(family)
  attached = _config.attach(model, _INT8)
  assert attached != model
  assert attached.config.recipe == _INT8
  assert isinstance(attached.config, type(model.config))
  assert type(attached) is type(model)
  for field in dataclasses.fields(model.config):
    a, b = (getattr(m.config, field.name) for m in (attached, model))
    assert a == b, field.name
  back = _config.strip(attached)
  assert back == model
  assert hash(back) == hash(model)
  assert type(back.config) is type(model.config)


def test_derived_values_of_the_config_survive():
  model = tiny.model('gemma3')
  config = _config.attach(model, _INT8).config
  assert config.num_layers == 3
  assert config.query_pre_attn_scalar() == model.config.query_pre_attn_scalar()


def test_equal_recipes_equal_configs():
  model = tiny.model('gemma3')
  a = _config.attach(model, gx.Recipe.of({'.*': gx.Int(bits=8, group=128)}))
  b = _config.attach(tiny.model('gemma3'), _INT8)
  assert a == b
  assert hash(a) == hash(b)
  assert len({a, b}) == 1


def test_different_recipes_different_configs():
  model = tiny.model('gemma3')
  recipes = [
    _INT8,
    _INT4,
    gx.Recipe(),
    gx.Recipe.of('tssn'),
    gx.Recipe.of({'.*': gx.Ternary(density=0.5)}),
    gx.Recipe.of({'.*': gx.Ternary(pattern=(2, 4))}),
  ]
  models = [model] + [_config.attach(model, r) for r in recipes]
  assert len(set(models)) == 7
  # Flax tells traces apart by the hash alone.
  assert len({hash(m) for m in models}) == 7


def test_attaching_again_replaces():
  model = tiny.model('gemma3')
  twice = _config.attach(_config.attach(model, _INT8), _INT4)
  assert twice == _config.attach(model, _INT4)
  assert _config.strip(twice) == model


def test_strip_of_a_dense_model_is_itself():
  model = tiny.model('gemma3')
  assert _config.strip(model) is model


def test_stamp():
  model = _config.attach(tiny.model('gemma3'), _INT8)
  stamped = _config.stamp(model, ' rank 2')
  assert stamped != model
  assert stamped.config.recipe == _INT8
  assert _config.stamp(stamped, ' rank 2') is stamped
  assert _config.stamp(model, ' rank 3') != stamped
  assert _config.strip(stamped) == tiny.model('gemma3')


def test_no_two_probes_are_alike():
  model = tiny.model('gemma3')
  a, b = _config.probe(model), _config.probe(model)
  assert len({hash(a), hash(b), hash(model)}) == 3
  assert _config.strip(a) == _config.strip(b) == model


@pytest.mark.parametrize(
  'value',
  [
    None,
    'gemma3',
    gm.nn.Gemma3_270M,
    gm.nn.Embedder(vocab_size=8, embed_dim=4),
  ],
  ids=['none', 'text', 'class', 'other_module'],
)
def test_not_a_model(value):
  with pytest.raises(errors.ParamsMismatchError, match='official Gemma model'):
    _config.check(value)
  with pytest.raises(errors.ParamsMismatchError, match='official Gemma model'):
    gx.nn.Compressed(model=value, recipe='int8')


def test_same_leaves_another_meaning():
  # Latent codes of 3 and 4 bits are alike in shape and type: only the recipe
  # says where they are clipped. The trace of one must not answer for the other.
  model = tiny.model('gemma3')
  params = tiny.params(model)
  path = 'layer_1/mlp/linear'
  layout = {s.path: s.layout for s in gx.nn.sites(model)}[path]
  rng = np.random.default_rng(0)
  latent = rng.integers(-8, 8, (*layout.rows, layout.cols)).astype(np.float32)
  scale = np.float32(2**-5)  # exact in bfloat16

  def apply(bits):
    recipe = gx.Recipe.of({path: gx.Int(bits=bits)})
    compressed = gx.nn.Compressed(model=model, recipe=recipe)
    leaf = {
      'codes': jnp.asarray(latent),
      'scale': jnp.full((*layout.rows, 1), scale, jnp.bfloat16),
    }
    return compressed.apply({'params': _with(leaf)}, _TOKENS).logits

  def _with(leaf):
    layer = params['layer_1']
    layer = {**layer, 'mlp': {**layer['mlp'], 'linear': leaf}}
    return {**params, 'layer_1': layer}

  def right(bits):
    half = 1 << (bits - 1)
    dense = np.clip(latent, -half, half - 1) * scale
    dense = jnp.asarray(layout.from_rows(dense))
    return model.apply({'params': _with(dense)}, _TOKENS).logits

  answers = {bits: apply(bits) for bits in (3, 4)}
  for bits in (3, 4):
    np.testing.assert_allclose(answers[bits], right(bits), atol=2e-5)
  assert np.abs(answers[3] - answers[4]).max() > 0.01
  np.testing.assert_array_equal(apply(3), answers[3])
