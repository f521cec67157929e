# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Wrappers that leave no trace in the parameter tree."""

from __future__ import annotations

from flax import linen as nn


def share(wrapper: nn.Module) -> None:
  """Gives `wrapper.model` the scope of `wrapper`, once both are bound.

  So that parameters are `{'params': model_params}` and not
  `{'params': {'model': model_params}}`. To be called again before each use: a
  wrapper around this wrapper moves its scope after `__post_init__`, and flax
  does not move the scopes of shared children along.
  """
  model = wrapper.model
  if wrapper.scope is None or model.scope is None:
    return
  if model.scope is not wrapper.scope:
    nn.share_scope(wrapper, model)
