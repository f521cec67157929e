# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Multiple choice by the log-likelihood of the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from gemma_ext import errors
from gemma_ext.evals import _items
from gemma_ext.evals import _likelihoods


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ChoiceResult:
  """What a model chose.

  Attributes:
    correct: float64 [N]: 1 where the likeliest answer is right, its likelihood
      taken per byte.
    plain: float64 [N]: the same, of the whole answer.
    log_likelihoods: Nats of each answer, item by item.
  """

  correct: np.ndarray
  plain: np.ndarray
  log_likelihoods: tuple[np.ndarray, ...]


def multiple_choice(
  model: Any,
  params: Mapping[str, Any],
  tokenizer: Any,
  items: Sequence[_items.Choice],
  *,
  progress: bool = False,
) -> ChoiceResult:
  """Chooses the answers that a model finds likeliest after the prompt.

  Args:
    model: The model.
    params: Its parameters.
    tokenizer: Its tokenizer.
    items: The questions.
    progress: Whether to show a bar.

  Returns:
    Right or wrong by item. Likelihoods are taken per byte of the answer
    (`acc_norm` of lm-eval), so that long answers are not at a disadvantage.

  Raises:
    DataError: If there are no items, or an answer adds no token.
    NonFiniteError: If the model gives NaN.
  """
  if not items:
    raise errors.DataError('multiple_choice needs at least one item.')
  rows = []
  for item in items:
    for k, answer in enumerate(item.choices):
      whole, start = _likelihoods.encode(tokenizer, item.prompt, answer)
      if start >= len(whole):
        raise errors.DataError(
          f'Answer {k} of item {item.id!r} adds no token to its prompt.'
        )
      rows.append((whole, start))
  sums, _ = _likelihoods.score(model, params, rows, progress=progress)
  ends = np.cumsum([len(item.choices) for item in items])
  found = np.split(sums, ends[:-1])
  for item, values in zip(items, found, strict=True):
    if not np.isfinite(values).all():
      raise errors.NonFiniteError(
        f'The model gives log-likelihoods {values} for item {item.id!r}.'
      )
  answers = np.array([item.answer for item in items])
  per_byte = [
    values / [len(c.encode()) for c in item.choices]
    for item, values in zip(items, found, strict=True)
  ]
  best = lambda values: np.array([int(np.argmax(v)) for v in values])
  return ChoiceResult(
    correct=(best(per_byte) == answers).astype(np.float64),
    plain=(best(found) == answers).astype(np.float64),
    log_likelihoods=tuple(found),
  )
