# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the C++ kernels against float64, on all instructions there are."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
import gemma_ext.kernels as kernels
from gemma_ext.kernels import _cpu
from gemma_ext.kernels import _matmul
from tests.kernels import packed_weights

pytestmark = pytest.mark.skipif(
  _cpu.library() is None, reason='the C++ library was not built'
)

NAMES = [n for n in ('portable', 'avx2', 'avx512') if _cpu.has(n)]
FORMATS = packed_weights.FORMATS + [
  kernels.TernaryFormat(group=128),
  kernels.TernaryFormat(group=128, packing='5trit'),
  kernels.TernaryFormat(group=16, packing='5trit', scale='ue5m3'),
  kernels.TernaryFormat(
    group=8, packing='5trit', scale='ue5m3', planes=2, tied=True
  ),
  kernels.TernaryFormat(group=128, packing='3of4'),
  kernels.TernaryFormat(group=8, packing='3of4', scale='ue5m3'),
  kernels.TernaryFormat(group=12),
  kernels.TernaryFormat(group=4, planes=5, tied=True),
  kernels.IntFormat(bits=8, group=128),
  kernels.IntFormat(bits=7, group=64),
  kernels.IntFormat(bits=6, group=32, scale='ue5m3'),
  kernels.IntFormat(bits=4, group=32, scale='ue5m3'),
  kernels.IntFormat(bits=4, group=32, scale='e4m3'),
  kernels.IntFormat(bits=5, group=128, scale='e4m3'),
  kernels.IntFormat(bits=4, group=192),
  kernels.IntFormat(bits=3, group=1024),
  kernels.IntFormat(bits=5, group=7),
]
# Half a step of x, relative to the largest of a block.
STEP = {16: 2.0**-15 * 1.01, 8: 2.0**-8 * 1.01}

_call = jax.jit(_cpu.matmul, static_argnames=('fmt', 'x_bits', 'named'))


def _x(shape, seed=1):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _bound(x, w, fmt, x_bits):
  """What half a step of x in every block comes to, and float32 rounding."""
  cols = x.shape[-1]
  group = fmt.group or cols
  most = 512 if x_bits == 16 else 128
  # No block is longer than this; a longer one only has a larger maximum.
  span = max(64, group if group % 64 else min(group, most))
  bound = np.zeros((len(x), len(w)))
  for i in range(0, cols, span):
    largest = np.abs(x[:, i : i + span]).max(axis=1)
    bound += np.outer(largest, np.abs(w[:, i : i + span]).sum(axis=1))
  return bound * STEP[x_bits] + 1e-5 * np.abs(x) @ np.abs(w).T


@pytest.mark.parametrize('named', NAMES)
@pytest.mark.parametrize('fmt', FORMATS, ids=str)
def test_equals_float64(fmt, named):
  group = fmt.group or 32
  for cols, rows, n in (
    (group, 70, 3),
    (5 * group, 7, 1),
    (-(-640 // group) * group, 67, 40),
    (-(-2112 // group) * group, 33, 1),
  ):
    p = packed_weights.packed(fmt, (rows,), cols, seed=rows)
    w = packed_weights.dense(p, fmt, cols)
    # Of very different size from block to block.
    x = _x((n, cols)) * np.exp2(np.arange(cols) // 64 % 9 - 4).astype('f')
    for x_bits in (16, 8):
      got = _call(
        x, p['codes'], p['scale'], fmt=fmt, x_bits=x_bits, named=named
      )
      assert got.shape == (n, rows) and got.dtype == jnp.float32
      error = np.abs(np.asarray(got, np.float64) - x.astype(np.float64) @ w.T)
      worst = np.max(error / _bound(x, w, fmt, x_bits))
      assert worst < 1, (cols, rows, n, x_bits, worst)


@pytest.mark.parametrize('fmt', FORMATS[:3] + FORMATS[6:9], ids=str)
def test_bfloat16_and_any_leading_shape(fmt):
  p = packed_weights.packed(fmt, (2, 35), 96)
  w = packed_weights.dense(p, fmt, 96)
  for lead in ((), (2, 3), (50,)):
    x = jnp.asarray(_x((*lead, 96)), jnp.bfloat16)
    got = jax.jit(kernels.matmul, static_argnames=('fmt', 'backend'))(
      x, p, fmt=fmt, backend='cpu'
    )
    assert got.dtype == jnp.bfloat16 and got.shape == (*lead, 2, 35)
    want = np.einsum('...i,hoi->...ho', np.asarray(x, np.float64), w)
    assert packed_weights.relative(got, want) < 2**-8


def test_many_rows_of_x_equal_one_by_one():
  fmt = kernels.IntFormat(bits=4, group=32)
  p = packed_weights.packed(fmt, (100,), 640)
  x = _x((33, 640))
  args = {'fmt': fmt, 'x_bits': 16}
  together = _call(x, p['codes'], p['scale'], **args)
  alone = [
    _call(x[i : i + 1], p['codes'], p['scale'], **args)[0] for i in (0, 32)
  ]
  np.testing.assert_allclose(together[::32], alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('named', NAMES)
def test_what_lies_behind_a_row_counts_nothing(named):
  """Not what an earlier call has left there either."""
  fmt = kernels.TernaryFormat(group=4)
  p = packed_weights.packed(fmt, (7,), 68)
  w = packed_weights.dense(p, fmt, 68)
  x = _x((3, 68))
  for value in (np.full((40, 68), np.nan, np.float32), x):
    y = _call(value, p['codes'], p['scale'], fmt=fmt, x_bits=16, named=named)
    jax.block_until_ready(y)
  assert packed_weights.relative(y, x.astype(np.float64) @ w.T) < 2**-12


@pytest.mark.parametrize('named', NAMES)
@pytest.mark.parametrize('n', [1, 20])
def test_what_is_not_finite_stays_so(named, n):
  fmt = kernels.IntFormat(bits=8, group=32)
  p = packed_weights.packed(fmt, (5,), 64)
  for bad in (np.nan, np.inf, -np.inf):
    x = _x((n, 64))
    x[-1, 40] = bad
    y = _call(x, p['codes'], p['scale'], fmt=fmt, x_bits=16, named=named)
    assert not np.isfinite(y[-1]).any()
    assert np.isfinite(y[:-1]).all()


@pytest.mark.parametrize('named', NAMES)
def test_zeros_and_tiny_and_huge(named):
  fmt = kernels.TernaryFormat(group=32)
  p = packed_weights.packed(fmt, (5,), 64)
  w = packed_weights.dense(p, fmt, 64)
  for size in (0.0, 1e-36, 1e-20, 1e30):
    x = _x((2, 64)) * np.float32(size)
    y = _call(x, p['codes'], p['scale'], fmt=fmt, x_bits=16, named=named)
    np.testing.assert_allclose(y, x @ w.T, rtol=1e-2, atol=size / 100 + 1e-30)


def test_no_rows():
  fmt = kernels.IntFormat(bits=8)
  p = packed_weights.packed(fmt, (5,), 64)
  y = _call(jnp.zeros((0, 64)), p['codes'], p['scale'], fmt=fmt, x_bits=16)
  assert y.shape == (0, 5)


def test_derivatives_are_those_of_xla():
  fmt = kernels.IntFormat(bits=4, group=32)
  p = packed_weights.packed(fmt, (7,), 96)
  x, t = _x((4, 96)), _x((4, 7), seed=2)

  def loss(x, scale, backend):
    q = {'codes': p['codes'], 'scale': scale}
    return jnp.sum(kernels.matmul(x, q, fmt, backend=backend) * t)

  grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
  for got, want in zip(
    grad(x, p['scale'], 'cpu'), grad(x, p['scale'], 'xla'), strict=True
  ):
    assert got.dtype == want.dtype
    np.testing.assert_allclose(
      np.asarray(got, 'f'), np.asarray(want, 'f'), rtol=1e-2, atol=1e-5
    )
  run = lambda x: kernels.matmul(x, p, fmt, backend='cpu')
  y, dy = jax.jvp(run, (jnp.asarray(x),), (jnp.asarray(x),))
  np.testing.assert_allclose(dy, y, rtol=1e-3, atol=1e-3)


def test_vmap_over_x_and_over_weights():
  fmt = kernels.TernaryFormat(group=32)
  p = packed_weights.packed(fmt, (4, 9), 96)
  w = packed_weights.dense(p, fmt, 96)
  x = _x((4, 6, 96))
  run = lambda x, c, s: kernels.matmul(
    x, {'codes': c, 'scale': s}, fmt, backend='cpu'
  )
  each = jax.jit(jax.vmap(run, in_axes=(0, 1, 1)))(x, p['codes'], p['scale'])
  want = np.einsum('ebi,eoi->ebo', x.astype(np.float64), w)
  assert packed_weights.relative(each, want) < 1e-4
  one = {name: v[:, 0] for name, v in p.items()}
  got = jax.jit(jax.vmap(run, in_axes=(0, None, None)))(
    x, one['codes'], one['scale']
  )
  assert packed_weights.relative(got, x.astype(np.float64) @ w[0].T) < 1e-4


def test_inside_of_a_loop():
  fmt = kernels.IntFormat(bits=8, group=32)
  p = packed_weights.packed(fmt, (64,), 64)
  w = packed_weights.dense(p, fmt, 64)

  @jax.jit
  def run(x):
    body = lambda _, x: jnp.tanh(kernels.matmul(x, p, fmt, backend='cpu') / 8)
    return jax.lax.fori_loop(0, 5, body, x)

  want = _x((1, 64)).astype(np.float64)
  for _ in range(5):
    want = np.tanh(want @ w.T / 8)
  assert packed_weights.relative(run(_x((1, 64))), want) < 1e-2


def test_latent_codes_go_to_xla():
  fmt = kernels.IntFormat(bits=4, group=32)
  p = packed_weights.packed(fmt, (7,), 96)
  p['codes'] = jnp.asarray(packed_weights.unpacked(p, fmt, 96), jnp.float32)
  x = _x((3, 96))
  np.testing.assert_array_equal(
    kernels.matmul(x, p, fmt), _matmul.matmul_xla(jnp.asarray(x), p, fmt)
  )
  with pytest.raises(errors.BackendError, match='codes is float32'):
    kernels.matmul(x, p, fmt, backend='cpu')


def test_sizes_are_checked_before_memory_is_read():
  fmt = kernels.IntFormat(bits=4, group=32)
  p = packed_weights.packed(fmt, (7,), 96)
  codes, scale = p['codes'], p['scale']
  for x, c, s, message in (
    (_x((3, 96)), codes[:, :-1], scale, 'bytes of codes'),
    (_x((3, 96)), codes, scale[:, :-1], 'scales=14; expected 21'),
    (_x((3, 97)), codes, scale, 'does not divide'),
    (_x((3, 320)), codes, scale, 'bytes of codes=448; expected 1120'),
    (_x((3, 96)), codes, scale.astype(jnp.float32), 'neither bfloat16'),
    (_x((3, 96)).astype(np.float16), codes, scale, 'neither float32'),
    (_x((3, 96)), codes.astype(jnp.int8), scale, 'wrong type'),
  ):
    with pytest.raises(Exception, match=message):
      jax.block_until_ready(_call(x, c, s, fmt=fmt, x_bits=16))


def test_unknown_kernels():
  fmt = kernels.IntFormat()
  p = packed_weights.packed(fmt, (5,), 64)
  with pytest.raises(Exception, match='no kernels abacus'):
    jax.block_until_ready(
      _call(
        _x((1, 64)), p['codes'], p['scale'], fmt=fmt, x_bits=16, named='abacus'
      )
    )


def test_without_the_library_xla_serves_and_says_so():
  code = """
import warnings, jax.numpy as jnp
from gemma_ext import errors, kernels
fmt = kernels.IntFormat(bits=8)
scale = fmt.pack_scale(jnp.ones((5, 1)))
p = {'codes': jnp.ones((5, 64), jnp.int8), 'scale': scale}
with warnings.catch_warnings(record=True) as found:
  warnings.simplefilter('always')
  for _ in range(2):
    assert kernels.matmul(jnp.ones((1, 64)), p, fmt).tolist() == [[64.0] * 5]
assert ['CPU kernels' in str(w.message) for w in found].count(True) == 1
try:
  kernels.matmul(jnp.ones((1, 64)), p, fmt, backend='cpu')
except errors.BackendError as e:
  assert 'not built' in str(e)
else:
  raise AssertionError
"""
  subprocess.run(
    [sys.executable, '-c', code],
    check=True,
    env={
      **os.environ,
      'GEMMA_EXT_CPU_LIBRARY': '/nowhere/lib.so',
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '',
    },
  )
