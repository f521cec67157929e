# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Fused parts of a step of decoding give what the official code gives."""

from flax import linen as nn
from gemma import gm
from gemma import peft
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext.kernels import _cpu
from gemma_ext.nn import _fused
from tests import tiny

pytestmark = pytest.mark.skipif(
  _cpu.library() is None, reason='the C++ library was not built'
)

PROMPT = jnp.array([[2, 5, 6, 7, 8], [2, 20, 21, 22, 23]])
STEPS = 24  # Past the window of 16 tokens, and around the cache.
SLOTS = 24
PARTS = ('block', 'attend', 'gated')


def _model(family, dtype=jnp.float32):
  dense = tiny.model(family, dtype=dtype)
  model = gx.nn.Compressed(model=dense, recipe=gx.Recipe.of('int8'))
  return model, gx.compress(dense, tiny.params(dense), model.recipe)


def _step(model):
  """Logits of new tokens and the cache with them."""

  @jax.jit
  def step(params, tokens, positions, mask, cache):
    out = model.apply(
      {'params': params},
      tokens=tokens,
      positions=positions,
      attention_mask=mask,
      cache=cache,
      return_last_only=False,
    )
    return out.logits, out.cache

  return step


def _decode(model, params):
  """Logits of a prompt and of some tokens after it, and the last cache."""
  step = _step(model)
  batch, length = PROMPT.shape
  cache = model.model.config.init_cache(
    batch_size=batch, dtype=model.dtype, cache_length=SLOTS
  )
  logits = []
  tokens = PROMPT
  for end in range(length, length + STEPS):
    new = tokens.shape[1]
    at = jnp.arange(end - new, end)
    slot = jnp.arange(SLOTS)
    mask = slot <= jnp.minimum(at, SLOTS - 1)[:, None]
    out, cache = step(
      params,
      tokens,
      jnp.broadcast_to(at, tokens.shape),
      jnp.broadcast_to(mask, (batch, new, SLOTS)),
      cache,
    )
    logits.append(np.asarray(out[:, -1], np.float64))
    tokens = jnp.full((batch, 1), 30 + end, jnp.int32)
  return np.stack(logits), cache


def _calls(model, params):
  step = _step(model)
  cache = model.model.config.init_cache(
    batch_size=2, dtype=model.dtype, cache_length=SLOTS
  )
  one = jnp.ones((2, 1), jnp.int32)
  text = step.lower(
    params, one, one, jnp.ones((2, 1, SLOTS), bool), cache
  ).as_text()
  return {n: text.count(f'@gemma_ext_{n}(') for n in PARTS}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
  # Tests have several devices, which are left to XLA by default.
  monkeypatch.setenv('GEMMA_EXT_BACKEND', 'cpu')
  jax.clear_caches()
  yield
  jax.clear_caches()


@pytest.fixture
def official(monkeypatch):
  """Runs a function without anything fused."""

  def run(function, *args):
    with monkeypatch.context() as patch:
      patch.setattr(_fused, 'may_fuse', lambda: False)
      jax.clear_caches()
      found = function(*args)
    jax.clear_caches()
    return found

  return run


@pytest.mark.parametrize(
  ('family', 'parts'),
  [
    ('gemma2', 'block'),
    ('gemma3', 'block'),
    ('gemma3', 'attend gated'),
    # They have an attention of their own, 3n also a feed-forward layer.
    ('gemma3n', ''),
    ('gemma4', 'gated'),
  ],
)
def test_decoding(family, parts, official, monkeypatch):
  if parts == 'attend gated':
    monkeypatch.setattr(_fused, 'block_fits', lambda *args: False)
  model, params = _model(family)
  layers = len(model.model.config.attention_types)
  none = dict.fromkeys(PARTS, 0)
  assert _calls(model, params) == none | dict.fromkeys(parts.split(), layers)
  assert official(_calls, model, params) == none
  got, cache = _decode(model, params)
  want, official_cache = official(_decode, model, params)
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())
  assert jax.tree.structure(cache) == jax.tree.structure(official_cache)
  for a, b in zip(
    jax.tree.leaves(cache), jax.tree.leaves(official_cache), strict=True
  ):
    assert a.shape == b.shape and a.dtype == b.dtype
    size = np.abs(np.asarray(b, np.float64)).max()
    np.testing.assert_allclose(
      np.asarray(a, np.float64), np.asarray(b, np.float64), atol=2e-3 * size
    )


def test_bfloat16(official):
  model, params = _model('gemma3', jnp.bfloat16)
  got, _ = _decode(model, params)
  want, _ = official(_decode, model, params)
  assert _calls(model, params)['block'] > 0
  size = np.abs(want).max()
  np.testing.assert_allclose(got, want, atol=5e-2 * size)


@pytest.mark.parametrize('lora_class', [gm.nn.LoRA, gx.nn.LoRA])
def test_lora_is_not_left_out(lora_class, official):
  """Adapters intercept calls inside of what would be fused."""
  model, params = _model('gemma3')
  lora = lora_class(rank=4, model=model, dtype=jnp.float32)
  tree = jax.jit(lora.init)(jax.random.key(1), PROMPT)['params']
  adapters = jax.tree.map(lambda a: a + 0.05, peft.split_params(tree).lora)
  logits = lambda model, params: np.asarray(
    model.apply({'params': params}, PROMPT[:1]).logits
  )
  merged = peft.merge_params(params, adapters)
  got = logits(lora, merged)
  np.testing.assert_allclose(got, official(logits, lora, merged), atol=1e-3)
  assert np.abs(got - logits(model, params)).max() > 0.1


def test_other_interceptors_see_every_call(official):
  model, params = _model('gemma3')
  seen = []

  def watch(next_fun, args, kwargs, context):
    seen.append(context.module.name)
    return next_fun(*args, **kwargs)

  def run():
    seen.clear()
    with nn.intercept_methods(watch):
      _calls(model, params)
    return list(seen)

  got = run()
  assert 'linear' in got or 'attn_vec_einsum' in got
  assert got == official(run)
