# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Heals Gemma 3 270M in one ternary plane on a GPU, in minutes.

As `heal_tssn.py`, with twenty times the text, most of which the dense model
writes, and thirty times the tokens: batches of 16 windows.

python -m gemma_ext.train --config=examples/enhancements/heal_tssn_gpu.py
"""

from kauldron import konfig

with konfig.imports():
  from gemma_ext import recipe
  from gemma_ext import train


def get_config():
  """Ternary FFNs of 2.11 bits a weight, the rest in 8 bits."""
  return train.Heal(
    checkpoint='gemma3-270m',
    recipe=recipe.Recipe(
      rules=(
        (
          r'layer_\d+/mlp2?',
          recipe.Ternary(group=16, packing='5trit', scale='ue5m3'),
        ),
        (r'.*', recipe.Int(bits=8, group=128)),
      )
    ),
    output='out/healed-tssn-gpu',
    text='sample',
    tokens=229_376,
    block_tokens=98_304,
    written_tokens=2_097_152,
    seed=0,
    save_seconds=600.0,
    cache='out/healing-gpu.calibration',
    overwrite=False,
    stages=(
      train.Block(
        weighting='fisher_full',
        batch_tokens=2048,
        optimizer=train.Gradient(
          steps=100, learning_rate=6e-3, scale_rate=3e-3, norm_rate=2e-3
        ),
      ),
      train.Distill(
        batch_windows=16,
        vocabulary=16_384,
        rest=2048,
        rewrite=0.3,
        integers='attn',
        optimizer=train.Gradient(
          steps=1500,
          learning_rate=3e-3,
          scale_rate=2e-3,
          integer_rate=1e-3,
          norm_rate=6e-4,
        ),
      ),
    ),
  )
