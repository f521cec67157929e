# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed matmul for a few rows of x, as one thread of the GPU runs it.

Memory is what such a product waits for: every packed byte is read once, spread
over all warps of a block, which each take every W-th block of 32 bytes of 16 R
rows and meet in shared memory at the end.

**Tensor cores** multiply. In `mma.m16n8k16` the weights are the 16 rows, and
the 8 columns the rows of x. Which thread holds which code is free as long as
weights and x agree, so that nobody moves a code: thread t of four takes bytes
8t to 8t+7 of a block, and one shift of a word with one `(word & mask) | magic`
makes two bfloat16 of it:

    exponent 7 - p over a code at bit p: 2^(7 - p) + code, exactly.

What is too much, `2^(7 - p)` and the offset of the code, is the same for all
rows: the product of x with minus that is where accumulators start. A byte is
two terms, `128 + (c & 127)` and `-128 - (c & 128)`, whose surplus cancels.

**Groups** of 32 and more end an accumulation. In smaller ones, each column
of the product sees x of one group alone, and there are fewer rows of x.

The code speaks to the GPU through `ops` (see `_ptx`), so that a test can run
every thread of it on numpy.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from gemma_ext.kernels import _formats

BLOCK = 32  # Bytes of a block, and codes of one of its fields.
TILE = 16  # Rows of a tile.
COLUMNS = 8
# bfloat16, twice, of 2^(7 - p) and minus so much.
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
    unroll: Blocks of codes that a warp has under way.
  """

  rows: int
  cols: int
  xs: int
  fmt: _formats.Format
  gated: bool = False
  tiles: int = 1
  warps: int = 8
  unroll: int = 2

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
  def subgroups(self) -> int:
    """Groups that share a field."""
    return max(1, BLOCK // (self.fmt.group or BLOCK))

  @property
  def shared(self) -> int:
    """Floats of shared memory."""
    return self.warps * self.tiles * TILE * COLUMNS


def most_rows(fmt: _formats.Format) -> int:
  """Rows of x that one product takes; 0 if the kernel cannot do the format."""
  group = fmt.group or BLOCK
  if isinstance(fmt, _formats.IntFormat) and fmt.bits not in (2, 4, 8):
    return 0
  if group % BLOCK and group not in (8, 16):
    return 0
  return COLUMNS // max(1, BLOCK // group)


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
  place = _Place(
    warp=thread >> 5, group=(thread & 31) >> 2, lane=thread & 3, ops=ops
  )
  first = ops.block() * spec.block_rows
  tiles = _tiles(spec, first, place.group)
  reader = _Reader(ops, spec, place, x, codes, scale, tiles)
  steps = -(-spec.blocks // (spec.warps * spec.unroll))

  def step(j, carry):
    sums, now = carry
    following = reader.read(j + 1)
    return reader.add(sums, now), following

  sums = [[ops.zero()] * 4 for _ in range(spec.tiles)]
  sums, last = ops.loop(steps - 1, step, (sums, reader.read(ops.int(0))))
  sums = reader.add(sums, last)
  _finish(ops, spec, thread, place, first, sums, out)


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a thread stands."""

  warp: Any
  group: Any  # Row of a tile, and column of the product.
  lane: Any  # Which eighth of a block's bytes, of four.
  ops: Any


def _tiles(spec: Spec, first: Any, row: Any) -> list[list[Any]]:
  """The two rows of each tile that a thread holds."""
  out = []
  for tile in range(spec.tiles):
    if spec.gated:
      base, half = (tile // 2) * TILE, (tile % 2) * spec.out_rows
    else:
      base, half = tile * TILE, 0
    rows = [first + row + (base + more) for more in (0, 8)]
    # Rows beyond the last one are read as another and not written.
    out.append([r.min(spec.out_rows - 1) + half for r in rows])
  return out


class _Reader:
  """Reads blocks, and adds their products to sums."""

  def __init__(
    self,
    ops: Any,
    spec: Spec,
    place: _Place,
    x: Any,
    codes: Any,
    scale: Any,
    tiles: Sequence[Sequence[Any]],
  ):
    self._ops, self._spec, self._place = ops, spec, place
    self._x, self._codes, self._scale = x, codes, scale
    self._tiles = tiles
    sub = spec.subgroups
    column = place.group
    self._x_row = (column // sub).min(spec.xs - 1) * spec.cols
    # Of a small group, only some of the four threads hold codes.
    self._sees = (
      ((place.lane * sub) // 4).equals(column & (sub - 1)) if sub > 1 else None
    )

  def read(self, j: Any) -> list[Any]:
    """Asks for what step j needs."""
    spec = self._spec
    out = []
    for u in range(spec.unroll):
      block = (j * spec.unroll + u) * spec.warps + self._place.warp
      inside = block < spec.blocks
      block = block.min(spec.blocks - 1)
      codes = [
        [
          [self._read_codes(plane, row, block) for row in rows]
          for rows in self._tiles
        ]
        for plane in range(spec.planes)
      ]
      scales = [
        [
          [
            [self._read_scales(plane, row, block, run[0]) for row in rows]
            for rows in self._tiles
          ]
          for plane in range(self._scale_planes)
        ]
        for run in self._runs
      ]
      xs = [self._read_x(block, f, inside) for f in range(spec.fields)]
      out.append((codes, scales, xs))
    return out

  def add(self, sums: list[list[Any]], read: list[Any]) -> list[list[Any]]:
    """Returns the sums with what was read."""
    ops, spec = self._ops, self._spec
    sums = [list(s) for s in sums]
    for codes, scales, xs in read:
      b = [_pairs(ops, x) for x in xs]
      weights = [
        [[[_unpack(spec, w) for w in words] for words in rows] for rows in tiles]
        for tiles in codes
      ]
      for run, scale in zip(self._runs, scales):
        start = self._start(b, run)
        for plane in range(spec.planes):
          for tile in range(spec.tiles):
            upper, lower = weights[plane][tile]
            d = start
            for f in run:
              for i in range(2):
                for (a0, a2), (a1, a3) in zip(upper[i][f], lower[i][f]):
                  d = ops.mma((a0, a1, a2, a3), b[f][i], d)
            at = 0 if self._tied else plane
            # Of tied planes the last one's scale is stored.
            factor = 3.0 ** (spec.planes - 1 - plane) if self._tied else 1.0
            s = [
              [ops.scale(v, self._kind, factor) for v in row]
              for row in scale[at][tile]
            ]
            for k in range(4):
              of_row = s[k // 2]
              by = of_row[k % len(of_row)]
              sums[tile][k] = ops.fma(d[k], by, sums[tile][k])
    return sums

  @functools.cached_property
  def _tied(self) -> bool:
    return getattr(self._spec.fmt, 'tied', False)

  @functools.cached_property
  def _scale_planes(self) -> int:
    return getattr(self._spec.fmt, 'scale_planes', 1)

  @functools.cached_property
  def _kind(self) -> str:
    return getattr(self._spec.fmt, 'scale', 'bf16')

  @functools.cached_property
  def _runs(self) -> list[list[int]]:
    """Fields of a block whose products share a scale."""
    group, fields = self._spec.fmt.group, self._spec.fields
    if group is None or group % (BLOCK * fields) == 0:
      return [list(range(fields))]
    size = group // BLOCK
    if size > 1 and fields % size == 0:
      return [list(range(f, f + size)) for f in range(0, fields, size)]
    return [[f] for f in range(fields)]

  def _read_codes(self, plane: int, row: Any, block: Any) -> Any:
    spec = self._spec
    at = (row + plane * spec.rows) * spec.row_bytes
    return self._ops.load(
      self._codes, at + block * BLOCK + self._place.lane * 8, words=2
    )

  def _read_scales(self, plane: int, row: Any, block: Any, field: int) -> Any:
    """The scales of one row for the columns of the product that it holds."""
    spec, ops = self._spec, self._ops
    groups = spec.fmt.scale_shape((), spec.cols)[-1]
    size = 1 if self._kind == 'ue5m3' else 2
    at = (row + plane * spec.rows) * groups
    if spec.fmt.group is None:
      return [ops.load_narrow(self._scale, at * size, size)]
    sub = spec.subgroups
    index = block * spec.fields + field
    if sub == 1:
      q = (index // (spec.fmt.group // BLOCK)).min(groups - 1)
      return [ops.load_narrow(self._scale, (at + q) * size, size)]
    first = index * sub + ((self._place.lane * 2) & (sub - 1))
    return [
      ops.load_narrow(self._scale, (at + (first + k).min(groups - 1)) * size, size)
      for k in (0, 1)
    ]

  def _read_x(self, block: Any, field: int, inside: Any) -> Any:
    spec = self._spec
    col = (block * spec.fields + field) * BLOCK + self._place.lane * 8
    if spec.blocks % (spec.warps * spec.unroll) == 0:
      inside = None
    if spec.cols % (BLOCK * spec.fields):
      within = col < spec.cols
      inside = within if inside is None else inside & within
      col = col.min(spec.cols - 8)
    if self._sees is not None:
      inside = self._sees if inside is None else inside & self._sees
    return self._ops.load(
      self._x, (self._x_row + col) * 2, words=4, valid=inside, keep=True
    )

  def _start(self, b: list[Any], run: list[int]) -> list[Any]:
    """Minus what the weights of a run are too much, times x."""
    ops, spec = self._ops, self._spec
    d = [ops.zero()] * 4
    if spec.fields == 1:
      return d
    for f in run:
      even, odd = (ops.int(v) for v in _surplus(spec, f))
      for i in range(2):
        d = ops.mma((even, even, odd, odd), b[f][i], d)
    return d


def _pairs(ops: Any, x: Any) -> list[list[Any]]:
  """Eight neighbours of x as the pairs of words 0 and 1: even, then odd."""
  return [
    [ops.permute(x[i], x[i + 1], 0x5410), ops.permute(x[i], x[i + 1], 0x7632)]
    for i in (0, 2)
  ]


def _unpack(spec: Spec, word: Any) -> list[list[tuple[Any, Any]]]:
  """Splits four bytes into bfloat16s.

  Returns:
    By field, and then by term: the pair of bytes 0 and 2, that of 1 and 3.
  """
  if spec.fields == 1:
    return [
      [
        tuple((w & 0x007F_007F) | 0x4300_4300 for w in (word, word >> 8)),
        tuple((w & 0x0080_0080) | 0xC300_C300 for w in (word, word >> 8)),
      ]
    ]
  if spec.fields == 5:
    halves = [word & _HALVES, (word >> 8) & _HALVES]
    out = []
    for _ in range(5):
      halves = [v * 3 for v in halves]
      out.append([tuple(((v >> 8) & 0x0003_0003) | _MAGIC[0] for v in halves)])
      halves = [v & _HALVES for v in halves]
    return out
  bits = 8 // spec.fields
  mask = 0x0001_0001 * ((1 << bits) - 1)
  shifted = {0: word}

  def field(at):
    shift, p = _shift(bits, at)
    if shift not in shifted:
      shifted[shift] = word >> shift
    return (shifted[shift] & (mask << p)) | _MAGIC[p]

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

  for start in range(0, results, threads):
    index = thread + start
    m, local = index // spec.block_rows, index % spec.block_rows
    safe = m.min(spec.xs - 1)
    if spec.gated:
      pair = (local // TILE) * (2 * TILE) + local % TILE
      value = ops.gelu_mul(total(pair, safe), total(pair + TILE, safe))
    else:
      value = total(local, safe)
    row = first + local
    inside = (index < results) & (row < spec.out_rows)
    ops.store(out, (safe * spec.out_rows + row) * 2, value, inside)
