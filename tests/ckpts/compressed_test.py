# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Our own directories: round trips, dtypes and sizes."""

import dataclasses
import json

from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np
from orbax import checkpoint as ocp
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_proto

import gemma_ext as gx
from gemma_ext import errors
from tests import tiny
from tests.ckpts import own_fixtures as own


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_dense_round_trip(tmp_path, family):
  model = tiny.model(family)
  params = tiny.params(model)
  version = model.INFO.tokenizer_version
  gx.ckpts.save(
    tmp_path / 'c',
    model=model,
    params=params,
    tokenizer=tiny.tokenizer(version),
  )
  got = gx.ckpts.load(tmp_path / 'c', dtype=jnp.float32)
  assert own.equal(params, got.params)
  assert got.recipe is None
  assert got.model.config == model.config
  assert type(got.tokenizer) is type(tiny.tokenizer(version))
  assert got.tokenizer.path == str(tmp_path / 'c' / 'tokenizer.model')


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_compressed_round_trip(tmp_path, family):
  model = own.compressed_model(family)
  params = own.packed(model)
  gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  got = gx.ckpts.load(tmp_path / 'c', dtype=jnp.float32)
  assert isinstance(got.model, gx.nn.Compressed)
  assert got.recipe == own.RECIPE
  assert own.equal(params, got.params)


def test_loaded_model_computes_what_the_saved_one_did(tmp_path):
  model = own.compressed_model()
  params = own.packed(model)
  gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  got = gx.ckpts.load(tmp_path / 'c', dtype=jnp.float32)
  tokens = jnp.arange(1, 13)[None]
  expected = model.apply({'params': params}, tokens).logits
  logits = got.model.apply({'params': got.params}, tokens).logits
  np.testing.assert_array_equal(logits, expected)


def test_dense_model_and_recipe_apart(tmp_path):
  params = own.packed(own.compressed_model())
  gx.ckpts.save(
    tmp_path / 'c', model=tiny.model('gemma3'), params=params, recipe=own.RECIPE
  )
  assert gx.ckpts.load(tmp_path / 'c').recipe == own.RECIPE


def test_checkpoint_metadata_and_source(tmp_path):
  model = tiny.model('gemma3')
  gx.ckpts.save(
    tmp_path / 'a',
    model=model,
    params=tiny.params(model),
    source='here',
    metadata={'perplexity': 14.07},
  )
  first = gx.ckpts.load(tmp_path / 'a')
  assert first.metadata == {'perplexity': 14.07}
  gx.ckpts.save(tmp_path / 'b', first)
  data = json.loads((tmp_path / 'b' / 'recipe.json').read_text())
  assert data['source'] == str(tmp_path / 'a')
  assert data['metadata'] == {'perplexity': 14.07}
  assert data['created_with']['gemma']


def test_dtype_casts_dense_leaves_and_keeps_packed_ones(tmp_path):
  model = own.compressed_model()
  gx.ckpts.save(tmp_path / 'c', model=model, params=own.packed(model))
  params = gx.ckpts.load(tmp_path / 'c', dtype=jnp.bfloat16).params
  assert params['final_norm']['scale'].dtype == jnp.bfloat16
  table = params['embedder']['input_embedding']
  assert table['codes'].dtype == jnp.int8
  assert table['scale'].dtype == jnp.bfloat16


def test_custom_tokens(tmp_path):
  model = tiny.model('gemma3')
  # The tiny vocabulary numbers its unused pieces differently.
  proto = sp_proto.ModelProto()
  proto.ParseFromString(tiny.tokenizer_model())
  for i in range(90):
    proto.pieces[
      gm.text.Gemma3Tokenizer.special_tokens.CUSTOM + i
    ].piece = f'<unused{i}>'
  proto.pieces[5].piece = '[multimodal]'
  proto.trainer_spec.ClearField('user_defined_symbols')
  (tmp_path / 'x.model').write_bytes(proto.SerializeToString())
  tokenizer = gm.text.Gemma3Tokenizer(
    path=str(tmp_path / 'x.model'), custom_tokens={3: '<mine>'}
  )
  gx.ckpts.save(
    tmp_path / 'c',
    model=model,
    params=tiny.params(model),
    tokenizer=tokenizer,
  )
  got = gx.ckpts.load(tmp_path / 'c').tokenizer
  assert got.encode('<mine>') == tokenizer.encode('<mine>')
  assert len(got.encode('<mine>')) == 1


def test_plain_orbax_and_gm_read_it(tmp_path):
  model = tiny.model('gemma3')
  params = tiny.params(model)
  path = gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  with ocp.StandardCheckpointer() as checkpointer:
    assert own.equal(params, checkpointer.restore(path / 'params'))
  assert own.equal(params, gm.ckpts.load_params(path / 'params'))


@pytest.mark.parametrize('codes', [None, 0])
def test_size_is_that_of_the_leaves_whatever_the_values(tmp_path, codes):
  config = dataclasses.replace(tiny.TinyGemma3.config, num_embed=150_000)
  model = tiny.TinyGemma3(config=config, dtype=jnp.bfloat16)
  model = gx.nn.Compressed(model=model, recipe=own.RECIPE)
  params = own.packed(model, codes=codes)
  path = gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  nbytes = sum(x.nbytes for x in jax.tree.leaves(params))
  assert nbytes > 19_000_000
  sizes = gx.ckpts.directory_bytes(path)
  assert nbytes <= sizes['params'] <= sizes['total'] <= 1.01 * nbytes
  assert sizes['tokenizer'] == 0


def test_directory_bytes(tmp_path):
  path = tiny.checkpoint(tmp_path / 'c')
  sizes = gx.ckpts.directory_bytes(path)
  assert sizes['tokenizer'] == len(tiny.tokenizer_model())
  manifest = (path / 'recipe.json').stat().st_size
  assert sizes['total'] == sizes['params'] + sizes['tokenizer'] + manifest
  with pytest.raises(errors.UnknownFormatError):
    gx.ckpts.directory_bytes(tmp_path)
