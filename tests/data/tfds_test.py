# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of `tfds:NAME` on a tiny data set that is built here."""

import builtins

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gemma_ext import data
from gemma_ext import errors


class TinyPassages(tfds.core.GeneratorBasedBuilder):
  """Five passages, two of them the test split."""

  VERSION = tfds.core.Version('1.0.0')
  pkg_dir_path = ''

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'passage': tfds.features.Text(),
          'label': tfds.features.Scalar(np.int64),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._rows(range(3)), 'test': self._rows(range(3, 5))}

  def _rows(self, numbers):
    for i in numbers:
      yield i, {'passage': f'Passage {i} ä.', 'label': i}

  def _generate_examples(self, *args, **kwargs):
    raise AssertionError('the split generators yield the examples')


@pytest.fixture(autouse=True, scope='module')
def prepared(tmp_path_factory):
  path = tmp_path_factory.mktemp('tfds')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TFDS_DATA_DIR', str(path))
    builder = TinyPassages(data_dir=path)
    builder.download_and_prepare()
    real = tfds.builder
    patch.setattr(
      tfds,
      'builder',
      lambda name: builder if name == 'tiny_passages' else real(name),
    )
    yield


@pytest.mark.parametrize(
  'spec, expected',
  [
    ('tfds:tiny_passages', {3, 4}),
    ('tfds:tiny_passages:train', {0, 1, 2}),
    ('tfds:tiny_passages:train[:2]', {0, 1}),
  ],
)
def test_splits(spec, expected):
  documents = data.load_documents(spec, text_field='passage')
  # TFDS shuffles what it prepares; a slice is of the shuffled order.
  assert len(documents) == len(expected)
  numbers = {int(d.text.split()[1]) for d in documents}
  assert all(d.text.endswith('ä.') for d in documents)
  if '[' not in spec:
    assert numbers == expected
  assert documents[0].id.startswith('tiny_passages:')


@pytest.mark.parametrize(
  'spec, field, message',
  [
    ('tfds:tiny_passages', 'text', r"no field 'text'.*'passage'"),
    ('tfds:tiny_passages', 'label', 'is not text but'),
    ('tfds:tiny_passages:dev', 'passage', r"no split 'dev'.*'train'"),
    ('tfds:no_such_data_set', 'text', 'TFDS knows no data set'),
    ('tfds:', 'text', 'names no data set'),
  ],
)
def test_errors(spec, field, message):
  with pytest.raises(errors.DataError, match=message):
    data.load_documents(spec, text_field=field)


def test_failed_preparation(monkeypatch):
  class Broken:
    @property
    def data_path(self):
      raise ConnectionError('no network')

  monkeypatch.setattr(tfds, 'builder', lambda name: Broken())
  with pytest.raises(errors.DataError, match='ConnectionError: no network'):
    data.load_documents('tfds:anything')


def test_without_tfds(monkeypatch):
  real = builtins.__import__

  def fake(name, *args, **kwargs):
    if name == 'tensorflow_datasets':
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', fake)
  with pytest.raises(errors.OptionalDependencyError, match=r'gemma_ext\[tfds'):
    data.load_documents('tfds:anything')


def test_rows_are_plain_values():
  found = list(data.rows('tfds:tiny_passages'))
  # TFDS shuffles what it prepares.
  assert [id_ for id_, _ in found] == [
    f'tiny_passages:test:{i}' for i in (0, 1)
  ]
  rows = sorted((row for _, row in found), key=lambda row: row['label'])
  assert rows == [{'passage': f'Passage {i} ä.', 'label': i} for i in (3, 4)]
  assert all(type(row['label']) is int for row in rows)
