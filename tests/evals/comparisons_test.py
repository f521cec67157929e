# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of comparisons: formulas, and coverage by simulation."""

import math

import numpy as np
import pytest
import scipy.stats

from gemma_ext import errors
from gemma_ext import evals

_TRIALS = 3000


def _coverage(draw, truth, trials=_TRIALS):
  """How often intervals hold the truth; `draw(rng)` gives scores, clusters."""
  rng = np.random.default_rng(0)
  hits = 0
  for _ in range(trials):
    found = evals.mean(*draw(rng))
    hits += found.low <= truth <= found.high
  return hits / trials


@pytest.mark.parametrize('count', [10, 40, 300])
def test_coverage_of_plain_items(count):
  normal = lambda rng: (rng.standard_normal(count),)
  assert 0.93 < _coverage(normal, 0.0) < 0.97


def test_coverage_of_right_or_wrong():
  binary = lambda rng: (rng.random(100) < 0.7,)
  assert 0.93 < _coverage(binary, 0.7) < 0.97


@pytest.mark.parametrize('groups, size', [(12, 5), (50, 4)])
def test_coverage_of_clusters(groups, size):
  names = np.repeat(np.arange(groups), size)

  def draw(rng):
    shared = rng.standard_normal(groups)[names]
    return shared + rng.standard_normal(len(names)), names

  assert 0.93 < _coverage(draw, 0.0) < 0.97
  # Taken as independent they would promise too much.
  alone = lambda rng: draw(rng)[:1]
  assert _coverage(alone, 0.0) < 0.9


def test_coverage_of_clusters_of_different_size():
  sizes = np.array([1, 2, 3, 4] * 8)
  names = np.repeat(np.arange(len(sizes)), sizes)

  def draw(rng):
    shared = rng.standard_normal(len(sizes))[names]
    return shared + rng.standard_normal(len(names)), names

  assert 0.93 < _coverage(draw, 0.0) < 0.97


@pytest.mark.parametrize('runs, size', [(5, 0.3), (8, 1.0), (5, 0.0)])
def test_coverage_of_several_runs(runs, size):
  """Items of their own difficulty, runs of their own luck, and noise."""

  def draw(rng):
    items = rng.standard_normal(60)
    luck = size * rng.standard_normal((runs, 1))
    return (items + luck + rng.standard_normal((runs, 60)),)

  found = _coverage(draw, 0.0)
  assert 0.93 < found < (0.97 if size else 0.98)


@pytest.mark.parametrize('p, trials', [(0.02, 40), (0.5, 12), (0.9, 100)])
def test_coverage_of_wilson(p, trials):
  """Of all outcomes, weighed by how likely they are."""
  outcomes = np.arange(trials + 1)
  holds = [
    low <= p <= high
    for low, high in (evals.wilson(int(k), trials) for k in outcomes)
  ]
  assert 0.92 < scipy.stats.binom.pmf(outcomes, trials, p) @ holds < 0.98


def test_power_is_what_it_says():
  """A difference of `smallest` is found in four of five samples."""
  rng = np.random.default_rng(0)
  once = evals.compare(rng.standard_normal(80), np.zeros(80))
  found = 0
  for _ in range(2000):
    a = rng.standard_normal(80) + 2.82 / math.sqrt(80)
    found += evals.compare(a, np.zeros(80)).verdict == 'better'
  assert 0.77 < found / 2000 < 0.83
  assert once.smallest == pytest.approx(2.82 * once.difference.error, rel=0.03)


def test_p_values_are_uniform_without_a_difference():
  rng = np.random.default_rng(0)
  p = [
    evals.compare(*rng.standard_normal((2, 30))).p_value for _ in range(2000)
  ]
  assert scipy.stats.kstest(p, 'uniform').pvalue > 0.01


def test_as_the_t_test():
  a, b = np.random.default_rng(0).standard_normal((2, 25))
  got = evals.compare(a + 0.4, b)
  want = scipy.stats.ttest_rel(a + 0.4, b)
  assert got.p_value == pytest.approx(want.pvalue, rel=0.05)
  interval = want.confidence_interval()
  assert got.difference.low == pytest.approx(interval.low, abs=0.02)
  assert got.difference.items == got.difference.clusters == 25


def test_verdicts():
  rng = np.random.default_rng(0)
  noise = rng.standard_normal(50) / 10
  zeros = np.zeros(50)
  assert evals.compare(noise + 1, zeros).verdict == 'better'
  assert evals.compare(noise - 1, zeros).verdict == 'worse'
  loss = evals.compare(noise - 1, zeros, higher_is_better=False)
  assert loss.verdict == 'better'
  assert evals.compare(noise, zeros).verdict == 'tied'
  alone = evals.compare(np.ones(1), np.zeros(1))
  assert alone.verdict == 'tied' and math.isnan(alone.p_value)
  same = evals.compare(zeros, zeros)
  assert same.verdict == 'tied' and same.p_value == 1


def test_holm():
  got = evals.holm({'a': 0.01, 'b': 0.04, 'c': 0.03, 'd': math.nan})
  assert got['a'] == pytest.approx(0.03)
  assert got['c'] == got['b'] == pytest.approx(0.06)
  assert math.isnan(got['d'])
  assert evals.holm({'a': 0.9, 'b': 0.8}) == {'a': 1.0, 'b': 1.0}


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: evals.mean(np.zeros((0,))), 'have shape'),
    (lambda: evals.mean(np.array([1.0, np.nan])), '1 scores are not finite'),
    (lambda: evals.mean(np.ones(3), [1, 2]), '2 clusters for 3 items'),
    (lambda: evals.mean(np.ones(3), level=1.0), 'level=1.0'),
    (lambda: evals.compare(np.ones(3), np.ones(2)), 'cannot be paired'),
    (lambda: evals.wilson(3, 2), 'successes=3'),
  ],
)
def test_bad_input_is_an_error(call, message):
  with pytest.raises(errors.DataError, match=message):
    call()
