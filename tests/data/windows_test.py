# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests that every token is scored exactly once, inside its document."""

import dataclasses
import types

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from gemma_ext import data
from gemma_ext import errors
from tests import tiny


class Words:
  """Tokenizer stand-in: 'd.p' is token 1000 d + p + 10, 'pad' is 0."""

  special_tokens = types.SimpleNamespace(BOS=2)

  def encode(self, text):
    pairs = (w.split('.') for w in text.split() if w != 'pad')
    ids = [1000 * int(d) + int(p) + 10 for d, p in pairs]
    return [0] * text.split().count('pad') + ids


def _documents(lengths):
  return [
    data.Document(
      text=' '.join(f'{d}.{p}' for p in range(n)), id=f'd{d}', source='t'
    )
    for d, n in enumerate(lengths)
  ]


def _scored(windows):
  return windows.tokens[windows.score_mask].tolist()


def _all_tokens(lengths):
  return [1000 * d + p + 10 for d, n in enumerate(lengths) for p in range(n)]


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  st.lists(st.integers(0, 40), min_size=1, max_size=5),
  st.integers(2, 14),
  st.data(),
)
def test_each_token_is_scored_once(lengths, length, draw):
  hypothesis.assume(sum(lengths))
  stride = draw.draw(st.none() | st.integers(1, length - 1))
  windows = data.windows(
    Words(), _documents(lengths), length=length, stride=stride
  )
  assert _scored(windows) == _all_tokens(lengths)
  assert (windows.tokens[:, 0] == 2).all()
  assert windows.tokens.dtype == np.int32
  for row, document in zip(windows.tokens, windows.document, strict=True):
    ids = row[1:][row[1:] != 0]
    assert (row[1 : 1 + len(ids)] == ids).all()  # Padding at the end only.
    assert (np.diff(ids) == 1).all()  # Contiguous.
    assert {f'd{i // 1000}' for i in ids} == {windows.ids[document]}


def test_no_overlap_by_hand():
  windows = data.windows(Words(), _documents([5, 2]), length=4)
  np.testing.assert_array_equal(
    windows.tokens,
    [[2, 10, 11, 12], [2, 13, 14, 0], [2, 1010, 1011, 0]],
  )
  np.testing.assert_array_equal(
    windows.score_mask,
    [[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0]],
  )
  assert windows.document.tolist() == [0, 0, 1]
  assert (windows.length, windows.stride, len(windows)) == (4, 3, 3)


def test_overlap_is_context_only():
  windows = data.windows(Words(), _documents([6]), length=5, stride=1)
  np.testing.assert_array_equal(
    windows.tokens,
    [[2, 10, 11, 12, 13], [2, 11, 12, 13, 14], [2, 12, 13, 14, 15]],
  )
  np.testing.assert_array_equal(
    windows.score_mask,
    [[0, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]],
  )


@pytest.mark.parametrize('limit', [1, 3, 7, 12, 13, 14, 99])
def test_max_tokens_takes_documents_in_turn(limit):
  lengths = [9, 1, 4]
  windows = data.windows(
    Words(), _documents(lengths), length=4, max_tokens=limit
  )
  assert windows.num_scored == min(limit, 14)
  # By rounds: first windows of the documents 0, 1, 2, then the second ones.
  rounds = [3, 1, 3, 3, 1, 3]
  expected = np.diff(np.minimum(np.cumsum([0, *rounds]), limit))
  per_document = [
    expected[[0, 3, 5]].sum(),
    expected[1],
    expected[[2, 4]].sum(),
  ]
  got = np.bincount(
    windows.document[windows.score_mask.nonzero()[0]], minlength=0
  )
  assert got.tolist() == [x for x in per_document if x]
  assert windows.document.tolist() == sorted(windows.document)


def test_literal_padding_in_a_text_is_left_out():
  documents = [data.Document(text='pad 0.0 0.1', id='x', source='t')]
  windows = data.windows(Words(), documents, length=4)
  assert windows.tokens.tolist() == [[2, 10, 11, 0]]


def test_hash_changes_with_tokens_and_mask():
  documents = _documents([9])
  base = data.windows(Words(), documents, length=4)
  assert base.sha256 == data.windows(Words(), documents, length=4).sha256
  others = [
    data.windows(Words(), documents, length=5),
    data.windows(Words(), documents, length=4, stride=1),
    data.windows(Words(), documents, length=4, max_tokens=8),
  ]
  assert len({w.sha256 for w in [base, *others]}) == 4
  assert {w.data_sha256 for w in others} == {base.data_sha256}


def test_real_tokenizer_round_trip():
  tokenizer = tiny.tokenizer(3)
  text = 'The capital of France is Paris. ' * 9
  documents = [data.Document(text=text, id='x', source='t')]
  windows = data.windows(tokenizer, documents, length=16)
  assert tokenizer.decode(_scored(windows)) == text
  assert tokenizer.encode(text) == _scored(windows)


@pytest.mark.parametrize(
  'kwargs, message',
  [
    (dict(length=1), 'length must be at least 2'),
    (dict(length=4, stride=4), '1 to length - 1 = 3, got 4'),
    (dict(length=4, stride=0), 'got 0'),
    (dict(max_tokens=0), 'max_tokens must be at least 1'),
  ],
)
def test_bad_arguments(kwargs, message):
  with pytest.raises(errors.DataError, match=message):
    data.windows(Words(), _documents([9]), **kwargs)


def test_no_tokens():
  with pytest.raises(errors.DataError, match='2 documents hold no tokens'):
    data.windows(Words(), _documents([0, 0]))


def test_windows_are_validated():
  windows = data.windows(Words(), _documents([9]), length=4)
  with pytest.raises(errors.ShapeError, match='do not belong together'):
    dataclasses.replace(windows, document=windows.document[:1])
  with pytest.raises(errors.ShapeError, match='cannot be scored'):
    dataclasses.replace(windows, score_mask=windows.score_mask | True)


def test_token_batches():
  documents = _documents([7, 7, 1])
  batches = list(data.token_batches(Words(), documents, length=4, batch_size=2))
  # Windows with three tokens; those with one are over half padding.
  assert [b.tolist() for b in batches] == [
    [[2, 10, 11, 12], [2, 13, 14, 15]],
    [[2, 1010, 1011, 1012], [2, 1013, 1014, 1015]],
  ]
  shuffled = list(
    data.token_batches(Words(), documents, length=4, batch_size=2, seed=3)
  )
  rows = np.concatenate(shuffled).tolist()
  assert sorted(rows) == sorted(np.concatenate(batches).tolist())
  assert rows != np.concatenate(batches).tolist()


def test_token_batches_use_short_windows_if_need_be():
  (batch,) = data.token_batches(
    Words(), _documents([2, 2]), length=9, batch_size=2
  )
  assert batch.shape == (2, 9)


def test_token_batches_too_few():
  with pytest.raises(errors.DataError, match='1 windows of 4 tokens'):
    data.token_batches(Words(), _documents([2]), length=4, batch_size=2)
  with pytest.raises(errors.DataError, match='batch_size must be'):
    data.token_batches(Words(), _documents([2]), batch_size=0)
