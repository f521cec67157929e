# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Products of a row or two of x in whole numbers.

`mma.m16n8k32` takes codes as bytes, where they stand in their word: the mask of
a field leaves `4^f code` of 2-bit ones, `16^f code` of 4-bit ones, and sums are
put right once a block. Half of the instructions of bfloat16.

x becomes 16 bits, in blocks that share a scale with a power of two of codes:
two planes of bytes, `256 high + low`, each in a column of the product. The
threads round the next slice of x, together, while tensor cores are busy.
"""

from typing import Any

from gemma_ext.kernels import _formats
from gemma_ext.kernels.mosaic_gpu import _spec

MOST = 127 * 256  # Of x, so that the high byte stays within its sign.
_ABS = 0x7FFF_7FFF
MOST_ROWS = 2  # Of x.


def fits(fmt: _formats.Format) -> bool:
  """Whether codes are bits of a byte, and scales those of whole blocks."""
  fields = _spec.fields(fmt)
  if not _spec.most_rows(fmt) or fields == 5:
    return False
  return fmt.group is None or fmt.group % (_spec.BLOCK * fields) == 0


def unit(spec: _spec.Spec) -> int:
  """What `product` is in units of."""
  return 1 << (8 // spec.fields * (spec.fields - 1))


def product(
  ops: Any, spec: _spec.Spec, upper: Any, lower: Any, b: Any, start: Any
) -> list[Any]:
  """Codes of 16 rows times b, and `start`, in units of `unit`.

  Args:
    ops: Instructions.
    spec: What to compile for.
    upper: Four words of codes of the thread's first row.
    lower: Those of its second one, 8 rows further.
    b: By field, four words of x.
    start: What the accumulators of the first field start from: 4 of them.
  """
  bits = 8 // spec.fields
  total: list[Any] = []
  for f in range(spec.fields):
    mask = 0x0101_0101 * (((1 << bits) - 1) << (bits * f))
    d = start if f == 0 else [ops.constant(0)] * 4
    for i in (0, 2):
      words = (upper[i], lower[i], upper[i + 1], lower[i + 1])
      if spec.fields > 1:
        words = tuple(w & mask for w in words)
      d = ops.mma8(words, b[f][i : i + 2], d, signed=spec.fields == 1)
    if not total:
      total = d
    else:
      total = [t * (1 << bits) + v for t, v in zip(total, d)]
  return total


def quantise(ops: Any, words: Any) -> tuple[list[Any], Any]:
  """Rounds a thread's part of a block that 16 threads share.

  Args:
    ops: Instructions.
    words: Pairs of bfloat16.

  Returns:
    Whole numbers whose 16 lowest bits are the codes, two a word; and what a
    code of `MOST` stands for.
  """
  most = words[0] & _ABS
  for word in words[1:]:
    most = ops.max16(most, word & _ABS)
  for distance in (1, 2, 4, 8):
    most = ops.max16(most, ops.shuffle(most, distance))
  peak = ops.bfloat16(ops.max16(most, most >> 16) << 16)
  peak = ops.fmax(peak, 1e-30)
  inverse = ops.multiply(ops.reciprocal(peak), float(MOST))
  codes = []
  for word in words:
    for half in (word << 16, word & 0xFFFF_0000):
      codes.append(ops.round(ops.bfloat16(half), inverse))
  return codes, peak


class Integers:
  """Rounds x, and adds products to sums: two a tile and thread."""

  results = 2

  def __init__(
    self, ops: Any, spec: _spec.Spec, place: _spec.Place, thread: Any, x: Any
  ):
    self._ops, self._spec, self._place, self._x = ops, spec, place, x
    self._thread = thread
    # 16 threads round a block, so many codes each.
    self._each = 2 * spec.fields
    column, lane = place.group, place.lane
    self._plane = column & 1
    self._x_row = (column >> 2).min(spec.xs - 1)
    # In a column, one plane of one row of x, and of it the codes of one block.
    sees = (lane >> 1).equals((column >> 1) & 1)
    self._sees = sees & ((column >> 2) < spec.xs)

  def ask(self, j: Any) -> Any:
    """Asks for x of slice j, the first, and of as many as are on their way."""
    return [self._read(j + i) for i in range(self._spec.slices)]

  def begin(self, asked: Any, j: Any) -> Any:
    """Before slice j, the first; `asked` is what `ask` returned."""
    self._round(asked[0], j)
    return asked[1:]

  def step(self, sums: Any, asked: Any, j: Any) -> tuple[Any, Any]:
    """The sums with slice j; `asked` is x of those that follow."""
    self._round(asked[0], j + 1)
    following = self._read(j + self._spec.slices)
    return self._add(sums, j), [*asked[1:], following]

  def _read(self, j: Any) -> list[list[Any]]:
    """Asks for what a thread rounds of each row of x."""
    spec = self._spec
    col = j * (spec.width * spec.fields) + self._thread * self._each
    inside = col < spec.cols
    col = col.min(spec.cols - self._each)
    return [
      self._ops.load(
        self._x,
        col * 2,
        words=self._each // 2,
        plus=row * spec.cols * 2,
        valid=inside,
      )
      for row in range(spec.xs)
    ]

  def _round(self, read: list[list[Any]], j: Any) -> None:
    """Writes slice j of x to shared memory, rounded."""
    ops = self._ops
    for row, words in enumerate(read):
      codes, peak = quantise(ops, words)
      at = self._slot(j, row)
      for plane, more in ((0, 128), (1, 0)):  # High, low.
        byte = 1 - plane
        put = [code + more for code in codes]
        ops.put_bytes(
          at + (self._thread * self._each + plane * self._plane_bytes),
          ops.pack(put, byte),
          self._each,
        )
      ops.put_scale(
        self._scale_slot(j, row) + (self._thread >> 4),
        ops.multiply(peak, 1.0 / (MOST * unit(self._spec))),
        (self._thread & 15).equals(0),
      )

  def _add(self, sums: list[list[Any]], j: Any) -> list[list[Any]]:
    """The sums with slice j."""
    ops, spec, place = self._ops, self._spec, self._place
    sums = [list(s) for s in sums]
    block = place.warp * 2 + (place.lane >> 1)
    at = self._slot(j, 0) + self._x_row * (2 * self._plane_bytes)
    at = at + self._plane * self._plane_bytes
    at = at + block * (32 * spec.fields) + (place.lane & 1) * 16
    b = [ops.get_bytes(at, f * 32, self._sees) for f in range(spec.fields)]
    start = self._start(b)
    # Of x, the scale of the block and row that the thread's columns are of.
    row = (place.lane >> 1).min(spec.xs - 1) * self._blocks
    of_x = ops.get_scale(
      self._scale_slot(j, 0) + row + (place.warp * 2) + (place.lane & 1)
    )
    size = spec.scale_bytes
    of_w = (place.group * spec.groups + self._group(j)) * size
    codes = (j % spec.slices) * spec.slice + (place.warp * 64)
    codes = codes + place.lane * 16 + place.group * spec.stride
    for plane in range(spec.planes):
      owner, factor = spec.scale_of(plane)
      for tile in range(spec.tiles):
        upper, lower = (
          ops.fetched(codes, spec.row_at(plane, tile, more)) for more in (0, 8)
        )
        d = product(ops, spec, upper, lower, b, start)
        for k, more in enumerate((0, 8)):
          whole = ops.to_float(d[2 * k] * 256 + d[2 * k + 1])
          by = ops.scale(
            ops.staged(of_w, spec.scale_at(owner, tile, more), size),
            spec.scale_kind,
            factor,
          )
          sums[tile][k] = ops.fma(whole, ops.times(by, of_x), sums[tile][k])
    return sums

  def _start(self, b: list[Any]) -> list[Any]:
    """Minus the offset of the codes, times x."""
    ops, spec = self._ops, self._spec
    d = [ops.constant(0)] * 4
    if spec.fields == 1:
      return d
    minus = ops.constant(0x0101_0101 * (256 - spec.offset))
    for f in range(spec.fields):
      for i in (0, 2):
        d = ops.mma8((minus,) * 4, b[f][i : i + 2], d, signed=True)
    return d

  def _group(self, j: Any) -> Any:
    """Which scale of a row the thread's columns have."""
    spec, place = self._spec, self._place
    if spec.fmt.group is None:
      return self._ops.constant(0)
    block = (j * spec.warps + place.warp) * 2 + (place.lane & 1)
    block = block.min(spec.blocks - 1)
    return block // (spec.fmt.group // (32 * spec.fields))

  @property
  def _plane_bytes(self) -> int:
    return self._spec.width * self._spec.fields

  @property
  def _blocks(self) -> int:
    """Blocks of a slice."""
    return 2 * self._spec.warps

  def _slot(self, j: Any, row: int) -> Any:
    """Where in shared memory slice j of a row of x is."""
    of_row = 2 * self._plane_bytes
    return (j & 1) * (self._spec.xs * of_row) + row * of_row

  def _scale_slot(self, j: Any, row: int) -> Any:
    return (j & 1) * (self._spec.xs * self._blocks) + row * self._blocks
