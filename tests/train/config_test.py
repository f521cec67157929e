# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Configs: what is read, what is changed, what is refused."""

import pathlib

import pytest

from gemma_ext import errors
from gemma_ext import train
from gemma_ext.train import _config

_EXAMPLES = pathlib.Path(__file__).parents[2] / 'examples' / 'enhancements'


@pytest.mark.parametrize(
  'name', ['heal_budget', 'heal_tssn', 'heal_tssn_one_layer']
)
def test_shipped_configs_resolve(name):
  config = _config.load(
    _EXAMPLES / f'{name}.py',
    ['--config.stages[0].optimizer.steps=7', '--config.seed=3'],
  )
  assert isinstance(config.value, train.Heal)
  assert config.value.seed == 3
  assert config.value.stages[0].optimizer.steps == 7
  assert config.snapshot['seed'] == 3
  again = _config.load(_EXAMPLES / f'{name}.py')
  assert again.fingerprint != config.fingerprint
  assert again.fingerprint == _config.load(_EXAMPLES / f'{name}.py').fingerprint


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('--config.sed=3', "'seed'"),
    ('--config.seed=x', 'type int'),
    ('--config.stages[0].optimizer.step=1', "'steps'"),
    ('--config.stages[7].weighting=mse', 'no field 7'),
    ('--config.seed', 'write --config'),
    ('--config.stages[\u00b2].weighting=mse', 'no field'),
    ('--config.stages[0].optimizer.__qualname__=os:abort', 'no field'),
    ('--config.stages[0].weighting=foo', 'Block.weighting'),
  ],
)
def test_bad_change(change, message):
  with pytest.raises(errors.ConfigError, match=message):
    _config.load(_EXAMPLES / 'heal_tssn.py', [change])


def test_int_for_a_float_field():
  config = _config.load(
    _EXAMPLES / 'heal_tssn.py', ['--config.stages[0].optimizer.norm_rate=1']
  )
  assert config.value.stages[0].optimizer.norm_rate == 1.0


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('x = 1', 'no get_config'),
    ('def get_config(): return 3', 'konfig.ConfigDict'),
    ('def get_config(): raise KeyError("gone")', 'gone'),
    ('def get_config(:', 'SyntaxError'),
    ('raise SystemExit(0)', 'SystemExit'),
  ],
)
def test_bad_file(tmp_path, text, message):
  file = tmp_path / 'c.py'
  file.write_text(text)
  with pytest.raises(errors.ConfigError, match=message):
    _config.load(file)


def test_missing_file(tmp_path):
  with pytest.raises(errors.ConfigError, match='not there'):
    _config.load(tmp_path / 'c.py')


def test_other_suffix(tmp_path):
  file = tmp_path / 'c.json'
  file.write_text('{}')
  with pytest.raises(errors.ConfigError, match='no .py file'):
    _config.load(file)


def test_split_argv():
  changes, rest = _config.split_argv(['--config=a.py', '--config.b=1', '--h'])
  assert changes == ['--config.b=1']
  assert rest == ['--config=a.py', '--h']


@pytest.mark.parametrize('stage', [train.Block, train.Distill])
def test_latents_of_no_kind(stage):
  message = f"{stage.__name__}.latents must be 'dense' or 'codes', got 'code'"
  with pytest.raises(errors.ConfigError, match=message):
    stage(optimizer=train.Gradient(), latents='code')
