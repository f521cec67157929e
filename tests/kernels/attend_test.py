# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of attention to a cache against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
import gemma_ext.kernels as kernels
from gemma_ext.kernels import _cpu

needs_library = pytest.mark.skipif(
  _cpu.library() is None, reason='the C++ library was not built'
)
NAMES = [n for n in ('portable', 'avx2', 'avx512') if _cpu.has(n)]
# Batch, tokens, heads, heads of keys, width, slots: several parts of 256
# slots, one query a key head and many, widths that are odd numbers of lanes.
SIZES = (
  (1, 1, 4, 1, 256, 700),
  (2, 3, 4, 2, 48, 257),
  (3, 1, 2, 2, 32, 5),
  (1, 8, 8, 1, 64, 1024),
)


def _inputs(size, dtype=np.float32, seed=0):
  b, t, n, k, h, s = size
  rng = np.random.default_rng(seed)
  make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  q = make(b, t, n, h) * h**-0.5
  mask = rng.random((b, t, s)) < 0.4
  mask[..., 0] = True
  return [
    q.astype(dtype),
    make(b, t, k, h),
    make(b, t, k, h),
    make(b, s, k, h),
    make(b, s, k, h),
    jnp.int32(s // 3),
    jnp.asarray(mask),
  ]


def _reference(inputs, soft_cap=0.0):
  """The output and the caches, float64."""
  *arrays, start, mask = inputs
  q, k, v, cache_k, cache_v = (np.array(a, np.float64) for a in arrays)
  b, t, n, h = q.shape
  slots, heads = cache_k.shape[1:3]
  start = np.clip(int(start), 0, slots - t)
  cache_k[:, start : start + t] = k
  cache_v[:, start : start + t] = v
  q = q.reshape(b, t, heads, -1, h)
  logits = np.einsum('btkgh,bskh->btkgs', q, cache_k)
  if soft_cap:
    logits = np.tanh(logits / soft_cap) * soft_cap
  logits = np.where(np.asarray(mask)[:, :, None, None], logits, -2.3819763e38)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  out = np.einsum('btkgs,bskh->btkgh', weights, cache_v)
  return out.reshape(b, t, n, h), cache_k, cache_v


def _runs():
  """Every way to compute it, and how exact it is in float32."""
  yield (
    'xla',
    lambda *a, soft_cap: kernels.attend(*a, soft_cap=soft_cap, backend='xla'),
  )
  for name in NAMES:
    yield (
      name,
      lambda *a, soft_cap, name=name: _cpu.attend(
        *a, soft_cap=soft_cap, named=name
      ),
    )


RUNS = dict(_runs())


@pytest.mark.parametrize('run', RUNS)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_equals_float64(size, run):
  call = jax.jit(RUNS[run], static_argnames='soft_cap')
  for soft_cap in (0.0, 0.5):
    inputs = _inputs(size)
    got = call(*inputs, soft_cap=soft_cap)
    want = _reference(inputs, soft_cap)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=2e-5)
    for a, b in zip(got[1:], want[1:], strict=True):
      np.testing.assert_array_equal(a, b.astype(np.float32))


@pytest.mark.parametrize('run', RUNS)
def test_bfloat16(run):
  for size in SIZES:
    inputs = _inputs(size, jnp.bfloat16)
    got = RUNS[run](*inputs, soft_cap=0.0)
    want = _reference(inputs)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 3
    np.testing.assert_allclose(
      np.asarray(got[0], np.float64), want[0], rtol=2e-2, atol=2e-2
    )
    for a, b in zip(got[1:], want[1:], strict=True):
      np.testing.assert_array_equal(np.asarray(a, np.float64), b)


@pytest.mark.parametrize('run', RUNS)
def test_logits_of_all_sizes(run):
  """Large ones, of which few weights are not zero, do not overflow."""
  for scale in (1e-20, 30.0, 3e4):
    inputs = _inputs(SIZES[0])
    inputs[0] = inputs[0] * scale
    got = RUNS[run](*inputs, soft_cap=0.0)[0]
    np.testing.assert_allclose(
      got, _reference(inputs)[0], rtol=1e-3, atol=1e-3 * max(1, scale / 3e3)
    )


@pytest.mark.parametrize('run', RUNS)
def test_a_start_that_does_not_fit(run):
  for start in (-5, 4, 5000):
    inputs = _inputs((2, 3, 4, 2, 32, 6))
    inputs[5] = jnp.int32(start)
    got = RUNS[run](*inputs, soft_cap=0.0)
    for a, b in zip(got, _reference(inputs), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('run', RUNS)
def test_nothing_to_attend_to(run):
  """As the softmax of equal logits has it: the mean of all values."""
  size = (2, 2, 2, 1, 32, 600)
  inputs = _inputs(size)
  inputs[6] = inputs[6].at[1, 0].set(False)
  got = RUNS[run](*inputs, soft_cap=0.0)[0]
  np.testing.assert_allclose(got, _reference(inputs)[0], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize('run', RUNS)
def test_masked_slots_do_not_matter(run):
  inputs = _inputs(SIZES[0])
  mask = np.zeros(inputs[6].shape, bool)
  mask[..., 200:300] = True
  inputs[6] = jnp.asarray(mask)
  call = RUNS[run]
  clean = call(*inputs, soft_cap=0.0)[0]
  dirty = list(inputs)
  dirty[3] = inputs[3].at[:, 400:].set(1e4)
  np.testing.assert_allclose(
    call(*dirty, soft_cap=0.0)[0], clean, rtol=1e-5, atol=1e-6
  )


@needs_library
def test_a_cache_that_is_still_needed_stays_as_it_was():
  inputs = _inputs(SIZES[1])
  before = np.array(inputs[3])

  @jax.jit
  def run(*inputs):
    out = kernels.attend(*inputs, backend='cpu')
    return out, inputs[3] * 1

  (_, new_k, _), old = run(*inputs)
  np.testing.assert_array_equal(old, before)
  np.testing.assert_array_equal(inputs[3], before)
  assert (np.asarray(new_k) != before).any()


@needs_library
def test_a_donated_cache_is_written_in_place():
  inputs = _inputs(SIZES[3])
  call = jax.jit(
    lambda *a: kernels.attend(*a, backend='cpu'), donate_argnums=(3, 4)
  )
  compiled = call.lower(*inputs).compile()
  assert compiled.memory_analysis().alias_size_in_bytes >= 2 * inputs[3].nbytes
  where = [inputs[i].unsafe_buffer_pointer() for i in (3, 4)]
  _, new_k, new_v = compiled(*inputs)
  assert [a.unsafe_buffer_pointer() for a in (new_k, new_v)] == where


@needs_library
def test_derivatives_and_vmap():
  inputs = _inputs((2, 2, 4, 2, 32, 40))

  def loss(q, backend):
    out, *_ = kernels.attend(q, *inputs[1:], backend=backend)
    return jnp.sum(out**2)

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  want = grad(inputs[0], 'xla')
  assert np.abs(want).max() > 0
  np.testing.assert_allclose(grad(inputs[0], 'cpu'), want, rtol=1e-3, atol=1e-4)
  qs = jnp.stack([inputs[0], -inputs[0]])
  run = lambda q: kernels.attend(q, *inputs[1:], backend='cpu')[0]
  np.testing.assert_allclose(
    jax.vmap(run)(qs), [run(q) for q in qs], rtol=1e-5, atol=1e-5
  )


def test_shapes_are_checked():
  inputs = _inputs((1, 2, 4, 2, 32, 40))
  for i, bad in (
    (0, inputs[0][:, :, :3]),
    (1, inputs[1][:, :1]),
    (3, inputs[3][..., :16]),
    (5, jnp.zeros((1,), jnp.int32)),
    (6, inputs[6][..., 1:]),
  ):
    wrong = list(inputs)
    wrong[i] = bad
    with pytest.raises(errors.ShapeError, match='expected q'):
      kernels.attend(*wrong)
  with pytest.raises(errors.ShapeError, match='expected q'):
    kernels.attend(*_inputs((1, 9, 4, 2, 32, 8))[:5], *inputs[5:])


@needs_library
def test_what_the_kernels_do_not_take_goes_to_xla():
  odd = _inputs((1, 1, 2, 1, 24, 40))
  many = _inputs((1, kernels.MOST_ROWS + 1, 1, 1, 32, 80))
  mixed = _inputs((1, 1, 2, 1, 32, 40))
  mixed[1:5] = [a.astype(jnp.float16) for a in mixed[1:5]]
  for inputs, reason in ((odd, '24 wide'), (many, '65 queries'), (mixed, '16')):
    got = kernels.attend(*inputs)[0]
    want = kernels.attend(*inputs, backend='xla')[0]
    np.testing.assert_array_equal(got, want)
    with pytest.raises(errors.BackendError, match=reason):
      kernels.attend(*inputs, backend='cpu')
