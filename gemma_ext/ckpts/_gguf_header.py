# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Strict GGUF header parser: every count is bounded before it is trusted.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 2
and 3, little-endian.
"""

import dataclasses
import math
import os
import struct
from typing import Any, BinaryIO

import gguf
import numpy as np

from gemma_ext import errors

MAGIC = b'GGUF'
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 128 << 20
MAX_DIMS = 4
_MAX_KEY_BYTES = 1 << 16
_MAX_TENSOR_NAME_BYTES = 1 << 8
_MAX_ARRAY_DEPTH = 3
_MAX_DIM = 1 << 40
_MAX_ALIGNMENT = 1 << 20
_DEFAULT_ALIGNMENT = 32
_CHUNK = 1 << 20

_STRING = 8
_ARRAY = 9
_BOOL = 7
_SCALARS: dict[int, np.dtype[Any]] = {
  0: np.dtype('<u1'),
  1: np.dtype('<i1'),
  2: np.dtype('<u2'),
  3: np.dtype('<i2'),
  4: np.dtype('<u4'),
  5: np.dtype('<i4'),
  6: np.dtype('<f4'),
  7: np.dtype('<u1'),
  10: np.dtype('<u8'),
  11: np.dtype('<i8'),
  12: np.dtype('<f8'),
}
# Least bytes that one value of a type takes.
_LEAST_BYTES = {
  _STRING: 8,
  _ARRAY: 12,
  **{k: d.itemsize for k, d in _SCALARS.items()},
}
_LEAST_PAIR_BYTES = 8 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_U64 = struct.Struct('<Q')
_U32 = struct.Struct('<I')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
  """A tensor of the file.

  Attributes:
    name: Its name.
    shape: Logical shape, rows first (GGUF stores it in the other order).
    kind: How its numbers are stored.
    offset: First byte, from the start of the file.
    nbytes: Bytes in the file.
  """

  name: str
  shape: tuple[int, ...]
  kind: gguf.GGMLQuantizationType
  offset: int
  nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
  """Everything in a GGUF file before the tensor data.

  Attributes:
    version: Format version, 2 or 3.
    metadata: Values by key: int, float, bool, str, numpy arrays of numbers,
      lists of bytes for arrays of strings, lists of lists for nested arrays.
    tensors: Tensors by name, in the order of the file.
  """

  version: int
  metadata: dict[str, Any]
  tensors: dict[str, TensorInfo]


def read_header(file: BinaryIO) -> Header:
  """Parses the header of an open GGUF file.

  Memory is bounded by a constant times the bytes of the header, which are at
  most the file's and at most `MAX_HEADER_BYTES`.

  Args:
    file: A file opened for reading in binary, unbuffered or not.

  Raises:
    UnknownFormatError: If it is no GGUF file.
    HeaderError: If the header is malformed.
    HeaderTooLargeError: If a count or length exceeds what the file can hold.
    TruncatedFileError: If the file ends inside the header or the data.
    UnsupportedTypeError: If a tensor has a type that is not known.
    OverlappingTensorsError: If two tensors claim the same bytes.
  """
  cursor = _Cursor(file)
  if cursor.size < 24 or cursor.take(4) != MAGIC:
    raise errors.UnknownFormatError(
      'Not a GGUF file: it must start with the bytes "GGUF" and have a header'
      f' of at least 24 bytes; the file has {cursor.size}.'
    )
  version = cursor.u32()
  if version not in VERSIONS:
    hint = ''
    if int.from_bytes(version.to_bytes(4, 'little'), 'big') in VERSIONS:
      hint = ' This one is big-endian; convert it to little-endian first.'
    raise errors.HeaderError(
      f'GGUF version {version} is not supported; expected {VERSIONS}.{hint}'
    )
  num_tensors = cursor.count('tensors', _LEAST_TENSOR_BYTES)
  num_pairs = cursor.count('metadata pairs', _LEAST_PAIR_BYTES)
  metadata: dict[str, Any] = {}
  for _ in range(num_pairs):
    key = cursor.text('metadata key', _MAX_KEY_BYTES)
    if key in metadata:
      raise errors.HeaderError(f'Metadata key {key!r} occurs twice.')
    metadata[key] = _value(cursor, key)
  infos = [_tensor_info(cursor) for _ in range(num_tensors)]
  alignment = _alignment(metadata)
  data = -(-cursor.position // alignment) * alignment
  tensors: dict[str, TensorInfo] = {}
  for info in infos:
    if info.name in tensors:
      raise errors.HeaderError(f'Tensor {info.name!r} occurs twice.')
    if info.offset % alignment:
      raise errors.HeaderError(
        f'Tensor {info.name!r} starts at offset {info.offset}, which is not a'
        f' multiple of the alignment {alignment}.'
      )
    end = data + info.offset + info.nbytes
    if end > cursor.size:
      raise errors.TruncatedFileError(
        f'Tensor {info.name!r} ends at byte {end}, the file at'
        f' {cursor.size}. Download it again.'
      )
    tensors[info.name] = dataclasses.replace(info, offset=data + info.offset)
  _check_overlap(list(tensors.values()))
  return Header(version=version, metadata=metadata, tensors=tensors)


class _Cursor:
  """Reads the header forwards in chunks, never past the end of the file."""

  def __init__(self, file: BinaryIO):
    self._file = file
    self.size = os.fstat(file.fileno()).st_size
    self._buffer = b''
    self._at = 0  # Position inside the buffer.
    self._start = 0  # Position of the buffer inside the file.

  @property
  def position(self) -> int:
    return self._start + self._at

  @property
  def remaining(self) -> int:
    return self.size - self.position

  def take(self, n: int) -> bytes:
    """Returns the next `n` bytes."""
    self._ensure(n)
    out = self._buffer[self._at : self._at + n]
    self._at += n
    return out

  def u32(self) -> int:
    return _U32.unpack(self.take(4))[0]

  def u64(self) -> int:
    return _U64.unpack(self.take(8))[0]

  def count(self, what: str, least_bytes: int) -> int:
    """Reads a count of things that take at least `least_bytes` each."""
    n = self.u64()
    if n * least_bytes > self.remaining:
      raise errors.HeaderTooLargeError(
        f'The header promises {n} {what}, which take at least'
        f' {n * least_bytes} bytes; {self.remaining} are left in the file.'
      )
    return n

  def string(self, what: str, limit: int) -> bytes:
    """Reads a length and as many bytes."""
    n = self.u64()
    if n > min(limit, self.remaining):
      raise errors.HeaderTooLargeError(
        f'A {what} of {n} bytes is promised; at most {limit} are allowed and'
        f' {self.remaining} left in the file.'
      )
    return self.take(n)

  def text(self, what: str, limit: int) -> str:
    """Reads a string that must be UTF-8."""
    raw = self.string(what, limit)
    try:
      return raw.decode('utf-8')
    except UnicodeDecodeError as e:
      raise errors.HeaderError(f'A {what} is not UTF-8: {raw[:32]!r}.') from e

  def strings(self, n: int) -> list[bytes]:
    """Reads `n` strings; fast, because vocabularies have 262,144."""
    out: list[bytes] = []
    unpack = _U64.unpack_from
    while len(out) < n:
      self._ensure(8)
      buffer, at = self._buffer, self._at
      last = len(buffer) - 8
      left = n - len(out)
      while left and at <= last:
        length = unpack(buffer, at)[0]
        stop = at + 8 + length
        if stop > len(buffer):
          break
        out.append(buffer[at + 8 : stop])
        at = stop
        left -= 1
      self._at = at
      if left:
        # The next string straddles the buffer's end, or is longer than it.
        out.append(self.string('string', MAX_HEADER_BYTES))
    return out

  def _ensure(self, n: int) -> None:
    """Makes the next `n` bytes available in the buffer."""
    if self._at + n <= len(self._buffer):
      return
    position = self.position
    if position + n > self.size:
      raise errors.TruncatedFileError(
        f'The file ends at byte {self.size}, inside its header, which goes on'
        f' to byte {position + n} or further. Download it again.'
      )
    if position + n > MAX_HEADER_BYTES:
      raise errors.HeaderTooLargeError(
        f'The header is longer than {MAX_HEADER_BYTES} bytes; no Gemma needs'
        ' that much.'
      )
    want = min(
      max(n, _CHUNK), self.size - position, MAX_HEADER_BYTES - position
    )
    self._file.seek(position)
    buffer = self._file.read(want)
    if len(buffer) < n:
      raise errors.TruncatedFileError(
        f'The file ended at byte {position + len(buffer)} while being read.'
      )
    self._buffer, self._at, self._start = buffer, 0, position


def _value(cursor: _Cursor, key: str) -> Any:
  """Reads the type and the value of a metadata pair."""
  return _typed(cursor, key, cursor.u32(), 0)


def _typed(cursor: _Cursor, key: str, kind: int, depth: int) -> Any:
  if kind == _STRING:
    return cursor.text(f'value of {key}', MAX_HEADER_BYTES)
  if kind == _ARRAY:
    return _array(cursor, key, depth + 1)
  dtype = _scalar(key, kind)
  value = np.frombuffer(cursor.take(dtype.itemsize), dtype)[0].item()
  if kind != _BOOL:
    return value
  if value not in (0, 1):
    raise errors.HeaderError(f'{key} is the boolean {value}; expected 0 or 1.')
  return bool(value)


def _array(cursor: _Cursor, key: str, depth: int) -> Any:
  if depth > _MAX_ARRAY_DEPTH:
    raise errors.HeaderError(
      f'{key} nests arrays deeper than {_MAX_ARRAY_DEPTH} levels.'
    )
  kind = cursor.u32()
  if kind not in _LEAST_BYTES:
    raise errors.HeaderError(f'{key} is an array of the unknown type {kind}.')
  n = cursor.count(f'entries of {key}', _LEAST_BYTES[kind])
  if kind == _STRING:
    return cursor.strings(n)
  if kind == _ARRAY:
    return [_array(cursor, key, depth + 1) for _ in range(n)]
  dtype = _scalar(key, kind)
  values = np.frombuffer(cursor.take(n * dtype.itemsize), dtype)
  if kind != _BOOL:
    return values
  if values.size and values.max() > 1:
    raise errors.HeaderError(f'{key} holds a boolean that is neither 0 nor 1.')
  return values.astype(bool)


def _scalar(key: str, kind: int) -> np.dtype:
  if kind not in _SCALARS:
    raise errors.HeaderError(f'{key} has the unknown value type {kind}.')
  return _SCALARS[kind]


def _tensor_info(cursor: _Cursor) -> TensorInfo:
  """Reads one tensor info; its offset is still relative to the data."""
  name = cursor.text('tensor name', _MAX_TENSOR_NAME_BYTES)
  num_dims = cursor.u32()
  if not 1 <= num_dims <= MAX_DIMS:
    raise errors.HeaderError(
      f'Tensor {name!r} has {num_dims} dimensions; expected 1 to {MAX_DIMS}.'
    )
  dims = struct.unpack(f'<{num_dims}Q', cursor.take(8 * num_dims))
  if min(dims) < 1 or math.prod(dims) > _MAX_DIM:
    raise errors.HeaderTooLargeError(
      f'Tensor {name!r} has dimensions {dims}; expected sizes of at least 1'
      f' and at most {_MAX_DIM} numbers.'
    )
  raw_kind = cursor.u32()
  offset = cursor.u64()
  try:
    kind = gguf.GGMLQuantizationType(raw_kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  except (ValueError, KeyError) as e:
    raise errors.UnsupportedTypeError(
      f'Tensor {name!r} has the unknown type {raw_kind}; a newer gguf package'
      ' may know it.'
    ) from e
  if dims[0] % block:
    raise errors.HeaderError(
      f'Rows of tensor {name!r} have {dims[0]} numbers, which is not a'
      f' multiple of the {block} in a block of {kind.name}.'
    )
  return TensorInfo(
    name=name,
    shape=dims[::-1],
    kind=kind,
    offset=offset,
    nbytes=math.prod(dims) // block * block_bytes,
  )


def _alignment(metadata: dict[str, Any]) -> int:
  value = metadata.get('general.alignment', _DEFAULT_ALIGNMENT)
  if (
    isinstance(value, bool)
    or not isinstance(value, int)
    or not 1 <= value <= _MAX_ALIGNMENT
    or value & (value - 1)
  ):
    raise errors.HeaderError(
      f'general.alignment is {value!r}; expected a power of two up to'
      f' {_MAX_ALIGNMENT}.'
    )
  return value


def _check_overlap(tensors: list[TensorInfo]) -> None:
  ordered = sorted(tensors, key=lambda t: t.offset)
  for before, after in zip(ordered, ordered[1:]):
    if before.offset + before.nbytes > after.offset:
      raise errors.OverlappingTensorsError(
        f'Tensors {before.name!r} and {after.name!r} overlap: the first ends'
        f' at byte {before.offset + before.nbytes}, the second starts at'
        f' {after.offset}.'
      )
