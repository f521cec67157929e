# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Puts a recipe into a model's config, and takes it out again.

The `__call__` of the official models is jitted with the module as a static
argument, and the cache of that jit knows nothing of interceptors: of two equal
models, one of them intercepted, the first trace would answer for both. Models
whose configs differ are not equal, so the recipe goes into the config.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from flax import linen as nn

_FIELD = 'recipe'


def attach(model: nn.Module, recipe: Any) -> nn.Module:
  """Returns `model` with `recipe` (any hashable) in its config."""
  model = strip(model)
  base = type(model.config)
  fields = {f.name: getattr(model.config, f.name) for f in _fields(base)}
  config = _config_class(base)(**fields, **{_FIELD: recipe})
  return model.clone(config=config)


def strip(model: nn.Module) -> nn.Module:
  """Returns `model` without a recipe in its config."""
  config = getattr(model, 'config', None)
  base = getattr(config, '_gemma_ext_base', None)
  if base is None:
    return model
  fields = {f.name: getattr(config, f.name) for f in _fields(base)}
  return model.clone(config=base(**fields))


def _fields(cls: type[Any]) -> tuple[dataclasses.Field, ...]:
  return dataclasses.fields(cls)


@functools.cache
def _config_class(base: type[Any]) -> type[Any]:
  cls = dataclasses.make_dataclass(
      f'Compressed{base.__name__}',
      [(_FIELD, Any, dataclasses.field(kw_only=True))],
      bases=(base,),
      frozen=True,
  )
  cls._gemma_ext_base = base
  return cls
