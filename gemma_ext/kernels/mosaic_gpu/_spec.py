# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a kernel for a few rows is compiled for, and where its threads stand."""

import dataclasses
from typing import Any

from gemma_ext.kernels import _formats

BLOCK = 32  # Bytes of a block, and codes of one of its fields.
TILE = 16  # Rows of a tile.
COLUMNS = 8  # Of a product.


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
    split: Thread blocks, a cluster, that share the columns of a tile.
    integers: Whether x is rounded to 16 bits; see `_integers`.
  """

  rows: int
  cols: int
  xs: int
  fmt: _formats.Format
  gated: bool = False
  tiles: int = 1
  warps: int = 8
  unroll: int = 1
  slices: int = 3
  split: int = 1
  integers: bool = False

  @property
  def out_rows(self) -> int:
    """Rows of the result."""
    return self.rows // self.halves

  @property
  def block_rows(self) -> int:
    """Rows of the result that a thread block makes."""
    return TILE * self.tiles // self.halves

  @property
  def grid(self) -> int:
    """Number of clusters."""
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
    return fields(self.fmt)

  @property
  def offset(self) -> int:
    """What a stored code has more than the code."""
    return -self.fmt.code_range[0]

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
    """Sums that a row of x has of a row: of groups that are not one's own."""
    return 2 if self.integers else _columns(self.fmt)

  @property
  def sums(self) -> int:
    """Sums of a row of a tile."""
    return 4 if self.integers else COLUMNS

  @property
  def halves(self) -> int:
    """Ranges of rows that a thread block takes: gate and up, or one."""
    return 2 if self.gated else 1

  @property
  def shared(self) -> int:
    """Floats of shared memory for the sums."""
    return self.split * self.warps * self.tiles * TILE * self.sums

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
    """Slices that a thread block takes."""
    return -(-self.row_bytes // (self.width * self.split))

  @property
  def part(self) -> int:
    """Bytes of the scales of one plane and one range of rows."""
    return self.block_rows * self.groups * self.scale_bytes

  @property
  def rounded(self) -> int:
    """Bytes of shared memory for slices of x in integers: two of them."""
    return 2 * self.xs * 2 * self.width * self.fields

  @property
  def rounded_scales(self) -> int:
    """Scales of those slices."""
    return 2 * self.xs * 2 * self.warps

  @property
  def scale_kind(self) -> str:
    """How scales are stored."""
    return getattr(self.fmt, 'scale', 'bf16')

  def scale_of(self, plane: int) -> tuple[int, float]:
    """Whose scale a plane has, and times what.

    Of tied planes the last one's is stored.
    """
    if self.scale_planes == self.planes:
      return plane, 1.0
    return 0, 3.0 ** (self.planes - 1 - plane)

  def row_at(self, plane: int, tile: int, more: int) -> int:
    """Where in a slice row `more` of a tile is."""
    half = plane * self.halves + tile % self.halves
    row = half * (self.tiles // self.halves) + tile // self.halves
    return (row * TILE + more) * self.stride

  def scale_at(self, plane: int, tile: int, more: int) -> int:
    """Where in shared memory the scales of row `more` of a tile are."""
    row = (tile // self.halves) * TILE + more
    base = plane * self.halves + tile % self.halves
    return base * self.part + row * self.groups * self.scale_bytes


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a thread stands."""

  warp: Any
  group: Any  # Row of a tile, and column of the product.
  lane: Any  # Which quarter of 64 bytes.


def fields(fmt: _formats.Format) -> int:
  """Codes of a byte."""
  if isinstance(fmt, _formats.TernaryFormat):
    return 4 if fmt.packing == '2bit' else 5
  return 8 // fmt.bits


def _columns(fmt: _formats.Format) -> int:
  group = fmt.group
  return 1 if group is None else 2 if group >= BLOCK else 4


def most_rows(fmt: _formats.Format) -> int:
  """Rows of x that one product takes; 0 if the kernel cannot do the format."""
  group = fmt.group or BLOCK
  if isinstance(fmt, _formats.IntFormat) and fmt.bits not in (2, 4, 8):
    return 0
  if isinstance(fmt, _formats.TernaryFormat) and fmt.packing == '3of4':
    return 0
  if group % BLOCK and group not in (8, 16):
    return 0
  return COLUMNS // _columns(fmt)
