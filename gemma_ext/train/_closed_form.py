# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`ClosedForm`: a branch fitted by error compensation, without any steps.

First the gate and up rows, from the inputs that the compressed model really
has; then the rows of the down projection, from the activations that the new
gate and up rows give. Before these are rounded, the dense down projection is
moved, by ridge regression, to where it gives the dense layer's output from the
compressed layer's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from gemma_ext import compress as gx_compress
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.train import _branch
from gemma_ext.train import _latents


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClosedForm:
  """Column by column, each error moved to the columns still to come.

  Attributes:
    damping: Share of the mean diagonal added to second moments.
    ridge: How strongly the down projection is held where the dense one is,
      in the same units. The smaller, the more text it takes.

  Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for
  Generative Pre-trained Transformers", arXiv 2210.17323.
  """

  damping: float = 0.01
  ridge: float = 0.1

  def __post_init__(self):
    for name in ('damping', 'ridge'):
      value = getattr(self, name)
      if not isinstance(value, (int, float)) or not 0 < value <= 100:
        raise errors.ConfigError(
          f'ClosedForm.{name} must be a number in (0, 100], got {value!r}.'
        )

  @property
  def codes(self) -> str:
    """Form of the codes that it makes."""
    return 'integer'

  @property
  def steps(self) -> int:
    """There is one."""
    return 1

  def init(self, params: Any, key: jax.Array) -> Any:
    """There is no state."""
    del params, key
    return ()

  def fit(
    self,
    branch: _branch.Branch,
    dense: _branch.Branch,
    dense_params: Mapping[str, Any],
    moving: Mapping[str, jax.Array],
    fixed: Mapping[str, jax.Array],
    batches: Callable[[], Iterable[Mapping[str, jax.Array]]],
    dtype: Any,
  ) -> dict[str, jax.Array]:
    """Fits the packed weights of a branch.

    Args:
      branch: The compressed branch.
      dense: The dense one.
      dense_params: Its parameters, by module.
      moving: Leaves as `open_params` gives them, codes as integers.
      fixed: The others.
      batches: Makes an iterator over batches with 'residual' `[N, D]` and
        'weight' `[N]`; called once for each weight.
      dtype: Type of activations.

    Returns:
      `moving` with new codes and scales. Norms are as they were.
    """
    out = dict(moving)
    for path, (site, method) in branch.methods:
      if f'mlp/{path}/codes' not in moving:
        continue
      down = path == 'linear'
      collect = _moments(branch, dense, dtype, down)
      total: Any = None
      for batch in batches():
        params = _latents.join(branch, out, fixed, dtype=dtype)
        found = collect(
          params, dense_params, batch['residual'], batch['weight']
        )
        total = found if total is None else jax.tree.map(jnp.add, total, found)
      if total is None:
        raise errors.TrainError('There are no tokens to fit to.')
      weight = float(total['weight'])
      if not weight > 0:
        raise errors.TrainError('All tokens have weight 0.')
      hessian = total['inner'] / weight
      layout = site.layout.uncut
      if hessian.shape[-1] != layout.cols:
        raise errors.ConfigError(
          f'{site.path!r} is stored by neuron, as the gates choose there;'
          ' ClosedForm fits rows along the inputs. Use Gradient.'
        )
      w = layout.to_rows(jnp.asarray(dense_params['mlp'][path]))
      rows = w.reshape(-1, layout.cols).astype(jnp.float32)
      if down:
        rows = self._regress(rows, hessian, total['cross'] / weight)
      fmt = gx_nn.format_of(method, layout.cols)
      codes, scale = gx_compress.compensate(
        rows, method=method, fmt=fmt, hessian=hessian, damping=self.damping
      )
      scale = fmt.open_scale(fmt.pack_scale(scale))
      for name, value in (('codes', codes), ('scale', scale)):
        leaf = f'mlp/{path}/{name}'
        value = site.layout.cut(value).reshape(moving[leaf].shape)
        out[leaf] = value.astype(moving[leaf].dtype)
    return out

  def _regress(
    self, w: jax.Array, hessian: jax.Array, cross: jax.Array
  ) -> jax.Array:
    """Least squares of dense outputs on compressed activations, near w."""
    h = np.asarray(hessian, np.float64)
    c = np.asarray(cross, np.float64)  # [F, F]: compressed x dense.
    dense = np.asarray(w, np.float64)
    floor = self.ridge * np.mean(np.diag(h)) + 1e-12
    factor = scipy.linalg.cho_factor(h + floor * np.eye(len(h)))
    # What the dense outputs ask for beyond what w gives from these inputs.
    asked = (c - h) @ dense.T
    moved = dense + scipy.linalg.cho_solve(factor, asked).T
    return jnp.asarray(moved, jnp.float32)


@functools.lru_cache(maxsize=16)
def _moments(
  branch: _branch.Branch, dense: _branch.Branch, dtype: Any, down: bool
):
  """Weighted second moments of what a weight reads, for a batch."""

  @jax.jit
  def collect(params, dense_params, residual, weight):
    residual = residual.astype(dtype)
    found = branch.apply(params, residual)
    x = found['hidden' if down else 'input'].astype(jnp.float32)
    if down:
      # The norm after it divides by the size of the output.
      size = jnp.mean(jnp.square(found['inner'].astype(jnp.float32)), axis=-1)
      weight = weight / jnp.maximum(size, 1e-12)
    weighted = x * weight[:, None]
    out = {'inner': weighted.T @ x, 'weight': jnp.sum(weight)}
    if down:
      y = dense.apply(dense_params, residual)['hidden'].astype(jnp.float32)
      out['cross'] = weighted.T @ y
    return out

  return collect
