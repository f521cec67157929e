# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Instructions of one thread for `_many_rows`: pairs of bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm

from gemma_ext.kernels.mosaic_gpu import _words

Int = _words.Int
_asm, _i32 = _words.asm, _words.i32


class Pairs:
  """Instructions."""

  def thread(self) -> Int:
    """Number of the thread in its block."""
    return Int(utils.thread_idx())

  def constant(self, value: int) -> Int:
    """A constant."""
    return Int(_words.value(value))

  def mask(self, word: Int, mask: int, bits: int) -> Int:
    """`(word & mask) | bits`."""
    return _words.mask(word, mask, bits)

  def permute(self, a: Int, b: Int, selector: int) -> Int:
    """Bytes of two words, `prmt`."""
    return self._two(f'prmt.b32 $0, $1, $2, {selector};', a, b)

  def exclusive_or(self, a: Int, b: Int) -> Int:
    """`a ^ b`."""
    return Int(arith.xori(a.value, b.value))

  def subtract2(self, a: Int, b: Int) -> Int:
    """The difference of two pairs of bfloat16."""
    return self._two('sub.rn.bf16x2 $0, $1, $2;', a, b)

  def multiply2(self, a: Int, b: Int) -> Int:
    """The product of two pairs of bfloat16, each rounded."""
    return self._two('mul.rn.bf16x2 $0, $1, $2;', a, b)

  def half(self, memory: ir.Value, at: Int, plus: int) -> Int:
    """Reads two bytes of shared memory."""
    return self._read16('ld.shared.u16', memory, at, plus)

  def global_scale(
    self, memory: ir.Value, at: Int, plus: int, spec: Any
  ) -> Int:
    """A stored scale as a pair of bfloat16: `plus` rows after the one at."""
    plus *= spec.groups
    if spec.fmt.scale_dtype.itemsize == 2:
      bits = self._read16('ld.global.nc.u16', memory, at * 2, plus * 2)
      return bits * 0x0001_0001
    (v,) = _asm(
      [_i32()],
      [_address(memory, at)],
      f'ld.global.nc.u8 $0, [$1+{plus}];',
      '=r,l',
    )
    # Five bits of exponent and three of mantissa; 0 is 0.
    found = Int(v)
    bits = (found + (107 << 3)) << 4
    zero = Int(
      arith.select(found.equals(0).value, self.constant(0).value, bits.value)
    )
    return zero * 0x0001_0001

  def put_transposed(
    self, memory: ir.Value, at: Int, pairs: Sequence[Int]
  ) -> None:
    """Writes four matrices of 8 x 8 bfloat16, transposed, a row a thread."""
    _asm(
      [],
      [_address(memory, at), *(p.value for p in pairs)],
      'stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};',
      'l,r,r,r,r,~{memory}',
    )

  def _two(self, text: str, a: Int, b: Int) -> Int:
    (v,) = _asm([_i32()], [a.value, b.value], text, '=r,r,r')
    return Int(v)

  def _read16(self, text: str, memory: ir.Value, at: Int, plus: int) -> Int:
    (v,) = _asm(
      [ir.IntegerType.get_signless(16)],
      [_address(memory, at)],
      f'{text} $0, [$1+{plus}];',
      '=h,l',
      True,
    )
    return Int(arith.extui(_i32(), v))


def _address(memory: ir.Value, at: Int) -> ir.Value:
  wide = ir.IntegerType.get_signless(64)
  base = llvm.ptrtoint(wide, utils.memref_ptr(memory))
  return arith.addi(base, arith.extui(wide, at.value))
