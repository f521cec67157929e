# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sites: the weights of a model that a recipe can compress.

Sites are found by tracing the model, never by parameter names: which axes of a
weight are contracted follows from the einsum that the model really runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import enum
import functools
import math
from typing import Any

from flax import linen as nn
from gemma.gm.nn import _layers as gemma_layers
from gemma.gm.nn import _modules as gemma_modules
from gemma.gm.nn.gemma3n import _layers as gemma3n_layers
from gemma.gm.nn.gemma3n import _modules as gemma3n_modules
from gemma.gm.nn.gemma4 import _layers as gemma4_layers
from gemma.gm.nn.gemma4 import _modules as gemma4_modules
from gemma.gm.nn.gemma4 import _moe as gemma4_moe
import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext import recipe as recipe_lib
from gemma_ext.nn import _config

# The official classes come once per family and share no base class.
EINSUMS = (
  gemma_layers.Einsum,
  gemma3n_layers.Einsum,
  gemma4_layers.Einsum,
)
EMBEDDERS = (
  gemma_modules.Embedder,
  gemma3n_modules.Embedder,
  gemma4_modules.Embedder,
)
# `MoERagged` reads its weights through this module, outside any einsum.
RAGGED_WEIGHT = gemma4_moe._Weight  # pylint: disable=protected-access

_EMBEDDING_TABLES = (
  'input_embedding',
  'per_layer_embeddings',
  'per_layer_input_embedding',
)
# Towers and projections of other modalities stay as they are.
_OTHER_MODALITIES = ('vision_encoder', 'audio_encoder', 'mm_', 'audio_')


def einsum_of(module: Any) -> Any:
  """Returns the Einsum that a module is or wraps, as LoRA does, or `None`."""
  while module is not None and not isinstance(module, EINSUMS):
    module = getattr(module, 'wrapped', None)
  return module


class Kind(enum.Enum):
  """How the model reads a weight."""

  EINSUM = 'einsum'
  EMBEDDING = 'embedding'
  EXPERTS = 'experts'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """How a weight of any rank maps to rows that end in the input axis.

  Packed weights are stored as `[*rows, cols]`: the contracted axes, flattened,
  are last, and all others keep their order before them. Where these rows are
  cut into slices, an axis of slices comes first.

  Attributes:
    shape: Shape of the weight in the official parameter tree.
    in_axes: The axes that are contracted with the input.
    slices: How many each row is cut into.
  """

  shape: tuple[int, ...]
  in_axes: tuple[int, ...]
  slices: int = 1

  @property
  def out_axes(self) -> tuple[int, ...]:
    return tuple(i for i in range(len(self.shape)) if i not in self.in_axes)

  @property
  def rows(self) -> tuple[int, ...]:
    rows = tuple(self.shape[i] for i in self.out_axes)
    return (self.slices, *rows) if self.slices > 1 else rows

  @property
  def cols(self) -> int:
    return math.prod(self.shape[i] for i in self.in_axes) // self.slices

  @property
  def uncut(self) -> Layout:
    """The same without slices."""
    return dataclasses.replace(self, slices=1)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  def to_rows(self, w: Any) -> Any:
    """`[*shape]` -> `[*rows, cols]`."""
    if tuple(w.shape) != self.shape:
      raise errors.ShapeError(
        f'Got a weight of shape {tuple(w.shape)}, expected {self.shape}.'
      )
    w = w.transpose(self.out_axes + self.in_axes)
    uncut = self.uncut
    return self.cut(w.reshape(uncut.rows + (uncut.cols,)))

  def cut(self, w: Any) -> Any:
    """Rows without slices, `[..., *rows, cols]`, as the slices of each."""
    if self.slices == 1:
      return w
    w = w.reshape(*w.shape[:-1], self.slices, w.shape[-1] // self.slices)
    return jnp.moveaxis(w, -2, -2 - len(self.out_axes))

  def from_rows(self, w: Any) -> Any:
    """`[*rows, cols]` -> `[*shape]`."""
    if self.slices > 1:
      w = jnp.moveaxis(w, 0, -2)
    order = self.out_axes + self.in_axes
    w = w.reshape(tuple(self.shape[i] for i in order))
    return w.transpose(tuple(order.index(i) for i in range(len(order))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
  """One weight that can be compressed.

  Attributes:
    path: Path of the parameter, e.g. `layer_0/attn/q_einsum/w`.
    layout: Its shape and contracted axes.
    kind: How the model reads it.
    rows: Of a band of a table, `[start, stop)` of its rows.
    ordered: Whether these are places in an order of their own, see `rank_path`.
    centered: Whether the mean of the table is elsewhere, see `mean_path`.
    role: Of a weight with a correction of low rank, one of `ROLES`.
  """

  path: str
  layout: Layout
  kind: Kind
  rows: tuple[int, int] | None = None
  ordered: bool = False
  centered: bool = False
  role: str = ''

  @property
  def whole(self) -> str:
    """Path of the parameter that it is, or is a part of."""
    apart = self.rows or self.role
    return self.path.rpartition('/')[0] if apart else self.path

  @property
  def is_factor(self) -> bool:
    """Whether it is a factor of a correction, which stands for no weights."""
    return self.role in (DOWN, UP)

  def part(self, x: Any, order: Any = None) -> Any:
    """Returns the rows of a band, or all.

    Args:
      x: `[V, ...]`, a row or a number of every row of the table.
      order: Number of the row at every place, `[V]`, where bands have one.
    """
    if self.rows is None:
      return x
    places = slice(*self.rows)
    return x[places] if order is None else x[order[places]]


# Parts of a weight with a correction of low rank: the weight that is corrected,
# and the factors: the first one's rows are contracted with the inputs, the
# other one's with what comes out of it.
BASE, DOWN, UP = ROLES = ('base', 'down', 'up')


def role_path(path: str, role: str) -> str:
  """Path of the parameter of a part, see `ROLES`, of the weight at `path`."""
  return f'{path}/{role}'


def band_path(path: str, index: int) -> str:
  """Path of the parameter of a band of the table at `path`."""
  return f'{path}/rows_{index}'


def rank_path(path: str) -> str:
  """Path of the places of the rows of an ordered table at `path`.

  The parameter is int32 `[V]`: row v of the table is at place `rank[v]` among
  the rows of all bands.
  """
  return f'{path}/rank'


# The table of embeddings, which is read first and last.
TABLE = 'embedder/input_embedding'


def mean_path(path: str) -> str:
  """Path of the mean of all rows of a centered table at `path`: float32 `[D]`.

  The rows of the bands are those of the table without it.
  """
  return f'{path}/mean'


def split(
  site: Site, method: recipe_lib.Method
) -> tuple[tuple[Site, recipe_lib.Method], ...]:
  """Returns the site and its method, or those of every part of it.

  Parts are the bands of `Rows`, and what `LowRank` adds up.

  Args:
    site: A site of a model.
    method: Its method.

  Raises:
    RecipeError: If it has bands and is no table, or has too few rows; or if it
      is to have a correction of low rank and is no weight of an einsum, or too
      small for that rank.
  """
  if isinstance(method, recipe_lib.LowRank):
    return _low_rank(site, method)
  if not isinstance(method, recipe_lib.Rows):
    return ((site, method),)
  layout = site.layout
  if site.kind != Kind.EMBEDDING or layout.in_axes != (1,):
    raise errors.RecipeError(
      f'{site.path!r} of shape {layout.shape} is no table of embeddings, which'
      f' {method!r} is for.'
    )
  count = layout.shape[0]
  starts = [0, *(end for end, _ in method.bands[:-1] if end is not None)]
  if starts[-1] >= count:
    raise errors.RecipeError(
      f'{site.path!r} has {count} rows, and bands up to row {starts[-1]} leave'
      ' none for the last one.'
    )
  stops = [*starts[1:], count]
  parts = []
  for i, (_, each) in enumerate(method.bands):
    part = dataclasses.replace(
      site,
      path=band_path(site.path, i),
      layout=dataclasses.replace(
        layout, shape=(stops[i] - starts[i], layout.shape[1])
      ),
      rows=(starts[i], stops[i]),
      ordered=method.ordered,
      centered=method.centered,
    )
    parts.append((part, each))
  return tuple(parts)


def _low_rank(
  site: Site, method: recipe_lib.LowRank
) -> tuple[tuple[Site, recipe_lib.Method], ...]:
  layout, rank = site.layout, method.rank
  if site.kind != Kind.EINSUM or layout.slices > 1:
    raise errors.RecipeError(
      f'{site.path!r} is no weight of an einsum, which {method!r} is for. Put a'
      ' rule for it before that one.'
    )
  if rank >= min(math.prod(layout.rows), layout.cols):
    raise errors.RecipeError(
      f'{site.path!r} of shape {layout.shape} has no correction of rank {rank}'
      f' that is smaller: expected less than {math.prod(layout.rows)} outputs'
      f' and {layout.cols} inputs.'
    )
  inputs = tuple(layout.shape[i] for i in layout.in_axes)
  down = Layout(shape=(rank, *inputs), in_axes=(*range(1, len(inputs) + 1),))
  up = Layout(shape=(*layout.rows, rank), in_axes=(len(layout.rows),))
  each = zip(
    ROLES,
    (layout, down, up),
    (method.weights, method.down, method.up),
    strict=True,
  )
  return tuple(
    (
      dataclasses.replace(
        site, path=role_path(site.path, role), layout=part, role=role
      ),
      way,
    )
    for role, part, way in each
  )


def join(
  methods: Mapping[str, tuple[Site, recipe_lib.Method]],
) -> dict[str, recipe_lib.Method]:
  """Inverse of `split`: methods by path of the whole parameter.

  Args:
    methods: Site and method by path; all parts of a weight, in order.
  """
  found: dict[str, recipe_lib.Method] = {}
  bands: dict[str, list[tuple[int | None, recipe_lib.Method]]] = {}
  first: dict[str, Site] = {}
  for path, (site, method) in methods.items():
    if site.role:
      if site.role == UP:
        base = methods[role_path(site.whole, BASE)][1]
        assert isinstance(base, recipe_lib.Int | recipe_lib.Ternary)
        assert isinstance(method, recipe_lib.Int)
        found[site.whole] = recipe_lib.LowRank(
          weights=base, rank=site.layout.cols, bits=method.bits
        )
      continue
    if site.rows is None:
      found[path] = method
      continue
    of = bands.setdefault(site.whole, [])
    of.append((site.rows[1], method))
    first[site.whole] = site
    found[site.whole] = method
  return found | {
    path: recipe_lib.Rows.of(
      of, ordered=first[path].ordered, centered=first[path].centered
    )
    for path, of in bands.items()
  }


def einsum_layout(eqn: str, shape: tuple[int, ...]) -> Layout:
  """Derives the layout of a weight from the einsum that reads it.

  Args:
    eqn: Equation `inputs,weights->outputs`.
    shape: Shape of the weight.

  Raises:
    ShapeError: If the equation does not fit the shape or contracts nothing.
  """
  inputs, weights, outputs = split_equation(eqn)
  in_axes = tuple(
    i for i, c in enumerate(weights) if c in inputs and c not in outputs
  )
  if len(weights) != len(shape) or not in_axes:
    raise errors.ShapeError(
      f'Equation {eqn!r} does not contract a weight of shape {shape} with'
      ' its input.'
    )
  return Layout(shape=tuple(shape), in_axes=in_axes)


def split_equation(eqn: str) -> tuple[str, str, str]:
  """Splits `'...F,NHF->...NH'` into inputs, weights, outputs."""
  eqn = eqn.replace(' ', '')
  operands, arrow, outputs = eqn.partition('->')
  inputs, comma, weights = operands.partition(',')
  if not arrow or not comma or ',' in weights or '.' in weights:
    raise errors.ShapeError(
      f'Expected an equation `inputs,weights->outputs`, got {eqn!r}.'
    )
  return inputs, weights, outputs


def ragged_layout(shape: tuple[int, ...]) -> Layout:
  """Layout of the weights of `MoERagged`, which no equation describes.

  `gating_einsum` is [experts, 2, hidden, features] and contracts features;
  `linear` is [experts, hidden, features] and contracts hidden.
  """
  return Layout(shape=tuple(shape), in_axes=(3,) if len(shape) == 4 else (1,))


def is_text(path: str) -> bool:
  """Whether the parameter belongs to the text model."""
  return not any(part.startswith(_OTHER_MODALITIES) for part in path.split('/'))


def embedding_layout(name: str, shape: tuple[int, ...]) -> Layout | None:
  """Layout of a look-up table, or `None` if the parameter is not one."""
  if name not in _EMBEDDING_TABLES:
    return None
  return Layout(shape=tuple(shape), in_axes=(len(shape) - 1,))


def sites(model: nn.Module) -> tuple[Site, ...]:
  """Lists the weights of `model` that can be compressed.

  Traces the model abstractly: takes seconds and no memory for any size.

  Args:
    model: An official Gemma model, of any family.

  Returns:
    The sites in the order in which the model creates them.
  """
  # The name that a model gets inside a larger module makes no difference.
  return _sites(_config.strip(model).clone(name=None))


@functools.lru_cache(maxsize=32)
def _sites(model: nn.Module) -> tuple[Site, ...]:
  found: dict[str, Site] = {}

  def add(path: tuple[str, ...], layout: Layout, kind: Kind) -> None:
    name = '/'.join(path)
    if is_text(name):
      found.setdefault(name, Site(path=name, layout=layout, kind=kind))

  def record(next_fun, args, kwargs, context):
    module, method = context.module, context.method_name
    if isinstance(module, EINSUMS) and method == '__call__':
      eqn = kwargs.get('eqn', args[0] if args else None)
      layout = einsum_layout(eqn, module.shape)
      add(module.path + (module.weight_name,), layout, Kind.EINSUM)
    elif isinstance(module, RAGGED_WEIGHT) and method == '__call__':
      layout = ragged_layout(module.shape)
      add(module.path + (module.weight_name,), layout, Kind.EXPERTS)
    elif isinstance(module, EMBEDDERS) and method == 'setup':

      def see(name, shape):
        layout = embedding_layout(name, shape)
        if layout is not None:
          add(module.path + (name,), layout, Kind.EMBEDDING)
        return None

      with param_hook(module, see):
        return next_fun(*args, **kwargs)
    return next_fun(*args, **kwargs)

  probe = _config.probe(model)
  with nn.intercept_methods(record):
    jax.eval_shape(
      lambda: probe.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    )
  return tuple(found.values())


class param_hook:  # pylint: disable=invalid-name
  """Context in which one module's own `self.param` asks `hook` first.

  Only that instance is affected, and only inside the context.

  Attributes:
    module: The module whose code runs inside the context.
    hook: `hook(name, shape)` returns what `self.param` shall return, or `None`
      for the parameter itself.
  """

  def __init__(
    self,
    module: nn.Module,
    hook: Callable[[str, tuple[int, ...]], Any],
  ):
    self.module = module
    self.hook = hook

  def __enter__(self) -> None:
    original = self.module.param

    def param(name, init_fn, *init_args, **init_kwargs):
      shape = init_kwargs.get('shape', init_args[0] if init_args else ())
      value = self.hook(name, shape)
      if value is None:
        value = original(name, init_fn, *init_args, **init_kwargs)
      return value

    object.__setattr__(self.module, 'param', param)

  def __exit__(self, *unused_exc) -> None:
    object.__delattr__(self.module, 'param')
