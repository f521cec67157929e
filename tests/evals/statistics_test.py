# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests that intervals hold the truth as often as they claim."""

import math

import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext import evals


def _draw(rng, kind, *shape):
  """Returns nll and tokens of documents whose lengths and means differ."""
  if kind == 'equal':
    tokens = np.full(shape, 511.0)
  else:
    tokens = np.clip(np.round(rng.lognormal(7, 1, shape)), 20, 40_000)
  mean = 2.7 + 0.35 * rng.standard_normal(shape)
  if kind == 'correlated':
    mean -= 0.1 * (np.log(tokens) - 7)
  mean += 2.5 / np.sqrt(tokens) * rng.standard_normal(shape)
  return mean * tokens, tokens


@pytest.mark.parametrize('kind', ['equal', 'lognormal', 'correlated'])
@pytest.mark.parametrize('n', [3, 5, 19, 50, 100])
def test_coverage(kind, n):
  rng = np.random.default_rng(n)
  nll, tokens = _draw(rng, kind, 20_000, 100)
  truth = math.exp(nll.sum() / tokens.sum())
  trials = 600
  held = 0
  for seed in range(trials):
    interval = evals.bootstrap_ci(
      *_draw(rng, kind, n), resamples=500, seed=seed
    )
    held += interval.low <= truth <= interval.high
  # Two standard errors of 600 trials are 1.8%. Few documents are covered with
  # the wider intervals that they need.
  assert 0.92 <= held / trials <= (0.97 if n >= 50 else 0.99)


def test_value_is_the_ratio_of_sums():
  interval = evals.bootstrap_ci([30.0, 10.0], [10, 10])
  assert interval.value == pytest.approx(math.exp(2))
  assert interval.low < interval.value < interval.high
  assert (interval.units, interval.level) == (2, 0.95)


def test_width_shrinks_with_documents():
  rng = np.random.default_rng(0)
  widths = []
  for n in (25, 100, 400):
    nll, tokens = _draw(rng, 'equal', 40, n)
    intervals = [
      evals.bootstrap_ci(a, b, resamples=1000)
      for a, b in zip(nll, tokens, strict=True)
    ]
    widths.append(np.mean([math.log(i.high / i.low) for i in intervals]))
  np.testing.assert_allclose(widths[:2], 2 * np.array(widths[1:]), rtol=0.1)
  # 2 x 1.96 standard deviations of a document's mean, over sqrt(400).
  deviation = math.hypot(0.35, 2.5 / math.sqrt(511))
  assert widths[2] == pytest.approx(3.92 * deviation / 20, rel=0.05)


def test_seed_and_level():
  nll, tokens = _draw(np.random.default_rng(0), 'lognormal', 30)
  first = evals.bootstrap_ci(nll, tokens, seed=1)
  assert first == evals.bootstrap_ci(nll, tokens, seed=1)
  assert first != evals.bootstrap_ci(nll, tokens, seed=2)
  narrow = evals.bootstrap_ci(nll, tokens, level=0.5, seed=1)
  assert first.low < narrow.low < narrow.high < first.high


@pytest.mark.parametrize(
  'n, method',
  [
    (1, 'none'),
    (2, 'bootstrap t'),
    (9, 'bootstrap t'),
    (10, 'expanded percentile bootstrap'),
  ],
)
def test_method_by_number_of_documents(n, method):
  interval = evals.bootstrap_ci(np.linspace(20, 30, n), np.full(n, 10))
  assert interval.method == method
  assert math.isnan(interval.low) == (n == 1)


def test_methods_meet_at_ten():
  rng = np.random.default_rng(0)
  nll, tokens = _draw(rng, 'equal', 300, 10)
  widths = [
    [
      math.log(i.high / i.low)
      for i in (evals.bootstrap_ci(a[:k], b[:k], resamples=1000),)
    ][0]
    for k in (9, 10)
    for a, b in zip(nll, tokens, strict=True)
  ]
  nine, ten = np.mean(widths[:300]), np.mean(widths[300:])
  assert 1.0 < nine / ten < 1.15


def test_documents_without_spread():
  interval = evals.bootstrap_ci(np.full(12, 20.0), np.full(12, 10))
  assert interval.low == interval.high == pytest.approx(math.exp(2))


def test_many_documents_in_chunks(monkeypatch):
  nll, tokens = _draw(np.random.default_rng(0), 'equal', 40)
  whole = evals.bootstrap_ci(nll, tokens, resamples=1000)
  monkeypatch.setattr('gemma_ext.evals._statistics._CHUNK', 40 * 7)
  chunked = evals.bootstrap_ci(nll, tokens, resamples=1000)
  # Not bit for bit: BLAS sums in an order that depends on the shapes.
  for end in ('value', 'low', 'high'):
    expected = pytest.approx(getattr(whole, end), rel=1e-12)
    assert getattr(chunked, end) == expected


def test_hopeless_perplexity_is_infinite():
  interval = evals.bootstrap_ci(np.full(12, 1e6), np.full(12, 10))
  assert interval.value == math.inf


@pytest.mark.parametrize(
  'nll, tokens, kwargs, message',
  [
    ([], [], {}, 'same length, at least 1'),
    ([1.0], [1, 2], {}, 'same length'),
    ([[1.0]], [[1]], {}, 'vectors'),
    ([math.nan], [1], {}, '1 nll that are not'),
    ([1.0], [0], {}, '1 tokens that are not'),
    ([1.0], [1], dict(level=1.0), 'level must be'),
    ([1.0], [1], dict(resamples=10), 'resamples at least 100'),
  ],
)
def test_bad_input(nll, tokens, kwargs, message):
  with pytest.raises(errors.DataError, match=message):
    evals.bootstrap_ci(nll, tokens, **kwargs)
