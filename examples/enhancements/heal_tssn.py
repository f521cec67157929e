# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Heals Gemma 3 270M with all feed-forward layers in one ternary plane.

First layer by layer, against the dense model's activations, which a little text
is enough for; then end to end, against its distribution, on more text and on
some that the dense model writes. Five codes a byte and scales of one byte pay
for groups of 16: 2.11 bits a weight, as against 2.125 of the preset `tssn` with
groups of 128.

python -m gemma_ext.train --config=examples/enhancements/heal_tssn.py
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
    output='out/healed-tssn',
    text='sample',
    tokens=229_376,
    block_tokens=49_152,
    written_tokens=98_304,
    seed=0,
    save_seconds=600.0,
    cache='out/healing.calibration',
    overwrite=False,
    stages=(
      train.Block(
        weighting='fisher_full',
        batch_tokens=2048,
        optimizer=train.Gradient(
          steps=45, learning_rate=8e-3, scale_rate=4e-3, norm_rate=2e-3
        ),
      ),
      train.Distill(
        batch_windows=1,
        vocabulary=16_384,
        rest=2048,
        rewrite=0.3,
        integers='attn',
        optimizer=train.Gradient(
          steps=740,
          learning_rate=3e-3,
          scale_rate=2e-3,
          integer_rate=1e-3,
          norm_rate=6e-4,
        ),
      ),
    ),
  )
