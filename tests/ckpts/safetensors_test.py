# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Safetensors: what is read, and every way to be refused."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gemma_ext import errors
from gemma_ext.ckpts import _safetensors
from tests.ckpts import hf_fixtures

_E = hf_fixtures.entry


def _write(path, header, data=b'', **kwargs):
  path.write_bytes(hf_fixtures.pack(header, data, **kwargs))
  return path


# ----------------------------------- read ------------------------------------


def test_reads_what_the_official_writer_wrote(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {
    'f32': rng.standard_normal((5, 3)).astype(np.float32),
    'f16': rng.standard_normal((7,)).astype(np.float16),
    'f64': rng.standard_normal((2, 2, 2)),
    'bf16': rng.standard_normal((3, 4)).astype(ml_dtypes.bfloat16),
    'empty': np.zeros((0, 4), np.float32),
  }
  path = tmp_path / 'x.safetensors'
  safetensors.numpy.save_file(tensors, path, metadata={'format': 'np'})
  header = _safetensors.read_header(path)
  assert set(header) == set(tensors)
  for name, expected in tensors.items():
    got = _safetensors.read_rows(header[name])
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
  np.testing.assert_array_equal(
    _safetensors.read_rows(header['f32'], 1, 4), tensors['f32'][1:4]
  )


@pytest.mark.parametrize(
  'name, dtype',
  [('F8_E4M3', ml_dtypes.float8_e4m3fn), ('F8_E5M2', ml_dtypes.float8_e5m2)],
)
def test_reads_float8(tmp_path, name, dtype):
  values = np.array([[1.5, -2.0], [0.25, 3.5]], dtype)
  path = _write(tmp_path / 'x', {'w': _E([2, 2], 0, 4, name)}, values.tobytes())
  got = _safetensors.read_rows(_safetensors.read_header(path)['w'])
  np.testing.assert_array_equal(
    got.astype(np.float32), [[1.5, -2.0], [0.25, 3.5]]
  )


def test_a_scalar_is_one_row(tmp_path):
  path = _write(tmp_path / 'x', {'w': _E([], 0, 4)}, b'\0\0\x80?')
  got = _safetensors.read_rows(_safetensors.read_header(path)['w'])
  assert got.tolist() == [1.0]


def test_rows_allocate_only_themselves(tmp_path):
  path = _write(tmp_path / 'x', {'w': _E([1000, 10], 0, 40000)}, bytes(40000))
  entry = _safetensors.read_header(path)['w']
  assert _safetensors.read_rows(entry, 998).nbytes == 80


# ---------------------------------- refuse -----------------------------------

_DEEP = b'{"w":' + b'[' * 200_000 + b']' * 200_000 + b'}'
_BAD_HEADERS = {
  'not_json': (b'{"w": ', errors.HeaderError),
  'not_utf8': (b'{"\xff": 1}', errors.HeaderError),
  'not_an_object': (b'[1, 2]', errors.HeaderError),
  'nested_too_deep': (_DEEP, errors.HeaderError),
  'integer_too_long': (
    b'{"w": ' + b'9' * 5000 + b'}',
    errors.HeaderError,
  ),
  'nan_constant': (b'{"w": NaN}', errors.HeaderError),
  'entry_not_an_object': ({'w': 3}, errors.HeaderError),
  'key_missing': (
    {'w': {'dtype': 'F32', 'shape': [1]}},
    errors.HeaderError,
  ),
  'key_unknown': (
    {'w': _E([1], 0, 4) | {'stride': 1}},
    errors.HeaderError,
  ),
  'dtype_unknown': ({'w': _E([1], 0, 4, 'F4')}, errors.UnsupportedTypeError),
  'dtype_not_a_string': (
    {'w': _E([1], 0, 4) | {'dtype': ['F32']}},
    errors.UnsupportedTypeError,
  ),
  'shape_not_a_list': (
    {'w': _E([1], 0, 4) | {'shape': 1}},
    errors.HeaderError,
  ),
  'shape_negative': ({'w': _E([-1, -1], 0, 4)}, errors.HeaderError),
  'shape_bool': ({'w': _E([True], 0, 4)}, errors.HeaderError),
  'shape_float': ({'w': _E([1.0], 0, 4)}, errors.HeaderError),
  'shape_huge': ({'w': _E([1 << 60], 0, 4)}, errors.HeaderTooLargeError),
  'shape_overflowing': (
    {'w': _E([1 << 40, 1 << 40, 1 << 40], 0, 4)},
    errors.TensorShapeError,
  ),
  'rank_too_large': ({'w': _E([1] * 9, 0, 4)}, errors.HeaderError),
  'offsets_not_a_pair': (
    {'w': _E([1], 0, 4) | {'data_offsets': [0]}},
    errors.HeaderError,
  ),
  'offsets_backwards': ({'w': _E([1], 4, 0)}, errors.HeaderError),
  'offsets_negative': ({'w': _E([1], -4, 0)}, errors.HeaderError),
  'offsets_beyond_the_file': (
    {'w': _E([1], 0, 4), 'v': _E([4], 4, 20)},
    errors.TruncatedFileError,
  ),
  'size_is_not_shape_times_type': (
    {'w': _E([2], 0, 4)},
    errors.TensorShapeError,
  ),
  'overlapping': (
    {'w': _E([2], 0, 8), 'v': _E([1], 4, 8)},
    errors.OverlappingTensorsError,
  ),
  'same_bytes_twice': (
    {'w': _E([2], 0, 8), 'v': _E([2], 0, 8)},
    errors.OverlappingTensorsError,
  ),
  'hole_at_the_start': ({'w': _E([1], 4, 8)}, errors.HeaderError),
  'rest_at_the_end': ({'w': _E([1], 0, 4)}, errors.HeaderError),
}


@pytest.mark.parametrize('case', sorted(_BAD_HEADERS))
def test_bad_header(tmp_path, case):
  header, error = _BAD_HEADERS[case]
  size = 4 if case == 'size_is_not_shape_times_type' else 8
  path = _write(tmp_path / 'x', header, bytes(size))
  with pytest.raises(error) as e:
    _safetensors.read_header(path)
  assert e.type is error


def test_duplicate_key(tmp_path):
  one = json.dumps(_E([1], 0, 4))
  header = f'{{"w": {one}, "w": {one}}}'.encode()
  with pytest.raises(errors.HeaderError, match="'w' appears twice"):
    _safetensors.read_header(_write(tmp_path / 'x', header, bytes(4)))


def test_hole_between_tensors(tmp_path):
  header = {'w': _E([1], 0, 4), 'v': _E([1], 8, 12)}
  with pytest.raises(errors.HeaderError, match='bytes 4 to 8'):
    _safetensors.read_header(_write(tmp_path / 'x', header, bytes(12)))


@pytest.mark.parametrize('length', [9, 1 << 20, 200_000_000, (1 << 64) - 1])
def test_header_too_large(tmp_path, length):
  path = _write(tmp_path / 'x', b'{}', length=length)
  with pytest.raises(errors.HeaderTooLargeError):
    _safetensors.read_header(path)


@pytest.mark.parametrize('size', [0, 1, 7])
def test_shorter_than_the_length_field(tmp_path, size):
  path = tmp_path / 'x'
  path.write_bytes(bytes(size))
  with pytest.raises(errors.TruncatedFileError):
    _safetensors.read_header(path)


def test_data_cut_off(tmp_path):
  source = hf_fixtures.DATA / 'gemma2' / 'model.safetensors'
  path = tmp_path / 'x'
  path.write_bytes(source.read_bytes()[:-1])
  with pytest.raises(errors.TruncatedFileError):
    _safetensors.read_header(path)


def test_file_shrinks_after_its_header_was_read(tmp_path):
  path = _write(tmp_path / 'x', {'w': _E([2], 0, 8)}, bytes(8))
  entry = _safetensors.read_header(path)['w']
  os.truncate(path, path.stat().st_size - 4)
  with pytest.raises(errors.TruncatedFileError, match="inside tensor 'w'"):
    _safetensors.read_rows(entry, name='w')


def test_integers_are_no_weights(tmp_path):
  path = _write(tmp_path / 'x', {'w': _E([4], 0, 4, 'I8')}, bytes(4))
  entry = _safetensors.read_header(path)['w']
  with pytest.raises(errors.UnsupportedTypeError, match='I8'):
    _safetensors.read_rows(entry)


def test_fifo_is_refused_without_opening_it(tmp_path):
  os.mkfifo(tmp_path / 'x')
  with pytest.raises(errors.UnknownFormatError):
    _safetensors.read_header(tmp_path / 'x')


# ---------------------------------- shards -----------------------------------


def _sharded(tmp_path):
  return hf_fixtures.copy('gemma3_text', tmp_path)


def test_reads_shards():
  entries = _safetensors.read_directory(hf_fixtures.DATA / 'gemma3_text')
  assert len({e.path for e in entries.values()}) == 3
  assert entries['model.embed_tokens.weight'].shape == (60, 20)


def test_one_file_of_another_name(tmp_path):
  _write(tmp_path / 'weights.safetensors', {'w': _E([1], 0, 4)}, bytes(4))
  assert set(_safetensors.read_directory(tmp_path)) == {'w'}


def test_several_files_without_index(tmp_path):
  for name in 'ab':
    _write(tmp_path / f'{name}.safetensors', {'w': _E([1], 0, 4)}, bytes(4))
  with pytest.raises(errors.MissingTensorError, match='2 other'):
    _safetensors.read_directory(tmp_path)


def test_shard_missing(tmp_path):
  path = _sharded(tmp_path)
  (path / 'model-00002-of-00003.safetensors').unlink()
  with pytest.raises(errors.MissingTensorError, match='1 of the 3 shards'):
    _safetensors.read_directory(path)


@pytest.mark.parametrize(
  'name',
  [
    '../model.safetensors',
    '/etc/passwd',
    'sub/model.safetensors',
    'sub\\model.safetensors',
    '..',
    '',
    'C:model.safetensors',
    'x\0.safetensors',
    7,
    None,
  ],
)
def test_path_escape(tmp_path, name):
  index = _sharded(tmp_path) / _safetensors.INDEX_NAME
  hf_fixtures.edit_json(index, weight_map={'w': name})
  with pytest.raises(errors.PathEscapeError):
    _safetensors.read_directory(index.parent)


def test_index_promises_a_tensor_that_the_shard_lacks(tmp_path):
  index = _sharded(tmp_path) / _safetensors.INDEX_NAME
  hf_fixtures.edit_json(
    index, weight_map={'model.no.such': 'model-00001-of-00003.safetensors'}
  )
  with pytest.raises(errors.MissingTensorError, match='model.no.such'):
    _safetensors.read_directory(index.parent)


@pytest.mark.parametrize('weight_map', [None, {}, [], 'x'])
def test_index_without_weight_map(tmp_path, weight_map):
  index = _sharded(tmp_path) / _safetensors.INDEX_NAME
  hf_fixtures.edit_json(index, weight_map=weight_map)
  with pytest.raises(errors.HeaderError):
    _safetensors.read_directory(index.parent)


def test_index_too_large(tmp_path, monkeypatch):
  monkeypatch.setattr(_safetensors, '_MAX_INDEX_BYTES', 100)
  with pytest.raises(errors.HeaderTooLargeError):
    _safetensors.read_directory(_sharded(tmp_path))
