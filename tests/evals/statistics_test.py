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
  if kind == 'skewed':
    mean = 2.35 + 0.35 * rng.exponential(1, shape)
  if kind == 'correlated':
    mean -= 0.1 * (np.log(tokens) - 7)
  mean += 2.5 / np.sqrt(tokens) * rng.standard_normal(shape)
  return mean * tokens, tokens


def _coverage(kind, n, trials=1200):
  rng = np.random.default_rng(n)
  nll, tokens = _draw(rng, kind, 20_000, 100)
  truth = math.exp(nll.sum() / tokens.sum())
  held = 0
  for seed in range(trials):
    interval = evals.bootstrap_ci(
      *_draw(rng, kind, n), resamples=400, seed=seed
    )
    held += interval.low <= truth <= interval.high
  return held / trials


@pytest.mark.parametrize('kind', ['equal', 'lognormal', 'correlated'])
@pytest.mark.parametrize('n', [3, 5, 19, 50, 100])
def test_coverage(kind, n):
  """Conservative for few documents of different lengths."""
  uneven = kind != 'equal' and n < 50
  assert 0.93 <= _coverage(kind, n) <= (0.98 if uneven else 0.97)


@pytest.mark.parametrize('n', [5, 19, 50])
def test_coverage_of_skewed_documents(n):
  """A little short of what it says: 92%."""
  assert 0.91 <= _coverage('skewed', n) <= 0.97


def _effects(rng, shape, spread=0.02):
  """Differences of nll with a mean of 0 a token, and lengths."""
  tokens = np.round(np.clip(rng.lognormal(7, 1, shape), 20, 40_000))
  effect = spread * rng.standard_normal(shape)
  effect += 0.3 / np.sqrt(tokens) * rng.standard_normal(shape)
  return effect * tokens, tokens


@pytest.mark.parametrize('n', [5, 19, 50])
def test_p_values_without_a_difference(n):
  """Of documents of unequal length; those of five are conservative."""
  rng = np.random.default_rng(n)
  p = np.array(
    [
      evals.bootstrap_ci(*_effects(rng, n), resamples=100).p_value
      for _ in range(3000)
    ]
  )
  for level in (0.01, 0.05, 0.2):
    error = math.sqrt(level * (1 - level) / len(p))
    assert np.mean(p < level) < level + 3 * error
    assert n == 5 or np.mean(p < level) > level - 3 * error


def test_lengths_are_no_noise():
  """A constant effect shows however much the lengths differ."""
  rng = np.random.default_rng(0)
  noise, tokens = _effects(rng, 19, spread=0)
  noise /= 10
  found = evals.bootstrap_ci(0.02 * tokens + noise, tokens)
  # Divided by the mean length, differences spread as the lengths do.
  naive = evals.compare((0.02 * tokens + noise) / tokens.mean(), np.zeros(19))
  assert naive.difference.error > 10 * found.error
  assert found.value == pytest.approx(math.exp(0.02), abs=5e-4)
  assert found.p_value < 1e-12
  assert 1.0003 < found.smallest < 1.001 < 1.01 < naive.smallest + 1


def test_the_smallest_ratio_shows():
  """Four times of five."""
  rng = np.random.default_rng(0)
  found = [evals.bootstrap_ci(*_effects(rng, 50)) for _ in range(30)]
  effect = np.mean([math.log(f.smallest) for f in found])
  shown = 0
  for _ in range(1000):
    noise, tokens = _effects(rng, 50)
    ratio = evals.bootstrap_ci(noise + effect * tokens, tokens, resamples=100)
    shown += ratio.p_value < 0.05
  assert 0.75 < shown / 1000 < 0.85


def test_the_error_is_the_jackknifes():
  nll, tokens = _draw(np.random.default_rng(0), 'lognormal', 12)
  without = (nll.sum() - nll) / (tokens.sum() - tokens)
  of_whole = without - nll.sum() / tokens.sum()
  want = math.sqrt(11 / 12 * np.square(of_whole).sum())
  assert evals.bootstrap_ci(nll, tokens).error == pytest.approx(want)


def test_p_value_and_interval_agree():
  rng = np.random.default_rng(0)
  for _ in range(200):
    found = evals.bootstrap_ci(*_effects(rng, 12), resamples=100)
    # The interval is that of the test or wider.
    if not found.low <= 1 <= found.high:
      assert found.p_value < 0.05
  one = evals.bootstrap_ci([1.0], [10])
  assert math.isnan(one.p_value) and math.isnan(one.smallest)
  same = evals.bootstrap_ci(np.zeros(5), np.ones(5))
  assert (same.p_value, same.smallest) == (1, 1)


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


@pytest.mark.parametrize('n', [1, 2, 9, 10])
def test_method_by_number_of_documents(n):
  interval = evals.bootstrap_ci(np.linspace(20, 30, n), np.full(n, 10))
  method = 'none' if n == 1 else 'percentile bootstrap and jackknife t'
  assert interval.method == method
  assert math.isnan(interval.low) == (n == 1)


def test_widths_from_nine_to_ten_documents():
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
