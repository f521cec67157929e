# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Steps without gradients in kauldron's trainer."""

import dataclasses
import functools
from typing import Any

from absl import flags
from flax import traverse_util
import jax
import jax.numpy as jnp
from kauldron import kd
import numpy as np
import optax
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import train
from tests import tiny

flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags.

_RECIPE = gx.Recipe.of(
  {r'layer_\d+/mlp': gx.Ternary(group=64), r'embedder': gx.Int(bits=8)}
)
_TOKENS = np.tile(np.arange(5, 14, dtype=np.int32), (8, 1))
_KEY = 'losses/xentropy'


@dataclasses.dataclass(frozen=True, eq=False)
class Given(kd.ckpts.InitTransform):
  """Starts from parameters that are in memory."""

  params: dict[str, Any]

  def transform(self, state):
    return state.replace(params=jax.tree.map(jnp.copy, self.params))


@functools.cache
def _model(dtype):
  """A compressed model and its parameters."""
  dense = tiny.shallow(dtype=dtype)
  params = gx.compress(dense, tiny.params(dense), _RECIPE)
  return gx.nn.Compressed(model=dense, recipe=_RECIPE), params


def _trainer(step, *, steps=8, dtype=jnp.float32, **changes):
  model, params = _model(dtype)
  kwargs = dict(
    seed=0,
    train_ds=kd.data.py.DataSource(
      data_source=[
        {'input': row[:-1], 'target': row[1:, None]} for row in _TOKENS
      ],
      batch_size=8,  # The tests have 8 devices.
      shuffle=True,
      num_epochs=None,
      num_workers=0,
    ),
    model=model,
    init_transform=Given(params),
    num_train_steps=steps,
    train_losses={
      'xentropy': kd.losses.SoftmaxCrossEntropyWithIntLabels(
        logits='preds.logits', labels='batch.target'
      )
    },
    optimizer=None,
    trainstep=step,
    writer=kd.train.metric_writer.NoopWriter(),
  )
  return kd.train.Trainer(**(kwargs | changes))


def _losses(trainer, steps):
  state = trainer.init_state()
  batches = iter(trainer.train_ds)
  values = []
  for _ in range(steps):
    state, aux = trainer.trainstep.step(
      state, next(batches), return_losses=True
    )
    values.append(float(aux.compute().loss_values[_KEY]))
  return values, state


def _flat(tree):
  return traverse_util.flatten_dict(tree, sep='/')


def _mezo(**changes):
  kwargs = dict(steps=40, pairs=2, sigma=1e-2, learning_rate=2e-2)
  return train.MezoStep(method=train.Mezo(**(kwargs | changes)))


def _evolution(weights='.*', **changes):
  kwargs = dict(steps=40, population=8, sigma=3e-2, learning_rate=1e-2)
  return train.EvolutionStep(
    method=train.Evolution(**(kwargs | changes)), weights=weights
  )


@pytest.fixture
def no_gradients(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError('a gradient was taken')

  for name in ('grad', 'value_and_grad', 'vjp', 'linearize', 'jvp'):
    monkeypatch.setattr(jax, name, refuse)


@pytest.mark.parametrize(
  'step',
  [
    _mezo(),
    _mezo(form='latent', learning_rate=5e-2),
    _evolution(form='integer', code_sigma=0.1, code_rate=0.2),
  ],
  ids=['mezo', 'mezo-latent', 'evolution-integer'],
)
def test_lowers_a_loss_without_gradients(step, no_gradients):
  values, state = _losses(_trainer(step), 8)
  model, before = _model(jnp.float32)
  logits = model.apply({'params': before}, _TOKENS[:, :-1]).logits
  first = optax.softmax_cross_entropy_with_integer_labels(
    logits, _TOKENS[:, 1:]
  )
  np.testing.assert_allclose(values[0], first.mean(), rtol=1e-5)
  assert values[-1] < values[0] - 0.1
  before, after = _flat(before), _flat(state.params)
  assert all(after[k].dtype == before[k].dtype for k in after)
  changed = {k for k in after if np.any(np.asarray(after[k]) != before[k])}
  codes = {k for k in after if k.endswith('/codes')}
  assert after.keys() - codes <= changed  # Every scale and norm.
  ternary = {k for k in codes if '/mlp/' in k}
  form = step.method.codes
  may = {'fixed': set(), 'integer': ternary, 'latent': codes}[form]
  assert changed & codes <= may
  assert bool(changed & codes) == bool(may)


def test_masters_keep_what_bfloat16_would_lose():
  # A step is less than half of what bfloat16 can tell apart.
  trainer = _trainer(
    _mezo(learning_rate=1e-5, pairs=1), dtype=jnp.bfloat16, steps=4
  )
  before = _flat(_model(jnp.bfloat16)[1])
  _, state = _losses(trainer, 3)
  masters, after = state.opt_state['moving'], _flat(state.params)
  path = 'layer_0/mlp/linear/scale'
  assert masters[path].dtype == jnp.float32
  assert after[path].dtype == jnp.bfloat16
  start = np.asarray(before[path], np.float32)
  moved = np.asarray(masters[path]) - start
  assert 0 < np.abs(moved).max() < 2**-9 * np.abs(start).max()
  for name, master in masters.items():
    np.testing.assert_array_equal(
      np.asarray(master.astype(after[name].dtype)), np.asarray(after[name])
    )


def test_only_weights_that_match_move():
  step = _mezo()
  step = dataclasses.replace(step, weights='layer_0/mlp/linear')
  _, state = _losses(_trainer(step), 1)
  assert set(state.opt_state['moving']) == {'layer_0/mlp/linear/scale'}
  before, after = _flat(_model(jnp.float32)[1]), _flat(state.params)
  changed = {k for k in after if np.any(np.asarray(after[k]) != before[k])}
  assert changed == {'layer_0/mlp/linear/scale'}


@pytest.mark.parametrize(
  'make',
  [
    lambda: dataclasses.replace(_mezo(pairs=1), weights='layer_0/mlp'),
    lambda: _evolution(
      'layer_0/mlp', form='integer', population=4, code_sigma=0.1
    ),
  ],
  ids=['mezo', 'evolution'],
)
def test_resumed_run_ends_in_the_same_bits(make, tmp_path):
  def run(folder, **changes):
    trainer = _trainer(
      make(),
      steps=5,
      dtype=jnp.bfloat16,
      workdir=tmp_path / folder,
      checkpointer=kd.ckpts.Checkpointer(save_interval_steps=2),
      log_metrics_every=1,  # So that one step is compiled, not two.
      log_summaries_every=1,
      **changes,
    )
    return trainer, trainer.train()[0]

  _, whole = run('whole')
  trainer, _ = run('parts', stop_after_steps=4)
  assert trainer.checkpointer.latest_step == 2
  _, again = run('parts')
  assert int(again.step) == int(whole.step) == 6  # One more than was asked for.
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
  ('make', 'changes', 'message'),
  [
    (_mezo, {'optimizer': optax.sgd(1.0)}, 'optimizer=None'),
    (_mezo, {'train_losses': {}}, 'train_losses is empty'),
    (_mezo, {'num_train_steps': 41}, 'falls over 40 steps'),
    (lambda: _evolution(lazy='mlp'), {}, 'Evolution.lazy'),
    (lambda: train.MezoStep(method=train.Evolution()), {}, 'must be a Mezo'),
    (
      lambda: _evolution(
        form='integer', discrete='select', fitness='unit', population=2
      ),
      {},
      "must be 'global'",
    ),
  ],
)
def test_wrong_use(make, changes, message):
  with pytest.raises(errors.ConfigError, match=message):
    _trainer(make(), **changes)


def test_weights_that_match_nothing():
  step = dataclasses.replace(_mezo(), weights='layer_7/mlp')
  with pytest.raises(errors.TrainError, match='nearest'):
    _trainer(step).init_state()


def test_weights_that_are_all_integers():
  step = dataclasses.replace(_mezo(), weights='embedder/input_embedding/codes')
  with pytest.raises(errors.TrainError, match='Integers stay'):
    _trainer(step).init_state()
