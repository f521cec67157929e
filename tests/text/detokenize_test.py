# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the text of tokens that come one after another."""

import numpy as np
import pytest

from gemma_ext.text import _detokenize
from tests import tiny

# One to four bytes a character, none of them in the tiny vocabulary.
_TEXT = ' The river é 日本語 🌊🏞 flows  on.\n\nÀ la fin ☃'


def _pieces(tokenizer, ids, sizes):
  detokenizer = _detokenize.Detokenizer(tokenizer)
  pieces = []
  start = 0
  while start < len(ids):
    end = start + next(sizes)
    pieces.append(detokenizer.add(ids[start:end]))
    start = end
  return pieces, detokenizer.finish()


@pytest.mark.parametrize('version', [2, 3, '3n', 4])
@pytest.mark.parametrize('most', [1, 5])
def test_whole_characters_in_the_order_of_the_text(version, most):
  tokenizer = tiny.tokenizer(version)
  ids = tokenizer.encode(_TEXT)
  rng = np.random.default_rng(0)
  sizes = iter(lambda: int(rng.integers(1, most + 1)), None)
  pieces, rest = _pieces(tokenizer, ids, sizes)
  assert ''.join(pieces) == _TEXT
  assert not rest
  assert all('\ufffd' not in piece for piece in pieces)
  # Not at the end only.
  assert sum(map(bool, pieces)) > len(_TEXT) / (most + 5)


@pytest.mark.parametrize('version', [2, 3, '3n', 4])
def test_any_tokens_give_the_text_of_all_of_them(version):
  tokenizer = tiny.tokenizer(version)
  byte = tokenizer.tokens.index('<0x00>')
  rng = np.random.default_rng(0)
  for _ in range(200):
    # Half of them bytes, of which most make no characters.
    ids = np.where(
      rng.random(30) < 0.5,
      byte + rng.integers(0x70, 256, 30),
      rng.integers(4, tiny.VOCAB_SIZE, 30),
    ).tolist()
    sizes = iter(lambda: int(rng.integers(1, 4)), None)
    pieces, rest = _pieces(tokenizer, ids, sizes)
    assert ''.join(pieces) + rest == tokenizer.decode(ids)


def test_a_character_that_is_cut_off_is_shown_at_the_end():
  tokenizer = tiny.tokenizer(3)
  ids = tokenizer.encode('a日b')
  assert len(ids) == 5
  pieces, rest = _pieces(tokenizer, ids, iter([1] * 5))
  assert (pieces, rest) == (['a', '', '', '日', 'b'], '')
  pieces, rest = _pieces(tokenizer, ids[:3], iter([1] * 3))
  assert (pieces, rest) == (['a', '', ''], '\ufffd\ufffd')


def test_the_replacement_character_itself_comes_through():
  tokenizer = tiny.tokenizer(3)
  ids = tokenizer.encode('a\ufffd\ufffd\ufffd\ufffd\ufffd')
  pieces, rest = _pieces(tokenizer, ids, iter([1] * len(ids)))
  assert ''.join(pieces) + rest == 'a' + 5 * '\ufffd'


def test_long_texts_are_not_decoded_again_and_again():
  tokenizer = tiny.tokenizer(3)
  lengths = []

  class Counting:
    def decode(self, ids):
      lengths.append(len(ids))
      return tokenizer.decode(ids)

  ids = tokenizer.encode(_TEXT * 20)
  pieces, _ = _pieces(Counting(), ids, iter([1] * len(ids)))
  assert ''.join(pieces) == _TEXT * 20
  assert max(lengths) <= 5
