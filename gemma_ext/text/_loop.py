# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: several steps in one jitted call, the cache in place."""

import dataclasses
import functools
from typing import Any, Protocol

from flax import struct
from gemma.gm.text import _sampler_loop
import jax
import jax.numpy as jnp


class Run(struct.PyTreeNode):
  """What one call of `advance` hands to the next.

  Attributes:
    state: State of the official sampler, for one sequence.
    rounds: Steps so far. A step may give several tokens.
    accepted: Tokens of drafts that were taken.
  """

  state: _sampler_loop.SamplingState
  rounds: jax.Array
  accepted: jax.Array

  @classmethod
  def of(cls, state: _sampler_loop.SamplingState) -> 'Run':
    """Returns the run that starts at a state."""
    return cls(
      state=state,
      rounds=jnp.zeros((), jnp.int32),
      accepted=jnp.zeros((), jnp.int32),
    )


class Progress(struct.PyTreeNode):
  """What the host looks at while the next call is already under way.

  Attributes:
    tokens: New tokens so far, [length of the buffer].
    count: How many there are.
    ended: Whether the last one ends the text.
    rounds: As in `Run`.
    accepted: As in `Run`.
  """

  tokens: jax.Array
  count: jax.Array
  ended: jax.Array
  rounds: jax.Array
  accepted: jax.Array


class Stepper(Protocol):
  """One step of decoding, hashable, as an argument of `advance`."""

  def step(self, run: Run, params: Any, limit: jax.Array) -> Run:
    """Returns the run after one or more new tokens, `limit` at most in all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
  """One token a step, by the official sampler.

  Attributes:
    loop: The official sampler's loop.
  """

  loop: _sampler_loop.SamplerLoop

  def step(self, run: Run, params: Any, limit: jax.Array) -> Run:
    """Returns the run after one new token."""
    del limit
    # pylint: disable-next=protected-access
    state = self.loop._sample_step(run.state, params=params)
    return run.replace(state=state, rounds=run.rounds + 1)


@functools.partial(jax.jit, static_argnames='stepper', donate_argnames='run')
def advance(
  stepper: Stepper, run: Run, params: Any, limit: jax.Array, chunk: jax.Array
) -> tuple[Run, Progress]:
  """Decodes until there are `chunk` more tokens, `limit` in all, or an end.

  Args:
    stepper: What a step is.
    run: Where to go on from. Its memory is reused: it cannot be used again.
    params: Parameters of the model.
    limit: Tokens in all.
    chunk: Tokens of this call. A step that gives several may exceed it.

  Returns:
    The run for the next call, and what the host may look at meanwhile.
  """
  until = jnp.minimum(run.state.step + chunk, limit)

  def go_on(run: Run) -> jax.Array:
    return (run.state.step < until) & ~jnp.all(run.state.done)

  run = jax.lax.while_loop(
    go_on, lambda run: stepper.step(run, params, limit), run
  )
  progress = Progress(
    tokens=run.state.predicted_tokens[0],
    count=run.state.step,
    ended=jnp.all(run.state.done),
    rounds=run.rounds,
    accepted=run.accepted,
  )
  return run, progress
