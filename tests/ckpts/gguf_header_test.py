# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the GGUF header parser: what is right, and every way to be wrong."""

import io
import struct
import time

import gguf
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext.ckpts import _gguf_header
from tests import tiny
from tests.ckpts import gguf_fixtures as fx

_U32, _I32, _F32, _BOOL, _STR, _ARR, _U64 = 4, 5, 6, 7, 8, 9, 10


def _read(tmp_path, raw: bytes) -> _gguf_header.Header:
  path = tmp_path / 'x.gguf'
  path.write_bytes(raw)
  with path.open('rb', buffering=0) as file:
    return _gguf_header.read_header(file)


def _u32(key, value):
  return fx.pair(key, _U32, struct.pack('<I', value))


def _array(kind, count, data=b''):
  return struct.pack('<IQ', kind, count) + data


def test_agrees_with_the_gguf_package(tmp_path):
  path = tmp_path / 'tiny.gguf'
  model = tiny.model('gemma3')
  fx.write(path, model, fx.exact(tiny.params(model)))
  with path.open('rb', buffering=0) as file:
    header = _gguf_header.read_header(file)
  reader = gguf.GGUFReader(path)
  assert list(header.tensors) == [t.name for t in reader.tensors]
  for theirs in reader.tensors:
    ours = header.tensors[theirs.name]
    assert ours.shape == tuple(reversed(theirs.shape.tolist()))
    assert ours.offset == theirs.data_offset
    assert ours.nbytes == theirs.n_bytes
    assert ours.kind == theirs.tensor_type
  for key, value in header.metadata.items():
    expected = reader.fields[key].contents()
    if isinstance(value, list):
      assert [v.decode() for v in value] == expected
    elif isinstance(value, np.ndarray):
      np.testing.assert_array_equal(value, expected)
    else:
      assert value == expected, key
  keys = {k for k in reader.fields if not k.startswith('GGUF.')}
  assert set(header.metadata) == keys


def test_every_scalar_type(tmp_path):
  values = {
    0: ('<B', 200),
    1: ('<b', -3),
    2: ('<H', 60_000),
    3: ('<h', -30_000),
    4: ('<I', 1 << 31),
    5: ('<i', -(1 << 31)),
    6: ('<f', 0.5),
    7: ('<B', 1),
    10: ('<Q', 1 << 63),
    11: ('<q', -(1 << 63)),
    12: ('<d', 0.1),
  }
  pairs = tuple(
    fx.pair(f'k{kind}', kind, struct.pack(code, value))
    for kind, (code, value) in values.items()
  ) + tuple(
    fx.pair(f'a{kind}', _ARR, _array(kind, 2, struct.pack(code, value) * 2))
    for kind, (code, value) in values.items()
  )
  meta = _read(tmp_path, fx.header(pairs)).metadata
  for kind, (_, value) in values.items():
    assert meta[f'k{kind}'] == value
    assert meta[f'a{kind}'].tolist() == [value, value]
  assert meta['k7'] is True


def test_strings_longer_than_the_read_buffer(tmp_path):
  texts = [b'x' * n for n in (0, 1, 3_000_000, 2, 1 << 20, 5)] * 2
  raw = b''.join(fx.string(t) for t in texts)
  pairs = (
    fx.pair('a', _ARR, _array(_STR, len(texts), raw)),
    _u32('after', 7),
  )
  meta = _read(tmp_path, fx.header(pairs)).metadata
  assert meta == {'a': texts, 'after': 7}


def test_nested_arrays(tmp_path):
  inner = _array(_I32, 2, struct.pack('<2i', 1, 2))
  pairs = (fx.pair('a', _ARR, _array(_ARR, 2, inner + inner)),)
  value = _read(tmp_path, fx.header(pairs)).metadata['a']
  assert [v.tolist() for v in value] == [[1, 2], [1, 2]]


def test_alignment_key(tmp_path):
  pairs = (_u32('general.alignment', 64),)
  raw = fx.header(pairs, (fx.tensor_info('t', (4,), offset=64),))
  raw += bytes(-len(raw) % 64) + bytes(64 + 16)
  info = _read(tmp_path, raw).tensors['t']
  assert info.offset % 64 == 0
  assert info.offset + info.nbytes == len(raw)


def test_version_2(tmp_path):
  assert _read(tmp_path, fx.header(version=2)).version == 2


_DEEP = _array(_ARR, 1, _array(_ARR, 1, _array(_ARR, 1, _array(_U32, 0))))
_HUGE = (1 << 62) - 1

_BAD = {
  'empty_file': (b'', errors.UnknownFormatError),
  'only_magic': (b'GGUF', errors.UnknownFormatError),
  'bad_magic': (fx.header(magic=b'GGML'), errors.UnknownFormatError),
  'version_1': (fx.header(version=1), errors.HeaderError),
  'version_4': (fx.header(version=4), errors.HeaderError),
  'big_endian': (fx.header(version=3 << 24), errors.HeaderError),
  'tensor_count_too_large': (
    fx.header(num_tensors=_HUGE),
    errors.HeaderTooLargeError,
  ),
  'pair_count_too_large': (
    fx.header(num_pairs=_HUGE),
    errors.HeaderTooLargeError,
  ),
  'pair_count_beyond_the_file': (
    fx.header((_u32('a', 1),), num_pairs=2)[:40],
    errors.HeaderTooLargeError,
  ),
  'key_length_too_large': (
    fx.header((struct.pack('<Q', _HUGE) + bytes(32),)),
    errors.HeaderTooLargeError,
  ),
  'key_not_utf8': (
    fx.header((fx.pair(b'\xff\xfe', _U32, bytes(4)),)),
    errors.HeaderError,
  ),
  'duplicate_key': (
    fx.header((_u32('a', 1), _u32('a', 2))),
    errors.HeaderError,
  ),
  'unknown_value_type': (
    fx.header((fx.pair('a', 13, bytes(8)),)),
    errors.HeaderError,
  ),
  'boolean_of_two': (
    fx.header((fx.pair('a', _BOOL, b'\2'),)),
    errors.HeaderError,
  ),
  'boolean_array_of_two': (
    fx.header((fx.pair('a', _ARR, _array(_BOOL, 2, b'\1\2')),)),
    errors.HeaderError,
  ),
  'string_length_too_large': (
    fx.header((fx.pair('a', _STR, struct.pack('<Q', _HUGE)),)),
    errors.HeaderTooLargeError,
  ),
  'string_not_utf8': (
    fx.header((fx.pair('a', _STR, fx.string(b'\xc3\x28')),)),
    errors.HeaderError,
  ),
  'array_of_unknown_type': (
    fx.header((fx.pair('a', _ARR, _array(99, 1, bytes(8))),)),
    errors.HeaderError,
  ),
  'array_count_too_large': (
    fx.header((fx.pair('a', _ARR, _array(_F32, _HUGE)),)),
    errors.HeaderTooLargeError,
  ),
  'string_array_count_too_large': (
    fx.header((fx.pair('a', _ARR, _array(_STR, 1 << 40)),)),
    errors.HeaderTooLargeError,
  ),
  'string_in_array_too_long': (
    fx.header(
      (fx.pair('a', _ARR, _array(_STR, 1, struct.pack('<Q', 1 << 50))),)
    ),
    errors.HeaderTooLargeError,
  ),
  'arrays_nested_too_deep': (
    fx.header((fx.pair('a', _ARR, _DEEP),)),
    errors.HeaderError,
  ),
  'nested_array_count_too_large': (
    fx.header((fx.pair('a', _ARR, _array(_ARR, 1 << 58)),)),
    errors.HeaderTooLargeError,
  ),
  'truncated_scalar': (
    fx.header((fx.pair('abcdefgh', _U64, bytes(8)),))[:48],
    errors.TruncatedFileError,
  ),
  'alignment_zero': (
    fx.header((_u32('general.alignment', 0),)),
    errors.HeaderError,
  ),
  'alignment_not_a_power_of_two': (
    fx.header((_u32('general.alignment', 48),)),
    errors.HeaderError,
  ),
  'alignment_too_large': (
    fx.header((_u32('general.alignment', 1 << 31),)),
    errors.HeaderError,
  ),
  'alignment_a_string': (
    fx.header((fx.pair('general.alignment', _STR, fx.string('32')),)),
    errors.HeaderError,
  ),
  'tensor_name_too_long': (
    fx.header((), (fx.tensor_info('x' * 300),), data=128),
    errors.HeaderTooLargeError,
  ),
  'tensor_name_not_utf8': (
    fx.header((), (fx.tensor_info(b'\xff'),), data=128),
    errors.HeaderError,
  ),
  'no_dimensions': (
    fx.header((), (fx.tensor_info('t', ()),), data=128),
    errors.HeaderError,
  ),
  'five_dimensions': (
    fx.header((), (fx.tensor_info('t', (2,) * 5),), data=128),
    errors.HeaderError,
  ),
  'dimension_count_too_large': (
    fx.header((), (fx.tensor_info('t', (2,), num_dims=1 << 31),), data=128),
    errors.HeaderError,
  ),
  'dimension_zero': (
    fx.header((), (fx.tensor_info('t', (32, 0)),), data=128),
    errors.HeaderTooLargeError,
  ),
  'dimensions_overflow_64_bits': (
    fx.header((), (fx.tensor_info('t', (1 << 33, 1 << 33)),), data=128),
    errors.HeaderTooLargeError,
  ),
  'unknown_tensor_type': (
    fx.header((), (fx.tensor_info('t', kind=4),), data=128),
    errors.UnsupportedTypeError,
  ),
  'tensor_type_beyond_all': (
    fx.header((), (fx.tensor_info('t', kind=1 << 31),), data=128),
    errors.UnsupportedTypeError,
  ),
  'row_is_no_multiple_of_the_block': (
    fx.header((), (fx.tensor_info('t', (33, 2), kind=8),), data=128),
    errors.HeaderError,
  ),
  'offset_not_aligned': (
    fx.header((), (fx.tensor_info('t', offset=8),), data=256),
    errors.HeaderError,
  ),
  'offset_beyond_the_file': (
    fx.header((), (fx.tensor_info('t', offset=1 << 60),), data=256),
    errors.TruncatedFileError,
  ),
  'data_truncated': (
    fx.header((), (fx.tensor_info('t'),), data=127),
    errors.TruncatedFileError,
  ),
  'duplicate_tensor': (
    fx.header(
      (),
      (fx.tensor_info('t'), fx.tensor_info('t', offset=128)),
      data=256,
    ),
    errors.HeaderError,
  ),
  'overlapping_tensors': (
    fx.header(
      (),
      (fx.tensor_info('a'), fx.tensor_info('b', offset=96)),
      data=256,
    ),
    errors.OverlappingTensorsError,
  ),
  'same_bytes_twice': (
    fx.header((), (fx.tensor_info('a'), fx.tensor_info('b')), data=256),
    errors.OverlappingTensorsError,
  ),
}


@pytest.mark.parametrize('name', _BAD)
def test_bad_header(tmp_path, name):
  raw, error = _BAD[name]
  with pytest.raises(error) as info:
    _read(tmp_path, raw)
  assert type(info.value) is error
  assert len(str(info.value)) > 20


def test_header_longer_than_the_limit(tmp_path, monkeypatch):
  monkeypatch.setattr(_gguf_header, 'MAX_HEADER_BYTES', 1 << 16)
  raw = fx.header((fx.pair('a', _ARR, _array(0, 1 << 17, bytes(1 << 17))),))
  with pytest.raises(errors.HeaderTooLargeError, match='longer than'):
    _read(tmp_path, raw)


def test_every_truncation_of_a_header_is_an_error(tmp_path):
  raw = fx.header(
    (
      _u32('a', 1),
      fx.pair('b', _STR, fx.string('text')),
      fx.pair('c', _ARR, _array(_STR, 2, fx.string('x') + fx.string('yz'))),
    ),
    (fx.tensor_info('t', (32, 2)),),
    data=256,
  )
  assert _read(tmp_path, raw).metadata['c'] == [b'x', b'yz']
  for n in range(len(raw)):
    with pytest.raises(errors.CheckpointError):
      _read(tmp_path, raw[:n])


def test_a_large_vocabulary_takes_under_two_seconds(tmp_path):
  texts = io.BytesIO()
  for i in range(262_144):
    texts.write(fx.string(f'token{i}'))
  raw = fx.header(
    (fx.pair('t', _ARR, _array(_STR, 262_144, texts.getvalue())),)
  )
  start = time.process_time()
  tokens = _read(tmp_path, raw).metadata['t']
  assert time.process_time() - start < 2.0  # 0.1 s on two idle cores.
  assert tokens[-1] == b'token262143'
