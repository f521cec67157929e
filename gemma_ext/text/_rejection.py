# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a draft are taken, so that nobody could tell.

Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative
Decoding", arXiv 2211.17192. Greedy sampling is the case in which all
probability is one token's: a draft is taken while it is the likeliest token.
"""

from __future__ import annotations

from gemma import gm
import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.text import _argmax

METHODS = (
  gm.text.Greedy,
  gm.text.RandomSampling,
  gm.text.TopkSampling,
  gm.text.TopPSampling,
)


def check(sampling: gm.text.SamplingMethod) -> None:
  """Raises `SamplingError` unless the method's distribution is known."""
  # A subclass may choose tokens in another way.
  if type(sampling) not in METHODS:
    raise errors.SamplingError(
      f'Speculative decoding needs to know how likely {sampling!r} makes a'
      f' token; expected one of {[cls.__name__ for cls in METHODS]}.'
    )


def log_probs(sampling: gm.text.SamplingMethod, logits: jax.Array) -> jax.Array:
  """Log-probabilities of the tokens that a method may choose.

  Which tokens are possible is decided in the type of the logits, as the
  official method does; their probabilities are float32.

  Args:
    sampling: One of `METHODS`.
    logits: `[..., V]`, as the model returns them.

  Returns:
    `[..., V]`, float32, -inf (or close to it) for what is never chosen.
  """
  match sampling:
    case gm.text.Greedy():
      best = jnp.argmax(logits, axis=-1, keepdims=True)
      chosen = jnp.arange(logits.shape[-1]) == best
      return jnp.where(chosen, 0.0, -jnp.inf)
    case gm.text.TopkSampling():
      k = min(sampling.k, logits.shape[-1])
      values, indices = jax.lax.top_k(logits, k)
      logits = jnp.put_along_axis(
        jnp.full_like(logits, -jnp.inf), indices, values, -1, inplace=False
      )
      logits = logits / sampling.temperature
    case gm.text.TopPSampling():
      logits = logits / sampling.temperature
      if sampling.p < 1.0:
        logits = _nucleus(logits, sampling.p)
    case gm.text.RandomSampling():
      logits = logits / sampling.temperature
    case _:
      check(sampling)
  return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def _nucleus(logits: jax.Array, p: float) -> jax.Array:
  """As `gm.text.TopPSampling`, so that rounding picks the same tokens."""
  ordered = jnp.sort(logits, axis=-1, descending=True)
  total = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
  last = jnp.sum(total < p, axis=-1, keepdims=True)
  least = jnp.take_along_axis(ordered, last, axis=-1)
  return jnp.where(logits < least, jnp.finfo(logits.dtype).min, logits)


def verify_greedy(
  logits: jax.Array,  # [n + 1, V]
  drafts: jax.Array,  # [n]
) -> tuple[jax.Array, jax.Array]:
  """Takes the drafts that are the likeliest tokens.

  Args:
    logits: Those of the model after each of the n drafts, and before the first.
    drafts: Tokens.

  Returns:
    How many drafts are taken, and the token after them.
  """
  best = _argmax.argmax(logits).astype(drafts.dtype)
  count = _leading(drafts == best[:-1])
  return count, best[count]


def verify(
  log_p: jax.Array,  # [n + 1, V]
  log_q: jax.Array,  # [n, K]
  drafts: jax.Array,  # [n]
  uniforms: jax.Array,  # [n]
) -> tuple[jax.Array, jax.Array]:
  """Takes drafts so that tokens follow p, whatever q they were drawn from.

  A draft x is taken with probability min(1, p(x) / q(x)). The token after those
  taken is to be drawn from max(p - q, 0), normalised, or from p if there was
  no draft left.

  Args:
    log_p: Log-probabilities of the model's tokens.
    log_q: Those of the draft's, for the first K tokens; no other is drafted.
    drafts: Tokens, drawn from q.
    uniforms: Uniform numbers in [0, 1).

  Returns:
    How many drafts are taken, and the log-probabilities `[V]`, not normalised,
    of the token after them.
  """
  count = drafts.shape[0]
  chosen = jnp.arange(count), drafts
  ratio = log_p[chosen] - log_q[chosen]
  taken = _leading(jnp.log(uniforms) < ratio)
  p = jnp.exp(log_p[taken])
  # Nothing was drafted in the last place.
  q = jnp.exp(log_q[jnp.minimum(taken, count - 1)]) * (taken < count)
  q = jnp.pad(q, (0, p.shape[-1] - q.shape[-1]))
  rest = jnp.maximum(p - q, 0)
  # Of equal distributions rounding alone rejects, and may leave nothing.
  return taken, jnp.log(jnp.where(jnp.sum(rest) > 0, rest, p))


def _leading(taken: jax.Array) -> jax.Array:
  """How many are taken before the first that is not."""
  return jnp.sum(jnp.cumprod(taken.astype(jnp.int32)))
