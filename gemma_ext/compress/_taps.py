# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sums of squares of what flows through a model, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from gemma_ext.compress import _calibrate
from gemma_ext.kernels import _experts_dense
from gemma_ext.nn import _native
from gemma_ext.nn import _sites

TABLE = 'input_embedding'
# Names of the two uses of the table among the sums.
ENCODED, DECODED = 'encoded', 'decoded'


def zeros(sites: Mapping[str, _sites.Site]) -> dict[str, Any]:
  """Sums to be, by path."""
  sums: dict[str, Any] = {}
  width = count = 0
  for path, site in sites.items():
    layout = site.layout
    if site.kind in (_sites.Kind.EINSUM, _sites.Kind.EXPERTS):
      # Of experts: rows of each, and one matrix for all.
      sums[path] = {
        'inputs': jnp.zeros((layout.cols, layout.cols), jnp.float32),
        'outputs': jnp.zeros(layout.size // layout.cols, jnp.float32),
      }
    elif path.rpartition('/')[2] == TABLE:
      width = layout.cols
      count = layout.size // layout.cols
  for name, vector, size in (
    (ENCODED, 'tokens', count),
    (DECODED, 'mean', width),
  ):
    sums[name] = {
      'inputs': jnp.zeros((width, width), jnp.float32),
      vector: jnp.zeros(size, jnp.float32),
    }
  return sums


@functools.partial(jax.jit, static_argnames='model')
def window(model, params, zeros, tokens, key):
  """Sums over one window: of `zeros`, of tokens, by token, and of p (1 - p)."""
  mask = (tokens != _calibrate.PAD) & (tokens != _calibrate.BOS)

  def loss(sums):
    with nn.intercept_methods(_Taps(sums, mask, tokens)):
      logits = model.apply({'params': params}, tokens).logits
    logits = logits.astype(jnp.float32)
    labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    p = jnp.exp(jax.lax.stop_gradient(log_p))
    fisher = jnp.sum(jnp.where(mask[..., None], p * (1 - p), 0), axis=(0, 1))
    return jnp.sum(jnp.where(mask, picked, 0)), fisher

  sums, fisher = jax.grad(loss, has_aux=True)(zeros)
  frequency = jnp.zeros(fisher.shape).at[tokens].add(mask)
  return sums, jnp.sum(mask), frequency, fisher


@jax.custom_vjp
def _tap(x: jax.Array, total: jax.Array, mask: jax.Array) -> jax.Array:
  """x; the gradient of `total` is the sum of its own gradients, squared."""
  del total, mask
  return x


def _tap_forward(x, total, mask):
  return x, (total.ndim, mask)


def _tap_backward(kept, g):
  ndim, mask = kept
  flat = jnp.where(mask[..., None], g, 0).astype(jnp.float32)
  flat = flat.reshape(-1, g.shape[-1])
  found = flat.T @ flat if ndim == 2 else jnp.sum(flat * flat, axis=0)
  return g, found, None


_tap.defvjp(_tap_forward, _tap_backward)


@jax.custom_vjp
def _tap_tokens(
  x: jax.Array, total: jax.Array, mask: jax.Array, tokens: jax.Array
) -> jax.Array:
  """x; the gradient of `total` is its own one's squared norm, by token."""
  del total, mask, tokens
  return x


def _tap_tokens_forward(x, total, mask, tokens):
  return x, (total, mask, tokens)


def _tap_tokens_backward(kept, g):
  total, mask, tokens = kept
  squares = jnp.sum(jnp.square(g.astype(jnp.float32)), axis=-1)
  found = jnp.zeros_like(total).at[tokens].add(jnp.where(mask, squares, 0))
  return g, found, None, None


_tap_tokens.defvjp(_tap_tokens_forward, _tap_tokens_backward)


@jax.custom_vjp
def _tap_inputs(x: jax.Array, total: jax.Array, mask: jax.Array) -> jax.Array:
  """x; the gradient of `total` is the sum of x or of its second moments."""
  del total, mask
  return x


def _tap_inputs_forward(x, total, mask):
  return x, (x, total.ndim, mask)


def _tap_inputs_backward(kept, g):
  x, ndim, mask = kept
  flat = jnp.where(mask[..., None], x, 0).astype(jnp.float32)
  flat = flat.reshape(-1, x.shape[-1])
  return g, flat.T @ flat if ndim == 2 else jnp.sum(flat, axis=0), None


_tap_inputs.defvjp(_tap_inputs_forward, _tap_inputs_backward)


@jax.custom_vjp
def _tap_chosen(x: jax.Array, total: jax.Array, mask: jax.Array) -> jax.Array:
  """x; the gradient of `total` is x's second moments where x has a gradient."""
  del total, mask
  return x


def _tap_chosen_backward(kept, g):
  x, ndim, mask = kept
  # Rows that fill up a block have none.
  return _tap_inputs_backward((x, ndim, mask & jnp.any(g != 0, axis=-1)), g)


_tap_chosen.defvjp(_tap_inputs_forward, _tap_chosen_backward)


class _Taps:
  """Interceptor that leads inputs and outputs of weights past the sums."""

  def __init__(
    self, sums: Mapping[str, Any], mask: jax.Array, tokens: jax.Array
  ):
    self._sums, self._mask, self._tokens = sums, mask, tokens

  def __call__(self, next_fun, args, kwargs, context):
    module, method = context.module, context.method_name
    if isinstance(module, _sites.EINSUMS) and method == '__call__':
      path = '/'.join((*module.path, module.weight_name))
      if path in self._sums:
        return self._einsum(next_fun, self._sums[path], module, *args, **kwargs)
    elif isinstance(module, _native.MIXTURE) and method == _native.RUN:
      return self._experts(module, *args, **kwargs)
    elif isinstance(module, _sites.EMBEDDERS):
      if method == 'encode':
        y = next_fun(*args, **kwargs)
        total = self._sums[ENCODED]['inputs']
        if y.shape[:-1] == self._tokens.shape:
          by_token = self._sums[ENCODED]['tokens']
          y = _tap_tokens(y, by_token, self._mask, self._tokens)
        # Rows of the table are scaled by the root of their width on the way.
        return _tap(y, total * total.shape[0], self._mask)
      if method == 'decode':
        (x,) = args
        for name in ('inputs', 'mean'):
          x = _tap_inputs(x, self._sums[DECODED][name], self._mask)
        return next_fun(x)
    return next_fun(*args, **kwargs)

  def _einsum(self, next_fun, sums, module, eqn, x):
    inputs, weights, outputs = _sites.split_equation(eqn)
    layout = _sites.einsum_layout(eqn, module.shape)
    lead = self._mask.shape
    bare = inputs.replace('...', '')
    axes = [x.ndim - len(bare) + bare.index(weights[i]) for i in layout.in_axes]
    count = len(axes)
    if axes == [*range(x.ndim - count, x.ndim)] and x.shape[:-count] == lead:
      flat = x.reshape(*lead, layout.cols)
      x = _tap_inputs(flat, sums['inputs'], self._mask).reshape(x.shape)
    y = next_fun(eqn, x)
    # To [batch, length, rows], past the tap, and back.
    bare = outputs.replace('...', '')
    first = y.ndim - len(bare)
    axes = [first + bare.index(weights[i]) for i in layout.out_axes]
    order = [i for i in range(y.ndim) if i not in axes] + axes
    turned = jnp.transpose(y, order)
    if turned.shape[: -len(axes)] != lead:
      return y
    flat = _tap(turned.reshape(*lead, -1), sums['outputs'], self._mask)
    back = [order.index(i) for i in range(y.ndim)]
    return jnp.transpose(flat.reshape(turned.shape), back)

  def _experts(self, module, x, chosen, weight):
    """A mixture that the model has of its own."""
    chosen, weight = _native.taken(module, chosen, weight)
    children = [getattr(module, name) for name in _native.WEIGHTS]
    gate, down = (_native.dense(each).astype(x.dtype) for each in children)
    of_gate, of_down = (
      self._sums['/'.join((*each.path, each.weight_name))] for each in children
    )
    count, _, size, _ = gate.shape
    flat, (chosen, weight) = _experts_dense.flatten(
      _tap_inputs(x, of_gate['inputs'], self._mask), chosen, weight
    )
    # Of a token that runs through K experts each counts for one K-th.
    moments = of_down['inputs'] / chosen.shape[-1]
    rows_of_gate = of_gate['outputs'].reshape(count, -1)
    rows_of_down = of_down['outputs'].reshape(count, -1)

    def expert(e, rows):
      rows, real = rows[:, :-1], rows[:, -1] > 0
      both = jnp.einsum('bi,cfi->bcf', rows, gate[e]).reshape(len(rows), -1)
      both = _tap(both, rows_of_gate[e], real)
      hidden = jax.nn.gelu(both[:, :size]) * both[:, size:]
      hidden = _tap_chosen(hidden, moments, real)
      return _tap(hidden @ down[e], rows_of_down[e], real)

    # Blocks know rows of x, not tokens: what is real goes with them.
    real = self._mask.reshape(-1, 1).astype(flat.dtype)
    y = _experts_dense.by_block(
      jnp.concatenate([flat, real], axis=1),
      *(chosen, weight, count, expert, down.shape[-1]),
    )
    return y.astype(x.dtype).reshape(x.shape)
