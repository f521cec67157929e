# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Distils a ternary Gemma 3 270M from the dense one, forward passes only.

MeZO on kauldron: scales and norms move, codes stay. The loss is the divergence
from the dense model on a shortlist of the vocabulary. Start from what
heal_tssn.py made for anything of use:

python -m gemma_ext.train --config=examples/enhancements/mezo_distill.py \
    [--config.aux.start=out/healed-tssn]
"""

from kauldron import konfig

with konfig.imports():
  from gemma import gm
  from kauldron import kd

  from gemma_ext import nn as gx_nn
  from gemma_ext import train


def get_config():
  """The preset `tssn`; two pairs of passes over a window a step."""
  cfg = kd.train.Trainer(
    seed=0,
    workdir='out/mezo-tssn',
    num_train_steps=1000,
    stop_after_steps=None,
    log_metrics_every=10,
    log_summaries_every=1000,
    checkpointer=kd.ckpts.Checkpointer(save_interval_steps=100, max_to_keep=2),
    aux={
      'teacher': 'gemma3-270m',
      # Dense, and then compressed first; or compressed with the recipe already.
      'start': 'gemma3-270m',
      'recipe': 'tssn',
    },
    # It takes its own steps.
    optimizer=None,
  )
  cfg.model = gx_nn.Compressed(
    model=gm.nn.Gemma3_270M(tokens='batch.input'), recipe=cfg.ref.aux.recipe
  )
  cfg.init_transform = train.FromCheckpoint(
    checkpoint=cfg.ref.aux.start,
    recipe=cfg.ref.aux.recipe,
    text='sample',
    tokens=8192,
  )
  cfg.train_ds = kd.data.py.DataSource(
    data_source=train.TeacherWindows(
      checkpoint=cfg.ref.aux.teacher,
      text='sample',
      tokens=32_768,
      length=512,
      vocabulary=8192,
      rest=2048,
    ),
    batch_size=1,
    shuffle=True,
    num_epochs=None,
    num_workers=0,
  )
  cfg.train_losses = {
    'kl': train.TeacherKL(teacher=cfg.ref.train_ds.data_source),
  }
  cfg.trainstep = train.MezoStep(
    weights=r'.*',
    method=train.Mezo(
      steps=cfg.ref.num_train_steps,
      pairs=2,
      sigma=1e-2,
      learning_rate=1e-3,
      form='fixed',
    ),
  )
  return cfg
