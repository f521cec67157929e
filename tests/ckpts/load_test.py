# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`load`: the logits of transformers, formats told by content, bad input."""

import json
import os

from gemma import gm
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.ckpts import _load
from gemma_ext.ckpts import _sample
from tests import tiny
from tests.ckpts import hf_fixtures


@pytest.fixture(autouse=True)
def _no_caches(tmp_path, monkeypatch):
  monkeypatch.setenv('GEMMA_EXT_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'hf'))
  monkeypatch.setenv('KAGGLEHUB_CACHE', str(tmp_path / 'kaggle'))
  monkeypatch.delenv('GEMMA_EXT_MODELS', raising=False)


# -------------------------------- right values -------------------------------


@pytest.mark.parametrize('name', hf_fixtures.FAMILIES)
def test_logits_of_transformers(name):
  # Written by tools/fixtures/hf_tiny.py with transformers 5.23 in float32.
  expected = np.load(hf_fixtures.DATA / name / 'expected.npz')
  model, params, _ = gx.ckpts.load(hf_fixtures.DATA / name, dtype=jnp.float32)
  with jax.default_matmul_precision('highest'):
    out = model.apply({'params': params}, jnp.asarray(expected['tokens']))
  # The logits reach 8 to 12.
  np.testing.assert_allclose(out.logits, expected['logits'], atol=3e-4)


def test_bfloat16_is_the_default_and_close():
  expected = np.load(hf_fixtures.DATA / 'gemma3_text' / 'expected.npz')
  model, params, _ = gx.ckpts.load(hf_fixtures.DATA / 'gemma3_text')
  assert model.dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
  out = model.apply({'params': params}, jnp.asarray(expected['tokens'])).logits
  error = np.asarray(out, np.float32) - expected['logits']
  assert np.sqrt(np.mean(error**2)) < 0.1


def test_float8_weights(tmp_path):
  # Weights that float8 holds exactly come through as they are.
  path = hf_fixtures.copy('gemma2', tmp_path)
  file = path / 'model.safetensors'
  header, data = hf_fixtures.unpack(file)
  out, at, values = {}, 0, {}
  chunks = []
  header.pop('__metadata__', None)
  for name, e in sorted(header.items(), key=lambda kv: kv[1]['data_offsets']):
    begin, end = e['data_offsets']
    w = np.frombuffer(data[begin:end], np.float32).reshape(e['shape'])
    w8 = w.astype(ml_dtypes.float8_e4m3fn)
    values[name] = w8.astype(np.float32)
    chunks.append(w8.tobytes())
    out[name] = hf_fixtures.entry(e['shape'], at, at + w8.nbytes, 'F8_E4M3')
    at += w8.nbytes
  file.write_bytes(hf_fixtures.pack(out, b''.join(chunks)))
  params = gx.ckpts.load(path, dtype=jnp.float32).params
  np.testing.assert_array_equal(
    params['layer_1']['mlp']['linear'],
    values['model.layers.1.mlp.down_proj.weight'].T,
  )


def test_a_single_file_with_its_config_beside_it():
  path = hf_fixtures.DATA / 'gemma2'
  one = gx.ckpts.load(path / 'model.safetensors')
  both = gx.ckpts.load(path)
  assert jax.tree.all(
    jax.tree.map(lambda a, b: bool((a == b).all()), one.params, both.params)
  )


def test_tokenizer_of_the_directory(tmp_path):
  path = hf_fixtures.copy('gemma3_text', tmp_path)
  hf_fixtures.edit_json(path / 'config.json', vocab_size=60)
  assert gx.ckpts.load(path).tokenizer is None
  (path / 'tokenizer.model').write_bytes(tiny.tokenizer_model())
  with pytest.raises(errors.TokenizerError, match='60 rows'):
    gx.ckpts.load(path)


# ----------------------------------- paths -----------------------------------


@pytest.fixture(name='own')
def _own(tmp_path):
  model = tiny.model('gemma3')
  return gx.ckpts.save(
    tmp_path / 'models' / 'own', model=model, params=tiny.params(model)
  )


def test_relative_path(own, monkeypatch):
  monkeypatch.chdir(own.parent)
  assert gx.ckpts.load('own').source == str(own)


def test_home_directory(own, monkeypatch):
  monkeypatch.setenv('HOME', str(own.parent))
  assert gx.ckpts.load('~/own').source == str(own)


def test_name_on_the_search_path(own, monkeypatch):
  monkeypatch.setenv('GEMMA_EXT_MODELS', f'/nowhere{os.pathsep}{own.parent}')
  assert gx.ckpts.load('own').source == str(own)


def test_one_level_down_with_the_tokenizer_beside(tmp_path):
  # As Kaggle lays them out.
  model = tiny.model('gemma3')
  gm.ckpts.save_params(
    tiny.params(model), tmp_path / 'k' / 'tiny', wait_until_finished=True
  )
  (tmp_path / 'k' / 'tokenizer.model').write_bytes(tiny.tokenizer_model())
  checkpoint = gx.ckpts.load(tmp_path / 'k', model=model)
  assert checkpoint.tokenizer.encode('the river') == (
    tiny.tokenizer(3).encode('the river')
  )


@pytest.mark.parametrize(
  'name', ['GEMMA3_1B_IT', gm.ckpts.CheckpointPath.GEMMA3_1B_IT]
)
def test_official_names_go_to_orbax(name, monkeypatch):
  seen = []
  monkeypatch.setattr(_load, '_load_orbax', lambda p, o: seen.append(p))
  gx.ckpts.load(name)
  assert seen == ['gs://gemma-data/checkpoints/gemma3-1b-it']


def test_sample_name(own, monkeypatch):
  monkeypatch.setattr(_sample, 'sample_path', lambda: own)
  assert gx.ckpts.load('gemma3-270m').source == str(own)


def test_format_by_content_not_by_name(tmp_path):
  path = hf_fixtures.copy('gemma2', tmp_path)
  (path / 'model.safetensors').rename(path / 'weights.bin')
  checkpoint = gx.ckpts.load(path / 'weights.bin')
  assert checkpoint.model.config.num_layers == 4


# --------------------------------- bad input ---------------------------------


def test_no_such_checkpoint_lists_places_and_near_misses(own, monkeypatch):
  monkeypatch.setenv('GEMMA_EXT_MODELS', str(own.parent))
  with pytest.raises(errors.CheckpointNotFoundError) as e:
    gx.ckpts.load('gemma3-27m')
  text = str(e.value)
  assert str(own.parent) in text
  assert 'Hugging Face cache' in text and 'Kaggle cache' in text
  assert 'gemma3-270m' in text
  with pytest.raises(errors.CheckpointNotFoundError, match="'own'"):
    gx.ckpts.load('owm')


def test_official_name_misspelt():
  with pytest.raises(errors.CheckpointNotFoundError, match='GEMMA3_1B_IT'):
    gx.ckpts.load('gemma3_1b_it')


def test_empty_directory(tmp_path):
  (tmp_path / 'x').mkdir()
  with pytest.raises(errors.UnknownFormatError, match='recipe.json'):
    gx.ckpts.load(tmp_path / 'x')


def test_file_of_another_kind(tmp_path):
  (tmp_path / 'x').write_bytes(b'\x80\x02pickle')
  with pytest.raises(errors.UnknownFormatError, match='x80'):
    gx.ckpts.load(tmp_path / 'x')


@pytest.mark.parametrize(
  'name, error',
  [
    ('x.gguf', errors.CheckpointError),
    ('x.safetensors', errors.MissingTensorError),
  ],
)
def test_empty_file(tmp_path, name, error):
  (tmp_path / name).write_bytes(b'')
  with pytest.raises(error):
    gx.ckpts.load(tmp_path / name)


def test_two_checkpoints_in_one_directory(tmp_path):
  hf_fixtures.copy('gemma2', tmp_path)
  hf_fixtures.copy('gemma3_text', tmp_path)
  with pytest.raises(errors.UnknownFormatError, match='2 checkpoints'):
    gx.ckpts.load(tmp_path)


def test_model_given_where_the_file_says_it():
  with pytest.raises(errors.UnsupportedTypeError, match='leave out'):
    gx.ckpts.load(hf_fixtures.DATA / 'gemma2', model=tiny.model('gemma2'))


def test_config_missing(tmp_path):
  path = hf_fixtures.copy('gemma2', tmp_path)
  (path / 'config.json').unlink()
  with pytest.raises(errors.MissingTensorError, match='config.json'):
    gx.ckpts.load(path / 'model.safetensors')


def test_weights_missing(tmp_path):
  path = hf_fixtures.copy('gemma2', tmp_path)
  (path / 'model.safetensors').unlink()
  with pytest.raises(errors.MissingTensorError):
    gx.ckpts.load(path)


@pytest.mark.parametrize(
  'changes, error',
  [
    ({'intermediate_size': 25}, errors.TensorShapeError),
    ({'vocab_size': 61}, errors.TensorShapeError),
    ({'num_key_value_heads': 1}, errors.TensorShapeError),
    (
      {
        'num_hidden_layers': 5,
        'layer_types': ['full_attention'] * 5,
      },
      errors.MissingTensorError,
    ),
    (
      {
        'num_hidden_layers': 3,
        'layer_types': ['full_attention'] * 3,
      },
      errors.UnexpectedTensorError,
    ),
    (
      {'architectures': ['Gemma3ForCausalLM']},
      errors.MissingTensorError,
    ),
  ],
  ids=str,
)
def test_config_of_another_model(tmp_path, changes, error):
  path = hf_fixtures.copy('gemma2', tmp_path)
  hf_fixtures.edit_json(path / 'config.json', **changes)
  with pytest.raises(error) as e:
    gx.ckpts.load(path)
  assert e.type is error


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_weight_not_finite(tmp_path, value):
  path = hf_fixtures.copy('gemma2', tmp_path)
  file = path / 'model.safetensors'
  header, data = hf_fixtures.unpack(file)
  at = header['model.layers.2.mlp.up_proj.weight']['data_offsets'][0]
  data = data[:at] + np.float32(value).tobytes() + data[at + 4 :]
  file.write_bytes(hf_fixtures.pack(header, data))
  with pytest.raises(errors.NonFiniteError, match='layer_2/up'):
    gx.ckpts.load(path)


def test_same_weight_under_two_names(tmp_path):
  path = hf_fixtures.copy('gemma2', tmp_path)
  file = path / 'model.safetensors'
  header, data = hf_fixtures.unpack(file)
  end = len(data)
  shape = header['model.norm.weight']['shape']
  header['language_model.model.norm.weight'] = hf_fixtures.entry(
    shape, end, end + 4 * shape[0]
  )
  file.write_bytes(hf_fixtures.pack(header, data + bytes(4 * shape[0])))
  with pytest.raises(errors.HeaderError, match='same weight'):
    gx.ckpts.load(path)


def test_adapter_weights_are_not_ignored(tmp_path):
  path = hf_fixtures.copy('gemma2', tmp_path)
  file = path / 'model.safetensors'
  header, data = hf_fixtures.unpack(file)
  end = len(data)
  name = 'model.layers.0.self_attn.q_proj.lora_A.weight'
  header[name] = hf_fixtures.entry([1], end, end + 4)
  file.write_bytes(hf_fixtures.pack(header, data + bytes(4)))
  with pytest.raises(errors.UnexpectedTensorError, match='lora_A'):
    gx.ckpts.load(path)


def test_shapes_are_checked_before_any_weight_is_read(tmp_path, monkeypatch):
  path = hf_fixtures.copy('gemma2', tmp_path)
  config = json.loads((path / 'config.json').read_text())
  hf_fixtures.edit_json(
    path / 'config.json', intermediate_size=config['intermediate_size'] + 1
  )
  monkeypatch.setattr(gx.ckpts._load._safetensors, 'read_rows', None)
  with pytest.raises(errors.TensorShapeError):
    gx.ckpts.load(path)
