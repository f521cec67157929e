# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows of x in bfloat16.

Which thread holds which code is free as long as weights and x agree, so that
nobody moves a code: thread t of four takes 16 bytes of 64, and one shift of a
word with one `(word & mask) | magic` makes two bfloat16 of it:

    exponent 7 - p over a code at bit p: 2^(7 - p) + code, exactly.

What is too much, `2^(7 - p)` and the offset of the code, is the same for all
rows: the product of x with minus that is where accumulators start. A byte is
two terms, `128 + (c & 127)` and `-128 - (c & 128)`, whose surplus cancels.

**Groups.** The four threads hold codes of two blocks of 32 bytes, which have
scales of their own: a row of x takes as many columns as there are groups at a
time, and in each of them, x of the threads of other groups is 0.
"""

import functools
from typing import Any

from gemma_ext.kernels.mosaic_gpu import _spec

WORDS = 4  # That a thread takes of a row at a time.
# bfloat16, twice, of 2^(7 - p).
_MAGIC = {p: 0x0001_0001 * ((134 - p) << 7) for p in (0, 2, 4)}
_HALVES = 0x00FF_00FF


class Floats:
  """Reads x, and adds products to sums: four a tile and thread."""

  results = 4

  def __init__(
    self, ops: Any, spec: _spec.Spec, place: _spec.Place, thread: Any, x: Any
  ):
    del thread
    self._ops, self._spec, self._place, self._x = ops, spec, place, x
    sub = spec.subgroups
    column, lane = place.group, place.lane
    self._x_row = (column // sub).min(spec.xs - 1) * spec.cols
    # Of another group, or of no row of x, a thread's x counts for nothing.
    self._sees = column < sub * spec.xs
    if sub > 1:
      self._sees &= (lane // (4 // sub)).equals(column & (sub - 1))

  def ask(self, j: Any) -> Any:
    """Asks for x of slice j, the first."""
    return self._read(j)

  def begin(self, asked: Any, j: Any) -> Any:
    """Before slice j, the first; `asked` is what `ask` returned."""
    del j
    return asked

  def step(self, sums: Any, read: Any, j: Any) -> tuple[Any, Any]:
    """The sums with slice j; `read` is x of it."""
    following = self._read(j + 1)
    return self._add(sums, read, j), following

  def _read(self, j: Any) -> list[Any]:
    """Asks for x of slice j."""
    spec = self._spec
    out = []
    for u in range(spec.unroll):
      block, inside = self._block(j, u, self._place.lane >> 1)
      out.append([self._read_x(block, f, inside) for f in range(spec.fields)])
    return out

  def _add(
    self, sums: list[list[Any]], read: list[Any], j: Any
  ) -> list[list[Any]]:
    """Returns the sums with slice j."""
    ops, spec = self._ops, self._spec
    sums = [list(s) for s in sums]
    slot = (j % spec.slices) * spec.slice
    for u, xs in enumerate(read):
      b = [_pairs(ops, x) for x in xs]
      starts = [self._start(b, run) for run in self._runs]
      at = (self._place.warp * 2 * _spec.BLOCK) + self._place.lane * 16
      at = slot + at + self._place.group * spec.stride
      for plane in range(spec.planes):
        owner, factor = spec.scale_of(plane)
        for tile in range(spec.tiles):
          upper, lower = (
            [
              _unpack(ops, spec, word)
              for word in ops.fetched(
                at,
                spec.row_at(plane, tile, more)
                + u * 2 * _spec.BLOCK * spec.warps,
              )
            ]
            for more in (0, 8)
          )
          for run, start in zip(self._runs, starts):
            # Two chains, neither of which waits for the other.
            chains = list(start)
            for n, (f, i) in enumerate(run):
              for (a0, a2), (a1, a3) in zip(upper[i][f], lower[i][f]):
                chains[n % 2] = ops.mma(
                  (a0, a1, a2, a3), b[f][i], chains[n % 2]
                )
            s = self._scales(owner, tile, run, j, u)
            for k in range(4):
              d = ops.add(chains[0][k], chains[1][k])
              by = ops.scale(s[k], spec.scale_kind, factor)
              sums[tile][k] = ops.fma(d, by, sums[tile][k])
    return sums

  @functools.cached_property
  def _runs(self) -> list[list[tuple[int, int]]]:
    """Fields and words of a thread whose products share a scale."""
    group, fields = self._spec.fmt.group, self._spec.fields
    words = range(WORDS)
    every = [[(f, i) for i in words] for f in range(fields)]
    if group is None or group % (_spec.BLOCK * fields) == 0:
      return [sum(every, [])]
    size = group // _spec.BLOCK
    if size > 1 and fields % size == 0:
      return [sum(every[f : f + size], []) for f in range(0, fields, size)]
    if group == 8:
      return [run[half : half + 2] for run in every for half in (0, 2)]
    return every

  def _block(self, j: Any, u: int, which: Any) -> tuple[Any, Any]:
    """One of a pair of blocks, or the last one, and whether there is one."""
    spec = self._spec
    pair = (j * spec.unroll + u) * spec.warps + self._place.warp
    block = pair * 2 + which
    return block.min(spec.blocks - 1), block < spec.blocks

  def _scales(
    self, plane: int, tile: int, run: list[tuple[int, int]], j: Any, u: int
  ) -> list[Any]:
    """Stored scales of the four results that a thread has of a tile."""
    spec = self._spec
    columns = [self._scale_index(run[0], k, j, u) for k in (0, 1)]
    out = []
    for more in (0, 8):
      for column in columns:
        at = self._place.group * spec.groups + column
        plus = spec.scale_at(plane, tile, more)
        out.append(
          self._ops.staged(at * spec.scale_bytes, plus, spec.scale_bytes)
        )
    return out

  def _scale_index(self, first: tuple[int, int], k: int, j: Any, u: int) -> Any:
    """Which scale of its row belongs to column `2 lane + k`."""
    spec, lane = self._spec, self._place.lane
    group, (field, word) = spec.fmt.group, first
    if group is None:
      return self._ops.constant(0)
    sub = spec.subgroups
    # The thread of the four whose codes count in that column.
    if sub == 2:
      which, half = self._ops.constant(k), 0
    else:
      which, half = lane & 1, k
    block, _ = self._block(j, u, which)
    field_at = block * spec.fields + field
    if group >= _spec.BLOCK:
      index = field_at // (group // _spec.BLOCK)
    elif group == 16:
      index = field_at * 2 + half
    else:
      index = field_at * 4 + (half * 2 + word // 2)
    if spec.cols % (_spec.BLOCK * spec.fields):
      index = index.min(spec.groups - 1)
    return index

  def _read_x(self, block: Any, field: int, inside: Any) -> Any:
    """16 neighbours: those that a thread's codes of a field multiply."""
    spec = self._spec
    col = (block * spec.fields + field) * _spec.BLOCK + (
      self._place.lane & 1
    ) * 16
    inside &= self._sees
    out = []
    for eight in (0, 8):
      at, valid = col + eight, inside
      if spec.cols % (_spec.BLOCK * spec.fields):
        within = at < spec.cols
        valid = inside & within
        at = at.min(spec.cols - 8)
      out += self._ops.load(
        self._x, (self._x_row + at) * 2, words=4, valid=valid
      )
    return out

  def _start(self, b: list[Any], run: list[tuple[int, int]]) -> list[Any]:
    """Minus what the weights of a run are too much, times x: two chains."""
    ops, spec = self._ops, self._spec
    chains = [[ops.zero()] * 4 for _ in range(2)]
    if spec.fields > 1:
      for n, (f, i) in enumerate(run):
        even, odd = (ops.constant(v) for v in _surplus(spec, f))
        chains[n % 2] = ops.mma((even, even, odd, odd), b[f][i], chains[n % 2])
    return chains


def _pairs(ops: Any, x: Any) -> list[list[Any]]:
  """Neighbours of x as the pairs of four bytes: even, then odd."""
  return [
    [ops.permute(x[i], x[i + 1], 0x5410), ops.permute(x[i], x[i + 1], 0x7632)]
    for i in range(0, len(x), 2)
  ]


def _unpack(
  ops: Any, spec: _spec.Spec, word: Any
) -> list[list[tuple[Any, Any]]]:
  """Splits four bytes into bfloat16s.

  Returns:
    By field, and then by term: the pair of bytes 0 and 2, that of 1 and 3.
  """
  if spec.fields == 1:
    return [
      [
        tuple(ops.mask(w, 0x007F_007F, 0x4300_4300) for w in (word, word >> 8)),
        tuple(ops.mask(w, 0x0080_0080, 0xC300_C300) for w in (word, word >> 8)),
      ]
    ]
  if spec.fields == 5:
    halves = [word & _HALVES, (word >> 8) & _HALVES]
    out = []
    for _ in range(5):
      halves = [v * 3 for v in halves]
      out.append(
        [tuple(ops.mask(v >> 8, 0x0003_0003, _MAGIC[0]) for v in halves)]
      )
      halves = [v & _HALVES for v in halves]
    return out
  bits = 8 // spec.fields
  mask = 0x0001_0001 * ((1 << bits) - 1)
  shifted = {0: word}

  def field(at):
    shift, p = _shift(bits, at)
    if shift not in shifted:
      shifted[shift] = word >> shift
    return ops.mask(shifted[shift], mask << p, _MAGIC[p])

  return [[(field(f * bits), field(8 + f * bits))] for f in range(spec.fields)]


def _shift(bits: int, at: int) -> tuple[int, int]:
  """How far to shift a half so that a code at bit `at` is at bit p: both."""
  if bits == 4:
    return at, 0
  return at // 6 * 6, at % 6


def _surplus(spec: _spec.Spec, field: int) -> tuple[int, int]:
  """What to start from: minus surplus, as two bfloat16; even and odd bytes."""
  if spec.fields == 5:
    powers = [0, 0]
  else:
    bits = 8 // spec.fields
    powers = [_shift(bits, at)[1] for at in (field * bits, 8 + field * bits)]
  even, odd = (_bfloat16(-(2 ** (7 - p)) - spec.offset) for p in powers)
  return even * 0x0001_0001, odd * 0x0001_0001


def _bfloat16(value: int) -> int:
  """Bits of a whole number of at most 8 bits."""
  size = abs(value)
  exponent = size.bit_length() - 1
  mantissa = (size << 7 >> exponent) & 127
  return ((value < 0) << 15) | ((127 + exponent) << 7) | mantissa
