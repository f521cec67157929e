# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes any Gemma checkpoint small and fast, and keeps it itself, inside JAX.

import gemma_ext as gx

model, params, tokenizer = gx.ckpts.load('gemma3-270m')
recipe = gx.Recipe.of('int8')
params = gx.compress(model, params, recipe)
model = gx.nn.Compressed(model=model, recipe=recipe)
"""

import importlib as _importlib
import typing as _typing

__version__ = '0.1.0'

# Loaded at first use, so that `gemma_ext.kernels` needs nothing but jax.
_MODULES = (
  'ckpts',
  'compress',
  'data',
  'errors',
  'evals',
  'kernels',
  'nn',
  'recipe',
  'text',
  'train',
)
_NAMES = {
  'Budget': 'compress',
  'GemmaExtError': 'errors',
  'Int': 'recipe',
  'Keep': 'recipe',
  'LowRank': 'recipe',
  'MoE': 'recipe',
  'Plan': 'compress',
  'Recipe': 'recipe',
  'Rows': 'recipe',
  'Ternary': 'recipe',
  'allocate': 'compress',
  'plan': 'compress',
}

if _typing.TYPE_CHECKING:
  from gemma_ext import ckpts
  from gemma_ext import compress
  from gemma_ext import data
  from gemma_ext import errors
  from gemma_ext import evals
  from gemma_ext import kernels
  from gemma_ext import nn
  from gemma_ext import recipe
  from gemma_ext import text
  from gemma_ext import train
  from gemma_ext.compress import allocate
  from gemma_ext.compress import Budget
  from gemma_ext.compress import Plan
  from gemma_ext.compress import plan
  from gemma_ext.errors import GemmaExtError
  from gemma_ext.recipe import Int
  from gemma_ext.recipe import Keep
  from gemma_ext.recipe import LowRank
  from gemma_ext.recipe import MoE
  from gemma_ext.recipe import Recipe
  from gemma_ext.recipe import Rows
  from gemma_ext.recipe import Ternary

__all__ = [*_MODULES, *_NAMES]


def __getattr__(name: str) -> _typing.Any:
  if name in _MODULES:
    return _importlib.import_module(f'{__name__}.{name}')
  if name in _NAMES:
    module = _importlib.import_module(f'{__name__}.{_NAMES[name]}')
    return getattr(module, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted(__all__)
