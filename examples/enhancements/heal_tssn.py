# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Heals Gemma 3 270M with all feed-forward layers in one ternary plane.

End to end, against the dense model's distribution: on a few cores many small
steps take it further than layers healed one by one.

python -m gemma_ext.train --config=examples/enhancements/heal_tssn.py
"""

from kauldron import konfig

with konfig.imports():
  from gemma_ext import train


def get_config():
  """The preset `tssn`: ternary FFNs, the rest in 8 bits."""
  return train.Heal(
    checkpoint='gemma3-270m',
    recipe='tssn',
    output='out/healed-tssn',
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
          steps=1100, learning_rate=5e-3, scale_rate=3e-3, norm_rate=1e-3
        ),
      ),
    ),
  )
