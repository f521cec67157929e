# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""How many bytes a model's weights take, and would take in bf16."""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext import nn as gx_nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSizes:
  """Sizes of a parameter tree.

  Attributes:
    weight_bytes: Bytes of all arrays as they are held.
    dense_bf16_bytes: Bytes if every weight were a bfloat16.
    num_weights: Weights that the arrays stand for.
  """

  weight_bytes: int
  dense_bf16_bytes: int
  num_weights: int


def weight_sizes(model: Any, params: Mapping[str, Any]) -> WeightSizes:
  """Sizes of parameters, packed leaves counted as the weights they stand for.

  Args:
    model: The model; of a `Compressed` one, the dense model inside says how
      many weights a packed leaf stands for.
    params: Nested dicts; a packed leaf is a dict of 'codes' and 'scale', or of
      several of these where a weight has a correction.

  Raises:
    ParamsMismatchError: A packed leaf where the dense model has no weight.
  """
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
  packed: list[str] = []
  count = _count(params, '', packed)
  if packed:
    dense = _dense_shapes(model)
    # Bands of a table stand for the table, together.
    wholes = {re.sub(r'/rows_\d+$', '', path): path for path in packed}
    for whole, path in wholes.items():
      leaf = _get(dense, whole)
      if leaf is None:
        raise errors.ParamsMismatchError(
          f'{path!r} is packed, but {type(model).__name__} has no weight'
          ' there. Model and parameters do not belong together.'
        )
      count += math.prod(leaf.shape)
  return WeightSizes(
    weight_bytes=int(held), dense_bf16_bytes=2 * count, num_weights=count
  )


def _count(tree: Mapping[str, Any], prefix: str, packed: list[str]) -> int:
  """Counts the dense weights and appends the paths of the packed leaves."""
  total = 0
  for key, value in tree.items():
    path = f'{prefix}/{key}' if prefix else key
    if key in ('rank', 'mean') and 'rows_0' in tree:
      continue  # Places of the rows of a table and their mean, no weights.
    if not isinstance(value, Mapping):
      total += math.prod(value.shape)
    elif {'codes', 'scale'} <= set(value) or set(value) == {*gx_nn.ROLES}:
      packed.append(path)
    else:
      total += _count(value, path, packed)
  return total


def _dense_shapes(model: Any) -> Mapping[str, Any]:
  while hasattr(model, 'model'):
    model = model.model
  tokens = jnp.ones((1, 1), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)['params']


def _get(tree: Mapping[str, Any], path: str) -> Any:
  node: Any = tree
  for key in path.split('/'):
    if not isinstance(node, Mapping) or key not in node:
      return None
    node = node[key]
  return None if isinstance(node, Mapping) else node
