# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the packed formats: layouts, exact inverses, sizes, bad input."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from gemma_ext import errors
import gemma_ext.kernels as kernels

TERNARY = [
  kernels.TernaryFormat(planes=planes, group=1, packing=packing)
  for packing in ('2bit', '5trit', '3of4')
  for planes in (1, 3)
]
INTS = [kernels.IntFormat(bits=bits) for bits in range(2, 9)]


def _draw(fmt, rows, cols, seed):
  rng = np.random.default_rng(seed)
  lo, hi = fmt.code_range
  shape = fmt.latent_shape(rows, cols)
  if getattr(fmt, 'packing', '') == '3of4':
    codes = rng.choice(np.array([-1, 1], np.int8), shape)
    zero = rng.integers(0, 4, (*shape[:-1], cols // 4, 1))
    return codes * (zero != np.arange(4)).reshape(shape)
  return rng.integers(lo, hi + 1, shape).astype(np.int8)


def _whole(fmt, cols):
  """Columns that the format can have."""
  return -(-cols // 4) * 4 if getattr(fmt, 'packing', '') == '3of4' else cols


def _place(i, fields):
  """Byte and field of code i, as docs/formats.md says it in words."""
  block, i = divmod(i, 32 * fields)
  field, byte = divmod(i, 32)
  return block * 32 + byte, field


def _read(fmt, row, i):
  """Reads code i of one packed row with nothing but Python integers."""
  row = [int(b) for b in row]
  if isinstance(fmt, kernels.TernaryFormat):
    if fmt.packing == '2bit':
      byte, field = _place(i, 4)
      return (row[byte] >> 2 * field & 3) - 1
    if fmt.packing == '3of4':
      bit = i // 4 * 5
      quad = int.from_bytes(bytes(row), 'little') >> bit & 31
      zero, place = quad & 3, i % 4
      if place == zero:
        return 0
      signs = [quad >> 2 & 1, quad >> 3 & 1, quad >> 4 & 1]
      return 2 * signs[place - (place > zero)] - 1
    byte, field = _place(i, 5)
    number = row[byte] * 243 // 256
    return number // 3 ** (4 - field) % 3 - 1
  offset = 1 << (fmt.bits - 1)
  if fmt.bits in (2, 4):
    byte, field = _place(i, 8 // fmt.bits)
    return (row[byte] >> fmt.bits * field & (2 * offset - 1)) - offset
  if fmt.bits == 8:
    return row[i]
  eight, k = divmod(i, 8)
  stream = int.from_bytes(
    bytes(row[eight * fmt.bits : (eight + 1) * fmt.bits]), 'little'
  )
  return (stream >> fmt.bits * k & (2 * offset - 1)) - offset


@settings(max_examples=24, deadline=None, derandomize=True, database=None)
@given(
  fmt=st.sampled_from(TERNARY + INTS),
  rows=st.lists(st.integers(1, 3), max_size=2).map(tuple),
  cols=st.integers(1, 400),
  seed=st.integers(0, 2**16),
)
def test_unpack_inverts_pack(fmt, rows, cols, seed):
  cols = _whole(fmt, cols)
  codes = _draw(fmt, rows, cols, seed)
  packed = jax.jit(fmt.pack)(codes)
  assert packed.shape == fmt.codes_shape(rows, cols)
  assert packed.dtype == fmt.codes_dtype
  unpacked = jax.jit(fmt.unpack, static_argnums=1)(packed, cols)
  assert unpacked.dtype == np.int8
  np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize('fmt', TERNARY + INTS, ids=str)
@pytest.mark.parametrize('cols', [7, 165])
def test_layout_is_the_documented_one(fmt, cols):
  cols = _whole(fmt, cols)
  codes = _draw(fmt, (2,), cols, cols)
  packed = np.asarray(jax.jit(fmt.pack)(codes)).reshape(
    -1, *fmt.codes_shape((), cols)[-1:]
  )
  got = [[_read(fmt, row, i) for i in range(cols)] for row in packed]
  np.testing.assert_array_equal(got, codes.reshape(-1, cols))


def test_every_five_trits_survive():
  fmt = kernels.TernaryFormat(group=1, packing='5trit')
  numbers = np.arange(243)
  codes = np.zeros((1, 243, 160), np.int8)
  codes[0, :, ::32] = numbers[:, None] // 3 ** np.arange(5)[::-1] % 3 - 1
  packed = np.asarray(fmt.pack(codes))
  np.testing.assert_array_equal(packed[0, :, 0], -(-numbers * 256 // 243))
  np.testing.assert_array_equal(fmt.unpack(packed, 160), codes)


def test_fours_of_other_patterns_become_some_of_theirs():
  fmt = kernels.TernaryFormat(group=4, packing='3of4')
  codes = np.array([[[0, 0, 0, 0, 1, -1, 1, 1, 0, 1, 0, -1]]], np.int8)
  got = fmt.unpack(fmt.pack(codes), 12)
  want = [0, 1, 1, 1, 0, -1, 1, 1, 0, 1, 1, -1]
  np.testing.assert_array_equal(got[0, 0], want)


def test_latent_fours_round_to_the_nearest_of_the_pattern():
  fmt = kernels.TernaryFormat(group=4, packing='3of4')
  latent = np.random.default_rng(0).uniform(-1.4, 1.4, (1, 50, 4))
  got = np.asarray(fmt.round(latent.astype(np.float32)))
  all_of_them = np.array(
    [
      np.insert(signs, zero, 0)
      for zero in range(4)
      for signs in np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1).T
    ]
  )
  away = ((latent[0, :, None] - all_of_them) ** 2).sum(-1)
  np.testing.assert_array_equal(got[0], all_of_them[away.argmin(-1)])


def test_fours_divide_the_row():
  fmt = kernels.TernaryFormat(group=2, packing='3of4')
  with pytest.raises(errors.GroupSizeError, match='whole fours'):
    fmt.scale_shape((1,), 6)
  with pytest.raises(errors.RecipeError, match='tied'):
    kernels.TernaryFormat(packing='3of4', planes=2, tied=True)


def test_padding_holds_zero_codes():
  one = np.ones((1, 1), np.int8)
  trits = kernels.TernaryFormat(group=1, packing='5trit').pack(one)
  number = 2 * 81 + 27 + 9 + 3 + 1
  zero = 81 + 27 + 9 + 3 + 1
  want = [-(-n * 256 // 243) for n in (number, zero)]
  assert np.asarray(trits).tolist() == [want[:1] + want[1:] * 31]
  bits = kernels.TernaryFormat(group=1).pack(one)
  assert np.asarray(bits).tolist() == [[0b01010110] + [0b01010101] * 31]
  nibbles = kernels.IntFormat(bits=4).pack(one[0])
  assert np.asarray(nibbles).tolist() == [0x89] + [0x88] * 31


@pytest.mark.parametrize(
  'fmt, cols, bits',
  [
    (kernels.TernaryFormat(group=128), 2048, 2.125),
    (kernels.TernaryFormat(group=128, planes=2), 640, 4.25),
    (kernels.TernaryFormat(group=128, packing='5trit'), 640, 1.725),
    (kernels.TernaryFormat(group=128, packing='5trit'), 2048, 1.75),
    (kernels.TernaryFormat(group=128, packing='3of4'), 640, 1.375),
    (kernels.IntFormat(bits=8), 640, 8.025),
    (kernels.IntFormat(bits=4, group=32), 640, 4.5),
    (kernels.IntFormat(bits=4, group=32, scale='ue5m3'), 640, 4.25),
    (kernels.IntFormat(bits=3, group=128), 640, 3.125),
    (kernels.IntFormat(bits=2, group=64), 640, 2.25),
  ],
  ids=str,
)
def test_bits_per_weight(fmt, cols, bits):
  assert fmt.bits_per_weight(cols) == pytest.approx(bits, abs=1e-12)
  assert fmt.nbytes((3, 5), cols) == 15 * bits * cols / 8


def test_shapes():
  fmt = kernels.TernaryFormat(planes=2, group=128, packing='5trit')
  assert fmt.codes_shape((2, 7), 1152) == (2, 2, 7, 256)
  assert fmt.scale_shape((2, 7), 1152) == (2, 2, 7, 9)
  assert kernels.IntFormat(bits=3).codes_shape((7,), 20) == (7, 9)
  assert kernels.IntFormat(bits=3).scale_shape((7,), 20) == (7, 1)


def test_formats_are_static_arguments():
  assert hash(kernels.IntFormat(bits=4)) == hash(kernels.IntFormat(bits=4))
  assert kernels.TernaryFormat(group=64) != kernels.TernaryFormat(group=32)


@pytest.mark.parametrize(
  'cols, group, want',
  [
    (640, 128, 128),
    (1152, 128, 128),
    (6912, 100, 96),
    (2112, 128, 96),
    (336, 128, 112),
    (48, 40, 16),
    (72, 30, 24),
    (50, 30, 25),
    (12, 128, 12),
    (7, 7, 7),
    (640, 8, 8),
    (640, 12, 8),
  ],
)
def test_choose_group(cols, group, want):
  assert kernels.choose_group(cols, group) == want


def test_choose_group_says_what_would_fit():
  with pytest.raises(errors.GroupSizeError, match=r'\[101, 202\]'):
    kernels.choose_group(202, 64)
  with pytest.raises(errors.GroupSizeError, match=r'\[8, 16, 32, 64\]'):
    kernels.choose_group(64, 4)


def test_choose_group_of_nothing():
  with pytest.raises(errors.GroupSizeError, match='at least 1'):
    kernels.choose_group(0, 8)


def test_group_does_not_divide():
  with pytest.raises(errors.GroupSizeError, match='does not divide'):
    kernels.TernaryFormat(group=128).scale_shape((4,), 100)
  with pytest.raises(errors.GroupSizeError, match='does not divide'):
    kernels.IntFormat(group=32).nbytes((4,), 100)


@pytest.mark.parametrize('group', [0, -1, 1.5, True])
def test_bad_group(group):
  with pytest.raises(errors.GroupSizeError):
    kernels.TernaryFormat(group=group)
  with pytest.raises(errors.GroupSizeError):
    kernels.IntFormat(group=group)


@pytest.mark.parametrize('bits', [1, 9, 4.0, True])
def test_bad_bits(bits):
  with pytest.raises(errors.RecipeError):
    kernels.IntFormat(bits=bits)


@pytest.mark.parametrize('planes', [0, 9, 2.0, True])
def test_bad_planes(planes):
  with pytest.raises(errors.RecipeError):
    kernels.TernaryFormat(planes=planes)


def test_bad_packing():
  with pytest.raises(errors.RecipeError, match="'2bit', '5trit'"):
    kernels.TernaryFormat(packing='3bit')


@pytest.mark.parametrize('fmt', [TERNARY[0], INTS[2]], ids=str)
def test_pack_wants_int8(fmt):
  with pytest.raises(errors.ShapeError, match='float32'):
    fmt.pack(np.zeros((1, 4), np.float32))


@pytest.mark.parametrize('fmt', TERNARY + INTS, ids=str)
def test_unpack_of_wrong_width(fmt):
  packed = np.zeros(fmt.codes_shape((2,), 640), fmt.codes_dtype)
  with pytest.raises(errors.ParamsMismatchError, match='1280 weights'):
    fmt.unpack(packed, 1280)
