# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Compressed models on the C++ kernels give what they give on XLA."""

from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.kernels import _cpu
from tests import tiny

pytestmark = pytest.mark.skipif(
  _cpu.library() is None, reason='the C++ library was not built'
)

TOKENS = jnp.array([[2, 5, 6, 7, 8, 9, 10, 11], [2, 20, 21, 22, 23, 0, 0, 0]])
RECIPE = gx.Recipe.of(
  {
    r'layer_0/attn': gx.Keep(),
    r'layer_1/mlp2?': gx.Ternary(group=8, planes=2, scale='ue5m3', tied=True),
    r'layer_\d+/mlp2?': gx.Ternary(group=64, planes=2, packing='5trit'),
    r'embedder': gx.Int(bits=6, group=32),
    r'.*': gx.Int(bits=4, group=64),
  }
)


@pytest.fixture
def backend(monkeypatch):
  """Chooses a backend; what was traced with another is forgotten."""

  def choose(name):
    monkeypatch.setenv('GEMMA_EXT_BACKEND', name)
    jax.clear_caches()

  yield choose
  jax.clear_caches()


def _model(family):
  dense = tiny.model(family)
  model = gx.nn.Compressed(model=dense, recipe=RECIPE)
  return model, gx.compress(dense, tiny.params(dense), model.recipe)


def _ffi_calls(function, *args):
  return jax.jit(function).lower(*args).as_text().count('gemma_ext_matmul')


FAMILIES = ('gemma2', 'gemma3', 'gemma3n', 'gemma4_moe')


@pytest.mark.parametrize('family', FAMILIES)
def test_logits(family, backend):
  model, params = _model(family)
  run = lambda params: model.apply({'params': params}, TOKENS).logits
  found = {}
  for name in ('xla', 'cpu'):
    backend(name)
    assert (_ffi_calls(run, params) > 0) == (name == 'cpu')
    found[name] = np.asarray(run(params), np.float64)
  size = np.abs(found['xla']).max()
  assert size > 0.1
  np.testing.assert_allclose(found['cpu'], found['xla'], atol=2e-3 * size)


def test_gradients_through_packed_weights(backend):
  model, params = _model('gemma3')
  norms = params['layer_0']['pre_ffw_norm']

  def loss(norms):
    layer = params['layer_0'] | {'pre_ffw_norm': norms}
    out = model.apply({'params': params | {'layer_0': layer}}, TOKENS).logits
    return jnp.mean(jax.nn.log_softmax(out)[..., 7])

  found = {}
  for name in ('xla', 'cpu'):
    backend(name)
    found[name] = jax.jit(jax.grad(loss))(norms)['scale']
  size = np.abs(found['xla']).max()
  assert size > 0
  np.testing.assert_allclose(found['cpu'], found['xla'], atol=1e-2 * size)


def test_the_official_sampler(backend):
  model, params = _model('gemma3')
  texts = []
  for name in ('xla', 'cpu'):
    backend(name)
    sampler = gm.text.Sampler(
      model=model,
      params=params,
      tokenizer=tiny.tokenizer(model.INFO.tokenizer_version),
      cache_length=64,
      max_out_length=16,
      pad_length=16,
    )
    texts.append(sampler.sample('a b', max_new_tokens=4))
  assert texts[0] == texts[1]


def test_unknown_backend(backend):
  backend('abacus')
  fmt = gx.kernels.IntFormat()
  p = {'codes': jnp.ones((5, 64), jnp.int8), 'scale': jnp.ones((5, 1))}
  p['scale'] = fmt.pack_scale(p['scale'])
  with pytest.raises(errors.BackendError, match="'xla', 'cpu'"):
    gx.kernels.matmul(jnp.ones((1, 64)), p, fmt)
