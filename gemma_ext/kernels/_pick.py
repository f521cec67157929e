# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The last axis in another order, as logits of a table that has one are."""

import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.kernels import _backends
from gemma_ext.kernels import _cpu


def pick(
  x: jax.Array, places: jax.Array, *, backend: str | None = None
) -> jax.Array:
  """Returns `x[..., places]`.

  XLA takes a tenth of a step of decoding for it on CPUs, for a vocabulary.

  Args:
    x: `[..., I]`.
    places: int32 `[O]`; those out of bounds are the nearest in them.
    backend: 'xla' or 'cpu'; by default the latter where it can be had.

  Returns:
    `[..., O]`.

  Raises:
    ShapeError: If `x` or `places` are of other shapes or types, or the backend
      is unknown.
    BackendError: If `backend='cpu'` cannot run here.
  """
  _backends.check(backend)
  if places.ndim != 1 or places.dtype != jnp.int32 or not x.ndim:
    raise errors.ShapeError(
      f'Got x {x.dtype}{list(x.shape)} and places'
      f' {places.dtype}{list(places.shape)}; expected x [..., I] and places'
      ' int32 [O].'
    )
  reason = _cpu.unavailable()
  if not reason and x.dtype not in (jnp.float32, jnp.bfloat16):
    reason = f'x is {x.dtype}; it takes float32 and bfloat16'
  if not reason and not x.shape[-1]:
    reason = 'x has no columns'
  if _backends.choose(backend, reason) == 'cpu':
    rows = x.reshape(-1, x.shape[-1])
    return _on_cpu(rows, places).reshape(*x.shape[:-1], places.shape[0])
  return _xla(x, places)


@jax.custom_jvp
def _on_cpu(x, places):
  return _cpu.pick(x, places)


@_on_cpu.defjvp
def _on_cpu_jvp(primals, tangents):
  x, places = primals
  return _on_cpu(x, places), _xla(tangents[0], places)


def _xla(x, places):
  return jnp.take(x, places, axis=-1, mode='clip')
