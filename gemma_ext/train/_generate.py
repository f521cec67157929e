# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Text that a model writes: within a compiled step, or to learn from."""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

_PAD = 0


def logits(hidden: jax.Array, table: jax.Array, cap: float | None) -> jax.Array:
  """Logits of some tokens: float32 `[..., S]`.

  Args:
    hidden: Final hidden states `[..., D]`.
    table: Output embeddings of the tokens, `[S, D]`.
    cap: Soft cap of the final logits, if the model has one.
  """
  out = jnp.einsum(
    '...d,sd->...s',
    hidden.astype(table.dtype),
    table,
    preferred_element_type=jnp.float32,
  )
  return out if cap is None else jnp.tanh(out / cap) * cap


def generate(
  model: nn.Module,
  params: Mapping[str, Any],
  prompts: jax.Array,
  key: jax.Array,
  *,
  max_new_tokens: int,
  temperature: float,
  end_tokens: tuple[int, ...] = (),
  shortlist: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
  """Goes on from prompts; traceable, of fixed length, and maps over `params`.

  Args:
    model: The model.
    params: Its parameters.
    prompts: Token ids `[B, L]`, padded with 0 at the end.
    key: Of the sampling.
    max_new_tokens: Length of the answers.
    temperature: 0 takes the likeliest token.
    end_tokens: What comes after one of these is padding.
    shortlist: Token ids int32 `[S]` and their output embeddings `[S, D]`, if
      only these may be written. Of the output head, most of the work of a small
      model, no more than that is computed.

  Returns:
    Token ids `[B, max_new_tokens]`.
  """
  rows, length = prompts.shape
  slots = length + max_new_tokens
  cache = model.init_cache(
    batch_size=rows, dtype=model.dtype, cache_length=slots
  )
  real = prompts != _PAD
  count = jnp.sum(real, axis=-1)
  # Slots of padding are never looked at; answers come after them.
  seen = jnp.pad(real, ((0, 0), (0, max_new_tokens)), constant_values=True)
  slot = jnp.arange(slots)
  causal = slot[None, :] <= jnp.arange(length)[:, None]
  forward = functools.partial(
    model.apply,
    {'params': params},
    return_last_only=True,
    return_hidden_states=shortlist is not None,
  )
  out = forward(
    prompts,
    cache=cache,
    positions=jnp.where(real, jnp.arange(length), 0),
    attention_mask=causal[None] & seen[:, None, :],
  )

  def choose(out: Any, index: Any) -> jax.Array:
    if shortlist is None:
      scores = out.logits.reshape(rows, -1).astype(jnp.float32)
    else:
      hidden = out.hidden_states.reshape(rows, -1)
      scores = logits(hidden, shortlist[1], model.config.final_logit_softcap)
    if not temperature:
      found = jnp.argmax(scores, axis=-1)
    else:
      source = jax.random.fold_in(key, index)
      found = jax.random.categorical(source, scores / temperature)
    found = found.astype(jnp.int32)
    return found if shortlist is None else shortlist[0][found]

  ends = jnp.asarray(end_tokens, jnp.int32)

  def step(carry: Any, index: jax.Array) -> tuple[Any, jax.Array]:
    cache, token, done = carry
    out = forward(
      token[:, None],
      cache=cache,
      positions=(count + index)[:, None],
      attention_mask=(seen & (slot <= length + index))[:, None, :],
    )
    following = choose(out, index + 1)
    following = jnp.where(done, _PAD, following)
    return (out.cache, following, done | jnp.isin(following, ends)), following

  first = choose(out, 0)
  carry = (out.cache, first, jnp.isin(first, ends))
  _, others = jax.lax.scan(step, carry, jnp.arange(max_new_tokens - 1))
  return jnp.concatenate([first[:, None], others.T], axis=-1)
