# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Heals Gemma 3 270M with all feed-forward layers in two ternary planes.

End to end, against the dense model's distribution: on a few cores many small
steps take it further than layers healed one by one.

python -m gemma_ext.train --config=examples/enhancements/heal_tssn2.py
"""

from kauldron import konfig

with konfig.imports():
  from gemma_ext import train


def get_config():
  """The preset `tssn2`: FFNs in two planes, the rest in 8 bits."""
  return train.Heal(
    checkpoint='gemma3-270m',
    recipe='tssn2',
    output='out/healed-tssn2',
    text='sample',
    tokens=262_144,
    seed=0,
    save_seconds=600.0,
    overwrite=False,
    stages=(
      train.Distill(
        batch_windows=1,
        vocabulary=16_384,
        rest=2048,
        optimizer=train.Gradient(
          steps=600, learning_rate=2.5e-3, scale_rate=1.5e-3, norm_rate=5e-4
        ),
      ),
    ),
  )
