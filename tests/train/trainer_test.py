# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The command with a `kd.train.Trainer`: shipped configs on tiny models."""

import json
import pathlib
import re

import numpy as np
import pytest
import safetensors.numpy

from gemma_ext import ckpts
from gemma_ext import errors
from gemma_ext import train
from gemma_ext.train import __main__ as main_lib
from gemma_ext.train import _branch
from gemma_ext.train import _config
from gemma_ext.train import _trainer
from tests import tiny

_EXAMPLES = pathlib.Path(__file__).parents[2] / 'examples' / 'enhancements'
_NAMES = ('mezo_distill', 'lora_on_tssn', 'evolve_reward')


@pytest.mark.parametrize('name', _NAMES)
def test_shipped_configs_resolve(name):
  changes = ['--config.num_train_steps=7', '--config.aux.start=DIR']
  config = _config.load(_EXAMPLES / f'{name}.py', changes)
  trainer = config.value
  assert trainer.num_train_steps == 7
  start = getattr(trainer.init_transform, 'wrapped', trainer.init_transform)
  assert start == train.FromCheckpoint(
    checkpoint='DIR',
    recipe=start.recipe,
    text=start.text,
    tokens=start.tokens,
  )
  if trainer.optimizer is None:
    assert trainer.trainstep.method.steps == 7
  assert config.snapshot['num_train_steps'] == 7
  assert trainer.checkpointer.save_interval_steps > 0


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  """A tiny checkpoint, a text, and the shipped configs for a tiny model."""
  folder = tmp_path_factory.mktemp('trainer')
  model = tiny.shallow()
  ckpts.save(
    folder / 'dense',
    model=model,
    params=tiny.params(model),
    tokenizer=tiny.tokenizer(3),
  )
  words = 'the river flows city was founded in France capital of a set'.split()
  text = ' '.join(np.random.default_rng(0).choice(words, 2000))
  (folder / 'text.txt').write_text(text)
  for name in _NAMES:
    text = (_EXAMPLES / f'{name}.py').read_text()
    text, count = re.subn(
      r'gm\.nn\.Gemma3_270M', 'tiny.TinyGemma3Shallow', text
    )
    assert count == 1
    text = re.sub(
      r'(  from gemma import gm\n)', r'\1  from tests import tiny\n', text
    )
    (folder / f'{name}.py').write_text(text)
  return folder


def _changes(folder, name, workdir):
  found = {
    'workdir': folder / workdir,
    'num_train_steps': 3,
    'log_metrics_every': 1,  # So that one step is compiled, not two.
    'log_summaries_every': 1,
    'checkpointer.save_interval_steps': 3,
    'aux.start': folder / 'dense',
    'train_ds.batch_size': 8,  # The tests have 8 devices.
  }
  text = folder / 'text.txt'
  source = 'train_ds.data_source'
  start = 'init_transform'
  match name:
    case 'mezo_distill':
      found |= {
        'aux.teacher': folder / 'dense',
        f'{source}.vocabulary': 128,
        f'{source}.rest': 64,
        'trainstep.method.pairs': 1,
      }
    case 'lora_on_tssn':
      start = 'init_transform.wrapped'
    case 'evolve_reward':
      found |= {
        'trainstep.method.population': 2,
        'train_losses.reward.max_new_tokens': 2,
      }
  if name != 'evolve_reward':
    found |= {
      f'{source}.text': text,
      f'{source}.tokens': 1024,
      f'{source}.length': 32,
      f'{start}.text': text,
      f'{start}.tokens': 512,
    }
  return [f'--config.{k}={v}' for k, v in found.items()]


def _main(folder, name, workdir, *changes):
  return main_lib.main(
    [
      f'--config={folder / name}.py',
      *_changes(folder, name, workdir),
      *changes,
    ]
  )


@pytest.fixture(scope='module')
def whole(folder):
  """A run of `mezo_distill` from the beginning to the end."""
  assert _main(folder, 'mezo_distill', 'whole') == 0
  return folder / 'whole'


def test_result_is_a_checkpoint(folder, whole):
  record = json.loads((whole / 'training.json').read_text())
  assert record['num_train_steps'] == 3
  found = ckpts.load(whole / 'result')
  assert found.recipe is not None and found.tokenizer is not None
  assert found.metadata['steps'] == 4
  assert found.metadata['training']['num_train_steps'] == 3
  assert sorted(p.name for p in (whole / 'checkpoints').iterdir()) == [
    'ckpt_0',
    'ckpt_3',
  ]
  assert list(whole.glob('**/events.out.tfevents*'))  # For TensorBoard.


def test_stopped_run_goes_on_and_ends_in_the_same_bits(folder, whole):
  changes = _changes(folder, 'mezo_distill', 'parts')
  load = lambda: _config.load(folder / 'mezo_distill.py', changes)
  asked = []

  def stop():
    asked.append(len(asked))
    return len(asked) > 3

  config = load()
  with pytest.raises(_trainer.StoppedError, match='The state is saved'.lower()):
    _trainer.run(config.value, config.snapshot, stop=stop)
  saved = {p.name for p in (folder / 'parts' / 'checkpoints').iterdir()}
  assert saved & {'ckpt_1', 'ckpt_2'}
  assert not (folder / 'parts' / 'result').exists()
  assert _main(folder, 'mezo_distill', 'parts') == 0
  a, b = (
    _branch.flatten(ckpts.load(folder / name / 'result').params)
    for name in ('whole', 'parts')
  )
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_array_equal(np.asarray(b[name]), np.asarray(value), name)


def test_changed_config_is_refused(folder, whole, capsys):
  status = _main(
    folder, 'mezo_distill', 'whole', '--config.trainstep.method.sigma=0.5'
  )
  assert status == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert 'trainstep.method.sigma was 0.01, is 0.5' in error


def test_evolution_on_a_reward(folder, capsys):
  assert _main(folder, 'evolve_reward', 'evolved') == 0
  out = capsys.readouterr().out
  assert 'gemma_ext.generate --checkpoint=' in out
  assert ckpts.load(folder / 'evolved' / 'result').recipe is not None


def test_adapters(folder, capsys):
  assert _main(folder, 'lora_on_tssn', 'lora') == 0
  assert 'adapters alone' in capsys.readouterr().out
  found = safetensors.numpy.load_file(folder / 'lora' / 'adapters.safetensors')
  assert len(found) == 10  # 5 einsums, a and b.
  assert all(np.any(np.asarray(v, np.float32)) for v in found.values())


def test_checkpoint_of_another_recipe(folder, whole):
  config = _config.load(
    folder / 'mezo_distill.py', _changes(folder, 'mezo_distill', 'x')
  )
  state = config.value.init_state(skip_transforms=True, skip_optimizer=True)
  start = train.FromCheckpoint(checkpoint=str(whole / 'result'), recipe='int8')
  with pytest.raises(errors.ParamsMismatchError, match='is compressed with'):
    start.transform(state)
  start = train.FromCheckpoint(checkpoint=str(folder / 'dense'))
  with pytest.raises(errors.ParamsMismatchError, match='model and recipe'):
    start.transform(state)
  start = train.FromCheckpoint(
    checkpoint=str(whole / 'result'), recipe='tssn', text=''
  )
  found = _branch.flatten(start.transform(state).params)
  result = _branch.flatten(ckpts.load(whole / 'result').params)
  for name, value in result.items():
    np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('--config.workdir=.', 'workdir is not set'),
    ('--config.trainstep.method.pairs=0', 'Mezo.pairs'),
    ('--config.train_ds.data_source.rest=-1', 'TeacherWindows.rest'),
  ],
)
def test_wrong_config_is_one_line(change, message, capsys):
  file = _EXAMPLES / 'mezo_distill.py'
  assert main_lib.main([f'--config={file}', change]) == 2
  assert message in capsys.readouterr().err.splitlines()[-1]
