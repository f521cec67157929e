# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Evolves the codes of one ternary layer of Gemma 3 270M, without gradients.

Every row of a weight is a population of its own: each forward pass tries a
mutant of all of them, and each row keeps what lowers its own error. First the
gate and up rows, against the dense activations; then the rows of the down
projection, against the dense output; then norms and scales, by low-rank noise.

python -m gemma_ext.train --config=examples/enhancements/evolve_topology.py
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
    output='out/evolved-layer-8',
    cache='',
    text='sample',
    tokens=32_768,
    seed=0,
    overwrite=False,
    stages=(
      _rows('gating_einsum', steps=100),
      _rows('linear', steps=100),
      train.Block(
        weighting='fisher',
        batch_tokens=1024,
        optimizer=train.Evolution(
          steps=60,
          population=16,
          chunk=2,
          form='fixed',
          sigma=0.01,
          learning_rate=0.002,
        ),
      ),
    ),
  )


def _rows(weights: str, *, steps: int):
  return train.Block(
    weights=weights,
    weighting='fisher',
    batch_tokens=2048,
    optimizer=train.Evolution(
      steps=steps,
      population=8,
      chunk=2,
      form='integer',
      discrete='select',
      fitness='unit',
      changes=4,
      sigma=0.02,
    ),
  )
