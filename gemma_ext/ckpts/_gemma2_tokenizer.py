# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gemma 2's tokenizer as the samplers of `gm` want it."""

import dataclasses
import enum
from typing import Self

from gemma import gm


class _SpecialTokens(gm.text.SpecialTokens, enum.IntEnum):
  """Gemma 2's special tokens, and what the samplers of gm 4.0.1 ask for.

  They read `BEGIN_OF_TOOL_RESPONSE`, which only later families have, and so
  refuse every Gemma 2. As an alias it stops nothing that did not stop before.
  """

  PAD = 0
  EOS = 1
  BOS = 2
  UNK = 3
  MASK = 4
  CUSTOM = 7
  START_OF_TURN = 106
  END_OF_TURN = 107
  BEGIN_OF_TOOL_RESPONSE = END_OF_TURN


@dataclasses.dataclass(frozen=True)
class Gemma2Tokenizer(gm.text.Gemma2Tokenizer):
  """`gm.text.Gemma2Tokenizer` that `gm.text.Sampler` and the others accept."""

  special_tokens = _SpecialTokens

  @classmethod
  def of(cls, tokenizer: gm.text.Gemma2Tokenizer) -> Self:
    """Returns the same tokenizer as one of this class."""
    return cls(path=tokenizer.path, custom_tokens=tokenizer.custom_tokens)
