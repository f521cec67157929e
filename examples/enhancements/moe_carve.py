# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Half of the feed-forward neurons of Gemma 3 270M for every token.

Every neuron is an expert, chosen by its own gate; how many each layer gets
follows from what leaving some out costs there. Then the layers, their routers
and all norms are distilled from the dense model.

python -m gemma_ext.train --config=examples/enhancements/moe_carve.py

The less is left out, the lower the rates that do good: with three quarters of
the neurons, a quarter of those below. --config.dtype=float32 takes two thirds
of the time on CPUs without bfloat16 instructions.

python -m gemma_ext.train --config=examples/enhancements/moe_carve.py \
    --config.active=0.75 --config.output=out/moe-75 \
    '--config.stages[0].optimizer.steps=150' \
    '--config.stages[0].optimizer.dense_rate=1e-4' \
    '--config.stages[0].optimizer.norm_rate=1e-4'
"""

from kauldron import konfig

with konfig.imports():
  from gemma_ext import recipe
  from gemma_ext import train


def get_config():
  """50% of the neurons, 67% of the weights that are read."""
  return train.Heal(
    checkpoint='gemma3-270m',
    recipe=recipe.Recipe(
      rules=(
        (
          r'layer_\d+/mlp2?',
          recipe.MoE(num_experts=2048, top_k=2048, router='gate'),
        ),
      )
    ),
    active=0.5,
    output='out/moe-50',
    text='sample',
    tokens=163_840,
    fit_tokens=16_384,
    seed=0,
    save_seconds=600.0,
    cache='out/moe.calibration',
    overwrite=False,
    stages=(
      train.Distill(
        batch_windows=1,
        vocabulary=16_384,
        rest=2048,
        optimizer=train.Gradient(steps=300, dense_rate=4e-4, norm_rate=3e-4),
      ),
    ),
  )
