# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed matmul for a few rows of x, as one thread of the GPU runs it.

Memory is what such a product waits for: every packed byte is read once. A block
of threads takes 16 R rows, and asks for them ahead, a slice of their columns at
a time, into a ring in shared memory (`cp.async`); its warps take turns on 64
bytes of all rows of a slice, and add up what they have at the end.

**Tensor cores** multiply. In `mma.m16n8k16` the weights are the 16 rows, and
the 8 columns the rows of x. Which thread holds which code is free as long as
weights and x agree, so that nobody moves a code: thread t of four takes 16
bytes of 64, and one shift of a word with one `(word & mask) | magic` makes two
bfloat16 of it:

    exponent 7 - p over a code at bit p: 2^(7 - p) + code, exactly.

What is too much, `2^(7 - p)` and the offset of the code, is the same for all
rows: the product of x with minus that is where accumulators start. A byte is
two terms, `128 + (c & 127)` and `-128 - (c & 128)`, whose surplus cancels.

**Groups.** The four threads hold codes of two blocks of 32 bytes, which have
scales of their own: a row of x takes as many columns as there are groups at a
time, and in each of them, x of the threads of other groups is 0.

Scales are read once into shared memory, all rows of a block together.

The code speaks to the GPU through `ops` (see `_ptx`), so that a test can run
every thread of it on numpy.
"""

import dataclasses
import functools
from typing import Any

from gemma_ext.kernels import _formats

BLOCK = 32  # Bytes of a block, and codes of one of its fields.
TILE = 16  # Rows of a tile.
COLUMNS = 8
_WORDS = 4  # Words that a thread reads of a row at a time.
# bfloat16, twice, of 2^(7 - p).
_MAGIC = {p: 0x0001_0001 * ((134 - p) << 7) for p in (0, 2, 4)}
_HALVES = 0x00FF_00FF


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """What a kernel is compiled for.

  Attributes:
    rows: Rows of the weight (gate and up together, if `gated`).
    cols: Its input axis.
    xs: Rows of x, at most `most_rows`.
    fmt: Packed format.
    gated: Whether the rows are those of gate and then as many of up, and the
      result is `gelu(gate) * up`.
    tiles: Tiles of 16 rows that a thread block takes.
    warps: Warps of a thread block.
    unroll: Pairs of blocks of a slice that a warp takes.
    slices: Slices in shared memory, all but one of them on their way.
  """

  rows: int
  cols: int
  xs: int
  fmt: _formats.Format
  gated: bool = False
  tiles: int = 1
  warps: int = 8
  unroll: int = 1
  slices: int = 4

  @property
  def out_rows(self) -> int:
    """Rows of the result."""
    return self.rows // 2 if self.gated else self.rows

  @property
  def block_rows(self) -> int:
    """Rows of the result that a thread block makes."""
    return TILE * self.tiles // (2 if self.gated else 1)

  @property
  def grid(self) -> int:
    """Number of thread blocks."""
    return -(-self.out_rows // self.block_rows)

  @property
  def planes(self) -> int:
    """Ternary planes; 1 for integers."""
    return getattr(self.fmt, 'planes', 1)

  @property
  def scale_planes(self) -> int:
    """Planes with scales of their own."""
    return getattr(self.fmt, 'scale_planes', 1)

  @property
  def fields(self) -> int:
    """Codes of a byte."""
    if isinstance(self.fmt, _formats.TernaryFormat):
      return 4 if self.fmt.packing == '2bit' else 5
    return 8 // self.fmt.bits

  @property
  def row_bytes(self) -> int:
    """Bytes of a packed row."""
    return self.fmt.codes_shape((), self.cols)[-1]

  @property
  def blocks(self) -> int:
    """Blocks of a row."""
    return self.row_bytes // BLOCK

  @property
  def groups(self) -> int:
    """Scales of a row."""
    return self.fmt.scale_shape((), self.cols)[-1]

  @property
  def scale_bytes(self) -> int:
    """Bytes of a scale."""
    return self.fmt.scale_dtype.itemsize

  @property
  def subgroups(self) -> int:
    """Columns of the product that a row of x takes."""
    return _columns(self.fmt)

  @property
  def halves(self) -> int:
    """Ranges of rows that a thread block takes: gate and up, or one."""
    return 2 if self.gated else 1

  @property
  def shared(self) -> int:
    """Floats of shared memory for the sums."""
    return self.warps * self.tiles * TILE * COLUMNS

  @property
  def staged(self) -> int:
    """Bytes of shared memory for the scales."""
    return self.scale_planes * self.halves * self.part

  @property
  def width(self) -> int:
    """Bytes of a row in a slice."""
    return 2 * BLOCK * self.warps * self.unroll

  @property
  def stride(self) -> int:
    """Bytes from row to row of a slice.

    Eight threads read 64 bytes of two rows at once: from all banks.
    """
    return self.width + 64

  @property
  def ring(self) -> int:
    """Bytes of shared memory for codes."""
    return self.slices * self.slice

  @property
  def slice(self) -> int:
    """Bytes of a slice."""
    return self.planes * TILE * self.tiles * self.stride

  @property
  def steps(self) -> int:
    """Slices of the weight."""
    return -(-self.row_bytes // self.width)

  @property
  def part(self) -> int:
    """Bytes of the scales of one plane and one range of rows."""
    return self.block_rows * self.groups * self.scale_bytes


def _columns(fmt: _formats.Format) -> int:
  group = fmt.group
  return 1 if group is None else 2 if group >= BLOCK else 4


def most_rows(fmt: _formats.Format) -> int:
  """Rows of x that one product takes; 0 if the kernel cannot do the format."""
  group = fmt.group or BLOCK
  if isinstance(fmt, _formats.IntFormat) and fmt.bits not in (2, 4, 8):
    return 0
  if group % BLOCK and group not in (8, 16):
    return 0
  return COLUMNS // _columns(fmt)


def run(ops: Any, spec: Spec, x: Any, codes: Any, scale: Any, out: Any) -> None:
  """Emits the kernel.

  Args:
    ops: Instructions.
    spec: What to compile for.
    x: Memory of bfloat16 `[xs, cols]`.
    codes: Memory of the codes, as `spec.fmt` packs them.
    scale: Memory of the stored scales.
    out: Memory of bfloat16 `[xs, out_rows]`.
  """
  thread = ops.thread()
  place = _Place(warp=thread >> 5, group=(thread & 31) >> 2, lane=thread & 3)
  first = ops.block() * spec.block_rows
  # The last block starts early, to end with the last row.
  if spec.out_rows % spec.block_rows:
    first = first.min(spec.out_rows - spec.block_rows)
  ring = _Ring(ops, spec, thread, first, codes)
  reader = _Reader(ops, spec, place, x)
  for j in range(spec.slices - 1):
    ring.ask(ops.int(j))
  begun = reader.read(ops.int(0))
  _stage(ops, spec, thread, first, scale)

  def step(j, carry):
    sums, now = carry
    following = reader.read(j + 1)
    ring.wait()
    ring.ask(j + (spec.slices - 1))
    return reader.add(sums, now, j), following

  sums = [[ops.zero()] * 4 for _ in range(spec.tiles)]
  sums, _ = ops.loop(spec.steps, step, (sums, begun))
  _finish(ops, spec, thread, place, first, sums, out)


class _Ring:
  """Codes on their way to shared memory."""

  def __init__(self, ops: Any, spec: Spec, thread: Any, first: Any, codes: Any):
    self._ops, self._spec, self._codes = ops, spec, codes
    each = spec.width // 16  # Threads that copy a row.
    row, self._at = thread // each, (thread & (each - 1)) * 16
    self._from = (first + row) * spec.row_bytes + self._at
    self._to = row * spec.stride + self._at
    self._rows = 32 * spec.warps // each  # Rows that all threads copy at once.

  def ask(self, j: Any) -> None:
    """Asks for slice j, if there is one."""
    spec, ops = self._spec, self._ops
    skip = j * spec.width
    inside = skip + self._at < spec.row_bytes
    source = self._from + skip.min((spec.steps - 1) * spec.width)
    target = (j % spec.slices) * spec.slice + self._to
    count = TILE * spec.tiles // spec.halves
    for plane in range(spec.planes):
      for half in range(spec.halves):
        base = plane * spec.rows + half * spec.out_rows
        to = (plane * spec.halves + half) * count
        for row in range(0, count, self._rows):
          ops.fetch(
            self._codes,
            source,
            (base + row) * spec.row_bytes,
            target,
            (to + row) * spec.stride,
            inside,
          )
    ops.commit()

  def wait(self) -> None:
    """Waits for the oldest slice, in all threads."""
    self._ops.wait(self._spec.slices - 2)
    self._ops.barrier()


def _stage(ops: Any, spec: Spec, thread: Any, first: Any, scale: Any) -> None:
  """Copies the scales of the block's rows to shared memory."""
  total = spec.out_rows * spec.groups * spec.scale_bytes
  width = next(w for w in (16, 4, 1) if not (total % w or spec.part % w))
  threads = 32 * spec.warps
  for plane in range(spec.scale_planes):
    for half in range(spec.halves):
      base = (plane * spec.rows + half * spec.out_rows) * spec.groups
      source = first * (spec.groups * spec.scale_bytes)
      target = (plane * spec.halves + half) * spec.part
      for at in range(0, spec.part, width * threads):
        offset = (thread * width) + at
        inside = offset < spec.part
        offset = offset.min(spec.part - width)
        ops.stage(
          scale,
          source + offset,
          base * spec.scale_bytes,
          offset + target,
          width,
          inside,
        )


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a thread stands."""

  warp: Any
  group: Any  # Row of a tile, and column of the product.
  lane: Any  # Which quarter of 64 bytes.


class _Reader:
  """Reads x, and adds products to sums."""

  def __init__(self, ops: Any, spec: Spec, place: _Place, x: Any):
    self._ops, self._spec, self._place, self._x = ops, spec, place, x
    sub = spec.subgroups
    column, lane = place.group, place.lane
    self._x_row = (column // sub).min(spec.xs - 1) * spec.cols
    # Of another group, or of no row of x, a thread's x counts for nothing.
    self._sees = column < sub * spec.xs
    if sub > 1:
      self._sees &= (lane // (4 // sub)).equals(column & (sub - 1))

  def read(self, j: Any) -> list[Any]:
    """Asks for x of step j."""
    spec = self._spec
    out = []
    for u in range(spec.unroll):
      block, inside = self._block(j, u, self._place.lane >> 1)
      out.append([self._read_x(block, f, inside) for f in range(spec.fields)])
    return out

  def add(
    self, sums: list[list[Any]], read: list[Any], j: Any
  ) -> list[list[Any]]:
    """Returns the sums with slice j and what was read of x for it."""
    ops, spec = self._ops, self._spec
    sums = [list(s) for s in sums]
    tied = getattr(spec.fmt, 'tied', False)
    slot = (j % spec.slices) * spec.slice
    for u, xs in enumerate(read):
      b = [_pairs(ops, x) for x in xs]
      starts = [self._start(b, run) for run in self._runs]
      at = (self._place.warp * 2 * BLOCK) + self._place.lane * 16
      at = slot + at + self._place.group * spec.stride
      for plane in range(spec.planes):
        # Of tied planes the last one's scale is stored.
        factor = 3.0 ** (spec.planes - 1 - plane) if tied else 1.0
        for tile in range(spec.tiles):
          upper, lower = (
            [
              _unpack(ops, spec, word)
              for word in ops.fetched(
                at, self._row(plane, tile, more) + u * 2 * BLOCK * spec.warps
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
            s = self._scales(0 if tied else plane, tile, run, j, u)
            for k in range(4):
              d = ops.add(chains[0][k], chains[1][k])
              by = ops.scale(s[k], self._kind, factor)
              sums[tile][k] = ops.fma(d, by, sums[tile][k])
    return sums

  def _row(self, plane: int, tile: int, more: int) -> int:
    """Where in a slice a row of a tile is."""
    spec = self._spec
    half = plane * spec.halves + tile % spec.halves
    row = half * (spec.tiles // spec.halves) + tile // spec.halves
    return (row * TILE + more) * spec.stride

  @functools.cached_property
  def _kind(self) -> str:
    return getattr(self._spec.fmt, 'scale', 'bf16')

  @functools.cached_property
  def _runs(self) -> list[list[tuple[int, int]]]:
    """Fields and words of a thread whose products share a scale."""
    group, fields = self._spec.fmt.group, self._spec.fields
    words = range(_WORDS)
    every = [[(f, i) for i in words] for f in range(fields)]
    if group is None or group % (BLOCK * fields) == 0:
      return [sum(every, [])]
    size = group // BLOCK
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
      row = (tile // spec.halves) * TILE + more
      base = plane * spec.halves + tile % spec.halves
      for column in columns:
        at = self._place.group * spec.groups + column
        plus = base * spec.part + row * spec.groups * spec.scale_bytes
        out.append(
          self._ops.staged(at * spec.scale_bytes, plus, spec.scale_bytes)
        )
    return out

  def _scale_index(self, first: tuple[int, int], k: int, j: Any, u: int) -> Any:
    """Which scale of its row belongs to column `2 lane + k`."""
    spec, lane = self._spec, self._place.lane
    group, (field, word) = spec.fmt.group, first
    if group is None:
      return self._ops.int(0)
    sub = spec.subgroups
    # The thread of the four whose codes count in that column.
    if sub == 2:
      which, half = self._ops.int(k), 0
    else:
      which, half = lane & 1, k
    block, _ = self._block(j, u, which)
    field_at = block * spec.fields + field
    if group >= BLOCK:
      index = field_at // (group // BLOCK)
    elif group == 16:
      index = field_at * 2 + half
    else:
      index = field_at * 4 + (half * 2 + word // 2)
    if spec.cols % (BLOCK * spec.fields):
      index = index.min(spec.groups - 1)
    return index

  def _read_x(self, block: Any, field: int, inside: Any) -> Any:
    """16 neighbours: those that a thread's codes of a field multiply."""
    spec = self._spec
    col = (block * spec.fields + field) * BLOCK + (self._place.lane & 1) * 16
    inside &= self._sees
    out = []
    for eight in (0, 8):
      at, valid = col + eight, inside
      if spec.cols % (BLOCK * spec.fields):
        within = at < spec.cols
        valid = inside & within
        at = at.min(spec.cols - 8)
      out += self._ops.load(
        self._x, (self._x_row + at) * 2, words=4, valid=valid, keep=True
      )
    return out

  def _start(self, b: list[Any], run: list[tuple[int, int]]) -> list[Any]:
    """Minus what the weights of a run are too much, times x: two chains."""
    ops, spec = self._ops, self._spec
    chains = [[ops.zero()] * 4 for _ in range(2)]
    if spec.fields > 1:
      for n, (f, i) in enumerate(run):
        even, odd = (ops.int(v) for v in _surplus(spec, f))
        chains[n % 2] = ops.mma((even, even, odd, odd), b[f][i], chains[n % 2])
    return chains


def _pairs(ops: Any, x: Any) -> list[list[Any]]:
  """Neighbours of x as the pairs of four bytes: even, then odd."""
  return [
    [ops.permute(x[i], x[i + 1], 0x5410), ops.permute(x[i], x[i + 1], 0x7632)]
    for i in range(0, len(x), 2)
  ]


def _unpack(ops: Any, spec: Spec, word: Any) -> list[list[tuple[Any, Any]]]:
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
      out.append([tuple(ops.mask(v >> 8, 0x0003_0003, _MAGIC[0]) for v in halves)])
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

  return [
    [(field(f * bits), field(8 + f * bits))] for f in range(spec.fields)
  ]


def _shift(bits: int, at: int) -> tuple[int, int]:
  """How far to shift a half so that a code at bit `at` is at bit p: both."""
  if bits == 4:
    return at, 0
  return at // 6 * 6, at % 6


def _surplus(spec: Spec, field: int) -> tuple[int, int]:
  """What to start from: minus surplus, as two bfloat16; even and odd bytes."""
  if isinstance(spec.fmt, _formats.TernaryFormat):
    offset = 1
  else:
    offset = 1 << (spec.fmt.bits - 1)
  if spec.fields == 5:
    powers = [0, 0]
  else:
    bits = 8 // spec.fields
    powers = [_shift(bits, at)[1] for at in (field * bits, 8 + field * bits)]
  even, odd = (_bfloat16(-(2 ** (7 - p)) - offset) for p in powers)
  return even * 0x0001_0001, odd * 0x0001_0001


def _bfloat16(value: int) -> int:
  """Bits of a whole number of at most 8 bits."""
  size = abs(value)
  exponent = size.bit_length() - 1
  mantissa = (size << 7 >> exponent) & 127
  return ((value < 0) << 15) | ((127 + exponent) << 7) | mantissa


def _finish(
  ops: Any,
  spec: Spec,
  thread: Any,
  place: _Place,
  first: Any,
  sums: list[list[Any]],
  out: Any,
) -> None:
  """Adds up what the warps have, and writes it."""
  for tile in range(spec.tiles):
    for k in range(4):
      row = place.group + 8 * (k // 2)
      at = (place.warp * spec.tiles + tile) * TILE + row
      ops.share(at * COLUMNS + place.lane * 2 + k % 2, sums[tile][k])
  ops.barrier()
  threads = 32 * spec.warps
  results = spec.block_rows * spec.xs
  sub = spec.subgroups

  def total(tile_row, m):
    value = None
    for warp in range(spec.warps):
      for s in range(sub):
        at = (tile_row + warp * spec.tiles * TILE) * COLUMNS + m * sub + s
        part = ops.shared(at)
        value = part if value is None else ops.add(value, part)
    return value

  for after in range(0, results, threads):
    index = thread + after
    m, local = index // spec.block_rows, index % spec.block_rows
    safe = m.min(spec.xs - 1)
    if spec.gated:
      pair = (local // TILE) * (2 * TILE) + local % TILE
      value = ops.gelu_mul(total(pair, safe), total(pair + TILE, safe))
    else:
      value = total(local, safe)
    row = first + local
    inside = index < results
    ops.store(out, (safe * spec.out_rows + row) * 2, value, inside)
