# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of where weights lie in memory."""

import jax
import jax.numpy as jnp
import numpy as np

import gemma_ext.kernels as kernels


def _tree():
  key = jax.random.key(0)
  return {
    'big': jax.random.bits(key, (5 << 20,), jnp.uint8),
    'odd': jnp.arange(33, dtype=jnp.bfloat16).reshape(3, 11),
    'empty': jnp.zeros((0, 4)),
    'codes': jnp.arange(-7, 7, dtype=jnp.int8),
    'key': key,
    'number': 3,
  }


def test_values_and_types_stay():
  tree = _tree()
  got = kernels.side_by_side(tree)
  assert jax.tree.structure(got) == jax.tree.structure(tree)
  for name in ('big', 'odd', 'empty', 'codes'):
    assert isinstance(got[name], jax.Array)
    assert got[name].dtype == tree[name].dtype
    assert got[name].sharding == tree[name].sharding
    np.testing.assert_array_equal(got[name], tree[name])
  assert got['key'] is tree['key'] and got['number'] == 3


def test_arrays_lie_side_by_side_in_large_pages():
  tree = _tree()
  got = kernels.side_by_side(tree)
  place = {
    name: got[name].unsafe_buffer_pointer() for name in ('big', 'codes', 'odd')
  }
  assert place['big'] % (2 << 20) == 0
  # In the order of the tree, at cache lines.
  assert place['codes'] == place['big'] + (5 << 20)
  assert place['odd'] == place['codes'] + 64


def test_what_is_small_stays_where_it_is():
  tree = {'a': jnp.ones((100, 100))}
  assert kernels.side_by_side(tree)['a'] is tree['a']


def test_inside_of_jit():
  big = jnp.ones((2 << 20,))
  got = jax.jit(lambda x: kernels.side_by_side({'x': x})['x'] + 1)(big)
  assert float(got.min()) == 2.0


def test_arrays_on_several_devices_stay():
  devices = np.array(jax.devices())
  mesh = jax.sharding.Mesh(devices, ('x',))
  spec = jax.sharding.PartitionSpec('x')
  x = jax.device_put(
    jnp.ones((8 << 20,), jnp.uint8), jax.sharding.NamedSharding(mesh, spec)
  )
  if len(devices) > 1:
    assert kernels.side_by_side([x])[0] is x
