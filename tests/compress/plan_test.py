# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of `plan`: predicted bytes are the bytes of leaves and of files."""

import dataclasses
import json
import re
import time

from flax import traverse_util
from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from tests import tiny

_RECIPES = {
  'int8': gx.Recipe.of('int8'),
  'tssn2': gx.Recipe.of('tssn2'),
  'mixed': gx.Recipe.of(
    {
      'layer_0/attn': gx.Keep(),
      'mlp2?': gx.Ternary(group=64, packing='5trit', density=0.5),
      'embedder': gx.Int(bits=5, group=32),
      '.*router.*': gx.Int(bits=8),
      '.*': gx.Int(bits=3),
    }
  ),
}


def _leaves(model, recipe):
  """Abstract leaves of the compressed model by path of the dense parameter."""
  compressed = gx.nn.Compressed(model=model, recipe=recipe)
  tokens = jnp.ones((1, 2), jnp.int32)
  tree = jax.eval_shape(compressed.init, jax.random.key(0), tokens)['params']
  flat = traverse_util.flatten_dict(tree, sep='/')
  leaves: dict[str, list[jax.ShapeDtypeStruct]] = {}
  for path, leaf in flat.items():
    # A norm's own parameter is called 'scale' as well.
    stem = path.rpartition('/')[0]
    leaves.setdefault(stem if f'{stem}/codes' in flat else path, []).append(
      leaf
    )
  return leaves


def _nbytes(leaves):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize('recipe', _RECIPES)
@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_bytes_of_every_leaf(family, recipe):
  model, recipe = tiny.model(family), _RECIPES[recipe]
  if family not in ('gemma3n', 'gemma4_moe'):  # The others have no router.
    rules = [rule for rule in recipe.rules if 'router' not in rule[0]]
    recipe = gx.Recipe(rules=tuple(rules))
  plan = gx.plan(model, recipe)
  leaves = _leaves(model, recipe)
  assert {row.path: row.nbytes for row in plan.rows} == {
    path: _nbytes(value) for path, value in leaves.items()
  }
  assert plan.nbytes == sum(map(_nbytes, leaves.values()))
  params = jax.eval_shape(
    model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32)
  )
  assert plan.num_weights == sum(x.size for x in jax.tree.leaves(params))
  assert plan.dense_bytes == _nbytes(jax.tree.leaves(params))
  assert plan.nbytes < plan.dense_bytes


def test_bytes_of_compressed_arrays():
  model = tiny.model('gemma4')
  recipe = gx.Recipe.of({'layer_0/mlp/linear': gx.Ternary(group=64)})
  params = gx.compress(model, tiny.params(model), recipe)
  assert gx.plan(model, recipe).nbytes == sum(
    leaf.nbytes for leaf in jax.tree.leaves(params)
  )


def test_by_hand():
  model = tiny.model('gemma3', dtype=jnp.bfloat16)
  recipe = gx.Recipe.of({'mlp': gx.Ternary(), 'embedder': gx.Int(bits=8)})
  plan = gx.plan(model, recipe)
  rows = {row.path: row for row in plan.rows}
  linear = rows['layer_0/mlp/linear']
  assert (linear.shape, linear.method) == ((256, 128), gx.Ternary())
  assert (linear.group, linear.size) == (128, 256 * 128)
  assert linear.dense_bytes == 2 * 256 * 128
  # 2 bits a weight, and a bfloat16 scale for 128 of them.
  assert linear.nbytes == 256 * 128 // 4 + 2 * 256
  assert linear.bits_per_weight == 2.125
  table = rows['embedder/input_embedding']
  assert table.nbytes == 512 * 128 + 2 * 512
  assert table.group is None
  norm = rows['final_norm/scale']
  assert (norm.method, norm.nbytes) == (gx.Keep(), 2 * 128)
  assert plan.bits_per_weight == 8 * plan.nbytes / plan.num_weights


def test_group_that_does_not_divide_is_resolved():
  recipe = gx.Recipe.of({'attn_vec_einsum': gx.Int(bits=4, group=96)})
  rows = {row.path: row for row in gx.plan(tiny.model('gemma3'), recipe).rows}
  assert rows['layer_0/attn/attn_vec_einsum/w'].group == 64


def test_presets_count_the_layers_of_the_model():
  plan = gx.plan(tiny.model('gemma3'), 'tssn-last-1')
  ternary = {r.path for r in plan.rows if isinstance(r.method, gx.Ternary)}
  assert ternary == {'layer_2/mlp/gating_einsum', 'layer_2/mlp/linear'}


def test_plan_of_a_compressed_model_is_that_of_the_dense_one():
  model = tiny.model('gemma3')
  compressed = gx.nn.Compressed(model=model, recipe='int8')
  assert gx.plan(compressed, 'int4') == gx.plan(model, 'int4')


# ------------------------------- official sizes ------------------------------

_OFFICIAL = {
  'gemma3_27b': (
    lambda: gm.nn.Gemma3_27B(text_only=True),
    27_009_002_240,
    (8.12, 8.14),
  ),
  'gemma4_31b': (
    lambda: gm.nn.Gemma4_31B(text_only=True),
    30_697_345_340,
    (8.12, 8.14),
  ),
  'gemma4_26b_a4b': (
    lambda: gm.nn.Gemma4_26B_A4B(text_only=True),
    25_233_141_790,
    (8.12, 8.2),
  ),
}


@pytest.mark.parametrize('name', _OFFICIAL)
def test_official_sizes_in_seconds(name):
  make, weights, (low, high) = _OFFICIAL[name]
  start = time.monotonic()
  plan = gx.plan(make(), 'int8')
  assert time.monotonic() - start < 30
  assert plan.num_weights == weights
  assert plan.dense_bytes == 2 * weights
  assert low < plan.bits_per_weight < high


def test_ternary_bits_of_an_official_size():
  plan = gx.plan(gm.nn.Gemma3_27B(text_only=True), 'tssn')
  ternary = [r for r in plan.rows if isinstance(r.method, gx.Ternary)]
  assert len(ternary) == 2 * 62
  assert {row.group for row in ternary} == {128}
  assert {row.bits_per_weight for row in ternary} == {2.125}
  size = sum(row.size for row in ternary)
  assert size == 62 * 3 * 5376 * 21504
  assert plan.nbytes < 0.25 * plan.dense_bytes


# --------------------------------- for reading -------------------------------


def test_table():
  model = tiny.model('gemma3', dtype=jnp.bfloat16)
  recipe = gx.Recipe.of(
    {
      'layer_0/mlp': gx.Ternary(planes=2, pattern=(2, 4)),
      'layer_1/mlp': gx.Ternary(density=0.25, packing='5trit'),
      'layer_2/mlp/gating_einsum': gx.Ternary(
        planes=2, group=8, scale='ue5m3', tied=True
      ),
      'embedder': gx.Int(bits=4, group=32),
      'attn': gx.Int(bits=8),
    }
  )
  plan = gx.plan(model, recipe)
  lines = str(plan).splitlines()
  cells = [re.split(r'  +', line.strip()) for line in lines]
  assert cells[0] == 'parameter,count,weights,stored as,bits,size'.split(',')
  found = {tuple(c[:5]) for c in cells}
  for row in (
    ('layer_*/mlp/linear', '1', '32,768', 'dense', '16.000'),
    (
      'layer_*/mlp/linear',
      '1',
      '32,768',
      'ternary x2 2:4 2bit, group 128',
      '4.250',
    ),
    (
      'layer_*/mlp/linear',
      '1',
      '32,768',
      'ternary density 0.25 5trit, group 128',
      '2.125',
    ),
    (
      'layer_*/mlp/gating_einsum',
      '1',
      '65,536',
      'ternary x2 tied 2bit, group 8 ue5m3',
      '5.000',
    ),
    ('embedder/input_embedding', '1', '65,536', 'int4, group 32', '4.500'),
    ('layer_*/attn/q_einsum/w', '3', '49,152', 'int8, channel', '8.125'),
  ):
    assert row in found, row
  total = cells[-2]
  assert total[0] == 'total'
  assert total[1:3] == [str(len(plan.rows)), f'{plan.num_weights:,}']
  assert total[3] == f'{plan.bits_per_weight:.3f}'
  assert lines[-1].endswith(f'({100 * plan.nbytes / plan.dense_bytes:.1f}%)')
  assert f'{plan.nbytes / (1 << 20):.2f} MiB instead of' in lines[-1]
  assert max(map(len, lines)) <= 120


def test_json():
  plan = gx.plan(tiny.model('gemma3'), 'tssn')
  found = json.loads(json.dumps(plan.to_json(), allow_nan=False))
  assert gx.Recipe.from_json(found['recipe']) == plan.recipe
  assert found['weights'] == plan.num_weights
  assert found['bytes'] == plan.nbytes == sum(r['bytes'] for r in found['rows'])
  assert found['dense_bytes'] == sum(r['dense_bytes'] for r in found['rows'])
  assert found['bits_per_weight'] == plan.bits_per_weight
  (row,) = [r for r in found['rows'] if r['path'] == 'layer_1/mlp/linear']
  assert row == {
    'path': 'layer_1/mlp/linear',
    'shape': [256, 128],
    'method': 'ternary',
    'planes': 1,
    'group': 128,
    'density': None,
    'pattern': None,
    'packing': '2bit',
    'scale': 'bf16',
    'tied': False,
    'dense_bytes': 4 * 256 * 128,
    'bytes': 256 * 128 // 4 + 2 * 256,
    'bits_per_weight': 2.125,
  }


# ------------------------------------ files ----------------------------------


def test_directory_is_within_a_percent(tmp_path):
  config = dataclasses.replace(
    tiny.TinyGemma3.config, num_embed=16_384, embed_dim=512, hidden_dim=2048
  )
  model = gm.nn.Gemma3_270M(config=config, dtype=jnp.bfloat16)
  recipe = gx.Recipe.of({'mlp': gx.Int(bits=4, group=32), '.*': gx.Int(bits=8)})
  plan = gx.plan(model, recipe)
  assert plan.nbytes > 12e6
  compressed = gx.nn.Compressed(model=model, recipe=recipe)
  tokens = jnp.ones((1, 2), jnp.int32)
  shapes = jax.eval_shape(compressed.init, jax.random.key(0), tokens)['params']
  rng = np.random.default_rng(0)

  def draw(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      # All bits are codes; noise is what a file cannot make smaller.
      data = rng.integers(0, 256, leaf.shape, np.uint8)
      return jnp.asarray(data.view(leaf.dtype))
    return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)

  params = jax.tree.map(draw, shapes)
  path = gx.ckpts.save(tmp_path / 'c', model=compressed, params=params)
  sizes = gx.ckpts.directory_bytes(path)
  assert 1 <= sizes['params'] / plan.nbytes < 1.01
  assert sizes['total'] / plan.nbytes < 1.01


# --------------------------------- bad input ---------------------------------


@pytest.mark.parametrize(
  'recipe,error',
  [
    ({'mpl': gx.Int()}, errors.UnmatchedRuleError),
    ({'.*': gx.Int(), 'mlp': gx.Int()}, errors.UnmatchedRuleError),
    ({'mlp': gx.Ternary(group=3)}, errors.GroupSizeError),
    ('tssn-last-9', errors.RecipeError),
    ('int9', errors.RecipeError),
    (None, errors.RecipeError),
  ],
)
def test_recipe_that_does_not_fit(recipe, error):
  with pytest.raises(error):
    gx.plan(tiny.model('gemma3'), recipe)
