# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Heals one ternary feed-forward layer of Gemma 3 270M, in minutes on a CPU.

python -m gemma_ext.train --config=examples/enhancements/heal_tssn_one_layer.py
"""

from kauldron import konfig

with konfig.imports():
  from gemma_ext import recipe
  from gemma_ext import train


def get_config():
  """Layer 8 in one ternary plane, everything else as it is."""
  return train.Heal(
    checkpoint='gemma3-270m',
    recipe=recipe.Recipe(
      rules=(('layer_8/mlp', recipe.Ternary(group=128)),),
    ),
    output='out/healed-layer-8',
    text='sample',
    tokens=32_768,
    seed=0,
    overwrite=False,
    stages=(
      train.Block(
        weighting='fisher_full',
        batch_tokens=2048,
        optimizer=train.Gradient(
          steps=200, learning_rate=4e-3, scale_rate=2e-3, norm_rate=1e-3
        ),
      ),
    ),
  )
