# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of comparisons: formulas, and coverage by simulation."""

import functools
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


@pytest.mark.parametrize('runs, most', [(2, 0.99), (3, 0.98)])
@pytest.mark.parametrize('size', [0.0, 0.1, 0.3, 1.0])
def test_coverage_of_few_runs(runs, most, size):
  """Conservative where two runs are alike: they cannot say that they are."""

  def draw(rng):
    items = rng.standard_normal(200)
    luck = size * rng.standard_normal((runs, 1))
    return (items + luck + rng.standard_normal((runs, 200)),)

  assert 0.93 < _coverage(draw, 0.0, 2000) < (0.97 if size == 1 else most)


def test_runs_without_luck_are_no_narrower_than_one():
  """As at temperature 0, where every run is the same."""
  scores = np.random.default_rng(0).standard_normal(60)
  once, thrice = evals.mean(scores), evals.mean(np.stack([scores] * 3))
  for end in ('value', 'low', 'high', 'error'):
    assert getattr(thrice, end) == pytest.approx(getattr(once, end))


@functools.cache
def _answers(items, differ):
  """Outcomes of a comparison of answers: those better, worse, what is said."""
  found = []
  for better in range(differ + 1):
    for worse in range(differ + 1 - better):
      a, b = np.zeros((2, items))
      a[:better] = b[better : better + worse] = 1
      found.append((better, worse, evals.compare(a, b)))
  return found


def _chances(items, differ, better, worse):
  """Probabilities of the outcomes of `_answers`."""
  counts = np.array([f[:2] for f in _answers(items, differ)])
  counts = np.c_[counts, items - counts.sum(axis=1)]
  return scipy.stats.multinomial.pmf(
    counts, items, [better, worse, 1 - better - worse]
  )


@pytest.mark.parametrize(
  'items, differ, shares',
  [
    (40, 40, (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)),
    (64, 26, (0.01, 0.03, 0.07, 0.12)),
    (150, 36, (0.01, 0.03, 0.07, 0.1)),
  ],
)
def test_coverage_of_few_answers_that_differ(items, differ, shares):
  """Of all outcomes, weighed. Conservative: so few have no finer steps."""
  held = np.array([], float)
  for share in shares:
    for way in (0.5, 0.7, 0.9, 1.0):
      better, worse = share * way, share * (1 - way)
      chance = _chances(items, differ, better, worse)
      assert chance.sum() > 0.999
      holds = [
        f.difference.low <= better - worse <= f.difference.high
        for _, _, f in _answers(items, differ)
      ]
      held = np.append(held, chance @ holds)
  assert 0.94 < held.min() < 0.97
  # The spread of what differs alone holds the truth half of the time.
  plain = np.random.default_rng(0).random((1000, 40)) < 0.02
  alone = [evals.mean(x.astype(float)) for x in plain]
  assert np.mean([m.low <= 0.02 <= m.high for m in alone]) < 0.6


@pytest.mark.parametrize('items, differ', [(40, 40), (64, 26)])
def test_p_values_of_answers_are_no_smaller_than_they_may_be(items, differ):
  for share in (0.02, 0.05, 0.1, 0.12):
    chance = _chances(items, differ, share / 2, share / 2)
    found = np.array([f.p_value for _, _, f in _answers(items, differ)])
    for level in (0.01, 0.05, 0.2):
      assert chance @ (found < level) < 1.05 * level
  verdicts = [
    (f.verdict != 'tied') == (f.p_value < 0.05)
    for _, _, f in _answers(items, differ)
  ]
  assert all(verdicts)


@pytest.mark.parametrize('items, differ', [(40, 40), (64, 26), (150, 36)])
def test_the_smallest_difference_of_answers_shows(items, differ):
  """Where none differed: if all that differ do so in one direction."""
  better, worse, found = _answers(items, differ)[0]
  assert (better, worse, found.verdict, found.p_value) == (0, 0, 'tied', 1)
  assert found.difference.low == -found.difference.high < -2 / items
  assert found.smallest > 5 / items
  chance = _chances(items, differ, found.smallest, 0)
  shown = [f.verdict == 'better' for _, _, f in _answers(items, differ)]
  assert 0.78 < chance @ shown < 0.84


def test_answers_in_clusters_that_never_differ():
  same, names = np.ones(60), np.repeat(np.arange(12), 5)
  found = evals.compare(same, same, names)
  alone = evals.compare(same, same)
  assert found.difference.high > 2 * alone.difference.high
  assert found.smallest > 2 * alone.smallest
  runs = evals.compare(np.ones((2, 60)), np.ones((2, 60)))
  assert runs.difference.high >= alone.difference.high
  # Of three items not even a difference of 1.
  assert evals.compare(np.ones(3), np.zeros(3)).smallest == math.inf
  # Graded scores say by themselves how much they may differ.
  assert evals.compare(same / 2, same / 2).difference.high == 0


@pytest.mark.parametrize('share, most', [(0.02, 1.0), (0.1, 0.99), (0.3, 0.97)])
def test_coverage_of_answers_in_clusters(share, most):
  """Conservative while fewer than ten clusters differ."""
  rng = np.random.default_rng(0)
  names = np.repeat(np.arange(40), 4)
  trials, held = 1000, 0
  for _ in range(trials):
    of_cluster = rng.random((2, 40))[:, names]
    own = rng.random((2, 160))
    x = np.where(rng.random(40)[names] < 0.5, of_cluster, own)
    better = x[0] < share
    found = evals.compare(better & (x[1] < 0.6), better & (x[1] >= 0.6), names)
    held += found.difference.low <= 0.2 * share <= found.difference.high
  assert 0.93 < held / trials <= most


@pytest.mark.parametrize('p, trials', [(0.02, 40), (0.5, 12), (0.9, 100)])
def test_coverage_of_wilson(p, trials):
  """Of all outcomes, weighed by how likely they are."""
  outcomes = np.arange(trials + 1)
  holds = [
    low <= p <= high
    for low, high in (evals.wilson(int(k), trials) for k in outcomes)
  ]
  assert 0.93 < scipy.stats.binom.pmf(outcomes, trials, p) @ holds < 0.97


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
