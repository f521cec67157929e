# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed weight -> dense weight."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gemma_ext.kernels import _formats
from gemma_ext.kernels import _params


def dequantize(
  p: Mapping[str, jax.Array],
  fmt: _formats.Format,
  cols: int,
  dtype: DTypeLike = jnp.float32,
) -> jax.Array:
  """Returns the dense weight `[*rows, cols]`.

  Scales times codes, and the sum over planes, are float32; the result is
  rounded to `dtype` once.

  Args:
    p: `{'codes', 'scale'}`, packed or with latent (floating) codes.
    fmt: Their format.
    cols: Input axis of the dense weight.
    dtype: Type of the result.

  Raises:
    ParamsMismatchError: If `p` does not have the shapes that `fmt` expects.
  """
  _params.validate(p, fmt, _params.rows_of(p, fmt), cols, part=True)
  return dense(p, fmt, cols, dtype)


def dense(
  p: Mapping[str, jax.Array],
  fmt: _formats.Format,
  cols: int,
  dtype: DTypeLike,
) -> jax.Array:
  """`dequantize` for parameters that were checked."""
  codes = _params.integer_codes(_params.own(p, fmt)['codes'], fmt, cols)
  scale = fmt.unpack_scale(p['scale'])[..., None]
  w = codes.reshape(*scale.shape[:-1], -1).astype(jnp.float32) * scale
  w = w.reshape(*w.shape[:-2], cols)
  if isinstance(fmt, _formats.TernaryFormat):
    w = w[0] if fmt.planes == 1 else jnp.sum(w, axis=0)
  return w.astype(dtype)
