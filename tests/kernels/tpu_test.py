# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Kernels for TPUs: numbers in interpret mode, and that they lower."""

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext.kernels import _backends
from gemma_ext.kernels import tpu
from tests.kernels import packed_weights

_STREAMS = (3, 5, 6, 7)
FORMATS = [
  fmt
  for fmt in packed_weights.FORMATS
  if getattr(fmt, 'bits', 8) not in _STREAMS
  and getattr(fmt, 'packing', '') != '3of4'
]


def _x(n, cols, dtype=jnp.float32):
  x = np.random.default_rng(1).standard_normal((n, cols))
  return jnp.asarray(x, dtype)


def _lower(function, *args):
  lowered = jax.jit(function).trace(*args).lower(lowering_platforms=('tpu',))
  return lowered.as_text()


@pytest.mark.parametrize('fmt', FORMATS, ids=str)
def test_equals_float64(fmt):
  group = fmt.group or 32
  # One row of x and many; one block of bytes and several; odd numbers of rows.
  for cols, rows, n in (
    (group, 70, 1),
    (5 * group, 300, 20),
    (-(-2048 // group) * group, 33, 9),
  ):
    p = packed_weights.packed(fmt, (rows,), cols, seed=rows)
    w = packed_weights.dense(p, fmt, cols)
    for dtype, bound in ((jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)):
      x = _x(n, cols, dtype)
      got = tpu.matmul(x, p['codes'], p['scale'], fmt, interpret=True)
      assert got.shape == (n, rows) and got.dtype == dtype
      want = np.asarray(x, np.float64) @ w.T
      size = np.abs(np.asarray(x, np.float64)) @ np.abs(w).T
      error = np.linalg.norm(np.asarray(got, np.float64) - want)
      assert error < bound * np.linalg.norm(size), (cols, rows, n, dtype)


@pytest.mark.parametrize(
  'fmt, dtype',
  [*((fmt, jnp.bfloat16) for fmt in FORMATS), (FORMATS[0], jnp.float32)],
  ids=str,
)
def test_lowers_for_tpu(fmt, dtype):
  group = fmt.group or 32
  for cols, rows, n in ((-(-640 // group) * group, 2048, 1), (group, 70, 300)):
    p = packed_weights.packed(fmt, (rows,), cols)
    text = _lower(
      lambda x, p: tpu.matmul(x, p['codes'], p['scale'], fmt),
      _x(n, cols, dtype),
      p,
    )
    assert 'tpu_custom_call' in text


@pytest.mark.parametrize('width, hidden', [(2560, 10240), (5376, 21504)])
def test_shapes_of_large_models_lower(width, hidden):
  fmt = kernels.TernaryFormat(group=128)
  for rows, cols in ((2 * hidden, width), (width, hidden)):
    shapes = [
      jax.ShapeDtypeStruct((1, cols), jnp.bfloat16),
      jax.ShapeDtypeStruct(fmt.codes_shape((rows,), cols), fmt.codes_dtype),
      jax.ShapeDtypeStruct(fmt.scale_shape((rows,), cols), jnp.bfloat16),
    ]
    assert not tpu.why_not(*shapes, fmt)
    text = _lower(lambda x, c, s: tpu.matmul(x, c, s, fmt), *shapes)
    assert 'tpu_custom_call' in text


@pytest.fixture
def as_if_on_a_tpu(monkeypatch):
  monkeypatch.setattr(_backends, 'no_device', lambda platform: '')
  with pltpu.force_tpu_interpret_mode():
    yield


def test_as_a_backend(as_if_on_a_tpu):
  fmt = kernels.IntFormat(bits=4, group=32)
  p = packed_weights.packed(fmt, (2, 35), 96)
  w = packed_weights.dense(p, fmt, 96)
  x = _x(6, 96).reshape(2, 3, 96)

  def loss(x, scale, backend):
    y = kernels.matmul(x, {**p, 'scale': scale}, fmt, backend=backend)
    return jnp.sum(jnp.sin(y))

  got = kernels.matmul(x, p, fmt, backend='tpu')
  want = np.einsum('...i,hoi->...ho', np.asarray(x, np.float64), w)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  scale = p['scale'].astype(jnp.bfloat16)
  of = jax.grad(loss, argnums=(0, 1))
  for a, b in zip(of(x, scale, 'tpu'), of(x, scale, 'xla'), strict=True):
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=1e-3
    )


def test_the_feed_forward_layer(as_if_on_a_tpu, monkeypatch):
  fmt = kernels.TernaryFormat(group=32)
  gate = packed_weights.packed(fmt, (2, 96), 64)
  down = packed_weights.packed(fmt, (64,), 96, seed=1)
  x = _x(5, 64)
  got = kernels.gated_ffn(x, gate, fmt, down, fmt, backend='tpu')
  want = kernels.gated_ffn(x, gate, fmt, down, fmt, backend='xla')
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
  monkeypatch.setenv('GEMMA_EXT_BACKEND', 'tpu')
  np.testing.assert_array_equal(kernels.gated_ffn(x, gate, fmt, down, fmt), got)
  # What it cannot do, the reference does.
  stream = kernels.IntFormat(bits=5, group=32)
  p = packed_weights.packed(stream, (40,), 64)
  np.testing.assert_array_equal(
    kernels.matmul(x, p, stream),
    kernels.matmul(x, p, stream, backend='xla'),
  )


def test_what_it_cannot_do_is_said():
  fmt = kernels.IntFormat(bits=5, group=32)
  p = packed_weights.packed(fmt, (40,), 64)
  assert 'stream of bits' in tpu.why_not(_x(1, 64), *p.values(), fmt)
  x = jnp.zeros((1, 64), jnp.float16)
  assert 'float16' in tpu.why_not(x, *p.values(), fmt)
  for backend in ('tpu', 'gpu'):
    with pytest.raises(errors.BackendError, match='the default device is a'):
      kernels.matmul(_x(1, 64), p, fmt, backend=backend)
  cache = jnp.zeros((1, 8, 1, 4))
  with pytest.raises(errors.BackendError, match='no such operation'):
    kernels.attend(
      jnp.zeros((1, 1, 1, 4)),
      cache[:, :1],
      cache[:, :1],
      cache,
      cache,
      jnp.int32(0),
      jnp.ones((1, 1, 8), bool),
      backend='tpu',
    )
