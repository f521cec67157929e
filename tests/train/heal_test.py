# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole of healing on a tiny model: it heals, stops, resumes, refuses."""

import dataclasses
import pathlib

import numpy as np
import pytest

from gemma_ext import ckpts
from gemma_ext import compress
from gemma_ext import errors
from gemma_ext import recipe as recipe_lib
from gemma_ext import train
from gemma_ext.train import _branch
from gemma_ext.train import _heal
from gemma_ext.train import _run
from gemma_ext.train import _stages
from gemma_ext.train import _store
from tests import tiny

_RECIPE = recipe_lib.Recipe.of(
  {r'layer_\d+/mlp': recipe_lib.Ternary(group=128)}
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  return tiny.folder(tmp_path_factory.mktemp('heal'), texts=6)


def _config(folder: pathlib.Path, output: str, **changes) -> train.Heal:
  values = dict(
    checkpoint=str(folder / 'dense'),
    recipe=_RECIPE,
    output=str(folder / output),
    cache=str(folder / 'cache'),
    text=str(folder / 'text_*.txt'),
    tokens=2048,
    window=64,
    fit_tokens=512,
    dtype='float32',
    stages=(
      train.Block(
        optimizer=train.Gradient(steps=40, learning_rate=2e-2),
        batch_tokens=256,
      ),
    ),
  )
  return train.Heal(**{**values, **changes})


_DISTILL = train.Distill(
  optimizer=train.Gradient(steps=40, learning_rate=5e-3),
  batch_windows=4,
  vocabulary=256,
)


def _leaves(path: pathlib.Path) -> dict[str, np.ndarray]:
  flat = _branch.flatten(ckpts.load(path).params)
  return {k: np.asarray(v) for k, v in flat.items()}


def _assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(
      a[name].view(np.uint8), b[name].view(np.uint8), err_msg=name
    )


def test_distillation_lowers_the_held_out_divergence(folder):
  cache = folder / 'final only'
  run = train.heal(
    _config(folder, 'distilled', stages=(_DISTILL,), cache=str(cache))
  )
  assert {p.name for p in cache.glob('*/*')} == {'final.bf16', 'done.json'}
  (record,) = run.log
  assert record['unit'] == 'model'
  assert record['held_out_after'] < 0.9 * record['held_out_before']
  assert [row['layer'] for row in record['layers']] == [0, 1, 2]


@pytest.mark.parametrize(
  'name, unit', [('Block', 'layer_1'), ('Distill', 'model')]
)
def test_latents_begin_at_codes_or_at_dense_weights(folder, name, unit):
  still = train.Gradient(
    steps=1, learning_rate=0, scale_rate=0, norm_rate=0, warmup=0
  )
  stage = getattr(train, name)(optimizer=still, latents='codes')
  run = train.heal(_config(folder, f'{name} still', stages=(stage,)))
  inside = lambda latents: np.concatenate(
    [
      np.abs(leaf - np.round(leaf)).ravel()
      for path, leaf in dataclasses.replace(stage, latents=latents)
      .task(run, unit)
      .moving.items()
      if path.endswith('/codes')
    ]
  )
  assert not inside('codes').any()
  assert inside('dense').mean() > 0.1
  (record, *_) = run.log
  assert record['held_out_after'] == record['held_out_before']


def test_rematerialised_steps_end_where_the_others_do(folder):
  after = []
  for remat in (False, True):
    gradient = train.Gradient(steps=6, learning_rate=5e-3, remat=remat)
    stage = dataclasses.replace(_DISTILL, optimizer=gradient)
    run = train.heal(_config(folder, f'remat {remat}', stages=(stage,)))
    after.append(run.log[0]['held_out_after'])
    assert after[-1] < run.log[0]['held_out_before']
  assert after[1] == pytest.approx(after[0], rel=1e-2)


def test_windows_are_rewritten_from_the_second_epoch_on(folder):
  stage = dataclasses.replace(_DISTILL, rewrite=0.5)
  run = train.heal(_config(folder, 'rewritten', stages=(stage,)))
  (record,) = run.log
  assert record['held_out_after'] < 0.9 * record['held_out_before']
  task = stage.task(run, 'model')
  windows = run.calibration.tokens[run.seen(run.calibration)]
  epoch = len(windows) // stage.batch_windows
  known = {row.tobytes() for row in windows}
  for step, new in ((0, False), (epoch - 1, False), (epoch, True)):
    batch = task.batch(step, (0, 0, 0))
    again = task.batch(step, (0, 0, 0))
    np.testing.assert_array_equal(batch['tokens'], again['tokens'])
    rows = np.asarray(batch['tokens'])
    assert all((row.tobytes() not in known) == new for row in rows)


def test_text_that_the_dense_model_writes_is_learned_from(folder):
  config = _config(folder, 'written', stages=(_DISTILL,), written_tokens=640)
  run = train.heal(config)
  (record,) = run.log
  assert record['held_out_after'] < 0.9 * record['held_out_before']
  tokens = _run.tokens_of(config, run.dense.tokenizer)
  got = run.calibration.tokens
  assert len(got) == len(tokens) + 10
  np.testing.assert_array_equal(got[: len(tokens) - 4], tokens[:-4])
  np.testing.assert_array_equal(got[-4:], tokens[-4:])


def test_blocks_on_a_part_of_the_text(folder):
  stages = (*_config(folder, 'x').stages, _DISTILL)
  cache = folder / 'cache of part'
  run = train.heal(
    _config(
      folder, 'of part', stages=stages, block_tokens=640, cache=str(cache)
    )
  )
  assert len(run.blocks.tokens) == 10 + 4
  assert len(run.calibration.tokens) > 14
  np.testing.assert_array_equal(
    run.blocks.tokens[run.held_out(run.blocks)],
    run.calibration.tokens[run.held_out(run.calibration)],
  )
  assert run.blocks.target('layer_0').shape[:2] == (14, 64)
  assert not (run.calibration.path / 'layer_0.bf16').exists()
  assert [r['unit'] for r in run.log] == [
    *('layer_0', 'layer_1', 'layer_2', 'model')
  ]
  assert run.log[-1]['held_out_after'] < run.log[-1]['held_out_before']


def test_blocks_lower_every_held_out_loss(folder):
  run = train.heal(_config(folder, 'both'))
  units = [record['unit'] for record in run.log]
  assert units == ['layer_0', 'layer_1', 'layer_2']
  for record in run.log:
    assert record['held_out_after'] < 0.99 * record['held_out_before']
    assert record['kept']
    assert np.isfinite(record['ratio'])
  loaded = ckpts.load(folder / 'both')
  assert loaded.recipe == _RECIPE
  assert loaded.metadata['healing']['log'][0]['unit'] == 'layer_0'
  moved = loaded.metadata['healing']['log'][0]['layers'][0]
  assert moved['layer'] == 0
  assert 0 < moved['zero_to_nonzero'] < 0.5


def test_stopped_run_resumes_to_the_same_bits(folder):
  stages = (*_config(folder, 'x').stages, _DISTILL)
  train.heal(_config(folder, 'whole', stages=stages))
  rng = np.random.default_rng(1)
  config = _config(folder, 'parts', stages=stages)
  stops = 0
  while True:
    left = int(rng.integers(5, 60))

    def stop() -> bool:
      nonlocal left
      left -= 1
      return left <= 0

    if train.heal(config, stop=stop) is not None:
      break
    stops += 1
  assert stops >= 3
  _assert_equal(_leaves(folder / 'whole'), _leaves(folder / 'parts'))
  curves = [
    [r['curve'] for r in ckpts.load(folder / name).metadata['healing']['log']]
    for name in ('whole', 'parts')
  ]
  assert curves[0] == curves[1]


def test_kill_between_result_and_clearing_the_state(folder, monkeypatch):
  config = _config(folder, 'late')

  def kill(store):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(_store.Store, 'clear', kill)
    with pytest.raises(KeyboardInterrupt):
      train.heal(config)
  want = _leaves(folder / 'late')
  assert train.heal(config) is not None
  _assert_equal(_leaves(folder / 'late'), want)


def test_what_does_not_change_the_result_may_change(folder):
  config = _config(folder, 'free')
  saved = lambda: any((folder / 'free.state').glob('step_*'))
  assert train.heal(config, stop=saved) is None
  assert saved()
  again = _config(folder, 'free', overwrite=True, save_seconds=1.0)
  assert train.heal(again) is not None
  assert not saved()
  with pytest.raises(errors.CheckpointExistsError):
    train.heal(config)
  assert train.heal(again, stop=lambda: True) is None


def test_run_is_over_only_when_it_is_finished(folder):
  config = _config(folder, 'finished')
  seen = []

  def finish(run):
    assert ckpts.load(folder / 'finished').recipe == run.model.recipe
    seen.append(run.log)
    if len(seen) == 1:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    train.heal(config, finish=finish)
  assert not _heal.is_result(config)
  left = folder / '.finished.0123456789ab.replaced'
  left.mkdir()
  assert train.heal(config, finish=finish) is not None
  assert seen[0] == seen[1] and not left.exists()
  assert _heal.is_result(config)
  assert _heal.is_result(_config(folder, 'finished', overwrite=True))
  assert not _heal.is_result(_config(folder, 'finished', seed=1))


def test_state_of_another_config_is_refused(folder):
  config = _config(folder, 'other')
  saved = lambda: any((folder / 'other.state').glob('step_*'))
  assert train.heal(config, stop=saved) is None
  with pytest.raises(errors.StateError, match='another config'):
    train.heal(_config(folder, 'other', seed=1))


def test_existing_result_is_kept(folder):
  train.heal(_config(folder, 'kept'))
  with pytest.raises(errors.CheckpointExistsError):
    train.heal(_config(folder, 'kept'))


def test_nothing_to_heal(folder):
  stages = (train.Block(optimizer=train.Gradient(), layers='layer_7'),)
  with pytest.raises(errors.TrainError, match='nothing to heal'):
    train.heal(_config(folder, 'none', stages=stages))


def test_too_little_text(folder):
  with pytest.raises(errors.DataError, match='held out'):
    train.heal(_config(folder, 'short', held_out=1000))


def test_compressed_checkpoint_is_refused(folder):
  train.heal(_config(folder, 'again'))
  with pytest.raises(errors.TrainError, match='compressed already'):
    train.heal(_config(folder, 'twice', checkpoint=str(folder / 'again')))


def _budget(folder: pathlib.Path) -> pathlib.Path:
  """A checkpoint such as budgets make: whole numbers, a table in bands."""
  path = folder / 'budget'
  if path.exists():
    return path
  dense = ckpts.load(folder / 'dense', dtype='float32')
  bands = ((64, recipe_lib.Int(bits=6, group=32)),)
  few = recipe_lib.Int(bits=3, group=32, scale='e4m3')
  recipe = recipe_lib.Recipe.of(
    {
      'embedder/input_embedding': recipe_lib.Rows(
        bands=(*bands, (None, few)), ordered=True, centered=True
      ),
      '.*': few,
    }
  )
  tokens = np.random.default_rng(0).integers(3, tiny.VOCAB_SIZE, (8, 64))
  params = compress.compress(
    dense.model, dense.params, recipe, calibration=tokens.astype(np.int32)
  )
  return ckpts.save(
    path,
    model=dense.model,
    params=params,
    tokenizer=dense.tokenizer,
    recipe=recipe,
    source=dense.source,
  )


def test_compressed_weights_are_healed_where_they_are(folder):
  made = _budget(folder)
  config = _config(
    folder,
    'healed budget',
    compressed=str(made),
    stages=(dataclasses.replace(_DISTILL, integers='attn'),),
  )
  run = train.heal(config)
  (record,) = run.log
  assert record['held_out_after'] < 0.9 * record['held_out_before']
  before, after = _leaves(made), _leaves(folder / 'healed budget')
  assert before.keys() == after.keys()
  for name, old in before.items():
    assert (old.shape, old.dtype) == (after[name].shape, after[name].dtype)
    moved = '/mlp/' in name or '/attn/' in name or 'norm' in name
    assert moved or np.array_equal(old, after[name]), name
  want, found = ckpts.load(made), ckpts.load(folder / 'healed budget')
  assert want.recipe == found.recipe
  assert _heal.is_result(config)


def test_nothing_but_what_was_compressed_is_healed(folder, tmp_path):
  with pytest.raises(errors.TrainError, match='dense checkpoint'):
    config = _config(folder, 'x', compressed=str(folder / 'dense'))
    train.heal(config)
  model = tiny.model('gemma2')
  recipe = recipe_lib.Recipe.of({'.*': recipe_lib.Int(bits=8)})
  other = ckpts.save(
    tmp_path / 'other',
    model=model,
    params=compress.compress(model, tiny.params(model), recipe),
    recipe=recipe,
  )
  with pytest.raises(errors.TrainError, match='compressed Gemma2_2B of 2'):
    train.heal(_config(folder, 'x', compressed=str(other)))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('stages', ('gradient',)),
    ('dtype', 'float16'),
    ('tokens', 3),
    ('held_out', 0),
    ('seed', -1),
  ],
)
def test_bad_field(folder, field, value):
  with pytest.raises(errors.ConfigError, match=field):
    _config(folder, 'bad', **{field: value})


def test_batches_of_an_epoch_are_disjoint_and_repeatable():
  seed = (0, 1, 2)
  batches = [_stages.iterate(seed, step, 10, 3) for step in range(3)]
  assert len(np.unique(np.concatenate(batches))) == 9
  np.testing.assert_array_equal(batches[1], _stages.iterate(seed, 1, 10, 3))
  later = [_stages.iterate(seed, step, 10, 3) for step in range(3, 6)]
  assert not np.array_equal(np.concatenate(batches), np.concatenate(later))


def test_changes_counts_codes(folder):
  train.heal(_config(folder, 'counted'))
  loaded = ckpts.load(folder / 'counted')
  same = _stages.changes(loaded.model, loaded.params, loaded.params, 'model')
  assert [row['layer'] for row in same['layers']] == [0, 1, 2]
  for row in same['layers']:
    assert row['sign_flips'] == row['zero_to_nonzero'] == 0
    assert row['density_before'] == row['density_after']
    assert 0.3 < row['density_after'] < 0.9
