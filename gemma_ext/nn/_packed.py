# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`PackedWeight`: a compressed parameter where a module expects an array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import recipe as recipe_lib
from gemma_ext.nn import _sites


def format_of(method: recipe_lib.Method, cols: int) -> Any:
  """Returns the packed format in which `method` stores rows of `cols` inputs.

  Args:
    method: A method that compresses, i.e. not `Keep`.
    cols: Size of the input axis.

  Raises:
    GroupSizeError: If no group size near the one asked for divides `cols`.
  """
  match method:
    case recipe_lib.Ternary():
      return kernels.TernaryFormat(
        planes=method.planes,
        group=kernels.choose_group(cols, method.group),
        packing=method.packing,
        scale=method.scale,
        tied=method.tied,
      )
    case recipe_lib.Int():
      group = method.group and kernels.choose_group(cols, method.group)
      return kernels.IntFormat(
        bits=method.bits, group=group, scale=method.scale
      )
    case _:
      raise errors.RecipeError(f'{method!r} has no packed format.')


def nbytes_of(site: _sites.Site, method: recipe_lib.Method) -> int:
  """Returns the bytes of codes and scales of a weight, all parts of it.

  Args:
    site: The weight.
    method: A method that compresses.

  Raises:
    RecipeError: If the weight cannot have it.
    GroupSizeError: If a group size cannot be had.
  """
  return sum(
    format_of(way, part.layout.cols).nbytes(part.layout.rows, part.layout.cols)
    for part, way in _sites.split(site, method)
  )


# Leaf of a table in bands: the places of its rows.
_RANK = 'rank'
# And their mean.
_MEAN = 'mean'


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeight:
  """A compressed weight that stands in for its dense array.

  Operations that know it read it packed. `jnp.asarray`, `jnp.einsum`, `@` and
  indexing see the dense array through `__jax_array__`; functions that JAX jits
  (`jnp.dot`, `jnp.sum`) refuse it with an error, never with wrong numbers.

  Attributes:
    leaf: `{'codes', 'scale'}`, see `gemma_ext.kernels`.
    fmt: The packed format.
    layout: Shape of the dense weight and its contracted axes.
    dtype: Type of the dense weight.
    x_bits: What activations may be rounded to, see `kernels.matmul`.
  """

  leaf: dict[str, jax.Array]
  fmt: Any
  layout: _sites.Layout
  dtype: Any
  x_bits: int = 16

  @property
  def shape(self) -> tuple[int, ...]:
    return self.layout.shape

  @property
  def ndim(self) -> int:
    return len(self.layout.shape)

  def dequantize(self) -> jax.Array:
    """Returns the dense weight, `[*shape]`."""
    rows = kernels.dequantize(
      self.leaf, self.fmt, self.layout.cols, dtype=self.dtype
    )
    return self.layout.from_rows(rows)

  def __jax_array__(self) -> jax.Array:
    return self.dequantize()

  def __getitem__(self, index: Any) -> jax.Array:
    """Looks up rows along the first axis, as embedders do."""
    if isinstance(index, tuple) and len(index) == 1:
      (index,) = index
    if self.layout.in_axes != (self.ndim - 1,) or isinstance(index, tuple):
      return self.dequantize()[index]
    return kernels.take(
      self.leaf, self.fmt, index, self.layout.cols, dtype=self.dtype
    )

  def part(self, leaf: dict[str, jax.Array], rows: int) -> PackedWeight:
    """Returns the weight of the first rows, whose `kernels.first` leaf is."""
    shape = (rows, *self.shape[1:])
    layout = dataclasses.replace(self.layout, shape=shape)
    return dataclasses.replace(self, leaf=leaf, layout=layout)

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """Computes `jnp.einsum(eqn, x, weight)`.

    Args:
      eqn: Equation `inputs,weights->outputs`; fast if it contracts the axes of
        `layout`.
      x: Inputs.

    Returns:
      Outputs in the type of `x`.
    """
    inputs, weights, outputs = _sites.split_equation(eqn)
    batch = set(inputs) & set(weights) & set(outputs) - {'.'}
    apart = {weights[i] for i in self.layout.in_axes} & set(outputs)
    if batch or apart or self.layout.slices > 1:
      # One matrix per expert or slice, or rows along another axis than the one
      # that is contracted: no single matmul. The weight is unpacked whole.
      w = self.dequantize().astype(x.dtype)
      return jnp.einsum(eqn, x, w)
    if '.' in inputs:
      # Name the leading axes, so that every axis can be moved by its letter.
      inputs, outputs = _expand_ellipsis(inputs, weights, outputs, x.ndim)
    contracted = ''.join(weights[i] for i in self.layout.in_axes)
    lead = ''.join(c for c in inputs if c not in contracted)
    x = jnp.transpose(x, [inputs.index(c) for c in lead + contracted])
    x = x.reshape(x.shape[: len(lead)] + (self.layout.cols,))
    y = kernels.matmul(x, self.leaf, self.fmt, x_bits=self.x_bits)
    order = lead + ''.join(weights[i] for i in self.layout.out_axes)
    return jnp.transpose(y, [order.index(c) for c in outputs])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedRows:
  """A table whose bands of rows are packed, each in its own way.

  Stands in for the dense table like `PackedWeight`.

  Attributes:
    bands: The bands, in order, each of shape `[rows, D]`.
    rank: Place of every row among those of the bands, int32 `[V]`; `None`
      where they are in the order of the table.
    mean: What the rows of the bands lack, float32 `[D]`; `None` if nothing.
  """

  bands: tuple[PackedWeight, ...]
  rank: jax.Array | None = None
  mean: jax.Array | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    rows = sum(band.shape[0] for band in self.bands)
    return (rows, *self.bands[0].shape[1:])

  @property
  def ndim(self) -> int:
    return 2

  def dequantize(self) -> jax.Array:
    """Returns the dense table."""
    table = jnp.concatenate([band.dequantize() for band in self.bands])
    table = table if self.rank is None else table[self.rank]
    return self._moved(table)

  def __jax_array__(self) -> jax.Array:
    return self.dequantize()

  def __getitem__(self, index: Any) -> jax.Array:
    """Looks up rows along the first axis, as embedders do."""
    if isinstance(index, tuple) and len(index) == 1:
      (index,) = index
    if isinstance(index, tuple) or not hasattr(index, 'dtype'):
      return self.dequantize()[index]
    # As of an array: from the end if negative, else the nearest there is.
    count = self.shape[0]
    index = jnp.clip(jnp.where(index < 0, index + count, index), 0, count - 1)
    if self.rank is not None:
      index = self.rank[index]
    found = self.bands[0][jnp.minimum(index, self.bands[0].shape[0] - 1)]
    start = self.bands[0].shape[0]
    for band in self.bands[1:]:
      own = jnp.clip(index - start, 0, band.shape[0] - 1)
      found = jnp.where((index >= start)[..., None], band[own], found)
      start += band.shape[0]
    return self._moved(found)

  def _moved(self, rows: jax.Array) -> jax.Array:
    """Rows of bands as rows of the table."""
    if self.mean is None:
      return rows
    return (rows.astype(jnp.float32) + self.mean).astype(rows.dtype)

  def part(self, leaf: dict[str, Any], rows: int) -> PackedRows:
    """Returns the table of the first rows, `leaf` those of its bands.

    Not of a table that has an order of its own.
    """
    assert self.rank is None
    mean = self.mean
    bands = []
    for i, band in enumerate(self.bands):
      if rows <= 0:
        break
      own = min(rows, band.shape[0])
      bands.append(band.part(leaf[f'rows_{i}'], own))
      rows -= own
    return PackedRows(bands=tuple(bands), mean=mean)

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """Computes `jnp.einsum(eqn, x, table)`, the rows last in the outputs."""
    inputs, weights, outputs = _sites.split_equation(eqn)
    if not outputs.endswith(weights[0]):
      return jnp.einsum(eqn, x, self.dequantize().astype(x.dtype))
    y = jnp.concatenate([band.einsum(eqn, x) for band in self.bands], axis=-1)
    if self.mean is not None:
      common = jnp.einsum(
        f'{inputs},{weights[1:]}->{outputs[:-1]}',
        x.astype(jnp.float32),
        self.mean,
      )
      y = (y.astype(jnp.float32) + common[..., None]).astype(y.dtype)
    return y if self.rank is None else kernels.pick(y, self.rank)


def param(
  module: nn.Module,
  name: str,
  *,
  layout: _sites.Layout,
  method: recipe_lib.Method,
  dtype: Any,
) -> PackedWeight:
  """Declares the packed parameter `name` of `module` and returns it.

  Args:
    module: The module that owns the parameter, in compact code or `setup`.
    name: Name of the parameter.
    layout: Shape of the dense weight and its contracted axes.
    method: How it is compressed.
    dtype: Type of the dense weight that it stands for.

  Raises:
    ParamsMismatchError: If the parameters that were passed in do not hold this
      weight packed in this format.
  """
  fmt = format_of(method, layout.cols)
  path = '/'.join(module.path + (name,))
  if module.has_variable('params', name):
    # Not through `self.param`: its check compares shapes with those of a fresh
    # init, while latent (floating) codes are a legal state while healing.
    leaf = _unnested(module.get_variable('params', name))
    _check(leaf, fmt, layout, path)
  else:
    # By the class: `module.param` may be the hook that brought us here.
    leaf = nn.Module.param(
      module, name, _initializer(fmt, layout), layout.shape
    )
  return PackedWeight(
    leaf=leaf,
    fmt=fmt,
    layout=layout,
    dtype=dtype,
    x_bits=getattr(method, 'x_bits', 16),
  )


def rows_param(
  module: nn.Module,
  name: str,
  *,
  bands: Sequence[tuple[_sites.Layout, recipe_lib.Method]],
  ordered: bool,
  centered: bool,
  dtype: Any,
) -> PackedRows:
  """Declares a table in bands as a parameter of `module` and returns it.

  Args:
    module: The module that owns the parameter.
    name: Name of the parameter.
    bands: Layout and method of each.
    ordered: Whether rows have an order of their own.
    centered: Whether their mean is apart.
    dtype: Type of the dense table.

  Raises:
    ParamsMismatchError: As `param`.
  """
  names = [f'rows_{i}' for i in range(len(bands))]
  count = sum(layout.shape[0] for layout, _ in bands)
  beside: dict[str, np.ndarray] = {}
  if ordered:
    beside[_RANK] = np.arange(count, dtype=np.int32)
  if centered:
    beside[_MEAN] = np.zeros(bands[0][0].cols, np.float32)
  parts, leaf = parts_param(
    module,
    name,
    parts=dict(zip(names, bands, strict=True)),
    beside=beside,
    shape=(count, bands[0][0].cols),
    what='in bands of rows',
    dtype=dtype,
  )
  return PackedRows(
    bands=tuple(parts), rank=leaf.get(_RANK), mean=leaf.get(_MEAN)
  )


def parts_param(
  module: nn.Module,
  name: str,
  *,
  parts: Mapping[str, tuple[_sites.Layout, recipe_lib.Method]],
  beside: Mapping[str, np.ndarray],
  shape: tuple[int, ...],
  what: str,
  dtype: Any,
) -> tuple[list[PackedWeight], dict[str, Any]]:
  """Declares a weight in parts as one parameter of `module`.

  Args:
    module: The module that owns the parameter.
    name: Name of the parameter.
    parts: Layout and method of each part, by name.
    beside: What a fresh parameter has beside them, by name.
    shape: Shape of the dense weight.
    what: How it is compressed, for errors.
    dtype: Type of the dense weight.

  Returns:
    The parts, in order, and the whole parameter.

  Raises:
    ParamsMismatchError: As `param`.
  """
  formats = [format_of(m, layout.cols) for layout, m in parts.values()]
  path = '/'.join(module.path + (name,))
  if module.has_variable('params', name):
    leaf = _unnested(module.get_variable('params', name))
    expected = {*parts, *beside}
    if not isinstance(leaf, dict) or set(leaf) != expected:
      got = sorted(leaf) if isinstance(leaf, dict) else 'an array'
      raise errors.ParamsMismatchError(
        f'{path!r} is compressed {what}, so its parameter must be'
        f' {sorted(expected)}, got {got}. Did you pass the params through'
        ' `gx.compress`, with the same recipe?'
      )
    for part, fmt in zip(parts, formats, strict=True):
      _check(leaf[part], fmt, parts[part][0], f'{path}/{part}')
    for beside_name, like in beside.items():
      got = leaf[beside_name]
      if (got.shape, got.dtype) != (like.shape, like.dtype):
        raise errors.ParamsMismatchError(
          f'{path}/{beside_name} is {got.dtype}{list(got.shape)}; expected'
          f' {like.dtype}{list(like.shape)}.'
        )
  else:

    def init(rng: jax.Array, shape: tuple[int, ...], dtype: Any = None):
      return {
        part: _initializer(fmt, parts[part][0])(rng, shape, dtype)
        for part, fmt in zip(parts, formats, strict=True)
      } | {name: jnp.asarray(like) for name, like in beside.items()}

    leaf = nn.Module.param(module, name, init, shape)
  weights = [
    PackedWeight(
      leaf=leaf[part],
      fmt=fmt,
      layout=parts[part][0],
      dtype=dtype,
      x_bits=getattr(parts[part][1], 'x_bits', 16),
    )
    for part, fmt in zip(parts, formats, strict=True)
  ]
  return weights, leaf


def _unnested(leaf: Any) -> Any:
  """A parameter without what the official Gemma 4 Einsum puts around it."""
  nested = isinstance(leaf, dict) and set(leaf) == {'w'}
  return leaf['w'] if nested and isinstance(leaf['w'], dict) else leaf


def _check(leaf: Any, fmt: Any, layout: _sites.Layout, path: str) -> None:
  if not isinstance(leaf, dict) or set(leaf) != {'codes', 'scale'}:
    got = (
      f'keys {sorted(leaf)}'
      if isinstance(leaf, dict)
      else f'an array {getattr(leaf, "shape", None)}'
    )
    raise errors.ParamsMismatchError(
      f'{path!r} is compressed by the recipe, so its parameter must be'
      f" {{'codes', 'scale'}}, got {got}. Did you pass the params through"
      ' `gx.compress`, with the same recipe?'
    )
  try:
    kernels.validate(leaf, fmt, layout.rows, layout.cols, part=True)
  except ValueError as e:
    raise errors.ParamsMismatchError(f'{path!r}: {e}') from e


def _initializer(fmt: Any, layout: _sites.Layout):
  """An initialiser that gives packed leaves whatever dtype is asked for."""

  def init(rng: jax.Array, shape: tuple[int, ...], dtype: Any = None):
    del shape, dtype  # The official models ask for bf16 everywhere.
    codes = kernels.random_codes(rng, fmt, layout.rows, layout.cols)
    # As small as the normal(0.01) of the official init, whatever the bits.
    scale = 0.01 / 2 ** (getattr(fmt, 'bits', 2) - 2)
    shape = fmt.scale_shape(layout.rows, layout.cols)
    return {'codes': codes, 'scale': fmt.pack_scale(jnp.full(shape, scale))}

  return init


def _expand_ellipsis(
  inputs: str, weights: str, outputs: str, ndim: int
) -> tuple[str, str]:
  """Replaces `...` by letters that the equation does not use."""
  missing = ndim - len(inputs.replace('...', ''))
  used = set(inputs + weights + outputs)
  free = [c for c in 'abcdefghijklmnopqrstuvwxyz' if c not in used]
  letters = ''.join(free[:missing])
  return inputs.replace('...', letters), outputs.replace('...', letters)
