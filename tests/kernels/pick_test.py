# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the last axis in another order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext.kernels import _cpu

backends = pytest.mark.parametrize(
  'backend',
  [
    'xla',
    pytest.param(
      'cpu',
      marks=pytest.mark.skipif(
        bool(_cpu.unavailable()), reason='The CPU kernels were not built.'
      ),
    ),
  ],
)


@backends
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  ('shape', 'count'),
  [((7,), 7), ((2, 3, 5), 9), ((1, 40_000), 40_000), ((3, 17_000), 100)],
)
def test_places_are_picked(backend, dtype, shape, count):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal(shape), dtype)
  places = rng.integers(0, shape[-1], count).astype(np.int32)
  got = kernels.pick(x, jnp.asarray(places), backend=backend)
  assert got.dtype == x.dtype
  np.testing.assert_array_equal(got, np.asarray(x)[..., places])


@backends
def test_out_of_bounds_is_the_nearest(backend):
  x = jnp.arange(5.0)[None]
  places = jnp.array([-1, -(2**31), 5, 2**31 - 1, 4], jnp.int32)
  got = kernels.pick(x, places, backend=backend)
  np.testing.assert_array_equal(got, [[0, 0, 4, 4, 4]])


@backends
def test_gradients_and_vmap(backend):
  places = jnp.array([2, 0, 2], jnp.int32)
  pick = lambda x: kernels.pick(x, places, backend=backend)
  x = jnp.arange(12.0).reshape(4, 3)
  np.testing.assert_array_equal(jax.vmap(pick)(x), x[:, places])
  grads = jax.grad(lambda x: jnp.sum(pick(x) * jnp.array([1.0, 10, 100])))(x)
  np.testing.assert_array_equal(grads, np.tile([10.0, 0, 101], (4, 1)))
  many = jnp.stack([places, 2 - places])
  got = jax.vmap(lambda p: kernels.pick(x, p, backend=backend))(many)
  np.testing.assert_array_equal(got, [x[:, places], x[:, 2 - places]])


@pytest.mark.parametrize(
  ('x', 'places'),
  [
    (jnp.ones(()), jnp.zeros(1, jnp.int32)),
    (jnp.ones(3), jnp.zeros((1, 1), jnp.int32)),
    (jnp.ones(3), jnp.zeros(1, jnp.uint8)),
  ],
)
def test_other_shapes_and_types_are_errors(x, places):
  with pytest.raises(errors.ShapeError, match=r'expected x \[..., I\]'):
    kernels.pick(x, places)
