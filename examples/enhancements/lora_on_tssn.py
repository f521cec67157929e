# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains LoRA adapters on a ternary Gemma 3 270M, which stays packed.

Gradients on kauldron, as in the official lora.py; next-token loss on text.
Start from what heal_tssn.py made for anything of use:

python -m gemma_ext.train --config=examples/enhancements/lora_on_tssn.py \
    [--config.aux.start=out/healed-tssn]
"""

from kauldron import konfig

with konfig.imports():
  from gemma import gm
  from kauldron import kd
  import optax

  from gemma_ext import nn as gx_nn
  from gemma_ext import train


def get_config():
  """The preset `tssn`; adapters of rank 4 on every einsum."""
  cfg = kd.train.Trainer(
    seed=0,
    workdir='out/lora-tssn',
    num_train_steps=200,
    stop_after_steps=None,
    log_metrics_every=10,
    log_summaries_every=1000,
    checkpointer=kd.ckpts.Checkpointer(save_interval_steps=50, max_to_keep=2),
    aux={
      # Dense, and then compressed first; or compressed with the recipe already.
      'start': 'gemma3-270m',
      'recipe': 'tssn',
      'learning_rate': 1e-3,
    },
  )
  cfg.model = gx_nn.LoRA(
    rank=4,
    target='.*',
    model=gx_nn.Compressed(
      model=gm.nn.Gemma3_270M(tokens='batch.input'), recipe=cfg.ref.aux.recipe
    ),
  )
  cfg.init_transform = gm.ckpts.SkipLoRA(
    wrapped=train.FromCheckpoint(
      checkpoint=cfg.ref.aux.start,
      recipe=cfg.ref.aux.recipe,
      text='sample',
      tokens=8192,
    )
  )
  cfg.train_ds = kd.data.py.DataSource(
    data_source=train.TextWindows(
      tokenizer=cfg.ref.aux.start, text='sample', tokens=65_536, length=256
    ),
    batch_size=1,
    shuffle=True,
    num_epochs=None,
    num_workers=0,
  )
  cfg.train_losses = {
    'xentropy': kd.losses.SoftmaxCrossEntropyWithIntLabels(
      logits='preds.logits', labels='batch.target', mask='batch.mask'
    ),
  }
  cfg.optimizer = optax.chain(
    kd.optim.partial_updates(
      optax.adam(cfg.ref.aux.learning_rate), mask=kd.optim.select('lora')
    ),
    gx_nn.freeze_codes(),
  )
  return cfg
