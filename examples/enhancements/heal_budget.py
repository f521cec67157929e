# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Heals Gemma 3 270M where a budget of 20% has compressed it.

The directory of `python -m gemma_ext.compress --budget=20%` is what it starts
from; it keeps the width of every weight, and its size. Norms and codes of the
feed-forward layers and of attention may move; the table of embeddings stays,
and what its rounding changes is among what the others make up for. Scales stay,
too: in one byte they are a tenth from each other. A code turns over only where
nearly all steps agree on it: at four times this rate one layer's loss doubled.

python -m gemma_ext.compress --checkpoint=gemma3-270m --budget=20% \
    --output=out/20
python -m gemma_ext.train --config=examples/enhancements/heal_budget.py
"""

from kauldron import konfig

with konfig.imports():
  from gemma_ext import train


def get_config():
  """End to end against the dense model's distribution; other budgets alike."""
  return train.Heal(
    checkpoint='gemma3-270m',
    compressed='out/20',
    output='out/20-healed',
    text='sample',
    dtype='float32',
    tokens=131_072,
    seed=0,
    save_seconds=600.0,
    cache='out/healing.calibration',
    overwrite=False,
    stages=(
      train.Distill(
        batch_windows=1,
        vocabulary=16_384,
        rest=2048,
        rewrite=0.3,
        integers='attn',
        latents='codes',
        optimizer=train.Gradient(
          steps=220,
          learning_rate=5e-3,
          scale_rate=0.0,
          integer_rate=1e-3,
          norm_rate=5e-4,
        ),
      ),
    ),
  )
