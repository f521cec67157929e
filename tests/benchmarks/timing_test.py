# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests that intervals of medians hold them."""

import math

import numpy as np
import pytest
import scipy.stats

from tools.benchmarks import _timing

_TRIALS = 2000


def _coverage(draw, median, count):
  rng = np.random.default_rng(count)
  held = 0
  for _ in range(_TRIALS):
    low, high = _timing.summary(draw(rng, count))['ci95']
    held += low <= median <= high
  return held / _TRIALS


@pytest.mark.parametrize('count', [6, 11, 40])
@pytest.mark.parametrize(
  'draw, median',
  [
    (lambda rng, n: rng.standard_normal(n), 0.0),
    (lambda rng, n: rng.lognormal(0, 1, n), 1.0),
    (lambda rng, n: rng.exponential(1, n), math.log(2)),
  ],
)
def test_coverage_of_medians(count, draw, median):
  """At least 95% of any distribution; more, as only so many ends are there."""
  k = next(
    k for k in range(count) if scipy.stats.binom.cdf(k, count, 0.5) >= 0.025
  )
  exact = 1 - 2 * scipy.stats.binom.cdf(k - 1, count, 0.5)
  assert 0.95 <= exact < 0.99
  error = math.sqrt(exact * (1 - exact) / _TRIALS)
  assert abs(_coverage(draw, median, count) - exact) < 3 * error


@pytest.mark.parametrize('count', [11, 15])
def test_coverage_of_ratios(count):
  """Of two contenders on a machine that drifts, round by round."""
  rng = np.random.default_rng(count)
  held = 0
  for _ in range(_TRIALS):
    drift = 1 + 0.3 * np.sin(np.arange(count) + rng.random() * 6)
    slow = 2 * drift * rng.lognormal(0, 0.1, count)
    low, high = _timing.ratio(slow, drift * rng.lognormal(0, 0.1, count))[
      'ci95'
    ]
    held += low <= 2 <= high
  assert 0.95 < held / _TRIALS < 0.995


def test_too_few_values_have_no_interval():
  assert _timing.summary([1.0] * 5)['ci95'] == [None, None]
  assert _timing.summary([3, 1, 2, 5, 4, 6])['ci95'] == [1, 6]
  assert _timing.summary([3, 1, 2, 5, 4, 6])['median'] == 3.5
