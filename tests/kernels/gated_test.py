# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the gated feed-forward layer against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
import gemma_ext.kernels as kernels
from gemma_ext.kernels import _cpu
from tests.kernels import packed_weights

needs_library = pytest.mark.skipif(
  _cpu.library() is None, reason='the C++ library was not built'
)
NAMES = [n for n in ('portable', 'avx2', 'avx512') if _cpu.has(n)]
FORMATS = [
  (kernels.TernaryFormat(group=32), kernels.TernaryFormat(group=32)),
  (
    kernels.TernaryFormat(group=32, packing='5trit', planes=2),
    kernels.IntFormat(bits=4, group=32),
  ),
  (
    kernels.IntFormat(bits=6, group=32),
    kernels.IntFormat(bits=8),
  ),
  (
    kernels.TernaryFormat(group=8, scale='ue5m3', planes=2, tied=True),
    kernels.IntFormat(bits=3, group=24),
  ),
]
WIDE = 96

_call = jax.jit(_cpu.gated, static_argnames=('formats', 'x_bits', 'named'))


def _weights(formats, hidden, out=70):
  gate = packed_weights.packed(formats[0], (2, hidden), WIDE, seed=1)
  down = packed_weights.packed(formats[1], (out,), hidden, seed=2)
  return gate, down


def _x(shape, dtype=np.float32, seed=0):
  x = np.random.default_rng(seed).standard_normal(shape) / WIDE**0.5
  return jnp.asarray(x, dtype)


def _reference(x, gate, down, formats):
  """The layer, and what its error is relative to, in float64."""
  x = np.asarray(x, np.float64)
  both = packed_weights.dense(gate, formats[0], x.shape[-1])
  down = packed_weights.dense(down, formats[1], both.shape[1])
  g, u = np.einsum('...i,hoi->h...o', x, both)
  gelu = g / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3)))
  between = gelu * u
  return between @ down.T, np.abs(between) @ np.abs(down).T


def _error(got, want):
  y, size = want
  return np.linalg.norm(np.asarray(got, np.float64) - y) / np.linalg.norm(size)


@needs_library
@pytest.mark.parametrize('named', NAMES)
@pytest.mark.parametrize('formats', FORMATS, ids=str)
def test_equals_float64(formats, named):
  # Hidden widths around the 2048 of one part, odd numbers of rows of x.
  for hidden, n in ((96, 1), (2112, 3), (4032, 1), (192, 33)):
    gate, down = _weights(formats, hidden)
    x = _x((n, WIDE))
    want = _reference(x, gate, down, formats)
    for x_bits, most in ((16, 2.0**-13), (8, 2.0**-6)):
      got = _call(x, gate, down, formats, x_bits=x_bits, named=named)
      assert got.shape == (n, 70) and got.dtype == jnp.float32
      assert _error(got, want) < most, (hidden, n, x_bits)


@pytest.mark.parametrize('backend', ['xla', 'cpu'])
@pytest.mark.parametrize('formats', FORMATS, ids=str)
def test_any_leading_shape_and_type(formats, backend):
  if backend == 'cpu' and _cpu.library() is None:
    pytest.skip('the C++ library was not built')
  gate, down = _weights(formats, 192)
  run = jax.jit(
    lambda x, g, d: kernels.gated_ffn(
      x, g, formats[0], d, formats[1], backend=backend
    )
  )
  for dtype, most in ((jnp.float32, 2.0**-13), (jnp.bfloat16, 2.0**-7)):
    for lead in ((), (2, 3), (0,)):
      x = _x((*lead, WIDE), dtype)
      got = run(x, gate, down)
      assert got.shape == (*lead, 70) and got.dtype == dtype
      if got.size:
        assert _error(got, _reference(x, gate, down, formats)) < most


@needs_library
@pytest.mark.parametrize('named', NAMES)
def test_gelu_of_all_sizes(named):
  """Where tanh is 1 or -1, near 0, and where x**3 leaves float32."""
  fmt = kernels.IntFormat(bits=8)
  one = lambda rows: {
    'codes': jnp.ones((*rows, 32), jnp.int8),
    'scale': fmt.pack_scale(jnp.ones((*rows, 1))),
  }
  gate, down = one((2, 32)), one((1,))
  sizes = [0, 1e-20, 1e-4, 0.3, 1, 3, 6, 12, 1e4, 1e14]
  g = np.array([s for size in sizes for s in (size, -size)])
  x = np.zeros((len(g), 32), np.float32)
  x[:, 0] = g
  got = _cpu.gated(
    jnp.asarray(x), gate, down, (fmt, fmt), x_bits=16, named=named
  )
  t = (2 / np.pi) ** 0.5 * (g + 0.044715 * g**3)
  want = 32 * g * g / 2 * (1 + np.tanh(t))
  error = np.abs(np.asarray(got, np.float64)[:, 0] - want)
  np.testing.assert_array_less(error, 2e-4 * 32 * g * g + 1e-30)


@needs_library
def test_what_is_not_finite_stays_so():
  formats = FORMATS[0]
  gate, down = _weights(formats, 192)
  x = np.array(_x((3, WIDE)))
  x[1, 5] = np.nan
  got = kernels.gated_ffn(
    jnp.asarray(x), gate, formats[0], down, formats[1], backend='cpu'
  )
  assert not np.isfinite(got[1]).any()
  assert np.isfinite(got[::2]).all()


@needs_library
def test_derivatives_are_those_of_xla():
  formats = FORMATS[2]
  gate, down = _weights(formats, 192)
  x, t = _x((4, WIDE)), _x((4, 70), seed=3)

  def loss(x, scales, backend):
    g, d = (
      {'codes': p['codes'], 'scale': s} for p, s in zip((gate, down), scales)
    )
    y = kernels.gated_ffn(x, g, formats[0], d, formats[1], backend=backend)
    return jnp.sum(y * t)

  grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
  scales = gate['scale'], down['scale']
  got, want = (
    jax.tree.leaves(grad(x, scales, name)) for name in ('cpu', 'xla')
  )
  assert len(got) == 3
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype and np.abs(np.asarray(b, 'f')).max() > 0
    assert packed_weights.relative(a, b) < 1e-2


@needs_library
def test_vmap_over_x():
  formats = FORMATS[1]
  gate, down = _weights(formats, 192)
  run = lambda x: kernels.gated_ffn(
    x, gate, formats[0], down, formats[1], backend='cpu'
  )
  x = _x((3, 2, WIDE))
  assert packed_weights.relative(jax.vmap(run)(x), run(x)) < 1e-5


@needs_library
def test_many_calls_from_many_threads():
  """Helpers wait for jobs; none may be lost, mixed up or waited for twice."""
  formats = FORMATS[0]
  gate, down = _weights(formats, 960)

  @jax.jit
  def run(x):
    def body(_, x):
      y = kernels.gated_ffn(
        x, gate, formats[0], down, formats[1], backend='cpu'
      )
      return jnp.tanh(jnp.pad(y, ((0, 0), (0, WIDE - 70))) / 8)

    return jax.lax.fori_loop(0, 200, body, x)

  xs = [_x((1, WIDE), seed=seed) for seed in range(4)]
  want = [np.asarray(run(x)) for x in xs]
  for _ in range(5):
    got = [run(x) for x in xs]  # Dispatched without waiting.
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)


def test_shapes_are_checked():
  formats = FORMATS[0]
  gate, down = _weights(formats, 192)
  run = lambda x, g, d: kernels.gated_ffn(x, g, formats[0], d, formats[1])
  x = _x((2, WIDE))
  flat = {n: v.reshape(v.shape[0], -1, v.shape[-1]) for n, v in gate.items()}
  with pytest.raises(errors.ShapeError, match=r'rows \(384,\)'):
    run(x, flat, down)
  with pytest.raises(errors.ShapeError, match='int32'):
    run(x.astype(jnp.int32), gate, down)
  with pytest.raises(errors.ParamsMismatchError):
    run(x[:, :64], gate, down)
  short = packed_weights.packed(formats[1], (70,), 160)
  with pytest.raises(errors.ParamsMismatchError):
    run(x, gate, short)
  with pytest.raises(errors.ShapeError, match='abacus'):
    kernels.gated_ffn(x, gate, formats[0], down, formats[1], backend='abacus')


@needs_library
def test_sizes_are_checked_before_memory_is_read():
  formats = FORMATS[0]
  gate, down = _weights(formats, 192)
  short = down | {'codes': down['codes'][..., :-1]}
  for g, d in ((gate, short), (gate | {'codes': gate['codes'][:, :1]}, down)):
    with pytest.raises(Exception, match='bytes of codes'):
      jax.block_until_ready(_cpu.gated(_x((1, WIDE)), g, d, formats, x_bits=16))
