# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, single and sharded: strict headers, rows by `pread`.

The header is checked in full before any tensor is read, and a tensor is read
into the one array that it fills, a block of rows at a time if asked.

Format: https://huggingface.co/docs/safetensors/index#format
"""

from collections.abc import Mapping
import dataclasses
import math
import os
import pathlib
import stat
import struct
from typing import Any

import ml_dtypes
import numpy as np

from gemma_ext import errors
from gemma_ext.ckpts import _strict_json

SUFFIX = '.safetensors'
INDEX_NAME = 'model.safetensors.index.json'
SINGLE_NAME = 'model.safetensors'

# The limits of the official reader for the header; the others are ours.
_MAX_HEADER_BYTES = 100_000_000
_MAX_INDEX_BYTES = 64_000_000
_MAX_RANK = 8
_MAX_DIM = 2**48

# Every type of the format whose elements are whole bytes.
_ITEM_BYTES = {
  'BOOL': 1,
  'U8': 1,
  'I8': 1,
  'F8_E4M3': 1,
  'F8_E5M2': 1,
  'U16': 2,
  'I16': 2,
  'F16': 2,
  'BF16': 2,
  'U32': 4,
  'I32': 4,
  'F32': 4,
  'U64': 8,
  'I64': 8,
  'F64': 8,
}
# Those that weights are read from.
_WEIGHT_DTYPES = {
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F32': np.dtype('<f4'),
  'F64': np.dtype('<f8'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """Where one tensor lies.

  Attributes:
    path: The file.
    start: First byte of its data in the file.
    shape: Its shape, row-major.
    dtype: Its type as the format names it, e.g. 'BF16'.
  """

  path: str
  start: int
  shape: tuple[int, ...]
  dtype: str

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def is_safetensors(path: os.PathLike | str) -> bool:
  """Whether the first bytes of a file look like a safetensors header."""
  with open(path, 'rb') as f:
    head = f.read(9)
  return len(head) == 9 and head[8:9] == b'{' and head[6:8] == b'\0\0'


def read_header(path: os.PathLike | str) -> dict[str, Entry]:
  """Reads and checks the header of one file.

  Args:
    path: A .safetensors file.

  Returns:
    Name -> entry, in the order of the file's bytes.

  Raises:
    TruncatedFileError: If the file ends before the data its header promises.
    HeaderTooLargeError: If a length in it exceeds what the file can hold.
    HeaderError: If the header is malformed, or leaves bytes that no tensor
      claims.
    OverlappingTensorsError: If two tensors claim the same bytes.
    UnsupportedTypeError: If a tensor has a type that is not of the format.
  """
  path = os.fspath(path)
  header, data_start, file_bytes = _read_json(path)
  header.pop('__metadata__', None)
  entries = {}
  spans = []
  for name, value in header.items():
    what = f'{path}: tensor {name!r}'
    dtype, shape, begin, end = _check_fields(value, what)
    if data_start + end > file_bytes:
      raise errors.TruncatedFileError(
        f'{what} ends at byte {data_start + end}, but the file has'
        f' {file_bytes} bytes. Download it again.'
      )
    entry = Entry(path=path, start=data_start + begin, shape=shape, dtype=dtype)
    if end - begin != entry.nbytes:
      raise errors.TensorShapeError(
        f'{what}: shape {list(shape)} of {dtype} is {entry.nbytes} bytes, but'
        f' data_offsets give {end - begin}.'
      )
    entries[name] = entry
    spans.append((begin, end, name))
  _check_spans(spans, file_bytes - data_start, path)
  return {name: entries[name] for _, _, name in sorted(spans)}


def _read_json(path: str) -> tuple[dict[str, Any], int, int]:
  """Returns the header, where the data begins, and the size of the file."""
  try:
    status = os.stat(path)
  except OSError as e:
    raise errors.CheckpointNotFoundError(f'{path}: {e.strerror}.') from e
  if not stat.S_ISREG(status.st_mode):
    raise errors.UnknownFormatError(f'{path} is not a regular file.')
  file_bytes = status.st_size
  if file_bytes < 8:
    raise errors.TruncatedFileError(
      f'{path} has {file_bytes} bytes; a safetensors file has at least 8.'
    )
  with open(path, 'rb') as f:
    (length,) = struct.unpack('<Q', f.read(8))
    if length > min(_MAX_HEADER_BYTES, file_bytes - 8):
      raise errors.HeaderTooLargeError(
        f'{path}: its header claims {length} bytes, but the file has'
        f' {file_bytes} and at most {_MAX_HEADER_BYTES} are accepted.'
      )
    data = f.read(length)
  return _strict_json.parse_object(data, what=path), 8 + length, file_bytes


def _check_fields(
  value: Any, what: str
) -> tuple[str, tuple[int, ...], int, int]:
  """Checks one entry of the header by itself."""
  if not isinstance(value, dict):
    raise errors.HeaderError(f'{what}: expected an object, got {value!r:.100}.')
  if value.keys() != {'dtype', 'shape', 'data_offsets'}:
    raise errors.HeaderError(
      f'{what}: expected the keys dtype, shape and data_offsets, got'
      f' {sorted(value)!r:.200}.'
    )
  dtype, shape = value['dtype'], value['shape']
  if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
    raise errors.UnsupportedTypeError(
      f'{what}: unknown type {dtype!r:.50}. Known: {sorted(_ITEM_BYTES)}.'
    )
  if not isinstance(shape, list) or len(shape) > _MAX_RANK:
    raise errors.HeaderError(
      f'{what}: shape must be a list of at most {_MAX_RANK} sizes, got'
      f' {shape!r:.100}.'
    )
  _check_ints(shape, f'{what}: shape')
  offsets = value['data_offsets']
  if not isinstance(offsets, list) or len(offsets) != 2:
    raise errors.HeaderError(
      f'{what}: data_offsets must be [begin, end], got {offsets!r:.100}.'
    )
  _check_ints(offsets, f'{what}: data_offsets')
  begin, end = offsets
  if begin > end:
    raise errors.HeaderError(f'{what}: data_offsets run backwards: {offsets}.')
  return dtype, tuple(shape), begin, end


def _check_ints(values: list[Any], what: str) -> None:
  """Checks that all are integers, neither negative nor absurd."""
  for v in values:
    if isinstance(v, bool) or not isinstance(v, int) or v < 0:
      raise errors.HeaderError(
        f'{what} must hold integers of at least 0, got {values!r:.100}.'
      )
    if v > _MAX_DIM:
      raise errors.HeaderTooLargeError(
        f'{what} holds {v!r:.50}, more than {_MAX_DIM}.'
      )


def _check_spans(
  spans: list[tuple[int, int, str]], data_bytes: int, path: str
) -> None:
  """Checks that the tensors tile the data: no overlap, no hole, no rest."""
  at, before = 0, 'the header'
  for begin, end, name in sorted(spans):
    if begin < at:
      raise errors.OverlappingTensorsError(
        f'{path}: tensors {before!r} and {name!r} overlap: the second begins'
        f' at {begin}, the first ends at {at}.'
      )
    if begin > at:
      raise errors.HeaderError(
        f'{path}: bytes {at} to {begin} of the data, before tensor {name!r},'
        ' belong to no tensor.'
      )
    at, before = end, name
  if at != data_bytes:
    raise errors.HeaderError(
      f'{path}: the last {data_bytes - at} bytes belong to no tensor.'
    )


def read_rows(
  entry: Entry, start: int = 0, stop: int | None = None, *, name: str = ''
) -> np.ndarray:
  """Reads rows [start, stop) along the first axis of a tensor.

  Args:
    entry: Where the tensor lies.
    start: First row.
    stop: One past the last row. `None` reads to the end.
    name: What to call the tensor in errors.

  Returns:
    An array of shape [stop - start, *entry.shape[1:]] in the tensor's own
    type; the only memory allocated. A tensor without axes counts as one row
    and comes back as [1].

  Raises:
    UnsupportedTypeError: If the tensor does not hold floating-point numbers.
    TruncatedFileError: If the file has shrunk since its header was read.
  """
  if entry.dtype not in _WEIGHT_DTYPES:
    raise errors.UnsupportedTypeError(
      f'{entry.path}: tensor {name!r} has type {entry.dtype}; weights are'
      f' read from {sorted(_WEIGHT_DTYPES)}. A checkpoint quantised by'
      ' another library must be exported as BF16 first.'
    )
  shape = entry.shape or (1,)
  stop = shape[0] if stop is None else stop
  dtype = _WEIGHT_DTYPES[entry.dtype]
  row_bytes = math.prod(shape[1:]) * dtype.itemsize
  out = np.empty((stop - start, *shape[1:]), dtype)
  if not out.nbytes:
    return out
  view = memoryview(out.reshape(-1).view(np.uint8))
  with open(entry.path, 'rb', buffering=0) as f:
    at = entry.start + start * row_bytes
    while view:
      n = os.preadv(f.fileno(), [view[: 1 << 30]], at)
      if not n:
        raise errors.TruncatedFileError(
          f'{entry.path} ends inside tensor {name!r}.'
        )
      view, at = view[n:], at + n
  return out


def check_file_name(name: Any, *, where: str) -> str:
  """Returns `name` if it names a file directly inside a directory.

  Args:
    name: What a checkpoint names.
    where: The file that names it, for the error.

  Raises:
    PathEscapeError: If it could point anywhere else.
  """
  if (
    not isinstance(name, str)
    or not name
    or name in ('.', '..')
    or any(c in name for c in '/\\\0:')
  ):
    raise errors.PathEscapeError(
      f'{where} names the file {name!r:.200}; expected the name of a file in'
      ' the same directory.'
    )
  return name


def read_directory(directory: os.PathLike | str) -> dict[str, Entry]:
  """Reads the headers of a directory of safetensors files.

  Takes `model.safetensors.index.json` and the shards that it names if there
  is one, else `model.safetensors`, else the only .safetensors file.

  Args:
    directory: A local directory.

  Returns:
    Name -> entry.

  Raises:
    MissingTensorError: If a shard, or a tensor that the index promises, is
      missing, or if there is no weight file.
    PathEscapeError: If the index names a file outside of the directory.
    CheckpointError: As `read_header`.
  """
  directory = pathlib.Path(directory)
  index = directory / INDEX_NAME
  if index.exists():
    return _read_shards(directory, index)
  single = directory / SINGLE_NAME
  if single.exists():
    return read_header(single)
  files = sorted(p for p in directory.iterdir() if p.suffix == SUFFIX)
  if len(files) != 1:
    raise errors.MissingTensorError(
      f'{directory} has neither {INDEX_NAME} nor {SINGLE_NAME}, and'
      f' {len(files)} other {SUFFIX} files where one was expected.'
    )
  return read_header(files[0])


def _read_shards(
  directory: pathlib.Path, index: pathlib.Path
) -> dict[str, Entry]:
  """Reads every shard that an index names."""
  weight_map = _strict_json.read_object(index, limit=_MAX_INDEX_BYTES).get(
    'weight_map'
  )
  if not isinstance(weight_map, Mapping) or not weight_map:
    raise errors.HeaderError(
      f'{index}: expected a "weight_map" of tensor names to files, got'
      f' {weight_map!r:.100}.'
    )
  names: dict[str, list[str]] = {}
  for tensor, shard in weight_map.items():
    check_file_name(shard, where=str(index))
    names.setdefault(shard, []).append(tensor)
  missing = [s for s in sorted(names) if not (directory / s).exists()]
  if missing:
    raise errors.MissingTensorError(
      f'{directory} lacks {len(missing)} of the {len(names)} shards that'
      f' {INDEX_NAME} names: {", ".join(missing[:5])}.'
    )
  out = {}
  for shard, tensors in sorted(names.items()):
    header = read_header(directory / shard)
    for tensor in tensors:
      if tensor not in header:
        raise errors.MissingTensorError(
          f'{index} promises tensor {tensor!r:.200} in {shard}, which does'
          ' not hold it.'
        )
      out[tensor] = header[tensor]
  return out
