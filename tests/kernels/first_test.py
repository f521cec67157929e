# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the first planes and rows of a packed weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
import gemma_ext.kernels as kernels
from gemma_ext.kernels import _cpu
from tests.kernels import packed_weights

ROWS, COLS = 37, 96
_BACKENDS = ['xla'] + ['cpu'] * (_cpu.library() is not None)
_PARTS = [
  (fmt, planes, rows)
  for fmt in packed_weights.FORMATS
  for planes in ((None, 1, 2) if getattr(fmt, 'planes', 1) > 1 else (None,))
  for rows in (None, 5)
  if (planes or rows)
  and planes != getattr(fmt, 'planes', 1)
  and not (rows and planes is None and getattr(fmt, 'tied', False))
]


def _dense(p, fmt, planes, rows):
  """What is meant, float64."""
  codes = packed_weights.unpacked(p, fmt, COLS)
  scale = packed_weights.scales(p, fmt)
  w = codes * np.repeat(scale, COLS // scale.shape[-1], axis=-1)
  if isinstance(fmt, kernels.TernaryFormat):
    w = w[:planes].sum(0)
  return w[:rows]


@pytest.mark.parametrize('fmt, planes, rows', _PARTS, ids=str)
def test_every_operation_reads_the_part(fmt, planes, rows):
  p = packed_weights.packed(fmt, (ROWS,), COLS)
  part, part_fmt = kernels.first(p, fmt, planes=planes, rows=rows)
  assert part['codes'] is p['codes']
  w = _dense(p, fmt, planes, rows)
  # A scale times three has one digit more than bfloat16 holds.
  scale_error = 2**-8 if getattr(fmt, 'tied', False) and planes else 0
  got = kernels.dequantize(part, part_fmt, COLS)
  assert got.shape == w.shape
  assert packed_weights.relative(got, w) <= 1e-6 + scale_error
  ids = jnp.array([0, 4, -1, 2])
  np.testing.assert_array_equal(
    kernels.take(part, part_fmt, ids, COLS), got[ids]
  )
  for count in (1, 3, 40):
    x = np.random.default_rng(1).standard_normal((count, COLS), np.float32)
    want = x.astype(np.float64) @ w.T
    for backend in _BACKENDS:
      y = kernels.matmul(x, part, part_fmt, backend=backend)
      assert y.shape == want.shape
      assert packed_weights.relative(y, want) < 2e-4 + scale_error


def test_gradients_through_a_part():
  fmt = kernels.TernaryFormat(group=32, planes=2)
  p = packed_weights.packed(fmt, (ROWS,), COLS)
  part, part_fmt = kernels.first(p, fmt, planes=1, rows=5)
  w = _dense(p, fmt, 1, 5)
  for backend in _BACKENDS:
    grad = jax.grad(
      lambda x, b=backend: kernels.matmul(x, part, part_fmt, backend=b).sum()
    )(jnp.ones((2, COLS)))
    want = np.tile(w.sum(0), (2, 1))
    assert packed_weights.relative(grad, want) < 1e-5


@pytest.mark.skipif('cpu' not in _BACKENDS, reason='no library')
@pytest.mark.parametrize('planes, rows', [(1, None), (None, 1), (1, 1)])
def test_the_kernels_copy_no_codes(planes, rows):
  planes_of = 1 if planes is None else 2
  fmt = kernels.TernaryFormat(group=64, planes=planes_of)
  p = packed_weights.packed(fmt, (2048,), 1024)

  @jax.jit
  def run(x, p):
    part, part_fmt = kernels.first(p, fmt, planes=planes, rows=rows and 1024)
    return kernels.matmul(x, part, part_fmt, backend='cpu')

  compiled = run.lower(jnp.ones((1, 1024)), p).compile()
  scales = p['scale'].nbytes
  assert compiled.memory_analysis().temp_size_in_bytes < scales + 8192
  assert p['codes'].nbytes > 4 * (scales + 8192)


@pytest.mark.parametrize(
  'fmt, kwargs',
  [
    (kernels.TernaryFormat(group=32, planes=2), {'planes': 3}),
    (kernels.TernaryFormat(group=32, planes=2), {'planes': 0}),
    (kernels.IntFormat(), {'planes': 1}),
    (kernels.IntFormat(), {'rows': ROWS + 1}),
    (kernels.IntFormat(), {'rows': 0}),
    (kernels.TernaryFormat(group=32, planes=2, tied=True), {'rows': 5}),
  ],
  ids=str,
)
def test_more_than_there_is(fmt, kwargs):
  p = packed_weights.packed(fmt, (ROWS,), COLS)
  with pytest.raises(errors.ShapeError, match='='):
    kernels.first(p, fmt, **kwargs)


def test_codes_of_another_weight_are_still_refused():
  fmt = kernels.IntFormat(bits=4, group=32)
  p = packed_weights.packed(fmt, (ROWS,), COLS)
  for codes in (p['codes'][:-1], p['codes'][:, :-1], p['codes'][None]):
    with pytest.raises(errors.ParamsMismatchError, match='codes are'):
      kernels.matmul(jnp.ones((1, COLS)), {**p, 'codes': codes}, fmt)
  # A checkpoint's weight is no part: it must be whole.
  part, _ = kernels.first(p, fmt, rows=5)
  with pytest.raises(errors.ParamsMismatchError, match='codes are'):
    kernels.validate(part, fmt, (5,), COLS)
