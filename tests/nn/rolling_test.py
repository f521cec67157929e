# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rolling caches against the official ones, and against no cache at all."""

import dataclasses
import functools

from gemma import gm
from gemma import peft
import jax
import jax.numpy as jnp
from kauldron import kd
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from tests import tiny

_WINDOW = 16
_CONTEXT = 128


@functools.cache
def _model(family):
  model = tiny.model(family)
  assert model.config.sliding_window_size == _WINDOW
  return model, tiny.params(model)


def _tokens(batch, length):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.integers(3, tiny.VOCAB_SIZE, (batch, length)))


class _Decoder:
  """Feeds tokens to a model with a cache, some at a time."""

  def __init__(self, model, params, cache):
    self._params = params
    self.cache = cache
    self.end = 0
    self._step = jax.jit(
      lambda params, tokens, positions, cache, mask: model.apply(
        {'params': params},
        tokens,
        positions=positions,
        cache=cache,
        attention_mask=mask,
      )
    )

  def feed(self, tokens):
    """Logits of tokens [batch, count] that come next."""
    batch, count = tokens.shape
    positions = jnp.tile(self.end + jnp.arange(count), (batch, 1))
    mask = jnp.arange(_CONTEXT) <= positions[..., None]
    out = self._step(self._params, tokens, positions, self.cache, mask)
    self.cache = out.cache
    self.end += count
    return np.asarray(out.logits)

  def take_back(self, count):
    """Forgets the last tokens, as a draft that was refused."""
    self.end -= count
    self.cache = {
      name: layer | {'end_index': layer['end_index'] - count}
      for name, layer in self.cache.items()
    }


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_decode_past_windows_equals_full_forward(family):
  # A prompt of more than two windows, a block, then three windows one by one.
  model, params = _model(family)
  tokens = _tokens(1, 96)
  expected = np.asarray(model.apply({'params': params}, tokens).logits)
  rolling = gx.nn.RollingCache(model=model, spare=3)
  cache = rolling.init_cache(
    batch_size=1, dtype=jnp.float32, cache_length=_CONTEXT
  )
  decoder = _Decoder(rolling, params, cache)
  logits = [decoder.feed(tokens[:, :40]), decoder.feed(tokens[:, 40:45])]
  logits += [decoder.feed(tokens[:, i : i + 1]) for i in range(45, 96)]
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(np.concatenate(logits, 1), expected, atol=1e-4)
  shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shape(decoder.cache) == shape(cache)
  local = decoder.cache['layer_0']
  assert local['k'].shape[1] == local['v'].shape[1] == _WINDOW + 3
  assert int(local['end_index'][0]) == 96


_PROMPTS = ['A river is a natural stream of fresh water. ' * 2, 'A group is']
_SECOND = ['What is the capital of France?', 'What is a set? ' * 3]


def _two_turns(model, params, stop):
  """Two turns of the official sampler on two rows; the first row stops."""
  gemma4 = model.INFO.tokenizer_version == 4
  sampler = (gm.text.Gemma4Sampler if gemma4 else gm.text.Sampler)(
    model=model,
    params=params,
    tokenizer=tiny.tokenizer(model.INFO.tokenizer_version),
    stop_tokens=(stop,),
    cache_length=256,
    max_out_length=48,
    pad_length=(64, 256),
  )
  sample = functools.partial(sampler.sample, return_state=True, rng=0)
  first = sample(_PROMPTS)
  second = sample(_SECOND, last_state=first.state)
  state = second.state
  logits = model.apply(
    {'params': params},
    state.last_token[:, None],
    cache=state.cache,
    positions=state.last_token_pos[:, None],
    attention_mask=state.attention_mask_for_step[:, None],
  ).logits
  return first, second, np.asarray(logits)


@pytest.mark.parametrize('family', ['gemma2', 'gemma3n', 'gemma4_e2b'])
def test_two_turns_of_the_official_sampler(family):
  # Prompts of different lengths, one beyond the window, padded to buckets; a
  # row that is done at once while the other goes on for three windows.
  model, params = _model(family)
  tokenizer = tiny.tokenizer(model.INFO.tokenizer_version)
  ids = [tokenizer.encode(p, add_bos=True) for p in _PROMPTS]
  assert len(ids[0]) > 2 * _WINDOW > len(ids[1])
  logits = model.apply({'params': params}, jnp.array(ids[:1])).logits[0, -1]
  logits = logits.at[jnp.array(tokenizer.FORBIDDEN_TOKENS, int)].set(-jnp.inf)
  stop = int(jnp.argmax(logits))

  official = _two_turns(model, params, stop)
  rolling = gx.nn.RollingCache(model=model, spare=6)
  found = _two_turns(rolling, params, stop)
  lengths = (np.asarray(official[0].state.predicted_tokens) > 0).sum(1)
  assert lengths[0] == 1 and lengths[1] > 2 * _WINDOW
  for ours, theirs in zip(found[:2], official[:2]):
    np.testing.assert_array_equal(
      ours.state.predicted_tokens, theirs.state.predicted_tokens
    )
    assert ours.text == theirs.text
  np.testing.assert_allclose(found[2], official[2], atol=1e-4)
  assert found[0].state.cache['layer_0']['k'].shape[1] == _WINDOW + 6
  assert official[0].state.cache['layer_0']['k'].shape[1] == 256


def test_tokens_taken_back_leave_no_trace():
  # What speculative decoding does: a block that is refused, then another.
  model, params = _model('gemma3')
  tokens = _tokens(2, 60)
  expected = np.asarray(model.apply({'params': params}, tokens).logits)
  rolling = gx.nn.RollingCache(model=model, spare=5)
  cache = rolling.init_cache(
    batch_size=2, dtype=jnp.float32, cache_length=_CONTEXT
  )
  decoder = _Decoder(rolling, params, cache)
  decoder.feed(tokens[:, :40])
  for i in range(40, 60, 4):
    decoder.feed(tokens[:, :4])
    decoder.take_back(4)
    found = decoder.feed(tokens[:, i : i + 4])
    np.testing.assert_allclose(found, expected[:, i : i + 4], atol=1e-4)
  decoder.take_back(3)
  for i in range(57, 60):
    found = decoder.feed(tokens[:, i : i + 1])
    np.testing.assert_allclose(found, expected[:, i : i + 1], atol=1e-4)


def test_spare_entries_are_what_taking_back_needs():
  # The test above can fail: with fewer, the window loses its far end.
  model, params = _model('gemma3')
  tokens = _tokens(1, 44)
  expected = np.asarray(model.apply({'params': params}, tokens).logits)
  rolling = gx.nn.RollingCache(model=model, spare=1)
  cache = rolling.init_cache(
    batch_size=1, dtype=jnp.float32, cache_length=_CONTEXT
  )
  decoder = _Decoder(rolling, params, cache)
  decoder.feed(tokens[:, :40])
  decoder.feed(tokens[:, :4])
  decoder.take_back(4)
  found = decoder.feed(tokens[:, 40:])
  assert np.abs(found - expected[:, 40:]).max() > 1e-2


def test_compressed_models_roll_unless_told():
  model, params = _model('gemma3')
  recipe = gx.Recipe.of({r'layer_\d+/mlp': gx.Int(bits=8)})
  params = gx.compress(model, params, recipe)
  compressed = gx.nn.Compressed(model=model, recipe=recipe)
  init = functools.partial(
    gx.nn.Compressed.init_cache,
    # As the official samplers, which ask for the type of the first parameter.
    dtype=jnp.int8,
    batch_size=1,
    cache_length=_CONTEXT,
  )
  cache = init(compressed)
  # 64 entries more than the window.
  assert cache['layer_0']['k'].shape == (1, _WINDOW + 64, 1, 32)
  assert cache['layer_0']['k'].dtype == jnp.float32
  assert cache['layer_1']['k'].shape == (1, _CONTEXT, 1, 32)
  official = init(dataclasses.replace(compressed, rolling_cache=False))
  assert official['layer_0']['k'].shape == (1, _CONTEXT, 1, 32)
  assert 'context' not in official

  tokens = _tokens(1, 100)
  lora = gx.nn.LoRA(rank=2, model=compressed)
  shapes = jax.eval_shape(lora.init, jax.random.key(0), tokens)['params']
  rng = np.random.default_rng(1)
  adapters = jax.tree.map(
    lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 16, leaf.dtype),
    peft.split_params(shapes).lora,
  )
  params = peft.merge_params(params, adapters)
  expected = np.asarray(lora.apply({'params': params}, tokens).logits)
  decoder = _Decoder(lora, params, cache)
  found = [decoder.feed(tokens[:, :90])]
  found += [decoder.feed(tokens[:, i : i + 1]) for i in range(90, 100)]
  np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=1e-4)


def test_one_process_dense_rolling_dense():
  # The jit of the official models tells the caches apart by their shapes.
  model, params = _model('gemma3')
  rolling = gx.nn.RollingCache(model=model, spare=4)
  tokens = _tokens(1, 1)
  logits = []
  for m in (model, rolling, model, rolling):
    cache = m.init_cache(batch_size=1, dtype=jnp.float32, cache_length=_CONTEXT)
    mask = jnp.arange(_CONTEXT)[None, None] < 1
    out = m.apply({'params': params}, tokens, cache=cache, attention_mask=mask)
    assert jax.tree.structure(out.cache) == jax.tree.structure(cache)
    logits.append(np.asarray(out.logits))
  for other in logits[1:]:
    np.testing.assert_allclose(other, logits[0], atol=1e-5)


def _nbytes(model, length):
  init = functools.partial(
    model.init_cache, batch_size=1, dtype=jnp.bfloat16, cache_length=length
  )
  return sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(jax.eval_shape(init))
  )


def test_bytes_at_32k():
  entry = lambda heads, width: 2 * 2 * heads * width + 4
  model = gm.nn.Gemma3_1B()
  assert _nbytes(model, 32768) == 26 * (32768 * entry(1, 256) + 4)
  # 4 of 26 layers are global; positions and slots are there once.
  rolling = 4 * (32768 * entry(1, 256) + 4) + 4
  rolling += 22 * ((512 + 64) * 2 * 2 * 256 + 4) + (512 + 64) * 8
  assert _nbytes(gx.nn.RollingCache(model=model), 32768) == rolling
  # Of 30 layers, 10 reuse the keys of others; 4 of the 20 are global.
  model = gm.nn.Gemma3n_E2B(text_only=True)
  assert _nbytes(model, 32768) == 30 * (32768 * entry(2, 256) + 4)
  rolling = 4 * (32768 * entry(2, 256) + 4) + 4 + 10 * 4
  rolling += 16 * ((512 + 64) * 2 * 2 * 2 * 256 + 4) + (512 + 64) * 8
  assert _nbytes(gx.nn.RollingCache(model=model), 32768) == rolling


def test_short_contexts_have_the_official_cache():
  model, _ = _model('gemma3')
  rolling = gx.nn.RollingCache(model=model, spare=4)
  spec = lambda m, length: jax.tree.map(
    lambda x: (x.shape, x.dtype),
    m.init_cache(batch_size=2, dtype=jnp.bfloat16, cache_length=length),
  )
  assert spec(rolling, _WINDOW + 4) == spec(model, _WINDOW + 4)
  assert 'context' in spec(rolling, _WINDOW + 5)


def test_context_comes_first_by_name():
  # Where the official samplers read how long the cache is.
  model, _ = _model('gemma3')
  cache = gx.nn.RollingCache(model=model, spare=4).init_cache(
    batch_size=2, dtype=jnp.bfloat16, cache_length=_CONTEXT
  )
  carried = jax.jit(lambda x: x)(cache)
  first = next(iter(carried.values()))
  assert first['k'].shape == (2, _CONTEXT, 0, 0)
  assert first['k'].nbytes == 0


def test_sharded_over_rows():
  model, _ = _model('gemma3')
  cache = gx.nn.RollingCache(model=model, spare=4).init_cache(
    batch_size=8,
    dtype=jnp.bfloat16,
    cache_length=_CONTEXT,
    sharding=kd.sharding.FIRST_DIM,
  )
  local = cache['layer_0']['k']
  assert local.sharding.shard_shape(local.shape) == (1, _WINDOW + 4, 1, 32)


def test_spare_must_be_positive():
  model, _ = _model('gemma3')
  with pytest.raises(errors.RecipeError, match='positive integer, got 0'):
    gx.nn.RollingCache(model=model, spare=0)
