# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""New windows from old ones: the teacher rewrites some of their tokens.

A teacher can be asked about any text. Where there is little, the second epoch
teaches a student the answers of the first by heart; windows in which some words
are others that the teacher thinks likely ask it something new, and cost one of
its forward passes. Word replacement by a language model is how TinyBERT
augments its data (Jiao et al., arXiv 1909.10351); here the teacher itself is
that model.
"""

from __future__ import annotations

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from gemma_ext.train import _generate

_PAD, _BOS = 0, 2


@functools.partial(jax.jit, static_argnames=('model', 'share'))
def rewrite(
  params: Any,
  tokens: jax.Array,
  final: jax.Array,
  table: jax.Array,
  ids: jax.Array,
  key: jax.Array,
  *,
  model: nn.Module,
  share: float,
) -> tuple[jax.Array, jax.Array]:
  """Replaces tokens by samples of what the teacher expects at their place.

  Args:
    params: Parameters of the teacher.
    tokens: Windows, int32 `[B, L]`.
    final: Final hidden states of the teacher on them, `[B, L, D]`.
    table: Output embeddings of the tokens to choose from, `[S, D]`.
    ids: These tokens, int32 `[S]`.
    key: Source of randomness.
    model: The teacher.
    share: Share of tokens to draw anew; many are drawn as they were. Padding
      and the beginning of a window stay.

  Returns:
    The windows, and final hidden states of the teacher on them.
  """
  where, what = jax.random.split(key)
  logits = _generate.logits(
    final[:, :-1], table, model.config.final_logit_softcap
  )
  logits = jnp.where((ids == _PAD) | (ids == _BOS), -jnp.inf, logits)
  drawn = jnp.pad(ids[jax.random.categorical(what, logits)], ((0, 0), (1, 0)))
  chosen = jax.random.bernoulli(where, share, tokens.shape)
  chosen &= (tokens != _PAD) & (tokens != _BOS)
  chosen = chosen.at[:, 0].set(False)
  tokens = jnp.where(chosen, drawn.astype(tokens.dtype), tokens)
  out = model.apply({'params': params}, tokens, return_hidden_states=True)
  return tokens, out.hidden_states.astype(final.dtype)
