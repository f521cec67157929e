# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of items, and what can be said of two models by them.

Everything is by paired differences with standard errors clustered by what items
share (a passage, a template), after Miller, "Adding Error Bars to Evals",
arXiv 2411.00640. Items of several runs (seeds) are clustered both ways, by item
and by run (Cameron, Gelbach and Miller, "Robust Inference with Multi-way
Clustering", 2011). Coverage is measured in `tests/evals/comparisons_test.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math

import numpy as np
import scipy.stats

from gemma_ext import errors

_POWER = 0.8


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
      a probability of 80%.
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
    `clusters`, and by runs where there are several.

  Raises:
    DataError: Shapes or values that make no sense.
  """
  x = _check(scores, clusters, level)
  runs, count = x.shape
  names = list(range(count)) if clusters is None else list(clusters)
  _, of = np.unique(np.asarray(list(map(str, names))), return_inverse=True)
  groups = int(of.max()) + 1
  value = float(x.mean())
  centred = x - value
  sums = np.stack([np.bincount(of, row, groups) for row in centred]) / x.size
  error, freedom = _one_way(sums.sum(axis=0))
  if runs > 1:
    by_run, run_freedom = _one_way(sums.sum(axis=1))
    both, _ = _one_way(sums.ravel())
    variance = error**2 + by_run**2 - both**2
    # Neither alone may be undercut, as the sum of three estimates can.
    error = math.sqrt(max(variance, error**2, by_run**2))
    if by_run > 0:
      # Welch and Satterthwaite, of the two.
      total = by_run**4 / run_freedom
      if freedom:
        total += max(error**2 - by_run**2, 0.0) ** 2 / freedom
      freedom = max(error**4 / total, 1.0)
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
  candidate, baseline = np.asarray(candidate), np.asarray(baseline)
  if candidate.shape[-1:] != baseline.shape[-1:]:
    raise errors.DataError(
      f'Scores of {candidate.shape} and {baseline.shape} items cannot be'
      ' paired.'
    )
  difference = mean(candidate - baseline, clusters, level=level)
  p_value, smallest = math.nan, math.nan
  if difference.clusters > 1:
    t = scipy.stats.t(difference.freedom)
    smallest = (t.ppf((1 + level) / 2) + t.ppf(_POWER)) * difference.error
    if difference.error > 0:
      p_value = float(2 * t.sf(abs(difference.value) / difference.error))
    else:
      p_value = float(difference.value == 0)
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
