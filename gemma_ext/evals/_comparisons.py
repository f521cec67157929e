# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of items, and what can be said of two models by them.

Everything is by paired differences with standard errors clustered by what items
share (a passage, a template), after Miller, "Adding Error Bars to Evals",
arXiv 2411.00640. Items of several runs (seeds) are clustered both ways, by item
and by run (Cameron, Gelbach and Miller, "Robust Inference with Multi-way
Clustering", 2011). Runs are few, so each part of the variance has the t
quantile of its own degrees of freedom: squares of half widths are added, as in
modified large-sample intervals (Graybill and Wang, "Confidence Intervals on
Nonnegative Linear Combinations of Variances", JASA 1980).

Of right and wrong answers few may differ, or none: then the spread of what was
seen says too little. One item more that only the candidate has right and one
that only the baseline has are put to them, as Bonett and Price do ("Adjusted
Wald Confidence Interval for a Difference of Binomial Proportions Based on
Paired Data", J. Educ. Behav. Stat. 2012; recommended by Fagerland, Lydersen and
Laake, "Recommended Tests and Confidence Intervals for Paired Binomial
Proportions", Stat. Med. 2014), here with a t quantile in place of a normal one.

Coverage is measured in `tests/evals/comparisons_test.py`: 93 to 97%, and more
where few answers differ or runs are alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

from gemma_ext import errors

_POWER = 0.8
# Clusters with a difference, below which their spread alone is not trusted.
_FEW = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
  """A mean with its interval.

  Attributes:
    value: The mean.
    low: Lower end; NaN if there is only one cluster.
    high: Upper end.
    level: Nominal coverage.
    error: Standard error, clustered.
    freedom: Degrees of freedom of the t quantile.
    items: Items.
    clusters: Clusters.
  """

  value: float
  low: float
  high: float
  level: float
  error: float
  freedom: float
  items: int
  clusters: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """A candidate against a baseline on the same items.

  Attributes:
    difference: Mean of candidate minus baseline.
    p_value: Two-sided, of no difference.
    smallest: The smallest difference that so many items would have shown with
      a probability of 80%. Of right and wrong answers never less than what
      shows if all that differ do so in one direction; infinity if they are so
      few that nothing would.
    higher_is_better: Whether a score is something to have more of.
  """

  difference: Mean
  p_value: float
  smallest: float
  higher_is_better: bool = True

  @property
  def verdict(self) -> str:
    """'better', 'worse', or 'tied' if the interval holds 0 or there is none."""
    low, high = self.difference.low, self.difference.high
    if not low > 0 and not high < 0:
      return 'tied'
    return 'better' if (low > 0) == self.higher_is_better else 'worse'


def mean(
  scores: np.ndarray,
  clusters: Sequence[object] | None = None,
  *,
  level: float = 0.95,
) -> Mean:
  """Mean of scores and its interval.

  Args:
    scores: [N] a score an item, or [R, N] of several runs (seeds) on the same
      items.
    clusters: [N] what items share; each for itself by default.
    level: Coverage, in (0, 1).

  Returns:
    The mean, with a t interval of a standard error that is clustered by
    `clusters`, and by runs where there are several. `freedom` is then what
    gives the interval of both.

  Raises:
    DataError: Shapes or values that make no sense.
  """
  x = _check(scores, clusters, level)
  runs, count = x.shape
  of = _groups(clusters, count)
  groups = int(of.max()) + 1
  value = float(x.mean())
  centred = x - value
  sums = np.stack([np.bincount(of, row, groups) for row in centred]) / x.size
  error, freedom = _one_way(sums.sum(axis=0))
  if runs > 1:
    error, freedom = _two_way(sums, error, freedom, level)
  low = high = math.nan
  if groups > 1:
    spread = scipy.stats.t.ppf((1 + level) / 2, freedom) * error
    low, high = value - spread, value + spread
  return Mean(
    value=value,
    low=low,
    high=high,
    level=level,
    error=error,
    freedom=freedom,
    items=count,
    clusters=groups,
  )


def compare(
  candidate: np.ndarray,
  baseline: np.ndarray,
  clusters: Sequence[object] | None = None,
  *,
  level: float = 0.95,
  higher_is_better: bool = True,
) -> Comparison:
  """Compares two models item by item.

  Args:
    candidate: Scores, as for `mean`.
    baseline: Scores of the same items.
    clusters: What items share.
    level: Coverage of the interval.
    higher_is_better: Whether a score is something to have more of.

  Raises:
    DataError: If the scores are not of as many items, or make no sense.
  """
  candidate = np.asarray(candidate, np.float64)
  baseline = np.asarray(baseline, np.float64)
  if candidate.shape[-1:] != baseline.shape[-1:]:
    raise errors.DataError(
      f'Scores of {candidate.shape} and {baseline.shape} items cannot be'
      ' paired.'
    )
  scores = candidate - baseline
  difference = mean(scores, clusters, level=level)
  p_value, smallest = math.nan, math.nan
  if difference.clusters > 1:
    found, least = difference, 0.0
    if _is_binary(candidate) and _is_binary(baseline):
      found, least = _of_answers(scores, clusters, difference)
      difference = dataclasses.replace(
        found,
        value=difference.value,
        items=difference.items,
        clusters=difference.clusters,
      )
    t = scipy.stats.t(found.freedom)
    smallest = (t.ppf((1 + level) / 2) + t.ppf(_POWER)) * found.error
    if least:
      # Of so few items even a difference of 1 may not show.
      smallest = max(smallest, least)
      smallest = smallest if smallest <= 1 else math.inf
    if found.error > 0:
      p_value = float(2 * t.sf(abs(found.value) / found.error))
    else:
      p_value = float(found.value == 0)
  return Comparison(
    difference=difference,
    p_value=p_value,
    smallest=float(smallest),
    higher_is_better=higher_is_better,
  )


def wilson(
  successes: int, trials: int, *, level: float = 0.95
) -> tuple[float, float]:
  """Interval of a proportion that holds up for few trials and rare outcomes.

  Args:
    successes: Of the trials.
    trials: At least 1.
    level: Coverage, in (0, 1).

  Returns:
    Lower and upper end.

  Reference: Wilson, "Probable Inference", JASA 1927.

  Raises:
    DataError: If the numbers make no sense.
  """
  if not (0 <= successes <= trials and trials >= 1 and 0 < level < 1):
    raise errors.DataError(
      f'{successes=} of {trials=} at {level=} make no proportion.'
    )
  found = scipy.stats.binomtest(successes, trials).proportion_ci(
    level, method='wilson'
  )
  return float(found.low), float(found.high)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
  """Adjusts p-values of several tasks: any of them below 0.05 is a finding.

  Args:
    p_values: By task; NaN stays NaN and does not count.

  Returns:
    Adjusted, by task.

  Reference: Holm, "A Simple Sequentially Rejective Multiple Test Procedure",
  1979.
  """
  known = {k: p for k, p in p_values.items() if not math.isnan(p)}
  adjusted = dict(p_values)
  so_far = 0.0
  for i, name in enumerate(sorted(known, key=lambda k: known[k])):
    so_far = max(so_far, min((len(known) - i) * known[name], 1.0))
    adjusted[name] = so_far
  return adjusted


def _check(
  scores: np.ndarray, clusters: Sequence[object] | None, level: float
) -> np.ndarray:
  """Scores as [runs, items]."""
  x = np.asarray(scores, np.float64)
  if x.ndim not in (1, 2) or not x.size:
    raise errors.DataError(
      f'Scores have shape {x.shape}; expected [items] or [runs, items].'
    )
  if not np.isfinite(x).all():
    raise errors.DataError(
      f'{int((~np.isfinite(x)).sum())} scores are not finite.'
    )
  if clusters is not None and len(clusters) != x.shape[-1]:
    raise errors.DataError(f'{len(clusters)} clusters for {x.shape[-1]} items.')
  if not 0 < level < 1:
    raise errors.DataError(f'{level=}; expected a number in (0, 1).')
  return x.reshape(-1, x.shape[-1])


def _groups(clusters: Sequence[object] | None, count: int) -> np.ndarray:
  """[N] numbers of the clusters."""
  names = range(count) if clusters is None else clusters
  return np.unique(np.array([*map(str, names)]), return_inverse=True)[1]


def _is_binary(scores: np.ndarray) -> bool:
  return bool(np.isin(scores, (0, 1)).all())


def _of_answers(
  scores: np.ndarray, clusters: Sequence[object] | None, plain: Mean
) -> tuple[Mean, float]:
  """What is said of a difference of answers, and the least that would show.

  Args:
    scores: Differences, each -1, 0 or 1: [N] or [R, N].
    clusters: What items share.
    plain: Their mean.

  Returns:
    The mean with one cluster more in each direction if these are needed, which
    is always so for plain items of one run, and for others if few clusters
    differ; else `plain`.
  """
  x = scores.reshape(-1, scores.shape[-1])
  of = _groups(clusters, x.shape[1])
  differ = len(np.unique(of[np.any(x != 0, axis=0)]))
  is_plain = len(x) == 1 and plain.clusters == plain.items
  if not is_plain and differ >= _FEW:
    return plain, 0.0
  size = math.ceil(plain.items / plain.clusters)
  more = np.repeat([1.0, -1.0], size)
  names = np.repeat(plain.clusters + np.arange(2), size)
  found = mean(
    np.concatenate([x, np.tile(more, (len(x), 1))], axis=1),
    np.concatenate([of, names]).tolist(),
    level=plain.level,
  )
  # A share p of items that differ all in one direction shows if it is z times
  # its error, sqrt(p / n), from 0 (Connor, "Sample Size for Testing Differences
  # in Proportions for the Paired-Sample Design", Biometrics 1987).
  z = scipy.stats.norm.ppf([(1 + plain.level) / 2, _POWER]).sum()
  return (
    dataclasses.replace(
      found, low=max(found.low, -1.0), high=min(found.high, 1.0)
    ),
    z**2 / plain.clusters,
  )


def _two_way(
  sums: np.ndarray, error: float, freedom: float, level: float
) -> tuple[float, float]:
  """Standard error by clusters and runs, and freedom that fits both.

  Args:
    sums: [runs, clusters] of centred scores.
    error: By clusters alone.
    freedom: Of it.
    level: At which the half width is that of the two parts.
  """
  by_run, run_freedom = _one_way(sums.sum(axis=1))
  both, _ = _one_way(sums.ravel())
  shared = max(error**2 - both**2, 0.0)
  quantile = lambda f: float(scipy.special.stdtrit(f, (1 + level) / 2))
  half = math.hypot(
    quantile(freedom) * math.sqrt(shared), quantile(run_freedom) * by_run
  )
  # Neither alone may be undercut.
  if half <= quantile(freedom) * error:
    return error, freedom
  total = math.sqrt(shared + by_run**2)
  # Between the two, as the square of its quantile is a mean of theirs.
  ends = sorted((freedom, run_freedom))
  excess = lambda f: quantile(f) * total - half
  if excess(ends[0]) <= 0:
    return total, ends[0]
  if excess(ends[1]) >= 0:
    return total, ends[1]
  return total, float(scipy.optimize.brentq(excess, *ends))


def _one_way(sums: np.ndarray) -> tuple[float, float]:
  """Standard error of a mean, of sums of centred clusters; its freedom."""
  count = len(sums)
  if count < 2:
    return 0.0, 1.0
  variance = np.square(sums).sum() * count / (count - 1)
  # Of clusters of different weight, the larger ones count.
  fourth = np.square(np.square(sums)).sum()
  freedom = float(count - 1)
  if fourth > 0:
    effective = np.square(sums).sum() ** 2 / fourth
    # Kurtosis alone makes three of a normal distribution.
    freedom = float(np.clip(3 * effective - 1, 1.0, count - 1))
  return math.sqrt(variance), freedom
