# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Embedding look-up in a packed table; only the rows asked for are unpacked."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gemma_ext import errors
from gemma_ext.kernels import _dequantize
from gemma_ext.kernels import _formats
from gemma_ext.kernels import _params

BACKENDS = ('xla',)


def take(
  p: Mapping[str, jax.Array],
  fmt: _formats.Format,
  ids: jax.Array,
  cols: int,
  dtype: DTypeLike = jnp.float32,
  *,
  backend: str = 'xla',
) -> jax.Array:
  """Looks rows of a packed table up.

  Args:
    p: Packed table of a dense `[*rows, cols]`; `rows[0]` is the vocabulary.
    fmt: Its format.
    ids: Integer row numbers, any shape. As in `table[ids]`, negative ones
      count from the end and ones past the end are clamped.
    cols: Input axis of the dense table.
    dtype: Type of the result.
    backend: 'xla'.

  Returns:
    `[*ids.shape, *rows[1:], cols]`.

  Raises:
    ParamsMismatchError: If `p` does not have the shapes that `fmt` expects.
    ShapeError: If `ids` are not integers or the backend is unknown.
  """
  if backend not in BACKENDS:
    raise errors.ShapeError(f'{backend=}; expected one of {BACKENDS}.')
  rows = _params.rows_of(p, fmt)
  _params.validate(p, fmt, rows, cols, part=True)
  if not rows or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise errors.ShapeError(
      f'Got {ids.dtype} ids and a table of rows {rows}; expected integer ids'
      ' and at least one row axis.'
    )
  p = _params.own(p, fmt)
  if isinstance(fmt, _formats.TernaryFormat):
    found = {name: value[:, ids] for name, value in p.items()}
  else:
    found = {name: value[ids] for name, value in p.items()}
  return _dequantize.dense(found, fmt, cols, dtype)
