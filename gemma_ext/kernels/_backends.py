# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an operation."""

from collections.abc import Mapping
import os

import jax

from gemma_ext import errors
from gemma_ext.kernels import _cpu

BACKENDS = ('xla', 'cpu', 'gpu', 'tpu')
# Bits of x in 'cpu'.
X_BITS = (16, 8)


def check(backend: str | None, x_bits: int = 16) -> None:
  """Raises ShapeError for what is neither a backend nor a number of bits."""
  if backend not in (None, *BACKENDS):
    raise errors.ShapeError(f'{backend=}; expected one of {BACKENDS}.')
  if x_bits not in X_BITS:
    raise errors.ShapeError(f'{x_bits=}; expected one of {X_BITS}.')


def choose(backend: str | None, why_not: str | Mapping[str, str]) -> str:
  """Returns the backend of an operation.

  'gpu' and 'tpu' are taken where they are named, 'cpu' by default.

  Args:
    backend: The one that was asked for, if any.
    why_not: Why a backend cannot run it; empty if it can. A text is that of
      'cpu'. Backends that are left out have no such operation.

  Raises:
    BackendError: If the one that was asked for cannot run it, or the one that
      `GEMMA_EXT_BACKEND` names does not exist.
  """
  reasons = {'cpu': why_not} if isinstance(why_not, str) else dict(why_not)
  reasons['xla'] = ''
  if backend is not None:
    reason = reasons.get(backend, 'it has no such operation')
    if reason:
      raise errors.BackendError(f'{backend=} cannot run here: {reason}.')
    return backend
  named = _preferred()
  # What it cannot do, the reference can.
  return 'xla' if reasons.get(named, 'none') else named


def on_cpu() -> bool:
  """Whether operations run in the C++ kernels by default."""
  return choose(None, _cpu.unavailable()) == 'cpu'


def no_device(platform: str) -> str:
  """Returns why no array is on an accelerator of this kind; '' if it is."""
  found = jax.default_backend()
  return '' if found == platform else f'the default device is a {found}'


def _preferred() -> str:
  """The backend where all of them can run."""
  named = os.environ.get('GEMMA_EXT_BACKEND', '')
  if named and named not in BACKENDS:
    raise errors.BackendError(
      f'GEMMA_EXT_BACKEND={named!r}; expected one of {BACKENDS}.'
    )
  # An array may be sharded over devices, which a kernel would gather.
  return named or ('cpu' if jax.device_count() == 1 else 'xla')
