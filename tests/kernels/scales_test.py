# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scales of one byte: every value, rounding, gradients; tied planes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
import gemma_ext.kernels as kernels
from gemma_ext.kernels import _scales

_BYTES = np.arange(256, dtype=np.uint8)
_KINDS = {'ue5m3': np.uint8, 'e4m3': np.int8}


def _values(kind):
  """All of them, as docs/formats.md says it."""
  u = _BYTES.astype(np.int64)
  if kind == 'ue5m3':
    return np.where(u, 2.0 ** ((u >> 3) - 20) * (1 + (u & 7) / 8), 0)
  size = 2.0 ** ((u >> 3 & 15) - 15) * (1 + (u & 7) / 8)
  return np.where(u & 127, np.where(u > 127, -size, size), 0)


@pytest.mark.parametrize('kind', _KINDS)
def test_every_byte_is_its_documented_value_and_comes_back(kind):
  stored = _BYTES.view(_KINDS[kind])
  values = np.asarray(_scales.decode(jnp.asarray(stored)), np.float64)
  np.testing.assert_array_equal(values, _values(kind))
  half = values if kind == 'ue5m3' else values[:128]
  assert (np.diff(half) > 0).all()
  got = jax.jit(_scales.encode, static_argnums=1)(values, kind)
  assert got.dtype == _KINDS[kind] == _scales.dtype(kind)
  # -0 comes back as 0.
  np.testing.assert_array_equal(got, np.where(values == 0, 0, stored))
  # All of them are bfloat16, too.
  rounded = kernels.round_scale(jnp.asarray(values), 'bf16')
  np.testing.assert_array_equal(rounded, values)


@pytest.mark.parametrize(
  'kind, most, least', [('ue5m3', 3840, 0), ('e4m3', 1.875, -1.875)]
)
def test_rounds_to_the_nearest(kind, most, least):
  rng = np.random.default_rng(0)
  x = np.exp(rng.uniform(-16, 10, 4000)) * rng.choice([-1, 1], 4000)
  x = np.concatenate([x, [0, 1e-9, 1e9, -3]])
  got = np.asarray(kernels.round_scale(jnp.asarray(x), kind), np.float64)
  best = np.abs(_values(kind)[None] - x[:, None]).min(axis=1)
  np.testing.assert_allclose(np.abs(got - x), best, rtol=1e-4, atol=1e-9)
  assert got[-4:].tolist() == [0, 0, most, least]
  np.testing.assert_array_equal(_scales.decode(_scales.encode(x, kind)), got)


def test_gradient_goes_straight_through():
  fmt = kernels.TernaryFormat(planes=2, group=8, scale='ue5m3', tied=True)
  scale = jnp.asarray([[[0.1, 0.333]]])
  found, pull = jax.vjp(fmt.unpack_scale, scale)
  fine = np.asarray(kernels.round_scale(scale, 'ue5m3'))
  np.testing.assert_array_equal(found, np.concatenate([3 * fine, fine]))
  (back,) = pull(jnp.asarray([[[1.0, 2.0]], [[10.0, 20.0]]]))
  np.testing.assert_allclose(back, [[[13.0, 26.0]]])


@pytest.mark.parametrize(
  'fmt, bits',
  [
    (kernels.TernaryFormat(group=16, packing='5trit', scale='ue5m3'), 2.1),
    (
      kernels.TernaryFormat(
        planes=2, group=8, packing='5trit', scale='ue5m3', tied=True
      ),
      4.2,
    ),
    (kernels.TernaryFormat(planes=2, group=32, tied=True), 4.5),
  ],
)
def test_bits_and_shapes(fmt, bits):
  assert fmt.bits_per_weight(640) == pytest.approx(bits)
  assert fmt.scale_shape((3,), 640)[0] == fmt.scale_planes == 1
  stored = fmt.pack_scale(jnp.ones((fmt.planes, 3, 640 // fmt.group)))
  assert stored.dtype == fmt.scale_dtype
  assert stored.shape == fmt.scale_shape((3,), 640)
  moving = fmt.open_scale(stored)
  assert moving.dtype == jnp.float32 and moving.shape == stored.shape
  np.testing.assert_array_equal(fmt.pack_scale(moving), stored)
  assert fmt.unpack_scale(stored).shape[0] == fmt.planes


def test_bad_formats():
  with pytest.raises(errors.RecipeError, match="scale='fp8'"):
    kernels.TernaryFormat(scale='fp8')
  with pytest.raises(errors.RecipeError, match='tied=1'):
    kernels.TernaryFormat(tied=1)


def test_scales_of_another_type_are_refused():
  fmt = kernels.TernaryFormat(group=8, scale='ue5m3')
  p = {
    'codes': jnp.zeros(fmt.codes_shape((2,), 16), jnp.uint8),
    'scale': jnp.zeros(fmt.scale_shape((2,), 16), jnp.int32),
  }
  with pytest.raises(errors.ParamsMismatchError, match='expected uint8'):
    kernels.validate(p, fmt, (2,), 16)
  bf16 = kernels.TernaryFormat(group=8)
  p['scale'] = jnp.zeros(fmt.scale_shape((2,), 16), jnp.uint8)
  with pytest.raises(errors.ParamsMismatchError, match='expected bfloat16'):
    kernels.validate(p, bf16, (2,), 16)
