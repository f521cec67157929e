# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""A recipe and packed parameters for the tests of our own directories."""

import jax
import jax.numpy as jnp
import numpy as np

import gemma_ext as gx
from gemma_ext.ckpts import _assemble
from tests import tiny

RECIPE = gx.Recipe.of(
  {
    r'layer_1/mlp2?': gx.Ternary(group=8, planes=2, scale='ue5m3', tied=True),
    r'layer_\d+/mlp2?': gx.Ternary(group=64),
    'embedder/input_embedding': gx.Int(bits=8),
    r'layer_0/attn': gx.Int(bits=4, group=32),
  }
)


def packed(model, seed=0, codes=None):
  """Returns random parameters in the shapes of a compressed model."""
  rng = np.random.default_rng(seed)

  def draw(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      values = rng.standard_normal(leaf.shape)
    elif codes is not None:
      values = np.full(leaf.shape, codes)
    else:
      values = rng.integers(0, 100, leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  return jax.tree.map(draw, _assemble.expected_params(model))


def compressed_model(family='gemma3'):
  """Returns the tiny model of a family under `RECIPE`."""
  return gx.nn.Compressed(model=tiny.model(family), recipe=RECIPE)


def equal(a, b):
  """Whether two trees have the same types and values."""
  return jax.tree.all(
    jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
  )
