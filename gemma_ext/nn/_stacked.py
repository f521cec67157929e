# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts as arrays of their own, cut out of the weights of a mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import kernels
from gemma_ext import recipe as recipe_lib
from gemma_ext.nn import _moe
from gemma_ext.nn import _packed
from gemma_ext.nn import _sites

# What a packed weight is made of.
LEAF = ('codes', 'scale')
_Methods = Mapping[str, tuple[_sites.Site, recipe_lib.Method]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stacked:
  """The slices of a layer, shared ones first.

  Attributes:
    formats: Of gate and down if packed.
    arrays: Gate `[S, 2, f, D]` and down `[S, f, D]`; or codes and scales of
      both, the axis of slices first, down with rows of f codes.
    axes: Of each array, the axis of slices that the kernels expect.
    x_bits: What activations may be rounded to.
  """

  formats: tuple[Any, Any] | None
  arrays: tuple[np.ndarray, ...]
  axes: tuple[int, ...]
  x_bits: int


def take(
  mixture: _moe.Mixture, methods: _Methods, flat: dict[str, Any]
) -> Stacked:
  """Takes the experts of a layer out of the parameters.

  Args:
    mixture: The layer.
    methods: Site and method by path.
    flat: Parameters by path; those of the experts are gone afterwards.
  """
  count, size = mixture.method.slices, mixture.size
  names = [f'{mixture.path}/{name}' for name in (_moe.GATE, _moe.DOWN)]
  method = mixture.method.weights
  bits = getattr(method, 'x_bits', 16)
  formats = formats_of(mixture, methods)
  if formats is None:
    both, out = (np.asarray(flat.pop(name)) for name in names)
    both = _moe.rows_of_neurons(both, out)
    both = both.reshape(2, count, size, -1).swapaxes(0, 1)
    arrays = (both, out.reshape(count, size, -1))
    return Stacked(formats=None, arrays=arrays, axes=(0, 0), x_bits=bits)
  gate = {k: np.asarray(flat.pop(f'{names[0]}/{k}')) for k in LEAF}
  down = {k: np.asarray(flat.pop(f'{names[1]}/{k}')) for k in LEAF}
  axis = axis_of(formats[0])
  found = []
  for each in gate.values():
    # [P?, 2, H, bytes] -> [S, P?, 2, f, bytes]
    cut = each.reshape(*each.shape[: axis + 1], count, size, each.shape[-1])
    found.append(np.moveaxis(cut, axis + 1, 0))
  if methods[names[1]][0].layout.slices > 1:
    found += [np.moveaxis(down[name], axis, 0) for name in LEAF]
  else:
    found += _cut_rows(down, formats[1], count, size)
  return Stacked(
    formats=formats, arrays=tuple(found), axes=(axis,) * 4, x_bits=bits
  )


def _cut_rows(
  down: Mapping[str, np.ndarray], fmt: Any, count: int, size: int
) -> list[np.ndarray]:
  """Codes and scales of rows that are stored whole, `[S, P?, D, bytes]`."""
  codes = np.asarray(fmt.unpack(jnp.asarray(down['codes']), count * size))
  parts = np.split(codes, count, axis=-1)
  scale = down['scale'].reshape(*down['scale'].shape[:-1], count, -1)
  return [
    np.stack([np.asarray(fmt.pack(jnp.asarray(part))) for part in parts]),
    np.moveaxis(scale, -2, 0),
  ]


def formats_of(
  mixture: _moe.Mixture, methods: _Methods
) -> tuple[Any, Any] | None:
  """Formats of gate and down; `None` if they are dense."""
  if f'{mixture.path}/{_moe.GATE}' not in methods:
    return None
  gate, down = (
    _packed.format_of(method, site.layout.cols)
    for site, method in (
      methods[f'{mixture.path}/{name}'] for name in (_moe.GATE, _moe.DOWN)
    )
  )
  return gate, down


def axis_of(fmt: Any) -> int:
  """The axis of experts in the arrays of stacked weights of a format."""
  return int(isinstance(fmt, kernels.TernaryFormat))


def compute(
  formats: tuple[Any, Any] | None,
  arrays: Sequence[jax.Array],
  x: jax.Array,
  chosen: jax.Array,
  weight: jax.Array,
  *,
  x_bits: int = 16,
  adapters: kernels.Adapters = kernels.NO_ADAPTERS,
) -> jax.Array:
  """Sums the chosen slices of every row of x, each times its weight.

  Args:
    formats: Of gate and down if packed.
    arrays: As the kernels expect them.
    x: `[N, D]`.
    chosen: Numbers of slices, `[N, K]`; -1 for none.
    weight: `[N, K]`.
    x_bits: What activations may be rounded to.
    adapters: Of the slices.
  """
  if formats is None:
    both, out = (w.astype(x.dtype) for w in arrays)
    return kernels.experts_dense(
      x, both, out, chosen, weight, adapters=adapters
    )
  gate = dict(zip(LEAF, arrays[:2], strict=True))
  down = dict(zip(LEAF, arrays[2:], strict=True))
  return kernels.experts_ffn(
    *(x, gate, formats[0], down, formats[1], chosen, weight),
    x_bits=x_bits,
    adapters=adapters,
  )


def wide(
  mixture: _moe.Mixture,
  x: jax.Array,
  choice: _moe.Choice,
  gate: jax.Array,
  down: jax.Array,
) -> jax.Array:
  """A mixture of dense weights, rows of x sorted by the experts they need.

  Args:
    mixture: The layer.
    x: `[..., D]`.
    choice: Which experts.
    gate: `[2, H, D]` or `[2, D, H]`.
    down: `[H, D]`.

  Returns:
    `[..., D]`, in the type of x.
  """
  method = mixture.method
  both = _moe.rows_of_neurons(gate, down)
  both = both.reshape(2, method.slices, mixture.size, -1).swapaxes(0, 1)
  out = down.reshape(method.slices, mixture.size, -1)
  chosen, weight = choice.chosen, choice.weight
  if method.shared:
    always = (*x.shape[:-1], method.shared)
    first = jnp.broadcast_to(jnp.arange(method.shared), always)
    chosen = jnp.where(chosen < 0, -1, chosen + method.shared)
    chosen = jnp.concatenate([first, chosen], axis=-1)
    ones = jnp.ones(always, weight.dtype)
    weight = jnp.concatenate([ones, weight], axis=-1)
  both, out = both.astype(x.dtype), out.astype(x.dtype)
  return kernels.experts_dense(x, both, out, chosen, weight)
