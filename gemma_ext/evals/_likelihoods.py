# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""How likely a model finds texts after prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_ext.evals import _perplexity
from gemma_ext.evals import _progress
from gemma_ext.text import _prompt

# Tokens of a batch, at most, unless one text is longer.
_TOKENS = 2048

Row = tuple[Sequence[int], int]


def encode(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
  """Returns the ids of both, BOS first, and where those of the answer begin.

  A token may span the end of the prompt: it belongs to the answer.

  Args:
    tokenizer: The tokenizer.
    prompt: What comes first.
    answer: What is judged.
  """
  bos = int(tokenizer.special_tokens.BOS)
  first = [bos, *map(int, tokenizer.encode(prompt))]
  whole = [bos, *map(int, tokenizer.encode(prompt + answer))]
  start = next(
    (i for i, (a, b) in enumerate(zip(first, whole)) if a != b),
    min(len(first), len(whole)),
  )
  return whole, start


def score(
  model: Any,
  params: Mapping[str, Any],
  rows: Sequence[Row],
  *,
  progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Log-likelihoods of the ends of rows of tokens.

  Args:
    model: The model.
    params: Its parameters.
    rows: Token ids, and where the part begins that is judged.
    progress: Whether to show a bar.

  Returns:
    float64 [N] in nats; bool [N], whether every token was the likeliest.
  """
  sums, greedy = np.zeros(len(rows)), np.zeros(len(rows), bool)
  # Of like length, to compile and pad little.
  order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
  batches: list[list[int]] = []
  padded = 0
  for i in order:
    length = _prompt.bucket(len(rows[i][0]))
    if length != padded or len(batches[-1]) >= max(1, _TOKENS // length):
      batches.append([])
      padded = length
    batches[-1].append(i)
  for batch in _progress.track(batches, 'likelihoods', enabled=progress):
    length = _prompt.bucket(len(rows[batch[-1]][0]))
    size = max(1, _TOKENS // length)
    tokens = np.zeros((size, length), np.int32)
    mask = np.zeros((size, length), bool)
    for k, i in enumerate(batch):
      ids, start = rows[i]
      tokens[k, : len(ids)] = ids
      mask[k, start : len(ids)] = True
    nll, hits = _perplexity.batch_scores(params, tokens, mask, model=model)
    sums[batch] = -np.asarray(nll, np.float64).sum(-1)[: len(batch)]
    greedy[batch] = np.asarray(hits).all(-1)[: len(batch)]
  return sums, greedy
