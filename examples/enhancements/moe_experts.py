# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 270M with 32 experts a layer, half of them for every token.

Experts of 64 neurons that a small linear router chooses: at decode only the
weights of the chosen ones are read (`gx.kernels.experts_ffn`), which pays for
more perplexity than experts of one neuron, see `moe_carve.py`. Packing them
afterwards is one call: `gx.compress(healed.model.model, healed.params, recipe)`
with a recipe whose `MoE` has `weights=gx.Int(bits=8, group=64)`.

python -m gemma_ext.train --config=examples/enhancements/moe_experts.py
"""

from kauldron import konfig

with konfig.imports():
  from gemma_ext import recipe
  from gemma_ext import train


def get_config():
  """50% of the neurons, in experts of 64."""
  return train.Heal(
    checkpoint='gemma3-270m',
    recipe=recipe.Recipe(
      rules=((r'layer_\d+/mlp2?', recipe.MoE(num_experts=32, top_k=32)),)
    ),
    active=0.5,
    output='out/moe-experts-50',
    text='sample',
    tokens=229_376,
    fit_tokens=32_768,
    seed=0,
    save_seconds=600.0,
    cache='out/moe.calibration',
    overwrite=False,
    stages=(
      train.Distill(
        batch_windows=1,
        vocabulary=16_384,
        rest=2048,
        optimizer=train.Gradient(steps=1200, dense_rate=1e-3, norm_rate=6e-4),
      ),
    ),
  )
