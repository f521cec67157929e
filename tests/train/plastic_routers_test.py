# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Plasticity refuses routers that cannot divide before anything changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import train
from gemma_ext.nn import _moe

_D, _M, _SLOTS = 4, 2, 6


def _mixture(router):
  method = gx.MoE(num_experts=_SLOTS, top_k=_SLOTS, router=router)
  return gx.nn.Mixture(
    path='mlp', method=method, features=_D, hidden=_SLOTS * _M
  )


def _params(mixture, k, live=3):
  router = _moe.initial(mixture, jax.random.key(0)) | {'k': jnp.int32(k)}
  mlp = {
    'gating_einsum': jnp.ones((2, mixture.hidden, _D)),
    'linear': jnp.ones((mixture.hidden, _D)),
    'router': router,
  }
  return train.keep_experts({'mlp': mlp}, mixture, live)


def _plastic(mixture, **settings):
  """With one window observed, in which the first expert had most to do."""
  settings = train.Plasticity(patience=1, age=1, pause=1, **settings)
  plastic = train.Plastic(settings, {'mlp': mixture})

  def observe():
    load = jnp.array([0.9, 0.06, 0.04, 0, 0, 0])
    each = jnp.repeat(load, _M)[:, None] * jnp.ones(_D)
    sown = {'load': load}
    grads = {'gating_einsum': jnp.stack([each, each]), 'linear': each}
    plastic.observe({'mlp': {'routing': (sown,)}}, {'mlp': grads})

  observe()
  return plastic, observe


@pytest.mark.parametrize('router', ['gate', 'expert_choice'])
def test_router_that_never_divides(router):
  mixture = _mixture(router)
  with pytest.raises(errors.TrainError, match=f"{router}.*'norm', 'softmax'"):
    train.Plastic(train.Plasticity(), {'mlp': mixture})


@pytest.mark.parametrize(
  ('router', 'k'),
  [
    ('softmax', 2),
    ('sigmoid', 6),
    # With three experts it divides, with four no more.
    ('norm', 4),
  ],
)
def test_router_that_does_not_divide_with_such_parameters(router, k):
  mixture = _mixture(router)
  params = _params(mixture, k)
  plastic, _ = _plastic(mixture)
  before = plastic._history['mlp']
  with pytest.raises(errors.TrainError, match=f'k={k} and 5 experts'):
    plastic.update(0, params)
  assert plastic._history['mlp'] is before
  # What was observed is still there.
  params['mlp']['router']['k'] = jnp.int32(1)
  plastic.update(0, params)
  assert plastic._history['mlp'].age[0] == 1


@pytest.mark.parametrize(
  ('router', 'k', 'most'),
  [('norm', 4, 4), ('softmax', 2, 1), ('sigmoid', 1, 6)],
)
def test_router_that_divides_as_far_as_it_has_to(router, k, most):
  mixture = _mixture(router)
  params = _params(mixture, k)
  plastic, observe = _plastic(mixture, most=most)
  for step in range(6):
    params, _, _ = plastic.update(step, params)
    observe()
  count = train.live_experts(params, mixture).sum()
  assert count == {'norm': 4, 'softmax': 3, 'sigmoid': 4}[router]
  assert np.isfinite(params['mlp']['linear']).all()
