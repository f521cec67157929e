# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the packed matmul against float64 and dense autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
import gemma_ext.kernels as kernels
from gemma_ext.kernels import _matmul
from tests.kernels import packed_weights

COLS = 96
matmul = jax.jit(kernels.matmul, static_argnames=('fmt', 'backend'))
matmul_xla = jax.jit(_matmul.matmul_xla, static_argnames=('fmt', 'chunk'))
TOLERANCE = {jnp.float32: 1e-6, jnp.bfloat16: 2**-8}


def _x(shape, dtype=jnp.float32, seed=1):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape), dtype)


@pytest.mark.parametrize('fmt', packed_weights.FORMATS, ids=str)
@pytest.mark.parametrize('dtype', list(TOLERANCE), ids=['f32', 'bf16'])
def test_equals_float64(fmt, dtype):
  p = packed_weights.packed(fmt, (2, 35), COLS)
  w = packed_weights.dense(p, fmt, COLS)
  for lead in ((), (2, 3), (50,)):
    x = _x((*lead, COLS), dtype)
    want = np.einsum('...i,hoi->...ho', np.asarray(x, np.float64), w)
    got = matmul(x, p, fmt)
    assert got.dtype == dtype and got.shape == (*lead, 2, 35)
    assert packed_weights.relative(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize('fmt', packed_weights.FORMATS[2:6], ids=str)
@pytest.mark.parametrize('rows', [(128,), (3, 67)])
def test_chunks_change_nothing(fmt, rows):
  p = packed_weights.packed(fmt, rows, COLS)
  x = _x((2, 3, COLS))
  whole = matmul_xla(x, p, fmt, chunk=0)
  chunks = matmul_xla(x, p, fmt, chunk=64 * COLS)
  assert chunks.shape == whole.shape == (2, 3, *rows)
  np.testing.assert_allclose(chunks, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('chunk', [0, 64 * COLS])
@pytest.mark.parametrize('fmt', packed_weights.FORMATS[2:6], ids=str)
def test_gradients_are_those_of_the_dense_weight(fmt, chunk):
  p = packed_weights.packed(fmt, (130,), COLS)
  scale = fmt.open_scale(p['scale'])
  x, target = _x((4, COLS)), _x((4, 130), seed=2)

  def loss(x, scale):
    q = {'codes': p['codes'], 'scale': scale}
    return jnp.sum(_matmul.matmul_xla(x, q, fmt, chunk=chunk) * target)

  dx, ds = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, scale)
  w = packed_weights.dense(p, fmt, COLS)
  t = np.asarray(target, np.float64)
  assert packed_weights.relative(dx, t @ w) < 1e-6
  dw = t.T @ np.asarray(x, np.float64)
  codes = packed_weights.unpacked(p, fmt, COLS)
  want = (codes * dw).reshape(*codes.shape[:-1], scale.shape[-1], -1).sum(-1)
  if getattr(fmt, 'tied', False):
    want = np.tensordot(3.0 ** np.arange(fmt.planes)[::-1], want, 1)[None]
  assert packed_weights.relative(ds, want) < 1e-6


@pytest.mark.parametrize(
  'fmt',
  # One zero in four is more than rounding, see formats_test.
  [f for f in packed_weights.FORMATS if getattr(f, 'packing', '') != '3of4'],
  ids=str,
)
def test_latent_codes_round_and_pass_gradients_straight(fmt):
  lo, hi = fmt.code_range
  shape = fmt.latent_shape((5,), COLS)
  rng = np.random.default_rng(3)
  latent = rng.uniform(lo - 1, hi + 1, shape).astype(np.float32)
  scale = jnp.ones(fmt.scale_shape((5,), COLS)) * 0.25
  x = _x((4, COLS))

  def loss(latent):
    return jnp.sum(kernels.matmul(x, {'codes': latent, 'scale': scale}, fmt))

  value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(latent))
  codes = np.clip(np.round(latent), lo, hi)
  # By plane: tied ones have three times the scale of the next.
  size = packed_weights.scales({'scale': scale}, fmt)[..., :1]
  wanted = (size * codes.reshape(-1, 5, COLS)).sum(0)
  want = (np.asarray(x, np.float64) @ wanted.T).sum()
  scale_of_sum = np.abs(np.asarray(x)).sum() * np.abs(wanted).mean()
  assert abs(float(value) - want) < 1e-6 * scale_of_sum
  straight = size.reshape(-1, *size.shape[-2:]) * np.asarray(x).sum(0)
  straight = straight.reshape(shape)
  inside = (latent >= lo - 0.5) & (latent <= hi + 0.5)
  assert 0.2 < inside.mean() < 1
  np.testing.assert_allclose(
    grad, np.where(inside, straight, 0), rtol=1e-5, atol=1e-6
  )


def test_packed_and_latent_codes_agree():
  fmt = kernels.IntFormat(bits=4, group=32)
  p = packed_weights.packed(fmt, (7,), COLS)
  latent = jnp.asarray(packed_weights.unpacked(p, fmt, COLS), jnp.bfloat16)
  x = _x((3, COLS))
  np.testing.assert_array_equal(
    matmul(x, {**p, 'codes': latent}, fmt), matmul(x, p, fmt)
  )


def test_vmap_over_experts_under_remat_and_jit():
  fmt = kernels.TernaryFormat(group=32)
  p = packed_weights.packed(fmt, (4, 9), COLS)  # Four experts.
  x = _x((4, 6, COLS))
  each = jax.vmap(
    lambda x, c, s: kernels.matmul(x, {'codes': c, 'scale': s}, fmt),
    in_axes=(0, 1, 1),
  )

  @jax.jit
  @jax.grad
  def grad(x):
    y = jax.checkpoint(each)(x, p['codes'], p['scale'])
    return 0.5 * jnp.sum(y**2)

  w = packed_weights.dense(p, fmt, COLS)
  y = np.einsum('ebi,eoi->ebo', np.asarray(x, np.float64), w)
  got = jax.jit(each)(x, p['codes'], p['scale'])
  assert packed_weights.relative(got, y) < 1e-6
  assert packed_weights.relative(grad(x), np.einsum('ebo,eoi->ebi', y, w)) < (
    1e-6
  )


def test_forward_mode():
  fmt = kernels.IntFormat(bits=8)
  p = packed_weights.packed(fmt, (5,), COLS)
  x, dx = _x((2, COLS)), _x((2, COLS), seed=5)
  _, dy = jax.jvp(lambda x: matmul(x, p, fmt), (x,), (dx,))
  np.testing.assert_allclose(dy, matmul(dx, p, fmt), rtol=1e-5)


def test_backward_keeps_no_dense_weight():
  fmt = kernels.TernaryFormat(group=32)
  p = packed_weights.packed(fmt, (1000,), COLS)
  _, pullback = jax.vjp(lambda x: matmul(x, p, fmt), _x((1, COLS)))
  kept = sum(v.nbytes for v in jax.tree.leaves(pullback))
  assert kept < 2 * (p['codes'].nbytes + p['scale'].nbytes) + 4 * COLS


def test_unknown_backend():
  fmt = kernels.IntFormat()
  p = packed_weights.packed(fmt, (5,), COLS)
  with pytest.raises(errors.ShapeError, match="'xla'"):
    kernels.matmul(_x((COLS,)), p, fmt, backend='abacus')


def test_integer_activations():
  fmt = kernels.IntFormat()
  p = packed_weights.packed(fmt, (5,), COLS)
  with pytest.raises(errors.ShapeError, match='int32'):
    kernels.matmul(jnp.zeros((2, COLS), jnp.int32), p, fmt)


def test_activations_of_another_width():
  fmt = kernels.IntFormat(bits=4)
  p = packed_weights.packed(fmt, (5,), COLS)
  with pytest.raises(errors.ParamsMismatchError, match=r'uint8\[5, 64'):
    kernels.matmul(_x((2, 2 * COLS)), p, fmt)
