# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Text to distil on that the dense model writes itself.

A hundred documents hold as many topics, and a student that has read them three
times knows these best. What the teacher writes is on every topic that it knows,
and its distribution there is known exactly. Liu et al., "LLM-QAT: Data-Free
Quantization Aware Training for Large Language Models", arXiv 2305.17888, heal
on such text alone; here it widens the text that there is, whose first words it
goes on from, so that language and manner stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import hashlib
import os
import pathlib
from typing import Any

from absl import logging
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from gemma_ext import errors
from gemma_ext.train import _calibration
from gemma_ext.train import _generate
from gemma_ext.train import _processes

_PAD, _EOS, _BOS = 0, 1, 2
# Words of the text that a window goes on from: enough for the language, too few
# for the topic.
_PROMPT = 4
# Texts that are written at a time; more on an accelerator, where a step takes
# as long as its launches.
_ROWS = 32
_MANY_ROWS = 512
# Tokens of a text. A step reads all of what was written before, so that twice
# the length takes four times the time; and more texts hold more topics.
_LENGTH = 256
_SHORTLIST = 32_768
_VERSION = 2


def attempt(
  model: nn.Module,
  params: Mapping[str, Any],
  windows: np.ndarray,
  count: int,
  *,
  directory: str | os.PathLike[str],
  seed: int = 0,
  progress: bool = False,
  stop: Callable[[], bool] = lambda: False,
) -> np.ndarray | None:
  """Writes windows of text, or finds those that were written.

  A window holds BOS and as many texts of about 256 tokens as fill it. They
  come in batches, each of which is kept in a file; `stop` is asked before every
  batch, and the same call goes on from there.

  Args:
    model: The dense model.
    params: Its parameters.
    windows: Text to begin from, token ids `[W, L]`, which begin with BOS.
    count: Windows to write.
    directory: Where they are kept, in a folder of their own.
    seed: Of the beginnings and the sampling.
    progress: Whether to show a bar with the time left.
    stop: Asked before every batch.

  Returns:
    Token ids int32 `[count, L]`; `None` if it was stopped.

  Raises:
    StateError: If the disk is full or cannot be written.
  """
  length = windows.shape[1]
  if length <= _PROMPT + 1:
    raise errors.ConfigError(
      f'Windows of {length} tokens are too short to be written; at least'
      f' {_PROMPT + 2} are needed.'
    )
  digest = hashlib.sha256(_calibration.params_fingerprint(params).encode())
  digest.update(f'{_VERSION} {model!r} {count} {seed} {windows.shape}'.encode())
  digest.update(np.ascontiguousarray(windows, np.int32))
  at_once = _ROWS
  if jax.default_backend() != 'cpu':
    at_once = _MANY_ROWS
    digest.update(str(at_once).encode())
  folder = pathlib.Path(directory).expanduser().absolute()
  folder = folder / f'written-{digest.hexdigest()[:24]}'
  group = _processes.Group()
  pieces = max(1, length // _LENGTH)
  prompts = _prompts(windows, count * pieces, seed)
  batches = -(-len(prompts) // at_once)
  file = lambda i: folder / f'batch_{i}.npz'
  shape = (at_once, 1 - (1 - length) // pieces)
  bar = tqdm.tqdm(
    range(batches), desc='write', unit='batch', disable=not progress
  )
  shortlist = None
  for i in bar:
    if group.any(stop())[0]:
      return None
    if group.first(int(group.leads and _read(file(i), shape) is not None)):
      continue
    if shortlist is None and group.leads:
      shortlist = _shortlist(params, windows)

    def write(i: int = i, shortlist: Any = shortlist) -> None:
      with _calibration.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
      rows = prompts[i * at_once : (i + 1) * at_once]
      rows = np.resize(rows, (at_once, rows.shape[1]))
      key = jax.random.fold_in(jax.random.key(seed), i)
      made = _write(
        params, rows, key, shortlist, model=model, new=shape[1] - rows.shape[1]
      )
      made = np.concatenate([rows, np.asarray(made)], axis=1)
      _calibration.save_arrays(file(i), {'tokens': made.astype(np.int32)})

    group.lead(write)
  found = [_read(file(i), shape) for i in range(batches)]
  if any(x is None for x in found):
    raise errors.StateError(
      f'Text that was written to {folder} a moment ago is gone or damaged.'
    )
  texts = np.concatenate([x for x in found if x is not None])[: len(prompts)]
  bos, words = texts[::pieces, :1], texts[:, 1:].reshape(count, -1)
  return np.concatenate([bos, words[:, : length - 1]], axis=1)


def _prompts(windows: np.ndarray, count: int, seed: int) -> np.ndarray:
  """BOS and a few words from anywhere in the text: `[count, 1 + _PROMPT]`."""
  rng = np.random.default_rng((seed, 17))
  real = (windows != _PAD).sum(axis=1)
  rows = rng.choice(np.flatnonzero(real > _PROMPT + 1), count)
  starts = 1 + rng.integers(0, real[rows] - _PROMPT)
  words = windows[rows[:, None], starts[:, None] + np.arange(_PROMPT)]
  bos = np.full((count, 1), _BOS, np.int32)
  return np.concatenate([bos, words], axis=1).astype(np.int32)


def _shortlist(
  params: Mapping[str, Any], windows: np.ndarray
) -> tuple[jax.Array, jax.Array]:
  """Tokens to write with: all of the text, and the first of the vocabulary.

  A SentencePiece vocabulary has the frequent tokens first.
  """
  table = jnp.asarray(params['embedder']['input_embedding'])
  ids = np.union1d(np.arange(min(_SHORTLIST, len(table))), windows)
  ids = np.setdiff1d(ids, (_PAD, _EOS, _BOS)).astype(np.int32)
  return jnp.asarray(ids), table[ids]


@functools.partial(jax.jit, static_argnames=('model', 'new'))
def _write(params, prompts, key, shortlist, *, model, new) -> jax.Array:
  return _generate.generate(
    model,
    params,
    jnp.asarray(prompts),
    key,
    max_new_tokens=new,
    temperature=1.0,
    shortlist=shortlist,
  )


def _read(path: pathlib.Path, shape: tuple[int, int]) -> np.ndarray | None:
  found = _calibration.load_arrays(path, ('tokens',))
  if found is None:
    return None
  tokens = found['tokens']
  if tokens.shape != shape or tokens.dtype != np.int32:
    logging.warning('%s holds no windows of %s and is made again.', path, shape)
    return None
  return tokens
