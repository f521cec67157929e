# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Carving layers, and the choice of how many experts each of them gets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.compress import _carve
from tests import tiny


def planted(groups=8, size=8, width=32, tokens=600, seed=0):
  """A layer whose neurons run in groups, each in tokens of its own kind."""
  rng = np.random.default_rng(seed)
  kinds = np.linalg.qr(rng.standard_normal((width, width)))[0][:groups]
  of = rng.integers(0, groups, tokens)
  x = kinds[of] * 6 + 0.2 * rng.standard_normal((tokens, width))
  place = rng.permutation(np.repeat(np.arange(groups), size))
  gate = np.stack([kinds[place], kinds[place]])
  gate += 0.05 * rng.standard_normal(gate.shape)
  down = rng.standard_normal((groups * size, width))
  return x.astype(np.float32), gate, down, place


def test_planted_groups_and_their_router_are_found():
  x, gate, down, place = planted()
  mixture = gx_nn.Mixture(
    path='mlp',
    method=gx.MoE(num_experts=8, top_k=1),
    features=32,
    hidden=64,
  )
  found = _carve.carve_layer(mixture, x, gate, down)
  assert sorted(found.order) == list(range(64))
  for group in place[found.order].reshape(8, 8):
    assert len(set(group)) == 1
  assert found.explained > 0.9
  # One expert of eight does nearly all.
  hidden = jax.nn.gelu(x @ gate[0].T) * (x @ gate[1].T)
  whole = np.asarray(hidden) @ down
  choice = gx_nn.route(mixture.method, found.router, x)
  mask = np.repeat(np.asarray(choice.gates()), 8, axis=1)
  some = (np.asarray(hidden)[:, found.order] * mask) @ down[found.order]
  assert np.square(whole - some).sum() < 0.02 * np.square(whole).sum()


def test_shared_experts_are_the_busiest_neurons():
  x, gate, down, _ = planted()
  # Neurons 0 to 7 run for every token.
  gate[:, :8] = x.mean(axis=0) + x.std(axis=0).max() * np.sign(x.mean(axis=0))
  mixture = gx_nn.Mixture(
    path='mlp',
    method=gx.MoE(num_experts=7, top_k=2, shared=1),
    features=32,
    hidden=64,
  )
  order = _carve.carve_layer(mixture, x, gate, down * 3).order
  assert sorted(order) == list(range(64))
  assert len(set(order[:8]) & set(range(8))) >= 7


def test_large_layers_are_cut_evenly_too(monkeypatch):
  rng = np.random.default_rng(0)
  busy = rng.random((96, 50)) < 0.3
  monkeypatch.setattr(_carve, '_EXACT', 10)
  group = _carve.groups(busy, 6, rng)
  assert (np.bincount(group) == 16).all()


@pytest.mark.parametrize('router', ['softmax', 'sigmoid', 'expert_choice'])
def test_routers_whose_weights_add_up_to_one_are_not_carved(router):
  dense = tiny.model('gemma3')
  method = gx.MoE(num_experts=4, top_k=4, router=router)
  recipe = gx.Recipe.of({r'layer_\d+/mlp': method})
  tokens = np.random.default_rng(0).integers(3, 500, (1, 8))
  with pytest.raises(errors.RecipeError, match='upcycle'):
    gx.compress.carve(dense, tiny.params(dense), recipe, tokens)
  # Before it asks for text.
  with pytest.raises(errors.RecipeError, match='upcycle'):
    gx.compress(dense, tiny.params(dense), recipe)


def test_layers_with_a_router_are_not_carved_again():
  dense = tiny.model('gemma3')
  recipe = gx.Recipe.of({r'layer_[02]/mlp': gx.MoE(num_experts=4, top_k=4)})
  tokens = np.random.default_rng(0).integers(3, 500, (2, 24))
  params = gx.compress.carve(dense, tiny.params(dense), recipe, tokens)
  router = params['layer_0']['mlp']['router']
  router['w'] = trained = router['w'] + 1
  was = params['layer_0']['mlp']['linear']
  del params['layer_2']['mlp']['router']
  made = gx.compress(dense, params, recipe, calibration=tokens)
  np.testing.assert_array_equal(made['layer_0']['mlp']['router']['w'], trained)
  np.testing.assert_array_equal(made['layer_0']['mlp']['linear'], was)
  assert set(made['layer_2']['mlp']['router']) == set(router)


def curves_of(seed=0):
  rng = np.random.default_rng(seed)
  lost, nats, sizes, shared = {}, {}, {}, {}
  for i, (size, count) in enumerate([(10, 4), (10, 4), (20, 3)]):
    parts = np.sort(rng.random(count))[::-1]
    lost[f'l{i}'] = np.concatenate([[1], 1 - np.cumsum(parts / parts.sum())])
    nats[f'l{i}'] = float(rng.random() + 0.1)
    sizes[f'l{i}'], shared[f'l{i}'] = size, 5
  return gx.compress.Curves(lost=lost, nats=nats, sizes=sizes, shared=shared)


@pytest.mark.parametrize('seed', range(4))
def test_choice_is_the_best_of_all(seed):
  curves = curves_of(seed)
  # Where the next step is as large everywhere, greedy is exact.
  curves = gx.compress.Curves(
    **{**vars(curves), 'sizes': dict.fromkeys(curves.sizes, 10)}
  )
  for active in (0.5, 0.75, 0.9):
    k = gx.compress.choose_experts(curves, active)
    assert curves.active(k) <= active + 1e-9
    every = [
      dict(zip(curves.lost, ks))
      for ks in itertools.product(range(1, 5), range(1, 5), range(1, 4))
    ]
    best = min(
      curves.cost(ks) for ks in every if curves.active(ks) <= active + 1e-9
    )
    assert curves.cost(k) == pytest.approx(best)
  full = gx.compress.choose_experts(curves, 1.0)
  assert list(full.values()) == [4, 4, 3]


def test_choices_keep_the_most_that_tokens_may_get():
  curves = curves_of()
  curves = gx.compress.Curves(**{**vars(curves), 'most': {'l0': 2, 'l2': 1}})
  assert gx.compress.choose_experts(curves, 1.0) == {'l0': 2, 'l1': 4, 'l2': 1}
  assert curves.to_json()['most'] == {'l0': 2, 'l2': 1}


def test_bad_choices():
  with pytest.raises(errors.RecipeError, match='cannot be had'):
    gx.compress.choose_experts(curves_of(), 0.01)


def test_curves_of_a_model():
  dense = tiny.model('gemma3')
  recipe = gx.Recipe.of({r'layer_[02]/mlp': gx.MoE(num_experts=8, top_k=8)})
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  tokens = np.random.default_rng(0).integers(3, 500, (2, 24))
  params = gx.compress(
    dense, tiny.params(dense, seed=0), recipe, calibration=tokens
  )
  found = gx.compress.expert_curves(model, params, tokens)
  assert set(found.lost) == {'layer_0/mlp', 'layer_2/mlp'}
  for row in found.lost.values():
    assert row[0] == 1 and row[-1] < 1e-5
    assert (np.diff(row) <= 1e-9).all()
    # Convex: the best experts come first.
    assert (np.diff(np.diff(row)) >= -1e-6).all()
  assert all(v > 0 for v in found.nats.values())
  assert found.parameters == 2 * 3 * 256 * 128
  k = gx.compress.choose_experts(found, 0.5)
  assert sum(k.values()) == 8
  some = gx.compress.with_experts(model, params, k)
  assert int(some['layer_2']['mlp']['router']['k']) == k['layer_2/mlp']
  with pytest.raises(errors.RecipeError, match='1 to 8'):
    gx.compress.with_experts(model, params, {'layer_0/mlp': 9})
  with pytest.raises(errors.RecipeError, match='no mixture'):
    gx.compress.with_experts(model, params, {'layer_1/mlp': 1})
  with pytest.raises(errors.RecipeError, match='no mixtures'):
    gx.compress.expert_curves(dense, tiny.params(dense), tokens)


def test_curves_where_few_of_the_experts_may_run():
  dense = tiny.TinyGemma3Shallow(dtype=jnp.float32)
  recipe = gx.Recipe.of({r'layer_\d+/mlp': gx.MoE(num_experts=8, top_k=4)})
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  tokens = np.random.default_rng(0).integers(3, 500, (2, 24))
  params = gx.compress(dense, tiny.params(dense), recipe, calibration=tokens)
  found = gx.compress.expert_curves(model, params, tokens)
  (path,) = found.lost
  assert len(found.lost[path]) == 9 and found.most == {path: 4}
  assert found.parameters == 3 * 256 * 128
  # The slope fits what 2 and 3 of the 4 cost.
  cost = {
    k: gx.compress.divergence(
      model,
      gx.compress.with_experts(model, params, 1.0),
      model,
      gx.compress.with_experts(model, params, {path: k}),
      tokens,
    )
    for k in (2, 3)
  }
  beyond = {k: found.lost[path][k] - found.lost[path][4] for k in cost}
  slope = sum(cost[k] * beyond[k] for k in cost)
  slope /= sum(share**2 for share in beyond.values())
  assert found.nats[path] == pytest.approx(slope, rel=1e-3)
  assert found.nats[path] > 0
  assert gx.compress.choose_experts(found, 0.99) == {path: 4}
  budget = gx.text.Budget(active=0.25)
  k = gx.text.experts_within(model, params, budget, curves=found)
  assert k == {path: 2}
