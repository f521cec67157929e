# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The residual stream of a compressed model, one layer further at a time.

Blocks are healed in order, and each reads what the healed ones before it give.
Running the whole model up to a layer for every layer takes time that grows with
the square of the depth; from what entered the layer before, two layers suffice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import re
from typing import Any

from flax import linen as nn
from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import nn as gx_nn
from gemma_ext.train import _branch
from gemma_ext.train import _capture

# Gemma 2 and 3. Layers of Gemma 3n and 4 read keys and values of others.
_PLAIN = type(gm.nn.Gemma3_270M.config)
_LAYER = re.compile(r'layer_(\d+)')
# Collections: what a layer reads in place of what comes before it, and results.
_GIVEN, _KEPT = 'given', 'kept'


class Stream:
  """What the branches of a model read, on some text.

  Attributes:
    model: The compressed model.
    tokens: Token ids `[W, L]`.
    batch: Windows of a pass.
  """

  def __init__(
    self, model: gx_nn.Compressed, tokens: np.ndarray, *, batch: int = 2
  ):
    self.model, self.tokens, self.batch = model, tokens, batch
    # What enters a layer, and the parameters of all before it that made it.
    self._layer = 0
    self._entering: np.ndarray | None = None
    self._made_by: dict[str, Any] = {}

  def residual(self, params: Mapping[str, Any], layer: str) -> np.ndarray:
    """What the branch of a layer reads: `[W, L, D]`.

    Args:
      params: Parameters of the model.
      layer: Such as 'layer_8'.
    """
    number = int(layer.removeprefix('layer_'))
    if not isinstance(self.model.model.config, _PLAIN):
      return self._each(functools.partial(_whole, params, self.model, layer))
    before = _before(params, self._layer)
    same = before.keys() == self._made_by.keys() and all(
      before[k] is v for k, v in self._made_by.items()
    )
    if number < self._layer or not same:
      self._layer, self._entering = 0, None
    # From the start also after a resume, layer by layer: other programs might
    # round otherwise.
    while self._layer < number:
      self._entering = self._run(params, self._entering, through=self._layer)
      self._layer += 1
    self._made_by = _before(params, number)
    return self._run(params, self._entering, residual_of=number)

  def _run(
    self,
    params: Mapping[str, Any],
    entering: np.ndarray | None,
    *,
    residual_of: int | None = None,
    through: int | None = None,
  ) -> np.ndarray:
    first = self._layer if entering is not None else None
    run = functools.partial(
      _pass,
      params,
      model=_probe(self.model, first, residual_of, through),
      first=first,
      residual_of=residual_of,
      through=through,
    )
    return self._each(run, *([] if entering is None else [entering]))

  def _each(
    self, run: Callable[..., jax.Array], *more: np.ndarray
  ) -> np.ndarray:
    """Applies to all windows, a few at a time."""
    out = []
    for i in range(0, len(self.tokens), self.batch):
      part = [x[i : i + self.batch] for x in (self.tokens, *more)]
      if missing := self.batch - len(part[0]):
        part = [
          np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), mode='edge')
          for x in part
        ]
      out.append(np.asarray(run(*map(jnp.asarray, part))))
    return np.concatenate(out)[: len(self.tokens)]


def _whole(
  params: Mapping[str, Any],
  model: gx_nn.Compressed,
  layer: str,
  tokens: jax.Array,
) -> jax.Array:
  taps = _capture.layer_taps(params, tokens, model=_probe(model), layer=layer)
  return taps['residual']


def _before(params: Mapping[str, Any], layer: int) -> dict[str, Any]:
  """Leaves of what comes before a layer, by path."""
  out = {}
  for path, leaf in _branch.flatten(params).items():
    found = _LAYER.fullmatch(path.split('/')[0])
    if layer and (not found or int(found[1]) < layer):
      out[path] = leaf
  return out


@functools.lru_cache(maxsize=256)
def _probe(model: gx_nn.Compressed, *what: int | None) -> nn.Module:
  """A copy of the model for every program: see `_capture.probe`."""
  del what
  return _capture.probe(model)


@functools.partial(
  jax.jit, static_argnames=('model', 'first', 'residual_of', 'through')
)
def _pass(
  params: Mapping[str, Any],
  tokens: jax.Array,
  entering: jax.Array | None = None,
  *,
  model: nn.Module,
  first: int | None,
  residual_of: int | None,
  through: int | None,
) -> jax.Array:
  """Runs a model from `first` on, where `entering` enters.

  Returns:
    The residual stream before the branch of the layer `residual_of`, or behind
    the layer `through`. What comes after it is not computed.
  """
  variables = {'params': params}
  if first is not None:
    variables[_GIVEN] = {f'layer_{first}': {'entering': entering}}
  with nn.intercept_methods(_window(first, residual_of, through)):
    _, state = model.apply(variables, tokens, mutable=[_KEPT])
  (found,) = jax.tree.leaves(state[_KEPT])
  return found


def _window(first: int | None, residual_of: int | None, through: int | None):
  """An interceptor that begins at a layer and keeps what is asked for."""

  def intercept(next_fun, args, kwargs, context):
    module, path = context.module, context.module.path
    if context.method_name != '__call__' or not path:
      return next_fun(*args, **kwargs)
    if path[-2:] == (f'layer_{residual_of}', 'pre_ffw_norm'):
      _keep(module, args[0])
    found = _LAYER.fullmatch(path[-1])
    if not found:
      return next_fun(*args, **kwargs)
    number = int(found[1])
    if first is not None and number < first:
      return None, args[0]
    if number == first:
      args = (module.get_variable(_GIVEN, 'entering'), *args[1:])
    out = next_fun(*args, **kwargs)
    if number == through:
      _keep(module, out[1])
    return out

  return intercept


def _keep(module: nn.Module, value: jax.Array) -> None:
  module.sow(
    _KEPT, 'value', value, reduce_fn=lambda _, new: new, init_fn=lambda: None
  )
