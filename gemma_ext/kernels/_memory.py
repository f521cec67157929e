# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Where weights lie in the memory of a CPU."""

from collections.abc import Iterable
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
  if sum(leaves[i].nbytes for i in moves) < _LEAST:
    return tree
  views = empty_side_by_side(
    [(leaves[i].shape, leaves[i].dtype) for i in moves]
  )
  for i, view in zip(moves, views, strict=True):
    np.copyto(view, np.asarray(leaves[i]))
    leaves[i] = jax.device_put(view, leaves[i].sharding)
  return jax.tree.unflatten(structure, leaves)


def empty_side_by_side(
  specs: Iterable[tuple[tuple[int, ...], Any]],
) -> list[np.ndarray]:
  """Arrays side by side in large pages, which hold nothing yet.

  `jax.device_put(array, may_alias=True)` takes them on a CPU as they are.

  Args:
    specs: Shape and type of each.

  Returns:
    The arrays, in this order. Their memory is one piece: it is free again when
    the last of them is.
  """
  places, end = [], 0
  for shape, dtype in specs:
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    places.append((end, size, shape, dtype))
    end += -(-size // _ALIGN) * _ALIGN
  # Zeros would come from pages that nothing has asked to be large.
  memory = np.empty(end + _PAGE, np.uint8)
  first = -memory.ctypes.data % _PAGE
  return [
    memory[first + place : first + place + size].view(dtype).reshape(shape)
    for place, size, shape, dtype in places
  ]


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
