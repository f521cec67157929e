# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`stream`: the text that follows a prompt, as it is decoded.

Tokenisation, prefill, cache and sampling are those of the official samplers.
What differs is the loop around them: it takes several steps in one jitted call
that reuses the cache's memory, and the host turns the tokens of one call into
text while the device is at the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
from typing import Any

import dialog
from flax import linen as nn
from gemma import gm
import jax
import jax.numpy as jnp

from gemma_ext import ckpts
from gemma_ext import errors
from gemma_ext.text import _argmax
from gemma_ext.text import _detokenize
from gemma_ext.text import _loop
from gemma_ext.text import _prompt
from gemma_ext.text import _speculative

# Rounded up, to compile less often.
_OUT_STEP = 64


def stream(
  checkpoint: Iterable[Any],
  prompt: str | dialog.Conversation,
  *,
  max_new_tokens: int = 256,
  sampling: gm.text.SamplingMethod | None = None,
  seed: int = 0,
  stop_tokens: Sequence[str | int] = (),
  chunk: int = 4,
  speculative: _speculative.Speculative | None = None,
) -> Stream:
  """Starts to decode the text that follows a prompt.

      for text in gx.text.stream(gx.ckpts.load('gemma3-270m'), 'The capital'):
        print(text, end='', flush=True)

  Args:
    checkpoint: What `gx.ckpts.load` returns, or a model of any family (dense or
      `gx.nn.Compressed`), its parameters and its tokenizer.
    prompt: Text to go on from, or a conversation, which is formatted as the
      tokenizer's family wants it. The begin token is added.
    max_new_tokens: At most that many tokens.
    sampling: How a token is chosen; the likeliest one by default.
    seed: Seed of the sampling.
    stop_tokens: Tokens that end the text, besides the family's own.
    chunk: Tokens between two looks at them. Text comes in such pieces; fewer
      and the host has more to do.
    speculative: How to decode several tokens at a time; one by one by default.
      Greedy sampling then chooses the same tokens, other sampling draws from
      the same distribution, but not the same tokens for a seed. That is true up
      to floating point: the model sees several rows at once, whose last bits
      may differ from those of one row, so that ties may fall otherwise.

  Returns:
    An iterator of pieces of text, see `Stream`.

  Raises:
    SamplingError: If an argument is out of its range, the model has no such
      draft, or speculation does not know the distribution of the sampling.
    TokenizerError: If there is no tokenizer, or it does not fit the model.
  """
  model, params, tokenizer = checkpoint
  _check_positive('max_new_tokens', max_new_tokens)
  _check_positive('chunk', chunk)
  sampler = _sampler(model, params, tokenizer, sampling, stop_tokens)
  # pylint: disable=protected-access
  inputs = sampler._get_inputs(
    prompt=prompt, images=None, add_bos=True, has_batch_dim=False, sharding=None
  )
  largest = int(inputs.text.max())
  if largest >= model.config.num_embed:
    raise errors.TokenizerError(
      f'The prompt has token {largest}, the model {model.config.num_embed}'
      ' embeddings: the tokenizer is that of another model.'
    )
  loop = sampler._initialize_sampler_loop(sampler.sampling)
  # pylint: enable=protected-access
  drafted = speculative.tokens if speculative is not None else 0
  # The last round may write a whole draft past the last token.
  room = inputs.length_with_mm + max_new_tokens + drafted
  sizes: dict[str, Any] = {
    'room': room,
    'max_out_length': _round_up(max_new_tokens, _OUT_STEP),
    'rng': jax.random.key(seed),
  }
  step = max(_prompt.PIECE, drafted + 1)
  rolling = _prompt.rolling_model(model, length=room, step=step)
  if rolling is not None:
    loop = dataclasses.replace(loop, model=rolling)
  stepper: _loop.Stepper = _loop.Plain(
    loop=dataclasses.replace(loop, sampling=_argmax.fast(loop.sampling))
  )
  step_params = params
  if speculative is not None:
    stepper, step_params = speculative.stepper(loop, params)
  if rolling is not None:
    state = _prompt.in_pieces(rolling, params, inputs, step=step, **sizes)
  else:
    state = _prompt.at_once(model, params, inputs, **sizes)
  return Stream(
    stepper,
    _loop.Run.of(state),
    step_params,
    _detokenize.Detokenizer(sampler.tokenizer),
    limit=max_new_tokens,
    chunk=chunk,
    drafted=drafted,
  )


class Stream(Iterator[str]):
  """Pieces of text, and what is known about them so far.

  Attributes:
    tokens: Tokens so far, with the one that ended the text, which is not shown.
    ended: Whether there was such a token; else `max_new_tokens` ended it.
    rounds: Passes of the model so far, that of the prompt left out.
    accepted: Tokens so far that had been drafted.
  """

  def __init__(
    self,
    stepper: _loop.Stepper,
    run: _loop.Run,
    params: Any,
    detokenizer: _detokenize.Detokenizer,
    *,
    limit: int,
    chunk: int,
    drafted: int = 0,
  ):
    self.tokens: list[int] = []
    self.ended = False
    self.rounds = 0
    self.accepted = 0
    self._drafted = drafted
    self._detokenizer = detokenizer
    self._limit = limit
    self._progress = _progress(stepper, run, params, limit, chunk)
    self._pieces = self._run()

  def __next__(self) -> str:
    return next(self._pieces)

  @property
  def acceptance(self) -> float | None:
    """Accepted drafts over drafted tokens so far; `None` without any.

    Drafts past the end of the text count as drafted.
    """
    drafted = self.rounds * self._drafted
    return self.accepted / drafted if drafted else None

  @property
  def tokens_per_round(self) -> float | None:
    """Mean of new tokens a round so far; `None` before the first."""
    return len(self.tokens) / self.rounds if self.rounds else None

  def _run(self) -> Iterator[str]:
    for progress in self._progress:
      count = int(progress.count)
      new = [int(i) for i in progress.tokens[len(self.tokens) : count]]
      self.tokens += new
      self.ended = bool(progress.ended)
      self.rounds = int(progress.rounds)
      self.accepted = int(progress.accepted)
      text = self._detokenizer.add(new[:-1] if self.ended else new)
      done = self.ended or count >= self._limit
      if done:
        text += self._detokenizer.finish()
      if text:
        yield text
      if done:
        return


def _progress(
  stepper: _loop.Stepper, run: _loop.Run, params: Any, limit: int, chunk: int
) -> Iterator[_loop.Progress]:
  """Yields the progress of each call once the next one is under way."""
  sizes = jnp.asarray(limit, jnp.int32), jnp.asarray(chunk, jnp.int32)
  run, progress = _loop.advance(stepper, run, params, *sizes)
  while True:
    run, following = _loop.advance(stepper, run, params, *sizes)
    yield jax.device_get(progress)
    progress = following


def _sampler(
  model: nn.Module,
  params: Any,
  tokenizer: gm.text.Tokenizer | None,
  sampling: gm.text.SamplingMethod | None,
  stop_tokens: Sequence[str | int],
) -> gm.text.Sampler:
  """The official sampler, for its parts."""
  if tokenizer is None:
    raise errors.TokenizerError(
      'The checkpoint has no tokenizer, so a prompt cannot be turned into'
      ' tokens. Put its tokenizer.model beside it, or pass (model, params,'
      ' tokenizer).'
    )
  if type(tokenizer) is gm.text.Gemma2Tokenizer:
    tokenizer = ckpts.Gemma2Tokenizer.of(tokenizer)
  for token in stop_tokens:
    if isinstance(token, str) and len(tokenizer.encode(token)) != 1:
      raise errors.SamplingError(
        f'stop_tokens: {token!r} is {len(tokenizer.encode(token))} tokens;'
        ' expected strings that are one token each, or their ids.'
      )
  try:
    # Of any family: that of Gemma 4 differs in images and sound only.
    return gm.text.Sampler(
      model=model,
      params=params,
      tokenizer=tokenizer,
      sampling=sampling or gm.text.Greedy(),
      stop_tokens=stop_tokens,
    )
  except ValueError as e:
    raise errors.TokenizerError(str(e)) from e


def _check_positive(name: str, value: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise errors.SamplingError(f'{name}={value!r}; expected an int >= 1.')


def _round_up(value: int, step: int) -> int:
  return -(-value // step) * step
