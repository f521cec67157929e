# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""A picture of a plan: bits of every weight, layers from left to right."""

from __future__ import annotations

import os
import re

import numpy as np

from gemma_ext import errors
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _plan


def plot(plan: _plan.Plan, path: str | os.PathLike[str]) -> None:
  """Writes a PNG: bits a weight of what the plan compresses.

  Args:
    plan: The plan.
    path: The file.

  Raises:
    OptionalDependencyError: If matplotlib is not installed.
  """
  try:
    import matplotlib.figure
  except ImportError as e:
    raise errors.OptionalDependencyError(
      "The picture needs matplotlib: pip install 'gemma_ext[notebook]'."
    ) from e
  cells: dict[tuple[str, int], float] = {}
  for row in plan.rows:
    if isinstance(row.method, recipe_lib.Keep):
      continue
    layer = re.match(r'layer_(\d+)/', row.path)
    name = re.sub(r'^layer_\d+/', '', row.path)
    cells[name, int(layer[1]) if layer else -1] = row.bits_per_weight
  names = list(dict.fromkeys(name for name, _ in cells))
  numbers = sorted({number for _, number in cells})
  bits = np.full((len(names), len(numbers)), np.nan)
  for (name, number), value in cells.items():
    bits[names.index(name), numbers.index(number)] = value
  size = (2.5 + 0.42 * len(numbers), 1.6 + 0.42 * len(names))
  figure = matplotlib.figure.Figure(figsize=size, layout='constrained')
  axes = figure.subplots()
  image = axes.imshow(bits, aspect='auto', cmap='viridis', vmin=1, vmax=9)
  axes.set_yticks(range(len(names)), names, fontsize=8)
  axes.set_xticks(
    range(len(numbers)),
    ['-' if i < 0 else str(i) for i in numbers],
    fontsize=7,
  )
  axes.set_xlabel('layer')
  for (i, j), value in np.ndenumerate(bits):
    if not np.isnan(value):
      color = 'white' if value < 6 else 'black'
      axes.text(
        j, i, f'{value:.1f}', ha='center', va='center', fontsize=6, color=color
      )
  figure.colorbar(image, label='bits a weight, scales included')
  axes.set_title(
    f'{plan.bits_per_weight:.2f} bits a parameter,'
    f' {plan.nbytes / plan.dense_bytes:.1%} of dense',
    fontsize=9,
  )
  figure.savefig(path, dpi=150)
