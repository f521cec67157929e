# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""tokenizer.model and tokenizer.json, against the `tokenizers` library."""

import copy
import functools
import json
import types

from gemma import gm
import pytest
from sentencepiece import sentencepiece_model_pb2 as sp_proto
import tokenizers

from gemma_ext import errors
from gemma_ext.ckpts import _hf_tokenizer
from tests import tiny
from tests.ckpts import hf_fixtures

_TEXTS = [
  'The quick brown fox jumps over the lazy dog.',
  'a river of fresh  water   and    more     spaces ',
  ' leading and trailing ',
  'def f(x):\n\treturn x ** 2  # twice\n\n\n',
  '12,345 people in 1910',
  'naïve café — déjà vu',
  '日本語のテキスト',
  '😀👩‍👩‍👧 emoji',
  '<start_of_turn>user\nWhat?<end_of_turn>\n',
  '<unused7><mask> <not a token>',
  'ﬁ ligature \u200b zero width \ufeff',
  '',
  ' ',
  '▁ the piece for a space',
  'mathematicsmathematics setset thethe',
  '\x00\x01\x7f control',
]


@functools.cache
def _json():
  return hf_fixtures.tokenizer_json(tiny.tokenizer_model())


def _model(family='gemma3'):
  return tiny.model(family)


def _write(folder, data):
  (folder / 'tokenizer.json').write_text(json.dumps(data))
  return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
  monkeypatch.setenv('GEMMA_EXT_CACHE', str(tmp_path / 'cache'))


@pytest.mark.parametrize('text', _TEXTS)
def test_json_tokenises_as_the_tokenizers_library(tmp_path, text):
  ours = _hf_tokenizer.read(_write(tmp_path, _json()), _model())
  theirs = tokenizers.Tokenizer.from_str(json.dumps(_json()))
  expected = theirs.encode(text, add_special_tokens=False).ids
  assert ours.encode(text) == expected


@pytest.mark.parametrize('text', _TEXTS)
def test_json_tokenises_as_the_sentencepiece_model_it_came_from(tmp_path, text):
  ours = _hf_tokenizer.read(_write(tmp_path, _json()), _model())
  theirs = tiny.tokenizer(3)
  ids = theirs.encode(text)
  assert ours.encode(text) == ids
  assert ours.decode(ids) == theirs.decode(ids)


def test_merges_as_strings(tmp_path):
  data = copy.deepcopy(_json())
  data['model']['merges'] = [' '.join(m) for m in data['model']['merges']]
  ours = _hf_tokenizer.read(_write(tmp_path, data), _model())
  assert ours.encode(_TEXTS[0]) == tiny.tokenizer(3).encode(_TEXTS[0])


def test_rebuilt_once(tmp_path, monkeypatch):
  first = _hf_tokenizer.read(_write(tmp_path, _json()), _model())
  monkeypatch.setattr(_hf_tokenizer, '_rebuild', None)
  second = _hf_tokenizer.read(tmp_path, _model())
  assert first.path == second.path


def test_sentencepiece_file_comes_first(tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(tiny.tokenizer_model())
  (tmp_path / 'tokenizer.json').write_text('broken')
  tokenizer = _hf_tokenizer.read(tmp_path, _model())
  assert type(tokenizer) is gm.text.Gemma3Tokenizer
  assert tokenizer.path == str(tmp_path / 'tokenizer.model')


def test_class_of_the_family(tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(tiny.tokenizer_model(version=4))
  tokenizer = _hf_tokenizer.read(tmp_path, _model('gemma4'))
  assert type(tokenizer) is gm.text.Gemma4Tokenizer


def test_none_without_a_file(tmp_path):
  assert _hf_tokenizer.read(tmp_path, _model()) is None


def test_added_tokens_beyond_the_embedding_are_left_out(tmp_path):
  data = copy.deepcopy(_json())
  extra = data['added_tokens'][0] | {
    'id': tiny.VOCAB_SIZE,
    'content': '<image_soft_token>',
  }
  data['added_tokens'].append(extra)
  tokenizer = _hf_tokenizer.read(_write(tmp_path, data), _model())
  assert tokenizer.vocab_size == tiny.VOCAB_SIZE


# ---------------------------------- refuse -----------------------------------


def _set(*keys_and_value):
  *keys, last, value = keys_and_value

  def change(data):
    for key in keys:
      data = data[key]
    data[last] = value

  return change


def _rename(old, new):
  def change(data):
    vocab = data['model']['vocab']
    vocab[new] = vocab.pop(old)

  return change


_BAD_JSON = {
  'not_bpe': _set('model', 'type', 'Unigram'),
  'no_vocab': _set('model', 'vocab', None),
  'no_byte_fallback': _set('model', 'byte_fallback', False),
  'dropout': _set('model', 'dropout', 0.1),
  'ignores_merges': _set('model', 'ignore_merges', True),
  'suffix': _set('model', 'end_of_word_suffix', '</w>'),
  'lowercases': _set('normalizer', {'type': 'Lowercase'}),
  'splits_otherwise': _set('pre_tokenizer', {'type': 'ByteLevel'}),
  'id_negative': _set('model', 'vocab', 'the', -1),
  'id_twice': _set('model', 'vocab', 'the', 3),
  'id_a_string': _set('model', 'vocab', 'the', '3'),
  'id_hole': _set('model', 'vocab', 'the', 700),
  'merge_of_one': _set('model', 'merges', 0, ['a']),
  'merge_of_three': _set('model', 'merges', 0, 'a b c'),
  'merge_of_numbers': _set('model', 'merges', 0, [1, 2]),
  'merge_of_unknown_pieces': _set('model', 'merges', 0, ['\u4e00', 'x']),
  'merges_lacking': lambda d: d['model'].update(
    merges=d['model']['merges'][: len(d['model']['merges']) // 2]
  ),
  'byte_missing': _rename('<0x41>', '<0xZZ>'),
  'special_moved': _rename('<pad>', '<other>'),
  'added_malformed': _set('added_tokens', 0, {'id': 1}),
  'added_strips': _set('added_tokens', 5, 'lstrip', True),
  'added_conflicts': _set('added_tokens', 5, 'content', 'other'),
}


@pytest.mark.parametrize('case', sorted(_BAD_JSON))
def test_bad_json(tmp_path, case):
  data = copy.deepcopy(_json())
  _BAD_JSON[case](data)
  with pytest.raises(errors.TokenizerError):
    _hf_tokenizer.read(_write(tmp_path, data), _model())


@pytest.mark.parametrize('text', ['', '{', '[]', '{"model": 1, "model": 2}'])
def test_not_json(tmp_path, text):
  (tmp_path / 'tokenizer.json').write_text(text)
  with pytest.raises(errors.TokenizerError):
    _hf_tokenizer.read(tmp_path, _model())


def test_json_too_large(tmp_path, monkeypatch):
  monkeypatch.setattr(_hf_tokenizer, '_MAX_JSON_BYTES', 1000)
  with pytest.raises(errors.TokenizerError, match='larger than 1000'):
    _hf_tokenizer.read(_write(tmp_path, _json()), _model())


def _broken_proto(case):
  proto = sp_proto.ModelProto()
  proto.ParseFromString(tiny.tokenizer_model())
  if case == 'score_nan':
    proto.pieces[300].score = float('nan')
  elif case == 'special_moved':
    proto.pieces[2].piece = '<s>'
  elif case == 'duplicate_piece':
    proto.pieces[300].piece = proto.pieces[301].piece
  elif case == 'no_pieces':
    del proto.pieces[:]
  data = proto.SerializeToString()
  return data[:-100] + b'\xff' * 99 if case == 'garbage' else data


@pytest.mark.parametrize(
  'case',
  ['score_nan', 'special_moved', 'duplicate_piece', 'no_pieces', 'garbage'],
)
def test_bad_sentencepiece(tmp_path, case):
  (tmp_path / 'tokenizer.model').write_bytes(_broken_proto(case))
  with pytest.raises(errors.TokenizerError):
    _hf_tokenizer.read(tmp_path, _model())


def test_sentencepiece_too_large(tmp_path, monkeypatch):
  monkeypatch.setattr(_hf_tokenizer, '_MAX_SENTENCEPIECE_BYTES', 1000)
  (tmp_path / 'tokenizer.model').write_bytes(tiny.tokenizer_model())
  with pytest.raises(errors.TokenizerError, match='larger than 1000'):
    _hf_tokenizer.read(tmp_path, _model())


def test_vocabulary_larger_than_the_embedding(tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(tiny.tokenizer_model())
  model = _model()
  small = type(model)(
    config=types.SimpleNamespace(num_embed=100, use_qk_norm=True)
  )
  with pytest.raises(errors.TokenizerError, match='512 tokens'):
    _hf_tokenizer.read(tmp_path, small)
