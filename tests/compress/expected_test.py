# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of how often tokens are expected."""

import numpy as np
import pytest

from gemma_ext.compress import _expected


def _languages(size: int = 6000, width: int = 24):
  """Two languages by turns, their tokens' rows, and frequencies by number."""
  rng = np.random.default_rng(0)
  language = rng.integers(0, 2, size)
  table = rng.standard_normal((size, width)).astype(np.float32)
  table[:, 0] += 3 * language + 5
  often = 1 / (np.arange(size) + 20.0)
  return language, table, often


def test_tokens_like_those_that_came_are_expected():
  language, table, often = _languages()
  rng = np.random.default_rng(1)
  mine = often * (language == 1)
  counts = rng.multinomial(1500, mine / mine.sum())
  got = _expected.expected(counts, table)
  assert got.sum() == pytest.approx(1) and got.min() > 0
  unseen = counts == 0
  # The next text of the language, against knowing nothing of what never came.
  fresh = rng.multinomial(4000, mine / mine.sum())
  score = lambda p: fresh[unseen] @ np.log(p[unseen] / p[unseen].sum())
  assert score(got) > score(np.ones(len(got))) + 0.3 * fresh[unseen].sum()
  # Frequent tokens of another language are expected more than its rare ones.
  other = unseen & (language == 0)
  half = len(got) // 2
  assert got[:half][other[:half]].mean() > 1.1 * got[half:][other[half:]].mean()
  assert got[unseen & (language == 1)].mean() > 2 * got[other].mean()


def test_wide_rows_are_compared_in_fewer_columns(monkeypatch):
  language, table, often = _languages()
  counts = np.random.default_rng(1).multinomial(
    1500, often * (language == 1) / (often * (language == 1)).sum()
  )
  whole = _expected.expected(counts, table)
  monkeypatch.setattr(_expected, '_COLS', 16)
  monkeypatch.setattr(_expected, '_CHUNK', 1000)
  part = _expected.expected(counts, table)
  assert np.corrcoef(np.log(whole), np.log(part))[0, 1] > 0.9


@pytest.mark.parametrize('counts', ([3, 1, 2, 5], [0, 0, 0, 7]))
def test_few_tokens(counts):
  table = np.eye(4, dtype=np.float32)
  got = _expected.expected(np.array(counts), table)
  assert got.argmax() == 3 and got.min() > 0
  assert got.sum() == pytest.approx(1)
