# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens to a cache that they are written to first."""

import functools

import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.kernels import _backends
from gemma_ext.kernels import _cpu

# Query rows of one key head up to which 'cpu' is meant: decoding.
MOST_ROWS = 64
_MASKED = -2.3819763e38  # As in the official attention.


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cache_k: jax.Array,
  cache_v: jax.Array,
  start: jax.Array,
  mask: jax.Array,
  *,
  soft_cap: float | None = None,
  backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Writes keys and values to a cache and attends to all of it.

  Args:
    q: Queries `[B, T, N, H]`, scaled.
    k: New keys `[B, T, K, H]`; K divides N.
    v: New values, as k.
    cache_k: Keys `[B, S, K, H]`, of the type of k.
    cache_v: Values, as cache_k.
    start: Slot of the first new token, int32 scalar; where they would not fit,
      the nearest one where they do.
    mask: What to attend to, bool `[B, T, S]`. A token that attends to nothing
      gets the mean of all values.
    soft_cap: Bound of the logits, by tanh.
    backend: 'xla' or 'cpu', for a few tokens. The latter writes to the cache in
      place, if nothing else needs it as it was, and reads only slots that some
      token attends to. By default it is taken where it can be had.

  Returns:
    The mean of the values by the softmax of the logits, `[B, T, N, H]` in the
    type of q, and both caches. 'cpu' computes in float32; 'xla' rounds logits
    and weights to the type of the inputs, as the official attention does.

  Raises:
    ShapeError: If the shapes do not fit each other or the backend is unknown.
    BackendError: If `backend='cpu'` cannot run here.
  """
  _backends.check(backend)
  _check(q, k, v, cache_k, cache_v, start, mask)
  reason = _why_not(q, k, v, cache_k, cache_v)
  cap = float(soft_cap or 0.0)
  run = _cpu_attend if _backends.choose(backend, reason) == 'cpu' else _xla
  return run(cap, q, k, v, cache_k, cache_v, start, mask)


def _check(q, k, v, cache_k, cache_v, start, mask) -> None:
  shapes = {
    'k': k.shape,
    'v': v.shape,
    'cache_k': cache_k.shape,
    'cache_v': cache_v.shape,
    'mask': mask.shape,
    'start': start.shape,
  }
  ok = q.ndim == k.ndim == cache_k.ndim == 4
  if ok:
    b, t, n, h = q.shape
    heads, slots = k.shape[2], cache_k.shape[1]
    ok = t <= slots and heads > 0 and n % heads == 0
    new, old = (b, t, heads, h), (b, slots, heads, h)
    want = dict(zip(shapes, (new, new, old, old, (b, t, slots), ())))
    ok = ok and shapes == want
  if not ok:
    raise errors.ShapeError(
      f'Got q {q.shape} with {shapes}; expected q [B, T, N, H], k and v'
      ' [B, T, K, H], caches [B, S, K, H], mask [B, T, S], start [].'
    )


def _why_not(q, k, v, cache_k, cache_v) -> str:
  if reason := _cpu.unavailable():
    return reason
  types = (jnp.float32, jnp.bfloat16)
  if q.dtype not in types or k.dtype not in types:
    return f'q is {q.dtype}, k {k.dtype}; it takes {types}'
  if not k.dtype == v.dtype == cache_k.dtype == cache_v.dtype:
    return f'k, v and caches are {k.dtype}, {v.dtype}, {cache_k.dtype}, ...'
  if q.shape[3] < 32 or q.shape[3] % 16:
    return f'heads are {q.shape[3]} wide; it takes multiples of 16 from 32 on'
  rows = q.shape[1] * q.shape[2] // k.shape[2]
  if rows > MOST_ROWS:
    return f'{rows} queries a key head; it takes {MOST_ROWS}'
  return ''


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cpu_attend(soft_cap, q, k, v, cache_k, cache_v, start, mask):
  return _cpu.attend(q, k, v, cache_k, cache_v, start, mask, soft_cap=soft_cap)


@_cpu_attend.defjvp
def _cpu_attend_jvp(soft_cap, primals, tangents):
  _, tangent = jax.jvp(functools.partial(_xla, soft_cap), primals, tangents)
  return _cpu_attend(soft_cap, *primals), tangent


def _xla(soft_cap, q, k, v, cache_k, cache_v, start, mask):
  at = (0, jnp.maximum(start, 0), 0, 0)  # No negative one is from the end.
  cache_k = jax.lax.dynamic_update_slice(cache_k, k, at)
  cache_v = jax.lax.dynamic_update_slice(cache_v, v, at)
  b, t, n, h = q.shape
  heads = k.shape[2]
  q = q.reshape(b, t, heads, n // heads, h)
  logits = jnp.einsum('BTKGH,BSKH->BTKGS', q, cache_k)
  if soft_cap:
    logits = jnp.tanh(logits / soft_cap) * soft_cap
  logits = jnp.where(mask[:, :, None, None], logits, _MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(cache_v.dtype)
  out = jnp.einsum('BTKGS,BSKH->BTKGH', weights, cache_v)
  return out.reshape(b, t, n, h).astype(q.dtype), cache_k, cache_v
