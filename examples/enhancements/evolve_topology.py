# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Evolves the codes of one ternary layer of Gemma 3 270M, without gradients.

Every row of a weight is a population of its own, and a mutant of it is judged
by the one column that it changes: first the gate and up rows, against the dense
activations, then the rows of the down projection, against the dense output.
Scales mutate along. Norms and scales follow, by low-rank noise on the whole.

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
      train.Block(
        weights='gating_einsum',
        weighting='fisher',
        batch_tokens=8192,
        optimizer=train.EvolveRows(steps=4, generations=300, population=2),
      ),
      train.Block(
        weights='linear',
        weighting='fisher',
        batch_tokens=16_384,
        optimizer=train.EvolveRows(steps=4, generations=2000, population=2),
      ),
      train.Block(
        weighting='fisher',
        batch_tokens=1024,
        optimizer=train.Evolution(
          steps=40,
          population=16,
          chunk=2,
          form='fixed',
          sigma=0.01,
          learning_rate=0.002,
        ),
      ),
    ),
  )
