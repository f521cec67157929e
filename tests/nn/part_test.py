# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of cheaper models that share the weights of another."""

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from tests import tiny

TOKENS = jnp.array([[2, 5, 6, 7, 8, 9, 10, 11]])
RECIPE = gx.Recipe.of(
  {
    r'layer_1/mlp2?': gx.Ternary(group=8, planes=2, scale='ue5m3', tied=True),
    r'layer_\d+/mlp2?': gx.Ternary(group=64, planes=3),
    r'embedder': gx.Int(bits=4, group=32),
    r'.*': gx.Keep(),
  }
)


def _model(family='gemma3'):
  dense = tiny.model(family)
  model = gx.nn.Compressed(model=dense, recipe=RECIPE)
  return model, gx.compress(dense, tiny.params(dense), RECIPE)


def _logits(model, params):
  run = jax.jit(lambda params: model.apply({'params': params}, TOKENS).logits)
  return np.asarray(run(params), np.float32)


def _flat(params):
  return traverse_util.flatten_dict(params, sep='/')


def _without(params, layer):
  """The parameters with a layer that adds nothing."""
  flat = _flat(params)
  for name in ('attention', 'ffw'):
    path = f'layer_{layer}/post_{name}_norm/scale'
    flat[path] = jnp.full_like(flat[path], -1)  # They scale by 1 + this.
  return traverse_util.unflatten_dict(flat, sep='/')


@pytest.mark.parametrize('packed', [True, False])
def test_head_rows_are_the_first_logits(packed):
  model, params = _model()
  if not packed:
    model = model.model
    params = tiny.params(model)
  part, cheap = gx.nn.part(model, params, head_rows=100)
  got = _logits(part, cheap)
  assert got.shape == (*TOKENS.shape, 100)
  np.testing.assert_allclose(
    got, _logits(model, params)[..., :100], rtol=1e-5, atol=1e-5
  )


def test_layers_are_those_of_the_model():
  """The others left out by hand: their output is nothing."""
  model, params = _model()
  part, cheap = gx.nn.part(model, params, layers=[0, 2])
  assert part.config.num_layers == 2
  without = _without(params, 1)
  got, want = _logits(part, cheap), _logits(model, without)
  assert np.abs(want - _logits(model, params)).max() > 0.01
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


_MIXTURES = [
  ('norm', gx.Keep()),
  ('norm', gx.Int(bits=4, group=32)),
  ('softmax', gx.Ternary(group=32, planes=2)),
  ('gate', gx.Keep()),
  ('gate', gx.Int(bits=4, group=32)),
]


def _mixture(router, weights):
  """Layers 0 and 2 are mixtures, and one expert of eight runs."""
  method = gx.MoE(num_experts=8, top_k=4, router=router, weights=weights)
  recipe = gx.Recipe.of({'layer_[02]/mlp': method, 'attn': gx.Int(bits=8)})
  dense = tiny.model('gemma3')
  model = gx.nn.Compressed(model=dense, recipe=recipe)
  params = tiny.routed(dense, recipe, TOKENS)
  flat = _flat(params)
  for i in (0, 2):
    flat[f'layer_{i}/mlp/router/k'] = jnp.int32(1)
  return model, traverse_util.unflatten_dict(flat, sep='/')


@pytest.mark.parametrize(('router', 'weights'), _MIXTURES)
def test_mixtures_stay_mixtures(router, weights):
  model, params = _mixture(router, weights)
  want = _logits(model, params)
  part, cheap = gx.nn.part(model, params, head_rows=100)
  got = _logits(part, cheap)
  np.testing.assert_allclose(got, want[..., :100], rtol=1e-4, atol=1e-4)
  # Some layers of it, the others left out by hand.
  part, cheap = gx.nn.part(model, params, layers=[0, 2])
  mixtures = gx.nn.mixtures_of(part.model, part.recipe)
  assert sorted(mixtures) == ['layer_0/mlp', 'layer_1/mlp']
  without = _without(params, 1)
  got, want = _logits(part, cheap), _logits(model, without)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_planes_of_mixtures():
  model, params = _mixture('norm', gx.Ternary(group=32, planes=2, tied=True))
  part, cheap = gx.nn.part(model, params, planes=1)
  latent = _flat(gx.nn.to_latent(model, params))
  flat = _flat(params) | {
    path: leaf.at[1:].set(0)
    for path, leaf in latent.items()
    if '/mlp/' in path and path.endswith('/codes')
  }
  assert flat['layer_0/mlp/linear/codes'].shape[0] == 2
  want = _logits(model, traverse_util.unflatten_dict(flat, sep='/'))
  assert np.abs(want - _logits(model, params)).max() > 0.01
  np.testing.assert_allclose(_logits(part, cheap), want, rtol=1e-2, atol=1e-2)


def test_planes_are_the_first_ones():
  model, params = _model()
  part, cheap = gx.nn.part(model, params, planes=1)
  flat = {}
  for path, leaf in _flat(params).items():
    flat[path] = leaf
    if '/mlp' in path and path.endswith('/codes'):
      site = path.removesuffix('/codes')
      latent = _flat(gx.nn.to_latent(model, params))[path]
      flat[path] = latent.at[1:].set(0)
      assert latent.shape[0] == (2 if 'layer_1/' in site else 3)
  want = _logits(model, traverse_util.unflatten_dict(flat, sep='/'))
  got = _logits(part, cheap)
  assert np.abs(want - _logits(model, params)).max() > 0.01
  np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2)


def test_nothing_is_copied():
  model, params = _model()
  _, cheap = gx.nn.part(model, params, planes=1, layers=[0, 2], head_rows=100)
  mine = {id(leaf) for leaf in jax.tree.leaves(params)}
  for path, leaf in _flat(cheap).items():
    if path.endswith('/codes') or leaf.dtype == jnp.float32:
      assert id(leaf) in mine, path


@pytest.mark.parametrize('family', ['gemma3n', 'gemma4'])
def test_layers_that_depend_on_each_other(family):
  model, params = _model(family)
  if not getattr(model.config, 'per_layer_input_dim', 0) and not getattr(
    model.config, 'kv_cache_sharing_config', None
  ):
    pytest.skip('its layers do not')
  with pytest.raises(errors.ShapeError, match='layers'):
    gx.nn.part(model, params, layers=[0])


def test_wrong_arguments():
  model, params = _model()
  for kwargs, message in (
    ({'planes': 3}, 'fewer than some'),
    ({'planes': 0}, 'fewer than some'),
    ({'layers': []}, 'ascending'),
    ({'layers': [0, 1, 2]}, 'not all'),
    ({'layers': [1, 0]}, 'ascending'),
    ({'layers': [3]}, 'ascending'),
    ({'head_rows': 0}, 'expected 1'),
    ({'head_rows': 512}, 'expected 1'),
  ):
    with pytest.raises(errors.ShapeError, match=message):
      gx.nn.part(model, params, **kwargs)
  with pytest.raises(errors.ParamsMismatchError, match="'codes'"):
    gx.nn.part(model, tiny.params(tiny.model('gemma3')), planes=1)
