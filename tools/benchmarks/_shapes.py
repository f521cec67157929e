# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Whole models of real shapes with random weights, and their decoding loop."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import linen as nn
from flax import traverse_util
from gemma import gm
from gemma.gm.text import _sampler_loop
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.nn import _moe
from gemma_ext.text import _argmax
from gemma_ext.text import _loop
from gemma_ext.text import _prompt
from tools.benchmarks import _timing
from tools.benchmarks import _weights

# What is drawn as a text.
TOKENS = (1000, 20_000)
MODELS = {
  '270m': gm.nn.Gemma3_270M,
  '1b': gm.nn.Gemma3_1B,
  '4b': gm.nn.Gemma3_4B,
}


def dense(name: str | Callable[..., nn.Module]) -> nn.Module:
  """Returns the text model of a shape or class, in bfloat16."""
  cls = MODELS[name] if isinstance(name, str) else name
  model = cls(dtype=jnp.bfloat16)
  config = dataclasses.replace(model.config, vision_encoder=None)
  return model.clone(config=config)


def random_params(model: nn.Module, seed: int = 0) -> dict[str, Any]:
  """Returns parameters of a model, dense or `Compressed`, of random contents.

  Args:
    model: The model. Its packed weights get random codes and small scales, and
      every expert of its mixtures runs.
    seed: Seed.
  """
  tokens = jnp.zeros((1, 4), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  methods: Mapping[str, Any] = {}
  mixtures: Mapping[str, gx_nn.Mixture] = {}
  if isinstance(model, gx_nn.Compressed):
    methods = gx_nn.methods_of(model.model, model.recipe)
    mixtures = gx_nn.mixtures_of(model.model, model.recipe)
  key = jax.random.key(seed)
  flat: dict[str, Any] = {}
  for path, mixture in mixtures.items():
    router = _moe.initial(mixture, jax.random.fold_in(key, len(flat)))
    flat |= {f'{path}/{_moe.ROUTER}/{name}': v for name, v in router.items()}
  for i, (path, leaf) in enumerate(
    traverse_util.flatten_dict(shapes, sep='/').items()
  ):
    if path in flat or path.rpartition('/')[0] in methods:
      continue
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    flat[path] = 0.02 * draw(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
  for i, (path, (site, method)) in enumerate(methods.items()):
    fmt = gx_nn.format_of(method, site.layout.cols)
    rows = int(np.prod(site.layout.rows))
    packed = _weights.packed(fmt, rows, site.layout.cols, seed + i)
    for part, leaf in packed.items():
      path_of = f'{path}/{part}'
      shape = traverse_util.flatten_dict(shapes, sep='/')[path_of]
      flat[path_of] = leaf.reshape(shape.shape).astype(shape.dtype)
  return traverse_util.unflatten_dict(flat, sep='/')


def compressed(
  name: str, recipe: recipe_lib.Recipe
) -> tuple[nn.Module, dict[str, Any]]:
  """Returns a compressed model of a shape and random parameters."""
  model = gx_nn.Compressed(model=dense(name), recipe=recipe)
  return model, random_params(model)


def nbytes(tree: Any) -> int:
  """Bytes of all arrays."""
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def random_cache(cache: Any) -> Any:
  """Returns the cache with random keys and values, all positions in use."""

  def filled(layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
    full = layer | {
      key: jax.random.normal(
        jax.random.key(i), layer[key].shape, layer[key].dtype
      )
      for i, key in enumerate(('k', 'v'))
    }
    return full | {
      'positions': jnp.broadcast_to(
        jnp.arange(layer['positions'].shape[1]), layer['positions'].shape
      ).astype(jnp.int32)
    }

  return {name: filled(layer) for name, layer in cache.items()}


class Decoding:
  """Greedy decoding after a context, some tokens a call.

  Attributes:
    model: The model.
    params: Its parameters.
  """

  def __init__(
    self,
    model: nn.Module,
    params: Any,
    cache: Any,
    *,
    context: int,
    official: bool = False,
  ):
    """Starts.

    Args:
      model: The model.
      params: Its parameters.
      cache: Full or rolling; given away.
      context: Tokens in it.
      official: Whether the loop is that of the official sampler.
    """
    self.model, self.params, self._official = model, params, official
    tokens = np.random.default_rng(0).integers(*TOKENS, context)
    self._loop = _sampler_loop.SamplerLoop(
      model=model,
      end_tokens=(),
      forbidden_tokens=None,
      sampling=gm.text.Greedy() if official else _argmax.fast(gm.text.Greedy()),
      cache_length=max(x['k'].shape[1] for x in cache.values()),
      special_tokens=gm.text.Gemma3Tokenizer.special_tokens,
    )
    state = _prompt.state_after(
      tokens.astype(np.int32), cache, max_out_length=512, rng=jax.random.key(0)
    )
    self._run = _loop.Run.of(state)

  def seconds(self, count: int) -> float:
    """Seconds a token, of so many more."""
    return _timing.seconds(lambda: self._advance(count)) / count

  def _advance(self, count: int) -> None:
    if self._official:
      state = self._run.state
      step = int(state.step)
      # pylint: disable-next=protected-access
      state = self._loop._sample_loop(
        params=self.params,
        state=state,
        max_new_tokens=jnp.asarray(step + count),
      )
      self._run = self._run.replace(state=state)
      jax.block_until_ready(state.step)
      return
    self._run, progress = _loop.advance(
      _loop.Plain(loop=self._loop),
      self._run,
      self.params,
      jnp.asarray(10**6),
      jnp.asarray(count),
    )
    jax.block_until_ready(progress)
