# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Calibration, validation and test documents that never overlap."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import hashlib
import math

from gemma_ext import errors
from gemma_ext.data import _documents
from gemma_ext.data import _hashing

FRACTIONS = (0.6, 0.2, 0.2)
NAMES = ('calibration', 'validation', 'test')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
  """Documents of one purpose.

  Attributes:
    name: 'calibration', 'validation', 'test' or 'all'.
    documents: In the order of the source, duplicates left out.
  """

  name: str
  documents: tuple[_documents.Document, ...]

  def __len__(self) -> int:
    return len(self.documents)

  def __iter__(self) -> Iterator[_documents.Document]:
    return iter(self.documents)

  @functools.cached_property
  def sha256(self) -> str:
    """Hash of the texts, whatever their order and white space."""
    return documents_sha256(self.documents)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
  """What `split` returns.

  Attributes:
    calibration: What compression and healing may see.
    validation: What choices between methods may be made on.
    test: What nothing but the final measurement sees.
    seed: The seed of the assignment.
    duplicates: Documents left out because their text occurred before.
  """

  calibration: Split
  validation: Split
  test: Split
  seed: int
  duplicates: int


def documents_sha256(documents: Sequence[_documents.Document]) -> str:
  """Hash of the texts, whatever their order and white space."""
  return _hashing.set_sha256(d.sha256 for d in documents)


def split(
  documents: Sequence[_documents.Document],
  fractions: tuple[float, float, float] = FRACTIONS,
  seed: int = 0,
) -> Splits:
  """Assigns each document to calibration, validation or test by its text.

  Documents are ranked by a hash of seed and text, white space normalised, and
  the ranks are cut at the fractions. The result depends on which texts there
  are, never on their order, and texts that differ in white space only count as
  one (the first is kept).

  Args:
    documents: At least three different ones.
    fractions: Shares of the documents, positive, with sum 1. A share that
      rounds to nothing still gets one document.
    seed: Changes the assignment.

  Returns:
    Three disjoint, nonempty splits.

  Raises:
    DataError: Bad fractions, or fewer than three different documents.
  """
  if len(fractions) != 3 or not all(0 < f < 1 for f in fractions):
    raise errors.DataError(
      f'fractions must be three numbers in (0, 1), got {fractions}.'
    )
  if not math.isclose(sum(fractions), 1, abs_tol=1e-6):
    raise errors.DataError(
      f'fractions must have sum 1, got {fractions} with {sum(fractions)}.'
    )
  unique: dict[str, _documents.Document] = {}
  for document in documents:
    unique.setdefault(document.sha256, document)
  n = len(unique)
  if n < 3:
    raise errors.DataError(
      f'Cannot split {len(documents)} documents, {n} of them different, into'
      ' calibration, validation and test: each needs at least one. Give'
      ' more documents, or measure on all of them (--split=all).'
    )

  def rank(key: str) -> bytes:
    return hashlib.sha256(f'{seed}:{key}'.encode()).digest()

  # The middle cut leaves room for one document on either side of it.
  first = min(max(round(fractions[0] * n), 1), n - 2)
  second = min(max(round((fractions[0] + fractions[1]) * n), first + 1), n - 1)
  order = sorted(unique, key=rank)
  parts = (order[:first], order[first:second], order[second:])
  calibration, validation, test = (
    Split(
      name=name,
      documents=tuple(d for key, d in unique.items() if key in frozenset(part)),
    )
    for name, part in zip(NAMES, parts, strict=True)
  )
  return Splits(
    calibration=calibration,
    validation=validation,
    test=test,
    seed=seed,
    duplicates=len(documents) - n,
  )
