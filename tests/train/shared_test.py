# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""One latent for all planes: there and back, gradient, smallest step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import compress
from gemma_ext import kernels
from gemma_ext.train import _shared


def _sum(codes, scale):
  wide = np.repeat(scale, codes.shape[-1] // scale.shape[-1], axis=-1)
  return np.sum(np.asarray(codes, np.float32) * wide, axis=0)


def _random(planes, *, ratio=3.0, seed=0):
  rng = np.random.default_rng(seed)
  codes = rng.integers(-1, 2, (planes, 6, 64)).astype(np.int8)
  scale = rng.uniform(0.8, 1.2, (planes, 6, 4)).astype(np.float32)
  return codes, scale / ratio ** np.arange(planes, dtype=np.float32)[
    :, None, None
  ]


@pytest.mark.parametrize('planes', [2, 3])
@pytest.mark.parametrize('with_dense', [False, True])
def test_split_inverts_merge(planes, with_dense):
  codes, scale = _random(planes)
  w = None
  if with_dense:
    noise = np.random.default_rng(1).normal(size=codes.shape[1:])
    w = jnp.asarray(_sum(codes, scale) + 0.3 * noise, jnp.float32)
  latent, ordered = _shared.merge(jnp.asarray(codes), jnp.asarray(scale), w)
  assert latent.shape == codes.shape[1:]
  np.testing.assert_array_equal(ordered, scale)
  np.testing.assert_array_equal(_shared.split(latent, ordered), codes)


def test_planes_come_in_order_and_the_sum_stays():
  codes, scale = _random(2)
  swap = np.zeros((6, 4), bool)
  swap[::2, 1] = True
  mixed = np.where(swap, scale[::-1], scale)
  grouped = codes.reshape(2, 6, 4, 16)
  mixed_codes = np.where(swap[..., None], grouped[::-1], grouped)
  mixed_codes = mixed_codes.reshape(codes.shape)
  latent, ordered = _shared.merge(jnp.asarray(mixed_codes), jnp.asarray(mixed))
  np.testing.assert_array_equal(ordered, scale)
  np.testing.assert_array_equal(_shared.split(latent, ordered), codes)


def test_group_without_a_scale_stays_at_zero():
  codes, scale = _random(2)
  for empty in ([1], [0, 1]):
    some = scale.copy()
    some[empty, 2, 1] = 0
    latent, ordered = _shared.merge(jnp.asarray(codes), jnp.asarray(some))
    assert np.isfinite(latent).all()
    got = _shared.split(latent, ordered)
    np.testing.assert_allclose(_sum(got, ordered), _sum(codes, some), atol=1e-6)
    grads = jax.grad(lambda x, s: jnp.sum(_shared.split(x, s)), (0, 1))(
      latent, ordered
    )
    assert all(np.isfinite(g).all() for g in grads)


def test_latent_stays_as_near_to_the_dense_weight_as_its_codes_allow():
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(8, 256)), jnp.float32)
  codes, scale = compress.fit_ternary(w, planes=2, group=128)
  latent, ordered = _shared.merge(codes, scale.astype(jnp.float32), w)
  unit = np.repeat(ordered[0], 128, axis=-1) / 3
  share = np.mean(np.isclose(latent * unit, w, atol=1e-5))
  assert share > 0.9  # The others are beyond the last sum.


def test_smallest_step_is_one_of_the_finest_plane():
  scale = jnp.asarray([[[3.0]], [[1.0]]])
  sums = []
  for x in np.linspace(-5, 5, 1001):
    codes = _shared.split(jnp.full((1, 1), x, jnp.float32), scale)
    sums.append(float(_sum(np.asarray(codes), np.asarray(scale))[0, 0]))
  assert sorted(set(sums)) == list(range(-4, 5))
  assert np.max(np.diff(sums)) == 1 and np.min(np.diff(sums)) == 0


def test_gradient_is_that_of_the_sum():
  codes, scale = _random(2)
  fmt = kernels.TernaryFormat(planes=2, group=16)
  latent, scale = _shared.merge(jnp.asarray(codes), jnp.asarray(scale))
  latent = latent.at[0, 0].set(9.0)  # Far outside.
  into = np.random.default_rng(2).normal(size=latent.shape)

  def loss(latent, scale):
    packed = {'codes': _shared.split(latent, scale), 'scale': scale}
    w = kernels.dequantize(packed, fmt, 64)
    return jnp.sum(w * into)

  by_latent, by_scale = jax.grad(loss, (0, 1))(latent, scale)
  unit = np.repeat(scale[0], 16, axis=-1) / 3
  want = np.array(into * unit)
  want[0, 0] = 0
  np.testing.assert_allclose(by_latent, want, rtol=1e-5)
  got = np.asarray(_shared.split(latent, scale)) * into
  want = got.reshape(2, 6, 4, 16).sum(-1)
  np.testing.assert_allclose(by_scale, want, rtol=1e-4, atol=1e-5)
