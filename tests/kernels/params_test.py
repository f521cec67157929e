# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of dequantise, look-up, checks and initial values."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
import gemma_ext.kernels as kernels
from tests.kernels import packed_weights

COLS = 96
dequantize = jax.jit(kernels.dequantize, static_argnums=(1, 2, 3))


@pytest.mark.parametrize('fmt', packed_weights.FORMATS, ids=str)
def test_dequantize(fmt):
  p = packed_weights.packed(fmt, (2, 5), COLS)
  want = packed_weights.dense(p, fmt, COLS)
  got = dequantize(p, fmt, COLS)
  assert got.dtype == jnp.float32 and got.shape == (2, 5, COLS)
  assert packed_weights.relative(got, want) < 1e-7
  half = dequantize(p, fmt, COLS, jnp.bfloat16)
  np.testing.assert_array_equal(half, got.astype(jnp.bfloat16))


@pytest.mark.parametrize('fmt', packed_weights.FORMATS, ids=str)
@pytest.mark.parametrize('rows', [(11, 3)])
def test_take_equals_indexing(fmt, rows):
  p = packed_weights.packed(fmt, rows, COLS)
  table = dequantize(p, fmt, COLS, jnp.bfloat16)
  ids = jnp.array([[0, 10, 3], [-1, 3, 5000]])
  got = jax.jit(lambda p, ids: kernels.take(p, fmt, ids, COLS, jnp.bfloat16))(
    p, ids
  )
  assert got.dtype == jnp.bfloat16 and got.shape == (2, 3, *rows[1:], COLS)
  np.testing.assert_array_equal(got, table[ids])


def test_take_unpacks_only_what_is_asked_for():
  fmt = kernels.IntFormat(bits=4, group=32)
  p = {
    'codes': jax.ShapeDtypeStruct(fmt.codes_shape((50000,), COLS), jnp.uint8),
    'scale': jax.ShapeDtypeStruct(
      fmt.scale_shape((50000,), COLS), jnp.bfloat16
    ),
  }
  ids = jax.ShapeDtypeStruct((3,), jnp.int32)
  compiled = jax.jit(lambda p, i: kernels.take(p, fmt, i, COLS)).lower(p, ids)
  memory = compiled.compile().memory_analysis()
  assert memory.temp_size_in_bytes < 50000


def test_take_gradient_of_scales():
  fmt = kernels.TernaryFormat(group=32, planes=2)
  p = packed_weights.packed(fmt, (6,), COLS)
  ids = jnp.array([4, 4, 1])

  def loss(scale):
    q = {'codes': p['codes'], 'scale': scale}
    return jnp.sum(kernels.take(q, fmt, ids, COLS))

  grad = jax.grad(loss)(p['scale'].astype(jnp.float32))
  codes = packed_weights.unpacked(p, fmt, COLS)
  want = codes.reshape(2, 6, 3, 32).sum(-1)
  want *= np.bincount(ids, minlength=6)[:, None]
  np.testing.assert_allclose(grad, want, atol=1e-4)


def test_take_wants_integers():
  fmt = kernels.IntFormat()
  p = packed_weights.packed(fmt, (6,), COLS)
  with pytest.raises(errors.ShapeError, match='float32'):
    kernels.take(p, fmt, jnp.zeros((2,)), COLS)
  with pytest.raises(errors.ShapeError, match="'xla'"):
    kernels.take(p, fmt, jnp.zeros((2,), jnp.int32), COLS, backend='abacus')


@pytest.mark.parametrize('fmt', packed_weights.FORMATS, ids=str)
def test_random_codes_are_valid_and_use_the_whole_range(fmt):
  p = packed_weights.packed(fmt, (7, 9), COLS)
  assert p['codes'].shape == fmt.codes_shape((7, 9), COLS)
  values = packed_weights.unpacked(p, fmt, COLS).astype(np.int8)
  assert (values.min(), values.max()) == fmt.code_range
  np.testing.assert_array_equal(jax.jit(fmt.pack)(values), p['codes'])
  lo, hi = fmt.code_range
  assert abs(values.mean() - (lo + hi) / 2) < 0.06 * (hi - lo)


def test_validate_takes_shapes():
  fmt = kernels.TernaryFormat(group=128)
  p = {
    'codes': jax.ShapeDtypeStruct((1, 8, 160), jnp.uint8),
    'scale': jax.ShapeDtypeStruct((1, 8, 5), jnp.bfloat16),
  }
  kernels.validate(p, fmt, (8,), 640)
  latent = jax.ShapeDtypeStruct((1, 8, 640), jnp.float32)
  kernels.validate({**p, 'codes': latent}, fmt, (8,), 640)
  with pytest.raises(errors.ParamsMismatchError, match='expected uint8'):
    kernels.validate(p, kernels.TernaryFormat(packing='5trit'), (8,), 640)
  with pytest.raises(errors.ParamsMismatchError, match='scale is bfloat16'):
    kernels.validate(p, fmt, (9,), 640)
  with pytest.raises(errors.GroupSizeError):
    kernels.validate(p, fmt, (8,), 641)


@pytest.mark.parametrize(
  'change',
  [
    {'codes': jnp.zeros((8, 640), jnp.uint8)},
    {'codes': jnp.zeros((8, 639), jnp.int8)},
    {'codes': jnp.zeros((8, 639), jnp.float32)},
    {'scale': jnp.zeros((8, 1), jnp.int32)},
    {'scale': jnp.zeros((8, 2), jnp.bfloat16)},
    {'zero': jnp.zeros((8, 1))},
  ],
  ids=['signless', 'narrow', 'latent', 'int_scale', 'scales', 'extra_key'],
)
def test_validate_names_what_is_wrong(change):
  p = {
    'codes': jnp.zeros((8, 640), jnp.int8),
    'scale': jnp.zeros((8, 1), jnp.bfloat16),
    **change,
  }
  with pytest.raises(errors.ParamsMismatchError, match='expected'):
    kernels.validate(p, kernels.IntFormat(), (8,), 640)


def test_validate_of_an_array():
  with pytest.raises(errors.ParamsMismatchError, match='ndarray'):
    kernels.validate(np.zeros(3), kernels.IntFormat(), (8,), 640)


def test_imports_only_jax_and_numpy():
  code = (
    'import sys, gemma_ext.kernels; bad = {"flax", "gemma", "optax",'
    ' "orbax", "tensorflow"} & set(sys.modules); sys.exit(str(bad) if bad'
    ' else 0)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
