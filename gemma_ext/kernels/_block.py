# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""A transformer block of Gemma 2 and 3 as one operation, for a few tokens."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.kernels import _attend
from gemma_ext.kernels import _backends
from gemma_ext.kernels import _cpu
from gemma_ext.kernels import _formats
from gemma_ext.kernels import _params

# Tokens of all sequences.
MOST_TOKENS = 8
NORMS = (
  'pre_attention',
  'query',
  'key',
  'post_attention',
  'pre_ffw',
  'post_ffw',
)
PRODUCTS = ('q', 'kv', 'out', 'gate', 'down')


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSpec:
  """What a block is, besides its parameters.

  Attributes:
    formats: Of the weights, by name: `q` of rows `[N, H]`, `kv` `[2, K, H]`,
      `out` `[D]`, `gate` `[2, F]`, `down` `[D]`.
    x_bits: What 'cpu' rounds x to, 16 or 8, likewise.
    query_scale: Factor of the queries.
    soft_cap: Bound of the logits of attention, by tanh; 0 for none.
    window: Tokens see others less than that far away; 0 for all.
    norm_offset: What is added to the scales of the norms.
  """

  formats: tuple[_formats.Format, ...]
  x_bits: tuple[int, ...]
  query_scale: float
  soft_cap: float = 0.0
  window: int = 0
  norm_offset: float = 1.0


def block(
  x: jax.Array,
  weights: tuple[Mapping[str, jax.Array], ...],
  norms: Mapping[str, jax.Array],
  cache: Mapping[str, jax.Array],
  positions: jax.Array,
  angles: jax.Array,
  mask: jax.Array,
  spec: BlockSpec,
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Computes a block for new tokens, on the 'cpu' backend.

  Norm, attention, norm, residual; norm, gated feed-forward layer, norm,
  residual: as in the official code, in float32 from end to end.

  Args:
    x: Input `[B, T, D]`, float32 or bfloat16, of `MOST_TOKENS` tokens at most.
    weights: Packed, in the order of `PRODUCTS`.
    norms: Scales of `NORMS`; all but `pre_attention` and `pre_ffw` may be left
      out.
    cache: `k` and `v` `[B, S, K, H]`, `positions` `[B, S]` and `end_index`
      `[B]` of the official cache. Written in place, if nothing else needs it.
    positions: Of the new tokens, int32 `[B, T]`.
    angles: Of the rotary embedding, float32 `[B, T, H / 2]`.
    mask: What to attend to before the window, bool `[B, T, S]`.
    spec: The rest.

  Returns:
    The cache with the new tokens, and the output `[B, T, D]` in the type of x.

  Raises:
    ParamsMismatchError: If weights do not have the shapes that their formats
      and x need.
    ShapeError: If the other shapes do not fit each other.
    BackendError: If the kernels cannot run here.
  """
  heads = _check(x, weights, norms, cache, positions, angles, mask, spec)
  reason = why_not(x, weights, cache, spec)
  _backends.choose('cpu', reason)
  weights = tuple(
    _params.own(p, fmt) for p, fmt in zip(weights, spec.formats, strict=True)
  )
  empty = jnp.zeros((0,), jnp.float32)
  outs = _cpu.block(
    x,
    jnp.sin(angles),
    jnp.cos(angles),
    positions,
    mask,
    cache,
    [norms.get(name, empty) for name in NORMS],
    weights,
    formats=spec.formats,
    x_bits=spec.x_bits,
    heads=heads,
    hidden=_params.rows_of(weights[3], spec.formats[3])[1],
    window=spec.window,
    query_scale=spec.query_scale,
    soft_cap=spec.soft_cap,
    more=spec.norm_offset,
  )
  return dict(zip(('k', 'v', 'positions', 'end_index'), outs[1:])), outs[0]


def why_not(
  x: Any,
  weights: tuple[Mapping[str, jax.Array], ...],
  cache: Mapping[str, jax.Array],
  spec: BlockSpec,
) -> str:
  """Returns why the kernels cannot run a block; empty if they can."""
  if x.size == 0 or x.size // x.shape[-1] > MOST_TOKENS:
    return f'x is {x.shape}; it takes 1 to {MOST_TOKENS} tokens'
  width = cache['k'].shape[-1]
  if width < 32 or width % 32:
    return f'heads are {width} wide; it takes multiples of 32'
  hidden = _params.rows_of(weights[3], spec.formats[3])[1]
  if hidden % 8:
    return f'{hidden} hidden activations; it takes multiples of 8'
  rows = x.shape[1] * _params.rows_of(weights[0], spec.formats[0])[0]
  if rows // cache['k'].shape[2] > _attend.MOST_ROWS:
    return f'{rows} queries; it takes {_attend.MOST_ROWS} a key head'
  types = (jnp.float32, jnp.bfloat16)
  if cache['k'].dtype not in types or cache['v'].dtype != cache['k'].dtype:
    return f'caches are {cache["k"].dtype} and {cache["v"].dtype}'
  for p, fmt in zip(weights, spec.formats, strict=True):
    # Hidden activations are none of the caller's.
    if reason := _cpu.why_not(x, p, fmt):
      return reason
  return ''


def _check(x, weights, norms, cache, positions, angles, mask, spec) -> int:
  """Checks what shapes can tell; returns the heads of a query."""
  if x.ndim != 3 or len(weights) != len(PRODUCTS) or cache['k'].ndim != 4:
    raise errors.ShapeError(
      f'Got x {x.shape}, {len(weights)} weights and keys {cache["k"].shape};'
      f' expected [B, T, D], weights {PRODUCTS} and [B, S, K, H].'
    )
  b, t, d = x.shape
  _, slots, kv_heads, width = cache['k'].shape
  rows = [
    tuple(_params.rows_of(p, fmt))
    for p, fmt in zip(weights, spec.formats, strict=True)
  ]
  heads = rows[0][0]
  hidden = rows[3][-1]
  want = [
    (heads, width),
    (2, kv_heads, width),
    (d,),
    (2, hidden),
    (d,),
  ]
  if rows != want or heads % kv_heads:
    raise errors.ShapeError(f'Weights have rows {rows}; expected {want}.')
  for p, fmt, lead, cols in zip(
    weights, spec.formats, want, (d, d, heads * width, d, hidden), strict=True
  ):
    _params.validate(p, fmt, lead, cols, part=True)
  sizes = {name: (width if name in ('query', 'key') else d,) for name in NORMS}
  shapes = {name: tuple(v.shape) for name, v in norms.items()}
  least = {'pre_attention', 'pre_ffw'}
  if not least <= shapes.keys() or any(
    sizes.get(name) != shape for name, shape in shapes.items()
  ):
    raise errors.ShapeError(f'Norms are {shapes}; expected some of {sizes}.')
  shapes = {
    'positions': positions.shape,
    'angles': angles.shape,
    'mask': mask.shape,
    'v': cache['v'].shape,
    'cache positions': cache['positions'].shape,
    'end_index': cache['end_index'].shape,
  }
  expected = {
    'positions': (b, t),
    'angles': (b, t, width // 2),
    'mask': (b, t, slots),
    'v': (b, slots, kv_heads, width),
    'cache positions': (b, slots),
    'end_index': (b,),
  }
  if shapes != expected or t > slots:
    raise errors.ShapeError(f'Got {shapes}; expected {expected}.')
  return heads
