# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Our own directories: what is never overwritten, and saves that fail."""

import os

from gemma import gm
import jax.numpy as jnp
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.ckpts import _save
from tests import tiny
from tests.ckpts import own_fixtures as own


def _save_dense(path, **kwargs):
  model = tiny.model('gemma3')
  return gx.ckpts.save(path, model=model, params=tiny.params(model), **kwargs)


def test_existing_directory_needs_overwrite(copy):
  with pytest.raises(errors.CheckpointExistsError, match='overwrite=True'):
    _save_dense(copy)
  assert gx.ckpts.load(copy).recipe == own.RECIPE
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
  assert gx.ckpts.load(copy).recipe == own.RECIPE


def test_written_again_where_orbax_keeps_too_much(tmp_path, monkeypatch):
  model = tiny.model('gemma3')
  inner, written = _save._write_params, []

  def write(path, params):
    written.append(path)
    inner(path, params)
    if len(written) == 1:
      (path / 'left').write_bytes(bytes(200_000))

  monkeypatch.setattr(_save, '_write_params', write)
  gx.ckpts.save(tmp_path / 'c', model=model, params=tiny.params(model))
  assert len(written) == 2
  assert not (tmp_path / 'c' / 'params' / 'left').exists()
  gx.ckpts.load(tmp_path / 'c')


def test_remote_path():
  with pytest.raises(errors.UnsupportedTypeError, match='local'):
    _save_dense('gs://bucket/x')


def test_saving_other_parameters(tmp_path):
  model = own.compressed_model()
  with pytest.raises(errors.ParamsMismatchError):
    gx.ckpts.save(
      tmp_path / 'c', model=model, params=tiny.params(tiny.model('gemma3'))
    )
  assert not (tmp_path / 'c').exists()


def test_saving_with_another_recipe(tmp_path):
  model = own.compressed_model()
  with pytest.raises(errors.ParamsMismatchError, match='another recipe'):
    gx.ckpts.save(
      tmp_path / 'c',
      model=model,
      params=own.packed(model),
      recipe=gx.Recipe.of('int8'),
    )


def test_saving_nothing(tmp_path):
  with pytest.raises(errors.ParamsMismatchError, match='Nothing'):
    gx.ckpts.save(tmp_path / 'c')


def test_saving_nan(tmp_path):
  model = own.compressed_model()
  params = own.packed(model)
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
