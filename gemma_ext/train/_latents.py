# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed weights in the form that an optimiser moves, and back.

Three forms of codes, by what the optimiser can do with them:

* 'latent': float32, rounded in the forward pass (straight-through gradients);
  planes share one, see `_shared`;
* 'integer': int8, for discrete methods;
* 'fixed': packed, as they are; only scales and norms move.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma_ext import _patterns
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.train import _branch
from gemma_ext.train import _shared

FORMS = ('latent', 'integer', 'fixed')


def open_params(
  branch: _branch.Branch,
  params: Mapping[str, Any],
  *,
  form: str,
  dense: Mapping[str, Any] | None = None,
  weights: str = '.*',
  margin: float = _shared.MARGIN,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Splits a branch's parameters into what moves and what does not.

  Args:
    branch: The compressed branch.
    params: Its packed parameters, by module.
    form: One of `FORMS`.
    dense: The dense parameters; latents then start at the dense weight, in
      units of the scale, as near as the code allows.
    weights: Regular expression on the packed weights that move, such as
      'linear'; the others are fixed.
    margin: How near to the next code a latent may start, in steps.

  Returns:
    Trainable and fixed leaves by path, floats in float32.

  Raises:
    ParamsMismatchError: If a weight of the branch is not packed.
  """
  if form not in FORMS:
    raise errors.ConfigError(f'{form=}; expected one of {FORMS}.')
  flat = _branch.flatten(params)
  dense_flat = None if dense is None else _branch.flatten(dense)
  moving, fixed = {}, {}
  packed = {f'mlp/{path}': found for path, found in branch.methods}
  for path, (site, method) in packed.items():
    codes, scale = (
      flat.pop(f'{path}/codes', None),
      flat.pop(f'{path}/scale', None),
    )
    if codes is None or scale is None:
      raise errors.ParamsMismatchError(
        f'{path!r} is not packed. Compress the parameters first.'
      )
    if not _patterns.matches(weights, site.path):
      fixed[f'{path}/codes'], fixed[f'{path}/scale'] = codes, scale
      continue
    cols = site.layout.cols
    fmt = gx_nn.format_of(method, cols)
    # Copies: steps donate what moves, and the checkpoint must stay.
    moving[f'{path}/scale'] = jnp.array(fmt.open_scale(scale))
    if form == 'fixed':
      fixed[f'{path}/codes'] = codes
      continue
    codes, scale = fmt.unpack(codes, cols), fmt.unpack_scale(scale)
    if form == 'latent':
      w = None
      # The parts of a weight with a correction are none of the dense model.
      if dense_flat is not None and not site.role:
        w = site.layout.to_rows(jnp.asarray(dense_flat[path]))
      if getattr(fmt, 'planes', 1) > 1:
        # Sums of planes with free scales may be too near for more.
        room = margin if fmt.tied else _shared.MARGIN
        codes, ordered = _shared.merge(codes, scale, w, room)
        if not fmt.tied:
          moving[f'{path}/scale'] = ordered
      else:
        codes = latent(codes, scale, w, fmt, margin)
    moving[f'{path}/codes'] = codes
  for path, leaf in flat.items():
    # A threshold is set, not learned.
    if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim:
      moving[path] = jnp.array(leaf, jnp.float32)
    else:
      fixed[path] = leaf
  return moving, fixed


def latent(
  codes: jax.Array,
  scale: jax.Array,
  w: jax.Array | None,
  fmt: Any,
  margin: float = _shared.MARGIN,
) -> jax.Array:
  """The dense weight in units of the scale, rounding to the given codes.

  Args:
    codes: int8 codes, unpacked.
    scale: Their scales, float32.
    w: Dense weight, rows of the same shape; `None` for the codes themselves.
    fmt: The packed format.
    margin: How near to the next code it may come, in steps.
  """
  if w is None:
    return codes.astype(jnp.float32)
  lo, hi = fmt.code_range
  wide = _shared.wide_scale(scale, codes.shape[-1])
  x = jnp.where(wide != 0, w / jnp.where(wide != 0, wide, 1), 0)
  half = 0.5 - margin
  low = jnp.where(codes <= lo, -_shared.REACH - (-1 - lo), codes - half)
  high = jnp.where(codes >= hi, _shared.REACH + (hi - 1), codes + half)
  return jnp.clip(x, low, high)


def codes_of(latent: jax.Array, scale: jax.Array, fmt: Any) -> jax.Array:
  """Codes as a format has them, of latents that planes may share."""
  if latent.ndim < scale.ndim:
    return _shared.split(latent, fmt.unpack_scale(scale))
  return latent


def pack(codes: jax.Array, fmt: Any) -> jax.Array:
  """Rounds codes as the forward pass does, and packs them."""
  codes = fmt.round(codes)
  return fmt.pack(codes.astype(jnp.int8))


def join(
  branch: _branch.Branch,
  moving: Mapping[str, jax.Array],
  fixed: Mapping[str, jax.Array],
  *,
  dtype: Any,
) -> dict[str, Any]:
  """Parameters for `Branch.apply` inside a loss: differentiable."""
  out = dict(fixed)
  for path, leaf in moving.items():
    if leaf.dtype == jnp.int8:
      leaf = leaf.astype(jnp.float32)  # Rounds to itself.
    elif not path.endswith(('/codes', '/scale')) or not path.startswith('mlp/'):
      leaf = leaf.astype(dtype)
    out[path] = leaf
  for path, (site, method) in branch.methods:
    codes = f'mlp/{path}/codes'
    if codes in moving:
      fmt = gx_nn.format_of(method, site.layout.cols)
      out[codes] = codes_of(out[codes], out[f'mlp/{path}/scale'], fmt)
  return _branch.unflatten(out)


def close_params(
  branch: _branch.Branch,
  moving: Mapping[str, jax.Array],
  fixed: Mapping[str, jax.Array],
  *,
  dtype: Any,
) -> dict[str, Any]:
  """Inverse of `open_params`: rounds, packs and casts as a checkpoint has it.

  Args:
    branch: The compressed branch.
    moving: Trainable leaves.
    fixed: The others.
    dtype: Type of leaves that are not packed.
  """
  flat = {**fixed, **moving}
  out = {}
  packed = {f'mlp/{path}': found for path, found in branch.methods}
  for path, (site, method) in packed.items():
    codes, scale = flat.pop(f'{path}/codes'), flat.pop(f'{path}/scale')
    fmt = gx_nn.format_of(method, site.layout.cols)
    if codes.dtype != fmt.codes_dtype or f'{path}/codes' in moving:
      codes = pack(codes_of(codes, scale, fmt), fmt)
    out[f'{path}/codes'] = codes
    if scale.dtype != fmt.scale_dtype:
      scale = fmt.pack_scale(scale)
    out[f'{path}/scale'] = scale
  for path, leaf in flat.items():
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    out[path] = leaf.astype(dtype) if floating else leaf
  return _branch.unflatten(out)
