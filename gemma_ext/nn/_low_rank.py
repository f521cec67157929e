# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`PackedLowRank`: a packed weight with a correction of low rank."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import string
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from gemma_ext import recipe as recipe_lib
from gemma_ext.nn import _packed
from gemma_ext.nn import _sites


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedLowRank:
  """A weight that is the sum of a packed one and of a product of two.

  Stands in for the dense weight like `PackedWeight`.

  Attributes:
    base: The weight that is corrected.
    down: First factor, `[rank, *inputs]`.
    up: Second factor, `[*outputs, rank]`.
  """

  base: _packed.PackedWeight
  down: _packed.PackedWeight
  up: _packed.PackedWeight

  @property
  def layout(self) -> _sites.Layout:
    return self.base.layout

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  @property
  def ndim(self) -> int:
    return self.base.ndim

  def dequantize(self) -> jax.Array:
    """Returns the dense weight, `[*shape]`."""
    dense = add(self.layout, *(w.dequantize() for w in self._parts))
    return dense.astype(self.base.dtype)

  def __jax_array__(self) -> jax.Array:
    return self.dequantize()

  def __getitem__(self, index: Any) -> jax.Array:
    return self.dequantize()[index]

  def einsum(self, eqn: str, x: jax.Array) -> jax.Array:
    """Computes `jnp.einsum(eqn, x, weight)`, see `PackedWeight.einsum`."""
    inputs, weights, outputs = _sites.split_equation(eqn)
    contracted = {weights[i] for i in self.layout.in_axes}
    rows = ''.join(weights[i] for i in self.layout.out_axes)
    if contracted & set(outputs) or set(rows) & set(inputs):
      w = self.dequantize().astype(x.dtype)
      return jnp.einsum(eqn, x, w)
    lead = ''.join(c for c in inputs if c not in contracted)
    free = next(c for c in string.ascii_letters if c not in eqn)
    cols = ''.join(weights[i] for i in self.layout.in_axes)
    inner = self.down.einsum(f'{inputs},{free}{cols}->{lead}{free}', x)
    more = self.up.einsum(f'{lead}{free},{rows}{free}->{outputs}', inner)
    return self.base.einsum(eqn, x) + more

  @property
  def _parts(self) -> tuple[_packed.PackedWeight, ...]:
    return self.base, self.down, self.up


def add(
  layout: _sites.Layout, base: jax.Array, down: jax.Array, up: jax.Array
) -> jax.Array:
  """Returns `base + up @ down`, dense arrays, in the shape of the weight.

  Args:
    layout: Of the weight.
    base: `[*shape]`.
    down: `[rank, *inputs]`.
    up: `[*outputs, rank]`.

  Returns:
    float32 `[*shape]`.
  """
  wide = lambda x: jnp.asarray(x, jnp.float32)
  rank = down.shape[0]
  product = wide(up).reshape(-1, rank) @ wide(down).reshape(rank, -1)
  rows = product.reshape(*layout.rows, layout.cols)
  return wide(base) + layout.from_rows(rows)


def param(
  module: nn.Module,
  name: str,
  *,
  parts: Sequence[tuple[_sites.Site, recipe_lib.Method]],
  dtype: Any,
) -> PackedLowRank:
  """Declares a weight with a correction as a parameter and returns it.

  Args:
    module: The module that owns the parameter.
    name: Name of the parameter.
    parts: Site and method of each, in the order of `ROLES`.
    dtype: Type of the dense weight.

  Raises:
    ParamsMismatchError: As `_packed.param`.
  """
  (base, _), *_ = parts
  weights, _ = _packed.parts_param(
    module,
    name,
    parts={site.role: (site.layout, method) for site, method in parts},
    beside={},
    shape=base.layout.shape,
    what='with a correction of low rank',
    dtype=dtype,
  )
  return PackedLowRank(**dict(zip(_sites.ROLES, weights, strict=True)))
