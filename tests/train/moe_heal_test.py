# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Healing layers that are mixtures of experts, dense and packed."""

import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import ckpts
from gemma_ext import errors
from gemma_ext import train
from gemma_ext.train import _branch
from tests import tiny


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny.folder(tmp_path_factory.mktemp('moe_heal'), texts=3)


def config(folder, output, weights, *stages):
  return train.Heal(
    checkpoint=str(folder / 'dense'),
    recipe=gx.Recipe.of(
      {r'layer_\d+/mlp': gx.MoE(num_experts=8, top_k=8, weights=weights)}
    ),
    output=str(folder / output),
    cache=str(folder / 'cache'),
    text=str(folder / 'text_*.txt'),
    tokens=1024,
    window=64,
    fit_tokens=512,
    dtype='float32',
    active=0.5,
    stages=stages,
  )


def block(**changes):
  gradient = train.Gradient(steps=20, learning_rate=1e-2, dense_rate=5e-3)
  return train.Block(
    **dict(optimizer=gradient, batch_tokens=256, layers='layer_0') | changes
  )


DISTILL = train.Distill(
  optimizer=train.Gradient(steps=40, learning_rate=5e-3, dense_rate=5e-3),
  batch_windows=4,
  vocabulary=256,
)


@pytest.mark.parametrize(
  'weights', [gx.Keep(), gx.Ternary(group=32)], ids=['dense', 'ternary']
)
def test_it_heals_and_is_saved(folder, weights):
  run = train.heal(
    config(folder, f'healed {type(weights)}', weights, block(), DISTILL)
  )
  for record in run.log:
    assert record['held_out_after'] < 0.95 * record['held_out_before'], record
  back = ckpts.load(run.config.output)
  dense = _branch.flatten(run.dense.params)
  flat = _branch.flatten(back.params)
  assert sum(int(flat[f'layer_{i}/mlp/router/k']) for i in range(3)) == 12
  assert flat['layer_0/mlp/router/threshold'] < -1e29
  if isinstance(weights, gx.Keep):
    # What was carved, and has moved since.
    assert not np.array_equal(
      np.sort(flat['layer_1/mlp/linear'], axis=None),
      np.sort(dense['layer_1/mlp/linear'], axis=None),
    )


def test_other_optimizers_are_refused(folder):
  stage = block(optimizer=train.ClosedForm())
  with pytest.raises(errors.TrainError, match='mixture'):
    train.heal(config(folder, 'refused', gx.Ternary(group=32), stage))
