# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Puts a recipe into a model's config, and takes it out again.

The `__call__` of the official models is jitted with the module as a static
argument, and the cache of that jit knows nothing of interceptors: of two equal
models, one of them intercepted, the first trace would answer for both. Models
whose configs differ are not equal, so the recipe goes into the config.

Flax compares the hash of a module's fields only, and equal hashes would mean
equal traces: ids of objects come back once an object is freed, and dataclasses
of different types may hash alike. So a text that says it all goes in as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

from flax import linen as nn

from gemma_ext import errors
from gemma_ext import recipe as recipe_lib

_probes = itertools.count()


def attach(model: nn.Module, recipe: recipe_lib.Recipe) -> nn.Module:
  """Returns `model` with `recipe` in its config."""
  return _attach(model, recipe, json.dumps(recipe.to_json()))


def stamp(model: nn.Module, text: str) -> nn.Module:
  """Returns `model` so that no trace is shared with one stamped otherwise."""
  config = model.config
  recipe = getattr(config, 'recipe', None)
  fingerprint = getattr(config, 'fingerprint', '')
  if fingerprint.endswith(text):
    return model
  return _attach(model, recipe, fingerprint + text)


def probe(model: nn.Module) -> nn.Module:
  """Returns a copy of `model` that no trace has seen before."""
  return _attach(model, None, f'probe {next(_probes)}')


def _attach(
  model: nn.Module, recipe: recipe_lib.Recipe | None, fingerprint: str
) -> nn.Module:
  model = strip(model)
  base = type(model.config)
  fields = {f.name: getattr(model.config, f.name) for f in _fields(base)}
  config = _config_class(base)(**fields, recipe=recipe, fingerprint=fingerprint)
  return model.clone(config=config)


def check(model: nn.Module) -> None:
  """Raises `ParamsMismatchError` unless `model` is a model with a config."""
  is_module = isinstance(model, nn.Module)
  names = {f.name for f in dataclasses.fields(model)} if is_module else set()
  if not {'config', 'dtype'} <= names:
    raise errors.ParamsMismatchError(
      'Expected an official Gemma model such as `gm.nn.Gemma3_1B()`, got'
      f' {type(model).__name__}. Wrappers such as LoRA go around'
      ' `gx.nn.Compressed`, not inside.'
    )


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


_classes: dict[Any, Any] = {}


def _config_class(base: Any) -> Any:
  """The subclass of a config class that has a recipe, always the same one."""
  if base not in _classes:
    cls: Any = dataclasses.make_dataclass(
      f'Compressed{base.__name__}',
      [
        ('recipe', Any, dataclasses.field(kw_only=True)),
        ('fingerprint', str, dataclasses.field(kw_only=True)),
      ],
      bases=(base,),
      frozen=True,
    )
    cls._gemma_ext_base = base
    _classes[base] = cls
  return _classes[base]
