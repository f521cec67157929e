# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`part`: a cheaper model made of some of the weights of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import re
from typing import Any

from flax import linen as nn
from flax import traverse_util

from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import recipe as recipe_lib
from gemma_ext.nn import _compressed
from gemma_ext.nn import _config
from gemma_ext.nn import _moe
from gemma_ext.nn import _packed
from gemma_ext.nn import _sites

_TABLE = _sites.TABLE
_Methods = dict[str, tuple[_sites.Site, recipe_lib.Method]]
_Mixtures = dict[str, _moe.Mixture]


class _Part(_compressed.Compressed):
  """A model that gives logits to the first rows of its vocabulary.

  Attributes:
    head_rows: So many; all by default.
  """

  head_rows: int | None = None

  def _intercept(self):
    return _compressed.packed_weights(
      _compressed.methods_of(self.model, self.recipe),
      mixtures=_compressed.mixtures_of(self.model, self.recipe),
      dtype=self.model.dtype,
      depth=len(self.path),
      head_rows=self.head_rows,
    )


def part(
  model: nn.Module,
  params: Mapping[str, Any],
  *,
  planes: int | None = None,
  layers: Sequence[int] | None = None,
  head_rows: int | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
  """Returns a cheaper model that shares the weights of another.

  What is left out is left out everywhere at once; the three go together. Codes
  and dense arrays are those of the other model, none is copied; the scales of
  fewer planes or rows are.

  Args:
    model: An official model, or `Compressed`.
    params: Its parameters.
    planes: Ternary weights of more planes have only their first ones.
    layers: The layers that stay, by number, in ascending order; layer
      `layers[i]` becomes layer i.
    head_rows: Logits are those of the first tokens of the vocabulary, `[*, L,
      head_rows]`. Any token may still be an input. Of a dense table these rows
      are sliced whenever they are read.

  Returns:
    The model and its parameters.

  Raises:
    ShapeError: If there are not so many planes, layers or rows, if all of them
      would stay, if rows have an order of their own, or if the layers of this
      family depend on each other beyond the residual stream.
    ParamsMismatchError: If the model is a wrapper other than `Compressed`, or
      the parameters are not those of the model.
  """
  methods: _Methods = {}
  mixtures: _Mixtures = {}
  if isinstance(model, _compressed.Compressed):
    methods = _compressed.methods_of(model.model, model.recipe)
    mixtures = _compressed.mixtures_of(model.model, model.recipe)
    model = model.model
  _config.check(model)
  dense = _config.strip(model)
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  if layers is not None:
    dense, moved = _of_layers(dense, layers)
    flat, methods, mixtures = _moved(flat, methods, mixtures, moved)
  if head_rows is not None:
    _check_rows(head_rows, dense.config.num_embed)
    _check_order(methods, head_rows)
    for path, rows in _head(methods, head_rows):
      head = _first(flat, methods, path, planes=planes, rows=rows)[0]
      place = path.replace(_TABLE, 'embedder/head', 1)
      flat |= {f'{place}/{name}': leaf for name, leaf in head.items()}
  if planes is not None:
    flat, methods = _of_planes(flat, methods, planes)
  rules = _sites.join(methods) | _routed(mixtures, methods)
  recipe = recipe_lib.Recipe(
    rules=tuple((re.escape(path), method) for path, method in rules.items())
  )
  dense = _config.attach(dense, recipe)
  if head_rows is not None:
    dense = _config.stamp(dense, f' head_rows={head_rows}')
  made = _Part(model=dense, recipe=recipe, head_rows=head_rows)
  return made, traverse_util.unflatten_dict(flat, sep='/')


def _of_layers(
  model: nn.Module, layers: Sequence[int]
) -> tuple[nn.Module, Callable[[str], str | None]]:
  """The model of some layers; where a path of the other one is in it."""
  config = model.config
  layers = tuple(layers)
  ascending = all(a < b for a, b in zip(layers, layers[1:], strict=False))
  if (
    not layers
    or not ascending
    or not 0 <= layers[0] <= layers[-1] < config.num_layers
    or len(layers) == config.num_layers
  ):
    raise errors.ShapeError(
      f'layers={layers} of a model of {config.num_layers}; expected some of'
      f' 0 to {config.num_layers - 1}, ascending, and not all.'
    )
  if getattr(config, 'per_layer_input_dim', 0) or getattr(
    config, 'kv_cache_sharing_config', None
  ):
    raise errors.ShapeError(
      f'layers={layers} of {type(model).__name__}, whose layers have inputs'
      ' of their own or read the keys and values of others; expected a model'
      ' of Gemma 2 or 3, or a Gemma 4 without these.'
    )
  types = tuple(config.attention_types[i] for i in layers)
  model = model.clone(config=dataclasses.replace(config, attention_types=types))
  places = {f'layer_{old}': f'layer_{new}' for new, old in enumerate(layers)}

  def moved(path: str) -> str | None:
    head, slash, rest = path.partition('/')
    if not re.fullmatch(r'layer_\d+', head):
      return path
    return places[head] + slash + rest if head in places else None

  return model, moved


def _moved(
  flat: dict[str, Any],
  methods: _Methods,
  mixtures: _Mixtures,
  moved: Callable[[str], str | None],
) -> tuple[dict[str, Any], _Methods, _Mixtures]:
  """The parameters, methods and mixtures that stay, where they are then."""

  def those(found: Mapping[str, Any]) -> dict[str, Any]:
    places = {path: moved(path) for path in found}
    return {p: found[path] for path, p in places.items() if p is not None}

  placed = lambda x, path: dataclasses.replace(x, path=path)
  return (
    those(flat),
    {p: (placed(s, p), method) for p, (s, method) in those(methods).items()},
    {p: placed(mixture, p) for p, mixture in those(mixtures).items()},
  )


def _routed(
  mixtures: _Mixtures, methods: _Methods
) -> dict[str, recipe_lib.Method]:
  """Methods of the weights of mixtures, by path."""
  found: dict[str, recipe_lib.Method] = {}
  for path, mixture in mixtures.items():
    gate, down = f'{path}/{_moe.GATE}', f'{path}/{_moe.DOWN}'
    method = mixture.method
    if gate in methods:
      # Stored as the recipe has it, the down projection in other groups.
      method = dataclasses.replace(method, weights=methods[gate][1])
    found |= {gate: method, down: method}
  return found


def _of_planes(
  flat: dict[str, Any], methods: _Methods, planes: int
) -> tuple[dict[str, Any], _Methods]:
  """The parameters and methods of the first planes."""
  most = max(
    (getattr(method, 'planes', 0) for _, method in methods.values()), default=0
  )
  if isinstance(planes, bool) or not 1 <= planes < most:
    raise errors.ShapeError(
      f'{planes=} of a model whose weights have at most {most}; expected 1 or'
      ' more, and fewer than some weight has.'
    )
  flat, methods = dict(flat), dict(methods)
  for path, (site, method) in methods.items():
    if not isinstance(method, recipe_lib.Ternary) or method.planes <= planes:
      continue
    leaf, fmt = _first(flat, methods, path, planes=planes)
    flat |= {f'{path}/{name}': array for name, array in leaf.items()}
    method = dataclasses.replace(
      method, planes=planes, tied=fmt.tied, scale=fmt.scale
    )
    methods[path] = site, method
  return flat, methods


def _head(methods: _Methods, rows: int) -> list[tuple[str, int | None]]:
  """Of a packed table: parts that have its first rows, and how many of them."""
  if _TABLE in methods:
    return [(_TABLE, rows)]
  found: list[tuple[str, int | None]] = []
  while (path := _sites.band_path(_TABLE, len(found))) in methods and rows > 0:
    count = methods[path][0].layout.shape[0]
    found.append((path, rows if rows < count else None))
    rows -= count
  return found


def _first(
  flat: dict[str, Any],
  methods: _Methods,
  path: str,
  *,
  planes: int | None,
  rows: int | None = None,
) -> tuple[dict[str, Any], Any]:
  """`kernels.first` of the weight at a path."""
  site, method = methods[path]
  names = {name: f'{path}/{name}' for name in ('codes', 'scale')}
  if any(flat.get(place) is None for place in names.values()):
    raise errors.ParamsMismatchError(
      f"The parameters have no 'codes' and 'scale' at {path!r}; expected those"
      ' of `gx.compress` with the recipe of this model.'
    )
  if planes is not None and planes >= getattr(method, 'planes', 1):
    planes = None
  fmt = _packed.format_of(method, site.layout.cols)
  leaf = {name: flat[place] for name, place in names.items()}
  return kernels.first(leaf, fmt, planes=planes, rows=rows)


def _check_order(methods: _Methods, rows: int) -> None:
  first = methods.get(_sites.band_path(_TABLE, 0))
  if first is not None and first[0].ordered:
    raise errors.ShapeError(
      f'head_rows={rows} of a table whose rows have an order of their own'
      ' (`gx.Rows(ordered=True)`); expected one in that of the vocabulary.'
    )


def _check_rows(rows: int, most: int) -> None:
  if isinstance(rows, bool) or not 1 <= rows < most:
    raise errors.ShapeError(
      f'head_rows={rows} of a vocabulary of {most}; expected 1 to {most - 1}.'
    )
