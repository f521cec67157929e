# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Generated text, rewarded by a Python function, as a loss to evolve on."""

import dataclasses
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
from kauldron import kd
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext import train
from gemma_ext.train import _generate
from tests import tiny

flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags.

# As many as the tests have devices.
_PROMPTS = (
  'the river',
  'a group is a set',
  'What',
  'of',
  'a',
  'The',
  'in',
  'is',
)


def _prompts(length=12):
  source = train.Prompts(
    tokenizer=tiny.tokenizer(3), prompts=_PROMPTS, length=length
  )
  return np.stack([source[i]['input'] for i in range(len(source))])


@pytest.mark.parametrize('family', ['gemma2', 'gemma3', 'gemma4'])
def test_goes_on_as_the_whole_model_does(family):
  model = tiny.model(family)
  params = tiny.params(model)
  prompts = _prompts()
  found = np.asarray(
    jax.jit(
      lambda p: _generate.generate(
        model,
        params,
        p,
        jax.random.key(0),
        max_new_tokens=6,
        temperature=0.0,
        end_tokens=(),
      )
    )(prompts)
  )
  for prompt, answer in zip(prompts[:3], found[:3]):
    ids = prompt[prompt != 0]
    for token in answer:
      out = model.apply({'params': params}, jnp.asarray(ids)[None])
      assert token == int(jnp.argmax(out.logits[0, -1]))
      ids = np.append(ids, token)


def test_what_follows_an_end_token_is_padding():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  call = lambda ends: np.asarray(
    _generate.generate(
      model,
      params,
      _prompts()[:1],
      jax.random.key(0),
      max_new_tokens=5,
      temperature=0.0,
      end_tokens=ends,
    )
  )[0]
  free = call(())
  cut = call((int(free[1]),))
  at = int(np.argmax(free == free[1]))
  np.testing.assert_array_equal(cut[: at + 1], free[: at + 1])
  assert not cut[at + 1 :].any()


@dataclasses.dataclass(frozen=True, eq=False)
class _Given(kd.ckpts.InitTransform):
  """Starts from parameters that are in memory."""

  params: dict[str, Any]

  def transform(self, state):
    return state.replace(params=jax.tree.map(jnp.copy, self.params))


def _trainer(function, *, steps=12, workdir='.', **changes):
  model = tiny.shallow()
  reward = train.TaskReward(
    model=model,
    tokenizer=tiny.tokenizer(3),
    function=function,
    max_new_tokens=4,
    **changes,
  )
  return kd.train.Trainer(
    seed=0,
    workdir=workdir,
    train_ds=kd.data.py.DataSource(
      data_source=train.Prompts(
        tokenizer=tiny.tokenizer(3), prompts=_PROMPTS, length=10
      ),
      batch_size=8,
      shuffle=False,
      num_epochs=None,
      num_workers=0,
    ),
    model=model,
    init_transform=_Given(tiny.params(model)),
    num_train_steps=steps,
    train_losses={'reward': reward},
    optimizer=None,
    trainstep=train.EvolutionStep(
      method=train.Evolution(
        steps=steps, population=32, chunk=16, sigma=0.5, learning_rate=0.3
      ),
      weights='embedder',
    ),
    writer=kd.train.metric_writer.NoopWriter(),
  )


def _share_of_letters(text):
  return sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text))


def test_evolution_raises_the_reward():
  trainer = _trainer(_share_of_letters, temperature=1.0, steps=14)
  state = trainer.init_state()
  batches = iter(trainer.train_ds)
  rewards = []
  for _ in range(14):
    state, aux = trainer.trainstep.step(
      state, next(batches), return_losses=True
    )
    rewards.append(-float(aux.compute().loss_values['losses/reward']))
  assert np.mean(rewards[:4]) < 0.85
  assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.1


def test_train_under_the_guard_of_transfers(tmp_path):
  trainer = _trainer(_share_of_letters, steps=1, workdir=tmp_path)
  trainer = trainer.replace(log_metrics_every=1, log_summaries_every=1)
  state, _ = trainer.train()
  assert int(state.step) == 2


def _raises(text):
  raise KeyError('gone')


def test_failing_function_stops_the_step():
  trainer = _trainer(_raises)
  state = trainer.init_state()
  with pytest.raises(errors.RewardError, match="raised KeyError: 'gone'"):
    trainer.trainstep.step(state, next(iter(trainer.train_ds)))


@pytest.mark.parametrize(
  ('function', 'message'),
  [
    (_raises, "raised KeyError: 'gone', for the text '4'"),
    (lambda text: 'much', "returned 'much' for the text '4'"),
    (lambda text: float('nan'), 'returned nan'),
    (lambda text: None, 'returned None'),
  ],
)
def test_failing_function_is_our_error_and_names_the_text(function, message):
  reward = train.TaskReward(
    model=tiny.model('gemma3'), tokenizer=tiny.tokenizer(3), function=function
  )
  answer = np.int32([tiny.tokenizer(3).encode('4')])
  assert np.isnan(reward._rewards(answer, answer)).all()
  with pytest.raises(errors.RewardError, match=message):
    reward.reraise()
  reward.reraise()  # Once is enough.


def _value(tokens, **changes):
  reward = train.TaskReward(
    model=tiny.model('gemma3'), tokenizer=tiny.tokenizer(3), **changes
  )
  ids = tiny.tokenizer(3).encode
  prompt = np.int32(ids('2+2=', add_bos=True))
  answer = np.int32([*ids(tokens), 0, 0])
  return reward._rewards(prompt[None], answer[None]).tolist()


def test_text_that_the_function_gets():
  seen = []

  def see(text):
    seen.append(text)
    return True

  assert _value('4\n3+3=', function=see) == [1.0]
  assert _value('4\n3+3=', function=see, stop='\n') == [1.0]
  assert _value('4\n3', function=see, stop='\n', with_prompt=True) == [1.0]
  assert seen == ['4\n3+3=', '4', '2+2=4']


def test_match():
  match = train.Match(pattern=r'(?:2\+2=4|3\+3=6)\Z')
  assert match('2+2=4') == 1.0
  assert match('2+2=44') == 0.0
  with pytest.raises(errors.ConfigError, match='regular expression'):
    train.Match(pattern='(')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'max_new_tokens': 0}, 'max_new_tokens'),
    ({'max_new_tokens': 10**6}, 'max_new_tokens'),
    ({'temperature': -1.0}, 'temperature'),
    ({'function': 3}, 'callable'),
  ],
)
def test_wrong_fields(changes, message):
  kwargs = dict(
    model=tiny.model('gemma3'), tokenizer=tiny.tokenizer(3), function=len
  )
  with pytest.raises(errors.ConfigError, match=message):
    train.TaskReward(**(kwargs | changes))


def test_prompt_that_is_too_long():
  with pytest.raises(errors.DataError, match='Prompts.length is 2'):
    _prompts(length=2)
  with pytest.raises(errors.ConfigError, match='empty'):
    train.Prompts(tokenizer=tiny.tokenizer(3), prompts=())
