# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a model on windows of tokens."""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import data
from gemma_ext import errors
from gemma_ext.evals import _progress
from gemma_ext.evals import _results

# Positions whose log-softmax is in float32 at a time.
_CHUNK = 64


def perplexity(
  model: Any,
  params: Mapping[str, Any],
  windows: data.Windows,
  *,
  batch_size: int = 1,
  seed: int = 0,
  progress: bool = False,
) -> _results.PerplexityResult:
  """Negative log-likelihoods of the scored tokens of every window.

  Compiled once per model and shape; the last batch is filled up with a window
  that is not counted. Beyond the logits of one batch in the model's own type,
  memory is a few positions of float32 logits.

  Args:
    model: A `gm.nn` transformer or anything applied like one: `Compressed`,
      `gm.nn.LoRA`.
    params: Its parameters.
    windows: See `data.windows`.
    batch_size: Windows at once.
    seed: Seed of the bootstrap, recorded in the result.
    progress: Whether to show a bar with the time left, on stderr.

  Returns:
    Sums in float64 with tokens, per window.

  Raises:
    DataError: No windows, `batch_size` below 1, or ids beyond the vocabulary.
    NonFiniteError: The model gives NaN or infinity; says where first.
  """
  if not len(windows) or batch_size < 1:
    raise errors.DataError(
      'perplexity needs at least one window and a batch_size of at least 1,'
      f' got {len(windows)} windows and {batch_size}.'
    )
  vocab_size = _vocab_size(model)
  if vocab_size is not None and windows.tokens.max() >= vocab_size:
    raise errors.DataError(
      f'The text has token id {windows.tokens.max()}, but the model knows'
      f' only {vocab_size}. Tokenizer and model do not belong together.'
    )
  score = functools.partial(_batch_nll, model=model)
  sums = []
  starts = range(0, len(windows), batch_size)
  for start in _progress.track(starts, 'perplexity', enabled=progress):
    tokens = windows.tokens[start : start + batch_size]
    mask = windows.score_mask[start : start + batch_size]
    if missing := batch_size - len(tokens):
      tokens = np.pad(tokens, ((0, missing), (0, 0)), mode='edge')
      mask = np.pad(mask, ((0, missing), (0, 0)))
    nll = np.asarray(score(params, tokens, mask), np.float64)
    if not np.isfinite(nll[mask]).all():
      row, column = np.argwhere(mask & ~np.isfinite(nll))[0]
      name = windows.ids[windows.document[start + row]]
      raise errors.NonFiniteError(
        f'The model gives a log-likelihood of {-nll[row, column]} for token'
        f' {column} of window {start + row} (document {name!r}). Its weights'
        ' or scales are damaged, or --dtype cannot hold its activations.'
      )
    sums.append(np.where(mask, nll, 0).sum(-1))
  return _results.PerplexityResult(
    window_nll=np.concatenate(sums)[: len(windows)],
    window_tokens=windows.score_mask.sum(-1),
    window_document=windows.document,
    documents=windows.ids,
    window=windows.length,
    stride=windows.stride,
    seed=seed,
    data_sha256=windows.data_sha256,
    windows_sha256=windows.sha256,
  )


def _vocab_size(model: Any) -> int | None:
  """Size of the vocabulary, where the model (or what it wraps) says so."""
  while not hasattr(model, 'config') and hasattr(model, 'model'):
    model = model.model
  return getattr(getattr(model, 'config', None), 'num_embed', None)


@functools.partial(jax.jit, static_argnames='model')
def _batch_nll(
  params: Mapping[str, Any],
  tokens: jax.Array,
  mask: jax.Array,
  *,
  model: Any,
) -> jax.Array:
  """Returns float32 [B, L]: each token's -log p given those before it."""
  return _scores(model, params, tokens, mask)[0]


@functools.partial(jax.jit, static_argnames='model')
def batch_scores(
  params: Mapping[str, Any],
  tokens: jax.Array,
  mask: jax.Array,
  *,
  model: Any,
) -> tuple[jax.Array, jax.Array]:
  """Each token's -log p given those before it, and whether it is the likeliest.

  Args:
    params: Parameters of the model.
    tokens: int32 [B, L].
    mask: bool [B, L], the tokens that count.
    model: The model.

  Returns:
    float32 [B, L], 0 where the mask is not; bool [B, L], true there.
  """
  nll, greedy = _scores(model, params, tokens, mask)
  return nll, greedy | ~mask


def _scores(
  model: Any, params: Mapping[str, Any], tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """As `batch_scores`.

  Padding is at the end, so no token that is scored attends to it.
  """
  logits = model.apply({'params': params}, tokens).logits  # [B, L, V]
  batch, length = tokens.shape
  # The logits at position i predict token i + 1; the last predict nothing.
  targets = jnp.roll(tokens, -1, axis=1).reshape(-1)
  flat = logits.reshape(batch * length, -1)
  size = min(_CHUNK, batch * length)
  starts = jnp.arange(0, batch * length, size)

  def chunk(start: jax.Array) -> tuple[jax.Array, jax.Array]:
    # `dynamic_slice` moves a start back that would pass the end, so the last
    # chunk may overlap the one before it. That is undone below.
    part = jax.lax.dynamic_slice_in_dim(flat, start, size)
    target = jax.lax.dynamic_slice_in_dim(targets, start, size)
    part = part.astype(jnp.float32)
    chosen = jnp.take_along_axis(part, target[:, None], axis=1)[:, 0]
    nll = jax.nn.logsumexp(part, axis=1) - chosen
    return nll, chosen >= part.max(axis=1)

  tail = batch * length - starts[-1]

  def joined(parts: jax.Array) -> jax.Array:  # [chunks, size]
    last = jnp.roll(parts[-1], tail)
    whole = jnp.concatenate([parts[:-1].reshape(-1), last])
    return jnp.roll(whole[: batch * length].reshape(batch, length), 1, axis=1)

  nll, greedy = map(joined, jax.lax.map(chunk, starts))
  return jnp.where(mask, nll, 0), greedy
