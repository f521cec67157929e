# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Kernels for GPUs: numbers thread by thread on numpy, and that they lower."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemma_ext import kernels
from gemma_ext.kernels import mosaic_gpu
from gemma_ext.kernels.mosaic_gpu import _few_rows
from gemma_ext.kernels.mosaic_gpu import _floats
from gemma_ext.kernels.mosaic_gpu import _integers
from gemma_ext.kernels.mosaic_gpu import _many_rows
from gemma_ext.kernels.mosaic_gpu import _spec
from gemma_ext.kernels.mosaic_gpu import _whole_rows
from tests.kernels import gpu_threads
from tests.kernels import packed_weights

Int, Ternary = kernels.IntFormat, kernels.TernaryFormat
FORMATS = (
  Ternary(),
  Ternary(group=64),
  Ternary(group=32, planes=2),
  Ternary(group=16, scale='ue5m3'),
  Ternary(group=128, packing='5trit'),
  Ternary(group=16, packing='5trit', scale='ue5m3'),
  Ternary(planes=2, group=8, packing='5trit', scale='ue5m3', tied=True),
  Ternary(planes=3, group=256, tied=True),
  Int(bits=2, group=128),
  Int(bits=4, group=32),
  Int(bits=4, group=128, scale='e4m3'),
  Int(bits=4, group=128),
  Int(bits=8, group=128),
  Int(bits=8),
)
name = lambda fmt: str(fmt).replace(' ', '')


def emulate(x, p, spec):
  threads = gpu_threads.Threads(spec)
  out = np.full((spec.xs, spec.out_rows), np.nan, ml_dtypes.bfloat16)
  flat = [
    np.frombuffer(np.asarray(v).tobytes(), np.uint8)
    for v in (x, p['codes'], p['scale'])
  ]
  kernel = _whole_rows if isinstance(spec, _whole_rows.Spec) else _few_rows
  kernel.run(threads, spec, *flat, out.reshape(-1).view(np.uint8))
  return out.astype(np.float64)


def reference(x, p, fmt, gated=False):
  x, w = np.asarray(x, np.float64), packed_weights.dense(p, fmt, x.shape[1])
  y, size = x @ w.T, np.abs(x) @ np.abs(w).T
  if not gated:
    return y, size
  gate, up = np.split(y, 2, axis=1)
  gelu = np.asarray(jax.nn.gelu(jnp.asarray(gate, jnp.float32)), np.float64)
  return gelu * up, np.split(size, 2, axis=1)[1] * np.abs(gate)


def check(fmt, rows, cols, xs, seed=0, spec=None, **kwargs):
  p = packed_weights.packed(fmt, (rows,), cols, seed)
  # Small, so that gates are where gelu bends.
  x = 0.02 * jax.random.normal(
    jax.random.key(seed + 1), (xs, cols), jnp.bfloat16
  )
  if spec is None:
    spec = _spec.Spec(rows=rows, cols=cols, xs=xs, fmt=fmt, **kwargs)
  got = emulate(x, p, spec)
  want, size = reference(x, p, fmt, spec.gated)
  error = np.linalg.norm(got - want)
  assert error <= 2.0**-8 * np.linalg.norm(want) + 1e-5 * np.linalg.norm(size)


@pytest.mark.parametrize('fmt', FORMATS, ids=name)
def test_every_thread_does_its_part(fmt):
  check(fmt, 48, 1280, 1, tiles=1, warps=4, unroll=1)


@pytest.mark.parametrize('fmt', FORMATS, ids=name)
def test_all_rows_of_x_that_fit(fmt):
  check(fmt, 32, 768, _spec.most_rows(fmt), tiles=2, warps=4, unroll=2)


@pytest.mark.parametrize('fmt', FORMATS, ids=name)
def test_odd_edges(fmt):
  # Rows that fill no tile; a last block that is not full, where groups allow.
  check(fmt, 41, 256 * 3, 2, seed=3, tiles=2, warps=8, unroll=2)


@pytest.mark.parametrize('fmt', FORMATS, ids=name)
def test_gated(fmt):
  check(fmt, 2 * 40, 512, 2, gated=True, tiles=4, warps=4, unroll=1)


WHOLE = [fmt for fmt in FORMATS if _integers.fits(fmt)]


@pytest.mark.parametrize('fmt', WHOLE, ids=name)
@pytest.mark.parametrize('xs', [1, 2])
def test_in_integers(fmt, xs):
  check(fmt, 48, 1280, xs, integers=True, tiles=2, warps=4)


@pytest.mark.parametrize('fmt', WHOLE, ids=name)
def test_in_integers_at_odd_edges(fmt):
  check(
    fmt, 2 * 41, 256 * 3, 2, seed=5, integers=True, tiles=4, warps=8, gated=True
  )


@pytest.mark.parametrize('fmt', [Ternary(), Int(bits=4, group=32)], ids=name)
@pytest.mark.parametrize('split', [2, 4])
def test_clusters_share_columns(fmt, split):
  integers = _integers.fits(fmt)
  check(fmt, 56, 1280, 1, split=split, tiles=2, warps=4, integers=integers)


def check_whole(fmt, rows, cols, xs, seed=0, **kwargs):
  spec = _whole_rows.Spec(rows=rows, cols=cols, xs=xs, fmt=fmt, **kwargs)
  assert not _whole_rows.why_not(spec)
  return check(fmt, rows, cols, xs, seed, spec=spec)


@pytest.mark.parametrize('fmt', WHOLE, ids=name)
@pytest.mark.parametrize('xs', [1, 2])
def test_rows_of_a_multiprocessor(fmt, xs):
  # More slices than fit, and rows that fill no tile.
  check_whole(fmt, 64, 2560, xs, processors=3, most_slices=3)


@pytest.mark.parametrize('fmt', WHOLE, ids=name)
def test_rows_of_a_multiprocessor_by_turns(fmt):
  check_whole(fmt, 2 * 80, 768, 2, 5, gated=True, processors=2, most_tiles=1)


def test_rows_of_a_multiprocessor_wait_for_their_slice(monkeypatch):
  monkeypatch.setattr(_whole_rows._Ring, 'wait', lambda *args: None)
  with pytest.raises(AssertionError):
    check_whole(Ternary(), 64, 2560, 1, processors=3)


def test_a_wrong_surplus_is_seen(monkeypatch):
  monkeypatch.setattr(_floats, '_bfloat16', lambda value: 0xC300)
  with pytest.raises(AssertionError):
    check(Ternary(), 16, 512, 1, warps=4)


@pytest.mark.parametrize('fmt', FORMATS, ids=name)
@pytest.mark.parametrize('gated', [False, True])
def test_lowers_for_cuda(fmt, gated):
  rows, cols = 2 * 2048, 2560
  shape = jax.ShapeDtypeStruct
  text = (
    jax.jit(lambda *args: mosaic_gpu.few_rows(*args, fmt, gated=gated))
    .trace(
      shape((1, cols), jnp.bfloat16),
      shape(fmt.codes_shape((rows,), cols), fmt.codes_dtype),
      shape(fmt.scale_shape((rows,), cols), fmt.scale_dtype),
    )
    .lower(lowering_platforms=('cuda',))
    .as_text()
  )
  assert text.count('custom_call @mosaic_gpu') == 1


TERNARY = Ternary()
MANY = [
  TERNARY,
  Ternary(group=32, scale='ue5m3'),
  Int(bits=2, group=96),
  Int(bits=4, group=32),
  Int(bits=8, group=128),
  Int(bits=8),
]


@pytest.mark.parametrize('fmt', MANY, ids=name)
def test_unpacks_what_wgmma_multiplies(fmt):
  cols = 384
  p = packed_weights.packed(fmt, (256,), cols, 7)
  want = packed_weights.dense(p, fmt, cols).astype(ml_dtypes.bfloat16)
  spec = _many_rows.Spec(rows=256, cols=cols, xs=64, fmt=fmt)
  codes = np.asarray(p['codes']).reshape(256, -1).view(np.uint8)
  scale = np.frombuffer(np.asarray(p['scale']).tobytes(), np.uint8)
  for row, step, part in ((0, 1, 0), (128, 2, 1)):
    at = step * spec.step_bytes
    tile = codes[row : row + 128, at : at + spec.step_bytes].reshape(-1)
    ops = gpu_threads.Pairs()
    number = lambda value, ops=ops: ops.constant(value)
    words = _many_rows.unpack(
      ops, spec, tile, scale, number(row), number(step), part
    )
    got = np.stack([w.value for w in words], -1).view(ml_dtypes.bfloat16)
    # Warp, row of 8, lane; 8 columns, upper or lower row, pair.
    got = got.reshape(8, 8, 4, 8, 2, 2).transpose(0, 4, 1, 3, 2, 5)
    first = step * _many_rows.STEP + part * _many_rows.PART
    np.testing.assert_array_equal(
      got.reshape(128, _many_rows.PART),
      want[row : row + 128, first : first + _many_rows.PART],
    )


def test_transposes_the_result():
  ops = gpu_threads.Pairs()
  row, column = np.divmod(np.arange(64 * 64), 64)  # Of the weight, and of x.
  tile = (row * 64 + column).reshape(4, 2, 8, 8, 4, 2)
  # As accumulators are: warp, row of 8, lane; 8 columns, half, pair.
  pairs = tile.transpose(0, 2, 4, 3, 1, 5).reshape(128, 16, 2)
  words = [
    gpu_threads.Int(pairs[:, i, 0] | pairs[:, i, 1] << 16) for i in range(16)
  ]
  memory = np.zeros(64 * 128, np.uint8)
  _many_rows.transpose(ops, words, memory, 0)
  found = memory.view(np.uint16).reshape(64, 8, 8)
  at = np.arange(8)
  found = np.stack([found[x, at ^ (x & 7)] for x in range(64)])
  want = (row * 64 + column).reshape(64, 64).T
  np.testing.assert_array_equal(found.reshape(64, 64), want)


@pytest.mark.parametrize('fmt', [Ternary(), Int(bits=8)], ids=name)
@pytest.mark.parametrize('xs, gated', [(40, False), (700, True)])
def test_many_rows_lower_for_cuda(fmt, xs, gated):
  rows, cols = 2560, 10240
  shape = jax.ShapeDtypeStruct
  args = (
    shape((xs, cols), jnp.bfloat16),
    shape(fmt.codes_shape((rows,), cols), fmt.codes_dtype),
    shape(fmt.scale_shape((rows,), cols), fmt.scale_dtype),
  )
  run = jax.jit(lambda *args: mosaic_gpu.matmul(*args, fmt, gated=gated))
  lowered = run.trace(*args).lower(lowering_platforms=('cuda',))
  assert lowered.as_text().count('custom_call @mosaic_gpu') == 1
  (out,) = jax.tree.leaves(lowered.out_info)
  assert out.shape == (xs, rows // 2 if gated else rows)


def test_tiles_fill_the_device():
  def choose(xs, fmt=TERNARY):
    return _many_rows.choose(5376, 21504, xs, fmt, 132)

  assert (choose(2048).tile_x, choose(2048).split) == (256, 1)
  assert (choose(512).tile_x, choose(512).split) == (256, 3)
  assert choose(16).tile_x == 64
  for bad in (
    Ternary(planes=2),
    Ternary(packing='5trit'),
    Int(bits=4, group=16),
  ):
    assert _many_rows.why_not(choose(512, bad))


@pytest.mark.parametrize(
  'change, reason',
  [
    (dict(x=(1, 128, jnp.float32)), 'bfloat16'),
    (dict(fmt=Int(bits=3, group=128)), 'not supported'),
    (dict(fmt=Ternary(group=4)), 'not supported'),
    (dict(x=(33, 128, jnp.bfloat16), fmt=Ternary(planes=2)), 'too small'),
  ],
)
def test_why_not(change, reason):
  fmt = change.get('fmt', Ternary())
  codes, scale = packed_weights.packed(fmt, (16,), 128).values()
  *size, dtype = change.get('x', (1, 128, jnp.bfloat16))
  assert reason in mosaic_gpu.why_not(jnp.zeros(size, dtype), codes, scale, fmt)


def test_specs_say_what_they_take():
  spec = _spec.Spec(rows=40, cols=256, xs=1, fmt=Ternary(), tiles=2)
  assert (spec.grid, spec.blocks, spec.row_bytes) == (2, 2, 64)
  gated = dataclasses.replace(spec, gated=True)
  assert (gated.out_rows, gated.block_rows, gated.grid) == (20, 16, 2)
