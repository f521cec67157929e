# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Instructions of `kernels.mosaic_gpu` on numpy, for every thread at once."""

from __future__ import annotations

import ml_dtypes
import numpy as np


class Flag:
  """A bit of every thread."""

  def __init__(self, value):
    self.value = value

  def __and__(self, other):
    return Flag(self.value & other.value)


class Int:
  """A whole number of 32 bits of every thread."""

  def __init__(self, value):
    self.value = np.asarray(value, np.uint32)

  def _with(self, op, other):
    other = other.value if isinstance(other, Int) else np.uint32(other)
    return Int(op(self.value, other))

  def __add__(self, other):
    return self._with(np.add, other)

  def __mul__(self, other):
    return self._with(np.multiply, other)

  def __and__(self, other):
    return self._with(np.bitwise_and, other)

  def __or__(self, other):
    return self._with(np.bitwise_or, other)

  def __rshift__(self, other):
    return self._with(np.right_shift, other)

  def __lshift__(self, other):
    return self._with(np.left_shift, other)

  def __floordiv__(self, other):
    return self._with(np.floor_divide, other)

  def __mod__(self, other):
    return self._with(np.remainder, other)

  def __lt__(self, other):
    return Flag(self._with(np.less, other).value.astype(bool))

  def equals(self, other):
    return Flag(self._with(np.equal, other).value.astype(bool))

  def min(self, other):
    return self._with(np.minimum, other)


def _halves(word):  # uint32[...] -> float32[..., 2]
  pair = np.stack([word & 0xFFFF, word >> 16], axis=-1).astype(np.uint16)
  return pair.view(ml_dtypes.bfloat16).astype(np.float32)


class Threads:
  """Threads of all blocks; memory is bytes, and reads beyond it are errors."""

  def __init__(self, spec):
    blocks, warps, shared = spec.grid * spec.split, spec.warps, spec.shared
    self._split = spec.split
    assert spec.block_rows <= spec.out_rows
    staged, ring = spec.staged, spec.ring
    self._shape = (blocks, 32 * warps)
    self._blocks = np.broadcast_to(np.arange(blocks)[:, None], self._shape)
    self._shared = np.full((blocks, shared), np.nan, np.float32)
    self._staged = np.full((blocks, staged), 0xFF, np.uint8)
    self._ring = np.full((blocks, ring), 0xFF, np.uint8)
    self._rounded = np.full((blocks, spec.rounded), 0x7F, np.uint8)
    self._scales = np.full((blocks, spec.rounded_scales), np.nan, np.float32)
    self._asked: list[list[tuple]] = [[]]

  def thread(self):
    return Int(np.broadcast_to(np.arange(self._shape[1]), self._shape))

  def block(self):
    return Int(self._blocks // self._split)

  def rank(self):
    return Int(self._blocks % self._split)

  def constant(self, value):
    return Int(np.full(self._shape, value, np.uint32))

  def zero(self):
    return np.zeros(self._shape, np.float32)

  def loop(self, count, body, carry):
    for i in range(max(count, 0)):
      carry = body(self.constant(i), carry)
    return carry

  def load(self, memory, at, *, words, plus=0, valid):
    at = at + plus
    assert not np.any(at.value % (4 * words)), 'unaligned'
    view = memory.view(np.uint32)
    index = at.value.astype(np.int64) // 4
    live = valid.value
    assert index[live].max(initial=0) + words <= len(view), 'out of bounds'
    index = np.where(live, index, 0)
    return [Int(np.where(live, view[index + k], 0)) for k in range(words)]

  def stage(self, memory, at, plus, to, width, inside):
    at = at + plus
    assert not np.any((at.value | to.value) % width), 'unaligned'
    self._asked[-1].append(
      (memory, self._staged, width, at.value, to.value, inside.value)
    )

  def staged(self, at, plus, size):
    at = (at + plus).value.astype(np.int64)
    assert not np.any(at % size), 'unaligned'
    take = lambda k: np.take_along_axis(self._staged, at + k, axis=1)
    word = sum(
      take(k).astype(np.uint32) << np.uint32(8 * k) for k in range(size)
    )
    return Int(word)

  def fetch(self, memory, at, plus, to, to_plus, inside):
    at, to = at + plus, to + to_plus
    assert not np.any((at.value | to.value) % 16), 'unaligned'
    self._asked[-1].append(
      (memory, self._ring, 16, at.value, to.value, inside.value)
    )

  def commit(self):
    self._asked.append([])

  def wait(self, count):
    # Nothing arrives before somebody waits for it.
    while len(self._asked) > count + 1:
      for memory, target, width, at, to, live in self._asked.pop(0):
        for k in range(width):
          values = memory[at[live].astype(np.int64) + k]
          target[self._blocks[live], to[live] + k] = values

  def fetched(self, at, plus):
    at = (at + plus).value.astype(np.int64)
    assert not np.any(at % 16), 'unaligned'
    words = self._ring.view(np.uint32)
    take = lambda k: np.take_along_axis(words, at // 4 + k, axis=1)
    return [Int(take(k)) for k in range(4)]

  def mask(self, word, mask, bits):
    return (word & mask) | bits

  def permute(self, a, b, selector):
    both = a.value.astype(np.uint64) | b.value.astype(np.uint64) << np.uint64(
      32
    )
    out = np.zeros(self._shape, np.uint32)
    for k in range(4):
      byte = np.uint64(8 * (selector >> 4 * k & 7))
      out |= ((both >> byte) & np.uint64(255)).astype(np.uint32) << np.uint32(
        8 * k
      )
    return Int(out)

  def mma(self, a, b, c):
    # By warp, group of four and thread of it, as PTX has it.
    split = lambda v: v.reshape(self._shape[0], -1, 8, 4, *v.shape[2:])
    a = [split(_halves(v.value)) for v in a]  # [B, W, 8, 4, 2]
    b = [split(_halves(v.value)) for v in b]
    rows = []
    for upper, lower in ((0, 2), (1, 3)):
      row = np.concatenate([a[upper], a[lower]], axis=3)
      rows.append(row.reshape(*row.shape[:3], 16))
    columns = np.concatenate(b, axis=3)
    columns = columns.reshape(*columns.shape[:3], 16)
    out = []
    for row in rows:
      d = np.einsum('bwrk,bwck->bwrc', row, columns)
      d = d.reshape(self._shape[0], -1, 8, 4, 2)
      out += [d[..., k].reshape(self._shape) for k in range(2)]
    return [d + v for d, v in zip(out, c)]

  def scale(self, bits, kind, factor):
    size = bits & 127 if kind == 'e4m3' else bits
    offset = (112 if kind == 'e4m3' else 107) << 3
    word = bits << 16 if kind == 'bf16' else (size + offset) << 20
    if kind == 'e4m3':
      word = word | ((bits & 128) << 24)
    value = word.value.view(np.float32)
    if kind != 'bf16':
      value = np.where(size.value == 0, 0, value)
    return value * np.float32(factor)

  def mma8(self, a, b, c, *, signed):
    split = lambda v: v.reshape(self._shape[0], -1, 8, 4, 4)
    kind = np.int8 if signed else np.uint8
    bytes_ = lambda v, kind: np.ascontiguousarray(v.value)[..., None].view(kind)
    a = [split(bytes_(v, kind).astype(np.int64)) for v in a]
    b = [split(bytes_(v, np.int8).astype(np.int64)) for v in b]
    columns = np.concatenate(b, axis=3).reshape(*b[0].shape[:3], 32)
    out = []
    for upper, lower in ((0, 2), (1, 3)):
      row = np.concatenate([a[upper], a[lower]], axis=3)
      row = row.reshape(*row.shape[:3], 32)
      d = np.einsum('bwrk,bwck->bwrc', row, columns)
      d = d.reshape(self._shape[0], -1, 8, 4, 2)
      out += [d[..., k].reshape(self._shape) for k in range(2)]
    return [Int((d & 0xFFFFFFFF).astype(np.uint32)) + v for d, v in zip(out, c)]

  def max16(self, a, b):
    halves = lambda v: np.ascontiguousarray(v.value)[..., None].view(np.uint16)
    out = np.ascontiguousarray(np.maximum(halves(a), halves(b)))
    return Int(out.view(np.uint32)[..., 0])

  def shuffle(self, a, distance):
    return Int(a.value[:, np.arange(self._shape[1]) ^ distance])

  def bfloat16(self, high):
    return high.value.view(np.float32)

  def fmax(self, a, b):
    return np.maximum(a, np.float32(b))

  def multiply(self, a, b):
    return a * np.float32(b)

  def times(self, a, b):
    return a * b

  def reciprocal(self, a):
    return np.float32(1) / a

  def round(self, a, b):
    value = (a.astype(np.float64) * b + 1.5 * 2.0**23).astype(np.float32)
    return Int(value.view(np.uint32))

  def to_float(self, a):
    return a.value.view(np.int32).astype(np.float32)

  def pack(self, values, byte):
    out = []
    for start in range(0, len(values), 4):
      word = self.constant(0)
      for k, value in enumerate(values[start : start + 4]):
        word = word | ((value >> (8 * byte)) & 0xFF) << (8 * k)
      out.append(word)
    return out

  def put_bytes(self, at, words, count, inside=None):
    live = np.full(self._shape, True) if inside is None else inside.value
    assert not np.any(at.value[live] % count), 'unaligned'
    index = at.value.astype(np.int64)
    for k in range(count):
      byte = (words[k // 4] >> (8 * (k % 4))).value.astype(np.uint8)
      self._rounded[self._blocks[live], index[live] + k] = byte[live]

  def get_bytes(self, at, plus, valid):
    index = (at + plus).value.astype(np.int64)
    assert not np.any(index % 16), 'unaligned'
    words = self._rounded.view(np.uint32)
    take = lambda k: np.take_along_axis(words, index // 4 + k, axis=1)
    return [Int(np.where(valid.value, take(k), 0)) for k in range(4)]

  def put_scale(self, at, value, inside):
    live = inside.value
    self._scales[self._blocks[live], at.value[live].astype(np.int64)] = value[
      live
    ]

  def get_scale(self, at):
    return np.take_along_axis(self._scales, at.value.astype(np.int64), axis=1)

  def put_whole(self, at, value, inside):
    self.put_scale(at, value.value.view(np.float32), inside)

  def get_whole(self, at):
    return Int(self.get_scale(at).view(np.uint32))

  def shuffle_float(self, a, distance):
    return a[:, np.arange(self._shape[1]) ^ distance]

  def fma(self, a, b, c):
    return a * b + c

  def add(self, a, b):
    return a + b

  def gelu_mul(self, gate, up):
    z = 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return (gate / (1 + np.exp(-z)) * up).astype(np.float32)

  def share(self, at, value, inside=None):
    first = self._blocks // self._split * self._split
    live = np.full(self._shape, True) if inside is None else inside.value
    self._shared[first[live], at.value[live].astype(np.int64)] = value[live]

  def shared(self, at):
    return np.take_along_axis(self._shared, at.value.astype(np.int64), axis=1)

  def barrier(self):
    pass

  def meet(self):
    pass

  def store(self, memory, at, value, inside):
    index = at.value[inside.value].astype(np.int64) // 2
    value = value[inside.value].astype(ml_dtypes.bfloat16)
    view = memory.view(ml_dtypes.bfloat16)
    view[index] = value
    # Several may write the same place, but not different numbers.
    np.testing.assert_array_equal(view[index], value)


class Pairs:
  """Instructions of `_many_rows`, for the threads of two warpgroups."""

  def thread(self):
    return Int(np.arange(256))

  def constant(self, value):
    return Int(np.full(256, value, np.uint32))

  mask = Threads.mask
  _shape = (256,)
  permute = Threads.permute

  def exclusive_or(self, a, b):
    return Int(a.value ^ b.value)

  def subtract2(self, a, b):
    return self._two(np.subtract, a, b)

  def multiply2(self, a, b):
    return self._two(np.multiply, a, b)

  def half(self, memory, at, plus):
    return Int(memory.view(np.uint16)[(at + plus).value // 2])

  def global_scale(self, memory, at, plus, spec):
    at = (at + plus * spec.groups).value
    if spec.fmt.scale_dtype.itemsize == 2:
      return Int(memory.view(np.uint16)[at]) * 0x10001
    bits = (Int(memory[at]) + (107 << 3)) << 4
    return Int(np.where(memory[at] == 0, 0, bits.value)) * 0x10001

  def put_transposed(self, memory, at, pairs):
    # Matrix, row of 8, lane, pair; 16 bytes a row, a row's address a thread.
    for warp in range(4):
      threads = slice(32 * warp, 32 * warp + 32)
      words = np.stack([p.value[threads] for p in pairs])
      matrices = words.reshape(4, 8, 4, 1).view(np.uint16).reshape(4, 8, 8)
      to = at.value[threads].astype(np.int64) // 2
      memory.view(np.uint16)[to[:, None] + np.arange(8)] = matrices.transpose(
        0, 2, 1
      ).reshape(32, 8)

  def _two(self, op, a, b):
    out = op(_halves(a.value), _halves(b.value)).astype(ml_dtypes.bfloat16)
    return Int(np.ascontiguousarray(out).view(np.uint32)[..., 0])
