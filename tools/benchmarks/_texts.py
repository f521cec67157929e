# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The texts of a benchmark of budgets."""

from __future__ import annotations

import dataclasses
import functools

from absl import flags

from gemma_ext import _budgeted
from gemma_ext import ckpts
from gemma_ext import data

_WINDOW = 512


def define_flags(values: flags.FlagValues) -> None:
  """Defines --checkpoint and --text."""
  for name, default, text in (
    ('checkpoint', 'gemma3-270m', 'The dense checkpoint.'),
    ('text', 'sample', 'Text, as evaluate takes it; it is split.'),
  ):
    flags.DEFINE_string(name, default, text, flag_values=values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
  """A text in its parts.

  Attributes:
    calibration: To compute statistics of, and to measure divergences on.
    test: What calibration never saw.
  """

  calibration: _budgeted.Text
  test: data.Windows

  @classmethod
  def of(
    cls,
    checkpoint: ckpts.Checkpoint,
    text: str,
    *,
    tokens: int,
    max_tokens: int | None = None,
  ) -> Texts:
    """Splits a text by documents.

    Args:
      checkpoint: Whose tokenizer to take.
      text: As `gemma_ext.evaluate` takes it.
      tokens: To calibrate on.
      max_tokens: Of the test part, at most.
    """
    parts = data.split(tuple(data.load_documents(text)))
    cut = functools.partial(data.windows, checkpoint.tokenizer, length=_WINDOW)
    calibration = cut(
      parts.calibration.documents, max_tokens=_budgeted.COUNTED
    ).tokens
    return cls(
      calibration=_budgeted.Text.of(calibration, -(-tokens // (_WINDOW - 1))),
      test=cut(parts.test.documents, max_tokens=max_tokens),
    )
