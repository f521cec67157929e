# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of rebuilding a SentencePiece model from a GGUF vocabulary."""

import os
import pathlib

from gemma import gm
import numpy as np
import pytest

from gemma_ext import ckpts
from gemma_ext import errors
from gemma_ext.ckpts import _cache
from gemma_ext.ckpts import _vocab
from tests import tiny
from tests.ckpts import gguf_fixtures as fx

_TEXTS = (
  'The quick brown fox.',
  '',
  ' ',
  '  two  spaces  ',
  'a\n\nb\n\n\nc\t\td',
  '日本語 и русский 👍🏽 \u200d',
  '<start_of_turn>user\nHi<end_of_turn>\n',
  '<|turn>user\nHi<turn|>\n',
  '<unused3><unused17>x<mask>',
  '<bos> <eos> <pad> <unk>',
  '\x00\x01\ufffd<0x41>',
  'def f(x):\n    return x ** 2\n',
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('GEMMA_EXT_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'tokenizers'


def _metadata(family='gemma3', **changes):
  """What the header parser returns for the tiny vocabulary."""
  values = fx.vocabulary(tiny.model(family))
  out = {}
  for key, value in values.items():
    if isinstance(value, list) and isinstance(value[0], str):
      value = [v.encode() for v in value]
    elif isinstance(value, list):
      kind = np.float32 if isinstance(value[0], float) else np.int32
      value = np.asarray(value, kind)
    out[key] = value
  out |= {f'tokenizer.ggml.{k}': v for k, v in changes.items()}
  return {k: v for k, v in out.items() if v is not None}


def _tokenizer(metadata, cls=gm.text.Gemma3Tokenizer, max_tokens=512):
  return _vocab.tokenizer_of(metadata, cls, max_tokens=max_tokens)


@pytest.mark.parametrize(
  ('family', 'cls', 'version'),
  [
    ('gemma2', ckpts.Gemma2Tokenizer, 2),
    ('gemma3', gm.text.Gemma3Tokenizer, 3),
    ('gemma4', gm.text.Gemma4Tokenizer, 4),
  ],
)
def test_tokenises_as_the_model_it_was_made_from(family, cls, version):
  tokenizer = _tokenizer(_metadata(family), cls)
  reference = tiny.tokenizer(version)
  assert type(tokenizer) is cls
  assert tokenizer.tokens == reference.tokens
  for text in _TEXTS:
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text), text
    assert tokenizer.decode(ids) == reference.decode(ids)
  turn = tokenizer.special_tokens.START_OF_TURN
  assert tokenizer.encode(tokenizer.tokens[turn]) == [turn]
  assert tokenizer.encode('<bos>') != [2]


def test_no_vocabulary_gives_no_tokenizer():
  assert _tokenizer({'general.architecture': 'gemma3'}) is None


def test_model_is_written_once(cache):
  _tokenizer(_metadata())
  (path,) = cache.iterdir()
  path.chmod(0o444)
  stamp = path.stat().st_mtime_ns
  _tokenizer(_metadata())
  assert path.stat().st_mtime_ns == stamp
  scores = _metadata()['tokenizer.ggml.scores'] - 1
  _tokenizer(_metadata(scores=scores))
  assert len(list(cache.iterdir())) == 2


def test_damaged_cache_is_made_again(cache):
  expected = _tokenizer(_metadata()).encode('The river')
  (path,) = cache.iterdir()
  path.write_bytes(path.read_bytes()[:100])
  assert _tokenizer(_metadata()).encode('The river') == expected
  assert path.stat().st_size > 1000


def test_last_of_two_equal_tokens_is_used():
  metadata = _metadata()
  tokens = metadata['tokenizer.ggml.tokens']
  normal = [i for i, t in enumerate(tokens) if len(t) == 1 and i > 240]
  first = normal[0]
  tokens[511] = tokens[first]
  metadata['tokenizer.ggml.token_type'][511] = 1
  tokenizer = _tokenizer(metadata)
  assert 511 in tokenizer.encode(tokens[first].decode() * 3)
  assert first not in tokenizer.encode(tokens[first].decode() * 3)


def test_gemma4_pieces_that_no_merge_yields_match_whole():
  metadata = _metadata('gemma4')
  tokens = metadata['tokenizer.ggml.tokens']
  tokens[511] = b'<table>'
  metadata['tokenizer.ggml.token_type'][511] = 1
  tokenizer = _tokenizer(metadata, gm.text.Gemma4Tokenizer)
  assert tokenizer.encode('<table>') == [511]


_N = 512
_BAD = {
  'other_kind': (dict(model='gpt2'), 'kind'),
  'no_kind': (dict(model=None), 'kind'),
  'more_tokens_than_rows': (
    dict(tokens=[b'x%d' % i for i in range(513)]),
    'rows',
  ),
  'no_tokens': (dict(tokens=[]), '0 tokens'),
  'tokens_are_numbers': (dict(tokens=np.zeros(_N)), 'no list'),
  'scores_missing': (dict(scores=None), 'scores'),
  'scores_too_few': (dict(scores=np.zeros(3, np.float32)), 'scores'),
  'scores_are_integers': (dict(scores=np.zeros(_N, np.int32)), 'scores'),
  'scores_not_finite': (
    dict(scores=np.full(_N, np.nan, np.float32)),
    'finite',
  ),
  'types_missing': (dict(token_type=None), 'token_type'),
  'types_unknown': (dict(token_type=np.full(_N, 9, np.int32)), 'range'),
  'types_zero': (dict(token_type=np.zeros(_N, np.int32)), 'range'),
  'begin_token_elsewhere': (dict(bos_token_id=1), 'begins'),
  'token_empty': (dict(tokens=[b''] * _N), 'bytes'),
  'token_too_long': (dict(tokens=[b'x' * 5000] * _N), 'bytes'),
  'token_with_zero_byte': (dict(tokens=[b'a\0b'] * _N), 'zero byte'),
  'token_not_utf8': (dict(tokens=[b'\xff'] * _N), 'UTF-8'),
  'byte_pieces_missing': (
    dict(token_type=np.ones(_N, np.int32)),
    'SentencePiece rejects',
  ),
  'too_few_for_special_tokens': (
    dict(
      tokens=[b'a', b'b'],
      scores=np.zeros(2, np.float32),
      token_type=np.ones(2, np.int32),
    ),
    'special',
  ),
}


@pytest.mark.parametrize('name', _BAD)
def test_bad_vocabulary(name, cache):
  changes, message = _BAD[name]
  with pytest.raises(errors.TokenizerError, match=message):
    _tokenizer(_metadata(**changes))
  assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize(
  'merges', [None, 3, [b'ab'], [b'a b c'], [b' a'], [b'a '], np.zeros(3)]
)
def test_bad_merges(merges):
  with pytest.raises(errors.TokenizerError, match='[Mm]erge'):
    _tokenizer(_metadata('gemma4', merges=merges), gm.text.Gemma4Tokenizer)


# ---------------------------------- the cache --------------------------------


def test_cache_folder_from_environment(monkeypatch):
  monkeypatch.setenv('GEMMA_EXT_CACHE', '~/x')
  assert _cache.cache_dir() == pathlib.Path.home() / 'x'
  monkeypatch.delenv('GEMMA_EXT_CACHE')
  assert _cache.cache_dir() == pathlib.Path.home() / '.cache' / 'gemma_ext'


def test_atomic_file_appears_only_when_complete(tmp_path):
  target = tmp_path / 'a' / 'b'
  with pytest.raises(RuntimeError, match='stop'):
    with _cache.atomic_file(target) as file:
      file.write(b'half')
      assert not target.exists()
      raise RuntimeError('stop')
  assert not list((tmp_path / 'a').iterdir())
  with _cache.atomic_file(target) as file:
    file.write(b'whole')
  assert target.read_bytes() == b'whole'


def test_cache_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_bytes(b'')
  with pytest.raises(errors.CheckpointError, match='GEMMA_EXT_CACHE'):
    with _cache.atomic_file(tmp_path / 'file' / 'x' / 'y'):
      pass
  assert os.listdir(tmp_path) == ['file']
