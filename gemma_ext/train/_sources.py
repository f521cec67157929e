# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Data sources for `kd.data.py.DataSource`: windows of text, and prompts.

They are read when they are first asked for, so that a config is made without
any file. Tokenizers may be given by the name of their checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from gemma import gm
import numpy as np

from gemma_ext import ckpts
from gemma_ext import data
from gemma_ext import errors

_PAD = 0


def tokenizer_of(tokenizer: Any) -> gm.text.Tokenizer:
  """Returns a tokenizer, given itself or the checkpoint that it belongs to.

  Raises:
    TokenizerError: If the checkpoint has none.
  """
  return _by_name(tokenizer) if isinstance(tokenizer, str) else tokenizer


@functools.lru_cache(maxsize=8)
def _by_name(checkpoint: str) -> gm.text.Tokenizer:
  tokenizer = ckpts.load(checkpoint).tokenizer
  if tokenizer is None:
    raise errors.TokenizerError(
      f'{checkpoint!r} has no tokenizer. Put its tokenizer.model beside it.'
    )
  return tokenizer


def end_tokens(tokenizer: Any) -> tuple[int, ...]:
  """Tokens that end an answer."""
  special = tokenizer_of(tokenizer).special_tokens
  return int(special.EOS), int(special.END_OF_TURN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextWindows:
  """Windows of text, mixed, for language modelling.

  Items are dicts of 'input' int32 `[length]`, 'target' int32 `[length, 1]`, the
  token after each, and 'mask' float32 `[length, 1]`, 1 where there is one.

  Attributes:
    tokenizer: A `gm.text.Tokenizer`, or the checkpoint that it belongs to.
    text: Source, as in `gemma_ext.evaluate`. Of 'sample' only the calibration
      documents are taken, so that the others can be measured on.
    tokens: Take at most that many.
    length: Tokens of a window, BOS included.
    seed: Of the split of 'sample' and of the order.
  """

  tokenizer: Any
  text: str = 'sample'
  tokens: int = 65_536
  length: int = 512
  seed: int = 0

  def __post_init__(self):
    for name, least in (('tokens', 1), ('length', 2), ('seed', 0)):
      value = getattr(self, name)
      if type(value) is not int or value < least:
        raise errors.ConfigError(
          f'{type(self).__name__}.{name} must be an integer of at least'
          f' {least}, got {value!r}.'
        )

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
    row = self._rows[int(index)]
    target = np.append(row[1:], _PAD).astype(np.int32)
    return {
      'input': row,
      'target': target[:, None],
      'mask': (target != _PAD).astype(np.float32)[:, None],
    }

  @functools.cached_property
  def _rows(self) -> np.ndarray:
    tokenizer = tokenizer_of(self.tokenizer)
    return windows(
      tokenizer,
      text=self.text,
      tokens=self.tokens,
      length=self.length,
      seed=self.seed,
    )


def windows(
  tokenizer: gm.text.Tokenizer,
  *,
  text: str,
  tokens: int,
  length: int,
  seed: int,
) -> np.ndarray:
  """Windows of text in a mixed order, int32 `[N, length]`.

  Windows that padding would fill by more than half are left out, unless there
  are no others.
  """
  documents = tuple(data.load_documents(text))
  if text == 'sample':
    documents = data.split(documents, seed=seed).calibration.documents
  rows = data.windows(
    tokenizer, documents, length=length, max_tokens=tokens
  ).tokens
  full = rows[(rows != _PAD).sum(axis=1) > length // 2]
  return np.random.default_rng(seed).permutation(full if len(full) else rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
  """Prompts for `TaskReward`.

  Items are dicts of 'input' int32 `[length]`, padded with 0 at the end.

  Attributes:
    tokenizer: A `gm.text.Tokenizer`, or the checkpoint that it belongs to.
    prompts: The texts.
    length: Tokens of a prompt at most, BOS included.
  """

  tokenizer: Any
  prompts: Sequence[str]
  length: int = 64

  def __post_init__(self):
    object.__setattr__(self, 'prompts', tuple(self.prompts))
    if not self.prompts:
      raise errors.ConfigError('Prompts.prompts is empty.')

  def __len__(self) -> int:
    return len(self.prompts)

  def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
    text = self.prompts[int(index)]
    ids = tokenizer_of(self.tokenizer).encode(text, add_bos=True)
    if len(ids) > self.length:
      raise errors.DataError(
        f'A prompt has {len(ids)} tokens, but Prompts.length is'
        f' {self.length}: {text[:80]!r}.'
      )
    return {'input': np.pad(np.int32(ids), (0, self.length - len(ids)))}
