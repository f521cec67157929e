# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Block reconstruction: a branch's output against the dense model's.

The compressed branch reads the residual stream that the compressed model
really has, errors of earlier layers included, and is asked for the residual
stream that the dense model has after the branch.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import errors
from gemma_ext.train import _branch
from gemma_ext.train import _latents
from gemma_ext.train import _problem

# How the squared error is weighted: plainly; by 1 / |t|^2 of each token; that
# and the diagonal of the Fisher information; that and all of it.
WEIGHTINGS = ('mse', 'norm', 'fisher', 'fisher_full')


def metric(weighting: str, fisher: np.ndarray) -> np.ndarray:
  """Returns the square root of the weights of an error: `[D]` or `[D, D]`.

  Args:
    weighting: One of `WEIGHTINGS`.
    fisher: `[D, D]` as `Calibration.fisher` has it.

  Raises:
    ConfigError: If there is no such weighting.
  """
  if weighting not in WEIGHTINGS:
    raise errors.ConfigError(
      f'{weighting=}; expected one of {", ".join(WEIGHTINGS)}.'
    )
  width = len(fisher)
  if weighting in ('mse', 'norm'):
    return np.ones(width, np.float32)
  diagonal = np.diag(fisher).astype(np.float64)
  if weighting == 'fisher':
    return np.sqrt(diagonal).astype(np.float32)
  # A share of the diagonal stands for what few windows cannot tell.
  damped = fisher.astype(np.float64) + 0.1 * np.diag(diagonal)
  values, vectors = np.linalg.eigh(damped)
  root = vectors * np.sqrt(np.maximum(values, 0))
  return root.astype(np.float32)


def token_weights(
  weighting: str, target: np.ndarray, mask: np.ndarray
) -> np.ndarray:
  """Weights of tokens: float32 `[...]` for targets `[..., D]`; 0 for padding.

  `1 / |t|^2` also keeps the attention sink up: the first token's residual is
  two orders of magnitude larger than any other.
  """
  if weighting == 'mse':
    return mask.astype(np.float32)
  square = np.sum(np.square(target.astype(np.float32)), axis=-1)
  return np.where(mask, 1 / np.maximum(square, 1e-6), 0).astype(np.float32)


def problem(branch: _branch.Branch, *, dtype: Any) -> _problem.Problem:
  """Makes the problem of one branch.

  Args:
    branch: The compressed branch.
    dtype: Type of activations and of dense leaves.

  Returns:
    Its loss is the weighted squared error over that of leaving the branch out.
    Batches are dicts of 'residual' and 'target' `[N, D]`, 'weight' `[N]`,
    'scale' (see `scale_of`), 'root' (see `metric`) and 'fixed': the leaves that
    do not move, by path; for the loss by units also 'hidden', the activations
    of the dense branch on the same inputs, `[N, F]`.

    By units: a row of 'linear' makes one dimension of the output, and counts
    the weighted error of that; the gate and up rows of a hidden unit make one
    activation, and count its error against the dense one. Rows of 'linear'
    read the activations as they are, so that they correct what is wrong with
    them; heal 'gating_einsum' first, in a stage of its own.
  """

  def apply(moving: _problem.Params, batch: Any):
    params = _latents.join(branch, moving, batch['fixed'], dtype=dtype)
    out = branch.apply(params, batch['residual'].astype(dtype))
    error = (
      batch['residual'].astype(jnp.float32)
      + out['branch'].astype(jnp.float32)
      - batch['target'].astype(jnp.float32)
    )
    return out, error

  def loss(moving: _problem.Params, batch: Any) -> jax.Array:
    _, error = apply(moving, batch)
    root = batch['root']
    error = error * root if root.ndim == 1 else error @ root
    square = jnp.sum(jnp.square(error), axis=-1)
    return jnp.mean(batch['weight'] * square) / batch['scale']

  def unit_loss(moving: _problem.Params, batch: Any) -> dict[str, jax.Array]:
    out, error = apply(moving, batch)
    weight = batch['weight'][:, None] / batch['scale']
    found = {}
    if 'mlp/linear/codes' in moving:
      root = batch['root']
      if root.ndim == 2:
        root = jnp.sqrt(jnp.sum(jnp.square(root), axis=1))
      found['linear'] = jnp.mean(weight * jnp.square(error * root), axis=0)
    if 'mlp/gating_einsum/codes' in moving:
      away = out['hidden'].astype(jnp.float32) - batch['hidden'].astype(
        jnp.float32
      )
      found['gating_einsum'] = jnp.mean(weight * jnp.square(away), axis=0)
    return found

  return _problem.Problem(loss=loss, unit_loss=unit_loss)


def scale_of(
  residual: np.ndarray, target: np.ndarray, weight: np.ndarray, root: np.ndarray
) -> float:
  """Mean weighted square of `target - residual`: the loss without a branch."""
  error = target.astype(np.float32) - residual.astype(np.float32)
  error = error * root if root.ndim == 1 else error @ root
  value = float(np.mean(weight * np.sum(np.square(error), axis=-1)))
  return value if value > 0 else 1.0
