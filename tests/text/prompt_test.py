# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of prompts in pieces and caches that roll, against full caches."""

from gemma import gm
import jax
import jax.numpy as jnp
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.text import _loop
from gemma_ext.text import _prompt
from tests import tiny

# The window of the tiny models is 16.
_PIECE = 32
_PROMPT = 'The river is the capital of a set of France. ' * 6
_RANDOM = gm.text.RandomSampling(temperature=0.7)
_ROLLING = tuple(f for f in tiny.FAMILIES if f != 'gemma3n')


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
  monkeypatch.setattr(_prompt, 'PIECE', _PIECE)


def _checkpoint(family):
  model = tiny.model(family)
  tokenizer = tiny.tokenizer(model.INFO.tokenizer_version)
  return model, tiny.params(model), tokenizer


def _tokens(checkpoint, prompt=_PROMPT, **kwargs):
  stream = gx.text.stream(
    checkpoint, prompt, max_new_tokens=90, sampling=_RANDOM, seed=3, **kwargs
  )
  list(stream)
  return stream.tokens


def _full(monkeypatch, *args, **kwargs):
  """Tokens with one slot for every token, the prompt at once."""
  with monkeypatch.context() as m:
    m.setattr(_prompt, 'rolling_model', lambda *args, **kwargs: None)
    return _tokens(*args, **kwargs)


def _caught(monkeypatch):
  """States that decoding starts from."""
  states = []
  in_pieces = _prompt.in_pieces

  def catch(*args, **kwargs):
    states.append(in_pieces(*args, **kwargs))
    return states[-1]

  monkeypatch.setattr(_prompt, 'in_pieces', catch)
  return states


# Many pieces, the last one short; a prompt that does not fill one.
@pytest.mark.parametrize(
  'family, prompt',
  [*((family, _PROMPT) for family in _ROLLING), ('gemma3', 'The river')],
)
def test_tokens_of_full_caches(monkeypatch, family, prompt):
  checkpoint = _checkpoint(family)
  states = _caught(monkeypatch)
  got = _tokens(checkpoint, prompt)
  assert len(states) == 1
  assert got == _full(monkeypatch, checkpoint, prompt)
  assert len(set(got)) > 20


def test_sliding_layers_have_a_window_and_a_piece_of_slots(monkeypatch):
  model, params, tokenizer = _checkpoint('gemma3')
  states = _caught(monkeypatch)
  _tokens((model, params, tokenizer))
  (state,) = states
  total = state.full_attention_mask.shape[1]
  assert total >= 256
  slots = [
    _prompt.gx_nn.slots_of(model, cache_length=total, step=_PIECE)[name]
    for name in ('layer_0', 'layer_1', 'layer_2')
  ]
  # 16 + 32, in steps of 64.
  assert slots == [64, total, 64]
  # Its memory was given to the decoding loop.
  assert all(x.is_deleted() for x in jax.tree.leaves(state.cache))


@pytest.mark.parametrize('family', ['gemma2', 'gemma3'])
def test_speculation_rolls_as_well(monkeypatch, family):
  """Tokens that are taken back lie in slots that nobody needs."""
  checkpoint = _checkpoint(family)
  speculative = gx.text.Speculative(draft=gx.text.Draft(layers=1), tokens=5)
  states = _caught(monkeypatch)
  got = _tokens(checkpoint, speculative=speculative)
  assert len(states) == 1
  assert got == _full(monkeypatch, checkpoint, speculative=speculative)
  stream = gx.text.stream(
    checkpoint,
    _PROMPT,
    max_new_tokens=90,
    sampling=_RANDOM,
    speculative=speculative,
  )
  list(stream)
  assert 0.1 < stream.acceptance < 0.9


def test_packed_weights_on_fused_kernels(monkeypatch):
  monkeypatch.setenv('GEMMA_EXT_BACKEND', 'cpu')
  jax.clear_caches()
  recipe = gx.Recipe.of({'.*': gx.Int(bits=8)})
  model, params, tokenizer = _checkpoint('gemma3')
  packed = gx.compress(model, params, recipe)
  model = gx.nn.Compressed(model=model, recipe=recipe)
  got = _tokens((model, packed, tokenizer))
  assert got == _full(monkeypatch, (model, packed, tokenizer))
  jax.clear_caches()


def test_what_saves_nothing_or_is_not_known_does_not_roll():
  gemma3 = _checkpoint('gemma3')[0]
  size = {'length': 200, 'step': _PIECE}
  assert _prompt.rolling_model(gemma3, **size) is not None
  assert _prompt.rolling_model(gemma3, length=60, step=100) is None
  assert _prompt.rolling_model(tiny.model('gemma3n'), **size) is None
  assert _prompt.rolling_model(gm.nn.LoRA(rank=2, model=gemma3), **size) is None


def test_the_loop_compiles_once_for_prompts_of_several_lengths():
  checkpoint = _checkpoint('gemma3')
  _tokens(checkpoint, _PROMPT)
  compiled = _loop.advance._cache_size()
  _tokens(checkpoint, _PROMPT[:-40])
  assert _loop.advance._cache_size() == compiled


def test_caches_that_are_too_small_are_errors():
  model, params, _ = _checkpoint('gemma3')
  model = gx.nn.Compressed(model=model, recipe=gx.Recipe(rules=()))
  with pytest.raises(errors.ShapeError, match='cache_length=0'):
    gx.nn.rolling_cache(model, cache_length=0, step=1, dtype=jnp.float32)
  cache = gx.nn.rolling_cache(
    model, cache_length=256, step=1, dtype=jnp.float32
  )
  tokens = jnp.ones((1, 100), jnp.int32)
  with pytest.raises(errors.ShapeError, match='64 slots for 256 tokens'):
    model.apply(
      {'params': params},
      tokens=tokens,
      cache=cache,
      positions=jnp.arange(100)[None],
      attention_mask=jnp.ones((1, 100, 256), bool),
    )
