# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests that splits never overlap and depend on the texts alone."""

import random

import hypothesis
from hypothesis import strategies as st
import pytest

from gemma_ext import data
from gemma_ext import errors

_PARTS = ('calibration', 'validation', 'test')


def _documents(texts):
  return [
    data.Document(text=t, id=str(i), source='test') for i, t in enumerate(texts)
  ]


def _sets(splits):
  return [
    {' '.join(d.text.split()) for d in getattr(splits, p).documents}
    for p in _PARTS
  ]


def test_sizes_follow_the_fractions():
  splits = data.split(_documents(f'text {i}' for i in range(100)))
  assert [len(getattr(splits, p)) for p in _PARTS] == [60, 20, 20]
  assert [getattr(splits, p).name for p in _PARTS] == list(_PARTS)
  splits = data.split(
    _documents(f'text {i}' for i in range(100)), fractions=(0.1, 0.2, 0.7)
  )
  assert [len(getattr(splits, p)) for p in _PARTS] == [10, 20, 70]


def test_order_does_not_matter_but_the_seed_does():
  texts = [f'text {i}' for i in range(50)]
  splits = data.split(_documents(texts))
  random.Random(0).shuffle(texts)
  shuffled = data.split(_documents(texts))
  assert _sets(shuffled) == _sets(splits)
  assert shuffled.test.sha256 == splits.test.sha256
  other = data.split(_documents(texts), seed=1)
  assert other.seed == 1
  assert _sets(other) != _sets(splits)
  assert other.test.sha256 != splits.test.sha256


def test_duplicates_never_straddle():
  texts = [f'text {i} end' for i in range(30)]
  spaced = [f' text  {i}\tend\n' for i in range(30)]
  splits = data.split(_documents(texts + spaced + texts))
  sets = _sets(splits)
  assert sum(len(s) for s in sets) == 30
  assert sum(len(getattr(splits, p)) for p in _PARTS) == 30
  assert splits.duplicates == 60


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  st.lists(st.text(min_size=1), min_size=3, max_size=40),
  st.integers(0, 2**31),
)
def test_any_texts_are_partitioned(texts, seed):
  unique = {d.sha256 for d in _documents(texts)}
  hypothesis.assume(len(unique) >= 3)
  splits = data.split(_documents(texts), seed=seed)
  parts = [{d.sha256 for d in getattr(splits, p).documents} for p in _PARTS]
  assert all(parts)
  assert sum(len(p) for p in parts) == len(unique)
  assert set().union(*parts) == unique


@pytest.mark.parametrize('n', [3, 4, 5])
def test_few_documents_leave_no_split_empty(n):
  splits = data.split(
    _documents(f'text {i}' for i in range(n)), fractions=(0.98, 0.01, 0.01)
  )
  assert [len(getattr(splits, p)) for p in _PARTS] == [n - 2, 1, 1]


def test_too_few_documents():
  with pytest.raises(errors.DataError, match='split 3 documents, 2 of them'):
    data.split(_documents(['a', 'a ', 'b']))


@pytest.mark.parametrize(
  'fractions', [(0.5, 0.5), (0.5, 0.5, 0.5), (1.0, 0.0, 0.0)]
)
def test_bad_fractions(fractions):
  with pytest.raises(errors.DataError, match='fractions must'):
    data.split(_documents('abc'), fractions=fractions)
