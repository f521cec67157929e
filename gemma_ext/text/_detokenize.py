# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Detokenizer`: tokens in, text out, never a part of a character."""

from collections.abc import Sequence

from gemma import gm

# A character of UTF-8 has at most four bytes, so that at most three of them,
# each a token, can wait for the next one.
_MOST_WAITING = 3
_REPLACEMENT = '\N{REPLACEMENT CHARACTER}'


class Detokenizer:
  """Turns tokens into text as they come.

  Characters that the vocabulary lacks are tokens of one byte each, which are no
  text before the last of them. Those bytes wait here.
  """

  def __init__(self, tokenizer: gm.text.Tokenizer):
    """Starts with no tokens.

    Args:
      tokenizer: What decodes.
    """
    self._tokenizer = tokenizer
    self._ids: list[int] = []  # Not shown yet, and the one before them.
    self._shown = 0  # Characters of their text.

  def add(self, ids: Sequence[int]) -> str:
    """Returns the text that is certain with these tokens, and new.

    Args:
      ids: The next tokens, any number of them.
    """
    self._ids += ids
    text = self._tokenizer.decode(self._ids)
    waiting = len(text) - len(text.rstrip(_REPLACEMENT))
    end = len(text) - min(waiting, _MOST_WAITING)
    new = text[self._shown : end]
    self._shown = max(self._shown, end)
    if self._ids and not waiting:
      # All is shown. One token stays, because tokenizers may treat the first
      # one of a text in another way.
      self._ids = self._ids[-1:]
      self._shown = len(self._tokenizer.decode(self._ids))
    return new

  def finish(self) -> str:
    """Returns what still waits, as replacement characters."""
    new = self._tokenizer.decode(self._ids)[self._shown :]
    self._shown += len(new)
    return new
