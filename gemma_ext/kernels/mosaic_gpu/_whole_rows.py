# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""A row or two of x times rows that a multiprocessor has to itself.

Of a weight with few, long rows a multiprocessor's share is about what its
shared memory holds. So there is one block of threads for each, with as many
rows as others have; it asks for all of them at once, or for what fits; and
while they are on their way, it rounds x, all of it, once.

Warps take 64 bytes of all rows of a slice, as in `_few_rows`, and add up what
they have at the end. Products are those of `_integers`; what codes are too much
is put right with the sum of x in a block, in whole numbers.
"""

import dataclasses
import functools
import math
from typing import Any

from gemma_ext.kernels import _formats
from gemma_ext.kernels.mosaic_gpu import _integers
from gemma_ext.kernels.mosaic_gpu import _spec

_BYTES = 227 << 10  # Of shared memory, that a block can have.
_LOOK = 64  # Words of x that a thread asks for before the codes.
_MAGIC = 0x4B40_0000  # What `ops.round` has more than the code.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(_spec.Spec):
  """What a kernel is compiled for.

  Attributes:
    processors: Multiprocessors.
    together: Blocks of threads that a multiprocessor has at once.
    most_tiles: Tiles of 16 rows that a block of threads takes at a time, of
      each range of rows.
    most_slices: Slices in shared memory, if they fit.
  """

  warps: int = 8
  integers: bool = True
  processors: int = 132
  together: int = 1
  most_tiles: int = 4
  most_slices: int = 16

  @property
  def aligned(self) -> int:
    """Rows whose scales start at a multiple of 16 bytes."""
    return 16 // math.gcd(16, self.groups * self.scale_bytes)

  @property
  def share(self) -> int:
    """Rows of the result of a block of threads."""
    least = -(-self.out_rows // (self.processors * self.together))
    return -(-least // self.aligned) * self.aligned

  @property
  def grid(self) -> int:
    """Blocks of threads."""
    return -(-self.out_rows // self.share)

  @property
  def turns(self) -> int:
    """How often a block of threads takes rows."""
    return -(-self.share // (_spec.TILE * self.most_tiles))

  @property
  def block_rows(self) -> int:
    """Rows of the result that it takes at a time."""
    return -(-self.share // self.turns)

  @property
  def ranges(self) -> int:
    """Ranges of rows of codes: planes of gate and up."""
    return self.planes * self.halves

  @property
  def each_tiles(self) -> int:
    """Tiles of a range of rows."""
    return -(-self.block_rows // _spec.TILE)

  @property
  def slice(self) -> int:
    """Bytes of a slice."""
    return self.ranges * self.block_rows * self.stride

  @property
  def steps(self) -> int:
    """Slices of a row."""
    return -(-self.row_bytes // self.width)

  @property
  def slots(self) -> int:
    """Slices in shared memory."""
    left = _BYTES // self.together - 6 * 1024  # What alignment takes.
    left -= 4 * self.shared + self.staged + self.rounded
    left -= 4 * self.rounded_scales + _spec.TILE * self.stride
    most = min(self.most_slices, self.turns * self.steps + 1)
    return min(most, left // self.slice)

  @property
  def ring(self) -> int:
    """Bytes of shared memory for codes: rows beyond the last are read."""
    return self.slots * self.slice + _spec.TILE * self.stride

  @property
  def part(self) -> int:
    """Bytes of the scales of one plane and one range of rows."""
    return self.share * self.groups * self.scale_bytes

  @property
  def staged(self) -> int:
    """Bytes of shared memory for scales, with those of rows beyond the last."""
    beyond = _spec.TILE * self.groups * self.scale_bytes
    return self.scale_planes * self.halves * self.part + beyond

  @property
  def shared(self) -> int:
    """Floats of shared memory for the sums."""
    tiles = self.halves * self.each_tiles
    return self.warps * tiles * _spec.TILE * self.xs

  @property
  def padded(self) -> int:
    """Codes of a row of x in whole slices."""
    return self.steps * self.width * self.fields

  @property
  def plane_bytes(self) -> int:
    """Bytes from the high bytes of a row of x to the low ones."""
    return self.padded + 32

  @property
  def rounded(self) -> int:
    """Bytes of shared memory for x."""
    return self.xs * 2 * self.plane_bytes

  @property
  def x_blocks(self) -> int:
    """Blocks of a row of x."""
    return self.padded // (_spec.BLOCK * self.fields)

  @property
  def rounded_scales(self) -> int:
    """Words of shared memory for their scales and sums."""
    return self.xs * self.x_blocks * 2


def choose(
  rows: int,
  cols: int,
  xs: int,
  fmt: _formats.Format,
  gated: bool,
  processors: int,
) -> Spec | None:
  """Returns what to compile for where this is faster than `_few_rows`.

  As measured on an H200, codes of 2 bits and one row of x: for weights of few,
  long rows; and for gate and up whose rows are not short.
  """
  if xs > 1 or _spec.fields(fmt) != 4 or getattr(fmt, 'planes', 1) > 1:
    return None
  spec = Spec(
    rows=rows, cols=cols, xs=xs, fmt=fmt, gated=gated, processors=processors
  )
  if gated:
    spec = dataclasses.replace(spec, most_tiles=2, together=2)
    worth = spec.row_bytes >= 960
  else:
    # Warps whose slices leave the least of the last one empty.
    waste = {w: -spec.row_bytes % (64 * w) for w in (8, 12)}
    warps = 12 if waste[12] < waste[8] else 8
    spec = dataclasses.replace(spec, warps=warps)
    if warps == 12 and spec.turns == 1 and spec.share > 32:
      spec = dataclasses.replace(spec, most_slices=3)
    elif warps == 8 and spec.cols <= 10240:
      spec = dataclasses.replace(spec, together=2)
    worth = spec.turns == 1 and spec.row_bytes >= 2048
  return spec if worth and not why_not(spec) else None


def why_not(spec: Spec) -> str:
  """Returns why it cannot be done so; '' if it can."""
  if not _integers.fits(spec.fmt) or spec.xs > _integers.MOST_ROWS:
    return 'not in whole numbers'
  if spec.out_rows < spec.share:
    return 'too few rows'
  if spec.out_rows % spec.aligned or spec.cols % (2 * spec.fields):
    return 'rows of scales are not aligned'
  if spec.cols % (_spec.BLOCK * spec.fields):
    return 'rows are not whole blocks'
  if spec.slots < 2:
    return 'too little shared memory'
  return ''


def run(ops: Any, spec: Spec, x: Any, codes: Any, scale: Any, out: Any) -> None:
  """Emits the kernel; arguments as for `_few_rows.run`."""
  thread = ops.thread()
  place = _spec.Place(
    warp=thread >> 5, group=(thread & 31) >> 2, lane=thread & 3
  )
  first = (ops.block() * spec.share).min(spec.out_rows - spec.share)
  rounded = _X(ops, spec, place, thread, x)
  asked = rounded.ask(0)
  ring = _Ring(ops, spec, thread, first, codes)
  _stage(ops, spec, thread, first, scale)
  for j in range(spec.slots - 1):
    ring.ask(ops.constant(j))
  rounded.write(asked)

  def turn(i, carry):
    def step(k, sums):
      j = i * spec.steps + k
      ring.wait()
      ring.ask(j + (spec.slots - 1))
      return _add(ops, spec, place, rounded, sums, i, k, ring.slot(j))

    tiles = spec.halves * spec.each_tiles
    sums = [[ops.zero()] * 2 for _ in range(tiles)]
    sums = ops.loop(spec.steps, step, sums)
    _finish(ops, spec, place, first + _skip(spec, i), sums, out)
    return carry

  ops.loop(spec.turns, turn, ops.constant(0))


def _skip(spec: Spec, turn: Any) -> Any:
  """Rows before those of a turn; the last one's end with the last row."""
  return (turn * spec.block_rows).min(spec.share - spec.block_rows)


class _Ring:
  """Codes on their way to shared memory, 16 bytes a thread."""

  def __init__(self, ops: Any, spec: Spec, thread: Any, first: Any, codes: Any):
    self._ops, self._spec, self._codes = ops, spec, codes
    each = spec.width // 16  # Threads that copy a part of a row.
    self._at_once = 32 * spec.warps // each  # Rows that all of them copy.
    self._row, self._at = thread // each, (thread & (each - 1)) * 16
    self._from = (first + self._row) * spec.row_bytes + self._at
    self._to = self._row * spec.stride + self._at

  def ask(self, j: Any) -> None:
    """Asks for slice j, if there is one."""
    ops, spec = self._ops, self._spec
    skip = (j % spec.steps) * spec.width
    inside = skip + self._at < spec.row_bytes
    inside &= j < spec.turns * spec.steps
    source = self._from + skip
    if spec.turns > 1:
      source = source + _skip(spec, j // spec.steps) * spec.row_bytes
    target = self._to + self.slot(j)
    for which in range(spec.ranges):
      for row in range(0, spec.block_rows, self._at_once):
        live = inside
        if row + self._at_once > spec.block_rows:
          live &= self._row < spec.block_rows - row
        ops.fetch(
          self._codes,
          source,
          (which * spec.out_rows + row) * spec.row_bytes,
          target,
          (which * spec.block_rows + row) * spec.stride,
          live,
        )
    ops.commit()

  def wait(self) -> None:
    """Waits for the oldest slice, in all threads."""
    self._ops.wait(self._spec.slots - 2)
    self._ops.barrier()

  def slot(self, j: Any) -> Any:
    """Where slice j is."""
    return (j % self._spec.slots) * self._spec.slice


def _stage(ops: Any, spec: Spec, thread: Any, first: Any, scale: Any) -> None:
  """Asks for the scales of all rows; they come with the first slice."""
  source = first * (spec.groups * spec.scale_bytes)
  threads = 32 * spec.warps
  for which in range(spec.scale_planes * spec.halves):
    base = which * spec.out_rows * spec.groups * spec.scale_bytes
    for at in range(0, spec.part, 16 * threads):
      offset = thread * 16 + at
      ops.stage(
        scale,
        source + offset,
        base,
        offset + which * spec.part,
        16,
        offset < spec.part,
      )


class _X:
  """x in two planes of bytes, in blocks with a scale and a sum."""

  def __init__(self, ops: Any, spec: Spec, place: Any, thread: Any, x: Any):
    self._ops, self._spec, self._x = ops, spec, x
    self._thread = thread
    self._each = 2 * spec.fields  # 16 threads round a block, so many codes.
    self._at_once = 32 * spec.warps * self._each
    self._look = max(1, _LOOK // (self._each // 2))
    column, lane = place.group, place.lane
    self._lane = lane
    # In a column, one plane of one row of x, and of it the codes of one block.
    sees = (lane >> 1).equals((column >> 1) & 1)
    self._sees = sees & ((column >> 2) < spec.xs)
    row = (column >> 2).min(spec.xs - 1)
    start = (row * 2 + (column & 1)) * spec.plane_bytes
    block = place.warp * 2 + (lane >> 1)
    start = start + block * (_spec.BLOCK * spec.fields)
    self._start = start + (lane & 1) * 16
    row = (lane >> 1).min(spec.xs - 1)
    self._of = row * spec.x_blocks + place.warp * 2 + (lane & 1)

  @property
  def _parts(self) -> list[tuple[int, int]]:
    """Rows of x, and where in them all threads read at once."""
    spec = self._spec
    ats = range(0, spec.padded, self._at_once)
    return [(row, at) for row in range(spec.xs) for at in ats]

  def ask(self, begin: int) -> list[Any]:
    """Asks for some parts, the first of them `begin`."""
    parts = self._parts[begin : begin + self._look]
    return [self._read(*part) for part in parts]

  def write(self, asked: list[Any]) -> None:
    """Writes all parts to shared memory, rounded; `asked` are the first."""
    parts = self._parts
    for begin in range(0, len(parts), self._look):
      following = self.ask(begin + self._look)
      for part, words in zip(parts[begin:], asked):
        self._round(*part, words)
      asked = following

  def scale(self, k: Any) -> tuple[Any, Any]:
    """Scale of x of slice k, for the thread's results; what to add to them."""
    at = self._of + k * (2 * self._spec.warps)
    return self._ops.get_scale(at * 2), self._ops.get_whole(at * 2 + 1)

  def codes(self, k: Any) -> list[Any]:
    """Of slice k, by field, what the thread multiplies."""
    at = self._start + k * (self._spec.width * self._spec.fields)
    return [
      self._ops.get_bytes(at, f * _spec.BLOCK, self._sees)
      for f in range(self._spec.fields)
    ]

  def _read(self, row: int, at: int) -> list[Any]:
    spec = self._spec
    col = self._thread * self._each + at
    inside = col < spec.cols
    return self._ops.load(
      self._x,
      col.min(spec.cols - self._each) * 2,
      words=self._each // 2,
      plus=row * spec.cols * 2,
      valid=inside,
    )

  def _round(self, row: int, at: int, words: list[Any]) -> None:
    ops, spec = self._ops, self._spec
    codes, peak = _integers.quantise(ops, words)
    total = codes[0]
    for code in codes[1:]:
      total = total + code
    total = total + (-self._each * _MAGIC % 2**32)
    for distance in (1, 2, 4, 8):
      total = total + ops.shuffle(total, distance)
    to = self._thread * self._each + at
    exists = to < spec.padded
    base = row * 2 * spec.plane_bytes
    for plane, more in ((0, 128), (1, 0)):  # High, low.
      ops.put_bytes(
        to + (base + plane * spec.plane_bytes),
        ops.pack([code + more for code in codes], 1 - plane),
        self._each,
        exists,
      )
    unit = _integers.unit(spec)
    block = ((self._thread + at // self._each) >> 4) + row * spec.x_blocks
    leads = (self._thread & 15).equals(0) & exists
    scale = ops.multiply(peak, 1.0 / (_integers.MOST * unit))
    ops.put_scale(block * 2, scale, leads)
    offset = 0 if spec.fields == 1 else spec.offset
    ops.put_whole(block * 2 + 1, total * (-offset * unit % 2**32), leads)


def _add(
  ops: Any,
  spec: Spec,
  place: Any,
  x: _X,
  sums: list[list[Any]],
  turn: Any,
  k: Any,
  slot: Any,
) -> list[list[Any]]:
  """The sums with slice k of a row, that lies in `slot`."""
  sums = [list(s) for s in sums]
  b = x.codes(k)
  of_x, surplus = x.scale(k)
  block = (k * spec.warps + place.warp) * 2 + (place.lane & 1)
  group = ops.constant(0)
  if spec.fmt.group is not None:
    group = block.min(spec.blocks - 1)
    group = group // (spec.fmt.group // (_spec.BLOCK * spec.fields))
  size = spec.scale_bytes
  of_w = (_skip(spec, turn) + place.group) * spec.groups + group
  of_w = of_w * size
  codes = slot + place.warp * 64 + place.lane * 16
  codes = codes + place.group * spec.stride
  none = [ops.constant(0)] * 4
  for plane in range(spec.planes):
    owner, factor = spec.scale_of(plane)
    for tile in range(spec.halves * spec.each_tiles):
      half, t = tile % spec.halves, tile // spec.halves
      which = plane * spec.halves + half
      rows = [t * _spec.TILE + more for more in (0, 8)]
      upper, lower = (
        ops.fetched(codes, (which * spec.block_rows + row) * spec.stride)
        for row in rows
      )
      d = _integers.product(ops, spec, upper, lower, b, none)
      for n, row in enumerate(rows):
        whole = ops.to_float(d[2 * n] * 256 + d[2 * n + 1] + surplus)
        plus = (owner * spec.halves + half) * spec.part
        plus += row * spec.groups * size
        by = ops.scale(ops.staged(of_w, plus, size), spec.scale_kind, factor)
        sums[tile][n] = ops.fma(whole, ops.times(by, of_x), sums[tile][n])
  return sums


def _finish(
  ops: Any, spec: Spec, place: Any, first: Any, sums: Any, out: Any
) -> None:
  """Adds up what the warps have, and writes it."""
  tiles = spec.halves * spec.each_tiles
  for tile in range(tiles):
    for n, value in enumerate(sums[tile]):
      value = ops.add(value, ops.shuffle_float(value, 1))
      row = (place.warp * tiles + tile) * _spec.TILE + place.group + 8 * n
      inside = (place.lane & 1).equals(0) & ((place.lane >> 1) < spec.xs)
      ops.share(row * spec.xs + (place.lane >> 1), value, inside)
  ops.barrier()
  threads, results = 32 * spec.warps, spec.block_rows * spec.xs

  def total(tile, row, m):
    at = (tile * _spec.TILE + row) * spec.xs + m
    step = tiles * _spec.TILE * spec.xs
    parts = [ops.shared(at + warp * step) for warp in range(spec.warps)]
    return functools.reduce(ops.add, parts)

  for after in range(0, results, threads):
    index = ops.thread() + after
    m, local = index // spec.block_rows, index % spec.block_rows
    safe = m.min(spec.xs - 1)
    tile, row = (local >> 4) * spec.halves, local & 15
    value = total(tile, row, safe)
    if spec.gated:
      value = ops.gelu_mul(value, total(tile + 1, row, safe))
    at = safe * spec.out_rows + first + local
    ops.store(out, at * 2, value, index < results)
  if spec.turns > 1:
    ops.barrier()
