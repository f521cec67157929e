# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Lets optimisers run over parameter trees that hold packed codes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def freeze_codes() -> optax.GradientTransformation:
  """An optimiser step that leaves packed codes as they are.

  JAX gives integer leaves a gradient of type `float0`, which `optax` cannot add
  to them. This turns it into a zero of the parameter's own type, so that whole
  trees can be trained, for example the adapters of a compressed model with
  kauldron:

      optimizer = optax.chain(
        kd.optim.partial_updates(
          optax.adam(1e-3), mask=kd.optim.select('lora')
        ),
        gx.nn.freeze_codes(),
      )

  Returns:
    A transformation without state, to be the last of a chain.
  """

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    def freeze(update, param):
      if update.dtype == jax.dtypes.float0:
        return jnp.zeros(param.shape, param.dtype)
      return update

    return jax.tree.map(freeze, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
