# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Calibration statistics: what the weights of a model meet on real text."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.nn import _config
from gemma_ext.nn import _sites

_COLLECTION = 'calibration'
PAD = 0
BOS = 2


def second_moments(
  model: nn.Module,
  params: Mapping[str, Any],
  tokens: Any,
  *,
  mixtures: Mapping[str, gx_nn.Mixture] | None = None,
  batch_size: int = 1,
  progress: bool = False,
) -> dict[str, jax.Array]:
  """Means of squared inputs of every einsum, over tokens of real text.

  The diagonal of the Gauss-Newton matrix of a linear layer's squared output
  error. Padding and BOS do not count: the residual of BOS, an attention sink,
  is two orders of magnitude larger than any other and would decide alone.

  Args:
    model: The official model.
    params: Its dense parameters.
    tokens: Token ids `[batch, length]`, padded with 0.
    mixtures: Layers that run as mixtures, by path, if the parameters have
      routers: experts then count for the tokens that they get.
    batch_size: Sequences in one forward pass.
    progress: Whether to show a progress bar.

  Returns:
    For the path of each weight that an einsum reads: float32 `[cols]`, in the
    order of the packed input axis. Experts see mixed tokens and are left out.

  Raises:
    ShapeError: If `tokens` is not a non-empty integer matrix.
    ParamsMismatchError: If `model` is no official model.
  """
  _config.check(model)
  tokens = check_tokens(tokens)
  probe = _config.probe(model)

  @jax.jit
  def step(params, tokens):
    mask = (tokens != PAD) & (tokens != BOS)
    # Around the recorder, which sees what is left of the activations.
    routed = (
      gx_nn.packed_weights({}, dtype=model.dtype, mixtures=mixtures)
      if mixtures
      else contextlib.nullcontext()
    )
    with routed, nn.intercept_methods(_Recorder(mask)):
      _, state = probe.apply({'params': params}, tokens, mutable=[_COLLECTION])
    return state[_COLLECTION], jnp.sum(mask)

  total: Any = None
  count = 0
  starts = range(0, len(tokens), batch_size)
  for start in tqdm.tqdm(
    starts, desc='calibrate', unit='batch', disable=not progress
  ):
    batch = tokens[start : start + batch_size]
    if len(batch) < batch_size:
      padding = ((0, batch_size - len(batch)), (0, 0))
      batch = np.pad(batch, padding, constant_values=PAD)
    sums, n = step(params, jnp.asarray(batch, jnp.int32))
    count += int(n)
    total = sums if total is None else jax.tree.map(jnp.add, total, sums)
  if not count:
    raise errors.ShapeError('Calibration tokens hold nothing but padding.')
  flat = traverse_util.flatten_dict(total, sep='/')
  return {path: value / count for path, value in flat.items()}


def check_tokens(tokens: Any) -> np.ndarray:
  """Returns calibration tokens as an array.

  Args:
    tokens: Token ids `[batch, length]`.

  Raises:
    ShapeError: If they are no non-empty integer matrix.
  """
  tokens = np.asarray(tokens)
  if (
    tokens.ndim != 2
    or not tokens.size
    or not np.issubdtype(tokens.dtype, np.integer)
  ):
    raise errors.ShapeError(
      'Calibration tokens must be integers of shape [batch, length], got'
      f' {tokens.dtype} {tokens.shape}.'
    )
  return tokens


class _Recorder:
  """Interceptor that sums squared inputs of every einsum over real tokens."""

  def __init__(self, mask: jax.Array):
    self._mask = mask  # [batch, length]

  def __call__(self, next_fun, args, kwargs, context):
    module, method = context.module, context.method_name
    if isinstance(module, _sites.EINSUMS) and method == '__call__':
      self._record(module, *args, **kwargs)
    return next_fun(*args, **kwargs)

  def _record(self, module: nn.Module, eqn: str, x: jax.Array) -> None:
    inputs, weights, _ = _sites.split_equation(eqn)
    layout = _sites.einsum_layout(eqn, module.shape)
    axes = [inputs.replace('...', '').index(weights[i]) for i in layout.in_axes]
    axes = [x.ndim - len(inputs.replace('...', '')) + a for a in axes]
    lead = x.ndim - len(axes)
    if axes != list(range(lead, x.ndim)) or x.shape[:lead] != self._mask.shape:
      return
    x = jnp.where(self._mask[(...,) + (None,) * len(axes)], x, 0).astype(
      jnp.float32
    )
    moment = jnp.sum(x * x, axis=range(lead)).reshape(layout.cols)
    module.sow(
      _COLLECTION,
      module.weight_name,
      moment,
      reduce_fn=jnp.add,
      init_fn=lambda: jnp.zeros(layout.cols, jnp.float32),
    )
