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
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from gemma_ext import errors
from gemma_ext.compress import _calibrate
from gemma_ext.compress import _expected
from gemma_ext.compress import _fingerprint
from gemma_ext.compress import _taps
from gemma_ext.nn import _config
from gemma_ext.nn import _sites

# Tokens of like frequency that are taken together, as many of each kind and at
# most so many kinds, to tell how steep the loss is in their rows.
_ALIKE = 64
_KINDS = 12
# Share that how often tokens are expected has in what the head's rows cost.
_EXPECTED = 0.5
# Share of random tokens in H; so many windows of so many tokens, in batches.
RANDOM_SHARE = 0.3
_BATCHES, _WINDOWS, _LENGTH = 4, 30, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
  """Statistics of one model on one text, means over tokens.

  Attributes:
    inputs: By path, H of the inputs of a weight, float32 `[cols, cols]`. Of the
      table of embeddings it is that of both its uses, weighed by what they
      cost. Of experts that the model has of its own it is one for all of them,
      the mean over those that ran.
    outputs: By path, F of the rows of the weight, float32 `[rows]`. Of the
      table: the Fisher information of each logit.
    expected: Of the table: how often each token is expected to come in other
      texts, of all tokens, float32 `[V]`.
    encoded: Of the table: second moments of gradients with respect to a looked
      up row, float32 `[D, D]`.
    decoded: Of the table: second moments of the inputs of the output head.
    varied: Of the table: covariance of the inputs of the output head on the
      text alone, float32 `[D, D]`.
    steepness: Of the table: squared gradients with respect to looked up rows,
      over their mean, expected of each token, float32 `[V]`.
    tokens: Tokens that were seen.
    text: Hash of what they were computed of, see `text_fingerprint`; empty of
      statistics that were not made by `statistics`.
  """

  inputs: dict[str, np.ndarray]
  outputs: dict[str, np.ndarray]
  expected: np.ndarray
  encoded: np.ndarray
  decoded: np.ndarray
  varied: np.ndarray
  steepness: np.ndarray
  tokens: int
  text: str = ''

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
    return self.varied

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
    return path.rpartition('/')[2] == _taps.TABLE


def statistics(
  model: nn.Module,
  params: Mapping[str, Any],
  tokens: Any,
  *,
  counted: Any = None,
  random_share: float = RANDOM_SHARE,
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
    random_share: Share of H that is of random tokens of the whole vocabulary,
      in [0, 1). They lead to what no text of a few languages leads to, and
      other texts do: a coordinate that is 10 for the head in English may be
      -714 in Hindi. 0 is what the text alone says.
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
  table = params['embedder'][_taps.TABLE]
  if not 0 <= random_share < 1:
    raise errors.ShapeError(f'random_share={random_share}: expected [0, 1).')
  batches = [(window[None], False) for window in tokens]
  if random_share:
    batches += [(batch, True) for batch in _random(len(table), seed)]
  totals: dict[bool, Any] = {}
  for i, (batch, drawn) in enumerate(
    tqdm.tqdm(batches, desc='statistics', unit='window', disable=not progress)
  ):
    zeros = _taps.zeros(sites)
    found = _taps.window(
      probe, params, zeros, jnp.asarray(batch), jax.random.key(seed + i)
    )
    found = jax.device_get(found)
    totals[drawn] = (
      jax.tree.map(np.add, totals[drawn], found) if drawn in totals else found
    )
  sums, count, frequency, fisher = totals[False]
  if not count:
    raise errors.ShapeError('Calibration tokens hold nothing but padding.')
  means = jax.tree.map(lambda x: np.asarray(x / count, np.float32), sums)
  # Of the text alone: where a token is likely, random ones do not lead to.
  head = means[_taps.DECODED]
  varied = head['inputs'] - np.outer(head['mean'], head['mean'])
  if random_share:
    for path, pair in means.items():
      pair['inputs'] = _mixed(
        pair['inputs'], totals[True][0][path]['inputs'], random_share
      )
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
  expected = np.asarray(_expected.expected(frequency, table), np.float32)
  steepness = _steepness(sums[_taps.ENCODED]['tokens'], seen_here, expected)
  outputs = {path: pair['outputs'] for path, pair in seen.items()}
  inputs = {path: pair['inputs'] for path, pair in seen.items()}
  encoded, decoded = (
    means[_taps.ENCODED]['inputs'],
    means[_taps.DECODED]['inputs'],
  )
  for path, site in sites.items():
    if path.rpartition('/')[2] == _taps.TABLE and site.layout.cols == len(
      decoded
    ):
      outputs[path] = np.asarray(fisher / count, np.float32)
      looked_up = float((expected * steepness).sum())
      inputs[path] = outputs[path].sum() * decoded + looked_up * encoded
  return Statistics(
    inputs=inputs,
    outputs=outputs,
    expected=expected,
    encoded=encoded,
    decoded=decoded,
    varied=varied,
    steepness=steepness,
    tokens=int(count),
    text=text_fingerprint(
      tokens, counted, random_share=random_share, seed=seed
    ),
  )


def text_fingerprint(
  tokens: Any,
  counted: Any = None,
  *,
  random_share: float = RANDOM_SHARE,
  seed: int = 0,
) -> str:
  """Returns the `text` of the statistics of `statistics`, without a pass.

  Args:
    tokens: As of `statistics`.
    counted: As of `statistics`.
    random_share: As of `statistics`.
    seed: As of `statistics`.

  Raises:
    ShapeError: If `tokens` is not a non-empty integer matrix of real tokens.
  """
  tokens = _calibrate.check_tokens(tokens)
  more = None
  if counted is not None and np.size(counted):
    more = _calibrate.check_tokens(counted)
  return _fingerprint.of_text(
    tokens, more, random_share=random_share, seed=seed
  )


def _random(size: int, seed: int) -> list[np.ndarray]:
  """Windows of random tokens of a vocabulary, int32 `[n, length]`, by batch."""
  rng = np.random.default_rng(seed)
  shape = _BATCHES, _WINDOWS, 1 + _LENGTH
  tokens = rng.integers(_calibrate.BOS + 1, size, shape, np.int32)
  tokens[..., 0] = _calibrate.BOS
  return [*tokens]


def _mixed(of_text: np.ndarray, drawn: np.ndarray, share: float) -> np.ndarray:
  """H in which random tokens have a share, whatever their size."""
  size = float(np.trace(drawn))
  scale = share * float(np.trace(of_text)) / size if size else 0.0
  return np.asarray((1 - share) * of_text + scale * drawn, np.float32)


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
