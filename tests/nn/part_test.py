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
  norms = [f'layer_1/post_{n}_norm/scale' for n in ('attention', 'ffw')]
  flat = _flat(params)
  for path in norms:
    flat[path] = jnp.full_like(flat[path], -1)  # They scale by 1 + this.
  without = traverse_util.unflatten_dict(flat, sep='/')
  got, want = _logits(part, cheap), _logits(model, without)
  assert np.abs(want - _logits(model, params)).max() > 0.01
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


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
