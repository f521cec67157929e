# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Instructions of one thread, within a Mosaic GPU kernel.

What `_few_rows` is written in: whole numbers of 32 bits without a sign, and
PTX where Mosaic has no operation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm
from jaxlib.mlir.dialects import scf

from gemma_ext.kernels.mosaic_gpu import _words

Flag = _words.Flag
Int = _words.Int
_asm, _value = _words.asm, _words.value
_i32, _f32 = _words.i32, _words.f32


class Ptx:
  """Instructions.

  Args:
    shared: Shared memory for sums, float32.
    staged: Shared memory for scales, of any type.
    ring: Shared memory for codes, of any type.
    rounded: Shared memory for x in integers, of any type.
    scales: Shared memory for its scales, float32.
    split: Blocks of a cluster.
  """

  def __init__(
    self,
    shared: ir.Value,
    staged: ir.Value,
    ring: ir.Value,
    rounded: ir.Value,
    scales: ir.Value,
    *,
    split: int = 1,
  ):
    self._split = split
    self._shared, self._staged, self._ring = shared, staged, ring
    self._rounded, self._scales = rounded, scales

  def thread(self) -> Int:
    """Number of the thread in its block."""
    return Int(utils.thread_idx())

  def block(self) -> Int:
    """Number of the block, or of its cluster."""
    if self._split == 1:
      return Int(utils.block_idx())
    x, y, z = (self._special(f'clusterid.{axis}') for axis in 'xyz')
    width, height = (self._special(f'nclusterid.{axis}') for axis in 'xy')
    return x + (y + z * height) * width

  def rank(self) -> Int:
    """Number of the block in its cluster."""
    if self._split == 1:
      return self.constant(0)
    return self._special('cluster_ctarank')

  def constant(self, value: int) -> Int:
    """A constant."""
    return Int(_value(value))

  def zero(self) -> ir.Value:
    """0.0."""
    return utils.c(0.0, _f32())

  def loop(
    self, count: int, body: Callable[[Int, Any], Any], carry: Any
  ) -> Any:
    """`body(i, carry)` for i below `count`."""
    if count < 1:
      return carry
    leaves, tree = jax.tree.flatten(carry)
    kinds = [type(leaf) for leaf in leaves]

    def wrap(values):
      return jax.tree.unflatten(
        tree,
        [Int(v) if k is Int else v for k, v in zip(kinds, values)],
      )

    def bare(values):
      return [v.value if isinstance(v, Int) else v for v in values]

    op: Any = scf.ForOp(  # type: ignore[call-arg]
      utils.c(0, _i32()),
      utils.c(count, _i32()),
      utils.c(1, _i32()),
      bare(leaves),
    )
    with ir.InsertionPoint(op.body):
      new = body(Int(op.induction_variable), wrap(list(op.inner_iter_args)))
      scf.yield_(bare(jax.tree.leaves(new)))
    return wrap(list(op.results))

  def load(
    self,
    memory: ir.Value,
    at: Int,
    *,
    words: int,
    plus: int = 0,
    valid: Flag,
  ) -> list[Int]:
    """Reads words at a byte; 0 where not `valid`.

    Args:
      memory: Global memory.
      at: Where, a multiple of the bytes read.
      words: 1, 2 or 4.
      plus: Bytes to add to that.
      valid: Whether to read.
    """
    address = self._at(memory, at)
    return self._read('ld.global.nc', address, words, plus, valid)

  def stage(
    self,
    memory: ir.Value,
    at: Int,
    plus: int,
    to: Int,
    width: int,
    inside: Flag,
  ) -> None:
    """Asks for 16, 4 or 1 bytes in shared memory for scales, if `inside`."""
    source, target = self._at(memory, at), self._at(self._staged, to)
    if width == 1:  # Too little for `cp.async`.
      move = f'@p ld.global.nc.b8 a, [$0+{plus}]; @p st.shared.b8 [$1], a;'
    else:
      cache = 'cg' if width == 16 else 'ca'
      move = f'@p cp.async.{cache}.shared.global [$1], [$0+{plus}], {width};'
    self._guarded(inside, [source, target], 'l,l', move, ' .reg .b32 a;')

  def staged(self, at: Int, plus: int, size: int) -> Int:
    """Reads 1 or 2 bytes of the scales in shared memory."""
    kind, constraint = ('u16', '=h') if size == 2 else ('u8', '=r')
    bits = 16 if size == 2 else 32
    (v,) = _asm(
      [ir.IntegerType.get_signless(bits)],
      [self._at(self._staged, at)],
      f'ld.shared.{kind} $0, [$1+{plus}];',
      f'{constraint},l',
      True,
    )
    return Int(arith.extui(_i32(), v) if size == 2 else v)

  def fetch(
    self,
    memory: ir.Value,
    at: Int,
    plus: int,
    to: Int,
    to_plus: int,
    inside: Flag,
  ) -> None:
    """Asks for 16 bytes of global memory in shared memory for codes."""
    self._guarded(
      inside,
      [self._at(memory, at), self._at(self._ring, to)],
      'l,l',
      f'@p cp.async.cg.shared.global [$1+{to_plus}], [$0+{plus}], 16;',
    )

  def commit(self) -> None:
    """Ends a group of `fetch`es."""
    _asm([], [], 'cp.async.commit_group;', '~{memory}')

  def wait(self, count: int) -> None:
    """Waits until at most `count` groups of this thread are on their way."""
    _asm([], [], f'cp.async.wait_group {count};', '~{memory}')

  def fetched(self, at: Int, plus: int) -> list[Int]:
    """Reads four words of the codes in shared memory."""
    return self._read('ld.shared', self._at(self._ring, at), 4, plus)

  def mask(self, word: Int, mask: int, bits: int) -> Int:
    """`(word & mask) | bits`, in one instruction."""
    return _words.mask(word, mask, bits)

  def permute(self, a: Int, b: Int, selector: int) -> Int:
    """Bytes of two words, `prmt`."""
    return self._simple(f'prmt.b32 $0, $1, $2, {selector};', a, b)

  def mma(
    self,
    a: Sequence[Int],
    b: Sequence[Int],
    c: Sequence[ir.Value],
  ) -> list[ir.Value]:
    """16 x 16 by 16 x 8 bfloat16, added to float32."""
    return _asm(
      [_f32()] * 4,
      [*(v.value for v in a), *(v.value for v in b), *c],
      'mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32'
      ' {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};',
      '=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f',
    )

  def scale(self, bits: Int, kind: str, factor: float) -> ir.Value:
    """A stored scale, times a constant."""
    size = bits & 127 if kind == 'e4m3' else bits
    if kind == 'bf16':
      word = bits << 16
    else:
      word = (size + ((112 if kind == 'e4m3' else 107) << 3)) << 20
    if kind == 'e4m3':
      word = word | ((bits & 128) << 24)
    value = arith.bitcast(_f32(), word.value)
    if kind != 'bf16':
      zero = size.equals(0).value
      value = arith.select(zero, self.zero(), value)
    if factor == 1.0:
      return value
    return arith.mulf(value, utils.c(factor, _f32()))

  def mma8(
    self,
    a: Sequence[Int],
    b: Sequence[Int],
    c: Sequence[Int],
    *,
    signed: bool,
  ) -> list[Int]:
    """16 x 32 bytes, `signed` or not, by 32 x 8 signed ones, added to int32."""
    kind = 's8' if signed else 'u8'
    out = _asm(
      [_i32()] * 4,
      [v.value for v in (*a, *b, *c)],
      f'mma.sync.aligned.m16n8k32.row.col.s32.{kind}.s8.s32'
      ' {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};',
      '=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r',
    )
    return [Int(v) for v in out]

  def max16(self, a: Int, b: Int) -> Int:
    """The larger of two halves, both without a sign: twice."""
    return self._simple('max.u16x2 $0, $1, $2;', a, b)

  def shuffle(self, a: Int, distance: int) -> Int:
    """The value of the thread whose number differs in a bit."""
    (v,) = _asm(
      [_i32()],
      [a.value],
      f'shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;',
      '=r,r',
      True,
    )
    return Int(v)

  def shuffle_float(self, a: ir.Value, distance: int) -> ir.Value:
    """As `shuffle`."""
    word = Int(arith.bitcast(_i32(), a))
    return arith.bitcast(_f32(), self.shuffle(word, distance).value)

  def bfloat16(self, high: Int) -> ir.Value:
    """A bfloat16 in the upper half of a word."""
    return arith.bitcast(_f32(), high.value)

  def fmax(self, a: ir.Value, b: float) -> ir.Value:
    """The larger of a and a constant."""
    return arith.maximumf(a, utils.c(b, _f32()))

  def multiply(self, a: ir.Value, b: float) -> ir.Value:
    """The product with a constant."""
    return arith.mulf(a, utils.c(b, _f32()))

  def times(self, a: ir.Value, b: ir.Value) -> ir.Value:
    """The product of both."""
    return arith.mulf(a, b)

  def reciprocal(self, a: ir.Value) -> ir.Value:
    """1 / a, nearly."""
    (v,) = _asm([_f32()], [a], 'rcp.approx.ftz.f32 $0, $1;', '=f,f')
    return v

  def round(self, a: ir.Value, b: ir.Value) -> Int:
    """Rounds the product; the 16 lowest bits are those of the result."""
    value = self.fma(a, b, utils.c(1.5 * 2.0**23, _f32()))
    return Int(arith.bitcast(_i32(), value))

  def to_float(self, a: Int) -> ir.Value:
    """A whole number with a sign."""
    return arith.sitofp(_f32(), a.value)

  def pack(self, values: Sequence[Int], byte: int) -> list[Int]:
    """Byte 0 or 1 of each, four a word; of two values, a half."""
    choose = 0x0040 if byte == 0 else 0x0051
    pairs = [
      self.permute(a, b, choose) for a, b in zip(values[::2], values[1::2])
    ]
    if len(pairs) == 1:
      return pairs
    return [self.permute(a, b, 0x5410) for a, b in zip(pairs[::2], pairs[1::2])]

  def put_bytes(
    self,
    at: Int,
    words: Sequence[Int],
    count: int,
    inside: Flag | None = None,
  ) -> None:
    """Writes 2, 4 or 8 bytes of x, if `inside`."""
    address, values = self._at(self._rounded, at), [w.value for w in words]
    if count == 2:
      values = [arith.trunci(ir.IntegerType.get_signless(16), values[0])]
    text, kind = {
      2: ('st.shared.b16 [$0], $1;', 'h'),
      4: ('st.shared.b32 [$0], $1;', 'r'),
      8: ('st.shared.v2.b32 [$0], {$1, $2};', 'r,r'),
    }[count]
    args = [address, *values]
    if inside is None:
      _asm([], args, text, f'l,{kind}')
    else:
      self._guarded(inside, args, f'l,{kind}', f'@p {text}')

  def get_bytes(self, at: Int, plus: int, valid: Flag) -> list[Int]:
    """Reads 16 bytes of x; 0 where not `valid`."""
    address = self._at(self._rounded, at)
    return self._read('ld.shared', address, 4, plus, valid)

  def put_scale(self, at: Int, value: ir.Value, inside: Flag) -> None:
    """Writes a scale of x, if `inside`."""
    address = self._at(self._scales, at * 4)
    self._guarded(inside, [address, value], 'l,f', '@p st.shared.f32 [$0], $1;')

  def get_scale(self, at: Int) -> ir.Value:
    """Reads a scale of x."""
    return self._shared_float(self._scales, at)

  def put_whole(self, at: Int, value: Int, inside: Flag) -> None:
    """Writes a whole number among the scales of x, if `inside`."""
    address = self._at(self._scales, at * 4)
    text = '@p st.shared.b32 [$0], $1;'
    self._guarded(inside, [address, value.value], 'l,r', text)

  def get_whole(self, at: Int) -> Int:
    """Reads a whole number among the scales of x."""
    return self._read('ld.shared', self._at(self._scales, at * 4), 1, 0)[0]

  def _special(self, name: str) -> Int:
    (v,) = _asm([_i32()], [], f'mov.u32 $0, %{name};', '=r')
    return Int(v)

  def _simple(self, text: str, *args: Int) -> Int:
    (v,) = _asm(
      [_i32()],
      [a.value for a in args],
      text,
      ','.join(['=r'] + ['r'] * len(args)),
    )
    return Int(v)

  def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """The product of a and b, and c."""
    (v,) = _asm([_f32()], [a, b, c], 'fma.rn.f32 $0, $1, $2, $3;', '=f,f,f,f')
    return v

  def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
    """The sum of both."""
    return arith.addf(a, b)

  def gelu_mul(self, gate: ir.Value, up: ir.Value) -> ir.Value:
    """`gelu(gate) * up`, by tanh, as `jax.nn.gelu` has it.

    0.5 g (1 + tanh z) is g / (1 + exp(-2 z)).
    """
    # -2 log2(e) sqrt(2 / pi), and 0.044715 times it.
    c1, c3 = -2.3022081983, -0.1029432396
    constant = lambda v: utils.c(v, _f32())
    square = arith.mulf(gate, gate)
    inner = self.fma(square, constant(c3), constant(c1))
    z = arith.mulf(inner, gate)
    (power,) = _asm([_f32()], [z], 'ex2.approx.f32 $0, $1;', '=f,f')
    below = arith.addf(power, constant(1.0))
    return arith.mulf(arith.divf(gate, below), up)

  def share(self, at: Int, value: ir.Value, inside: Flag | None = None) -> None:
    """Writes shared memory, that of the first block of the cluster."""
    address = self._at(self._shared, at * 4)
    if inside is not None:
      text = '@p st.shared.f32 [$0], $1;'
      self._guarded(inside, [address, value], 'l,f', text)
      return
    if self._split == 1:
      _asm([], [address, value], 'st.shared.f32 [$0], $1;', 'l,f')
      return
    _asm(
      [],
      [address, value],
      '{ .reg .b64 there; mapa.shared::cluster.u64 there, $0, 0;'
      ' st.shared::cluster.f32 [there], $1; }',
      'l,f',
    )

  def shared(self, at: Int) -> ir.Value:
    """Reads shared memory."""
    return self._shared_float(self._shared, at)

  def barrier(self) -> None:
    """Waits for all threads of the block."""
    _asm([], [], 'bar.sync 0;', '~{memory}')

  def meet(self) -> None:
    """Waits for all threads of the cluster."""
    if self._split == 1:
      self.barrier()
      return
    _asm(
      [],
      [],
      'barrier.cluster.arrive.release; barrier.cluster.wait.acquire;',
      '~{memory}',
    )

  def store(
    self, memory: ir.Value, at: Int, value: ir.Value, inside: Flag
  ) -> None:
    """Writes a bfloat16 at a byte of global memory."""
    self._guarded(
      inside,
      [self._at(memory, at), value],
      'l,f',
      'cvt.rn.bf16.f32 h, $1; @p st.global.b16 [$0], h;',
      ' .reg .b16 h;',
    )

  def _guarded(
    self,
    flag: Flag,
    args: Sequence[ir.Value],
    constraints: str,
    text: str,
    registers: str = '',
  ) -> None:
    """Inlines PTX that has `flag` in the predicate p."""
    _asm(
      [],
      [*args, arith.extui(_i32(), flag.value)],
      f'{{ .reg .pred p;{registers} setp.ne.b32 p, ${len(args)}, 0; {text} }}',
      f'{constraints},r',
    )

  def _read(
    self,
    instruction: str,
    address: ir.Value,
    words: int,
    plus: int,
    valid: Flag | None = None,
  ) -> list[Int]:
    """Reads words; 0 where not `valid`."""
    names = ', '.join(f'${i}' for i in range(words))
    vector = ''
    if words > 1:
      names, vector = f'{{{names}}}', f'.v{words}'
    text = f'{instruction}{vector}.b32 {names}, [${words}+{plus}];'
    args, constraints = [address], ['=r'] * words + ['l']
    if valid is not None:
      args.append(arith.extui(_i32(), valid.value))
      constraints = ['=&r'] * words + ['l', 'r']
      clear = ' '.join(f'mov.b32 ${i}, 0;' for i in range(words))
      text = (
        f'{{ .reg .pred p; setp.ne.b32 p, ${words + 1}, 0; {clear} @p {text} }}'
      )
    out = _asm([_i32()] * words, args, text, ','.join(constraints), True)
    return [Int(v) for v in out]

  def _shared_float(self, memory: ir.Value, at: Int) -> ir.Value:
    (v,) = _asm(
      [_f32()],
      [self._at(memory, at * 4)],
      'ld.shared.f32 $0, [$1];',
      '=f,l',
      True,
    )
    return v

  def _at(self, memory: ir.Value, at: Int) -> ir.Value:
    base = utils.memref_ptr(memory)
    offset = arith.extui(ir.IntegerType.get_signless(64), at.value)
    address = llvm.ptrtoint(ir.IntegerType.get_signless(64), base)
    return arith.addi(address, offset)
