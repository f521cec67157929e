# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""A picture of a plan: bits of every weight.

Tables of embeddings as bars of their bands of rows, and below them the weights
of the layers, from left to right.
"""

from __future__ import annotations

import dataclasses
import os
import re

import numpy as np

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _plan

# Ends of the scale of colours.
_LEAST, _MOST = 1.0, 9.0


def _summed(plan: _plan.Plan) -> list[_plan.PlanRow]:
  """The rows of a plan, a weight and its correction as one."""
  found: dict[str, _plan.PlanRow] = {}
  for row in plan.rows:
    whole, _, role = row.path.rpartition('/')
    if role not in gx_nn.ROLES:
      found[row.path] = row
    elif role == gx_nn.BASE:
      found[whole] = dataclasses.replace(row, path=whole)
    else:
      nbytes = found[whole].nbytes + row.nbytes
      found[whole] = dataclasses.replace(found[whole], nbytes=nbytes)
  return [*found.values()]


def plot(plan: _plan.Plan, path: str | os.PathLike[str]) -> None:
  """Writes a PNG: bits a weight of what the plan compresses.

  Args:
    plan: The plan.
    path: The file.

  Raises:
    OptionalDependencyError: If matplotlib is not installed.
  """
  try:
    import matplotlib
    import matplotlib.figure
  except ImportError as e:
    raise errors.OptionalDependencyError(
      "The picture needs matplotlib: pip install 'gemma_ext[notebook]'."
    ) from e
  cells: dict[tuple[str, int], float] = {}
  tables: dict[str, list[_plan.PlanRow]] = {}
  for row in _summed(plan):
    if isinstance(row.method, recipe_lib.Keep):
      continue
    if layer := re.match(r'layer_(\d+)/(.*)', row.path):
      cells[layer[2], int(layer[1])] = row.bits_per_weight
    else:
      tables.setdefault(re.sub(r'/rows_\d+$', '', row.path), []).append(row)
  names = list(dict.fromkeys(name for name, _ in cells))
  numbers = sorted({number for _, number in cells})
  heights = [0.5 * len(tables) + 0.5, 0.42 * len(names) + 0.5]
  figure = matplotlib.figure.Figure(
    figsize=(3.0 + 0.42 * max(len(numbers), 8), sum(heights) + 0.8),
    layout='constrained',
  )
  top, bottom = figure.subplots(2, height_ratios=heights)
  colors = matplotlib.colormaps['viridis']
  scale = lambda bits: (bits - _LEAST) / (_MOST - _LEAST)
  ink = lambda bits: 'white' if bits < 6 else 'black'
  for i, rows in enumerate(tables.values()):
    start = 0
    for row in rows:
      count = row.shape[0]
      bits = row.bits_per_weight
      top.barh(i, count, left=start, color=colors(scale(bits)), height=0.8)
      if count > 0.04 * sum(r.shape[0] for r in rows):
        top.text(
          start + count / 2,
          i,
          f'{bits:.1f}',
          ha='center',
          va='center',
          fontsize=6,
          color=ink(bits),
        )
      start += count
  top.set_yticks(range(len(tables)), [*tables], fontsize=8)
  top.margins(x=0)
  top.set_xlabel('row', fontsize=8)
  top.tick_params(axis='x', labelsize=7)
  grid = np.full((max(len(names), 1), max(len(numbers), 1)), np.nan)
  for (name, number), value in cells.items():
    grid[names.index(name), numbers.index(number)] = value
  image = bottom.imshow(
    grid, aspect='auto', cmap=colors, vmin=_LEAST, vmax=_MOST
  )
  bottom.set_yticks(range(len(names)), names, fontsize=8)
  bottom.set_xticks(range(len(numbers)), map(str, numbers), fontsize=7)
  bottom.set_xlabel('layer', fontsize=8)
  for (i, j), value in np.ndenumerate(grid):
    if not np.isnan(value):
      bottom.text(
        j,
        i,
        f'{value:.1f}',
        ha='center',
        va='center',
        fontsize=6,
        color=ink(value),
      )
  figure.colorbar(image, ax=[top, bottom], label='bits a weight, with scales')
  figure.suptitle(
    f'{plan.bits_per_weight:.2f} bits a parameter,'
    f' {plan.nbytes / plan.dense_bytes:.1%} of dense',
    fontsize=9,
  )
  figure.savefig(path, dpi=150)
