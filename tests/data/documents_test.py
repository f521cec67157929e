# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of reading documents from every source."""

import builtins
import gzip
import json

import pytest

from gemma_ext import data
from gemma_ext import errors
from gemma_ext.data import _hashing
from gemma_ext.data import _sources


def _texts(documents):
  return [d.text for d in documents]


def test_a_text_file_is_one_document(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_bytes('\ufeffeins\n\nzwei ä\n'.encode())
  (document,) = data.load_documents(path)
  assert document.text == 'eins\n\nzwei ä\n'
  assert document.id == document.source == str(path)


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a.txt').write_text('at home')
  assert _texts(data.load_documents('~/a.txt')) == ['at home']


def test_folder_is_read_in_order_and_recursively(tmp_path):
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / 'x.txt').write_text('second')
  (tmp_path / 'a.txt').write_text('first')
  (tmp_path / 'blank.txt').write_text(' \n ')
  (tmp_path / 'c.md').write_text('not text')
  documents = data.load_documents(tmp_path)
  assert _texts(documents) == ['first', 'second']


@pytest.mark.parametrize('absolute', [True, False])
def test_pattern(tmp_path, monkeypatch, absolute):
  monkeypatch.chdir(tmp_path)
  for name in ('1.txt', '2.txt', '3.md'):
    (tmp_path / name).write_text(name)
  spec = str(tmp_path / '*.txt') if absolute else '*.txt'
  assert _texts(data.load_documents(spec)) == ['1.txt', '2.txt']
  assert _texts(data.load_documents(spec, max_documents=1)) == ['1.txt']


@pytest.mark.parametrize('opener', [open, gzip.open])
def test_json_lines(tmp_path, opener):
  path = tmp_path / ('a.jsonl' if opener is open else 'a.jsonl.gz')
  rows = [{'passage': 'one', 'n': 1}, {'passage': ' '}, {'passage': 'two'}]
  with opener(path, 'wt') as f:
    f.write('\n'.join(json.dumps(r) for r in rows) + '\n\n')
  documents = data.load_documents(path, text_field='passage')
  assert _texts(documents) == ['one', 'two']
  assert [d.id for d in documents] == [f'{path}:1', f'{path}:3']


@pytest.mark.parametrize(
  'line, message',
  [
    ('{"text": "cut', ':2: not JSON'),
    ('[1]', ':2: expected a JSON object, got list'),
    ('{"body": "x"}', r":2: no field 'text', the fields are \['body'\]"),
    ('{"text": 3}', ":2: field 'text' must be a string, got int"),
    ('[' * 100_000, ':2: not JSON'),
  ],
)
def test_bad_json_line_is_named(tmp_path, line, message):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "fine"}\n' + line + '\n')
  with pytest.raises(errors.DataError, match=message):
    data.load_documents(path)


def test_json_line_too_long(tmp_path, monkeypatch):
  monkeypatch.setattr(_sources, 'MAX_LINE_BYTES', 100)
  path = tmp_path / 'a.jsonl'
  path.write_text(json.dumps({'text': 'x' * 200}))
  with pytest.raises(errors.DataError, match=':1: the line is over'):
    data.load_documents(path)


def test_damaged_gzip(tmp_path):
  path = tmp_path / 'a.jsonl.gz'
  whole = gzip.compress(b'{"text": "' + bytes(range(97, 122)) * 99 + b'"}')
  path.write_bytes(whole[:-12])
  with pytest.raises(errors.DataError, match='Cannot read'):
    data.load_documents(path)


def test_text_too_large(tmp_path, monkeypatch):
  monkeypatch.setattr(_sources, 'MAX_TEXT_BYTES', 10)
  (tmp_path / 'a.txt').write_text('x' * 11)
  with pytest.raises(errors.DataError, match='too large'):
    data.load_documents(tmp_path / 'a.txt')


def test_not_utf8(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'ok \xff')
  with pytest.raises(errors.DataError, match='not UTF-8.* at byte 3'):
    data.load_documents(tmp_path / 'a.txt')


def test_unreadable_file(tmp_path, monkeypatch):
  (tmp_path / 'a.txt').write_text('x')

  def refuse(*args, **kwargs):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr('pathlib.Path.open', refuse)
  with pytest.raises(errors.DataError, match='Permission denied'):
    data.load_documents(tmp_path / 'a.txt')


@pytest.mark.parametrize(
  'spec, message',
  [
    ('missing.txt', "'tfds:NAME' or 'sample'"),
    ('*.nothing', 'No file matches'),
    ('.', 'No .txt file under'),
  ],
)
def test_nothing_there(tmp_path, monkeypatch, spec, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.DataError, match=message):
    data.load_documents(spec)


def test_only_blank_text(tmp_path):
  (tmp_path / 'a.txt').write_text('\n')
  with pytest.raises(errors.DataError, match='holds no text'):
    data.load_documents(tmp_path / 'a.txt')


def test_max_documents_below_one():
  with pytest.raises(errors.DataError, match='at least 1, got 0'):
    data.load_documents('sample', max_documents=0)


def test_sample_is_prose():
  documents = data.load_documents('sample')
  assert len(documents) == 95
  assert len({d.sha256 for d in documents}) == 95
  assert 2_400_000 < sum(len(d.text) for d in documents) < 2_600_000
  first = documents[0]
  assert first.id == 'Anarchism'
  assert first.text.startswith(
    'Anarchism\n\nAnarchism is a political philosophy that advocates'
    ' self-governed societies based on voluntary institutions.'
  )
  everything = '\n'.join(_texts(documents))
  for markup in ("''", '==', '[[', '{{', '\nExternal links\n', '\n* ', '  '):
    assert markup not in everything


def test_sample_without_gensim(monkeypatch):
  real = builtins.__import__

  def fake(name, *args, **kwargs):
    if name.startswith('gensim'):
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', fake)
  with pytest.raises(errors.OptionalDependencyError, match='samples'):
    data.load_documents('sample')


def test_hash_ignores_white_space_and_composition():
  assert _hashing.text_sha256('a  b\n') == _hashing.text_sha256('a b')
  assert _hashing.text_sha256('e\u0301') == _hashing.text_sha256('\xe9')
  assert _hashing.text_sha256('a b') != _hashing.text_sha256('ab')
  assert len(_hashing.text_sha256('\ud800')) == 64
