# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of assembling the sample checkpoint from its packages."""

import hashlib
import sys

import pytest

from gemma_ext import errors
from gemma_ext.ckpts import _sample


@pytest.fixture
def packages(tmp_path, monkeypatch):
  """Four small packages in place of the real ones, and their content's hash."""
  root = tmp_path / 'site'
  parts = []
  content = b''
  for i in range(4):
    name = f'gemma_ext_fake_part{i}_{tmp_path.name}'.replace('-', '_')
    data = root / name / 'data'
    data.mkdir(parents=True)
    (root / name / '__init__.py').write_text('')
    (data / f'part{i}').write_bytes(bytes([i]) * 1000)
    content += bytes([i]) * 1000
    parts.append((name, f'part{i}'))
  monkeypatch.syspath_prepend(str(root))
  monkeypatch.setenv('GEMMA_EXT_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(_sample, '_PARTS', tuple(parts))
  monkeypatch.setattr(_sample, 'SHA256', hashlib.sha256(content).hexdigest())
  yield root, parts, content
  for name, _ in parts:
    sys.modules.pop(name, None)


def test_assembles_in_order_and_once(packages, monkeypatch):
  _, _, content = packages
  path = _sample.sample_path()
  assert path.read_bytes() == content
  assert sorted(p.name for p in path.parent.iterdir()) == [
    path.name,
    f'{path.name}.stamp.json',
  ]
  monkeypatch.setattr(_sample, '_PARTS', ())
  assert _sample.sample_path() == path


def test_changed_file_is_assembled_again(packages):
  _, _, content = packages
  path = _sample.sample_path()
  path.write_bytes(b'x' * len(content))
  assert _sample.sample_path().read_bytes() == content


def test_damaged_stamp_is_ignored(packages):
  path = _sample.sample_path()
  stamp = path.with_name(f'{path.name}.stamp.json')
  stamp.write_bytes(b'{')
  assert _sample.sample_path() == path
  assert stamp.read_bytes() != b'{'


def test_wrong_hash(packages):
  root, parts, _ = packages
  (root / parts[2][0] / 'data' / parts[2][1]).write_bytes(b'?')
  with pytest.raises(errors.ChecksumError, match='force-reinstall'):
    _sample.sample_path()
  assert not any(
    p.suffix == '.gguf' for p in _sample._cache.cache_dir().rglob('*')
  )


def test_parts_that_are_far_too_long(packages, monkeypatch):
  monkeypatch.setattr(_sample, '_MAX_BYTES', 2500)
  with pytest.raises(errors.ChecksumError, match='longer than'):
    _sample.sample_path()


def test_missing_part(packages):
  root, parts, _ = packages
  (root / parts[1][0] / 'data' / parts[1][1]).unlink()
  with pytest.raises(errors.CheckpointNotFoundError, match='part1'):
    _sample.sample_path()


def test_missing_package(packages, monkeypatch):
  monkeypatch.setattr(_sample, '_PARTS', (('gemma_ext_no_such_package', 'x'),))
  with pytest.raises(errors.OptionalDependencyError, match=r'\[samples\]'):
    _sample.sample_path()
