# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of tables in the order of what their rows cost, and centered."""

from flax import traverse_util
from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.train import _distill
from tests import tiny

_TABLE = 'embedder/input_embedding'
_ROWS = gx.recipe.Rows(
  bands=(
    (64, gx.Int(bits=8, group=64)),
    (192, gx.Int(bits=4, group=32)),
    (None, gx.Ternary(group=64)),
  ),
  ordered=True,
  centered=True,
)


@pytest.fixture(scope='module')
def case():
  model = tiny.model('gemma3')
  dense = tiny.params(model)
  rng = np.random.default_rng(0)
  # Some tokens come often; their numbers are all over the vocabulary.
  often = rng.permutation(np.arange(3, tiny.VOCAB_SIZE))[:40]
  tokens = rng.choice(often, (4, 32)).astype(np.int32)
  statistics = gx.compress.statistics(model, dense, tokens)
  recipe = gx.Recipe.of({_TABLE: _ROWS})
  params = gx.compress(model, dense, recipe, calibration=statistics)
  return gx.nn.Compressed(model=model, recipe=recipe), params, dense, statistics


def test_dear_rows_are_first_and_nearest(case):
  model, params, dense, statistics = case
  leaf = params['embedder']['input_embedding']
  rank = np.asarray(leaf['rank'])
  assert rank.dtype == np.int32
  cost = statistics.importance(_TABLE)
  order = np.argsort(rank)
  assert np.all(np.diff(cost[order]) <= 0)
  unpacked = _distill.unpack(
    traverse_util.flatten_dict(params, sep='/'), model=model
  )
  table = np.asarray(dense['embedder']['input_embedding'], np.float32)
  error = np.abs(np.asarray(unpacked[_TABLE], np.float32) - table).max(axis=1)
  eight, four, ternary = np.split(error[order], [64, 192])
  assert eight.max() < four.max() < ternary.max()
  assert np.median(eight) < 0.2 * np.median(four)
  assert np.median(four) < 0.5 * np.median(ternary)


def test_equals_a_dense_table_of_the_same_numbers(case):
  model, params, _, _ = case
  unpacked = _distill.unpack(
    traverse_util.flatten_dict(params, sep='/'), model=model
  )
  dense = traverse_util.unflatten_dict(unpacked, sep='/')
  tokens = jnp.asarray(
    np.random.default_rng(1).integers(0, tiny.VOCAB_SIZE, (2, 24))
  )
  apply = lambda model, params: model.apply({'params': params}, tokens).logits
  np.testing.assert_allclose(
    apply(model, params), apply(model.model, dense), atol=1e-4, rtol=1e-4
  )


def test_tokens_for_calibration_will_do(case):
  model, params, dense, _ = case
  tokens = np.random.default_rng(0).integers(3, 100, (2, 16))
  got = gx.compress(model.model, dense, model.recipe, calibration=tokens)
  assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, params)
  with pytest.raises(errors.RecipeError, match='pass calibration'):
    gx.compress(model.model, dense, model.recipe)


def test_saved_and_loaded(case, tmp_path):
  model, params, _, _ = case
  gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  loaded = gx.ckpts.load(tmp_path / 'c', dtype=jnp.float32)
  assert loaded.recipe == model.recipe and loaded.recipe.rules[0][1].ordered
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
  plan = gx.plan(model.model, model.recipe)
  assert plan.nbytes == sum(x.nbytes for x in jax.tree.leaves(params))
  dense = gx.plan(model.model, gx.Recipe(rules=()))
  sizes = gx.evals.weight_sizes(loaded.model, loaded.params)
  assert sizes.num_weights == plan.num_weights == dense.num_weights


def test_a_place_that_two_rows_have(case, tmp_path):
  model, params, _, _ = case
  table = params['embedder']['input_embedding']
  broken = {**table, 'rank': table['rank'].at[3].set(table['rank'][4])}
  params = {**params, 'embedder': {'input_embedding': broken}}
  gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  with pytest.raises(errors.ParamsMismatchError, match='each once'):
    gx.ckpts.load(tmp_path / 'c')
  short = {**table, 'rank': table['rank'][:-1]}
  params = {**params, 'embedder': {'input_embedding': short}}
  with pytest.raises(errors.ParamsMismatchError, match=r'int32\[512\]'):
    model.apply({'params': params}, jnp.array([[1]]))


def test_it_streams_as_the_sampler_does(case):
  model, params, _, _ = case
  tokenizer = tiny.tokenizer(model.INFO.tokenizer_version)
  stream = gx.text.stream((model, params, tokenizer), 'A', max_new_tokens=4)
  list(stream)
  assert len(stream.tokens) == 4


def test_drafts_cannot_take_first_rows(case):
  model, params, _, _ = case
  with pytest.raises(errors.ShapeError, match='order of their own'):
    gx.nn.part(model, params, head_rows=100)


def test_parts_and_recipes_keep_the_order(case):
  model, _, _, _ = case
  methods = gx.nn.methods_of(model.model, model.recipe)
  assert gx.nn.join(methods)[_TABLE] == _ROWS
  assert gx.Recipe.from_json(model.recipe.to_json()) == model.recipe
  with pytest.raises(errors.RecipeError, match='ordered must be'):
    gx.recipe.Rows(bands=_ROWS.bands, ordered=1)
  with pytest.raises(errors.RecipeError, match='centered must be'):
    gx.recipe.Rows(bands=_ROWS.bands, centered=1)


def test_what_all_rows_share_takes_no_range():
  model = tiny.model('gemma3')
  dense = tiny.params(model)
  table = dense['embedder']['input_embedding']
  common = jnp.zeros(table.shape[1]).at[jnp.array([3, 40])].set(0.5)
  dense = {**dense, 'embedder': {'input_embedding': table + common}}
  int4 = gx.Int(bits=4, group=32)

  def error(**kwargs):
    rows = gx.recipe.Rows(bands=((None, int4),), **kwargs)
    recipe = gx.Recipe.of({_TABLE: rows})
    params = gx.compress(model, dense, recipe)
    unpacked = _distill.unpack(
      traverse_util.flatten_dict(params, sep='/'),
      model=gx.nn.Compressed(model=model, recipe=recipe),
    )
    return float(jnp.mean((unpacked[_TABLE] - table - common) ** 2))

  assert error(centered=True) < 0.3 * error()


def test_the_mean_keeps_its_type_when_others_are_cast(case, tmp_path):
  model, params, _, _ = case
  gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  loaded = gx.ckpts.load(tmp_path / 'c', dtype=jnp.bfloat16)
  mean = loaded.params['embedder']['input_embedding']['mean']
  assert mean.dtype == jnp.float32
  assert loaded.params['final_norm']['scale'].dtype == jnp.bfloat16
  logits = loaded.model.apply(
    {'params': loaded.params}, jnp.array([[2, 5]])
  ).logits
  assert jnp.isfinite(logits).all()


def test_what_is_cast_writes_under_both_samplers(case, tmp_path):
  # The first of the parameters is the mean, which is not of the type of keys.
  model, params, _, _ = case
  gx.ckpts.save(
    tmp_path / 'c', model=model, params=params, tokenizer=tiny.tokenizer(3)
  )
  loaded = gx.ckpts.load(tmp_path / 'c', dtype=jnp.bfloat16)
  assert loaded.model.dtype == jnp.bfloat16
  sampler = gm.text.Sampler(
    model=loaded.model,
    params=loaded.params,
    tokenizer=loaded.tokenizer,
    cache_length=64,
    pad_length=8,
    max_out_length=8,
  )
  official = sampler.sample('A', max_new_tokens=4)
  text = ''.join(gx.text.stream(loaded, 'A', max_new_tokens=4))
  assert text == official
