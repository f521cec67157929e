# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes activations of a block again in the backward pass, not keeping them."""

from __future__ import annotations

import contextlib
import contextvars
import re
from typing import Any

from flax import linen as nn

from gemma_ext.nn import _config

_LAYER = re.compile(r'layer_\d+')
_inside: contextvars.ContextVar[bool] = contextvars.ContextVar(
  'inside', default=False
)


def stamped(model: nn.Module) -> nn.Module:
  """Returns `model` so that it shares no trace with one that keeps all."""
  return _config.stamp(model, ' remat')


@contextlib.contextmanager
def rematerialized() -> Any:
  """Within it, the blocks of a model that `stamped` returned go by `nn.remat`.

  Of a block only the inputs are kept for the backward pass: one residual stream
  a layer. A step takes one more forward pass.
  """
  with nn.intercept_methods(_intercept):
    yield


def _intercept(next_fun, args, kwargs, context) -> Any:
  module = context.module
  if (
    context.method_name != '__call__'
    or not _LAYER.fullmatch(module.name or '')
    or _inside.get()
  ):
    return next_fun(*args, **kwargs)
  # Through the method of the class, so that other interceptors see the call.
  body = lambda block, *args: type(block).__call__(block, *args, **kwargs)
  token = _inside.set(True)
  try:
    return nn.remat(body)(module, *args)
  finally:
    _inside.reset(token)
