# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed weights to test with, and what they stand for in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import gemma_ext.kernels as kernels

# Eager operations compile one by one; these compile once a shape.
_random = jax.jit(kernels.random_codes, static_argnums=(1, 2, 3))
_unpack = jax.jit(
  lambda codes, fmt, cols: fmt.unpack(codes, cols), static_argnums=(1, 2)
)

FORMATS = [
  kernels.TernaryFormat(group=32),
  kernels.TernaryFormat(group=48, planes=3),
  kernels.TernaryFormat(group=32, packing='5trit', planes=2),
  kernels.TernaryFormat(group=16, scale='ue5m3', planes=2),
  kernels.TernaryFormat(group=32, packing='3of4', planes=2),
  kernels.TernaryFormat(group=8, scale='ue5m3', planes=2, tied=True),
  kernels.TernaryFormat(group=32, planes=3, tied=True),
  kernels.IntFormat(bits=8),
  kernels.IntFormat(bits=8, group=16, scale='ue5m3'),
  kernels.IntFormat(bits=3, group=32, scale='e4m3'),
  kernels.IntFormat(bits=5, group=32),
  kernels.IntFormat(bits=4, group=32),
  kernels.IntFormat(bits=3),
  kernels.IntFormat(bits=2, group=96),
]


def packed(fmt, rows, cols, seed=0):
  """Random codes and scales, of both signs where there are two."""
  codes = _random(jax.random.key(seed), fmt, rows, cols)
  rng = np.random.default_rng(seed)
  scale = rng.standard_normal(fmt.scale_shape(rows, cols))
  if fmt.scale_dtype == np.uint8:
    scale = np.abs(scale)
  return {'codes': codes, 'scale': fmt.pack_scale(jnp.asarray(scale))}


def unpacked(p, fmt, cols):
  """Its integer codes as float64."""
  return np.asarray(_unpack(p['codes'], fmt, cols), np.float64)


def dense(p, fmt, cols):
  """The weight that `p` stands for, float64 `[*rows, cols]`."""
  codes = unpacked(p, fmt, cols)
  scale = scales(p, fmt)
  w = codes * np.repeat(scale, cols // scale.shape[-1], axis=-1)
  return w.sum(0) if isinstance(fmt, kernels.TernaryFormat) else w


def scales(p, fmt):
  """Its scales as docs/formats.md says it, float64."""
  scale = np.asarray(p['scale'])
  if scale.dtype == np.uint8:
    u = scale.astype(np.int64)
    scale = np.where(u, 2.0 ** ((u >> 3) - 20) * (1 + (u & 7) / 8), 0)
  elif scale.dtype == np.int8:
    u = scale.view(np.uint8).astype(np.int64)
    size = 2.0 ** ((u >> 3 & 15) - 15) * (1 + (u & 7) / 8)
    scale = np.where(u & 127, np.where(u > 127, -size, size), 0)
  scale = scale.astype(np.float64)
  if getattr(fmt, 'tied', False):
    scale = scale * 3.0 ** np.arange(fmt.planes)[::-1].reshape(
      -1, *[1] * (scale.ndim - 1)
    )
  return scale


def relative(got, want):
  """Error in the 2-norm."""
  got = np.asarray(got, np.float64)
  return np.linalg.norm(got - want) / np.linalg.norm(want)
