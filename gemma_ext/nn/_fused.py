# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Parts of the official modules as one operation each, where that is faster.

Decoding on a CPU: XLA copies and transposes the cache for every token, and
every small operation of its own costs microseconds. Results are those of the
official code, computed in float32 between the ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from flax.linen import module as flax_module
from gemma.gm.math import _positional_embeddings
from gemma.gm.nn import _layers
from gemma.gm.nn import _modules as gemma_modules
from gemma.gm.nn.gemma4 import _modules as gemma4_modules
import jax
import jax.numpy as jnp

from gemma_ext import kernels
from gemma_ext.nn import _moe
from gemma_ext.nn import _packed

ATTENTION = gemma_modules.Attention
BLOCK = gemma_modules.Block
FEED_FORWARDS = (gemma_modules.FeedForward, gemma4_modules.FeedForward)
# Rows of x up to which a call is a step of decoding.
_FEW = 8
_FEW_NEURONS = 2


def unseen(*calls: type[nn.Module]) -> bool:
  """Whether nobody but interceptors with `fuses` sees the modules within.

  LoRA, calibration and others want the calls that a fused one leaves out.

  Args:
    *calls: The classes of which calls would be left out; of any by default.
      Interceptors may say in `sees` which classes they are after.
  """
  stack = flax_module._global_interceptor_stack  # pylint: disable=protected-access

  def blind(interceptor: Any) -> bool:
    sees = getattr(interceptor, 'sees', None)
    if getattr(interceptor, 'fuses', False):
      return True
    return bool(calls) and sees is not None and not set(sees) & set(calls)

  return all(blind(i) for i in stack)


def may_fuse() -> bool:
  """Whether the same holds and the fused operations are there."""
  return kernels.on_cpu() and unseen()


def attention_fits(module: nn.Module, x: jax.Array, cache: Any) -> bool:
  """Whether `attention` may stand in for the official code."""
  rows = x.shape[1] * module.num_heads // module.num_kv_heads
  return bool(cache) and rows <= kernels.MOST_ROWS and x.shape[1] <= _FEW


def attention(
  module: Any,
  x: jax.Array,
  segment_pos: jax.Array,
  cache: dict[str, jax.Array],
  attn_mask: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array]:
  """`__call__` of the official attention of Gemma 2 and 3, with a cache.

  Args:
    module: The bound module.
    x: Input `[B, T, D]`.
    segment_pos: Positions `[B, T]`.
    cache: Keys, values, positions and end index.
    attn_mask: `[B, T, S]`.

  Returns:
    The cache after these tokens, and the output `[B, T, D]`.
  """
  if module.use_qkv_einsum:
    q, k, v = module.qkv_einsum('BTD,SNDH->SBTNH', x)
  else:
    q = module.q_einsum('BTD,NDH->BTNH', x)
    k, v = module.kv_einsum('BSD,CKDH->CBSKH', x)
  if module.use_qk_norm:
    # pylint: disable=protected-access
    q, k = module._query_norm(q), module._key_norm(k)
  q, k = (
    _positional_embeddings.apply_rope(
      each,
      segment_pos,
      base_frequency=module.rope_base_frequency,
      scale_factor=module.rope_scale_factor,
    )
    for each in (q, k)
  )
  start = cache['end_index'][0] % cache['v'].shape[1]
  positions = jax.lax.dynamic_update_slice(
    cache['positions'], segment_pos, (0, start)
  )
  mask = jnp.broadcast_to(
    attn_mask, (*x.shape[:2], cache['v'].shape[1])
  ).astype(bool)
  if module.attn_type == gemma_modules.AttentionType.LOCAL_SLIDING:
    mask &= gemma_modules.create_sliding_mask(
      segment_pos,
      cache_positions=positions,
      sliding_window_size=module.sliding_window_size,
    )
  out, new_k, new_v = kernels.attend(
    q * module.query_pre_attn_scalar,
    k,
    v,
    cache['k'],
    cache['v'],
    start,
    mask,
    soft_cap=module.attn_logits_soft_cap,
  )
  y = module.attn_vec_einsum('BTNH,NHD->BTD', out)
  return {
    'v': new_v,
    'k': new_k,
    'end_index': cache['end_index'] + x.shape[1],
    'positions': positions,
  }, y


def block_fits(module: nn.Module, x: jax.Array, cache: Any) -> bool:
  """Whether `block` may stand in for the official code, weights apart."""
  return (
    type(module) is BLOCK
    and bool(cache)
    and x.ndim == 3
    and 0 < x.size // x.shape[-1] <= kernels.MOST_TOKENS
    and not module.attn.use_qkv_einsum
    and all(type(n) is _layers.RMSNorm for n in _norms(module).values())
  )


def _norms(module: Any) -> dict[str, nn.Module]:
  """Norms of a block of Gemma 2 or 3."""
  attn = module.attn
  found = {
    'pre_attention': module.pre_attention_norm,
    'post_attention': module.post_attention_norm,
    'pre_ffw': module.pre_ffw_norm,
    'post_ffw': module.post_ffw_norm,
  }
  if attn.use_qk_norm:
    # pylint: disable=protected-access
    found |= {'query': attn._query_norm, 'key': attn._key_norm}
  return {name: norm for name, norm in found.items() if norm is not None}


def block(
  module: Any,
  weights: Sequence[Any],
  inputs: jax.Array,
  cache: dict[str, jax.Array],
) -> Callable[..., tuple[dict[str, jax.Array], jax.Array]] | None:
  """`__call__` of the official block of Gemma 2 and 3, with a cache.

  Args:
    module: The bound module.
    weights: Those of q, kv, out, gate and down, `PackedWeight`s or others.
    inputs: Input `[B, T, D]`.
    cache: That of the block.

  Returns:
    A function of the arguments of the block's attention, by name, whose input
    it ignores, that returns the cache and the output of the block; `None` where
    it cannot stand in.
  """
  if not are_packed(*weights):
    return None
  attn = module.attn
  local = attn.attn_type == gemma_modules.AttentionType.LOCAL_SLIDING
  spec = kernels.BlockSpec(
    formats=tuple(w.fmt for w in weights),
    x_bits=tuple(w.x_bits for w in weights),
    query_scale=float(attn.query_pre_attn_scalar),
    soft_cap=float(attn.attn_logits_soft_cap or 0.0),
    window=attn.sliding_window_size if local else 0,
  )
  leaves = tuple(w.leaf for w in weights)
  if kernels.why_not_block(inputs, leaves, cache, spec):
    return None
  norms = {
    name: norm.get_variable('params', 'scale')
    for name, norm in _norms(module).items()
  }

  def run(*, segment_pos, cache, attn_mask, **_):
    slots, width = cache['k'].shape[1], cache['k'].shape[3]
    # As `apply_rope` has it.
    exponents = (2.0 / width) * jnp.arange(0, width // 2, dtype=jnp.float32)
    timescale = attn.rope_base_frequency**exponents
    return kernels.block(
      inputs,
      leaves,
      norms,
      cache,
      segment_pos.astype(jnp.int32),
      segment_pos[..., None] / timescale / attn.rope_scale_factor,
      jnp.broadcast_to(attn_mask, (*inputs.shape[:2], slots)).astype(bool),
      spec,
    )

  return run


def feed_forward(
  x: jax.Array, gate: _packed.PackedWeight, down: _packed.PackedWeight
) -> jax.Array:
  """`__call__` of the official feed-forward modules, on packed weights.

  Args:
    x: Input `[..., D]`.
    gate: Weight of rows `[2, H]`.
    down: Weight of rows `[D]`.

  Returns:
    `[..., D]`.
  """
  return kernels.gated_ffn(
    x,
    gate.leaf,
    gate.fmt,
    down.leaf,
    down.fmt,
    x_bits=max(gate.x_bits, down.x_bits),
  )


def feed_forward_fits(x: jax.Array, *weights: _packed.PackedWeight) -> bool:
  """Whether `feed_forward` may stand in for the official code."""
  return _are_codes(*weights) and is_step(x)


def are_packed(*weights: Any) -> bool:
  """Whether each is a packed weight, neither dense nor in parts."""
  return all(isinstance(w, _packed.PackedWeight) for w in weights)


def _are_codes(*weights: _packed.PackedWeight) -> bool:
  """Whether the kernels read them; latent codes are numbers."""
  return not any(
    jnp.issubdtype(w.leaf['codes'].dtype, jnp.floating) for w in weights
  )


def is_step(x: jax.Array) -> bool:
  """Whether these are the rows of a step of decoding."""
  return x.size // x.shape[-1] <= _FEW


def experts(
  mixture: _moe.Mixture,
  x: jax.Array,
  choice: _moe.Choice,
  gate: _packed.PackedWeight,
  down: _packed.PackedWeight,
) -> jax.Array:
  """A feed-forward layer that is a mixture, only the chosen experts read.

  Args:
    mixture: What it is.
    x: Input `[..., D]`.
    choice: Which experts.
    gate: Weight of rows `[2, H]`.
    down: Weight of rows `[D]`.

  Returns:
    `[..., D]`.
  """
  return kernels.experts_ffn(
    x,
    gate.leaf,
    gate.fmt,
    down.leaf,
    down.fmt,
    choice.chosen,
    choice.weight,
    size=mixture.size,
    shared=mixture.method.shared,
    x_bits=max(gate.x_bits, down.x_bits),
  )


def neurons(
  mixture: _moe.Mixture,
  x: jax.Array,
  router: Mapping[str, jax.Array],
  gate: _packed.PackedWeight,
  down: _packed.PackedWeight,
) -> jax.Array:
  """A feed-forward layer whose gates choose, only those neurons read.

  Args:
    mixture: What it is.
    x: Input `[..., D]`.
    router: Its router.
    gate: Weight of rows `[2, H]`.
    down: Weight of rows `[H]`.

  Returns:
    `[..., D]`.
  """
  return kernels.neurons_ffn(
    x,
    gate.leaf,
    gate.fmt,
    down.leaf,
    down.fmt,
    {**router, 'k': jnp.minimum(router['k'], mixture.method.top_k)},
    size=mixture.size,
    shared=mixture.method.shared,
    x_bits=gate.x_bits,
  )


def neurons_fit(x: jax.Array, *weights: _packed.PackedWeight) -> bool:
  """Whether `neurons` may stand in for the official code and a mask.

  With more rows of x it would read what they have in common again and again.
  """
  rows = x.size // x.shape[-1]
  return feed_forward_fits(x, *weights) and rows <= _FEW_NEURONS


def experts_fit(
  mixture: _moe.Mixture, x: jax.Array, *weights: _packed.PackedWeight
) -> bool:
  """Whether `experts` may stand in for the official code and a mask."""
  if mixture.method.router == 'expert_choice':
    return False
  # Rows of slices are in order for any number of rows of x.
  cut = weights[1].layout.slices > 1
  return _are_codes(*weights) and (cut or is_step(x))
