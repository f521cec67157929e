# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Our own directories: every way to be refused."""

import json
import os
import shutil

import jax.numpy as jnp
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.ckpts import _compressed
from gemma_ext.ckpts import _manifest
from tests import tiny
from tests.ckpts import own_fixtures as own


def _edit(path, change):
  file = path / 'recipe.json'
  data = json.loads(file.read_text())
  change(data)
  file.write_text(json.dumps(data))


def _put(*keys_and_value):
  *keys, last, value = keys_and_value

  def change(data):
    for key in keys:
      data = data[key]
    data[last] = value

  return change


def _first_leaf(**changes):
  def change(data):
    next(iter(data['params'].values())).update(changes)

  return change


_LEAF = 'layer_0/mlp/linear/codes'
_E, _P = errors.HeaderError, errors.ParamsMismatchError
_BAD = {
  'version_newer': (_put('version', 3), _E),
  'version_older': (_put('version', 1), _E),
  'version_true': (_put('version', True), _E),
  'key_unknown': (_put('exec', 'rm'), _E),
  'key_missing': (lambda d: d.pop('source'), _E),
  'dtype_unknown': (_put('dtype', 'complex64'), errors.UnsupportedTypeError),
  'source_a_number': (_put('source', 3), _E),
  'metadata_a_list': (_put('metadata', []), _E),
  'model_a_string': (_put('model', 'Gemma3_270M'), _E),
  'model_class_unknown': (
    _put('model', 'class', 'os.system'),
    errors.UnsupportedTypeError,
  ),
  'model_layers_huge': (
    _put('model', 'config', 'attention_types', ['GLOBAL'] * 100_000),
    errors.HeaderTooLargeError,
  ),
  'model_of_another_depth': (
    _put('model', 'config', 'attention_types', ['GLOBAL'] * 2),
    _P,
  ),
  'model_of_another_width': (_put('model', 'config', 'hidden_dim', 512), _P),
  'recipe_a_list': (_put('recipe', []), _E),
  'recipe_version': (_put('recipe', 'version', 9), errors.RecipeError),
  'recipe_method_unknown': (
    _put('recipe', 'rules', 0, 'method', 'eval'),
    errors.RecipeError,
  ),
  'recipe_missing': (_put('recipe', None), _P),
  'recipe_other_group': (_put('recipe', 'rules', 0, 'group', 32), _P),
  'recipe_matches_nothing': (
    _put('recipe', 'rules', 0, 'match', 'no_such'),
    errors.UnmatchedRuleError,
  ),
  'params_empty': (_put('params', {}), _E),
  'params_a_list': (_put('params', []), _E),
  'leaf_missing': (lambda d: d['params'].pop(_LEAF), _P),
  'leaf_unexpected': (
    _put('params', 'x/y', {'shape': [1], 'dtype': 'uint8'}),
    _P,
  ),
  'leaf_without_shape': (_put('params', _LEAF, {'dtype': 'uint8'}), _E),
  'leaf_shape_negative': (_first_leaf(shape=[-1]), _E),
  'leaf_shape_a_string': (_first_leaf(shape='12'), _E),
  'leaf_shape_deep': (_first_leaf(shape=[1] * 9), _E),
  'leaf_shape_huge': (
    _first_leaf(shape=[1 << 50]),
    errors.HeaderTooLargeError,
  ),
  'leaf_larger_than_the_files': (
    _first_leaf(shape=[1 << 30]),
    errors.TruncatedFileError,
  ),
  'leaf_of_object_type': (
    _first_leaf(dtype='object'),
    errors.UnsupportedTypeError,
  ),
  'leaf_of_another_type': (_put('params', _LEAF, 'dtype', 'int8'), _P),
  'tokenizer_a_string': (_put('tokenizer', 'x'), _E),
  'tokenizer_elsewhere': (
    _put('tokenizer', 'file', '../c/tokenizer.model'),
    errors.PathEscapeError,
  ),
  'tokenizer_missing': (
    _put('tokenizer', 'file', 'other.model'),
    errors.MissingTensorError,
  ),
  'tokenizer_hash_malformed': (_put('tokenizer', 'sha256', 'abc'), _E),
  'tokenizer_hash_wrong': (
    _put('tokenizer', 'sha256', '0' * 64),
    errors.ChecksumError,
  ),
  'tokenizer_custom_malformed': (
    _put('tokenizer', 'custom_tokens', {'x': 'y'}),
    _E,
  ),
}


@pytest.mark.parametrize('case', sorted(_BAD))
def test_bad_manifest(copy, monkeypatch, case):
  change, error = _BAD[case]
  _edit(copy, change)
  # All of them are noticed before any parameter is read.
  monkeypatch.setattr(_compressed, '_restore', None)
  with pytest.raises(error) as e:
    gx.ckpts.load(copy)
  assert e.type is error


@pytest.mark.parametrize(
  'text', ['', '[]', '{', '{"format": "gemma_ext", "format": "gemma_ext"}']
)
def test_manifest_not_json(copy, text):
  (copy / 'recipe.json').write_text(text)
  with pytest.raises(errors.HeaderError):
    gx.ckpts.load(copy)


def test_manifest_of_something_else(copy):
  (copy / 'recipe.json').write_text('{"pancakes": 3}')
  with pytest.raises(errors.HeaderError, match="'gemma_ext'"):
    gx.ckpts.load(copy)


def test_manifest_too_large(copy, monkeypatch):
  monkeypatch.setattr(_manifest, 'MAX_BYTES', 100)
  with pytest.raises(errors.HeaderTooLargeError):
    gx.ckpts.load(copy)


def test_params_missing(copy):
  shutil.rmtree(copy / 'params')
  with pytest.raises(errors.MissingTensorError):
    gx.ckpts.load(copy)


def test_params_of_another_checkpoint(tmp_path, copy):
  model = tiny.model('gemma3')
  other = gx.ckpts.save(
    tmp_path / 'other', model=model, params=tiny.params(model)
  )
  shutil.rmtree(copy / 'params')
  shutil.copytree(other / 'params', copy / 'params')
  with pytest.raises(errors.ParamsMismatchError):
    gx.ckpts.load(copy)


def _largest(path):
  files = [p for p in (path / 'params').rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def test_data_cut_off(copy):
  # The second half of what the parameters need.
  for file in (copy / 'params').rglob('*'):
    if file.is_file() and file.stat().st_size > 20_000:
      os.truncate(file, file.stat().st_size // 2)
  with pytest.raises(errors.TruncatedFileError):
    gx.ckpts.load(copy)


def test_data_hidden_by_padding(copy):
  # As many bytes as before, so that only orbax can notice.
  file = _largest(copy)
  size = file.stat().st_size
  os.truncate(file, size // 2)
  (copy / 'params' / 'padding').write_bytes(bytes(size))
  with pytest.raises(errors.TruncatedFileError):
    gx.ckpts.load(copy)


def test_nan_scales_in_the_files(tmp_path, monkeypatch):
  model = own.compressed_model()
  params = own.packed(model)
  linear = params['layer_0']['mlp']['linear']
  linear['scale'] = linear['scale'].at[0, 0, 0].set(jnp.inf)
  with monkeypatch.context() as m:
    m.setattr(_compressed, 'check_finite', lambda *_: None)
    gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  with pytest.raises(errors.NonFiniteError, match='layer_0/mlp/linear/scale'):
    gx.ckpts.load(tmp_path / 'c')


def test_tokenizer_changed(copy):
  with open(copy / 'tokenizer.model', 'ab') as f:
    f.write(b'x')
  with pytest.raises(errors.ChecksumError):
    gx.ckpts.load(copy)
