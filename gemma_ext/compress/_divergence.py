# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""How far the predictions of a compressed model are from the dense one's."""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from gemma_ext import nn as gx_nn
from gemma_ext.compress import _calibrate

# Positions whose probabilities are in float32 at a time.
_CHUNK = 64


def divergence(
  model: nn.Module,
  params: Mapping[str, Any],
  other: nn.Module,
  other_params: Mapping[str, Any],
  tokens: Any,
  *,
  progress: bool = False,
) -> float:
  """Mean of KL(model || other) of the next token, nats a token.

  Computed in float32: two correct ways to compute a model in bfloat16 differ by
  0.002 nats themselves, as much as many a compression costs.

  Args:
    model: The dense model.
    params: Its parameters.
    other: The compressed one.
    other_params: Its parameters.
    tokens: Token ids `[batch, length]`, padded with 0. What follows padding or
      BOS does not count.
    progress: Whether to show a progress bar.

  Raises:
    ShapeError: If `tokens` is not a non-empty integer matrix.
  """
  nats, counts = divergences(
    model, params, other, other_params, tokens, progress=progress
  )
  return float(nats.sum() / max(counts.sum(), 1.0))


def divergences(
  model: nn.Module,
  params: Mapping[str, Any],
  other: nn.Module,
  other_params: Mapping[str, Any],
  tokens: Any,
  *,
  targets: Any = None,
  progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Sums of KL(model || other) by window; see `divergence`.

  Args:
    model: The dense model.
    params: Its parameters.
    other: The compressed one.
    other_params: Its parameters.
    tokens: Token ids `[batch, length]`, padded with 0.
    targets: bool `[batch, length]`: the tokens whose predictions count; by
      default all that follow neither padding nor BOS.
    progress: Whether to show a progress bar.

  Returns:
    Nats and numbers of predictions, float64 `[batch]`.

  Raises:
    ShapeError: If `tokens` is not a non-empty integer matrix.
  """
  nats, counts = divergences_of_many(
    model,
    params,
    other,
    {'': other_params},
    tokens,
    targets=targets,
    progress='divergence' if progress else '',
  )
  return nats[''], counts


def divergences_of_many(
  model: nn.Module,
  params: Mapping[str, Any],
  other: nn.Module,
  others: Mapping[str, Mapping[str, Any]],
  tokens: Any,
  *,
  targets: Any = None,
  progress: str = '',
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """`divergences` of several sets of parameters from the same model.

  Args:
    model: The dense model, which runs once a window.
    params: Its parameters.
    other: The compressed one.
    others: Its parameters, by name.
    tokens: Token ids `[batch, length]`, padded with 0.
    targets: See `divergences`.
    progress: What a progress bar says; none if empty.

  Returns:
    Nats by name, and numbers of predictions, float64 `[batch]` each.

  Raises:
    ShapeError: If `tokens` is not a non-empty integer matrix.
  """
  tokens = _calibrate.check_tokens(tokens)
  if targets is None:
    mask = (tokens != _calibrate.PAD) & (tokens != _calibrate.BOS)
  else:
    mask = np.pad(np.asarray(targets, bool)[:, 1:], ((0, 0), (0, 1)))
  nats = {name: np.zeros(len(tokens)) for name in others}
  bar = tqdm.tqdm(
    total=len(tokens) * len(others),
    desc=progress,
    unit='window',
    disable=not progress,
  )
  with bar:
    for i, (window, counted) in enumerate(zip(tokens, mask, strict=True)):
      window, counted = jnp.asarray(window[None]), jnp.asarray(counted[None])
      base = _logits(model, params, window)
      for name, each in others.items():
        logits = base, _logits(other, each, window)
        nats[name][i] = float(_divergence(*logits, counted))
        bar.update()
  return nats, mask.sum(axis=1).astype(np.float64)


def _wide(
  model: nn.Module, params: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
  """The model in float32; packed weights and their scales stay as stored."""
  packed: set[str] = set()
  if isinstance(model, gx_nn.Compressed):
    inner = model.model.clone(dtype=jnp.float32)
    packed = {*gx_nn.methods_of(model.model, model.recipe)}
    model = model.clone(model=inner)
  elif hasattr(model, 'dtype'):
    model = model.clone(dtype=jnp.float32)
  flat = {
    path: leaf.astype(jnp.float32)
    if leaf.dtype == jnp.bfloat16 and path.rpartition('/')[0] not in packed
    else leaf
    for path, leaf in traverse_util.flatten_dict(dict(params), sep='/').items()
  }
  return model, traverse_util.unflatten_dict(flat, sep='/')


@functools.partial(jax.jit, static_argnames='model')
def _logits(model, params, tokens):
  # Here, so that no second copy of all weights is in memory.
  model, params = _wide(model, params)
  return model.apply({'params': params}, tokens).logits[0]


@jax.jit
def _divergence(p, q, mask):
  """Sum of divergences of [L, V] logits, some rows at a time."""
  length, vocab = p.shape
  pad = -length % _CHUNK
  rows = lambda x: jnp.pad(x, ((0, pad), (0, 0))).reshape(-1, _CHUNK, vocab)
  mask = jnp.pad(mask[0], (0, pad)).reshape(-1, _CHUNK)

  def body(total, part):
    p, q, mask = part
    log_p = jax.nn.log_softmax(p.astype(jnp.float32))
    log_q = jax.nn.log_softmax(q.astype(jnp.float32))
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return total + jnp.sum(jnp.where(mask, kl, 0)), None

  return jax.lax.scan(body, jnp.float32(0), (rows(p), rows(q), mask))[0]
