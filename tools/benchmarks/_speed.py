# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Speed as a task of suites: time to first token, and time of each after it."""

from __future__ import annotations

from collections.abc import Mapping
import functools
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from gemma_ext import _cli
from tools.benchmarks import _shapes
from tools.benchmarks import _timing
from tools.benchmarks.peers import _llama_cpp

# A model of random weights may take so much of the memory that is free.
_SHARE = 0.6


class _Ours:
  """A model of JAX in the loop of `gx.text.stream`, without an end token."""

  def __init__(self, model: Any, params: Any, options: Mapping[str, Any]):
    self._params = params
    self._prompt = jnp.asarray(_text(options['prompt_tokens']))[None]
    self._prefill = jax.jit(
      lambda params, tokens: jnp.argmax(
        model.apply({'params': params}, tokens, return_last_only=True).logits
      )
    )
    length = options['prompt_tokens']
    length += options['tokens'] * (options['rounds'] + 1)
    # Of a compressed model that of the one inside.
    dtype = getattr(getattr(model, 'model', model), 'dtype', jnp.bfloat16)
    cache = model.init_cache(batch_size=1, dtype=dtype, cache_length=length)
    self._decoding = _shapes.Decoding(
      model, params, cache, context=options['prompt_tokens']
    )

  def first(self) -> float:
    """Seconds from the prompt to the first token."""
    return _timing.seconds(
      lambda: self._prefill(self._params, self._prompt).block_until_ready()
    )

  def seconds(self, count: int) -> float:
    """Seconds a token, of so many more."""
    return self._decoding.seconds(count)


class Peer:
  """llama.cpp, fed tokens one by one, its sampling left out."""

  def __init__(self, llama: _llama_cpp.LlamaCpp, prompt: int):
    """Starts.

    Args:
      llama: The model.
      prompt: Tokens of the prompt.
    """
    self._llama, self._prompt = llama, _text(prompt)
    self._llama.reserve(prompt)
    self.first()

  def first(self) -> float:
    """Seconds from the prompt to the logits after it."""
    self._at = len(self._prompt)
    self._llama.clear()
    return _timing.seconds(lambda: self._llama.extend(self._prompt, 0))

  def seconds(self, count: int) -> float:
    """Seconds a token, of so many more."""
    if self._at + count > self._llama.window:
      self._llama.reserve(len(self._prompt) + count)
      self.first()
    tokens = _text(count)

    def run() -> None:
      for token in tokens:
        self._llama.extend(np.array([token]), self._at)
        self._at += 1

    return _timing.seconds(run) / count


def _text(length: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.integers(*_shapes.TOKENS, length).astype(np.int32)


def measure(
  loaded: Any, baseline: Any, options: Mapping[str, Any]
) -> dict[str, Any] | None:
  """Times a model and the baseline in turn, A B A B.

  Args:
    loaded: The model, as `_measure.load` gives it.
    baseline: The baseline, or `None` for the baseline itself.
    options: 'rounds', 'tokens', 'prompt_tokens'.

  Returns:
    Seconds by round, of the model and of the baseline; `None` if the model has
    no weights here and random ones do not fit.
  """
  own = _contender(loaded, options)
  if own is None:
    return None
  contenders = {'': own}
  if baseline is not None:
    contenders['baseline_'] = _contender(baseline, options)
  found = {}
  for what, run in (
    ('first', lambda c: c.first()),
    ('token', lambda c: c.seconds(options['tokens'])),
  ):
    for contender in contenders.values():
      run(contender)  # Compiles, and reads the weights once.
    runs = {n: functools.partial(run, c) for n, c in contenders.items()}
    times = _timing.rounds(runs, options['rounds'])
    found |= {f'{name}{what}_seconds': v for name, v in times.items()}
  del contenders, own
  gc.collect()
  return found


def _contender(loaded: Any, options: Mapping[str, Any]) -> Any:
  if loaded.peer is not None:
    return Peer(loaded.peer, options['prompt_tokens'])
  model, params = loaded.model, loaded.params
  if model is None:
    free = _free_bytes()
    if loaded.nbytes > _SHARE * free:
      _cli.note(
        f'  {_cli.human_bytes(loaded.nbytes)} of random weights are too much'
        f' for {_cli.human_bytes(free)} of free memory: not timed.'
      )
      return None
    model = loaded.shape
    params = _shapes.random_params(model)
  return _Ours(model, params, options)


def _free_bytes() -> int:
  """Memory that can be had where JAX runs; on the CPU without swapping."""
  stats = jax.devices()[0].memory_stats()  # None of a CPU.
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  return psutil.virtual_memory().available
