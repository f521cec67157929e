# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Our own directories: round trips, sizes, and every way to be refused."""

import dataclasses
import json
import os
import shutil

from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np
from orbax import checkpoint as ocp
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_proto

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.ckpts import _assemble
from gemma_ext.ckpts import _compressed
from gemma_ext.ckpts import _manifest
from gemma_ext.ckpts import _save
from tests import tiny

_RECIPE = gx.Recipe.of(
  {
    r'layer_\d+/mlp2?': gx.Ternary(group=64),
    'embedder/input_embedding': gx.Int(bits=8),
    r'layer_0/attn': gx.Int(bits=4, group=32),
  }
)


def _packed(model, seed=0, codes=None):
  """Random parameters in the shapes of a compressed model."""
  rng = np.random.default_rng(seed)

  def draw(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      values = rng.standard_normal(leaf.shape)
    elif codes is not None:
      values = np.full(leaf.shape, codes)
    else:
      values = rng.integers(0, 100, leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  return jax.tree.map(draw, _assemble.expected_params(model))


def _compressed_model(family='gemma3'):
  return gx.nn.Compressed(model=tiny.model(family), recipe=_RECIPE)


def _equal(a, b):
  return jax.tree.all(
    jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
  )


# -------------------------------- right values -------------------------------


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
  assert _equal(params, got.params)
  assert got.recipe is None
  assert got.model.config == model.config
  assert type(got.tokenizer) is type(tiny.tokenizer(version))
  assert got.tokenizer.path == str(tmp_path / 'c' / 'tokenizer.model')


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_compressed_round_trip(tmp_path, family):
  model = _compressed_model(family)
  params = _packed(model)
  gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  got = gx.ckpts.load(tmp_path / 'c', dtype=jnp.float32)
  assert isinstance(got.model, gx.nn.Compressed)
  assert got.recipe == _RECIPE
  assert _equal(params, got.params)


def test_loaded_model_computes_what_the_saved_one_did(tmp_path):
  model = _compressed_model()
  params = _packed(model)
  gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  got = gx.ckpts.load(tmp_path / 'c', dtype=jnp.float32)
  tokens = jnp.arange(1, 13)[None]
  expected = model.apply({'params': params}, tokens).logits
  logits = got.model.apply({'params': got.params}, tokens).logits
  np.testing.assert_array_equal(logits, expected)


def test_dense_model_and_recipe_apart(tmp_path):
  params = _packed(_compressed_model())
  gx.ckpts.save(
    tmp_path / 'c', model=tiny.model('gemma3'), params=params, recipe=_RECIPE
  )
  assert gx.ckpts.load(tmp_path / 'c').recipe == _RECIPE


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
  model = _compressed_model()
  gx.ckpts.save(tmp_path / 'c', model=model, params=_packed(model))
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
    assert _equal(params, checkpointer.restore(path / 'params'))
  assert _equal(params, gm.ckpts.load_params(path / 'params'))


@pytest.mark.parametrize('codes', [None, 0])
def test_size_is_that_of_the_leaves_whatever_the_values(tmp_path, codes):
  config = dataclasses.replace(tiny.TinyGemma3.config, num_embed=150_000)
  model = tiny.TinyGemma3(config=config, dtype=jnp.bfloat16)
  model = gx.nn.Compressed(model=model, recipe=_RECIPE)
  params = _packed(model, codes=codes)
  path = gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  nbytes = sum(x.nbytes for x in jax.tree.leaves(params))
  assert nbytes > 19_000_000
  sizes = gx.ckpts.directory_bytes(path)
  assert nbytes <= sizes['params'] <= sizes['total'] <= 1.01 * nbytes
  assert sizes['tokenizer'] == 0


def test_directory_bytes(tmp_path):
  model = tiny.model('gemma3')
  path = gx.ckpts.save(
    tmp_path / 'c',
    model=model,
    params=tiny.params(model),
    tokenizer=tiny.tokenizer(3),
  )
  sizes = gx.ckpts.directory_bytes(path)
  assert sizes['tokenizer'] == len(tiny.tokenizer_model())
  manifest = (path / 'recipe.json').stat().st_size
  assert sizes['total'] == sizes['params'] + sizes['tokenizer'] + manifest
  with pytest.raises(errors.UnknownFormatError):
    gx.ckpts.directory_bytes(tmp_path)


# ----------------------------------- saving ----------------------------------


@pytest.fixture(name='stored', scope='module')
def _stored(tmp_path_factory):
  model = _compressed_model()
  return gx.ckpts.save(
    tmp_path_factory.mktemp('own') / 'c',
    model=model,
    params=_packed(model),
    tokenizer=tiny.tokenizer(3),
  )


@pytest.fixture(name='copy')
def _copy(tmp_path, stored):
  shutil.copytree(stored, tmp_path / 'c')
  return tmp_path / 'c'


def _save_dense(path, **kwargs):
  model = tiny.model('gemma3')
  return gx.ckpts.save(path, model=model, params=tiny.params(model), **kwargs)


def test_existing_directory_needs_overwrite(copy):
  with pytest.raises(errors.CheckpointExistsError, match='overwrite=True'):
    _save_dense(copy)
  assert gx.ckpts.load(copy).recipe == _RECIPE
  _save_dense(copy, overwrite=True)
  assert gx.ckpts.load(copy).recipe is None
  assert os.listdir(copy.parent) == ['c']


@pytest.mark.parametrize('kind', ['empty', 'full', 'file', 'foreign_json'])
def test_never_overwrites_what_is_not_ours(tmp_path, kind):
  path = tmp_path / 'c'
  if kind == 'file':
    path.write_text('mine')
  else:
    path.mkdir()
  if kind == 'full':
    (path / 'notes').touch()
  elif kind == 'foreign_json':
    (path / 'recipe.json').write_text('{"pancakes": 3}')
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(errors.CheckpointExistsError):
    _save_dense(path, overwrite=True)
  assert sorted(tmp_path.rglob('*')) == before


def test_symlink_is_not_replaced(copy):
  link = copy.parent / 'link'
  link.symlink_to(copy)
  with pytest.raises(errors.CheckpointExistsError):
    _save_dense(link, overwrite=True)


@pytest.mark.parametrize('overwrite', [False, True])
def test_a_save_that_fails_leaves_nothing(copy, monkeypatch, overwrite):
  def fail(*_):
    raise OSError('disk full')

  monkeypatch.setattr(_save._manifest, 'write', fail)
  target = copy if overwrite else copy.with_name('new')
  with pytest.raises(OSError, match='disk full'):
    _save_dense(target, overwrite=overwrite)
  assert os.listdir(copy.parent) == ['c']
  assert gx.ckpts.load(copy).recipe == _RECIPE


def test_remote_path():
  with pytest.raises(errors.UnsupportedTypeError, match='local'):
    _save_dense('gs://bucket/x')


def test_saving_other_parameters(tmp_path):
  model = _compressed_model()
  with pytest.raises(errors.ParamsMismatchError):
    gx.ckpts.save(
      tmp_path / 'c', model=model, params=tiny.params(tiny.model('gemma3'))
    )
  assert not (tmp_path / 'c').exists()


def test_saving_with_another_recipe(tmp_path):
  model = _compressed_model()
  with pytest.raises(errors.ParamsMismatchError, match='another recipe'):
    gx.ckpts.save(
      tmp_path / 'c',
      model=model,
      params=_packed(model),
      recipe=gx.Recipe.of('int8'),
    )


def test_saving_nothing(tmp_path):
  with pytest.raises(errors.ParamsMismatchError, match='Nothing'):
    gx.ckpts.save(tmp_path / 'c')


def test_saving_nan(tmp_path):
  model = _compressed_model()
  params = _packed(model)
  scale = params['embedder']['input_embedding']['scale']
  params['embedder']['input_embedding']['scale'] = scale.at[3].set(jnp.nan)
  with pytest.raises(errors.NonFiniteError, match='input_embedding/scale'):
    gx.ckpts.save(tmp_path / 'c', model=model, params=params)


def test_saving_metadata_that_is_not_json(tmp_path):
  with pytest.raises(errors.CheckpointError, match='JSON'):
    _save_dense(tmp_path / 'c', metadata={'f': print})


def test_saving_a_missing_tokenizer(tmp_path):
  tokenizer = gm.text.Gemma3Tokenizer(path=str(tmp_path / 'none'))
  with pytest.raises(errors.TokenizerError):
    _save_dense(tmp_path / 'c', tokenizer=tokenizer)
  assert not (tmp_path / 'c').exists()


# --------------------------------- bad input ---------------------------------


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
  'version_newer': (_put('version', 2), _E),
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
  model = _compressed_model()
  params = _packed(model)
  linear = params['layer_1']['mlp']['linear']
  linear['scale'] = linear['scale'].at[0, 0, 0].set(jnp.inf)
  with monkeypatch.context() as m:
    m.setattr(_compressed, 'check_finite', lambda *_: None)
    gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  with pytest.raises(errors.NonFiniteError, match='layer_1/mlp/linear/scale'):
    gx.ckpts.load(tmp_path / 'c')


def test_tokenizer_changed(copy):
  with open(copy / 'tokenizer.model', 'ab') as f:
    f.write(b'x')
  with pytest.raises(errors.ChecksumError):
    gx.ckpts.load(copy)
