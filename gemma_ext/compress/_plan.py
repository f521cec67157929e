# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`plan`: what a recipe makes of a model, in bytes, without its weights."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp

from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.nn import _config

_GIB = 1 << 30
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRow:
  """One parameter of the model.

  Attributes:
    path: Path of the parameter.
    shape: Shape of the dense parameter, or of what is stored beside it.
    method: How it is stored; `Keep()` for dense.
    group: Input weights that share a scale, as resolved for this shape.
    dense_bytes: Bytes in the model's own type; 0 for what the dense model does
      not have, such as the factors of a correction.
    nbytes: Bytes as planned, codes and scales.
  """

  path: str
  shape: tuple[int, ...]
  method: recipe_lib.Method
  group: int | None
  dense_bytes: int
  nbytes: int

  @property
  def size(self) -> int:
    """Weights of the dense model that it stands for."""
    return math.prod(self.shape) if self.dense_bytes else 0

  @property
  def bits_per_weight(self) -> float:
    return 8 * self.nbytes / self.size if self.size else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Predicted sizes. `str(plan)` is a table, one line a kind of module.

  Attributes:
    recipe: The recipe.
    rows: One entry for each parameter of the model.
  """

  recipe: recipe_lib.Recipe
  rows: tuple[PlanRow, ...]

  @property
  def num_weights(self) -> int:
    return sum(row.size for row in self.rows)

  @property
  def dense_bytes(self) -> int:
    return sum(row.dense_bytes for row in self.rows)

  @property
  def nbytes(self) -> int:
    return sum(row.nbytes for row in self.rows)

  @property
  def bits_per_weight(self) -> float:
    return 8 * self.nbytes / self.num_weights

  def to_json(self) -> dict[str, Any]:
    """Returns totals and every row as plain JSON values."""
    return {
      'recipe': self.recipe.to_json(),
      'weights': self.num_weights,
      'dense_bytes': self.dense_bytes,
      'bytes': self.nbytes,
      'bits_per_weight': self.bits_per_weight,
      'rows': [
        {
          'path': row.path,
          'shape': list(row.shape),
          'dense_bytes': row.dense_bytes,
          'bytes': row.nbytes,
          'bits_per_weight': row.bits_per_weight,
          # Groups as they are stored, not as they were asked for.
          **row.method.to_json(),
          'group': row.group,
        }
        for row in self.rows
      ],
    }

  def __str__(self) -> str:
    kinds: dict[tuple[str, str], list[PlanRow]] = {}
    for row in self.rows:
      kind = re.sub(r'layer_\d+', 'layer_*', row.path)
      kinds.setdefault((kind, _describe(row)), []).append(row)
    cells: list[tuple[str, ...]] = [
      ('parameter', 'count', 'weights', 'stored as', 'bits', 'size')
    ]
    for (kind, stored), rows in kinds.items():
      cells.append(_cells(kind, len(rows), rows, stored))
    cells.append(_cells('total', len(self.rows), self.rows, ''))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
      '  '.join(
        cell.ljust(w) if i in (0, 3) else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(row, widths))
      ).rstrip()
      for row in cells
    ]
    lines.insert(1, '-' * max(map(len, lines)))
    lines.insert(-1, lines[1])
    ratio = self.nbytes / self.dense_bytes
    lines.append(
      f'{_size(self.nbytes)} instead of {_size(self.dense_bytes)}'
      f' ({100 * ratio:.1f}%)'
    )
    return '\n'.join(lines)


def plan(model: nn.Module, recipe: recipe_lib.Recipe | str | dict) -> Plan:
  """Predicts the bytes of every parameter under a recipe.

  Needs no weights and no memory: a 31B model takes seconds.

  Args:
    model: The official model.
    recipe: The recipe, or what `Recipe.of` takes.

  Returns:
    The plan. Its total is what `gx.ckpts.save` writes, to within 1%.

  Raises:
    RecipeError: If the recipe does not fit the model.
    ParamsMismatchError: If it is no official model.
  """
  model, recipe = resolve(model, recipe)
  methods: dict[str, list[Any]] = {}
  for site, method in gx_nn.methods_of(model, recipe).values():
    methods.setdefault(site.whole, []).append((site, method))
  rows = []
  for whole, leaf in abstract_params(model).items():
    itemsize = leaf.dtype.itemsize
    if whole not in methods:
      nbytes = math.prod(leaf.shape) * itemsize
      rows.append(
        PlanRow(
          path=whole,
          shape=tuple(leaf.shape),
          method=recipe_lib.Keep(),
          group=None,
          dense_bytes=nbytes,
          nbytes=nbytes,
        )
      )
    for site, method in methods.get(whole, ()):
      fmt = gx_nn.format_of(method, site.layout.cols)
      rows.append(
        PlanRow(
          path=site.path,
          shape=site.layout.shape,
          method=method,
          group=fmt.group,
          dense_bytes=0 if site.is_factor else site.layout.size * itemsize,
          nbytes=fmt.nbytes(site.layout.rows, site.layout.cols),
        )
      )
    if any(site.ordered for site, _ in methods.get(whole, ())):
      count = leaf.shape[0]
      rows.append(_added(gx_nn.rank_path(whole), count, 4 * count))
    if any(site.centered for site, _ in methods.get(whole, ())):
      count = leaf.shape[1]
      rows.append(_added(gx_nn.mean_path(whole), count, 4 * count))
  rows += [
    _added(
      f'{path}/router',
      mixture.router_size,
      mixture.router_size * jnp.dtype(model.dtype).itemsize,
    )
    for path, mixture in gx_nn.mixtures_of(model, recipe).items()
  ]
  return Plan(recipe=recipe, rows=tuple(rows))


def _added(path: str, size: int, nbytes: int) -> PlanRow:
  """A parameter that the dense model does not have."""
  return PlanRow(
    path=path,
    shape=(size,),
    method=recipe_lib.Keep(),
    group=None,
    dense_bytes=0,
    nbytes=nbytes,
  )


def resolve(
  model: nn.Module, recipe: recipe_lib.Recipe | str | dict
) -> tuple[nn.Module, recipe_lib.Recipe]:
  """Returns the dense model inside `model`, and the recipe for it."""
  if isinstance(model, gx_nn.Compressed):
    model = model.model
  _config.check(model)
  return model, recipe_lib.Recipe.of(recipe, num_layers=model.config.num_layers)


def abstract_params(model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and types of a model's parameters, by path, without computing."""
  params = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))
  )['params']
  return traverse_util.flatten_dict(params, sep='/')


def _describe(row: PlanRow) -> str:
  match row.method:
    case recipe_lib.Ternary() as m:
      planes = f' x{m.planes}' if m.planes > 1 else ''
      sparse = f' {m.pattern[0]}:{m.pattern[1]}' if m.pattern else ''
      sparse = f' density {m.density:g}' if m.density else sparse
      tied = ' tied' if m.tied else ''
      scale = '' if m.scale == 'bf16' else f' {m.scale}'
      return (
        f'ternary{planes}{tied}{sparse} {m.packing}, group {row.group}{scale}'
      )
    case recipe_lib.Int() as m:
      scales = f'group {row.group}' if row.group else 'channel'
      byte = '' if m.scale == 'bf16' else f' {m.scale}'
      return f'int{m.bits}, {scales}{byte}'
    case _:
      return 'dense'


def _cells(name, count, rows, stored) -> tuple[str, ...]:
  size = sum(row.size for row in rows)
  nbytes = sum(row.nbytes for row in rows)
  return (
    name,
    str(count),
    f'{size:,}',
    stored,
    f'{8 * nbytes / size:.3f}' if size else '',
    _size(nbytes),
  )


def _size(nbytes: int) -> str:
  if nbytes >= _GIB:
    return f'{nbytes / _GIB:.2f} GiB'
  return f'{nbytes / _MIB:.2f} MiB'
