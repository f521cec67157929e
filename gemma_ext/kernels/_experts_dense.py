# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts of dense weights, and how rows of x find their experts.

A CPU walks over blocks of rows that chose the same expert, one at a time, so
that only the weights that were chosen are read, and no expert is multiplied
with rows of others. Accelerators gather the weights of a few rows, and
multiply many rows, sorted, in `jax.lax.ragged_dot`.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_ext import errors

# Rows of x and experts for which accelerators gather weights.
FEW_PAIRS = 16
# Rows of one expert that are multiplied at once at most.
_MOST = 128
# Rows from which XLA's CPU dots are faster in bfloat16 than in float32.
_SEVERAL = 4


class Adapters(NamedTuple):
  """What is added to the weights of experts, of a low rank R (LoRA).

  Attributes:
    gate: `[E, I, R]` and `[E, R, 2, f]`, whose products are added to G and U.
    down: `[E, f, R]` and `[E, R, O]`, to D. Each may be `None`.
  """

  gate: tuple[jax.Array, jax.Array] | None = None
  down: tuple[jax.Array, jax.Array] | None = None


NO_ADAPTERS = Adapters()


def experts_dense(
  x: jax.Array,
  gate: jax.Array,
  down: jax.Array,
  chosen: jax.Array,
  weight: jax.Array,
  *,
  adapters: Adapters = NO_ADAPTERS,
) -> jax.Array:
  """Sums the chosen experts of every row of x, each times its weight.

  An expert is `(gelu(x G^T) * (x U^T)) D`, gelu by tanh. Differentiable with
  respect to all but `chosen`.

  Args:
    x: Activations `[..., I]`, floating.
    gate: G and U of every expert, `[E, 2, f, I]`, as the official MoE has them.
    down: D of every expert, `[E, f, O]`.
    chosen: Numbers of experts, integers `[..., K]`; -1 for none. One that is
      named twice counts twice.
    weight: `[..., K]`, floating.
    adapters: Added to the weights, without making their sum.

  Returns:
    `[..., O]` in `x.dtype`. Products are summed in float32, hidden activations
    rounded to `x.dtype`.

  Raises:
    ShapeError: If the arguments do not fit each other.
  """
  check_routes(x, chosen, weight)
  fits = (
    gate.ndim == 4
    and down.ndim == 3
    and gate.shape[1] == 2
    and gate.shape[3] == x.shape[-1]
    and down.shape[:2] == (gate.shape[0], gate.shape[2])
  )
  if not fits:
    raise errors.ShapeError(
      f'Weights are {list(gate.shape)} and {list(down.shape)} for x'
      f' {list(x.shape)}; expected [E, 2, f, I] and [E, f, O].'
    )
  check_adapters(adapters, gate.shape[0], gate.shape[2], x, down.shape[-1])
  flat, route = flatten(x, chosen, weight)
  if jax.default_backend() == 'cpu':

    def expert(e: jax.Array, rows: jax.Array) -> jax.Array:
      at = lambda w: jax.lax.dynamic_index_in_dim(w, e, 0, keepdims=False)
      return _ffn(rows, at(gate), at(down), jax.tree.map(at, adapters))

    y = by_block(flat, *route, gate.shape[0], expert, down.shape[-1])
  elif route[0].size <= FEW_PAIRS:
    e = jnp.maximum(route[0].reshape(-1), 0)
    some = jax.tree.map(lambda a: a[e], adapters)
    y = few(flat, *route, gate[e], down[e], some)
  else:
    y = ragged(flat, *route, gate, down, adapters)
  return y.astype(x.dtype).reshape(*x.shape[:-1], down.shape[-1])


def check_routes(x: jax.Array, chosen: jax.Array, weight: jax.Array) -> None:
  """Raises ShapeError unless rows of x have experts and weights."""
  fits = (
    x.ndim > 0
    and jnp.issubdtype(x.dtype, jnp.floating)
    and chosen.ndim == x.ndim
    and chosen.shape[:-1] == x.shape[:-1]
    and chosen.shape == weight.shape
    and jnp.issubdtype(chosen.dtype, jnp.integer)
    and jnp.issubdtype(weight.dtype, jnp.floating)
  )
  if not fits:
    raise errors.ShapeError(
      f'x is {x.dtype}{list(x.shape)}, chosen'
      f' {chosen.dtype}{list(chosen.shape)}, weight'
      f' {weight.dtype}{list(weight.shape)}; expected floating [..., I],'
      ' integers [..., K] and floating [..., K].'
    )


def check_adapters(
  adapters: Adapters, experts: int, f: int, x: jax.Array, out: int
) -> None:
  """Raises ShapeError unless adapters fit their weights."""
  for pair, ins, outs in (
    (adapters.gate, x.shape[-1], (2, f)),
    (adapters.down, f, (out,)),
  ):
    if pair is None:
      continue
    a, b = (tuple(each.shape) for each in pair)
    rank = a[-1] if a else 0
    if (a, b) != ((experts, ins, rank), (experts, rank, *outs)):
      raise errors.ShapeError(
        f'Adapters are {list(a)} and {list(b)}; expected'
        f' {[experts, ins, "R"]} and {[experts, "R", *outs]}.'
      )


def adapted(
  y: jax.Array, pair: tuple[jax.Array, jax.Array] | None, x: jax.Array
) -> jax.Array:
  """Adds what the adapter of one expert adds to its products, if it has one.

  Args:
    y: Products of rows of x with a weight, `[B, ...]`.
    pair: `[I, R]` and `[R, ...]`, or `None`.
    x: `[B, I]`.

  Returns:
    The sum in float32; y itself where there is no adapter.
  """
  if pair is None:
    return y
  a, b = pair
  dot = lambda x, w: jnp.dot(
    x, w.astype(x.dtype), preferred_element_type=jnp.float32
  )
  more = dot(dot(x, a).astype(x.dtype), b.reshape(len(b), -1))
  return y + more.reshape(y.shape)


def flatten(
  x: jax.Array, chosen: jax.Array, weight: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns x `[N, I]`, and int32 and float32 `[N, K]`."""
  n, k = math.prod(x.shape[:-1]), chosen.shape[-1]
  return x.reshape(n, x.shape[-1]), (
    chosen.reshape(n, k).astype(jnp.int32),
    weight.reshape(n, k).astype(jnp.float32),
  )


def by_block(
  x: jax.Array,  # [N, I]
  chosen: jax.Array,  # int32[N, K]
  weight: jax.Array,  # float32[N, K]
  num_experts: int,
  expert: Callable[[jax.Array, jax.Array], jax.Array],
  out: int,
) -> jax.Array:  # float32[N, O]
  """Runs `expert(number, rows [B, I]) -> [B, O]` on rows that chose it.

  Blocks of as many rows as an expert has on average; those that are not needed
  are skipped. The weights of one expert are in use at a time, in the backward
  pass too.
  """
  n, k = chosen.shape
  total = jnp.zeros((n, out), jnp.float32)
  if n * k == 0:
    return total
  pairs = n * k
  size = min(_MOST, 1 << (pairs // num_experts).bit_length(), pairs)
  size = 1 if pairs <= num_experts else size
  blocks = min(pairs, pairs // size + num_experts)
  key = jnp.where(chosen < 0, num_experts, chosen).reshape(-1)
  order = jnp.argsort(key)
  counts = jnp.bincount(key, length=num_experts + 1)[:num_experts]
  ends = jnp.cumsum(counts)
  of_blocks = -(-counts // size)
  block_ends = jnp.cumsum(of_blocks)

  @jax.checkpoint
  def run(total, block):
    e = jnp.searchsorted(block_ends, block, side='right')
    e = jnp.minimum(e, num_experts - 1)
    within = block - (block_ends[e] - of_blocks[e])
    at = ends[e] - counts[e] + within * size + jnp.arange(size)
    pair = order[jnp.minimum(at, pairs - 1)]
    y = expert(e, x[pair // k]) * weight.reshape(-1)[pair, None]
    y = jnp.where((at < ends[e])[:, None], y, 0)
    return total.at[pair // k].add(y.astype(jnp.float32))

  def step(total, block):
    needed = block < block_ends[-1]
    return jax.lax.cond(needed, run, lambda t, _: t, total, block), None

  return jax.lax.scan(step, total, jnp.arange(blocks))[0]


def few(
  x: jax.Array,  # [N, I]
  chosen: jax.Array,  # int32[N, K]
  weight: jax.Array,  # float32[N, K]
  gate: jax.Array,  # [N K, 2, f, I]: those that were chosen
  down: jax.Array,  # [N K, f, O]
  adapters: Adapters = NO_ADAPTERS,  # Of [N K] experts.
) -> jax.Array:  # float32[N, O]
  """Every row of x with weights that were gathered for it."""
  n, k = chosen.shape
  rows = jnp.repeat(x, k, axis=0)
  both = jnp.einsum(
    'pi,pcfi->pcf', rows, gate, preferred_element_type=jnp.float32
  )
  each = jax.vmap(lambda y, pair, x: adapted(y[None], pair, x[None])[0])
  both = each(both, adapters.gate, rows).astype(x.dtype)
  hidden = jax.nn.gelu(both[:, 0]) * both[:, 1]
  y = jnp.einsum('pf,pfo->po', hidden, down, preferred_element_type=jnp.float32)
  y = each(y, adapters.down, hidden)
  return _combine(y.reshape(n, k, -1), chosen, weight)


def ragged(
  x: jax.Array,  # [N, I]
  chosen: jax.Array,  # int32[N, K]
  weight: jax.Array,  # float32[N, K]
  gate: jax.Array,  # [E, 2, f, I]
  down: jax.Array,  # [E, f, O]
  adapters: Adapters = NO_ADAPTERS,  # Of [E] experts.
) -> jax.Array:  # float32[N, O]
  """Rows of x sorted by expert, in `jax.lax.ragged_dot`."""
  n, k = chosen.shape
  count, _, f, _ = gate.shape
  key = jnp.where(chosen < 0, count, chosen).reshape(-1)
  order = jnp.argsort(key)
  sizes = jnp.bincount(key, length=count + 1)[:count].astype(jnp.int32)

  def dot(rows, w, pair):
    run = functools.partial(
      jax.lax.ragged_dot,
      group_sizes=sizes,
      preferred_element_type=jnp.float32,
    )
    y = run(rows, w)
    if pair is not None:
      a, b = (each.astype(x.dtype) for each in pair)
      b = b.reshape(*b.shape[:2], -1)
      y += run(run(rows, a).astype(x.dtype), b)
    return y

  both = gate.reshape(count, 2 * f, -1).swapaxes(1, 2)
  both = dot(x[order // k], both, adapters.gate).astype(x.dtype)
  hidden = jax.nn.gelu(both[:, :f]) * both[:, f:]
  y = dot(hidden, down, adapters.down)
  back = jnp.zeros_like(order).at[order].set(jnp.arange(n * k))
  return _combine(y[back].reshape(n, k, -1), chosen, weight)


def _combine(y, chosen, weight):
  # What nothing was chosen for may hold anything.
  y = jnp.where(chosen[..., None] < 0, 0, y)
  return jnp.sum(y * weight[..., None], axis=1)


def _ffn(
  x: jax.Array,  # [B, I]
  gate: jax.Array,  # [2, f, I]
  down: jax.Array,  # [f, O]
  adapters: Adapters,  # Of this expert.
) -> jax.Array:  # float32[B, O]
  dtype = x.dtype if x.shape[0] >= _SEVERAL else jnp.dtype(jnp.float32)
  f = gate.shape[1]

  def dot(a, w, axis):
    return jax.lax.dot_general(
      a.astype(dtype),
      w.astype(dtype),
      (((1,), (axis,)), ((), ())),
      preferred_element_type=jnp.float32,
    )

  both = dot(x, gate.reshape(2 * f, -1), 1)
  both = adapted(both, adapters.gate, x).astype(x.dtype)
  hidden = jax.nn.gelu(both[:, :f]) * both[:, f:]
  return adapted(dot(hidden, down, 0), adapters.down, hidden)
