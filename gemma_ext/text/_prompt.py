# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""From a prompt to the state that decoding starts from.

Short texts: the official prefill, all at once. Texts past the window of the
sliding layers: caches that roll, and the prompt in pieces, so that neither
memory nor time of these layers grows with its square.
"""

from __future__ import annotations

import functools
from typing import Any

from flax import linen as nn
from gemma.gm.text import _prefill
from gemma.gm.text import _sampler_loop
from gemma.gm.utils import _cache_helper
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib

# Tokens of a piece of a long prompt.
PIECE = 512
# Sizes that shapes depend on are rounded up, to compile less often.
_LEAST = 32
_CACHE_STEP = 128


def rolling_model(model: nn.Module, *, length: int, step: int) -> Any:
  """Returns a model for a rolling cache; `None` where that saves nothing.

  Args:
    model: A model of any kind.
    length: Tokens of the prompt and the text.
    step: Tokens that a call brings and that may be taken back.
  """
  if not isinstance(model, gx_nn.Compressed):
    try:
      model = gx_nn.Compressed(model=model, recipe=recipe_lib.Recipe(rules=()))
    except errors.ParamsMismatchError:
      return None  # A wrapper such as LoRA, whose insides are its own.
  length = _cache_length(length)
  slots = gx_nn.slots_of(model, cache_length=length, step=step)
  return model if min(slots.values()) < length else None


def at_once(
  model: nn.Module,
  params: Any,
  inputs: Any,
  *,
  room: int,
  max_out_length: int,
  rng: jax.Array,
) -> _sampler_loop.SamplingState:
  """Returns the state after the official prefill.

  Args:
    model: The model.
    params: Its parameters.
    inputs: The prompt, as the official sampler has it, one sequence.
    room: Tokens of prompt and text.
    max_out_length: Tokens of the text.
    rng: Key of the sampling.
  """
  padded = bucket(inputs.length_with_mm)
  return _prefill.prefill(
    model=model,
    params=params,
    input=inputs,
    last_state=None,
    cache_length=_cache_length(max(padded, room)),
    pad_length=padded,
    max_out_length=max_out_length,
    rng=rng,
    sharding=None,
  )


def in_pieces(
  model: gx_nn.Compressed,
  params: Any,
  inputs: Any,
  *,
  room: int,
  step: int,
  max_out_length: int,
  rng: jax.Array,
) -> _sampler_loop.SamplingState:
  """Returns the state after a prefill with a cache that rolls.

  Args:
    model: What `rolling_model` returned.
    params: Its parameters.
    inputs: As for `at_once`.
    room: As for `at_once`.
    step: As for `rolling_model`.
    max_out_length: As for `at_once`.
    rng: As for `at_once`.
  """
  tokens = np.asarray(inputs.text)[0]
  length = len(tokens)
  total = _cache_length(room)
  cache = gx_nn.rolling_cache(
    model,
    cache_length=total,
    step=max(step, PIECE),
    dtype=jax.tree.leaves(params)[0].dtype,
  )
  for start in range(0, length, PIECE):
    piece = tokens[start : start + PIECE]
    padded = np.zeros((1, min(bucket(len(piece)), PIECE)), tokens.dtype)
    padded[0, : len(piece)] = piece
    cache = _fill(model, params, cache, padded, jnp.asarray(start), total=total)
  return state_after(tokens, cache, max_out_length=max_out_length, rng=rng)


def state_after(
  tokens: np.ndarray, cache: Any, *, max_out_length: int, rng: jax.Array
) -> _sampler_loop.SamplingState:
  """Returns the state that decoding starts from.

  Args:
    tokens: The prompt, `[n]`.
    cache: Keys and values of all of it.
    max_out_length: As for `at_once`.
    rng: As for `at_once`.
  """
  last = len(tokens) - 1
  total = max(layer['k'].shape[1] for layer in cache.values())
  return _sampler_loop.SamplingState(
    step=jnp.asarray(0),
    done=jnp.zeros((1,), jnp.bool_),
    # Decoding starts with the last token of the prompt, once more.
    last_token=jnp.asarray(tokens[last:]),
    last_token_pos=jnp.asarray([last]),
    predicted_tokens=jnp.zeros((1, max_out_length), jnp.int32),
    cache=_cache_helper.Cache(cache).set_end_index(last).cache,
    rng=rng,
    full_attention_mask=jnp.ones((1, total), jnp.bool_),
    init_cache_length=jnp.asarray(last),
  )


@functools.partial(
  jax.jit, static_argnames=('model', 'total'), donate_argnames='cache'
)
def _fill(
  model: nn.Module,
  params: Any,
  cache: Any,
  tokens: jax.Array,
  start: jax.Array,
  *,
  total: int,
) -> Any:
  """The cache with the keys and values of a piece `[1, T]` from `start` on."""
  positions = start + jnp.arange(tokens.shape[1])
  out = model.apply(
    {'params': params},
    tokens=tokens,
    cache=cache,
    positions=positions[None],
    attention_mask=jnp.arange(total) <= positions[None, :, None],
    return_last_only=True,
  )
  return out.cache


def bucket(length: int) -> int:
  """Returns the length that so many tokens are padded to.

  Args:
    length: At least 1.
  """
  return max(_LEAST, 1 << (length - 1).bit_length())


def _cache_length(length: int) -> int:
  return -(-length // _CACHE_STEP) * _CACHE_STEP
