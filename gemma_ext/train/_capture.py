# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the feed-forward branch of every layer reads and writes.

A branch is `residual -> pre_ffw_norm -> mlp -> post_ffw_norm -> branch`, and
the layer's residual stream goes on as `residual + branch`. The families of
Gemma name these modules alike, so one interceptor serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
import itertools
import re
from typing import Any

from flax import linen as nn
import jax

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.nn import _config

_LAYER = re.compile(r'layer_\d+')
_NAMES = ('pre_ffw_norm', 'mlp', 'post_ffw_norm')
_TAPS = 'taps'
_SHIFTS = 'perturbations'  # The collection of `nn.Module.perturb`.
_stamps = itertools.count()


def check(model: nn.Module) -> None:
  """Raises `TrainError` unless the branches of the model can be healed."""
  config = getattr(model, 'config', None)
  if config is None:
    raise errors.TrainError(
      f'Expected an official Gemma model, got {type(model).__name__}.'
    )
  if getattr(config, 'enable_moe', False):
    raise errors.TrainError(
      'Block healing works on dense feed-forward layers; this model has'
      ' mixtures of experts. Use the objective "logits".'
    )


def probe(model: nn.Module) -> nn.Module:
  """Returns a copy of `model` whose trace nobody else shares.

  The official `__call__` is jitted, and its cache knows of no interceptor.
  """
  if isinstance(model, gx_nn.Compressed):
    stamped = _config.stamp(model.model, f' tap {next(_stamps)}')
    return model.clone(model=stamped)
  return _config.probe(model)


def branches(
  model: nn.Module,
  params: Mapping[str, Any],
  tokens: jax.Array,
  *,
  shifts: Mapping[str, Any] | None = None,
  **kwargs: Any,
) -> tuple[Any, dict[str, dict[str, jax.Array]]]:
  """Applies a model that `probe` returned, recording its branches.

  Args:
    model: The model.
    params: Its parameters.
    tokens: Token ids `[B, L]`.
    shifts: What is added to the branches, `[B, L, D]` by `layer_N`, so that
      gradients with respect to them can be had.
    **kwargs: Passed to the model.

  Returns:
    The model's output, and by `layer_N`: 'residual' before the branch, 'inner'
    before the post norm, 'branch'; each `[B, L, D]`.
  """
  variables = {'params': params}
  if shifts is not None:
    last = 'post_ffw_norm' if _has_post_norm(model) else 'mlp'
    variables[_SHIFTS] = {
      layer: {last: {'branch': value}} for layer, value in shifts.items()
    }
  with nn.intercept_methods(_tap(_has_post_norm(model))):
    out, state = model.apply(variables, tokens, mutable=[_TAPS], **kwargs)
  taps = {}
  for layer, found in state[_TAPS].items():
    taps[layer] = {k: v for part in found.values() for k, v in part.items()}
  return out, taps


def _has_post_norm(model: nn.Module) -> bool:
  return bool(model.config.use_post_ffw_norm)


def _tap(post_norm: bool):
  """An interceptor that records the branches and lets them be shifted."""
  last = 'post_ffw_norm' if post_norm else 'mlp'

  def intercept(next_fun, args, kwargs, context):
    module = context.module
    path = module.path
    if (
      context.method_name != '__call__'
      or module.name not in _NAMES
      or len(path) < 2
      or not _LAYER.fullmatch(path[-2])
    ):
      return next_fun(*args, **kwargs)
    if module.name == 'pre_ffw_norm':
      _sow(module, 'residual', args[0])
    out = next_fun(*args, **kwargs)
    if module.name == 'mlp':
      _sow(module, 'inner', out)
    if module.name == last:
      if module.has_variable(_SHIFTS, 'branch'):
        out = module.perturb('branch', out)
      _sow(module, 'branch', out)
    return out

  return intercept


def _sow(module: nn.Module, name: str, value: jax.Array) -> None:
  module.sow(
    _TAPS, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None
  )


@functools.partial(jax.jit, static_argnames=('model', 'layer'))
def layer_taps(
  params: Mapping[str, Any], tokens: jax.Array, *, model: nn.Module, layer: str
) -> dict[str, jax.Array]:
  """Returns the taps of one layer; what comes after it is not computed."""
  _, taps = branches(model, params, tokens)
  return taps[layer]
