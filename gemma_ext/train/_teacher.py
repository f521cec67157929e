# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`TeacherWindows` and `TeacherKL`: distillation with kauldron.

The dense model reads the text once, before the first step, and its final
hidden states become part of the data. Logits of both models are computed on a
shortlist of the vocabulary; see `_distill`.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from kauldron import kd
from kauldron import kontext
import numpy as np

from gemma_ext import ckpts
from gemma_ext import errors
from gemma_ext.train import _distill
from gemma_ext.train import _sources

_PAD = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherWindows:
  """Windows of text and what a dense model makes of them.

  Items are dicts of 'input' int32 `[length]`, 'teacher' float32 `[length, D]`,
  the dense model's final hidden states, and 'mask' float32 `[length]`, 0 for
  padding.

  Attributes:
    checkpoint: The dense model, as `gx.ckpts.load` takes it.
    text: As for `TextWindows`.
    tokens: As for `TextWindows`.
    length: As for `TextWindows`.
    seed: As for `TextWindows`, and of the sample off the shortlist.
    vocabulary: Tokens of the shortlist, those with most of the teacher's
      probability.
    rest: Tokens of the sample of the others.
  """

  checkpoint: str
  text: str = 'sample'
  tokens: int = 32_768
  length: int = 512
  seed: int = 0
  vocabulary: int = 8192
  rest: int = 2048

  def __post_init__(self):
    for name, least in (
      ('tokens', 1),
      ('length', 2),
      ('seed', 0),
      ('vocabulary', 2),
      ('rest', 0),
    ):
      value = getattr(self, name)
      if type(value) is not int or value < least:
        raise errors.ConfigError(
          f'TeacherWindows.{name} must be an integer of at least {least}, got'
          f' {value!r}.'
        )

  def __len__(self) -> int:
    return len(_read(self).windows)

  def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
    found = _read(self)
    row = found.windows[int(index)]
    return {
      'input': row,
      'teacher': found.final[int(index)].astype(np.float32),
      'mask': (row != _PAD).astype(np.float32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=True)
class TeacherKL(kd.losses.Loss):
  """KL(teacher || student) in nats a token, on a shortlist of the vocabulary.

  Both models' logits are computed with the teacher's output embeddings.

  Attributes:
    teacher: The source of the trainer's data.
    hidden: Key of the student's final hidden states, `[B, L, D]`.
    target: Key of the teacher's.
    mask: Key of the weights of tokens.
  """

  teacher: TeacherWindows
  hidden: kontext.Key = 'interms.final_norm.__call__[0]'
  target: kontext.Key = 'batch.teacher'
  mask: kontext.Key | None = 'batch.mask'

  def get_values(self, *, hidden: jax.Array, target: jax.Array) -> jax.Array:
    """Returns nats, float32 `[B, L]`."""
    found = _read(self.teacher)
    width = hidden.shape[-1]
    nats = _distill.kl(
      hidden.reshape(-1, width),
      target.reshape(-1, width),
      jnp.asarray(found.table),
      jnp.asarray(found.rest),
      found.weight,
      found.cap,
    )
    return nats.reshape(hidden.shape[:-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
  """What was read: see `TeacherWindows` and `_distill.kl`."""

  windows: np.ndarray
  final: np.ndarray
  table: np.ndarray
  rest: np.ndarray
  weight: float
  cap: float | None


@functools.lru_cache(maxsize=2)
def _read(source: TeacherWindows) -> _Found:
  """Reads the text with the dense model; remembered, not its parameters."""
  found = ckpts.load(source.checkpoint)
  if found.recipe is not None:
    raise errors.TrainError(
      f'{source.checkpoint!r} is compressed. The teacher is a dense checkpoint.'
    )
  if found.tokenizer is None:
    raise errors.TokenizerError(
      f'{source.checkpoint!r} has no tokenizer, so no text can be read.'
    )
  rows = _sources.windows(
    found.tokenizer,
    text=source.text,
    tokens=source.tokens,
    length=source.length,
    seed=source.seed,
  )
  # kauldron forbids what is not explicit inside its loop.
  with jax.transfer_guard('allow'):
    final = np.stack(
      [
        np.asarray(_final(found.params, jnp.asarray(row), model=found.model))
        for row in rows
      ]
    )
    full = jnp.asarray(found.params['embedder']['input_embedding'])
    seen: Any = types.SimpleNamespace(final=final, mask=rows != _PAD)
    ids, _ = _distill.shortlist(full, seen, size=source.vocabulary)
    others = np.setdiff1d(np.arange(len(full)), ids)
    size = min(source.rest, len(others))
    rng = np.random.default_rng(source.seed)
    drawn = np.sort(rng.choice(others, size, replace=False))
    return _Found(
      windows=rows,
      final=final,
      table=np.asarray(full[ids]),
      rest=np.asarray(full[drawn]),
      weight=len(others) / max(size, 1),
      cap=found.model.config.final_logit_softcap,
    )


@functools.partial(jax.jit, static_argnames='model')
def _final(params: Any, row: jax.Array, *, model: nn.Module) -> jax.Array:
  """Final hidden states `[L, D]`; logits are not computed."""
  out = model.apply({'params': params}, row[None], return_hidden_states=True)
  return out.hidden_states[0]
