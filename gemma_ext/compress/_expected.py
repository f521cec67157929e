# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""How often tokens are to be expected, also those that never were counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.ndimage
import scipy.optimize
import scipy.special

# Shares of what was counted, of tokens whose rows are like those of tokens that
# came, and of tokens with numbers near by.
_COUNTED = 0.4
_ALIKE = 0.4
_NEARBY = 0.2
# Numbers that are near by, and what all of them have, of the mean.
_NEAR = 8192
_ANY = 0.01
# Columns that rows are compared in, at most, and rows taken at once.
_COLS = 640
_CHUNK = 16_384
_RIDGE = 1e-4
_STEPS = 40


def expected(counts: np.ndarray, table: Any) -> np.ndarray:
  """Returns how often each token is to be expected, of all that come.

  Of a vocabulary most tokens never come in a text of a million, and one token
  of twenty of the next text is one of those. Which ones is known in part: a
  text is of some languages and subjects, and rows of the table tell these
  apart; a logistic regression on the rows says how likely a token like this one
  has come. Other texts are of other languages, where tokenizers still number
  frequent tokens first.

  Args:
    counts: How often each token came, `[V]`.
    table: Rows of the tokens, `[V, D]`.

  Returns:
    float64 `[V]`, with a sum of one.
  """
  counts = np.asarray(counts, np.float64)
  near = scipy.ndimage.uniform_filter1d(
    counts, min(_NEAR, len(counts)), mode='reflect'
  )
  parts = (
    (_COUNTED, counts),
    (_ALIKE, _alike(counts > 0, table)),
    (_NEARBY, np.sqrt(near + _ANY * np.mean(counts))),
  )
  found = sum(share * part / part.sum() for share, part in parts)
  return found / found.sum()


def _alike(seen: np.ndarray, table: Any) -> np.ndarray:
  """How often tokens come whose rows are like this one's, in some unit."""
  if seen.all() or not seen.any():
    return np.ones(len(seen))
  features = _features(table)
  truth = seen.astype(np.float64)

  def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
    logits = _logits(features, weights)
    slopes = scipy.special.expit(logits) - truth
    found = np.mean(np.logaddexp(0, logits) - truth * logits)
    back = features.T @ (slopes / len(slopes)).astype(np.float32)
    ridge = _RIDGE * weights[:-1]
    return (
      float(found + 0.5 * ridge @ weights[:-1]),
      np.append(back.astype(np.float64) + ridge, np.mean(slopes)),
    )

  start = np.zeros(features.shape[1] + 1)
  start[-1] = scipy.special.logit(np.mean(truth))
  best = scipy.optimize.minimize(
    loss, start, jac=True, method='L-BFGS-B', options={'maxiter': _STEPS}
  )
  # Came at all with 1 - exp(-rate).
  return np.logaddexp(0, _logits(features, best.x))


def _logits(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
  return features @ weights[:-1].astype(np.float32) + weights[-1]


def _features(table: Any) -> np.ndarray:
  """Directions of rows from their mean, and their lengths, `[V, n]`."""
  count, width = table.shape
  cols = min(width, _COLS)
  chunks = [slice(i, i + _CHUNK) for i in range(0, count, _CHUNK)]
  rows = lambda part: np.asarray(table[part], np.float32)
  center = sum(rows(part).sum(0, dtype=np.float64) for part in chunks) / count
  turn = None
  if cols < width:
    rng = np.random.default_rng(0)
    turn = rng.standard_normal((width, cols), np.float32)
  found = np.empty((count, cols + 1), np.float32)
  for part in chunks:
    x = rows(part) - center.astype(np.float32)
    if turn is not None:
      x = x @ turn
    length = np.maximum(np.linalg.norm(x, axis=1), 1e-30)
    found[part, :cols] = x * (np.sqrt(cols) / length)[:, None]
    found[part, cols] = np.log(length)
  last = found[:, cols]
  last -= last.mean(dtype=np.float64)
  last /= last.std(dtype=np.float64) + 1e-6
  return found
