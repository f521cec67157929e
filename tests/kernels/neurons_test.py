# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of feed-forward layers whose gates choose, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
import gemma_ext.kernels as kernels
from gemma_ext.kernels import _cpu
from gemma_ext.kernels import _neurons
from tests.kernels import packed_weights

needs_library = pytest.mark.skipif(
  _cpu.library() is None, reason='the C++ library was not built'
)
NAMES = [n for n in ('portable', 'avx2', 'avx512') if _cpu.has(n)]
# Formats of gate and down: groups along rows of 96 inputs and 160 outputs.
FORMATS = [
  (
    kernels.TernaryFormat(group=32),
    kernels.TernaryFormat(group=32, packing='5trit', planes=2),
  ),
  (
    kernels.IntFormat(bits=4, group=32),
    kernels.TernaryFormat(group=8, scale='ue5m3', planes=2, tied=True),
  ),
  (kernels.IntFormat(bits=5, group=8), kernels.IntFormat(bits=5, group=20)),
  (kernels.IntFormat(bits=8), kernels.IntFormat(bits=8)),
  (
    kernels.TernaryFormat(group=48, planes=2),
    kernels.TernaryFormat(group=16, packing='3of4', scale='ue5m3'),
  ),
  (
    kernels.IntFormat(bits=8, group=16),
    kernels.IntFormat(bits=3, group=80, scale='e4m3'),
  ),
]
WIDE, OUT = 96, 160

_call = jax.jit(
  _cpu.neurons,
  static_argnames=('formats', 'size', 'shared', 'outs', 'x_bits', 'named'),
)


def _weights(formats, hidden):
  gate = packed_weights.packed(formats[0], (2, hidden), WIDE, seed=1)
  down = packed_weights.packed(formats[1], (hidden,), OUT, seed=2)
  return gate, down


def _x(n, seed=0):
  x = np.random.default_rng(seed).standard_normal((n, WIDE)) / WIDE**0.5
  return jnp.asarray(x, jnp.float32)


def _router(hidden, experts, k, seed=0, **changes):
  rng = np.random.default_rng(seed)
  return {
    'w': jnp.asarray(rng.uniform(0.5, 2, hidden), jnp.float32),
    'bias': jnp.asarray(0.3 * rng.standard_normal(experts), jnp.float32),
    'k': jnp.int32(k),
    'threshold': jnp.float32(-1e30),
  } | changes


def _routing(router):
  return tuple(router[name] for name in ('w', 'bias', 'k', 'threshold'))


def _gelu(a):
  return a / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3)))


def _reference(x, weights, formats, router, size, shared):
  """The layer, what its error is relative to, and who runs, in float64."""
  x = np.asarray(x, np.float64)
  g, u = packed_weights.dense(weights[0], formats[0], WIDE)
  d = packed_weights.dense(weights[1], formats[1], OUT)
  act = _gelu(x @ g.T)
  norms = (act * np.asarray(router['w'], np.float64)) ** 2
  norms = norms[:, size * shared :].reshape(len(x), -1, size).sum(-1)
  logits = np.log(norms + 1e-20) + np.asarray(router['bias'], np.float64)
  logits[:, np.asarray(router['bias']) <= kernels.DEAD / 2] = -np.inf
  kth = np.sort(logits, axis=1)[:, ::-1][:, [int(router['k']) - 1]]
  keep = (logits >= kth) & (logits > float(router['threshold']))
  keep &= np.isfinite(logits)
  ones = np.ones((len(x), shared), bool)
  runs = np.repeat(np.concatenate([ones, keep], axis=1), size, axis=1)
  hidden = act * (x @ u.T) * runs
  return hidden @ d, np.abs(hidden) @ np.abs(d), runs


def _error(got, want):
  """Relative error of all rows but those where another neuron was as good."""
  off = np.linalg.norm(np.asarray(got, np.float64) - want[0], axis=1)
  off, of = np.sort(off), np.linalg.norm(want[1], axis=1)
  return np.linalg.norm(off[: len(off) - len(off) // 10]) / np.linalg.norm(of)


def _run(formats, weights, router, **options):
  def run(x):
    return kernels.neurons_ffn(
      x,
      weights[0],
      formats[0],
      weights[1],
      formats[1],
      router,
      **{'features': OUT} | options,
    )

  return run


@needs_library
@pytest.mark.parametrize('named', NAMES)
@pytest.mark.parametrize('formats', FORMATS, ids=str)
def test_equals_float64(formats, named):
  # What chooses is the same for all instructions.
  cases = (
    (1, 57, 1, 0, 20, 16, 2.0**-13),
    (3, 60, 4, 2, 3, 16, 2.0**-13),
    (1, 40, 1, 8, 1, 16, 2.0**-13),
    (1, 40, 8, 0, 5, 16, 2.0**-13),
    (2, 30, 1, 0, 30, 8, 2.0**-6),
    (70, 9, 1, 0, 4, 16, 2.0**-13),
  )
  some = cases if named == NAMES[-1] else cases[:2]
  for n, hidden, size, shared, k, x_bits, most in some:
    weights = _weights(formats, hidden)
    router = _router(hidden, hidden // size - shared, k)
    x = _x(n)
    got = _call(
      x,
      *weights,
      _routing(router),
      formats=formats,
      size=size,
      shared=shared,
      outs=OUT,
      x_bits=x_bits,
      named=named,
    )
    want = _reference(x, weights, formats, router, size, shared)
    assert got.shape == (n, OUT) and got.dtype == jnp.float32
    if x_bits == 16:
      assert _error(got, want) < most, (n, hidden, size, shared, k)
    else:
      # Rounded gates may choose others; here all run.
      assert want[2].all() and _error(got, want) < most


@needs_library
@pytest.mark.parametrize('backend', ['xla', 'cpu'])
def test_threshold_dead_experts_and_shapes(backend):
  formats = FORMATS[2]
  weights = _weights(formats, 48)
  x = _x(6).reshape(2, 3, WIDE)
  router = _router(48, 22, 7, threshold=jnp.float32(5.0))
  router['bias'] = router['bias'].at[jnp.arange(5, 12)].set(kernels.DEAD)
  got = _run(formats, weights, router, size=2, shared=2, backend=backend)(x)
  want = _reference(
    x.reshape(6, -1), weights, formats, router, size=2, shared=2
  )
  counts = want[2][:, 4::2].sum(1)
  assert counts.min() < 7 and not want[2][:, 14:28].any()
  assert got.shape == (2, 3, OUT)
  assert _error(got.reshape(6, OUT), want) < 2.0**-12
  half = x.astype(jnp.bfloat16)
  got = _run(formats, weights, router, size=2, shared=2, backend=backend)(half)
  assert got.dtype == jnp.bfloat16
  assert _run(formats, weights, router, size=2, shared=2)(x[:0]).size == 0


def test_the_kth_largest_is_exact():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((5, 100)).astype(np.float32)
  x[0, :5] = [np.inf, -np.inf, 0.0, -1e30, 1e30]
  for k in (1, 2, 50, 99, 100):
    got = _neurons._kth(jnp.asarray(x), jnp.int32(k))
    np.testing.assert_array_equal(got[:, 0], np.sort(x, axis=1)[:, -k])


def test_ties_all_count():
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((5, 40)).astype(np.float32)
  logits[0, :20] = 0.5
  logits[1] = -(logits[1] ** 2)
  for k in (1, 3, 17, 40):
    got = np.asarray(
      kernels.open_gates(jnp.asarray(logits), jnp.int32(k), jnp.float32(-1e30))
    )
    kth = np.sort(logits, axis=1)[:, ::-1][:, [k - 1]]
    np.testing.assert_array_equal(got > 0, logits >= kth)
    np.testing.assert_allclose(got[got > 0], 1, rtol=1e-6)


@needs_library
@pytest.mark.parametrize('named', NAMES)
def test_what_is_not_finite_stays_in_its_row(named):
  formats = FORMATS[0]
  weights = _weights(formats, 40)
  x = np.array(_x(3))
  x[1, 5] = np.inf
  got = _call(
    jnp.asarray(x),
    *weights,
    _routing(_router(40, 40, 9)),
    formats=formats,
    size=1,
    shared=0,
    outs=OUT,
    x_bits=16,
    named=named,
  )
  assert not np.isfinite(got[1]).any()
  assert np.isfinite(got[::2]).all()


@needs_library
def test_derivatives_are_those_of_xla():
  formats = FORMATS[3]
  gate, down = _weights(formats, 40)
  router = _router(40, 20, 8)
  x, t = _x(4), np.random.default_rng(3).standard_normal((4, OUT))

  def loss(x, w, bias, scales, backend):
    g, d = (
      {'codes': p['codes'], 'scale': s} for p, s in zip((gate, down), scales)
    )
    changed = router | {'w': w, 'bias': bias}
    run = _run(formats, (g, d), changed, size=2, backend=backend)
    return jnp.sum(run(x) * t)

  grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), static_argnums=4)
  scales = gate['scale'], down['scale']
  got, want = (
    jax.tree.leaves(grad(x, router['w'], router['bias'], scales, name))
    for name in ('cpu', 'xla')
  )
  assert len(got) == 5
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype and np.abs(np.asarray(b, 'f')).max() > 0
    assert packed_weights.relative(a, np.asarray(b, 'd')) < 1e-2


@needs_library
def test_vmap_over_rows():
  formats = FORMATS[0]
  run = _run(formats, _weights(formats, 40), _router(40, 40, 9), backend='cpu')
  x = _x(6).reshape(3, 2, WIDE)
  want = np.asarray(run(x), 'd')
  assert packed_weights.relative(jax.vmap(run)(x), want) < 1e-5


def test_shapes_are_checked():
  formats = FORMATS[0]
  gate, down = _weights(formats, 40)
  router, two = _router(40, 40, 9), _x(2)

  def run(x=two, g=gate, d=down, r=router, **options):
    return _run(formats, (g, d), r, **options)(x)

  assert run().shape == (2, OUT)
  for options, match in (
    ({'size': 3}, 'divisor of the 40'),
    ({'shared': 40}, 'shared=40'),
    ({'size': 2}, r"'bias': \(40,\)"),
    ({'r': router | {'k': jnp.ones(1, jnp.int32)}}, r"'k': \(1,\)"),
    ({'x': two.astype(jnp.int32)}, 'int32'),
    ({'g': down}, r'rows \(40,\) and'),
    ({'backend': 'abacus'}, 'abacus'),
  ):
    with pytest.raises(errors.ShapeError, match=match):
      run(**options)
  with pytest.raises(errors.ParamsMismatchError):
    run(x=two[:, :64])
  with pytest.raises(errors.ParamsMismatchError):
    run(features=320)


@needs_library
def test_sizes_are_checked_before_memory_is_read():
  formats = FORMATS[0]
  gate, down = _weights(formats, 40)
  w, bias, k, threshold = _routing(_router(40, 40, 9))
  options = {'formats': formats, 'size': 1, 'shared': 0}
  options |= {'outs': OUT, 'x_bits': 16}
  short = down | {'codes': down['codes'][..., :-1]}
  few = gate | {'codes': gate['codes'][:, :1]}
  for g, d, r, o, match in (
    (gate, short, (w, bias, k, threshold), {}, 'bytes of codes'),
    (few, down, (w, bias, k, threshold), {}, 'bytes of codes'),
    (gate, down, (w[1:], bias, k, threshold), {}, 'norms are not'),
    (gate, down, (w, bias[1:], k, threshold), {}, 'bias is not'),
    (gate, down, (w, bias, k, threshold), {'shared': -1}, 'shared=-1'),
    (gate, down, (w, bias, k, threshold), {'size': 0}, 'size=0|zero'),
  ):
    with pytest.raises(Exception, match=match):
      jax.block_until_ready(_cpu.neurons(_x(1), g, d, r, **options | o))
