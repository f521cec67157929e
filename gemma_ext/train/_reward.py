# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`TaskReward`: any Python function of generated text, as a loss to evolve on.

    kd.train.Trainer(
      model=model,
      train_losses={
        'reward': gx.train.TaskReward(
          model=model, tokenizer='gemma3-270m', function=my_task.score
        ),
      },
      trainstep=gx.train.EvolutionStep(method=gx.train.Evolution()),
      ...
    )

It is one of kauldron's losses, so that it can be weighted against others (a
divergence from the model as it was) and be the loss of an evaluator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import math
import numbers
import re
from typing import Any

from absl import logging
from flax import linen as nn
import jax
import jax.numpy as jnp
from kauldron import kd
from kauldron import kontext
import numpy as np

from gemma_ext import errors
from gemma_ext.train import _generate
from gemma_ext.train import _sources

_PAD = 0
_MAX_SHOWN = 300
# Longer answers are a sampler's work.
_MAX_NEW_TOKENS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True, eq=True)
class TaskReward(kd.losses.Loss):
  """Minus the mean reward of what a model writes after prompts.

  The prompts are the batch; the model goes on from them with its cache, inside
  the compiled step and for all members of a population at once. Only the
  tokens go to the host, where the function is called for one text after the
  other. Nothing here has a gradient.

  Attributes:
    model: The model, `cfg.ref.model` in a config.
    tokenizer: A `gm.text.Tokenizer`, or the checkpoint that it belongs to.
    function: A text to a finite number; more is better.
    max_new_tokens: Length of an answer; what follows an end token is cut.
    temperature: 0 takes the likeliest token. Above, all members of a
      population draw by the same numbers.
    stop: The text ends before this string, if it is in the answer.
    with_prompt: Whether the text begins with the prompt.
    seed: Of the drawing.
    tokens: Key of the prompts, `[B, L]`, padded with 0 at the end.
    params: Key of the parameters.
    draw: Key of the number that the drawing changes by.
  """

  model: nn.Module
  tokenizer: Any
  function: Callable[[str], float]
  max_new_tokens: int = 16
  temperature: float = 0.0
  stop: str = ''
  with_prompt: bool = False
  seed: int = 0
  tokens: kontext.Key = 'batch.input'
  params: kontext.Key = 'params'
  draw: kontext.Key = 'step'
  _failures: list[errors.RewardError] = dataclasses.field(
    default_factory=list, init=False, repr=False, compare=False
  )

  def __post_init__(self):
    count = self.max_new_tokens
    if type(count) is not int or not 1 <= count <= _MAX_NEW_TOKENS:
      raise errors.ConfigError(
        'TaskReward.max_new_tokens must be an integer from 1 to'
        f' {_MAX_NEW_TOKENS}, got {count!r}.'
      )
    heat = self.temperature
    if not isinstance(heat, (int, float)) or not 0 <= heat < 1e3:
      raise errors.ConfigError(
        f'TaskReward.temperature must be a number in [0, 1000), got {heat!r}.'
      )
    if not callable(self.function):
      raise errors.ConfigError(
        f'TaskReward.function must be callable, got {self.function!r}.'
      )

  def get_values(
    self, *, tokens: jax.Array, params: Mapping[str, Any], draw: jax.Array
  ) -> jax.Array:
    """Returns minus the reward of every answer, float32 `[B]`."""
    key = jax.random.fold_in(jax.random.key(self.seed), draw)
    answers = _generate.generate(
      self.model,
      params,
      tokens,
      key,
      max_new_tokens=self.max_new_tokens,
      temperature=self.temperature,
      end_tokens=_sources.end_tokens(self.tokenizer),
    )
    shape = jax.ShapeDtypeStruct(tokens.shape[:1], jnp.float32)
    # All members arrive in one call, their axes leading.
    return -jax.pure_callback(
      self._rewards, shape, tokens, answers, vmap_method='broadcast_all'
    )

  def reraise(self) -> None:
    """Raises what the function failed with in a step, if it did."""
    if self._failures:
      failure = self._failures[0]
      self._failures.clear()
      raise failure

  def _rewards(self, prompts: Any, answers: Any) -> np.ndarray:
    """On the host: ids `[..., L]` and `[..., T]` to rewards `[...]`."""
    prompts, answers = np.asarray(prompts), np.asarray(answers)
    lead = answers.shape[:-1]
    try:
      found = [
        self._reward(p, a)
        for p, a in zip(
          prompts.reshape(-1, prompts.shape[-1]),
          answers.reshape(-1, answers.shape[-1]),
        )
      ]
    except errors.RewardError as e:
      # Raised here it would leave other devices waiting; the step raises it.
      logging.error('%s', e)
      self._failures.append(e)
      return np.full(lead, np.nan, np.float32)
    return np.asarray(found, np.float32).reshape(lead)

  def _reward(self, prompt: np.ndarray, answer: np.ndarray) -> float:
    tokenizer = _sources.tokenizer_of(self.tokenizer)
    decode = lambda ids: tokenizer.decode([int(i) for i in ids if i != _PAD])
    text = decode(answer)
    if self.stop:
      text = text.split(self.stop, 1)[0]
    if self.with_prompt:
      text = decode(prompt) + text
    shown = repr(text)
    if len(shown) > _MAX_SHOWN:
      shown = shown[:_MAX_SHOWN] + '...'
    try:
      value = self.function(text)
    except Exception as e:  # whatever a user's function raises
      raise errors.RewardError(
        f'The reward function raised {type(e).__name__}: {e}, for the text'
        f' {shown}.'
      ) from e
    if not isinstance(value, numbers.Real | np.bool_) or not math.isfinite(
      float(value)
    ):
      raise errors.RewardError(
        f'The reward function returned {value!r} for the text {shown}; expected'
        ' a finite number.'
      )
    return float(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
  """A reward: 1 where a regular expression is found in the text, else 0.

  Attributes:
    pattern: As for `re.search`.
  """

  pattern: str

  def __post_init__(self):
    try:
      re.compile(self.pattern)
    except (re.error, TypeError) as e:
      raise errors.ConfigError(
        f'Match.pattern={self.pattern!r} is not a regular expression: {e}.'
      ) from e

  def __call__(self, text: str) -> float:
    return float(re.search(self.pattern, text) is not None)
