# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Whole numbers and bits of one thread, and PTX in a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm


def i32() -> ir.Type:
  return ir.IntegerType.get_signless(32)


def f32() -> ir.Type:
  return ir.F32Type.get()


class Flag:
  """A bit."""

  def __init__(self, value: ir.Value):
    self.value = value

  def __and__(self, other: Flag) -> Flag:
    return Flag(arith.andi(self.value, other.value))


class Int:
  """A whole number of 32 bits, without a sign."""

  def __init__(self, value: ir.Value):
    self.value = value

  def _with(self, op: Callable[..., Any], other: Int | int) -> Int:
    return Int(op(self.value, value(other)))

  def __add__(self, other: Int | int) -> Int:
    if isinstance(other, int) and not other:
      return self
    return self._with(arith.addi, other)

  def __mul__(self, other: Int | int) -> Int:
    return self._with(arith.muli, other)

  def __and__(self, other: Int | int) -> Int:
    return self._with(arith.andi, other)

  def __or__(self, other: Int | int) -> Int:
    return self._with(arith.ori, other)

  def __rshift__(self, other: int) -> Int:
    return self._with(arith.shrui, other) if other else self

  def __lshift__(self, other: int) -> Int:
    return self._with(arith.shli, other) if other else self

  def __floordiv__(self, other: int) -> Int:
    return self._with(arith.divui, other) if other != 1 else self

  def __mod__(self, other: int) -> Int:
    return self._with(arith.remui, other)

  def __lt__(self, other: Int | int) -> Flag:
    return Flag(arith.cmpi(arith.CmpIPredicate.ult, self.value, value(other)))

  def equals(self, other: Int | int) -> Flag:
    """Whether both are the same."""
    return Flag(arith.cmpi(arith.CmpIPredicate.eq, self.value, value(other)))

  def min(self, other: int) -> Int:
    """The smaller one."""
    return self._with(arith.minui, other)


def value(x: Int | int) -> ir.Value:
  if isinstance(x, Int):
    return x.value
  # MLIR takes signed attributes.
  return utils.c(x - (1 << 32) if x >= 1 << 31 else x, i32())


def asm(
  results: Sequence[ir.Type],
  args: Sequence[ir.Value],
  text: str,
  constraints: str,
  effects: bool = False,
) -> list[ir.Value]:
  """Inlines PTX; one value for every result."""
  if not results:
    llvm.inline_asm(
      ir.Type.parse('!llvm.void'),
      args,
      text,
      constraints,
      has_side_effects=True,
    )
    return []
  kind = (
    results[0]
    if len(results) == 1
    else llvm.StructType.get_literal(list(results))
  )
  out = llvm.inline_asm(kind, args, text, constraints, has_side_effects=effects)
  if len(results) == 1:
    return [out]
  return [llvm.extractvalue(t, out, [i]) for i, t in enumerate(results)]


def mask(word: Int, mask: int, bits: int) -> Int:
  """`(word & mask) | bits`, in one instruction.

  Of two constants ptxas would make two.
  """
  (v,) = asm(
    [i32()],
    [word.value, value(mask), value(bits)],
    'lop3.b32 $0, $1, $2, $3, 0xEA;',
    '=r,r,r,r',
  )
  return Int(v)
