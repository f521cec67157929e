# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed matmul for many rows of x: codes are unpacked in registers.

A block of threads makes a tile of the result with two warpgroups, and a third
one brings what they need to shared memory: x as it is, weights as packed. For
`wgmma` the weights are the 64 rows of a product, and come from registers; x is
its columns, from shared memory. So that a weight is unpacked by the one thread
that multiplies with it, while tensor cores are busy with those before; only the
result has to be transposed on its way out.

In bfloat16, a weight is what `dense` makes of it: its code, exactly, times its
scale, rounded once.
"""

import dataclasses
from typing import Any

from gemma_ext.kernels import _formats
from gemma_ext.kernels.mosaic_gpu import _spec

PART = 64  # Columns of the weight at a time: 128 bytes of x.
ROWS = 2 * PART  # Of the weight, of a tile: two warpgroups.
STEP = 2 * PART  # Columns that shared memory has of each step.
_BYTES = 208 << 10  # Of shared memory, less what the result takes.
_SPREAD = 0x4140  # Byte 0 of a word to its lower half, byte 1 to its upper.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """What a kernel is compiled for.

  Attributes:
    rows: Rows of the weight.
    cols: Its input axis.
    xs: Rows of x.
    fmt: Packed format.
    tile_x: Rows of x of a tile of the result: 64, 128 or 256.
    split: Parts of the input axis that are multiplied on their own.
    cluster: Blocks of threads, 1 or 2, that share the same rows of x.
    slots: Steps in shared memory.
    width: Tiles side by side along the rows of the weight, before the next ones
      along those of x.
    processors: Multiprocessors.
  """

  rows: int
  cols: int
  xs: int
  fmt: _formats.Format
  tile_x: int = 256
  split: int = 1
  cluster: int = 2
  slots: int = 6
  width: int = 8
  processors: int = 132

  @property
  def padded(self) -> int:
    """Rows of x in whole tiles."""
    return -(-self.xs // self.tile_x) * self.tile_x

  @property
  def tiles(self) -> tuple[int, int]:
    """Tiles of a cluster along the rows of the weight, and along those of x."""
    return (
      self.rows // (ROWS * self.cluster),
      self.padded // self.tile_x,
    )

  @property
  def steps(self) -> int:
    """Steps of a part of the input axis."""
    return -(-self.cols // (STEP * self.split))

  @property
  def fields(self) -> int:
    """Codes of a byte."""
    return _spec.fields(self.fmt)

  @property
  def row_bytes(self) -> int:
    """Bytes of a packed row."""
    return self.fmt.codes_shape((), self.cols)[-1]

  @property
  def step_bytes(self) -> int:
    """Bytes of a row that a step reads: whole blocks."""
    return STEP // self.fields

  @property
  def depth(self) -> int:
    """Steps in shared memory that fit."""
    each = 2 * self.tile_x * STEP
    each += ROWS * self.step_bytes
    return min(self.slots, _BYTES // each)

  @property
  def groups(self) -> int:
    """Scales of a row."""
    return self.fmt.scale_shape((), self.cols)[-1]


def why_not(spec: Spec) -> str:
  """Returns why it cannot be done so; '' if it can."""
  fmt = spec.fmt
  if getattr(fmt, 'planes', 1) > 1:
    return 'several planes'
  if spec.fields not in (1, 2, 4) or getattr(fmt, 'bits', 2) not in (2, 4, 8):
    return f'{fmt} is not unpacked in registers'
  if fmt.group is not None and fmt.group % 32:
    return f'groups of {fmt.group}, expected a multiple of 32'
  if spec.rows % (ROWS * spec.cluster):
    return f'{spec.rows} rows, no multiple of {ROWS * spec.cluster}'
  if spec.cols % 16:
    return f'an input axis of {spec.cols} weights, no multiple of 16'
  return ''


def unpack(
  ops: Any, spec: Spec, codes: Any, scale: Any, row: Any, step: Any, part: int
) -> list[Any]:
  """Weights of a warpgroup for 64 columns, as `wgmma` takes them.

  Args:
    ops: Instructions.
    spec: What to compile for.
    codes: Shared memory of a tile's codes, `step_bytes` of each row.
    scale: Global memory of the stored scales.
    row: First row of the tile.
    step: Number of the step, of the whole input axis.
    part: Which 64 columns of it.

  Returns:
    Pairs of bfloat16, those of row `16 warp + group` and 8 further of columns
    `8 c + 2 lane`, for c from 0 to 7.
  """
  thread = ops.thread()
  warp, lane = (thread >> 5) & 3, thread & 3
  local = (thread >> 7) * PART + warp * 16 + ((thread & 31) >> 2)
  indices = _scale_index(ops, spec, step * 2 + part)
  halves = []
  for more in (0, 8):
    by = [
      ops.global_scale(scale, (row + local) * spec.groups + at, more, spec)
      for at in indices
    ]
    at = local * spec.step_bytes + lane * 2
    plus = more * spec.step_bytes
    if spec.fields < 4:
      plus += part * PART // spec.fields
    words = []
    for j in range(8 if spec.fields == 1 else 4):
      half = ops.half(codes, at, plus + 8 * j)
      words.append(ops.permute(half, ops.constant(0), _SPREAD))
    if part and spec.fields == 4:
      words = [w >> 4 for w in words]
    halves.append(_weights(ops, spec, words, by))
  return [w for pair in zip(*halves) for w in pair]


def _scale_index(ops: Any, spec: Spec, step: Any) -> list[Any]:
  """Which scales of its row 32 columns have, and then the next 32.

  Args:
    ops: Instructions.
    spec: What to compile for.
    step: Number of the 64 columns.
  """
  group = spec.fmt.group
  if group is None:
    return [ops.constant(0)]
  at = [step * 2] if group % 64 == 0 else [step * 2, step * 2 + 1]
  # Of columns that the last step has too many, x is 0.
  return [(i // (group // 32)).min(spec.groups - 1) for i in at]


def _weights(
  ops: Any, spec: Spec, words: list[Any], by: list[Any]
) -> list[Any]:
  """Eight pairs of weights of bytes in both halves of words."""
  out = []
  offset = -spec.fmt.code_range[0]
  for c in range(8):
    s = by[c // 4 * (len(by) - 1)]
    if spec.fields == 1:
      size = ops.mask(words[c], 0x007F_007F, 0x4300_4300)
      over = ops.mask(words[c], 0x0080_0080, 0x4300_4300)
    else:
      word, high = words[c % 4], c // 4
      if spec.fields == 2:
        size = ops.mask(word >> (4 * high), 0x000F_000F, 0x4300_4300)
        over = ops.constant(0x0001_0001 * (0x4300 + offset))
      else:
        # 128 + code, or 32 + code two bits further up.
        magic = 0x4200 if high else 0x4300
        size = ops.mask(word, 0x0003_0003 << (2 * high), 0x0001_0001 * magic)
        over = ops.constant(0x0001_0001 * (magic + (offset << (2 * high))))
    out.append(ops.multiply2(ops.subtract2(size, over), s))
  return out


def transpose(ops: Any, pairs: list[Any], memory: Any, part: int) -> None:
  """Writes 64 rows of the weight by 64 of x, the latter first, to memory.

  Args:
    ops: Instructions.
    pairs: A warpgroup's results, pairs of neighbours along the rows of x: by 8
      rows of x, of two rows of the weight.
    memory: Shared memory of bfloat16 `[64, 64]`, 128 bytes a row, 16 of which
      change places with others, as the copy engine has it.
    part: Which 64 rows of x.
  """
  thread = ops.thread()
  warp, lane = (thread >> 5) & 3, thread & 31
  which, row = lane >> 3, lane & 7  # Of four matrices.
  chunk = ops.exclusive_or(warp * 2 + (which & 1), row)
  at = row * 128 + (which >> 1) * 1024 + chunk * 16
  for c in range(0, 8, 2):
    begin = (part * 8 + c) * 2
    ops.put_transposed(memory, at + c * 1024, pairs[begin : begin + 4])


# Microseconds of a step of a tile on an H200, by its rows of x.
_STEP_US = {64: 0.67, 128: 0.87, 256: 1.3}


def choose(
  rows: int, cols: int, xs: int, fmt: _formats.Format, processors: int
) -> Spec:
  """Chooses tiles and parts that keep most multiprocessors busy."""
  cluster = 2 if rows % (2 * ROWS) == 0 else 1
  found = []
  for tile_x, step in _STEP_US.items():
    for split in (1, 2, 3, 4, 6):
      spec = Spec(
        rows=rows,
        cols=cols,
        xs=xs,
        fmt=fmt,
        tile_x=tile_x,
        split=split,
        cluster=cluster,
        processors=processors,
      )
      of_rows, of_x = spec.tiles
      turns = -(-of_rows * of_x * split // (processors // cluster))
      took = turns * (spec.steps * step + 2)
      if split > 1:  # Parts are written, read and added.
        took = 1.05 * took + 3 + (split + 1) * spec.padded * rows / 1e6
      found.append((took, split, tile_x, spec))
  return min(found, key=lambda f: f[:3])[3]
