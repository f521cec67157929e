# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Documents cut into windows of tokens, for evaluation and calibration."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any

import numpy as np

from gemma_ext import errors
from gemma_ext.data import _documents
from gemma_ext.data import _hashing
from gemma_ext.data import _splits

PAD = 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
  """Windows of tokens, none of which crosses a document.

  Attributes:
    tokens: int32 [N, L]; BOS, tokens of one document, zeros as padding.
    score_mask: bool [N, L]; the tokens that count as prediction targets.
    document: int32 [N]; indexes `ids`, in increasing order.
    ids: Ids of the documents that have at least one window.
    stride: New tokens a window.
    data_sha256: Hash of the documents' texts.
  """

  tokens: np.ndarray
  score_mask: np.ndarray
  document: np.ndarray
  ids: tuple[str, ...]
  stride: int
  data_sha256: str

  def __post_init__(self):
    n, length = self.tokens.shape
    if self.score_mask.shape != (n, length) or self.document.shape != (n,):
      raise errors.ShapeError(
        f'tokens {self.tokens.shape}, score_mask {self.score_mask.shape} and'
        f' document {self.document.shape} do not belong together: expected'
        ' [N, L], [N, L] and [N].'
      )
    if self.score_mask[:, 0].any():
      raise errors.ShapeError(
        'The first token of a window has nothing before it and cannot be'
        ' scored: score_mask[:, 0] must be False.'
      )

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def length(self) -> int:
    """Tokens of a window, BOS included."""
    return self.tokens.shape[1]

  @property
  def num_scored(self) -> int:
    """Tokens that are scored, in all windows."""
    return int(self.score_mask.sum())

  @functools.cached_property
  def sha256(self) -> str:
    """Hash of the tokens and of what is scored."""
    return _hashing.arrays_sha256(self.tokens, self.score_mask, self.document)


def windows(
  tokenizer: Any,
  documents: Sequence[_documents.Document],
  *,
  length: int = 512,
  stride: int | None = None,
  max_tokens: int | None = None,
) -> Windows:
  """Cuts documents into windows that each start with BOS.

  Every token of a document is scored exactly once. Token id 0, which only a
  literal padding marker in a text gives, is left out: models mask it.

  Args:
    tokenizer: A `gm.text.Tokenizer`.
    documents: Texts, or a `Split`'s `documents`.
    length: Tokens of a window, BOS included.
    stride: New tokens a window, 1 to length - 1. Before them a window repeats
      length - 1 - stride tokens as context. `None` is length - 1: no overlap.
    max_tokens: Score at most that many. Windows are then taken in turn from
      all documents (the first of each, the second of each, ...), because an
      interval over documents needs documents more than it needs tokens.

  Returns:
    Windows ordered by document and position.

  Raises:
    DataError: Bad arguments, or no tokens at all.
  """
  if length < 2:
    raise errors.DataError(f'length must be at least 2, got {length}.')
  stride = length - 1 if stride is None else stride
  if not 1 <= stride < length:
    raise errors.DataError(
      f'stride must be 1 to length - 1 = {length - 1}, got {stride}.'
    )
  if max_tokens is not None and max_tokens < 1:
    raise errors.DataError(f'max_tokens must be at least 1, got {max_tokens}.')
  documents = tuple(documents)
  encoded = [_encode(tokenizer, d.text) for d in documents]
  # (window of the document, document, first scored token, last + 1)
  spans = [
    (w, i, start, stop)
    for i, ids in enumerate(encoded)
    for w, (start, stop) in enumerate(_spans(len(ids), length, stride))
  ]
  if not spans:
    raise errors.DataError(
      f'{len(documents)} documents hold no tokens at all to make windows of.'
    )
  spans = sorted(_limit(sorted(spans), max_tokens), key=lambda s: (s[1], s[0]))
  used = sorted({i for _, i, _, _ in spans})
  place = {i: k for k, i in enumerate(used)}
  tokens = np.full((len(spans), length), PAD, np.int32)
  mask = np.zeros((len(spans), length), bool)
  bos = int(tokenizer.special_tokens.BOS)
  for n, (_, i, start, stop) in enumerate(spans):
    context = max(start - (length - 1 - stride), 0)
    piece = encoded[i][context:stop]
    tokens[n, 0] = bos
    tokens[n, 1 : 1 + len(piece)] = piece
    mask[n, 1 + start - context : 1 + stop - context] = True
  return Windows(
    tokens=tokens,
    score_mask=mask,
    document=np.array([place[i] for _, i, _, _ in spans], np.int32),
    ids=tuple(documents[i].id for i in used),
    stride=stride,
    data_sha256=_splits.documents_sha256([documents[i] for i in used]),
  )


def token_batches(
  tokenizer: Any,
  documents: Sequence[_documents.Document],
  *,
  length: int = 512,
  batch_size: int = 1,
  max_tokens: int | None = None,
  seed: int | None = None,
) -> Iterator[np.ndarray]:
  """Yields int32 [batch_size, length] batches of windows, for calibration.

  Windows start with BOS and do not overlap; those that padding would fill by
  more than half are left out unless there are no others, and so is a last
  batch that is not full.

  Args:
    tokenizer: A `gm.text.Tokenizer`.
    documents: Texts.
    length: Tokens of a window, BOS included.
    batch_size: Windows of a batch.
    max_tokens: See `windows`.
    seed: Shuffles the windows; `None` keeps their order.

  Raises:
    DataError: Not even one batch; says how many windows there are.
  """
  if batch_size < 1:
    raise errors.DataError(f'batch_size must be at least 1, got {batch_size}.')
  rows = windows(
    tokenizer, documents, length=length, max_tokens=max_tokens
  ).tokens
  full = rows[(rows != PAD).sum(1) > length // 2]
  rows = full if len(full) >= batch_size else rows
  if len(rows) < batch_size:
    raise errors.DataError(
      f'{len(rows)} windows of {length} tokens do not fill one batch of'
      f' {batch_size}. Give more text, or a smaller length or batch_size.'
    )
  if seed is not None:
    rows = np.random.default_rng(seed).permutation(rows)
  return (
    rows[i : i + batch_size]
    for i in range(0, len(rows) - batch_size + 1, batch_size)
  )


def _encode(tokenizer: Any, text: str) -> np.ndarray:
  ids = np.asarray(tokenizer.encode(text), np.int32)
  return ids[ids != PAD]


def _spans(n: int, length: int, stride: int) -> Iterator[tuple[int, int]]:
  """Yields (first, last + 1) of the tokens that each window scores."""
  start, stop = 0, min(n, length - 1)
  while start < n:
    yield start, stop
    start, stop = stop, min(n, stop + stride)


def _limit(
  spans: list[tuple[int, int, int, int]], max_tokens: int | None
) -> list[tuple[int, int, int, int]]:
  """Keeps the first spans that score `max_tokens`, the last one cut short."""
  if max_tokens is None:
    return spans
  out = []
  left = max_tokens
  for w, i, start, stop in spans:
    stop = min(stop, start + left)
    out.append((w, i, start, stop))
    left -= stop - start
    if not left:
      break
  return out
