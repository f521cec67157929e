# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of tables whose bands of rows are packed differently."""

import dataclasses

from flax import traverse_util
from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.nn import _sites
from gemma_ext.train import _distill
from tests import tiny

_INT8, _INT4 = gx.Int(bits=8, group=64), gx.Int(bits=4, group=32)
_TERNARY = gx.Ternary(planes=2, group=64)
_ROWS = gx.recipe.Rows(bands=((100, _INT8), (301, _TERNARY), (None, _INT4)))
_TABLE = 'embedder/input_embedding'


def _packed(family='gemma3', rows=_ROWS, **rules):
  model = tiny.model(family)
  recipe = gx.Recipe.of({_TABLE: rows, **rules})
  dense = tiny.params(model)
  params = gx.compress(model, dense, recipe)
  return gx.nn.Compressed(model=model, recipe=recipe), params, dense


def _bands(dense):
  """The table, each band as if it were packed alone."""
  table = dense['embedder']['input_embedding']
  model = tiny.model('gemma3')
  site = next(s for s in gx.nn.sites(model) if s.path == _TABLE)
  parts = []
  for part, method in gx.nn.split(site, _ROWS):
    rows = table[slice(*part.rows)]
    leaf = gx.compress.compress_weight(rows, part, method)
    fmt = gx.nn.format_of(method, part.layout.cols)
    parts.append(
      gx.kernels.dequantize(leaf, fmt, part.layout.cols, dtype=table.dtype)
    )
  return jnp.concatenate(parts)


def test_equals_a_dense_table_of_the_same_numbers():
  model, params, dense = _packed()
  tokens = jnp.asarray(
    np.random.default_rng(0).integers(0, tiny.VOCAB_SIZE, (2, 24))
  )
  # Both sides of every edge.
  tokens = tokens.at[0, :6].set(jnp.array([0, 99, 100, 300, 301, 511]))
  got = model.apply({'params': params}, tokens).logits
  table = {'input_embedding': _bands(dense)}
  want = (
    tiny.model('gemma3')
    .apply({'params': {**dense, 'embedder': table}}, tokens)
    .logits
  )
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_look_up_is_that_of_an_array():
  _, params, dense = _packed()
  leaf = params['embedder']['input_embedding']
  site = next(s for s in gx.nn.sites(tiny.model('gemma3')) if s.path == _TABLE)
  bands = []
  for i, (part, method) in enumerate(gx.nn.split(site, _ROWS)):
    bands.append(
      gx.nn.PackedWeight(
        leaf=leaf[f'rows_{i}'],
        fmt=gx.nn.format_of(method, part.layout.cols),
        layout=part.layout,
        dtype=jnp.float32,
      )
    )
  table = gx.nn.PackedRows(bands=tuple(bands))
  whole = table.dequantize()
  assert table.shape == whole.shape == (512, 128)
  np.testing.assert_array_equal(whole, _bands(dense))
  for index in (jnp.array([[0, 99], [100, 511]]), jnp.array([-1, -212, 5000])):
    np.testing.assert_array_equal(table[index], whole[index])
    np.testing.assert_array_equal(table[(index,)], whole[index])
  np.testing.assert_array_equal(table[3], whole[3])
  np.testing.assert_array_equal(jnp.asarray(table), whole)
  x = jax.random.normal(jax.random.key(0), (3, 128))
  for eqn in ('...d,vd->...v', 'bd,vd->vb'):
    np.testing.assert_allclose(
      table.einsum(eqn, x), jnp.einsum(eqn, x, whole), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize('family', ['gemma2', 'gemma4'])
def test_other_families_and_the_samplers(family):
  model, params, _ = _packed(family, **{r'layer_\d+/mlp2?': _INT4})
  tokenizer = tiny.tokenizer(model.INFO.tokenizer_version)
  stream = gx.text.stream((model, params, tokenizer), 'A', max_new_tokens=4)
  list(stream)
  assert len(stream.tokens) == 4
  sampler = gm.text.Sampler(
    model=model, params=params, tokenizer=tokenizer, cache_length=512
  )
  assert isinstance(sampler.sample('A', max_new_tokens=3), str)


def test_saved_and_loaded(tmp_path):
  model, params, _ = _packed()
  gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  loaded = gx.ckpts.load(tmp_path / 'c', dtype=jnp.float32)
  assert loaded.recipe == model.recipe
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
  plan = gx.plan(model.model, model.recipe)
  paths = [row.path for row in plan.rows if 'rows_' in row.path]
  assert paths == [f'{_TABLE}/rows_{i}' for i in range(3)]
  nbytes = sum(x.nbytes for x in jax.tree.leaves(params))
  assert plan.nbytes == nbytes
  sizes = gx.evals.weight_sizes(loaded.model, loaded.params)
  assert sizes.weight_bytes == nbytes
  assert sizes.num_weights == plan.num_weights
  assert '[0' not in str(plan) and 'rows_1' in str(plan)


@pytest.mark.parametrize('head_rows', [50, 100, 250, 450])
@pytest.mark.parametrize('planes', [None, 1])
def test_drafts_have_the_first_rows(head_rows, planes):
  model, params, _ = _packed()
  part, part_params = gx.nn.part(
    model, params, head_rows=head_rows, planes=planes
  )
  tokens = jnp.array([[1, 150, 400]])
  got = part.apply({'params': part_params}, tokens).logits
  assert got.shape == (1, 3, head_rows)
  if planes is None:
    want = model.apply({'params': params}, tokens).logits[..., :head_rows]
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_healing_sees_the_whole_table():
  model, params, dense = _packed()
  flat = traverse_util.flatten_dict(params, sep='/')
  unpacked = _distill.unpack(flat, model=model)
  assert set(unpacked) == set(traverse_util.flatten_dict(dense, sep='/'))
  np.testing.assert_allclose(unpacked[_TABLE], _bands(dense), atol=1e-6)


def test_split_and_join_are_inverse():
  model, *_ = _packed(**{'layer_0/mlp': _INT4})
  methods = gx.nn.methods_of(model.model, model.recipe)
  assert [*methods][:1] == [f'{_TABLE}/rows_0'] or f'{_TABLE}/rows_0' in methods
  joined = gx.nn.join(methods)
  assert joined[_TABLE] == _ROWS
  assert joined['layer_0/mlp/linear'] == _INT4
  site = methods[f'{_TABLE}/rows_1'][0]
  assert site.rows == (100, 301) and site.whole == _TABLE
  assert gx.nn.split(site, _INT4) == ((site, _INT4),)


def test_what_has_no_bands_or_too_few_rows_is_an_error():
  model = tiny.model('gemma3')
  with pytest.raises(errors.RecipeError, match='is no table of embeddings'):
    gx.plan(model, {'layer_0/mlp/linear': _ROWS})
  many = gx.recipe.Rows(bands=((512, _INT8), (None, _INT4)))
  with pytest.raises(errors.RecipeError, match='has 512 rows'):
    gx.plan(model, {_TABLE: many})
  packed, params, dense = _packed()
  with pytest.raises(errors.ParamsMismatchError, match="must be \\['rows_0'"):
    packed.apply({'params': dense}, jnp.array([[1]]))
  table = params['embedder']['input_embedding']
  broken = {**table, 'rows_1': table['rows_0']}
  params = {**params, 'embedder': {'input_embedding': broken}}
  with pytest.raises(errors.ParamsMismatchError, match='rows_1'):
    packed.apply({'params': params}, jnp.array([[1]]))


def test_a_site_says_its_rows():
  site = _sites.Site(
    path='t/rows_0',
    layout=_sites.Layout(shape=(4, 8), in_axes=(1,)),
    kind=_sites.Kind.EMBEDDING,
    rows=(0, 4),
  )
  assert site.whole == 't'
  assert dataclasses.replace(site, rows=None).whole == 't/rows_0'
