# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Budgets of a token, and the experts that keep them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import text
from gemma_ext.text import _energy
from tests import tiny

WEIGHTS = gx.Int(bits=8, group=32)


@functools.lru_cache
def made():
  dense = tiny.model('gemma3')
  recipe = gx.Recipe.of(
    {
      r'layer_\d+/mlp': gx.MoE(
        num_experts=6, top_k=6, shared=2, weights=WEIGHTS
      ),
      '.*': WEIGHTS,
    }
  )
  tokens = np.random.default_rng(0).integers(3, 500, (2, 24))
  params = gx.compress(dense, tiny.params(dense), recipe, calibration=tokens)
  return gx_nn.Compressed(model=dense, recipe=recipe), params


def test_cost_counts_bytes_and_weights():
  model, params = made()
  full = text.cost(model, params)
  assert full.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  one = text.cost(model, params, {f'layer_{i}/mlp': 1 for i in range(3)})
  # Of eight slices three run: five of each layer's 3 * 256 * 128 do not.
  gone = 3 * 3 * 256 * 128 * 5 / 8
  assert full.parameters - one.parameters == gone
  assert full.operations - one.operations == 2 * gone
  # A byte each and two for the scale of 32.
  assert full.nbytes - one.nbytes == pytest.approx(gone * (1 + 2 / 32))
  dense = text.cost(model.model, tiny.params(model.model))
  assert dense.parameters == sum(
    leaf.size for leaf in jax.tree.leaves(tiny.params(model.model))
  )


def zeros(**fields):
  """A mixture of 256 neurons, and parameters of the shapes that it needs."""
  fields = dict(num_experts=8, top_k=8) | fields
  recipe = gx.Recipe.of({'mlp': gx.MoE(**fields)})
  dense = tiny.TinyGemma3Shallow(dtype=jnp.float32)
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))
  )
  fill = lambda leaf: np.zeros(leaf.shape, leaf.dtype)
  return model, jax.tree.map(fill, shapes['params'])


@pytest.mark.parametrize(
  ('fields', 'left'),
  [
    # Slices of 32 codes of a byte each are whole blocks.
    ({'weights': WEIGHTS}, 3),
    # Of 2 bits they are a quarter of one.
    ({'weights': gx.Ternary(group=32)}, 0),
    ({'num_experts': 2, 'top_k': 2, 'weights': gx.Ternary(group=32)}, 3),
    ({'weights': gx.Keep()}, 0),
    # All gates are read, and up and down of those that run.
    ({'router': 'gate', 'weights': gx.Ternary(group=32)}, 2),
    ({'router': 'gate', 'weights': gx.Keep()}, 0),
    ({'router': 'expert_choice', 'weights': WEIGHTS}, 0),
  ],
)
def test_cost_counts_what_is_read(fields, left):
  model, params = zeros(**fields)
  count = fields.get('num_experts', 8)
  full, half = (
    text.cost(model, params, {'layer_0/mlp': k}) for k in (count, count // 2)
  )
  mlp = params['layer_0']['mlp']
  nbytes = sum(
    leaf.nbytes
    for name in ('gating_einsum', 'linear')
    for leaf in jax.tree.leaves(mlp[name])
  )
  # Of three matrices, half of those that are left out in part.
  assert full.nbytes - half.nbytes == pytest.approx(nbytes * left / 6)
  planes = getattr(fields['weights'], 'planes', 1)
  assert full.operations - half.operations == 256 * 128 * left * planes
  matrices = 2 if fields.get('router') == 'gate' else 3
  assert full.parameters - half.parameters == 256 * 128 * matrices / 2


def test_budgets_that_no_choice_keeps_say_why():
  model, params = zeros()
  machine = text.Machine()
  half = text.Budget(joules=machine.joules_of(text.cost(model, params)) * 0.99)
  with pytest.raises(errors.RecipeError, match='All experts are read'):
    text.with_budget(model, params, half)
  # Shares of active parameters are as before.
  some = text.with_budget(model, params, '50%')
  assert int(some['layer_0']['mlp']['router']['k']) == 4


def test_expert_choice_has_no_number_to_set():
  model, params = zeros(router='expert_choice')
  for k in (0.5, {'layer_0/mlp': 1}):
    with pytest.raises(errors.RecipeError, match='expert_choice'):
      gx.compress.with_experts(model, params, k)
  for budget in ('50%', '1mJ', '9s'):
    with pytest.raises(errors.RecipeError, match='expert_choice'):
      text.with_budget(model, params, budget)


@pytest.mark.parametrize('active', [0.375, 0.5, 0.75, 1.0])
def test_shares_are_kept(active):
  model, params = made()
  k = text.experts_within(model, params, text.Budget(active=active))
  assert set(k.values()) == {int(active * 8) - 2}


@pytest.mark.parametrize('unit', ['joules', 'seconds'])
def test_joules_and_seconds_are_kept_and_used(unit):
  model, params = made()
  machine = text.Machine(seconds=1e-6)
  of = getattr(machine, f'{unit}_of')
  costs = [
    of(text.cost(model, params, {f'layer_{i}/mlp': k for i in range(3)}))
    for k in range(1, 7)
  ]
  for k, value in enumerate(costs, 1):
    budget = text.Budget(**{unit: value * 1.0001})
    found = text.experts_within(model, params, budget, machine=machine)
    assert set(found.values()) == {k}
  with pytest.raises(errors.RecipeError, match='one expert a layer'):
    budget = text.Budget(**{unit: costs[0] * 0.99})
    text.experts_within(model, params, budget, machine=machine)


def test_curves_decide_which_layer_gives():
  model, params = made()
  row = np.linspace(1, 0, 7) ** 2
  paths = [f'layer_{i}/mlp' for i in range(3)]
  curves = gx.compress.Curves(
    lost=dict.fromkeys(paths, row),
    nats=dict(zip(paths, (1.0, 0.01, 0.01))),
    sizes=dict.fromkeys(paths, 3 * 32 * 128),
    shared=dict.fromkeys(paths, 3 * 64 * 128),
  )
  k = text.experts_within(model, params, text.Budget(active=0.6), curves=curves)
  assert k['layer_0/mlp'] > k['layer_1/mlp']
  assert curves.active(k) <= 0.6


def test_budget_reaches_the_model_and_compiles_nothing():
  model, params = made()
  count = 0

  @jax.jit
  def run(params):
    nonlocal count
    count += 1
    return model.apply({'params': params}, jnp.array([[5, 6, 7]])).logits

  found = [
    np.asarray(run(text.with_budget(model, params, f'{share}%')))
    for share in (100, 70, 40)
  ]
  assert count == 1
  assert not np.allclose(found[0], found[1])
  assert not np.allclose(found[1], found[2])


def test_machine_is_fitted_to_times():
  costs = [
    text.Cost(nbytes=n * 1e6, operations=2e6 * n, parameters=n)
    for n in range(1, 9)
  ]
  rng = np.random.default_rng(0)
  times = [2e-3 + c.nbytes / 5e9 + 1e-6 * rng.standard_normal() for c in costs]
  machine = text.Machine.of(costs, times)
  assert machine.seconds == pytest.approx(2e-3, rel=0.01)
  assert machine.seconds_per_byte == pytest.approx(1 / 5e9, rel=0.02)
  with pytest.raises(errors.ShapeError, match='at least two'):
    text.Machine.of(costs[:1], times[:1])


def test_budgets_are_read():
  assert text.Budget.parse('50%') == text.Budget(active=0.5)
  assert text.Budget.parse('200 mJ').joules == pytest.approx(0.2)
  assert text.Budget.parse('15ms').seconds == pytest.approx(0.015)
  for bad in ('', '50', '-1J', '0%', '101%', '1e9999s', '1kJ'):
    with pytest.raises(errors.RecipeError):
      text.Budget.parse(bad)
  with pytest.raises(errors.RecipeError, match='one of'):
    text.Budget(active=0.5, joules=1.0)
  model, params = made()
  with pytest.raises(errors.RecipeError, match='no mixtures'):
    text.with_budget(model.model, tiny.params(model.model), '50%')


def test_hard_prompts_get_more():
  model, params = made()
  bits = text.complexity(model, params, [5, 6, 7, 8])
  # A random model knows little of 512 tokens.
  assert 3 < bits <= 9
  shares = [text.active_for(b).active for b in (0.0, 2.0, 4.0, 6.0, 9.0)]
  assert shares == [0.25, 0.25, 0.625, 1.0, 1.0]
  with pytest.raises(errors.ShapeError):
    text.complexity(model, params, [])


def test_entropies_are_computed_some_rows_at_a_time():
  logits = np.random.default_rng(0).standard_normal((150, 40)) * 3
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  want = -(p * np.log(p)).sum(axis=1).mean()
  entropy = jax.jit(_energy._mean_entropy)
  assert float(entropy(logits)) == pytest.approx(want, rel=1e-5)
  shape = jax.ShapeDtypeStruct((2048, 4096), jnp.bfloat16)
  memory = entropy.lower(shape).compile().memory_analysis()
  # One of all rows in float32 would be 32 MB.
  assert memory.temp_size_in_bytes < 20e6


def test_mixtures_of_gemma_4_keep_budgets():
  dense = tiny.model('gemma4_moe')
  recipe = gx.Recipe.of({r'layer_\d+/mlp/(gating|linear).*': WEIGHTS})
  shapes = jax.eval_shape(
    dense.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32)
  )['params']
  params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  params = gx.compress(dense, params, recipe)
  model = gx_nn.Compressed(model=dense, recipe=recipe)
  full, every = text.cost(model, params), jax.tree.leaves(params)
  # Two of four experts of 3 * 128 * 128 in each of two layers, and one.
  half = 2 * 2 * 3 * 128 * 128
  nbytes = sum(leaf.nbytes for leaf in every)
  assert nbytes - full.nbytes == pytest.approx(half * (1 + 2 / 32))
  less = text.with_budget(model, params, '25%')
  for layer in ('layer_0', 'layer_1'):
    assert int(less[layer]['mlp']['router']['k']) == 1
  gone = full.parameters - text.cost(model, less).parameters
  assert gone == half / 2 - 2  # The two numbers are parameters.
  seconds = (full.nbytes + text.cost(model, less).nbytes) / 2 / 20e9
  same = text.with_budget(model, params, f'{seconds}s')
  assert int(same['layer_0']['mlp']['router']['k']) == 1
  with pytest.raises(errors.RecipeError, match='which may have 1 to 2'):
    gx.compress.with_experts(model, params, {'layer_0/mlp': 3})
