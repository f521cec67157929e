# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Problem`: what an optimiser minimises, and the interface of optimisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Protocol

import jax

Params = dict[str, Any]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
  """A loss over a batch, whole and, where it factors, by output row.

  Attributes:
    loss: Mean loss of `(params, batch)`, a float32 scalar; differentiable with
      respect to floating leaves.
    unit_loss: Losses by the name of a weight, one for each of its output rows
      (for ternary weights, of each plane sum): float32 `[rows]`. `None` where
      the loss does not factor.
  """

  loss: Callable[[Params, Any], jax.Array]
  unit_loss: Callable[[Params, Any], Mapping[str, jax.Array]] | None = None


class Optimizer(Protocol):
  """What minimises a `Problem`; a frozen dataclass of plain values.

  Attributes:
    steps: Number of updates.
  """

  @property
  def steps(self) -> int:
    """Number of updates."""

  def init(self, params: Params, key: jax.Array) -> Any:
    """Returns the first state, a pytree of arrays."""

  def update(
    self,
    problem: Problem,
    params: Params,
    state: Any,
    batch: Any,
    key: jax.Array,
  ) -> tuple[Params, Any, Metrics]:
    """Returns parameters, state and scalar metrics, among them 'loss'.

    Pure, so that it can be jitted; the same arguments give the same result.
    """
