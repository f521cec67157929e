# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed matmul for a few rows of x, as one thread of the GPU runs it.

Memory is what such a product waits for: every packed byte is read once. A block
of threads takes 16 R rows, and asks for them ahead, a slice of their columns at
a time, into a ring in shared memory (`cp.async`); its warps take turns on 64
bytes of all rows of a slice, and add up what they have at the end.

**Tensor cores** multiply: the weights are the 16 rows of a product, and its 8
columns the rows of x. `_integers` and `_floats` are two ways.

Scales are read once into shared memory, all rows of a block together.

The code speaks to the GPU through `ops` (see `_ptx`), so that a test can run
every thread of it on numpy.
"""

from typing import Any

from gemma_ext.kernels.mosaic_gpu import _floats
from gemma_ext.kernels.mosaic_gpu import _integers
from gemma_ext.kernels.mosaic_gpu import _spec


def run(
  ops: Any, spec: _spec.Spec, x: Any, codes: Any, scale: Any, out: Any
) -> None:
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
  place = _spec.Place(
    warp=thread >> 5, group=(thread & 31) >> 2, lane=thread & 3
  )
  first = ops.block() * spec.block_rows
  # The last block starts early, to end with the last row.
  if spec.out_rows % spec.block_rows:
    first = first.min(spec.out_rows - spec.block_rows)
  rank = ops.rank()
  begin = rank * spec.steps
  ring = _Ring(ops, spec, thread, first, codes)
  kind = _integers.Integers if spec.integers else _floats.Floats
  products = kind(ops, spec, place, thread, x)
  # Memory answers in order: what is needed first is asked for first.
  asked = products.ask(begin)
  _stage(ops, spec, thread, first, scale)
  for j in range(spec.slices - 1):
    ring.ask(begin + j)
  begun = products.begin(asked, begin)

  def step(i, carry):
    j = begin + i
    ring.wait()
    ring.ask(j + (spec.slices - 1))
    sums, asked = carry
    return products.step(sums, asked, j)

  sums = [[ops.zero()] * kind.results for _ in range(spec.tiles)]
  sums, _ = ops.loop(spec.steps, step, (sums, begun))
  _finish(ops, spec, place, rank, first, sums, out)


class _Ring:
  """Codes on their way to shared memory."""

  def __init__(
    self, ops: Any, spec: _spec.Spec, thread: Any, first: Any, codes: Any
  ):
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
    last = (spec.row_bytes - 1) // spec.width * spec.width
    source = self._from + skip.min(last)
    target = (j % spec.slices) * spec.slice + self._to
    count = _spec.TILE * spec.tiles // spec.halves
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


def _stage(
  ops: Any, spec: _spec.Spec, thread: Any, first: Any, scale: Any
) -> None:
  """Asks for the scales of the block's rows in shared memory.

  They come no later than the first slice.
  """
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


def _finish(
  ops: Any,
  spec: _spec.Spec,
  place: _spec.Place,
  rank: Any,
  first: Any,
  sums: list[list[Any]],
  out: Any,
) -> None:
  """Adds up what the warps have; the first block of a cluster writes it."""
  for tile in range(spec.tiles):
    # Each of two rows, and of a row what one or two columns have.
    each = len(sums[tile]) // 2
    for k, value in enumerate(sums[tile]):
      row = place.group + 8 * (k // each)
      at = (place.warp * spec.tiles + tile) * _spec.TILE + row
      at = at * spec.sums + place.lane * each + k % each
      ops.share(rank * (spec.shared // spec.split) + at, value)
  ops.meet()
  threads = 32 * spec.warps
  results = spec.block_rows * spec.xs
  sub = spec.subgroups

  def total(tile_row, m):
    value = None
    for warp in range(spec.split * spec.warps):
      for s in range(sub):
        at = (
          (tile_row + warp * spec.tiles * _spec.TILE) * spec.sums + m * sub + s
        )
        part = ops.shared(at)
        value = part if value is None else ops.add(value, part)
    return value

  for after in range(0, results, threads):
    index = ops.thread() + after
    m, local = index // spec.block_rows, index % spec.block_rows
    safe = m.min(spec.xs - 1)
    if spec.gated:
      pair = (local // _spec.TILE) * (2 * _spec.TILE) + local % _spec.TILE
      value = ops.gelu_mul(total(pair, safe), total(pair + _spec.TILE, safe))
    else:
      value = total(local, safe)
    row = first + local
    inside = (index < results) & rank.equals(0)
    ops.store(out, (safe * spec.out_rows + row) * 2, value, inside)
