# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Where weights lie in the memory of a CPU."""

import math
from typing import Any

import jax
import numpy as np

# As aligned as XLA wants it, to take an array as it is.
_ALIGN = 64
# Least bytes for which numpy asks for large pages, and their usual size.
_LEAST = 4 << 20
_PAGE = 2 << 20


def side_by_side(tree: Any) -> Any:
  """Copies the arrays of a tree side by side, into large pages.

  Weights are read from the first to the last for every token, and with pages of
  4 KiB a processor looks for pages for a quarter of that time. numpy asks Linux
  for large ones; where there are none nothing is lost.

  Args:
    tree: Parameters. Arrays that are not on one CPU device stay where they are.

  Returns:
    The tree with the same values. What it was made of can be freed.
  """
  leaves, structure = jax.tree.flatten(tree)
  moves = [i for i, leaf in enumerate(leaves) if _movable(leaf)]
  places, end = [], 0
  for i in moves:
    places.append(end)
    end += -(-leaves[i].nbytes // _ALIGN) * _ALIGN
  if end < _LEAST:
    return tree
  # Zeros would come from pages that nothing has asked to be large.
  memory = np.empty(end + _PAGE, np.uint8)
  first = -memory.ctypes.data % _PAGE
  for i, place in zip(moves, places, strict=True):
    leaf = leaves[i]
    begin = first + place
    view = memory[begin : begin + leaf.nbytes].view(leaf.dtype)
    view = view.reshape(leaf.shape)
    np.copyto(view, np.asarray(leaf))
    leaves[i] = jax.device_put(view, leaf.sharding)
    del leaf
  return jax.tree.unflatten(structure, leaves)


def _movable(leaf: Any) -> bool:
  """Whether an array is whole in the memory of one CPU device."""
  return (
    isinstance(leaf, jax.Array)
    and not isinstance(leaf, jax.core.Tracer)
    and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
    and math.prod(leaf.shape) > 0
    and len(leaf.sharding.device_set) == 1
    and leaf.devices().pop().platform == 'cpu'
  )
