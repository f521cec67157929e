# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""A compressed directory of our own, and copies of it to break."""

import shutil

import pytest

import gemma_ext as gx
from tests import tiny
from tests.ckpts import own_fixtures as own


@pytest.fixture(name='stored', scope='session')
def _stored(tmp_path_factory):
  model = own.compressed_model()
  return gx.ckpts.save(
    tmp_path_factory.mktemp('own') / 'c',
    model=model,
    params=own.packed(model),
    tokenizer=tiny.tokenizer(3),
  )


@pytest.fixture(name='copy')
def _copy(tmp_path, stored):
  shutil.copytree(stored, tmp_path / 'c')
  return tmp_path / 'c'
