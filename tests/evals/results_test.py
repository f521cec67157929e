# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of results, their JSON, and paired comparisons."""

import dataclasses
import json
import math

import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext import evals


def _result(**changes):
  fields = dict(
    window_nll=np.array([30.0, 10.0, 24.0]),
    window_tokens=np.array([10, 5, 9]),
    window_document=np.array([0, 0, 1]),
    documents=('a', 'b'),
    window=11,
    stride=10,
    seed=7,
    data_sha256='d' * 64,
    windows_sha256='w' * 64,
  )
  return evals.PerplexityResult(**(fields | changes))


def _many(rng, n=30):
  tokens = rng.integers(50, 500, n)
  return _result(
    window_nll=tokens * (2.7 + 0.35 * rng.standard_normal(n)),
    window_tokens=tokens,
    window_document=np.arange(n),
    documents=tuple(f'd{i}' for i in range(n)),
  )


def test_sums_per_document():
  result = _result()
  assert result.nll.tolist() == [40, 24]
  assert result.tokens.tolist() == [15, 9]
  assert result.tokens.dtype == np.int64
  assert result.num_tokens == 24
  assert result.perplexity == pytest.approx(math.exp(64 / 24))
  assert result.interval.units == 2


def test_json():
  # Documents of different means: without them there is no interval.
  result = _result(window_nll=np.array([30.0, 8.0, 26.0]))
  found = json.loads(json.dumps(result.to_json(), allow_nan=False))
  assert found['perplexity'] == pytest.approx(math.exp(64 / 24))
  assert found['ci95'][0] < found['perplexity'] < found['ci95'][1]
  assert found['ci_unit'] == 'document'
  assert (found['tokens'], found['documents'], found['windows']) == (24, 2, 3)
  assert (found['window'], found['stride'], found['seed']) == (11, 10, 7)
  assert found['data_sha256'] == 'd' * 64
  assert found['versions']['jax']
  # Core dependencies among them.
  wanted = {'gemma', 'gemma_ext', 'jaxlib', 'scipy', 'gguf'}
  assert set(found['versions']) >= wanted


def test_one_document_is_resampled_by_windows():
  result = _result(window_document=np.zeros(3, int), documents=('a',))
  assert result.interval.units == 3
  assert result.to_json()['ci_unit'] == 'window'


def test_one_window_has_no_interval():
  result = _result(
    window_nll=np.array([30.0]),
    window_tokens=np.array([10]),
    window_document=np.array([0]),
    documents=('a',),
  )
  assert result.to_json()['ci95'] == [None, None]
  assert result.to_json()['ci_method'] == 'none'


def test_infinite_perplexity_is_null():
  result = _result(window_nll=np.array([1e9, 1e9, 1e9]))
  assert result.to_json()['perplexity'] is None
  json.dumps(result.to_json(), allow_nan=False)


def test_package_that_is_not_installed(monkeypatch):
  monkeypatch.setattr(evals._results, '_PACKAGES', ('no_such_package',))
  monkeypatch.setattr(evals._results, '_OTHERS', ('nor_this_one',))
  assert evals.package_versions() == {
    'no_such_package': 'not installed as a package'
  }


def test_paired_ratio_is_narrower_than_either():
  rng = np.random.default_rng(0)
  base = _many(rng)
  noise = 0.01 * rng.standard_normal(30)
  worse = dataclasses.replace(
    base,
    window_nll=base.window_nll + base.window_tokens * (0.05 + noise),
  )
  ratio = evals.paired_ratio(worse, base)
  assert ratio.value == pytest.approx(worse.perplexity / base.perplexity)
  assert ratio.low < ratio.value < ratio.high
  assert ratio.value == pytest.approx(math.exp(0.05), rel=0.01)
  low, high = base.ci95
  assert math.log(ratio.high / ratio.low) < 0.1 * math.log(high / low)
  back = evals.paired_ratio(base, worse)
  assert back.value == pytest.approx(1 / ratio.value)
  found = evals.paired_json(ratio)
  assert found['ci95'] == [ratio.low, ratio.high]
  assert found['ratio'] == ratio.value


def test_ratio_to_itself_is_exactly_one():
  base = _many(np.random.default_rng(0))
  ratio = evals.paired_ratio(base, base)
  assert (ratio.low, ratio.value, ratio.high) == (1, 1, 1)


def test_paired_ratio_covers():
  rng = np.random.default_rng(0)
  held = 0
  for seed in range(300):
    base = _many(rng, 19)
    delta = base.window_tokens * (0.05 + 0.02 * rng.standard_normal(19))
    worse = dataclasses.replace(base, window_nll=base.window_nll + delta)
    ratio = evals.paired_ratio(worse, base, resamples=500, seed=seed)
    held += ratio.low <= math.exp(0.05) <= ratio.high
  assert 0.925 <= held / 300 <= 0.985


def test_paired_ratio_needs_the_same_tokens():
  base = _result()
  with pytest.raises(errors.DataError, match='the documents differ'):
    evals.paired_ratio(
      _result(data_sha256='e' * 64, windows_sha256='x' * 64), base
    )
  with pytest.raises(errors.DataError, match='the tokens or windows differ'):
    evals.paired_ratio(_result(windows_sha256='x' * 64), base)


def test_scores_come_back_from_json():
  result = _many(np.random.default_rng(0))
  text = json.dumps(
    result.to_json() | {'scores': result.scores_json()}, allow_nan=False
  )
  back = evals.PerplexityResult.from_json(json.loads(text))
  assert back.to_json() == result.to_json()
  assert back.documents == result.documents
  assert evals.paired_ratio(back, result).value == 1
  other = dataclasses.replace(result, window_nll=1.1 * result.window_nll)
  assert evals.paired_ratio(other, back) == evals.paired_ratio(other, result)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'scores': None}, 'Not the JSON'),
    ({'stride': None}, 'Not the JSON'),
    ({'nll': [1.0, 2.0]}, '2 nll, 3 tokens and 3 documents of 2'),
    ({'nll': [1.0, 'x', 2.0]}, 'Not the JSON'),
    ({'nll': [1.0, None, 2.0]}, 'Not the JSON'),
    ({'nll': [1.0, np.nan, 2.0]}, 'finite'),
    ({'document': [0, 0, 2]}, 'in range'),
    ({'document': [0, -1, 1]}, 'in range'),
    ({'tokens': [10, -5, 9]}, 'in range'),
    ({'tokens': [10, 1e300, 9]}, 'Not the JSON'),
    ({'ids': []}, 'in range'),
    ({'nll': [], 'tokens': [], 'document': []}, '0 nll'),
  ],
)
def test_json_that_is_no_result(change, message):
  result = _result()
  scores = result.scores_json()
  value = result.to_json() | {'scores': scores}
  for name, new in change.items():
    (scores if name in scores else value)[name] = new
  with pytest.raises(errors.DataError, match=message):
    evals.PerplexityResult.from_json(value)


def test_json_without_a_key():
  for value in ({}, [], None, 3, _result().to_json()):
    with pytest.raises(errors.DataError, match='Not the JSON'):
      evals.PerplexityResult.from_json(value)
