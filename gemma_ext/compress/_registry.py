# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The registry of fits: how each method turns dense rows into codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from gemma_ext import errors
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _fit_int
from gemma_ext.compress import _fit_ternary

# `fit(rows, method, fmt, curvature)` -> integer codes and scales, see
# `gemma_ext.kernels` for their shapes.
Fit = Callable[
  [jax.Array, Any, Any, jax.Array | None], tuple[jax.Array, jax.Array]
]


def _ternary(rows, method, fmt, curvature):
  return _fit_ternary.fit_ternary(
    rows,
    group=fmt.group,
    planes=method.planes,
    density=method.density,
    pattern=method.pattern,
    scale=method.scale,
    tied=method.tied,
    curvature=curvature,
  )


def _int(rows, method, fmt, curvature):
  return _fit_int.fit_int(
    rows,
    bits=method.bits,
    group=fmt.group,
    scale=method.scale,
    curvature=curvature,
  )


FITS: dict[type[recipe_lib.Method], Fit] = {
  recipe_lib.Ternary: _ternary,
  recipe_lib.Int: _int,
}


def fit_of(method: recipe_lib.Method) -> Fit:
  """Returns the fit of a method.

  Raises:
    RecipeError: If the method is not in the registry.
  """
  if type(method) not in FITS:
    raise errors.RecipeError(
      f'No fit is registered for {method!r}, only for'
      f' {sorted(cls.__name__ for cls in FITS)}.'
    )
  return FITS[type(method)]
