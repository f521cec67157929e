# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Second-order statistics: what an error of a weight costs, to second order.

To second order an error E of a weight raises the mean loss of a token by half
of the mean of `(g E x)^2`, x being the input that the weight meets and g the
gradient of the log-likelihood of a label that the model itself drew, with
respect to the output. Taken as independent, that is

    1/2 * sum_i F_i * E_i H E_i^T,  H = mean x x^T,  F_i = mean g_i^2

with E_i a row of the error. The table of embeddings is read twice: as input,
where row v counts as often as token v comes, times how steep the loss is in
looked up rows of tokens that come about as often (rare ones say more: on the
270M their squared gradients are seven times those of the most frequent), and as
output, where the Fisher information of its logit is p (1 - p).

Reference: Martens and Grosse, "Optimizing Neural Networks with
Kronecker-factored Approximate Curvature", arXiv 1503.05671.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from gemma_ext import errors
from gemma_ext.compress import _calibrate
from gemma_ext.compress import _expected
from gemma_ext.nn import _config
from gemma_ext.nn import _sites

_TABLE = 'input_embedding'
# Tokens of like frequency that are taken together, as many of each kind and at
# most so many kinds, to tell how steep the loss is in their rows.
_ALIKE = 64
_KINDS = 12
# Share that how often tokens are expected has in what the head's rows cost.
_EXPECTED = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
  """Statistics of one model on one text, means over tokens.

  Attributes:
    inputs: By path, H of the inputs of a weight, float32 `[cols, cols]`. Of the
      table of embeddings it is that of both its uses, weighed by what they
      cost.
    outputs: By path, F of the rows of the weight, float32 `[rows]`. Of the
      table: the Fisher information of each logit.
    expected: Of the table: how often each token is expected to come in other
      texts, of all tokens, float32 `[V]`.
    encoded: Of the table: second moments of gradients with respect to a looked
      up row, float32 `[D, D]`.
    decoded: Of the table: second moments of the inputs of the output head.
    center: Of the table: mean of the inputs of the output head, `[D]`.
    steepness: Of the table: squared gradients with respect to looked up rows,
      over their mean, expected of each token, float32 `[V]`.
    tokens: Tokens that were seen.
  """

  inputs: dict[str, np.ndarray]
  outputs: dict[str, np.ndarray]
  expected: np.ndarray
  encoded: np.ndarray
  decoded: np.ndarray
  center: np.ndarray
  steepness: np.ndarray
  tokens: int

  def loss(
    self, path: str, error: jax.Array, rows: np.ndarray | None = None
  ) -> jax.Array:
    """Returns what an error costs row by row, in nats a token.

    Args:
      path: Path of the weight.
      error: Its error `[n, cols]`, all rows or those of `rows`.
      rows: Numbers of the rows, `[n]`.

    Raises:
      ShapeError: If the weight was not seen.
    """
    if path not in self.inputs:
      raise errors.ShapeError(
        f'There are no statistics of {path!r}, only of {sorted(self.inputs)}.'
      )
    part = slice(None) if rows is None else rows
    fisher = self.outputs[path]
    if not self.is_table(path):
      return _loss(error, fisher[part], self.inputs[path])
    return _table_loss(
      error,
      self._heads(path)[part],
      self._lookups()[part],
      self.encoded,
      self.decoded,
    )

  def hessian(self, path: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Returns H of the inputs of a weight, float32 `[cols, cols]`.

    Args:
      path: Path of the weight.
      rows: Of a table, numbers of the rows that are meant: how much each of its
        two uses counts is up to them.
    """
    if rows is None or not self.is_table(path):
      return self.inputs[path]
    fisher = float(self._heads(path)[rows].sum())
    return fisher * self.decoded + float(self._lookups()[rows].sum()) * (
      self.encoded
    )

  def slopes(self, path: str) -> np.ndarray | None:
    """Returns S, with S w what the head reads on average where w is likely.

    Where row w of the table has a large logit, its inputs x are not those of
    everywhere: for normal ones their mean is larger by S w, S the covariance of
    x. A row q that is to be as likely there as w has `q S w = w S w`, which
    rounding to nearest does not keep: it makes rows shorter.

    Args:
      path: Path of the weight.

    Returns:
      float32 `[cols, cols]`; `None` if the weight is no table.
    """
    if not self.is_table(path):
      return None
    return self.decoded - np.outer(self.center, self.center)

  def _heads(self, path: str) -> np.ndarray:
    """Fisher information of each logit, also of what other texts hold."""
    fisher = self.outputs[path]
    # A token is expected about as often as it comes.
    known = self.expected * fisher.sum()
    return fisher + _EXPECTED * (known - fisher)

  def _lookups(self) -> np.ndarray:
    return self.expected * self.steepness

  def importance(self, path: str) -> np.ndarray:
    """Returns what an error of one in every column costs, about, by row.

    Args:
      path: Path of the weight.
    """
    fisher = self.outputs[path].astype(np.float64)
    if not self.is_table(path):
      return fisher
    return self._heads(path) * np.trace(
      self.decoded
    ) + self._lookups() * np.trace(self.encoded)

  def order(self, path: str) -> np.ndarray:
    """Returns the rows of a table, the most important first, int64 `[V]`.

    Args:
      path: Path of the table.

    Raises:
      ShapeError: If the table was not seen.
    """
    if path not in self.outputs:
      raise errors.ShapeError(
        f'There are no statistics of {path!r}, only of {sorted(self.outputs)}.'
      )
    return np.argsort(-self.importance(path), kind='stable')

  def is_table(self, path: str) -> bool:
    """Whether the path is that of the table of embeddings."""
    return path.rpartition('/')[2] == _TABLE


def statistics(
  model: nn.Module,
  params: Mapping[str, Any],
  tokens: Any,
  *,
  counted: Any = None,
  seed: int = 0,
  progress: bool = False,
) -> Statistics:
  """Collects the statistics of every weight of the text model.

  Takes a forward and a backward pass. Padding and BOS do not count, as in
  `second_moments`.

  Args:
    model: The official model.
    params: Its dense parameters.
    tokens: Token ids `[batch, length]`, padded with 0.
    counted: More text of the kind, as `tokens`, which is only counted: it takes
      many tokens to tell how often one comes.
    seed: Seed of the labels.
    progress: Whether to show a progress bar.

  Returns:
    The statistics, on the host: for every weight a matrix of its input axis.

  Raises:
    ShapeError: If `tokens` is not a non-empty integer matrix of real tokens.
    ParamsMismatchError: If `model` is no official model.
  """
  _config.check(model)
  tokens = _calibrate.check_tokens(tokens)
  sites = {site.path: site for site in _sites.sites(model)}
  probe = _config.probe(model)
  total: Any = None
  for i, window in enumerate(
    tqdm.tqdm(tokens, desc='statistics', unit='window', disable=not progress)
  ):
    zeros = _zeros(sites)
    found = _window(
      probe, params, zeros, jnp.asarray(window[None]), jax.random.key(seed + i)
    )
    found = jax.device_get(found)
    total = found if total is None else jax.tree.map(np.add, total, found)
  sums, count, frequency, fisher = total
  if not count:
    raise errors.ShapeError('Calibration tokens hold nothing but padding.')
  means = jax.tree.map(lambda x: np.asarray(x / count, np.float32), sums)
  # A weight that no einsum reads, or not as the sites say, has no inputs.
  seen = {
    path: pair
    for path, pair in means.items()
    if path in sites and np.any(pair['inputs'])
  }
  frequency = np.asarray(frequency, np.float64)
  seen_here = frequency
  if counted is not None and np.size(counted):
    more = _calibrate.check_tokens(counted)
    more = more[(more != _calibrate.PAD) & (more != _calibrate.BOS)]
    if more.size and not 0 <= more.min() <= more.max() < len(frequency):
      raise errors.ShapeError(
        f'counted holds tokens {more.min()} to {more.max()}; the model has'
        f' {len(frequency)}.'
      )
    frequency = frequency + np.bincount(more, minlength=len(frequency))
  table = params['embedder'][_TABLE]
  expected = np.asarray(_expected.expected(frequency, table), np.float32)
  steepness = _steepness(sums[_ENCODED]['tokens'], seen_here, expected)
  outputs = {path: pair['outputs'] for path, pair in seen.items()}
  inputs = {path: pair['inputs'] for path, pair in seen.items()}
  encoded, decoded = means[_ENCODED]['inputs'], means[_DECODED]['inputs']
  for path, site in sites.items():
    if path.rpartition('/')[2] == _TABLE and site.layout.cols == len(decoded):
      outputs[path] = np.asarray(fisher / count, np.float32)
      looked_up = float((expected * steepness).sum())
      inputs[path] = outputs[path].sum() * decoded + looked_up * encoded
  return Statistics(
    inputs=inputs,
    outputs=outputs,
    expected=expected,
    encoded=encoded,
    decoded=decoded,
    center=means[_DECODED]['mean'],
    steepness=steepness,
    tokens=int(count),
  )


# Names of the two uses of the table among the sums.
_ENCODED, _DECODED = 'encoded', 'decoded'


def _zeros(sites: Mapping[str, _sites.Site]) -> dict[str, Any]:
  """Sums to be, by path."""
  sums: dict[str, Any] = {}
  width = count = 0
  for path, site in sites.items():
    layout = site.layout
    if site.kind == _sites.Kind.EINSUM:
      sums[path] = {
        'inputs': jnp.zeros((layout.cols, layout.cols), jnp.float32),
        'outputs': jnp.zeros(layout.size // layout.cols, jnp.float32),
      }
    elif path.rpartition('/')[2] == _TABLE:
      width = layout.cols
      count = layout.size // layout.cols
  for name, vector, size in (
    (_ENCODED, 'tokens', count),
    (_DECODED, 'mean', width),
  ):
    sums[name] = {
      'inputs': jnp.zeros((width, width), jnp.float32),
      vector: jnp.zeros(size, jnp.float32),
    }
  return sums


@functools.partial(jax.jit, static_argnames='model')
def _window(model, params, zeros, tokens, key):
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
    elif isinstance(module, _sites.EMBEDDERS):
      if method == 'encode':
        y = next_fun(*args, **kwargs)
        total = self._sums[_ENCODED]['inputs']
        if y.shape[:-1] == self._tokens.shape:
          by_token = self._sums[_ENCODED]['tokens']
          y = _tap_tokens(y, by_token, self._mask, self._tokens)
        # Rows of the table are scaled by the root of their width on the way.
        return _tap(y, total * total.shape[0], self._mask)
      if method == 'decode':
        (x,) = args
        for name in ('inputs', 'mean'):
          x = _tap_inputs(x, self._sums[_DECODED][name], self._mask)
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


def _steepness(
  squares: np.ndarray, seen: np.ndarray, expected: np.ndarray
) -> np.ndarray:
  """Squared gradients that are expected of every token, over their mean.

  Args:
    squares: Their sums by token, `[V]`.
    seen: How often each token came there.
    expected: How often each is expected to come.

  Returns:
    float32 `[V]`: of kinds of tokens that come about as often, in between and
    beyond in proportion to the logarithm.
  """
  squares = np.asarray(squares, np.float64)
  level = np.log(np.maximum(np.asarray(expected, np.float64), 1e-30))
  order = np.argsort(level, kind='stable')
  order = order[seen[order] > 0]
  kinds = min(_KINDS, int(seen.sum()) // _ALIKE)
  if kinds < 2 or not squares.sum() > 0:
    return np.ones(len(expected), np.float32)
  # As many tokens of the text in each.
  kind = np.cumsum(seen[order]) / seen.sum() * kinds
  kind = np.minimum(kind.astype(int), kinds - 1)
  total = lambda x: np.bincount(kind, x[order], kinds)
  held = total(seen) > 0
  mean = total(squares)[held] / total(seen)[held]
  at = total(seen * level)[held] / total(seen)[held]
  values = np.interp(level, at, np.log(np.maximum(mean, 1e-30)))
  return np.asarray(np.exp(values) * seen.sum() / squares.sum(), np.float32)


@jax.jit
def _loss(error, fisher, hessian):
  error = error.astype(jnp.float32)
  return 0.5 * fisher * jnp.sum((error @ hessian) * error, axis=-1)


@jax.jit
def _table_loss(error, fisher, counts, encoded, decoded):
  error = error.astype(jnp.float32)
  out = fisher * jnp.sum((error @ decoded) * error, axis=-1)
  return 0.5 * (out + counts * jnp.sum((error @ encoded) * error, axis=-1))
