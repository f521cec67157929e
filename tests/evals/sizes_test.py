# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the sizes of dense and packed parameter trees."""

import types

import jax
import jax.numpy as jnp
import pytest

from gemma_ext import errors
from gemma_ext import evals
from tests import tiny


@pytest.mark.parametrize('dtype, size', [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_dense(dtype, size):
  model = tiny.model('gemma3', dtype=dtype)
  params = tiny.params(model)
  sizes = evals.weight_sizes(model, params)
  count = sum(x.size for x in jax.tree.leaves(params))
  assert sizes.num_weights == count
  assert sizes.dense_bf16_bytes == 2 * count
  assert sizes.weight_bytes == size * count


@pytest.mark.parametrize('wrapped', [False, True])
def test_packed_leaves_count_as_their_weights(wrapped):
  model = tiny.model('gemma3', dtype=jnp.bfloat16)
  params = tiny.params(model)
  dense = evals.weight_sizes(model, params)
  # 2 x 256 x 128 weights at 2 bits, with a bf16 scale for each 128.
  params['layer_0']['mlp']['gating_einsum'] = {
    'codes': jnp.zeros((1, 2, 256, 32), jnp.uint8),
    'scale': jnp.zeros((1, 2, 256, 1), jnp.bfloat16),
  }
  holder = types.SimpleNamespace(model=model) if wrapped else model
  sizes = evals.weight_sizes(holder, params)
  assert sizes.num_weights == dense.num_weights
  assert sizes.dense_bf16_bytes == dense.dense_bf16_bytes
  saved = 2 * 256 * 128 * 2 - (2 * 256 * 32 + 2 * 256 * 2)
  assert sizes.weight_bytes == dense.weight_bytes - saved


@pytest.mark.parametrize('place', ['layer_9', 'layer_0', 'mlp'])
def test_packed_leaf_without_a_weight(place):
  model = tiny.model('gemma3')
  params = tiny.params(model)
  parent = params['layer_0'] if place == 'mlp' else params
  parent[place] = {
    'codes': jnp.zeros((1, 4), jnp.uint8),
    'scale': jnp.zeros((1, 1), jnp.bfloat16),
  }
  with pytest.raises(errors.ParamsMismatchError, match=place):
    evals.weight_sizes(model, params)
