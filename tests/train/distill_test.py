# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The divergence on a shortlist against the whole one in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import compress
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext import train
from gemma_ext.train import _branch
from gemma_ext.train import _distill
from tests import tiny

_V, _D, _N = 400, 16, 32


def _draw(seed: int = 0):
  rng = np.random.default_rng(seed)
  table = rng.standard_normal((_V, _D)).astype(np.float32)
  teacher = rng.standard_normal((_N, _D)).astype(np.float32)
  student = teacher + 0.3 * rng.standard_normal((_N, _D)).astype(np.float32)
  return table, teacher, student


def _whole(table, teacher, student, cap=None, own=None):
  def log_p(hidden, table):
    z = hidden.astype(np.float64) @ table.T.astype(np.float64)
    if cap is not None:
      z = np.tanh(z / cap) * cap
    return z - np.log(np.exp(z).sum(-1, keepdims=True))

  p = log_p(teacher, table)
  q = log_p(student, table if own is None else own)
  return (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize('cap', [None, 3.0])
def test_whole_vocabulary_is_exact(cap):
  table, teacher, student = _draw()
  found = _distill.kl(student, teacher, table, table[:0], 1.0, cap)
  np.testing.assert_allclose(
    found, _whole(table, teacher, student, cap), rtol=1e-4, atol=1e-5
  )


def test_student_reads_its_own_table():
  table, teacher, student = _draw()
  noise = np.random.default_rng(1).standard_normal(table.shape)
  own = table + 0.3 * noise.astype(np.float32)
  found = _distill.kl(student, teacher, table, table[:0], 1.0, None, own)
  want = _whole(table, teacher, student, own=own)
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
  assert np.mean(want) > 1.2 * np.mean(_whole(table, teacher, student))


def test_bucket_is_a_lower_bound_and_tight_for_a_good_shortlist():
  table, teacher, student = _draw()
  mass = np.exp(teacher @ table.T)
  mass /= mass.sum(-1, keepdims=True)
  order = np.argsort(-mass.sum(0))
  whole = _whole(table, teacher, student)
  means = []
  for size in (20, 100, 300):
    head, rest = table[order[:size]], table[order[size:]]
    found = np.asarray(_distill.kl(student, teacher, head, rest, 1.0, None))
    assert np.all(found <= whole + 1e-4)
    means.append(found.mean())
  assert means[0] < means[1] < means[2]
  assert means[2] > 0.95 * whole.mean()


def test_mass_that_leaves_the_shortlist_is_paid_for():
  rng = np.random.default_rng(0)
  table = np.zeros((_V, 2), np.float32)
  table[:50, 0] = rng.standard_normal(50)
  table[50:, 1] = 1.0  # Off the shortlist.
  teacher = np.array([[1.0, -5.0]], np.float32)
  student = np.array([[1.0, 5.0]], np.float32)
  draw = rng.choice(np.arange(50, _V), 64, replace=False)
  found = _distill.kl(
    student, teacher, table[:50], table[draw], (_V - 50) / 64, None
  )
  whole = _whole(table, teacher, student)
  np.testing.assert_allclose(found, whole, rtol=1e-3)
  assert whole[0] > 5
  blind = _distill.kl(student, teacher, table[:50], table[:0], 1.0, None)
  assert float(blind[0]) < 1e-5


def test_sampled_mass_is_near_the_real_one():
  table, teacher, student = _draw()
  order = np.argsort(-np.exp(teacher @ table.T).sum(0))
  head, tail = table[order[:100]], table[order[100:]]
  whole = np.mean(_distill.kl(student, teacher, head, tail, 1.0, None))
  blind = np.mean(_distill.kl(student, teacher, head, tail[:0], 1.0, None))
  rng = np.random.default_rng(1)
  found = []
  for _ in range(30):
    draw = tail[rng.choice(len(tail), 100, replace=False)]
    found.append(np.mean(_distill.kl(student, teacher, head, draw, 3.0, None)))
  assert abs(np.mean(found) / whole - 1) < 0.05
  assert abs(np.mean(found) - whole) < 0.5 * abs(blind - whole)


def test_shortlist_too_small():
  with pytest.raises(errors.ConfigError, match='at least 2'):
    _distill.shortlist(jnp.zeros((4, 2)), None, size=1)  # type: ignore


def _made():
  model = gx_nn.Compressed(
    model=tiny.model('gemma3'),
    recipe=recipe_lib.Recipe.of(
      {
        'layer_0/mlp': recipe_lib.Ternary(group=64),
        'attn': recipe_lib.Int(bits=8, group=64),
        'embedder': recipe_lib.Int(bits=8),
      }
    ),
  )
  dense = tiny.params(model.model)
  return model, dense, compress.compress(model.model, dense, model.recipe)


def test_whole_numbers_of_attention_move_if_asked():
  model, dense, packed = _made()
  moving, fixed = _distill.open_model(
    model, packed, form='latent', dense=dense, integers='attn'
  )
  path = 'layer_0/attn/q_einsum/w'
  assert f'{path}/codes' in moving and f'{path}/codes' not in fixed
  assert not any('embedder' in name for name in moving)
  closed = _distill.close_model(model, moving, fixed)
  jax.tree.map(np.testing.assert_array_equal, closed, packed)
  # A latent is the dense weight, in units of the scale.
  rows = moving[f'{path}/codes'].reshape(-1, 2, 64)
  rows = rows * moving[f'{path}/scale'].reshape(-1, 2, 1)
  site = gx_nn.methods_of(model.model, model.recipe)[path][0]
  want = site.layout.to_rows(_branch.flatten(dense)[path]).reshape(-1, 2, 64)
  # At the ends of the range it stays within reach.
  assert np.mean(np.isclose(rows, want, atol=1e-5)) > 0.98


def test_moved_whole_numbers_are_what_the_loss_saw():
  model, dense, packed = _made()
  moving, fixed = _distill.open_model(
    model, packed, form='latent', dense=dense, integers='attn'
  )
  rng = np.random.default_rng(0)
  moving = {
    k: v + jnp.asarray(rng.normal(size=v.shape), v.dtype)
    if k.endswith('attn/q_einsum/w/codes')
    else v
    for k, v in moving.items()
  }
  tokens = jnp.asarray(rng.integers(3, 500, (2, 12)), jnp.int32)
  table = dense['embedder']['input_embedding']
  batch = {
    'tokens': tokens,
    'teacher': jnp.asarray(rng.normal(size=(2, 12, 128)), jnp.float32),
    'table': table,
    'rest': table[:0],
    'weight': jnp.float32(1),
    'fixed': _distill.unpack(fixed, model=model),
  }
  loss = jax.jit(jax.value_and_grad(_distill.problem(model).loss))
  seen, grads = loss(moving, batch)
  moved = [k for k, g in grads.items() if '/attn/' in k and np.any(g)]
  assert any(k.endswith('q_einsum/w/codes') for k in moved)
  closed = _distill.close_model(model, moving, fixed)
  packed_q = _branch.flatten(closed)['layer_0/attn/q_einsum/w/codes']
  old = _branch.flatten(packed)['layer_0/attn/q_einsum/w/codes']
  assert packed_q.dtype == old.dtype and (packed_q != old).any()
  again, rest = _distill.open_model(model, closed, form='fixed', dense=None)
  batch['fixed'] = _distill.unpack(rest, model=model)
  np.testing.assert_allclose(loss(again, batch)[0], seen, rtol=1e-3)


def test_only_latent_codes_move_whole_numbers():
  with pytest.raises(errors.ConfigError, match='latent codes'):
    train.Distill(integers='attn', optimizer=train.Mezo(form='fixed'))
