# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Official orbax checkpoints: layouts, model classes, bad input."""

import json
import shutil

from gemma import gm
from gemma.gm.ckpts import _checkpoint as gm_checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.ckpts import _assemble
from gemma_ext.ckpts import _model_classes
from gemma_ext.ckpts import _orbax
from tests import tiny


def _equal(a, b):
  return jax.tree.all(
    jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
  )


def _save(params, path):
  gm.ckpts.save_params(params, path, wait_until_finished=True)
  return path


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_nested(tmp_path, family):
  model = tiny.model(family)
  params = tiny.params(model)
  _save(params, tmp_path / 'c')
  got = gx.ckpts.load(tmp_path / 'c', model=model, dtype=jnp.float32)
  assert got.model is model
  assert _equal(params, got.params)
  # On one device, though there are eight.
  leaves = jax.tree.leaves(got.params)
  assert all(len(x.devices()) == 1 for x in leaves)


def test_flat(tmp_path):
  model = tiny.model('gemma3')
  params = tiny.params(model)
  flat = gm_checkpoint._nested_to_flat(params)
  assert 'transformer/layer_0/mlp/linear' in flat
  _save(flat, tmp_path / 'c')
  got = gx.ckpts.load(tmp_path / 'c', model=model, dtype=jnp.float32)
  assert _equal(params, got.params)


def test_stacked(tmp_path):
  model = tiny.model('gemma4_e2b')
  # Layers that are stacked have one shape.
  params = tiny.params(model)
  params = {
    k: params[k] for k in ('embedder', 'final_norm', 'layer_0', 'layer_1')
  }
  stacked = gm_checkpoint._nested_to_stacked(params, 1 + 1)
  assert any('stacked_layers' in k for k in stacked)
  _save(stacked, tmp_path / 'c')
  tree = _orbax._nested_shapes(tmp_path / 'c')
  assert _orbax.flat_shapes(tree) == _orbax.flat_shapes(params)


def test_dtype(tmp_path):
  model = tiny.model('gemma2')
  params = tiny.params(model)
  _save(params, tmp_path / 'c')
  got = gx.ckpts.load(tmp_path / 'c', model=model).params
  expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  assert _equal(expected, got)


def test_vision_is_left_out(tmp_path):
  model = tiny.model('gemma3')
  params = tiny.params(model)
  stored = params | {
    'vision_encoder': {'w': jnp.ones((4, 4))},
    'embedder': params['embedder']
    | {
      'mm_input_projection': {'w': jnp.ones((4, 128))},
      'mm_soft_embedding_norm': {'scale': jnp.ones((4,))},
    },
  }
  _save(stored, tmp_path / 'c')
  got = gx.ckpts.load(tmp_path / 'c', model=model, dtype=jnp.float32)
  assert _equal(params, got.params)


@pytest.mark.parametrize(
  'cls',
  [
    gm.nn.Gemma2_2B,
    gm.nn.Gemma3_270M,
    gm.nn.Gemma3_4B,
    gm.nn.Gemma3n_E2B,
    gm.nn.Gemma4_26B_A4B,
    gm.nn.Gemma4_E4B,
  ],
)
def test_official_classes_are_told_from_shapes(cls):
  config = _model_classes.text_config(cls)
  model = _model_classes.build(cls, config, jnp.bfloat16)
  tree = _assemble.expected_params(model)
  assert type(_orbax.infer_model(tree)) is cls


def test_official_size_needs_no_model(tmp_path, monkeypatch):
  model = tiny.model('gemma3')
  params = tiny.params(model)
  _save(params, tmp_path / 'c')
  family = _model_classes.FAMILIES['gemma3']
  monkeypatch.setitem(
    _model_classes.FAMILIES,
    'gemma3',
    type(family)(**vars(family) | {'official': (tiny.TinyGemma3,)}),
  )
  got = gx.ckpts.load(tmp_path / 'c', dtype=jnp.float32)
  assert type(got.model) is tiny.TinyGemma3
  assert _equal(params, got.params)


def test_other_sizes_ask_for_the_model(tmp_path):
  model = tiny.model('gemma2')
  _save(tiny.params(model), tmp_path / 'c')
  with pytest.raises(errors.UnsupportedTypeError, match='model='):
    gx.ckpts.load(tmp_path / 'c')


@pytest.mark.parametrize('beside', [False, True])
def test_tokenizer_file(tmp_path, beside):
  model = tiny.model('gemma3')
  _save(tiny.params(model), tmp_path / 'c')
  assert gx.ckpts.load(tmp_path / 'c', model=model).tokenizer is None
  folder = tmp_path if beside else tmp_path / 'c'
  (folder / 'tokenizer.model').write_bytes(tiny.tokenizer_model())
  tokenizer = gx.ckpts.load(tmp_path / 'c', model=model).tokenizer
  assert tokenizer.path == str(folder / 'tokenizer.model')


# --------------------------------- bad input ---------------------------------


@pytest.fixture(name='stored', scope='module')
def _stored(tmp_path_factory):
  model = tiny.model('gemma3')
  return _save(tiny.params(model), tmp_path_factory.mktemp('orbax') / 'c')


@pytest.mark.parametrize(
  'family, error',
  [
    ('gemma2', errors.UnexpectedTensorError),
    ('gemma4', errors.MissingTensorError),
  ],
)
def test_model_of_another_family(stored, family, error):
  with pytest.raises(error):
    gx.ckpts.load(stored, model=tiny.model(family))


def test_unexpected_parameters(tmp_path):
  model = tiny.model('gemma3')
  _save(tiny.params(model) | {'lora': {'a': jnp.ones(3)}}, tmp_path / 'c')
  with pytest.raises(errors.UnexpectedTensorError, match='lora/a'):
    gx.ckpts.load(tmp_path / 'c', model=model)


def test_wrong_shape(tmp_path):
  model = tiny.model('gemma3')
  params = tiny.params(model)
  params['final_norm']['scale'] = jnp.ones(7)
  _save(params, tmp_path / 'c')
  with pytest.raises(errors.TensorShapeError, match='final_norm/scale'):
    gx.ckpts.load(tmp_path / 'c', model=model)


def test_not_gemma_parameters(tmp_path):
  _save({'dense': {'kernel': jnp.ones((2, 2))}}, tmp_path / 'c')
  with pytest.raises(errors.HeaderError, match='dense'):
    gx.ckpts.load(tmp_path / 'c')


@pytest.mark.parametrize('text', ['', '{}', '[]', 'x', '{"tree_metadata": 3}'])
def test_metadata_malformed(tmp_path, stored, text):
  path = tmp_path / 'c'
  shutil.copytree(stored, path)
  (path / '_METADATA').write_text(text)
  with pytest.raises(errors.CheckpointError):
    gx.ckpts.load(path, model=tiny.model('gemma3'))


def test_data_missing(tmp_path, stored):
  path = tmp_path / 'c'
  shutil.copytree(stored, path)
  for folder in (path / 'd', path / 'ocdbt.process_0'):
    shutil.rmtree(folder)
  with pytest.raises(errors.CheckpointError):
    gx.ckpts.load(path, model=tiny.model('gemma3'))


def test_data_cut_off(tmp_path, stored):
  path = tmp_path / 'c'
  shutil.copytree(stored, path)
  largest = max(path.rglob('*'), key=lambda p: p.is_file() and p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:1000])
  with pytest.raises(errors.TruncatedFileError):
    gx.ckpts.load(path, model=tiny.model('gemma3'))


def test_metadata_only_marker(tmp_path):
  (tmp_path / '_METADATA').write_text(json.dumps({}))
  with pytest.raises(errors.HeaderError):
    gx.ckpts.load(tmp_path)


def test_shapes_of_numpy_and_jax_trees_are_alike():
  tree = {'embedder': {'input_embedding': np.zeros((2, 3))}}
  assert _orbax.flat_shapes(tree) == {'embedder/input_embedding': (2, 3)}
