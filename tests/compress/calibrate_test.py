# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of calibration: second moments against a float64 reference."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.nn import _config
from gemma_ext.nn import _sites
from tests import tiny

_PAD, _BOS = 0, 2


def _tokens(rows=3, length=12, seed=0):
  """Random tokens behind BOS, the second row padded."""
  tokens = np.random.default_rng(seed).integers(3, 500, (rows, length))
  tokens[:, 0] = _BOS
  tokens[1, 8:] = _PAD
  return tokens


def _close(a, b, **kwargs):
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_allclose(a[path], b[path], err_msg=path, **kwargs)


def test_first_layer_by_hand():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  tokens = _tokens()
  table = np.asarray(params['embedder']['input_embedding'], np.float64)
  scale = params['layer_0']['pre_attention_norm']['scale']
  x = table[tokens] * np.sqrt(128)
  x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  x *= 1 + np.asarray(scale, np.float64)
  counted = (tokens != _PAD) & (tokens != _BOS)
  assert counted.sum() == 3 * 11 - 4
  want = (x[counted] ** 2).mean(0)
  moments = gx.compress.second_moments(model, params, tokens)
  for name in ('q_einsum', 'kv_einsum'):
    got = moments[f'layer_0/attn/{name}/w']
    assert (got.shape, got.dtype) == ((128,), jnp.float32)
    np.testing.assert_allclose(got, want, rtol=2e-5)
  # BOS, were it counted, would show.
  with_bos = (x[tokens != _PAD] ** 2).mean(0)
  assert np.abs(with_bos / want - 1).max() > 0.05


def test_every_einsum_against_its_inputs():
  model = _config.probe(tiny.model('gemma3'))
  params = tiny.params(model)
  tokens = _tokens(rows=2, length=10)
  layouts = {s.path: s.layout for s in gx.nn.sites(model)}
  seen = {}

  def record(next_fun, args, kwargs, context):
    module = context.module
    if isinstance(module, _sites.EINSUMS) and context.method_name == '__call__':
      path = '/'.join((*module.path, module.weight_name))
      seen[path] = np.asarray(args[1], np.float64)
    return next_fun(*args, **kwargs)

  # Without jit every input is an array that can be looked at.
  with jax.disable_jit(), nn.intercept_methods(record):
    model.apply({'params': params}, jnp.asarray(tokens))
  moments = gx.compress.second_moments(tiny.model('gemma3'), params, tokens)
  assert moments.keys() == seen.keys()
  assert len(seen) == 15
  counted = (tokens != _PAD) & (tokens != _BOS)
  for path, x in seen.items():
    want = (x.reshape(2, 10, layouts[path].cols)[counted] ** 2).mean(0)
    np.testing.assert_allclose(moments[path], want, rtol=1e-3, err_msg=path)


def test_padding_and_bos_do_not_count():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  tokens = _tokens()
  moments = gx.compress.second_moments(model, params, tokens)
  padded = np.pad(tokens, ((0, 2), (0, 0)))  # Two rows of nothing.
  _close(gx.compress.second_moments(model, params, padded), moments, rtol=1e-5)
  longer = np.pad(tokens, ((0, 0), (0, 4)))
  _close(gx.compress.second_moments(model, params, longer), moments, rtol=1e-4)


@pytest.mark.parametrize('batch_size', [2, 3, 8])
def test_batch_size_changes_nothing(batch_size):
  model = tiny.model('gemma3')
  params = tiny.params(model)
  tokens = _tokens(rows=3)
  one = gx.compress.second_moments(model, params, tokens)
  more = gx.compress.second_moments(
    model, params, tokens, batch_size=batch_size
  )
  _close(more, one, rtol=1e-4)


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_families(family):
  model = tiny.model(family)
  params = tiny.params(model)
  moments = gx.compress.second_moments(model, params, _tokens())
  einsums = {
    s.path: s.layout.cols
    for s in gx.nn.sites(model)
    if s.kind == gx.nn.Kind.EINSUM
  }
  assert {path: value.shape for path, value in moments.items()} == {
    path: (cols,) for path, cols in einsums.items()
  }
  for path, value in moments.items():
    value = np.asarray(value)
    assert np.isfinite(value).all() and (value >= 0).all(), path
    assert value.mean() > 1e-6, path
  # What is read after a norm has a mean square near one.
  for name in ('q_einsum', 'gating_einsum'):
    for path in moments:
      if f'/{name}' in path:
        assert 0.5 < np.asarray(moments[path]).mean() < 2, path


def test_the_model_is_left_as_it_was():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  tokens = jnp.asarray(_tokens())
  before = model.apply({'params': params}, tokens).logits
  gx.compress.second_moments(model, params, tokens)
  variables = model.apply({'params': params}, tokens, mutable=['calibration'])
  assert not variables[1]
  np.testing.assert_array_equal(variables[0].logits, before)


@pytest.mark.parametrize(
  'tokens',
  [
    np.zeros((0, 8), np.int32),
    np.zeros((2, 0), np.int32),
    np.ones((8,), np.int32),
    np.ones((1, 2, 8), np.int32),
    np.ones((2, 8), np.float32),
    np.array([['a', 'b']]),
    None,
  ],
  ids=['no_rows', 'no_columns', 'vector', 'cube', 'floats', 'text', 'none'],
)
def test_bad_tokens(tokens):
  with pytest.raises(errors.ShapeError, match=r'integers of shape \[batch'):
    gx.compress.second_moments(tiny.model('gemma3'), {}, tokens)


@pytest.mark.parametrize('token', [_PAD, _BOS])
def test_nothing_to_count(token):
  model = tiny.model('gemma2')
  tokens = np.full((1, 8), token)
  with pytest.raises(errors.ShapeError, match='nothing but padding'):
    gx.compress.second_moments(model, tiny.params(model), tokens)


def test_not_a_model():
  with pytest.raises(errors.ParamsMismatchError, match='official Gemma model'):
    gx.compress.second_moments(None, {}, _tokens())
