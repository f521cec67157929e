# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What branches read, one layer further at a time, against the whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import compress
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.train import _branch
from gemma_ext.train import _capture
from gemma_ext.train import _distill
from gemma_ext.train import _stream
from tests import tiny

_RECIPE = recipe_lib.Recipe.of(
  {
    r'layer_\d+/mlp': recipe_lib.Ternary(group=128),
    '.*': recipe_lib.Int(bits=8),
  }
)
_TOKENS = np.random.default_rng(0).integers(4, tiny.VOCAB_SIZE, (5, 16))


def _made(family):
  dense = tiny.model(family)
  params = compress.compress(dense, tiny.params(dense), _RECIPE)
  return gx_nn.Compressed(model=dense, recipe=_RECIPE), params


def _want(model, params, layer):
  _, taps = _capture.branches(
    _capture.probe(model), params, jnp.asarray(_TOKENS)
  )
  return taps[layer]['residual']


def _changed(params, layer):
  """The same with other norms in the branch of a layer."""
  norm = params[layer]['pre_ffw_norm']
  return _branch.with_params(
    params, layer, {'pre_ffw_norm': jax.tree.map(lambda x: x + 0.5, norm)}
  )


@pytest.mark.parametrize('family', ['gemma2', 'gemma3', 'gemma3n', 'gemma4'])
def test_residuals_are_those_of_the_whole_model(family):
  model, params = _made(family)
  stream = _stream.Stream(model, _TOKENS)
  for layer in _distill.compressed_layers(model):
    got = stream.residual(params, layer)
    want = _want(model, params, layer)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    params = _changed(params, layer)


def test_layers_that_changed_or_went_by_are_run_again():
  model, params = _made('gemma3')
  stream = _stream.Stream(model, _TOKENS)
  first = stream.residual(params, 'layer_2')
  for now, layer in (
    (_changed(params, 'layer_0'), 'layer_2'),
    (_changed(params, 'layer_1'), 'layer_2'),
    (params, 'layer_1'),
    (params, 'layer_0'),
  ):
    got = stream.residual(now, layer)
    np.testing.assert_allclose(
      got, _want(model, now, layer), rtol=1e-4, atol=1e-4
    )
  np.testing.assert_array_equal(stream.residual(params, 'layer_2'), first)


def test_one_more_layer_costs_two(monkeypatch):
  model, params = _made('gemma3')
  passes = []
  real = _stream._pass
  monkeypatch.setattr(
    _stream,
    '_pass',
    lambda *args, **kwargs: passes.append(kwargs) or real(*args, **kwargs),
  )
  stream = _stream.Stream(model, _TOKENS, batch=5)
  for layer in ('layer_0', 'layer_1', 'layer_2'):
    stream.residual(params, layer)
  found = [(p['first'], p['residual_of'], p['through']) for p in passes]
  assert found == [
    (None, 0, None),
    *((None, None, 0), (1, 1, None)),
    *((1, None, 1), (2, 2, None)),
  ]


def test_a_resumed_run_has_the_same_bits():
  model, params = _made('gemma3')
  stream = _stream.Stream(model, _TOKENS)
  for layer in ('layer_0', 'layer_1'):
    stream.residual(params, layer)
    params = _changed(params, layer)
  late = _stream.Stream(model, _TOKENS).residual(params, 'layer_2')
  np.testing.assert_array_equal(stream.residual(params, 'layer_2'), late)
