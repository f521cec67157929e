# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of sparse feed-forward layers against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
import gemma_ext.kernels as kernels
from gemma_ext.kernels import _cpu
from gemma_ext.kernels import _experts_dense
from gemma_ext.kernels import _params
from tests.kernels import packed_weights

needs_library = pytest.mark.skipif(
  _cpu.library() is None, reason='the C++ library was not built'
)
NAMES = [n for n in ('portable', 'avx2', 'avx512') if _cpu.has(n)]
# Formats of gate and down, and neurons of a slice that cut rows of the latter.
FORMATS = [
  (kernels.TernaryFormat(group=32), kernels.TernaryFormat(group=32), 128),
  (
    kernels.TernaryFormat(group=48, planes=2),
    kernels.TernaryFormat(group=32, packing='5trit', planes=2),
    160,
  ),
  (
    kernels.IntFormat(bits=4, group=32),
    kernels.TernaryFormat(group=8, scale='ue5m3', planes=2, tied=True),
    128,
  ),
  (
    kernels.IntFormat(bits=5, group=32),
    kernels.IntFormat(bits=5, group=8),
    24,
  ),
  (kernels.IntFormat(bits=8), kernels.IntFormat(bits=8), 36),
  (
    kernels.IntFormat(bits=8, group=16),
    kernels.IntFormat(bits=4, group=192),
    64,
  ),
]
LAYOUTS = ('wide', 'stacked', 'cut')
WIDE, OUT = 96, 37

_call = jax.jit(
  _cpu.experts, static_argnames=('formats', 'size', 'shared', 'x_bits', 'named')
)


def _weights(formats, size, slices, layout):
  rows = (slices, 2, size) if layout == 'stacked' else (2, slices * size)
  outs = (OUT,) if layout == 'wide' else (slices, OUT)
  cols = slices * size if layout == 'wide' else size
  gate = packed_weights.packed(formats[0], rows, WIDE, seed=1)
  down = packed_weights.packed(formats[1], outs, cols, seed=2)
  return gate, down


def _x(n, dtype=np.float32, seed=0):
  x = np.random.default_rng(seed).standard_normal((n, WIDE)) / WIDE**0.5
  return jnp.asarray(x, dtype)


def _routes(n, k, experts, seed=0):
  """Distinct experts of every row, some dropped; all of them, of one row."""
  rng = np.random.default_rng(seed)
  chosen = rng.random((n, experts)).argsort(-1)[:, :k]
  if n > 1:
    chosen[rng.random((n, k)) < 0.2] = -1
    chosen[-1] = -1
  weight = rng.standard_normal((n, k))
  return jnp.asarray(chosen, jnp.int32), jnp.asarray(weight, jnp.float32)


def _dense(gate, down, formats, size):
  """G and U `[S, 2, f, I]` and D `[S, O, f]` of every slice, in float64."""
  g = packed_weights.dense(gate, formats[0], WIDE)
  slices = g.size // (2 * size * WIDE)
  apart = len(_params.rows_of(down, formats[1])) == 2
  d = packed_weights.dense(down, formats[1], size if apart else slices * size)
  if g.ndim == 3:
    g = g.reshape(2, slices, size, WIDE).swapaxes(0, 1)
  return g, d if apart else d.reshape(OUT, slices, size).swapaxes(0, 1)


def _reference(x, g, d, chosen, weight, shared=0):
  """The layer, and what its error is relative to, in float64."""
  x, weight = (np.asarray(a, np.float64) for a in (x, weight))
  y, of = np.zeros((2, len(x), d.shape[1]))
  for t, row in enumerate(x):
    runs = [(s, 1.0) for s in range(shared)]
    runs += [
      (shared + e, w)
      for e, w in zip(np.asarray(chosen)[t], weight[t])
      if e >= 0
    ]
    for s, w in runs:
      a, u = g[s] @ row
      hidden = a / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3)))
      hidden = w * hidden * u
      y[t] += d[s] @ hidden
      of[t] += np.abs(d[s]) @ np.abs(hidden)
  return y, of


def _error(got, want):
  y, size = want
  return np.linalg.norm(np.asarray(got, np.float64) - y) / np.linalg.norm(size)


@needs_library
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('named', NAMES)
@pytest.mark.parametrize('formats', FORMATS, ids=lambda f: f'{f[1]}-{f[2]}')
def test_equals_float64(formats, named, layout):
  *formats, size = formats
  shared = 0 if layout == 'wide' else 1
  if formats[1].group == 192:
    # 9 slices, three of them in a group, where rows are whole.
    shared = 2
    formats[1] = kernels.IntFormat(
      bits=4, group=192 if layout == 'wide' else 64
    )
  gate, down = _weights(formats, size, 7 + shared, layout)
  g, d = _dense(gate, down, formats, size)
  for n, k, x_bits, most in (
    (1, 3, 16, 2.0**-13),
    (3, 2, 8, 2.0**-6),
    (40, 7, 16, 2.0**-13),
  ):
    x, (chosen, weight) = _x(n), _routes(n, k, 7)
    want = _reference(x, g, d, chosen, weight, shared)
    got = _call(
      x,
      gate,
      down,
      chosen,
      weight,
      formats=tuple(formats),
      size=size,
      shared=shared,
      x_bits=x_bits,
      named=named,
    )
    assert got.shape == (n, OUT) and got.dtype == jnp.float32
    assert _error(got, want) < most, (n, k, x_bits)
    if n > 1 and not shared:
      assert not np.any(got[-1])


@pytest.mark.parametrize('backend', ['xla', 'cpu'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_any_leading_shape_and_type(layout, backend):
  if backend == 'cpu' and _cpu.library() is None:
    pytest.skip('the C++ library was not built')
  *formats, size = FORMATS[1]
  shared = 2
  gate, down = _weights(formats, size, 5 + shared, layout)
  dense = _dense(gate, down, formats, size)
  run = jax.jit(
    lambda x, c, w: kernels.experts_ffn(
      *(x, gate, formats[0], down, formats[1], c, w),
      size=size,
      shared=shared,
      backend=backend,
    )
  )
  for dtype, most in ((jnp.float32, 2.0**-13), (jnp.bfloat16, 2.0**-7)):
    for lead in ((), (2, 3), (0,)):
      n = int(np.prod(lead))
      x, (chosen, weight) = _x(n, dtype), _routes(n, 3, 5)
      got = run(
        x.reshape(*lead, WIDE),
        chosen.reshape(*lead, 3),
        weight.reshape(*lead, 3),
      )
      assert got.shape == (*lead, OUT) and got.dtype == dtype
      if n:
        want = _reference(x, *dense, chosen, weight, shared)
        assert _error(got.reshape(n, OUT), want) < most


def _run(formats, size, weights, **options):
  gate, down = weights
  return lambda x, c, w: kernels.experts_ffn(
    *(x, gate, formats[0], down, formats[1], c, w), size=size, **options
  )


@needs_library
def test_equals_the_whole_layer_where_all_are_chosen():
  *formats, size = FORMATS[2]
  weights = _weights(formats, size, 4, 'wide')
  x = _x(3)
  chosen = jnp.tile(jnp.arange(3), (3, 1))
  got = _run(formats, size, weights, shared=1, backend='cpu')(
    x, chosen, jnp.ones((3, 3))
  )
  want = kernels.gated_ffn(
    x, weights[0], formats[0], weights[1], formats[1], backend='cpu'
  )
  assert packed_weights.relative(got, np.asarray(want, np.float64)) < 1e-4


@needs_library
def test_one_that_is_named_twice_counts_twice():
  *formats, size = FORMATS[0]
  weights = _weights(formats, size, 3, 'stacked')
  g, d = _dense(*weights, formats, size)
  chosen = jnp.array([[1, 1, 0]], jnp.int32)
  weight = jnp.array([[0.5, -2.0, 1.0]])
  want = _reference(_x(1), g, d, chosen, weight)
  for backend in ('cpu', 'xla'):
    got = _run(formats, size, weights, backend=backend)(_x(1), chosen, weight)
    assert _error(got, want) < 2.0**-13


@needs_library
def test_rows_in_parts(monkeypatch):
  """More rows of x than intermediate results have memory for."""
  *formats, size = FORMATS[4]
  weights = _weights(formats, size, 4, 'wide')
  n = 26_000
  x, (chosen, weight) = _x(n), _routes(n, 2, 4)
  run = jax.jit(_run(formats, size, weights, backend='cpu'))
  got = run(x, chosen, weight)
  some = np.r_[:8, n - 8 : n]
  want = run(x[some], chosen[some], weight[some])
  assert packed_weights.relative(got[some], np.asarray(want, 'd')) < 1e-5


@needs_library
def test_what_is_not_finite_stays_in_its_row():
  *formats, size = FORMATS[0]
  weights = _weights(formats, size, 3, 'wide')
  x = np.array(_x(3))
  x[1, 5] = np.nan
  chosen = jnp.array([[0], [0], [0]], jnp.int32)
  got = _run(formats, size, weights, backend='cpu')(
    jnp.asarray(x), chosen, jnp.ones((3, 1))
  )
  assert not np.isfinite(got[1]).any()
  assert np.isfinite(got[::2]).all()


@needs_library
@pytest.mark.parametrize('layout', LAYOUTS)
def test_derivatives_are_those_of_xla(layout):
  *formats, size = FORMATS[3]
  gate, down = _weights(formats, size, 5, layout)
  chosen, weight = _routes(4, 2, 5)
  x, t = _x(4), np.random.default_rng(3).standard_normal((4, OUT))

  def loss(x, weight, scales, backend):
    g, d = (
      {'codes': p['codes'], 'scale': s} for p, s in zip((gate, down), scales)
    )
    run = _run(formats, size, (g, d), backend=backend)
    return jnp.sum(run(x, chosen, weight) * t)

  grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
  scales = gate['scale'], down['scale']
  got, want = (
    jax.tree.leaves(grad(x, weight, scales, name)) for name in ('cpu', 'xla')
  )
  assert len(got) == 4
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype and np.abs(np.asarray(b, 'f')).max() > 0
    assert packed_weights.relative(a, np.asarray(b, 'd')) < 1e-2
  # Against differences, in one direction of the weights.
  step = jnp.asarray(np.random.default_rng(4).standard_normal(weight.shape))
  ends = (loss(x, weight + h * step, scales, 'xla') for h in (0.5, -0.5))
  np.testing.assert_allclose(
    np.sum(np.asarray(want[1] * step)), np.subtract(*ends), rtol=1e-3
  )


@needs_library
def test_vmap_over_rows():
  *formats, size = FORMATS[0]
  run = _run(
    formats, size, _weights(formats, size, 4, 'wide'), shared=1, backend='cpu'
  )
  x, (chosen, weight) = _x(6).reshape(3, 2, WIDE), _routes(6, 2, 3)
  chosen, weight = chosen.reshape(3, 2, 2), weight.reshape(3, 2, 2)
  want = np.asarray(run(x, chosen, weight), 'd')
  got = jax.vmap(run)(x, chosen, weight)
  assert packed_weights.relative(got, want) < 1e-5
  # The same experts for all.
  got = jax.vmap(run, (0, None, None))(x, chosen[0], weight[0])
  want = [run(each, chosen[0], weight[0]) for each in x]
  assert packed_weights.relative(got, np.asarray(want, 'd')) < 1e-5


@pytest.mark.parametrize('n', [1, 5, 40])
@pytest.mark.parametrize('how', ['blocks', 'few', 'ragged'])
def test_dense_experts_equal_float64(how, n):
  rng = np.random.default_rng(n)
  g = rng.standard_normal((6, 2, 24, WIDE))
  d = rng.standard_normal((6, 24, OUT))
  gate, down = jnp.asarray(g, jnp.float32), jnp.asarray(d, jnp.float32)
  x, (chosen, weight) = _x(n), _routes(n, 3, 6, seed=n)
  want = _reference(x, g, d.swapaxes(1, 2), chosen, weight)
  if how == 'blocks':
    got = jax.jit(kernels.experts_dense)(x, gate, down, chosen, weight)
  elif how == 'few':
    e = jnp.maximum(chosen.reshape(-1), 0)
    got = _experts_dense.few(x, chosen, weight, gate[e], down[e])
  else:
    got = _experts_dense.ragged(x, chosen, weight, gate, down)
  assert got.shape == (n, OUT)
  assert _error(got, want) < 2.0**-18
  if n > 1:
    assert not np.any(got[-1])


def _adapters(count, f, rank=3):
  rng = np.random.default_rng(7)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return kernels.Adapters(
    gate=(draw(count, WIDE, rank), draw(count, rank, 2, f)),
    down=(draw(count, f, rank), draw(count, rank, OUT)),
  )


@pytest.mark.parametrize('how', ['blocks', 'few', 'ragged', 'packed'])
def test_adapters_are_added_to_weights(how):
  rng = np.random.default_rng(0)
  count, f, n = 6, 24, 5
  g = rng.standard_normal((count, 2, f, WIDE))
  d = rng.standard_normal((count, f, OUT))
  x, (chosen, weight) = _x(n), _routes(n, 3, count)
  own = _adapters(count, f)
  gate, down = jnp.asarray(g, jnp.float32), jnp.asarray(d, jnp.float32)
  if how == 'blocks':
    run = functools.partial(kernels.experts_dense, x, gate, down, chosen)
    got = run(weight, adapters=own)
  elif how == 'few':
    e = jnp.maximum(chosen.reshape(-1), 0)
    some = jax.tree.map(lambda a: a[e], own)
    got = _experts_dense.few(x, chosen, weight, gate[e], down[e], some)
  elif how == 'ragged':
    got = _experts_dense.ragged(x, chosen, weight, gate, down, own)
  else:
    formats = [kernels.IntFormat(bits=8)] * 2
    pair = _weights(formats, f, count, 'stacked')
    run = functools.partial(kernels.experts_ffn, x, pair[0], formats[0])
    got = run(pair[1], formats[1], chosen, weight, adapters=own)
    wide = lambda p, fmt, cols: np.asarray(
      kernels.dequantize(p, fmt, cols), 'd'
    )
    g = wide(pair[0], formats[0], WIDE)
    d = wide(pair[1], formats[1], f).swapaxes(1, 2)
  of = lambda pair, eqn: np.einsum(eqn, *(np.asarray(a, 'd') for a in pair))
  g, d = g + of(own.gate, 'eir,ercf->ecfi'), d + of(own.down, 'efr,ero->efo')
  want = _reference(x, g, d.swapaxes(1, 2), chosen, weight)
  assert _error(got, want) < 2.0**-16


def test_adapters_are_checked():
  x, (chosen, weight) = _x(2), _routes(2, 2, 3)
  ones = lambda *shape: jnp.ones(shape, jnp.float32)
  dense = ones(3, 2, 4, WIDE), ones(3, 4, OUT), chosen, weight
  with pytest.raises(errors.ShapeError, match=r"3, 4, 'R'"):
    own = _adapters(3, 4)._replace(down=(ones(3, 5, 2), ones(3, 2, OUT)))
    kernels.experts_dense(x, *dense, adapters=own)
  *formats, size = FORMATS[0]
  own = _adapters(3, size)
  with pytest.raises(errors.ShapeError, match='wide'):
    gate, down = _weights(formats, size, 3, 'wide')
    kernels.experts_ffn(
      *(x, gate, formats[0], down, formats[1], chosen, weight),
      size=size,
      adapters=own,
    )


def test_gradients_of_dense_experts():
  rng = np.random.default_rng(0)
  gate = jnp.asarray(rng.standard_normal((6, 2, 8, WIDE)), jnp.float32)
  down = jnp.asarray(rng.standard_normal((6, 8, OUT)), jnp.float32)
  x, (chosen, weight) = _x(5), _routes(5, 2, 6)
  loss = lambda run: lambda *a: jnp.sum(jnp.sin(run(*a)))
  grad = lambda run: jax.jit(jax.grad(loss(run), (0, 1, 2, 3)))(
    x, gate, down, weight
  )
  got = grad(lambda x, g, d, w: kernels.experts_dense(x, g, d, chosen, w))
  want = grad(lambda x, g, d, w: _experts_dense.ragged(x, chosen, w, g, d))
  for a, b in zip(got, want, strict=True):
    assert packed_weights.relative(a, np.asarray(b, 'd')) < 1e-5


def test_shapes_are_checked():
  *formats, size = FORMATS[0]
  gate, down = _weights(formats, size, 3, 'wide')
  x, (chosen, weight) = _x(2), _routes(2, 2, 2)

  def run(x=x, c=chosen, w=weight, g=gate, d=down, **options):
    options = {'size': size, 'shared': 1} | options
    return _run(formats, weights=(g, d), **options)(x, c, w)

  assert run().shape == (2, OUT)
  for options, match in (
    ({'size': None}, 'size=None'),
    ({'size': 100}, 'divisor of the 384'),
    ({'shared': 3}, 'shared=3 of 3'),
    ({'c': chosen[:1]}, r'chosen int32\[1, 2\]'),
    ({'w': weight[:, :1]}, r'weight float32\[2, 1\]'),
    ({'c': weight}, 'chosen float32'),
    ({'x': x.astype(jnp.int32)}, 'int32'),
    ({'g': down}, r'rows \(37,\)'),
    ({'backend': 'abacus'}, 'abacus'),
  ):
    with pytest.raises(errors.ShapeError, match=match):
      run(**options)
  with pytest.raises(errors.ParamsMismatchError):
    run(x=x[:, :64])
  stacked = _weights(formats, size, 3, 'stacked')
  with pytest.raises(errors.ShapeError, match='stacked slices of 128'):
    run(g=stacked[0], d=stacked[1], size=64)
  with pytest.raises(errors.ShapeError, match='4 slices of down and 3 of gate'):
    run(d=_weights(formats, size, 4, 'cut')[1])
  with pytest.raises(errors.ShapeError, match=r'\[E, f, O\]'):
    kernels.experts_dense(
      x, jnp.ones((3, 2, 4, WIDE)), jnp.ones((3, 5, 7)), chosen, weight
    )


@needs_library
def test_slices_that_do_not_cut_blocks_are_left_to_xla():
  fmt = kernels.TernaryFormat(group=32)
  weights = _weights((fmt, fmt), 32, 4, 'wide')
  x, (chosen, weight) = _x(3), _routes(3, 2, 4)
  with pytest.raises(errors.BackendError, match='slices of 32 neurons'):
    _run((fmt, fmt), 32, weights, backend='cpu')(x, chosen, weight)
  got = _run((fmt, fmt), 32, weights)(x, chosen, weight)
  dense = _dense(*weights, (fmt, fmt), 32)
  assert _error(got, _reference(x, *dense, chosen, weight)) < 2.0**-13


@needs_library
def test_sizes_are_checked_before_memory_is_read():
  *formats, size = FORMATS[0]
  x, (chosen, weight) = _x(1), _routes(1, 2, 3)
  options = {'formats': tuple(formats), 'size': size, 'shared': 0, 'x_bits': 16}
  for layout in LAYOUTS:
    gate, down = _weights(formats, size, 3, layout)
    short = down | {'codes': down['codes'][..., :-1]}
    few = gate | {'codes': gate['codes'][:, :1]}
    for g, d, c, o, match in (
      (gate, short, chosen, {}, 'bytes of codes'),
      (few, down, chosen, {}, 'bytes of codes'),
      (gate, down, chosen + 3, {}, 'chosen=. of experts=3'),
      (gate, down, chosen - 3, {}, 'chosen=-. of experts=3'),
      (gate, down, chosen[:, :1], {}, 'not .N, K'),
      (gate, down, chosen, {'shared': -1}, 'shared=-1'),
    ):
      with pytest.raises(Exception, match=match):
        y = _cpu.experts(x, g, d, c, weight, **options | o)
        jax.block_until_ready(y)
  gate, down = _weights(formats, 64, 6, 'wide')
  with pytest.raises(Exception, match='size=64 does not cut'):
    y = _cpu.experts(x, gate, down, chosen, weight, **options | {'size': 64})
    jax.block_until_ready(y)
