# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding, the draft being a cheaper view of the same weights.

A round drafts some tokens one by one and lets the model look at all of them in
one pass, which reads its weights once. Leviathan et al., arXiv 2211.17192; with
the model's own layers as the draft: Zhang et al., "Draft & Verify", arXiv
2309.08168, and Elhoushi et al., "LayerSkip", arXiv 2404.16710.

The draft has no cache of its own: its layers read what the model's layers wrote
for the tokens so far, and write on from there. The model then overwrites all of
it with its own keys and values, and those of tokens that were not taken stay
behind `end_index`, where masks hide them until they are overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

from flax import linen as nn
from gemma import gm
from gemma.gm.text import _sampler_loop
from gemma.gm.utils import _cache_helper
import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.text import _argmax
from gemma_ext.text import _loop
from gemma_ext.text import _rejection

_MAX_TOKENS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
  """What of a model drafts; its parts go together.

  Attributes:
    planes: Ternary weights of more planes have only their first ones.
    layers: The layers that stay: the first N, the numbers of them, or a slice
      such as `slice(None, None, 2)` for every other.
    head_rows: Only the first tokens of the vocabulary are drafted. Tokenizers
      put frequent ones first.
  """

  planes: int | None = None
  layers: int | slice | Sequence[int] | None = None
  head_rows: int | None = None

  def __post_init__(self):
    if (self.planes, self.layers, self.head_rows) == (None, None, None):
      raise errors.SamplingError(
        'Draft() is the model itself and saves nothing; expected planes,'
        ' layers or head_rows.'
      )
    for name in ('planes', 'head_rows'):
      value = getattr(self, name)
      if value is not None and not _is_positive(value):
        raise errors.SamplingError(
          f'Draft.{name}={value!r}; expected None or an int >= 1.'
        )
    layers = self.layers
    if layers is None or isinstance(layers, slice) or _is_positive(layers):
      return
    if (
      isinstance(layers, (int, str))
      or not isinstance(layers, Sequence)
      or not layers
      or any(type(i) is not int or i < 0 for i in layers)
      or any(a >= b for a, b in zip(layers, layers[1:], strict=False))
    ):
      raise errors.SamplingError(
        f'Draft.layers={layers!r}; expected a number >= 1, a slice, or numbers'
        ' of layers, ascending.'
      )
    object.__setattr__(self, 'layers', tuple(layers))

  def kept(self, num_layers: int) -> tuple[int, ...]:
    """Returns the numbers of the layers that stay, of so many."""
    if self.layers is None:
      return tuple(range(num_layers))
    if isinstance(self.layers, int):
      return tuple(range(self.layers))
    if isinstance(self.layers, slice):
      return tuple(range(num_layers)[self.layers])
    return tuple(self.layers)

  def of(
    self, model: nn.Module, params: Mapping[str, Any]
  ) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the model that drafts and its parameters, nothing copied.

    Args:
      model: An official model, or `gx.nn.Compressed`.
      params: Its parameters.

    Raises:
      SamplingError: If the model has no such parts, or no others.
    """
    layers = None
    if self.layers is not None:
      layers = self.kept(model.config.num_layers)
    try:
      return gx_nn.part(
        model,
        params,
        planes=self.planes,
        layers=layers,
        head_rows=self.head_rows,
      )
    except (errors.ShapeError, errors.ParamsMismatchError) as e:
      raise errors.SamplingError(f'The model has no such draft: {e}') from e


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculative:
  """Decodes several tokens a round, of the same distribution as one by one.

      draft = gx.text.Draft(planes=1, layers=12, head_rows=32_768)
      gx.text.stream(..., speculative=gx.text.Speculative(draft=draft))

  Attributes:
    draft: What drafts.
    tokens: Tokens that it drafts in a round, 1 to 64. The model looks at one
      more, and at least one is new.
  """

  draft: Draft
  tokens: int = 4

  def __post_init__(self):
    if not isinstance(self.draft, Draft):
      raise errors.SamplingError(
        f'Speculative.draft={self.draft!r}; expected a `gx.text.Draft`.'
      )
    if not _is_positive(self.tokens) or self.tokens > _MAX_TOKENS:
      raise errors.SamplingError(
        f'Speculative.tokens={self.tokens!r}; expected an int in'
        f' [1, {_MAX_TOKENS}].'
      )

  @classmethod
  def parse(cls, text: str) -> Speculative:
    """Reads 'planes=1,layers=12,head_rows=32768,tokens=4', some or all of it.

    Args:
      text: Settings; `layers` also as `start:stop:step`, `::2` for every other.

    Raises:
      SamplingError: If it is not such a text.
    """
    found: dict[str, Any] = {}
    for setting in text.split(','):
      name, _, value = setting.partition('=')
      number = re.fullmatch(r'\d{1,9}', value)
      parts = re.fullmatch(r'(\d{0,9}):(\d{0,9})(?::(\d{0,9}))?', value)
      if name in found or name not in (
        'planes',
        'layers',
        'head_rows',
        'tokens',
      ):
        number = parts = None
      if number:
        found[name] = int(value)
      elif parts and name == 'layers' and parts[3] != '0':
        found[name] = slice(*(int(i) if i else None for i in parts.groups()))
      else:
        raise errors.SamplingError(
          f'{setting!r} of {text!r}; expected planes=, layers=, head_rows= and'
          ' tokens=, each once and a number, layers= also as start:stop:step.'
        )
    tokens = {'tokens': found.pop('tokens')} if 'tokens' in found else {}
    return cls(draft=Draft(**found), **tokens)

  def stepper(
    self, loop: _sampler_loop.SamplerLoop, params: Mapping[str, Any]
  ) -> tuple[_loop.Stepper, Any]:
    """Returns the step of the loop, and its parameters.

    Args:
      loop: The official sampler's loop.
      params: Parameters of its model.

    Raises:
      SamplingError: If the sampling method or the draft is not possible.
    """
    _rejection.check(loop.sampling)
    draft, draft_params = self.draft.of(loop.model, params)
    stepper = _Speculator(
      loop=loop,
      draft=draft,
      layers=self.draft.kept(loop.model.config.num_layers),
      tokens=self.tokens,
    )
    return stepper, (params, draft_params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Speculator:
  """A round: some tokens are drafted, then verified in one pass.

  Attributes:
    loop: The official sampler's loop.
    draft: The model that drafts.
    layers: Its layers' numbers in the other model.
    tokens: How many it drafts.
  """

  loop: _sampler_loop.SamplerLoop
  draft: nn.Module
  layers: tuple[int, ...]
  tokens: int

  def step(self, run: _loop.Run, params: Any, limit: jax.Array) -> _loop.Run:
    """Returns the run after one to `tokens` + 1 new tokens."""
    params, draft_params = params
    state = run.state
    rng, *keys = jax.random.split(state.rng, 4)
    state, drafts, log_q = self._draft(state, draft_params, keys[0])
    logits, cache = self._look(state, drafts, params)
    if log_q is None:
      taken, last = _rejection.verify_greedy(logits, drafts)
    else:
      taken, log_rest = _rejection.verify(
        _rejection.log_probs(self.loop.sampling, logits),
        log_q,
        drafts,
        jax.random.uniform(keys[1], drafts.shape),
      )
      last = jax.random.categorical(keys[2], log_rest).astype(drafts.dtype)

    places = jnp.arange(self.tokens + 1)
    new = jnp.where(places < taken, jnp.append(drafts, last), last)
    ends = jnp.isin(new, jnp.asarray(self.loop.end_tokens)) & (places <= taken)
    # The first end, or past all of them.
    until_end = jnp.argmin(jnp.append(~ends, False)) + 1
    count = jnp.minimum(jnp.minimum(taken + 1, until_end), limit - state.step)
    count = count.astype(state.step.dtype)
    length = state.predicted_tokens.shape[-1]
    written = jnp.where(places < count, state.step + places, length)
    state = dataclasses.replace(
      state,
      step=state.step + count,
      done=state.done | jnp.any(ends & (places < count)),
      last_token=new[count - 1][None],
      last_token_pos=state.last_token_pos + count,
      predicted_tokens=state.predicted_tokens.at[0, written].set(
        new, mode='drop'
      ),
      cache=_ending(cache, state.used_cache_length + count),
      rng=rng,
    )
    return run.replace(
      state=state,
      rounds=run.rounds + 1,
      accepted=run.accepted + jnp.minimum(taken, count),
    )

  def _draft(
    self, state: _sampler_loop.SamplingState, params: Any, key: jax.Array
  ) -> tuple[_sampler_loop.SamplingState, jax.Array, jax.Array | None]:
    """The state, its cache changed behind its end; drafts `[n]`; log q.

    Greedy drafts need no log q, which is None then.
    """
    greedy = isinstance(self.loop.sampling, gm.text.Greedy)

    def decode(carry, inputs):
      cache, token = carry
      place, key = inputs
      out = self.draft.apply(
        {'params': params},
        tokens=token[:, None],
        cache=cache,
        positions=(state.last_token_pos + place)[:, None],
        attention_mask=_mask(state, place[None]),
      )
      logits = self._allowed(out.logits[0, 0])
      if greedy:
        log_q = None
        token = _argmax.argmax(logits)
      else:
        log_q = _rejection.log_probs(self.loop.sampling, logits)
        token = jax.random.categorical(key, log_q)
      token = token.astype(state.last_token.dtype)
      return (out.cache, token[None]), (token, log_q)

    names = {f'layer_{i}': f'layer_{k}' for i, k in enumerate(self.layers)}
    cache = {name: state.cache[place] for name, place in names.items()}
    (cache, _), (drafts, log_q) = jax.lax.scan(
      decode,
      (cache, state.last_token),
      (jnp.arange(self.tokens), jax.random.split(key, self.tokens)),
    )
    cache = state.cache | {names[name]: layer for name, layer in cache.items()}
    return dataclasses.replace(state, cache=cache), drafts, log_q

  def _look(
    self, state: _sampler_loop.SamplingState, drafts: jax.Array, params: Any
  ) -> tuple[jax.Array, Any]:
    """Logits `[n + 1, V]` of the model, and its cache."""
    places = jnp.arange(self.tokens + 1)
    out = self.loop.model.apply(
      {'params': params},
      tokens=jnp.append(state.last_token, drafts)[None],
      cache=_ending(state.cache, state.used_cache_length),
      positions=state.last_token_pos[:, None] + places,
      attention_mask=_mask(state, places),
    )
    return self._allowed(out.logits[0]), out.cache

  def _allowed(self, logits: jax.Array) -> jax.Array:
    """Logits without the tokens that the sampler forbids."""
    for token in self.loop.forbidden_tokens or ():
      if token < logits.shape[-1]:
        logits = logits.at[..., token].set(-jnp.inf)
    return logits


def _mask(state: _sampler_loop.SamplingState, places: jax.Array) -> jax.Array:
  """What each of the next tokens sees, itself among it, `[1, L, cache]`."""
  mask = state.full_attention_mask[:, None, :]
  ends = state.used_cache_length + 1 + places
  return mask & (jnp.arange(mask.shape[-1]) < ends[:, None])


def _ending(cache: Any, index: jax.Array) -> Any:
  """The cache, to go on from another index."""
  return _cache_helper.Cache(cache).set_end_index(index).cache


def _is_positive(value: Any) -> bool:
  return type(value) is int and value >= 1
