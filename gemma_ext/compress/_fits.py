# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Fitted weights, for the next recipe that wants the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable
import dataclasses
import threading
from typing import Any

import jax

from gemma_ext import errors

_MOST = 2 << 30


@dataclasses.dataclass(frozen=True)
class _Fit:
  """A fitted weight, and the very objects that it was fitted with."""

  sources: tuple[Any, ...]
  leaf: dict[str, jax.Array]
  nbytes: int


class Fits:
  """Weights that were fitted, up to so many bytes of them.

  Budgets of one model take the same width for many of its weights: given to
  `compress` again and again, each is fitted once. What was fitted with other
  arrays or statistics, even equal ones, is fitted anew.
  """

  def __init__(self, most: int = _MOST):
    """Begins with none.

    Args:
      most: Bytes to keep; those that were not used for the longest time go.

    Raises:
      ConfigError: If it is negative.
    """
    if most < 0:
      raise errors.ConfigError(f'most: {most}; expected bytes, 0 or more.')
    self._most = most
    self._fits: dict[Hashable, _Fit] = {}
    self._nbytes = 0
    self._lock = threading.Lock()

  @property
  def nbytes(self) -> int:
    """Bytes that are kept."""
    return self._nbytes

  def of(
    self,
    key: Hashable,
    sources: tuple[Any, ...],
    fit: Callable[[], dict[str, jax.Array]],
  ) -> dict[str, jax.Array]:
    """Returns what was fitted before, or what `fit` returns.

    Args:
      key: The weight and its method.
      sources: What it is fitted with; compared by identity.
      fit: Fits it.
    """
    with self._lock:
      found = self._fits.pop(key, None)
      if found is not None:
        if all(a is b for a, b in zip(found.sources, sources, strict=True)):
          self._fits[key] = found  # Used last.
          return found.leaf
        self._nbytes -= found.nbytes
    leaf = fit()
    size = sum(x.nbytes for x in jax.tree.leaves(leaf))
    with self._lock:
      if key not in self._fits and size <= self._most:
        self._fits[key] = _Fit(sources, leaf, size)
        self._nbytes += size
      while self._nbytes > self._most:
        self._nbytes -= self._fits.pop(next(iter(self._fits))).nbytes
    return leaf
