# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The fast argmax against that of jax.numpy."""

from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext.text import _argmax


@pytest.mark.parametrize(
  'shape', [(3, 2048), (1024,), (2, 2, 1536), (4, 512), (3, 777)]
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_equals_numpy(shape, dtype):
  rng = np.random.default_rng(0)
  both = jax.jit(lambda x: (_argmax.argmax(x), jnp.argmax(x, axis=-1)))
  # Of few values, so that many are equal; nothing possible; NaN.
  for x in (
    rng.standard_normal(shape),
    rng.integers(0, 3, shape),
    np.full(shape, -np.inf),
    np.where(rng.random(shape) < 0.01, np.nan, 1.0),
  ):
    got, want = both(jnp.asarray(x, dtype))
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_only_the_official_method_is_replaced():
  class Mine(gm.text.Greedy):
    """May choose in another way."""

  assert isinstance(_argmax.fast(gm.text.Greedy()), _argmax.Greedy)
  for other in (Mine(), gm.text.RandomSampling()):
    assert _argmax.fast(other) is other
