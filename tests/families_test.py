# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Every family all the way: compress, save, load, sample, a step of LoRA."""

from flax import traverse_util
from gemma import gm
from gemma import peft
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gemma_ext as gx
from tests import tiny

_RECIPE = gx.Recipe.of(
  {
    r'layer_\d+/mlp2?': gx.Ternary(group=64),
    'embedder/input_embedding': gx.Int(bits=8),
    r'layer_\d+/attn': gx.Int(bits=4, group=32),
  }
)
_TOKENS = jnp.array([[2, 5, 6, 7, 8, 9, 10, 11], [2, 20, 21, 22, 23, 9, 5, 7]])


def _nbytes(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _sample(model, params, tokenizer):
  """Text of a few new tokens, by the sampler that users call."""
  chat = gm.text.ChatSampler(
    model=model,
    params=params,
    tokenizer=tokenizer,
    cache_length=512,
    max_out_length=8,
  )
  reply = chat.chat('A river', max_new_tokens=3)
  assert [turn.text for turn in chat.turns][-1] == reply
  return reply


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_all_the_way(family, tmp_path):
  model = tiny.model(family)
  dense = tiny.params(model)
  tokenizer = tiny.tokenizer(model.INFO.tokenizer_version)

  params = gx.compress(model, dense, _RECIPE)
  compressed = gx.nn.Compressed(model=model, recipe=_RECIPE)
  assert _nbytes(params) == gx.plan(model, _RECIPE).nbytes
  assert _nbytes(params) < 0.5 * _nbytes(dense)

  gx.ckpts.save(
    tmp_path / 'c', model=compressed, params=params, tokenizer=tokenizer
  )
  loaded = gx.ckpts.load(tmp_path / 'c', dtype=jnp.float32)
  assert loaded.recipe == _RECIPE
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
  logits = lambda m, p: np.asarray(m.apply({'params': p}, _TOKENS).logits)
  found = logits(loaded.model, loaded.params)
  np.testing.assert_array_equal(found, logits(compressed, params))
  assert np.isfinite(found).all() and found.std() > 0.01

  reply = _sample(loaded.model, loaded.params, loaded.tokenizer)
  assert isinstance(reply, str)

  _check_lora(loaded.model, loaded.params)


def _check_lora(model, params):
  """Steps of Adam on the adapters lower the loss; the base stays as it is."""
  lora = gx.nn.LoRA(rank=2, model=model, dtype=jnp.float32)
  # As the official init does, which would take longer to compile than to run.
  shapes = jax.eval_shape(lora.init, jax.random.key(0), _TOKENS)['params']
  rng = np.random.default_rng(0)
  adapters = jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(
      (path[-1].key == 'a') * rng.standard_normal(leaf.shape) / 8, leaf.dtype
    ),
    peft.split_params(shapes).lora,
  )
  before = jax.tree.map(np.asarray, params)
  optimizer = optax.adam(1e-2)

  def loss(adapters):
    tree = peft.merge_params(params, adapters)
    logits = lora.apply({'params': tree}, _TOKENS[:, :-1]).logits
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, _TOKENS[:, 1:]
    ).mean()

  @jax.jit
  def step(adapters, state):
    value, grads = jax.value_and_grad(loss)(adapters)
    updates, state = optimizer.update(grads, state)
    return value, optax.apply_updates(adapters, updates), state

  state = optimizer.init(adapters)
  losses = []
  for _ in range(3):
    value, adapters, state = step(adapters, state)
    losses.append(float(value))
  assert losses[2] < losses[1] < losses[0]
  assert losses[0] - losses[2] > 1e-3

  jax.tree.map(np.testing.assert_array_equal, params, before)
  codes = {
    path: leaf.dtype
    for path, leaf in traverse_util.flatten_dict(params, sep='/').items()
    if path.endswith('/codes')
  }
  assert len(codes) >= 1 + 2 * 4
  assert set(codes.values()) == {np.dtype(np.uint8), np.dtype(np.int8)}
  merged = peft.merge_params(params, adapters)
  flat = traverse_util.flatten_dict(merged, sep='/')
  assert all(flat[path].dtype == dtype for path, dtype in codes.items())
