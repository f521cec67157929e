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
from gemma_ext.evals import _perplexity
from gemma_ext.evals import _progress

_LEAST = 32
# Tokens of a batch, at most, unless one answer is longer.
_TOKENS = 2048


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
  for n, item in enumerate(items):
    prompt = [tokenizer.special_tokens.BOS, *tokenizer.encode(item.prompt)]
    for k, answer in enumerate(item.choices):
      whole = [
        tokenizer.special_tokens.BOS,
        *tokenizer.encode(item.prompt + answer),
      ]
      # A token may span the end of the prompt: it belongs to the answer.
      start = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b),
        min(len(prompt), len(whole)),
      )
      if start >= len(whole):
        raise errors.DataError(
          f'Answer {k} of item {item.id!r} adds no token to its prompt.'
        )
      rows.append((n, k, whole, start))
  found = [np.zeros(len(item.choices)) for item in items]
  # Of like length, to compile and pad little.
  rows.sort(key=lambda row: len(row[2]))
  batches = _batches(rows)
  for batch in _progress.track(batches, 'choices', enabled=progress):
    length = _bucket(len(batch[-1][2]))
    size = max(1, _TOKENS // length)
    tokens = np.zeros((size, length), np.int32)
    mask = np.zeros((size, length), bool)
    for i, (_, _, whole, start) in enumerate(batch):
      tokens[i, : len(whole)] = whole
      mask[i, start : len(whole)] = True
    # pylint: disable-next=protected-access
    nll = _perplexity._batch_nll(params, tokens, mask, model=model)
    sums = np.asarray(nll, np.float64).sum(-1)
    for (n, k, _, _), value in zip(batch, sums, strict=False):
      found[n][k] = -value
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


def _bucket(length: int) -> int:
  return max(_LEAST, 1 << (length - 1).bit_length())


def _batches(rows: list[Any]) -> list[list[Any]]:
  """Rows of one bucket of lengths, as many as a batch takes."""
  batches: list[list[Any]] = []
  for row in rows:
    bucket = _bucket(len(row[2]))
    last = batches[-1] if batches else []
    full = len(last) >= max(1, _TOKENS // bucket)
    if not last or full or _bucket(len(last[-1][2])) != bucket:
      batches.append([])
    batches[-1].append(row)
  return batches
