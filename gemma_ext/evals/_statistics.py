# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Intervals of perplexity, and of a ratio of two perplexities.

A perplexity is exp(sum of nll / sum of tokens), a ratio of sums over documents
that differ in length, so plain percentile intervals are too narrow: with 10
documents of log-normal length they hold the truth 87% of the time instead of
95%, with 3 documents 74%; BCa is no better. What is used reaches from the lower
of two lower ends to the higher of two higher ones, since each is too narrow
where the other is not:

* The percentile interval of a bootstrap over units, its levels expanded as t
  quantiles are (Hesterberg, "What Teachers Should Know About the Bootstrap",
  arXiv 1411.5279, section 5.3). It follows skewed documents, but of few units a
  percentile is bounded by the most extreme of them.
* The t interval of the jackknife's standard error, which is that of residuals
  nll - ratio * tokens, each over the tokens that the others leave it (MacKinnon
  and White, "Some Heteroskedasticity-Consistent Covariance Matrix Estimators
  with Improved Finite Sample Properties", 1985, HC3).

Both take the effective number of units, (sum tokens)^2 / sum tokens^2 (Kish
1965), for their degrees of freedom. It holds the truth 93 to 97% of the time,
up to 98% of 3 to 20 documents of log-normal length; if means of documents are
strongly skewed (exponential) 92 to 95%.

The p-value of a ratio, and the smallest one that would have shown, are of the
jackknife's t test: 5% of p-values are below 0.05 where there is no difference.

Measured on equal, log-normal, correlated and skewed documents; `tests/evals/
statistics_test.py` repeats it. All is done on log perplexity.
"""

import dataclasses
import math

import numpy as np
import scipy.stats

from gemma_ext import errors

_METHOD = 'percentile bootstrap and jackknife t'
_POWER = 0.8
_CHUNK = 1 << 22  # Elements of the resampling matrix that are held at once.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
  """A statistic and its interval.

  Attributes:
    value: The statistic on all units.
    low: Lower end; NaN if there is only one unit.
    high: Upper end; NaN if there is only one unit.
    level: Nominal coverage.
    method: 'percentile bootstrap and jackknife t', or 'none'.
    units: Units that were resampled.
    error: The jackknife's standard error of the statistic's logarithm.
    freedom: Its degrees of freedom.
    p_value: Of a ratio: two-sided, that it is 1. NaN if there is only one unit.
  """

  value: float
  low: float
  high: float
  level: float
  method: str
  units: int
  error: float = math.nan
  freedom: float = math.nan
  p_value: float = math.nan

  @property
  def smallest(self) -> float:
    """The smallest ratio above 1 that as many units show 4 times of 5."""
    t = scipy.stats.t(self.freedom)
    return _exp((t.ppf((1 + self.level) / 2) + t.ppf(_POWER)) * self.error)


def bootstrap_ci(
  nll: np.ndarray,
  tokens: np.ndarray,
  *,
  level: float = 0.95,
  resamples: int = 10_000,
  seed: int = 0,
) -> Interval:
  """Perplexity exp(sum nll / sum tokens) and its interval.

  Of differences of `nll` it is the ratio of two perplexities.

  Args:
    nll: [N] sums of negative log-likelihoods in nats, one a document.
    tokens: [N] numbers of tokens, positive.
    level: Coverage, in (0, 1).
    resamples: Bootstrap resamples of the documents.
    seed: Seed of the resampling.

  Returns:
    Perplexity with interval. See the module for which, and what it covers.

  Raises:
    DataError: Empty, or shapes, values or level that make no sense.
  """
  nll = np.asarray(nll, np.float64)
  tokens = np.asarray(tokens, np.float64)
  if nll.ndim != 1 or nll.shape != tokens.shape or not nll.size:
    raise errors.DataError(
      'nll and tokens must be vectors of the same length, at least 1, got'
      f' {nll.shape} and {tokens.shape}.'
    )
  if not (np.isfinite(nll).all() and (tokens > 0).all()):
    raise errors.DataError(
      'nll must be finite and tokens positive, got'
      f' {int((~np.isfinite(nll)).sum())} nll that are not and'
      f' {int((~(tokens > 0)).sum())} tokens that are not.'
    )
  if not 0 < level < 1 or resamples < 100:
    raise errors.DataError(
      'level must be in (0, 1) and resamples at least 100, got'
      f' {level} and {resamples}.'
    )
  n = nll.size
  log_value = nll.sum() / tokens.sum()
  low = high = error = freedom = p_value = math.nan
  if n > 1:
    share = tokens / tokens.sum()
    effective = max(1 / np.square(share).sum(), 1.5)
    freedom = float(max(effective - 1, 1))
    # What the ratio would change by without a unit.
    moved = (nll - log_value * tokens) / tokens.sum() / (1 - share)
    error = math.sqrt(np.square(moved).sum() * (n - 1) / n)
    t = scipy.stats.t.ppf((1 + level) / 2, freedom)
    tail = scipy.stats.norm.cdf(-t * math.sqrt(effective / (effective - 1)))
    p_value = float(log_value == 0)
    if error > 0:
      p_value = float(2 * scipy.stats.t.sf(abs(log_value) / error, freedom))
    draws = _resample(nll, tokens, resamples, np.random.default_rng(seed))
    low, high = np.quantile(draws, [tail, 1 - tail])
    low = min(low, log_value - t * error)
    high = max(high, log_value + t * error)
  return Interval(
    value=_exp(log_value),
    low=_exp(low),
    high=_exp(high),
    level=level,
    method=_METHOD if n > 1 else 'none',
    units=n,
    error=error,
    freedom=freedom,
    p_value=p_value,
  )


def _resample(
  nll: np.ndarray,
  tokens: np.ndarray,
  resamples: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Returns [resamples] log perplexities of resampled documents."""
  n = nll.size
  sums = np.stack([nll, tokens], axis=1)
  chunk = max(_CHUNK // n, 1)
  out = []
  for start in range(0, resamples, chunk):
    size = min(chunk, resamples - start)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=size)
    drawn = counts.astype(np.float64) @ sums
    out.append(drawn[:, 0] / drawn[:, 1])
  return np.concatenate(out)


def _exp(x: float) -> float:
  # A broken model can have a perplexity beyond what float64 holds.
  return math.inf if x > 709 else math.exp(x)
