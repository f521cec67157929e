# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rematerialised blocks: the same gradients from fewer activations."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext import train
from gemma_ext.train import _remat
from tests import tiny


def _compiled(model, params, tokens, *, remat):
  def loss(params):
    out = model.apply({'params': params}, tokens, return_hidden_states=True)
    return jnp.mean(jnp.square(out.hidden_states.astype(jnp.float32)))

  def gradient(params):
    if not remat:
      return jax.value_and_grad(loss)(params)
    with _remat.rematerialized():
      return jax.value_and_grad(loss)(params)

  return jax.jit(gradient).lower(params).compile()


@pytest.mark.parametrize('family', ['gemma2', 'gemma3', 'gemma3n', 'gemma4'])
def test_gradients_are_the_same_and_take_less_memory(family):
  model = tiny.model(family)
  params = tiny.params(model)
  tokens = np.random.default_rng(0).integers(4, tiny.VOCAB_SIZE, (8, 128))
  tokens = jnp.asarray(tokens, jnp.int32)
  # The plain model first: its trace must not answer for the other.
  plain = _compiled(model, params, tokens, remat=False)
  other = _compiled(_remat.stamped(model), params, tokens, remat=True)
  (value, want), (again, got) = plain(params), other(params)
  np.testing.assert_allclose(again, value, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  temporary = [c.memory_analysis().temp_size_in_bytes for c in (plain, other)]
  assert temporary[1] < 0.7 * temporary[0]


def test_other_interceptors_still_see_the_blocks():
  model = _remat.stamped(tiny.model('gemma3'))
  params = tiny.params(tiny.model('gemma3'))
  seen = []

  def see(next_fun, args, kwargs, context):
    seen.append((context.module.name, context.method_name))
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(see), _remat.rematerialized():
    model.apply({'params': params}, jnp.ones((1, 8), jnp.int32))
  assert ('layer_1', '__call__') in seen and ('mlp', '__call__') in seen


def test_remat_is_checked():
  with pytest.raises(errors.ConfigError, match='Gradient.remat'):
    train.Gradient(remat=1)
