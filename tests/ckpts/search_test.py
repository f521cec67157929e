# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names on the search path: own folders, Hugging Face and Kaggle caches."""

import os

import pytest

from gemma_ext import errors
from gemma_ext.ckpts import _search


@pytest.fixture(name='home')
def _home(tmp_path, monkeypatch):
  for name in (
    'GEMMA_EXT_MODELS',
    'HF_HUB_CACHE',
    'HF_HOME',
    'XDG_CACHE_HOME',
    'KAGGLEHUB_CACHE',
  ):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('HOME', str(tmp_path))
  return tmp_path


def _snapshot(hub, repo, revision, *, main=None):
  path = hub / f'models--{repo.replace("/", "--")}' / 'snapshots' / revision
  path.mkdir(parents=True)
  if main is not None:
    refs = path.parents[1] / 'refs'
    refs.mkdir(exist_ok=True)
    (refs / 'main').write_text(main)
  return path


def test_own_folder_by_name_and_suffix(home, monkeypatch):
  folder = home / 'a'
  folder.mkdir()
  (folder / 'x.gguf').touch()
  (folder / 'y').mkdir()
  monkeypatch.setenv('GEMMA_EXT_MODELS', f'{home}/none{os.pathsep}~/a')
  assert _search.find('x') == folder / 'x.gguf'
  assert _search.find('x.gguf') == folder / 'x.gguf'
  assert _search.find('y') == folder / 'y'


def test_first_folder_wins(home, monkeypatch):
  for name in 'ab':
    (home / name / 'x').mkdir(parents=True)
  monkeypatch.setenv('GEMMA_EXT_MODELS', f'{home}/b{os.pathsep}{home}/a')
  assert _search.find('x') == home / 'b' / 'x'


def test_hugging_face_follows_refs_main(home):
  hub = home / '.cache' / 'huggingface' / 'hub'
  old = _snapshot(hub, 'google/gemma-3-1b-it', 'aaa', main='aaa')
  _snapshot(hub, 'google/gemma-3-1b-it', 'bbb')
  assert _search.find('google/gemma-3-1b-it') == old
  assert _search.find('gemma-3-1b-it') == old


def test_hugging_face_without_refs_takes_the_newest(home):
  hub = home / '.cache' / 'huggingface' / 'hub'
  old = _snapshot(hub, 'o/m', 'aaa')
  new = _snapshot(hub, 'o/m', 'bbb')
  os.utime(old, (1, 1))
  assert _search.find('o/m') == new


@pytest.mark.parametrize('ref', ['../../../../../etc', '/etc', '', 'zzz'])
def test_a_ref_cannot_point_elsewhere(home, ref):
  hub = home / '.cache' / 'huggingface' / 'hub'
  only = _snapshot(hub, 'o/m', 'aaa', main=ref)
  assert _search.find('o/m') == only


def test_google_before_others(home):
  hub = home / '.cache' / 'huggingface' / 'hub'
  _snapshot(hub, 'aaa/m', 'x')
  google = _snapshot(hub, 'google/m', 'x')
  assert _search.find('m') == google


@pytest.mark.parametrize(
  'variable, below',
  [
    ('HF_HUB_CACHE', '.'),
    ('HF_HOME', 'hub'),
    ('XDG_CACHE_HOME', 'huggingface/hub'),
  ],
)
def test_hugging_face_variables(home, monkeypatch, variable, below):
  monkeypatch.setenv(variable, str(home / 'else'))
  path = _snapshot(home / 'else' / below, 'o/m', 'aaa')
  assert _search.find('o/m').samefile(path)


def _kaggle(root, *parts):
  path = root.joinpath('models', *parts)
  path.mkdir(parents=True)
  return path


@pytest.mark.parametrize(
  'name',
  [
    'gemma3-1b-it',
    'gemma-3/flax/gemma3-1b-it',
    'google/gemma-3/flax/gemma3-1b-it',
  ],
)
def test_kaggle_highest_version(home, monkeypatch, name):
  monkeypatch.setenv('KAGGLEHUB_CACHE', str(home / 'k'))
  for version in ('2', '10', 'notes'):
    _kaggle(home / 'k', 'google', 'gemma-3', 'flax', 'gemma3-1b-it', version)
  found = _search.find(name)
  assert found.parts[-2:] == ('gemma3-1b-it', '10')


def test_kaggle_flax_before_others(home):
  root = home / '.cache' / 'kagglehub'
  _kaggle(root, 'google', 'm', 'gguf', 'v', '1')
  flax = _kaggle(root, 'google', 'm', 'Flax', 'v', '1')
  assert _search.find('v') == flax


def test_names(home):
  _kaggle(home / '.cache' / 'kagglehub', 'google', 'm', 'flax', 'v', '1')
  assert _search.names() == ['google/m/flax/v', 'm/flax/v', 'v']


def test_not_found_says_where_it_looked(home, monkeypatch):
  (home / 'a' / 'gemma-mine').mkdir(parents=True)
  monkeypatch.setenv('GEMMA_EXT_MODELS', f'{home}/a{os.pathsep}{home}/none')
  with pytest.raises(errors.CheckpointNotFoundError) as e:
    _search.find('Gemma-Mime')
  text = str(e.value)
  assert f'{home}/a\n' in text
  assert f'{home}/none (no such folder)' in text
  assert f'{home}/.cache/huggingface/hub' in text
  assert f'{home}/.cache/kagglehub/models' in text
  assert "'gemma-mine'" in text
  assert isinstance(e.value, FileNotFoundError)
