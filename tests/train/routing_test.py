# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Routers in training: losses, metrics, balancing, and a real Trainer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from kauldron import kd
import numpy as np
import optax
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import train
from gemma_ext.nn import _moe
from gemma_ext.train import _routing
from tests import tiny


def _sown(load, probability=None, z=4.0, live=None):
  load = jnp.asarray(load, jnp.float32)
  p = load / load.sum() if probability is None else jnp.asarray(probability)
  return {
    'load': load,
    'probability': p,
    'live': jnp.ones(len(load)) if live is None else jnp.asarray(live),
    'z': jnp.float32(z),
    'active': load.sum() / len(load),
  }


def _interms(*layers):
  return {
    f'layer_{i}': {'mlp': {'routing': (each,), '__call__': (jnp.ones(2),)}}
    for i, each in enumerate(layers)
  }


def test_losses_on_known_loads():
  even, one = _sown([0.5] * 4), _sown([1.0, 0, 0, 0], [0.97, 0.01, 0.01, 0.01])
  interms = _interms(even, one)
  found = train.routing(interms)
  assert list(found) == ['layer_0/mlp', 'layer_1/mlp']
  np.testing.assert_allclose(train.load_balance(found), [1, 3.88], rtol=1e-6)
  np.testing.assert_allclose(train.router_z(found), [4, 4])
  np.testing.assert_allclose(
    train.LoadBalance(weight=0.5)(interms=interms), 1.22, rtol=1e-6
  )
  np.testing.assert_allclose(train.RouterZ()(interms=interms), 4)
  # An expert that is not there makes no difference.
  gone = _sown([0.5, 0.5, 0.0], [0.5, 0.5, 0.0], live=[1, 1, 0])
  np.testing.assert_allclose(train.load_balance({'x': gone}), [1], rtol=1e-6)
  with pytest.raises(errors.ParamsMismatchError, match='No router has run'):
    train.routing({'layer_0': {'mlp': {'__call__': (jnp.ones(2),)}}})


def test_metrics_on_known_loads():
  first, second = _sown([1.0, 0.2, 0.0, 0.8]), _sown([0.6, 0.6, 0.6, 0.2])
  context = lambda x: {'interms': _interms(x)}
  of = lambda m: [m.get_state_from_context(context(x)) for x in (first, second)]

  def value(metric):
    a, b = of(metric)
    return metric.empty().merge(a).merge(b).finalize().compute()

  # Together the loads are 1.6, 0.8, 0.6, 1.0 in 2, their mean 0.5.
  share = np.array([1.6, 0.8, 0.6, 1.0]) / 4
  want = -(share * np.log(share)).sum() / math.log(4)
  np.testing.assert_allclose(value(train.RoutingEntropy()), want, rtol=1e-5)
  np.testing.assert_allclose(value(train.LargestLoad()), 1.6, rtol=1e-5)
  np.testing.assert_allclose(value(train.SmallestLoad()), 0.6, rtol=1e-5)
  assert value(train.ExpertUtilisation(least=0.7)) == 0.75
  np.testing.assert_allclose(value(train.ActiveShare()), 0.5, rtol=1e-5)


def test_entropy_of_one_and_of_none():
  alone = _sown([1.0, 0.0], [1.0, 0.0], live=[1, 0])
  assert _routing.entropy(alone) == 1
  assert _routing.entropy(_sown([1.0, 0.0], [0.9, 0.1])) == 0


def test_a_router_that_collapsed_looks_like_one():
  """Of eight experts one is not there, five have no probability left."""
  recipe = gx.Recipe.of(
    {'mlp': gx.MoE(num_experts=8, top_k=2, router='softmax')}
  )
  dense = tiny.shallow()
  model = gx.nn.Compressed(model=dense, recipe=recipe)
  tokens = jnp.arange(3, 15)[None]
  params = model.init(jax.random.key(0), tokens)['params']
  router = params['layer_0']['mlp']['router']
  bias = jnp.zeros(8).at[2:].set(-1e4).at[7].set(_moe.DEAD)
  router['bias'] = bias.astype(router['bias'].dtype)
  found = train.measure_routing(model, params, tokens)['layer_0/mlp']
  assert (found['probability'][2:] == 0).all()
  np.testing.assert_array_equal(found['live'], [1] * 7 + [0])
  load = found['load'][:7]
  np.testing.assert_allclose(_routing.relative_load(found), load / load.mean())
  share = load[:2] / load.sum()
  want = -(share * np.log(share)).sum() / math.log(7)
  np.testing.assert_allclose(_routing.entropy(found), want, rtol=1e-5)
  assert train.ExpertUtilisation().of(found) == pytest.approx(2 / 7)
  (loss,) = train.load_balance({'mlp': found})
  p = found['probability'][:2]
  assert loss == pytest.approx(7 * float((share * p).sum()), rel=1e-5)


def test_biases_balance_a_router():
  method = gx.MoE(num_experts=6, top_k=2, router='sigmoid')
  mixture = gx.nn.Mixture(path='mlp', method=method, features=16, hidden=48)
  router = _moe.initial(mixture, jax.random.key(0))
  router['bias'] = router['bias'].at[4].set(_moe.DEAD)
  x = jax.random.normal(jax.random.key(1), (2000, 16)) + 0.7
  params = {'mlp': {'router': router}}

  @jax.jit
  def step(params, rate):
    choice = gx.nn.route(method, params['mlp']['router'], x)
    load = (choice.gates() > 0).mean(axis=0)
    live = params['mlp']['router']['bias'] > _moe.DEAD / 2
    sown = _sown(load, jax.nn.softmax(choice.logits).mean(axis=0), live=live)
    return train.balance(params, {'mlp': {'routing': (sown,)}}, rate), sown

  _, before = step(params, 0.01)
  assert _routing.relative_load(before).max() > 1.6
  for i in range(300):
    params, after = step(params, 0.01 * 0.98**i)
  got = _routing.relative_load(after)
  assert len(got) == 5  # The dead one is not counted, nor raised.
  assert got.min() > 0.9 and got.max() < 1.1
  assert params['mlp']['router']['bias'][4] == _moe.DEAD


_RECIPE = gx.Recipe.of(
  {r'layer_\d+/mlp': gx.MoE(num_experts=4, top_k=2, router='sigmoid')}
)


@dataclasses.dataclass(frozen=True)
class _Tokens:
  """Random text of few words, as a kauldron source."""

  def __len__(self):
    return 64

  def __getitem__(self, i):
    x = np.random.default_rng(int(i)).integers(3, 500, 13)
    return {
      'input': x[:-1].astype(np.int32),
      'target': x[1:, None].astype(np.int32),
    }


def _trainer(workdir, recipe=_RECIPE, **changes):
  model = gx.nn.Compressed(
    model=tiny.shallow(),
    recipe=recipe,
  )
  fields = {
    'model': model,
    'seed': 0,
    'workdir': workdir,
    'train_ds': kd.data.py.DataSource(
      data_source=_Tokens(), batch_size=8, shuffle=True, num_workers=0
    ),
    'num_train_steps': 3,
    'train_losses': {
      'xentropy': kd.losses.SoftmaxCrossEntropyWithIntLabels(
        logits='preds.logits', labels='batch.target'
      ),
      'balance': train.LoadBalance(weight=1e-2),
      'z': train.RouterZ(weight=1e-3),
    },
    'train_metrics': {
      'entropy': train.RoutingEntropy(),
      'used': train.ExpertUtilisation(),
      'largest': train.LargestLoad(),
      'smallest': train.SmallestLoad(),
      'active': train.ActiveShare(),
    },
    'optimizer': optax.chain(
      optax.masked(optax.adam(1e-3), train.floating), gx.nn.freeze_codes()
    ),
    'trainstep': train.BalancedStep(rate=0.01),
    'log_metrics_every': 1,
    'log_summaries_every': 1,
  }
  return kd.train.Trainer(**fields | changes)


def test_a_trainer_sees_it_all(tmp_path):
  trainer = _trainer(tmp_path)
  state, aux = trainer.train()
  found = aux.finalize().compute(flatten=False)
  values = {'losses': found.loss_values, 'metrics': found.metric_values}
  assert 0.9 < values['losses']['balance'] / 1e-2 < 4
  assert values['losses']['z'] > 0
  assert 0 < values['metrics']['entropy'] <= 1
  assert values['metrics']['smallest'] <= 1 <= values['metrics']['largest']
  np.testing.assert_allclose(values['metrics']['active'], 0.5, rtol=1e-5)
  bias = np.asarray(state.params['layer_0']['mlp']['router']['bias'])
  # Steps of 0.01, from zero: whole multiples, and some of them moved.
  np.testing.assert_allclose(bias * 100, np.round(bias * 100), atol=1e-3)
  assert 0.01 <= np.abs(bias).max() <= 0.045


def test_the_balance_loss_levels_a_router():
  method = gx.MoE(num_experts=4, top_k=1, router='softmax')
  mixture = gx.nn.Mixture(path='mlp', method=method, features=16, hidden=32)
  router = _moe.initial(mixture, jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (1000, 16)) + 0.7

  def loss(w):
    choice = gx.nn.route(method, router | {'w': w}, x)
    load = (choice.gates() > 0).mean(axis=0)
    sown = _sown(load, jax.nn.softmax(choice.logits).mean(axis=0))
    return train.load_balance({'mlp': sown}).mean(), load

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  w = router['w']
  (before, _), _ = step(w)
  for _ in range(100):
    (after, load), grad = step(w)
    w -= 0.3 * grad
  assert before > 1.15 and after < 1.05
  assert 0.5 < float(load.min() / load.mean())
  assert float(load.max() / load.mean()) < 2


def test_bad_steps(tmp_path):
  with pytest.raises(errors.ConfigError, match='rate'):
    train.BalancedStep(rate=0.0)
  recipe = gx.Recipe.of(
    {r'layer_\d+/mlp': gx.MoE(num_experts=4, top_k=1, router='softmax')}
  )
  with pytest.raises(errors.ConfigError, match="'sigmoid'"):
    _trainer(tmp_path, recipe).init_state()


def test_plot(tmp_path):
  train.plot_routing(
    {'a': _sown([0.5, 0.4, 0.1]), 'b': _sown([0.2, 0.4, 0.4])},
    tmp_path / 'routing.png',
  )
  assert (tmp_path / 'routing.png').read_bytes()[1:4] == b'PNG'
