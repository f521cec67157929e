# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the transformer block as one operation against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
import gemma_ext.kernels as kernels
from gemma_ext.kernels import _block
from gemma_ext.kernels import _cpu
from tests.kernels import packed_weights

pytestmark = pytest.mark.skipif(
  _cpu.library() is None, reason='the C++ library was not built'
)
NAMES = [n for n in ('portable', 'avx2', 'avx512') if _cpu.has(n)]
WIDE, HEADS, KV_HEADS, HEAD, HIDDEN, SLOTS = 96, 4, 2, 32, 192, 20
ROWS = ((HEADS, HEAD), (2, KV_HEADS, HEAD), (WIDE,), (2, HIDDEN), (WIDE,))
COLS = (WIDE, WIDE, HEADS * HEAD, WIDE, HIDDEN)
TERNARY = kernels.TernaryFormat(group=32)
INT4 = kernels.IntFormat(bits=4, group=32)
INT8 = kernels.IntFormat(bits=8)
SPECS = {
  'gemma3': _block.BlockSpec(
    formats=(INT4, INT8, INT4, TERNARY, TERNARY),
    x_bits=(16,) * 5,
    query_scale=HEAD**-0.5,
    window=7,
  ),
  'gemma2': _block.BlockSpec(
    formats=(
      kernels.IntFormat(bits=5, group=32),
      kernels.TernaryFormat(group=16, packing='5trit', scale='ue5m3'),
      kernels.IntFormat(bits=6, group=64, scale='ue5m3'),
      kernels.TernaryFormat(group=32, packing='3of4', planes=2),
      INT8,
    ),
    x_bits=(16,) * 5,
    query_scale=0.25,
    soft_cap=3.0,
    norm_offset=0.0,
  ),
}


def _inputs(spec, batch, tokens, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape)
  weights = []
  for i, (fmt, rows, cols) in enumerate(
    zip(spec.formats, ROWS, COLS, strict=True)
  ):
    p = packed_weights.packed(fmt, rows, cols, seed=seed + i)
    # So that what comes out is of the size of what went in.
    size = np.sqrt((packed_weights.dense(p, fmt, cols) ** 2).mean() * cols)
    p['scale'] = fmt.pack_scale(fmt.open_scale(p['scale']) / np.float32(size))
    weights.append(p)
  names = list(_block.NORMS)
  if spec.norm_offset == 0:  # Without norms of queries and keys.
    names = [n for n in names if n not in ('query', 'key')]
  sizes = {n: HEAD if n in ('query', 'key') else WIDE for n in names}
  more = 1 - spec.norm_offset
  norms = {n: jnp.asarray(draw(s) / 3 + more, dtype) for n, s in sizes.items()}
  cache = {
    'k': jnp.asarray(draw(batch, SLOTS, KV_HEADS, HEAD), dtype),
    'v': jnp.asarray(draw(batch, SLOTS, KV_HEADS, HEAD), dtype),
    'positions': jnp.asarray(
      np.broadcast_to(np.arange(SLOTS), (batch, SLOTS)), jnp.int32
    ),
    'end_index': jnp.full((batch,), SLOTS + 9, jnp.int32),
  }
  at = np.broadcast_to(9 + np.arange(tokens), (batch, tokens))
  exponents = 2 / HEAD * np.arange(HEAD // 2)
  return dict(
    x=jnp.asarray(draw(batch, tokens, WIDE), dtype),
    weights=tuple(weights),
    norms=norms,
    cache=cache,
    positions=jnp.asarray(at, jnp.int32),
    angles=jnp.asarray(at[..., None] / 1e4**exponents, jnp.float32),
    mask=jnp.asarray(rng.random((batch, tokens, SLOTS)) < 0.8),
  )


def _reference(inputs, spec):
  """The block and its cache in float64."""
  f = lambda a: np.asarray(a, np.float64)
  x, cache = f(inputs['x']), inputs['cache']
  w = [
    packed_weights.dense(p, fmt, cols)
    for p, fmt, cols in zip(inputs['weights'], spec.formats, COLS, strict=True)
  ]

  def norm(name, x):
    if name not in inputs['norms']:
      return x
    scale = spec.norm_offset + f(inputs['norms'][name])
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

  def rope(x):
    a, b = np.split(x, 2, axis=-1)
    s, c = (g(f(inputs['angles']))[:, :, None] for g in (np.sin, np.cos))
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)

  h = norm('pre_attention', x)
  q = rope(norm('query', np.einsum('btd,nhd->btnh', h, w[0])))
  k, v = np.einsum('btd,cnhd->cbtnh', h, w[1])
  tokens = x.shape[1]
  start = min(int(cache['end_index'][0]) % SLOTS, SLOTS - tokens)
  new = {name: f(cache[name]).copy() for name in ('k', 'v', 'positions')}
  new['k'][:, start : start + tokens] = rope(norm('key', k))
  new['v'][:, start : start + tokens] = v
  new['positions'][:, start : start + tokens] = f(inputs['positions'])
  mask = np.array(inputs['mask'])
  if spec.window:
    away = new['positions'][:, None] - f(inputs['positions'])[..., None]
    mask &= np.abs(away) < spec.window
  keys, values = (
    np.repeat(new[name], HEADS // KV_HEADS, axis=2) for name in ('k', 'v')
  )
  logits = np.einsum('btnh,bsnh->btns', q * spec.query_scale, keys)
  if spec.soft_cap:
    logits = spec.soft_cap * np.tanh(logits / spec.soft_cap)
  logits = np.where(mask[:, :, None], logits, -1e300)
  p = np.exp(logits - logits.max(-1, keepdims=True))
  out = np.einsum('btns,bsnh->btnh', p / p.sum(-1, keepdims=True), values)
  out = out.reshape(*x.shape[:2], -1) @ w[2].T
  x = x + norm('post_attention', out)
  g, u = np.einsum('btd,cfd->cbtf', norm('pre_ffw', x), w[3])
  gelu = g / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3)))
  y = x + norm('post_ffw', gelu * u @ w[4].T)
  new['end_index'] = f(cache['end_index']) + tokens
  return new, y


@pytest.fixture
def named(request, monkeypatch):
  call = _cpu.block
  monkeypatch.setattr(
    _cpu, 'block', lambda *a, **k: call(*a, **k, named=request.param)
  )


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
  monkeypatch.setenv('GEMMA_EXT_BACKEND', 'cpu')


@pytest.mark.parametrize('named', NAMES, indirect=True)
@pytest.mark.parametrize('spec', SPECS)
def test_equals_float64(spec, named):
  spec = SPECS[spec]
  for batch, tokens in ((1, 1), (2, 3)):
    inputs = _inputs(spec, batch, tokens)
    cache, y = jax.jit(lambda i: kernels.block(**i, spec=spec))(inputs)
    want_cache, want = _reference(inputs, spec)
    assert y.shape == inputs['x'].shape and y.dtype == jnp.float32
    assert packed_weights.relative(y, want) < 2.0**-10
    for name, value in want_cache.items():
      assert cache[name].dtype == inputs['cache'][name].dtype
      assert packed_weights.relative(cache[name], value) < 2.0**-12, name


def test_types_and_bits_of_x():
  spec = SPECS['gemma3']
  for dtype, x_bits, most in (
    (jnp.bfloat16, 16, 2.0**-6),
    (jnp.float32, 8, 2.0**-4),
  ):
    spec = dataclasses.replace(spec, x_bits=(x_bits,) * 5)
    inputs = _inputs(spec, 1, 2, dtype)
    cache, y = jax.jit(lambda i, s=spec: kernels.block(**i, spec=s))(inputs)
    want_cache, want = _reference(inputs, spec)
    assert y.dtype == cache['k'].dtype == dtype
    assert packed_weights.relative(y, want) < most
    assert packed_weights.relative(cache['k'], want_cache['k']) < most


def test_norms_after_may_be_left_out():
  spec = SPECS['gemma2']
  inputs = _inputs(spec, 1, 1)
  for name in ('post_attention', 'post_ffw'):
    del inputs['norms'][name]
  _, y = kernels.block(**inputs, spec=spec)
  _, want = _reference(inputs, spec)
  assert packed_weights.relative(y, want) < 2.0**-10


def test_bad_shapes():
  spec = SPECS['gemma3']
  inputs = _inputs(spec, 1, 1)
  run = lambda **changed: kernels.block(**{**inputs, **changed}, spec=spec)
  q, kv, out, gate, down = inputs['weights']
  for changed, error, match in (
    ({'x': inputs['x'][0]}, errors.ShapeError, r'x \(1, 96\)'),
    ({'weights': (q, kv, out, gate)}, errors.ShapeError, '4 weights'),
    ({'weights': (kv, q, out, gate, down)}, Exception, 'rows|scale'),
    ({'mask': inputs['mask'][..., 1:]}, errors.ShapeError, 'mask'),
    ({'norms': {'key': jnp.zeros(HEAD)}}, errors.ShapeError, 'Norms are'),
    ({'angles': inputs['angles'][..., 1:]}, errors.ShapeError, 'angles'),
  ):
    with pytest.raises(error, match=match):
      run(**changed)
  many = _inputs(spec, 3, 3)
  with pytest.raises(errors.BackendError, match='1 to 8 tokens'):
    kernels.block(**many, spec=spec)


def test_sizes_are_checked_before_memory_is_read():
  spec = SPECS['gemma3']
  inputs = _inputs(spec, 1, 1)
  q, *others = inputs['weights']
  held = inputs['cache']
  args = (
    inputs['x'],
    jnp.sin(inputs['angles']),
    jnp.cos(inputs['angles']),
    inputs['positions'],
    inputs['mask'],
  )
  norms = [inputs['norms'][name] for name in _block.NORMS]
  more = dict(
    formats=spec.formats,
    x_bits=spec.x_bits,
    heads=HEADS,
    hidden=HIDDEN,
    window=0,
    query_scale=1.0,
    soft_cap=0.0,
    more=1.0,
  )
  run = lambda args, held, norms, weights, **changed: jax.block_until_ready(
    _cpu.block(*args, held, norms, weights, **(more | changed))
  )
  run(args, held, norms, inputs['weights'])
  short = q | {'codes': q['codes'][:, :-1]}
  for bad, match in (
    ((args, held, norms, (short, *others)), 'bytes of codes'),
    ((args, held, [norms[0][1:], *norms[1:]], inputs['weights']), 'a norm'),
    (
      (args[:4] + (inputs['mask'][..., 1:],), held, norms, inputs['weights']),
      'the mask',
    ),
    (
      (args, held | {'v': held['v'][:, 1:]}, norms, inputs['weights']),
      'a cache',
    ),
  ):
    with pytest.raises(Exception, match=match):
      run(*bad)
  with pytest.raises(Exception, match='heads'):
    run(args, held, norms, inputs['weights'], heads=3)
