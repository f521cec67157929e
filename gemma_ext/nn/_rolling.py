# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rolling caches: local layers keep no more keys than their window reaches.

The official cache gives every layer room for the whole context. Here only the
global layers have that. A local layer has `window + spare` entries; the oldest
gives way to the newest. Layers that reuse the keys of another have none.

The official attention computes on as before: it is given a cache of that size,
and of the mask the columns of the slots that its entries would have in a
full-length cache. So what it attends to is what it would attend to there, and
results differ by the order of sums alone, as long as

- a row has at most `spare` entries that repeat a position inside a window. The
  official samplers repeat up to two positions a turn.
- at most `spare - 1` tokens are taken back (by a smaller `end_index`).
- a column that no token of a call of several tokens attends to is not attended
  to later, unless it is written anew. Padding is such a column.

`context` is an entry of the cache that is no layer: its keys have the length
of the context and no size, which is where the official samplers look for it
(in the entry that comes first by name), and its positions are those of the
entries of all rolling layers, with their slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

from flax import linen as nn
from gemma.gm.nn import _modules as gemma_modules
from gemma.gm.nn.gemma3n import _config as gemma3n_config
from gemma.gm.nn.gemma3n import _modules as gemma3n_modules
from gemma.gm.nn.gemma4 import _config as gemma4_config
from gemma.gm.nn.gemma4 import _modules as gemma4_modules
import jax
import jax.numpy as jnp
from kauldron import kd
from kauldron import kontext

from gemma_ext import errors
from gemma_ext.nn import _scopes

CONTEXT = 'context'
SPARE = 64

_ATTENTIONS = (
  gemma_modules.Attention,
  gemma3n_modules.Attention,
  gemma4_modules.Attention,
)

_Layer = dict[str, Any]
_Cache = dict[str, _Layer]
_Attend = Callable[..., tuple[_Layer, jax.Array]]


class RollingCache(nn.Module):
  """A Gemma model whose local layers have rolling caches.

  For models that are not compressed: `Compressed` has them itself. Parameters,
  arguments and outputs are those of the model, the cache excepted, which the
  official samplers handle like any other.

  Attributes:
    model: An official model of any family, or a wrapper around one.
    spare: Entries of a local layer beyond its window.
  """

  _: dataclasses.KW_ONLY

  model: nn.Module
  spare: int = SPARE

  def __post_init__(self):
    if type(self.spare) is not int or self.spare < 1:
      raise errors.RecipeError(
        f'RollingCache.spare must be a positive integer, got {self.spare!r}.'
      )
    super().__post_init__()
    _scopes.share(self)

  @nn.compact
  def __call__(self, *args, **kwargs):
    """Calls the model. Arguments and outputs are those of the model."""
    _scopes.share(self)
    return call(self.model, *args, **kwargs)

  def init_cache(self, **kwargs: Any) -> Any:
    """Initialises the cache. Arguments are those of the model."""
    return init_cache(self.model, spare=self.spare, **kwargs)

  def __kontext_keys__(self) -> dict[str, str]:
    """Keys of the wrapped model, for kauldron configs."""
    return kontext.get_keypaths(self.model)

  def __getattr__(self, name: str) -> Any:
    if name.startswith('__'):
      raise AttributeError(name)
    return getattr(self.model, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Roles:
  """What the cache of each layer is; layers of no role have the official one.

  Attributes:
    rolling: Local layers.
    sources: Those of them whose keys other layers reuse.
    sharing: Layers that reuse the keys of another.
  """

  rolling: frozenset[str]
  sources: frozenset[str]
  sharing: frozenset[str]


def _roles(config: Any) -> _Roles:
  """Roles of the layers of a model, by its config."""
  local = [t.name == 'LOCAL_SLIDING' for t in config.attention_types]
  origin: Sequence[int] = range(len(local))
  sharing = getattr(config, 'kv_cache_sharing_config', None)
  if sharing is not None:
    is_3n = isinstance(config, gemma3n_config.TransformerConfig)
    module: Any = gemma3n_config if is_3n else gemma4_config
    origin = module.create_kv_cache_sharing_patterns(
      sharing, len(local), config.attention_types
    )
  # A global layer needs all keys, its own or not.
  whole = {o for i, o in enumerate(origin) if not local[i]}
  rolling = {i for i, o in enumerate(origin) if i == o and i not in whole}
  shared = {o for i, o in enumerate(origin) if i != o}
  names = lambda layers: frozenset(f'layer_{i}' for i in layers)
  return _Roles(
    rolling=names(rolling),
    sources=names(rolling & shared),
    sharing=names(i for i, o in enumerate(origin) if i != o),
  )


def init_cache(
  model: nn.Module,
  *,
  batch_size: int,
  dtype: Any,
  cache_length: int,
  sharding: Any = None,
  spare: int = SPARE,
) -> Any:
  """Initialises a cache whose local layers roll, for `call`.

  Args:
    model: The model.
    batch_size: Rows.
    dtype: Type of keys and values. The official samplers ask for that of the
      first parameter; if that is an integer one, it is the model's own.
    cache_length: Tokens of context.
    sharding: As in the `init_cache` of the model.
    spare: Entries of a local layer beyond its window.

  Returns:
    The cache, or the official one if the context is not longer than what a
    local layer would keep.
  """
  if not jnp.issubdtype(dtype, jnp.floating):
    dtype = model.dtype
  roles = _roles(model.config)
  # Models without local layers may have no window.
  length = (model.config.sliding_window_size or 0) + spare
  if not roles.rolling or cache_length <= length:
    return model.init_cache(
      batch_size=batch_size,
      dtype=dtype,
      cache_length=cache_length,
      sharding=sharding,
    )
  official = jax.eval_shape(
    functools.partial(
      model.config.init_cache,
      batch_size=batch_size,
      dtype=dtype,
      cache_length=cache_length,
    )
  )

  def layer(name: str, shapes: _Layer) -> _Layer:
    lengths = {'k': cache_length, 'v': cache_length, 'positions': cache_length}
    if name in roles.rolling:
      lengths = {'k': length, 'v': length, 'positions': 0}
    elif name in roles.sharing:
      lengths = dict.fromkeys(lengths, 0)
    return {
      key: jnp.zeros(
        (batch_size, lengths[key], *x.shape[2:]) if key in lengths else x.shape,
        x.dtype,
      )
      for key, x in shapes.items()
    }

  @jax.jit
  def make() -> _Cache:
    nothing = jnp.zeros((batch_size, cache_length, 0, 0), dtype)
    context = {
      'k': nothing,
      'v': nothing,
      'positions': jnp.full((batch_size, length, 2), -1, jnp.int32),
      'end_index': jnp.zeros(batch_size, jnp.int32),
    }
    cache = {CONTEXT: context}
    cache |= {name: layer(name, shapes) for name, shapes in official.items()}
    return kd.sharding.with_sharding_constraint(cache, sharding)

  return make()


def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
  """Calls a model with a cache of `init_cache`, or any other or none.

  Args:
    model: The model, bound.
    *args: Its arguments.
    **kwargs: Its arguments.

  Returns:
    Its output.
  """
  cache = kwargs.get('cache')
  if not cache or CONTEXT not in cache:
    return model(*args, **kwargs)
  roles = _roles(model.config)
  context = cache[CONTEXT]
  # One array for all layers, so that XLA finds the place for a token once.
  kwargs['cache'] = {
    name: layer | {'positions': context['positions']}
    if name in roles.rolling
    else layer
    for name, layer in cache.items()
    if name != CONTEXT
  }
  intercept = _Interceptor(roles=roles, window=model.config.sliding_window_size)
  with nn.intercept_methods(intercept):
    out = model(*args, **kwargs)
  first = out.cache[min(roles.rolling)]
  context = context | {key: first[key] for key in ('positions', 'end_index')}
  layers = {
    name: {
      key: cache[name][key]
      if name in roles.rolling and key == 'positions'
      else x
      for key, x in layer.items()
      if key != 'view'
    }
    for name, layer in out.cache.items()
  }
  return out.replace(cache={CONTEXT: context, **layers})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Interceptor:
  """Gives the official attention a cache as it knows it."""

  roles: _Roles
  window: int

  def __call__(self, next_fun, args, kwargs, context):
    module, method = context.module, context.method_name
    if not isinstance(module, _ATTENTIONS) or method != '__call__':
      return next_fun(*args, **kwargs)
    name = module.path[-2]
    if name in self.roles.rolling:
      return _rolling(
        next_fun,
        *args,
        **kwargs,
        window=self.window,
        is_source=name in self.roles.sources,
      )
    if name in self.roles.sharing:
      return _sharing(next_fun, *args, **kwargs)
    return next_fun(*args, **kwargs)


def _sharing(
  attend: _Attend,
  x: jax.Array,
  segment_pos: jax.Array,
  cache: _Layer,
  attn_mask: jax.Array,
  kv_shared_cache: _Layer,
) -> tuple[_Layer, jax.Array]:
  """Attention of a layer that reuses the keys of another."""
  end_index = cache['end_index']
  view = kv_shared_cache | {'end_index': end_index}
  if 'view' in kv_shared_cache:
    view = dict(kv_shared_cache['view'])
    attn_mask = view.pop('mask')
  _, y = attend(x, segment_pos, view, attn_mask, view)
  return cache | {'end_index': end_index + x.shape[1]}, y


def _rolling(
  attend: _Attend,
  x: jax.Array,
  segment_pos: jax.Array,
  cache: _Layer,
  attn_mask: jax.Array,
  kv_shared_cache: None = None,
  *,
  window: int,
  is_source: bool,
) -> tuple[_Layer, jax.Array]:
  """Attention of a local layer.

  Args:
    attend: The official attention.
    x: Input [batch, tokens, features].
    segment_pos: Positions [batch, tokens].
    cache: Keys and values [batch, entries, heads, width]; positions
      [batch, entries, 2], each with the slot of a full-length cache that the
      entry would be in, -1 if there is none.
    attn_mask: Mask over those slots, [batch, tokens, slots].
    kv_shared_cache: None.
    window: Positions that a token attends to.
    is_source: Whether other layers need what this one attends to.

  Returns:
    The cache after these tokens, and the output.
  """
  length = x.shape[1]
  end_index = cache['end_index'][:, None]
  positions, slots = cache['positions'][..., 0], cache['positions'][..., 1]
  # Slots that these tokens overwrite, or that were taken back, are empty.
  total = attn_mask.shape[-1]
  kept = (slots < end_index) & (slots >= end_index + length - total)
  slots = jnp.where(kept, slots, -1)
  new_slots = end_index + jnp.arange(length)
  mask, new_mask = (
    jnp.take_along_axis(attn_mask, (s % total)[:, None], axis=2)
    & (s >= 0)[:, None]
    for s in (slots, new_slots)
  )
  old = {'k': cache['k'], 'v': cache['v'], 'positions': positions}
  start: Any
  if length == 1:
    # In place of the entry that is the oldest in every row.
    start = jnp.argmin(jnp.max(slots, axis=0))
    mask = mask.at[:, :, start].set(new_mask[:, :, 0])
    view = old
    view_slots = slots.at[:, start].set(new_slots[:, 0])
  else:
    start = slots.shape[1]
    mask = jnp.concatenate([mask, new_mask], axis=2)
    view = {key: _longer(leaf, length) for key, leaf in old.items()}
    view_slots = jnp.concatenate([slots, new_slots], axis=1)
  view['end_index'] = jnp.full_like(cache['end_index'], start)
  new, y = attend(x, segment_pos, view, mask)
  new['end_index'] = view['end_index']

  entries = {
    'k': new['k'],
    'v': new['v'],
    'positions': jnp.stack([new['positions'], view_slots], axis=2),
  }
  if length > 1:
    used = jnp.where(mask.any(axis=1), view_slots, -1)
    order = _newest(used, slots.shape[1])
    entries['positions'] = entries['positions'].at[..., 1].set(used)
    entries = {key: _take(leaf, order) for key, leaf in entries.items()}
  elif len(x) > 1:
    old['positions'] = jnp.stack([positions, slots], axis=2)
    stays = _stays(positions, slots, segment_pos, start, window)
    entries = {
      key: _put_back(leaf, old[key], start, stays)
      for key, leaf in entries.items()
    }
  entries['end_index'] = cache['end_index'] + length
  if is_source:
    entries['view'] = new | {'mask': mask}
  return entries, y


def _longer(x: jax.Array, count: int) -> jax.Array:
  """`x` [batch, entries, ...] with so many entries more."""
  return jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2))


def _take(x: jax.Array, order: jax.Array) -> jax.Array:
  """Entries `order` [batch, count] of `x` [batch, entries, ...]."""
  order = order.reshape(order.shape + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, order, axis=1)


def _newest(slots: jax.Array, count: int) -> jax.Array:
  """The entries of the highest slots in each row, [batch, count].

  They ascend, and the last one of every row is at the same place, because a
  single token goes to the same place in every row. The empty places that all
  rows have come last, because the official samplers cut those off.
  """
  order = jnp.argsort(slots, axis=1)[:, -count:]
  empty = jnp.take_along_axis(slots, order, axis=1) < 0
  return jnp.roll(order, -jnp.min(jnp.sum(empty, axis=1)), axis=1)


def _stays(
  positions: jax.Array,
  slots: jax.Array,
  segment_pos: jax.Array,
  place: jax.Array,
  window: int,
) -> jax.Array:
  """Whether the entry at `place` is worth more than the new one, [batch].

  The official samplers go on with rows that are done, at the position at which
  they ended, and mask what comes of it in the next turn: it must not drive out
  what is attended to then.
  """
  again = jnp.any((slots >= 0) & (positions == segment_pos), axis=1)
  reached = positions[:, place] > segment_pos[:, 0] - window
  return again & reached & (slots[:, place] >= 0)


def _put_back(
  x: jax.Array, old: jax.Array, place: jax.Array, stays: jax.Array
) -> jax.Array:
  """`x` with the entry at `place` of `old` in the rows in which it stays."""
  stays = stays.reshape(stays.shape + (1,) * (x.ndim - 2))
  return x.at[:, place].set(jnp.where(stays, old[:, place], x[:, place]))
