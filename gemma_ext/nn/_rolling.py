# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Caches of sliding-window layers that keep a window and no more.

The official caches have as many slots as there will be tokens, in every layer.
Here token i of a sliding layer lies in slot `i % slots`, where the token that
it replaces is out of every window. Masks still have one entry a token, from the
first on; what a slot holds follows from the index of the last token.

One sequence whose padding is at its end: positions and indices are the same.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import linen as nn
from gemma.gm.nn import _modules as gemma_modules
from gemma.gm.nn.gemma4 import _modules as gemma4_modules
import jax
import jax.numpy as jnp

from gemma_ext import errors

_LINEAR = gemma_modules.Attention
ATTENTIONS = (_LINEAR, gemma4_modules.Attention)
SLIDING = 'LOCAL_SLIDING'
# Slots are a multiple of so many.
_STEP = 64

_Cache = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """Arguments of an official attention module."""

  x: jax.Array
  segment_pos: jax.Array
  cache: Any
  attn_mask: jax.Array
  kv_shared_cache: Any = None

  @classmethod
  def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Returns arguments that were given by place or name."""
    names = (f.name for f in dataclasses.fields(cls))
    return cls(**dict(zip(names, args, strict=False)), **kwargs)

  @property
  def kwargs(self) -> dict[str, Any]:
    """The arguments that were given, by name."""
    values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    if self.kv_shared_cache is None:
      del values['kv_shared_cache']
    return values

  @property
  def rolls(self) -> bool:
    """Whether the cache has fewer slots than the mask has tokens."""
    cache = self.kv_shared_cache or self.cache
    return bool(cache) and cache['k'].shape[1] < self.attn_mask.shape[-1]


def rolling_cache(
  model: nn.Module,
  *,
  cache_length: int,
  step: int,
  dtype: Any,
) -> _Cache:
  """Initialises the cache of one sequence; sliding layers keep their window.

  Args:
    model: A `Compressed` model (an empty recipe will do). Layers of families
      whose attention is not known here get a slot for every token.
    cache_length: Tokens that there will be.
    step: Tokens that one call may bring at most, with those that an earlier
      call brought and that are taken back.
    dtype: Type of keys and values.

  Returns:
    The cache, as `model.init_cache` makes it, of zeros.

  Raises:
    ShapeError: If a size is not positive.
  """
  if min(cache_length, step) < 1:
    raise errors.ShapeError(
      f'{cache_length=}, {step=}; expected positive numbers.'
    )
  full = jax.eval_shape(
    lambda: model.init_cache(
      batch_size=1, dtype=dtype, cache_length=cache_length
    )
  )
  slots = slots_of(model, cache_length=cache_length, step=step)
  return {
    name: {
      key: jnp.zeros(
        leaf.shape
        if leaf.ndim == 1
        else (leaf.shape[0], slots[name], *leaf.shape[2:]),
        leaf.dtype,
      )
      for key, leaf in layer.items()
    }
    for name, layer in full.items()
  }


def slots_of(
  model: nn.Module, *, cache_length: int, step: int
) -> dict[str, int]:
  """Returns the slots of every layer; arguments as for `rolling_cache`."""
  config = model.config
  window = getattr(config, 'sliding_window_size', None)
  slots = {}
  for i, kind in enumerate(config.attention_types):
    most = cache_length
    if window and kind.name == SLIDING and _known(kind):
      most = min(most, -(-(window + step) // _STEP) * _STEP)
    slots[f'layer_{i}'] = most
  return slots


def _known(kind: Any) -> bool:
  """Whether it is the type of a module that `attend` serves."""
  return isinstance(
    kind, (gemma_modules.AttentionType, gemma4_modules.AttentionType)
  )


def attend(
  official: Callable[..., Any], module: Any, call: Call
) -> tuple[dict[str, jax.Array], jax.Array]:
  """`__call__` of an official attention module whose cache rolls.

  Args:
    official: The official code, or what stands in for it, by name.
    module: The bound module.
    call: Its arguments; the mask `[1, T, S]` has all S tokens.

  Returns:
    The cache after these tokens, and the output `[1, T, D]`.

  Raises:
    ShapeError: If there is more than one sequence, or the cache has not one
      slot for every token of the window and of this call.
  """
  window = module.sliding_window_size
  cache = call.kv_shared_cache or call.cache
  tokens, slots = call.x.shape[1], cache['k'].shape[1]
  if call.x.shape[0] != 1 or not window or slots < window + tokens - 1:
    raise errors.ShapeError(
      f'A cache of {slots} slots for {call.attn_mask.shape[-1]} tokens, in'
      f' {call.x.shape[0]} sequences, {tokens} of them new, with a window of'
      f' {window}; expected one sequence, and slots for its window and the new'
      ' tokens, or for all tokens.'
    )
  # Index of the first new token.
  start = cache['end_index'][0]
  if call.kv_shared_cache is not None:
    start = start - tokens
  last = start + tokens - 1
  if isinstance(module, _LINEAR) and tokens > 1:
    return _unrolled(official, call, start, window)
  index = last - (last - jnp.arange(slots)) % slots
  call = dataclasses.replace(
    call, attn_mask=_seen(call.attn_mask, index, start, window)
  )
  return official(**call.kwargs)


def _seen(
  mask: jax.Array, index: jax.Array, start: jax.Array, window: int
) -> jax.Array:
  """Mask `[1, T, S']` of slots that hold tokens of these indices `[S']`.

  A token that was taken back lies where an older one should: out of every
  window, which only its index tells, not the position that its slot has.
  """
  own = start + jnp.arange(mask.shape[1])[:, None]
  seen = (index >= 0) & (index > own - window) & (index <= own)
  return mask[..., jnp.clip(index, 0, mask.shape[-1] - 1)].astype(bool) & seen


def _unrolled(
  official: Callable[..., Any], call: Call, start: jax.Array, window: int
) -> tuple[dict[str, jax.Array], jax.Array]:
  """As `attend`, for code that writes new tokens side by side.

  It gets the window before them and room for them, in order.
  """
  cache, tokens = call.cache, call.x.shape[1]
  slots = cache['k'].shape[1]
  # Indices of the tokens before; those below zero are masked.
  index = start - window + jnp.arange(window + tokens)
  before = index[:window] % slots
  # Where they are to be kept.
  written = (start + jnp.arange(tokens)) % slots
  view = {
    key: jnp.pad(
      cache[key][:, before],
      [(0, 0), (0, tokens)] + [(0, 0)] * (cache[key].ndim - 2),
    )
    for key in ('k', 'v', 'positions')
  }
  view['end_index'] = jnp.full_like(cache['end_index'], window)
  mask = _seen(call.attn_mask, index, start, window)
  new, y = official(
    **dataclasses.replace(call, cache=view, attn_mask=mask).kwargs
  )
  rolled = {
    key: cache[key].at[:, written].set(new[key][:, window:])
    for key in view
    if key != 'end_index'
  }
  return rolled | {'end_index': cache['end_index'] + tokens}, y
