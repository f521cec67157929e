# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Latent codes: packed parameters in a form that gradients can move.

Packed codes are integers, and nothing has a gradient with respect to them. In
latent form they are unpacked floating point numbers; the forward pass rounds
them and the backward pass goes straight through (Bengio et al., "Estimating or
Propagating Gradients Through Stochastic Neurons", arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import traverse_util
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.nn import _compressed
from gemma_ext.nn import _packed


def to_latent(
  model: _compressed.Compressed,
  params: Mapping[str, Any],
  *,
  dtype: Any = jnp.float32,
) -> dict[str, Any]:
  """Unpacks all codes to floating point. The model gives the same outputs.

  Args:
    model: The compressed model.
    params: Its parameters.
    dtype: Type of the latent codes.

  Returns:
    Parameters for the same model, `codes` of shape `[planes, *rows, cols]` for
    ternary and `[*rows, cols]` for integer weights. Scales that are stored in
    one byte are float32.

  Raises:
    ParamsMismatchError: If a compressed parameter is missing.
  """
  return _map(
    model,
    params,
    lambda codes, scale, fmt, layout: (
      fmt.unpack(codes, layout.cols).astype(dtype),
      fmt.open_scale(scale) if fmt.scale != 'bf16' else scale,
    ),
  )


def from_latent(
  model: _compressed.Compressed, params: Mapping[str, Any]
) -> dict[str, Any]:
  """Inverse of `to_latent`: rounds as the forward pass does, and packs.

  Args:
    model: The compressed model.
    params: Its parameters, codes in latent form.

  Returns:
    Parameters with packed codes. The model gives the same outputs.

  Raises:
    ParamsMismatchError: If a compressed parameter is missing.
  """

  def pack(codes, scale, fmt, layout):
    del layout
    codes = fmt.round(codes)
    if scale.dtype != fmt.scale_dtype and fmt.scale != 'bf16':
      scale = fmt.pack_scale(scale)
    return fmt.pack(codes.astype(jnp.int8)), scale

  return _map(model, params, pack)


def _map(model, params, fn) -> dict[str, Any]:
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  methods = _compressed.methods_of(model.model, model.recipe)
  for path, (site, method) in methods.items():
    name = f'{path}/codes'
    if name not in flat:
      raise errors.ParamsMismatchError(
        f'The parameters have no {name!r}. Are they compressed with the'
        ' recipe of this model?'
      )
    fmt = _packed.format_of(method, site.layout.cols)
    scale = f'{path}/scale'
    flat[name], flat[scale] = fn(flat[name], flat[scale], fmt, site.layout)
  return traverse_util.unflatten_dict(flat, sep='/')
