# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Evolves Gemma 3 270M on a task that a regular expression can check: sums.

Every member of a population answers all prompts of a batch, and the share of
right answers is its fitness. No gradients, no right answers as targets: any
function of the text would do, also one of your own (`function=my_task.score`).

python -m gemma_ext.train --config=examples/enhancements/evolve_reward.py
"""

from kauldron import konfig

with konfig.imports():
  from gemma import gm
  from kauldron import kd

  from gemma_ext import nn as gx_nn
  from gemma_ext import train

_EXAMPLES = '2+3=5\n6+1=7\n8+4=12\n'


def get_config():
  """The preset `int8`; scales and norms evolve on sums of two digits."""
  sums = [(a, b) for a in range(2, 10) for b in range(2, 10)]
  cfg = kd.train.Trainer(
    seed=0,
    workdir='out/evolved-sums',
    num_train_steps=100,
    stop_after_steps=None,
    log_metrics_every=5,
    log_summaries_every=1000,
    checkpointer=kd.ckpts.Checkpointer(save_interval_steps=20, max_to_keep=2),
    aux={'start': 'gemma3-270m', 'recipe': 'int8'},
    # It takes its own steps.
    optimizer=None,
  )
  cfg.model = gx_nn.Compressed(
    model=gm.nn.Gemma3_270M(tokens='batch.input'), recipe=cfg.ref.aux.recipe
  )
  cfg.init_transform = train.FromCheckpoint(
    checkpoint=cfg.ref.aux.start, recipe=cfg.ref.aux.recipe, text=''
  )
  cfg.train_ds = kd.data.py.DataSource(
    data_source=train.Prompts(
      tokenizer=cfg.ref.aux.start,
      prompts=tuple(f'{_EXAMPLES}{a}+{b}=' for a, b in sums),
      length=32,
    ),
    batch_size=16,
    shuffle=True,
    num_epochs=None,
    num_workers=0,
  )
  right = '|'.join(rf'{a}\+{b}={a + b}' for a, b in sums)
  cfg.train_losses = {
    'reward': train.TaskReward(
      model=cfg.ref.model,
      tokenizer=cfg.ref.aux.start,
      function=train.Match(pattern=rf'\n(?:{right})\Z'),
      with_prompt=True,
      stop='\n',
      max_new_tokens=4,
      temperature=0.0,
    ),
  }
  cfg.trainstep = train.EvolutionStep(
    weights=r'.*',
    method=train.Evolution(
      steps=cfg.ref.num_train_steps,
      population=16,
      chunk=2,
      sigma=2e-2,
      learning_rate=5e-3,
    ),
  )
  return cfg
