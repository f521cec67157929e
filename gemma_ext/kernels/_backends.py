# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an operation."""

import os

import jax

from gemma_ext import errors
from gemma_ext.kernels import _cpu

BACKENDS = ('xla', 'cpu')
# Bits of x in 'cpu'.
X_BITS = (16, 8)


def check(backend: str | None, x_bits: int = 16) -> None:
  """Raises ShapeError for what is neither a backend nor a number of bits."""
  if backend not in (None, *BACKENDS):
    raise errors.ShapeError(f'{backend=}; expected one of {BACKENDS}.')
  if x_bits not in X_BITS:
    raise errors.ShapeError(f'{x_bits=}; expected one of {X_BITS}.')


def choose(backend: str | None, why_not_cpu: str) -> str:
  """Returns the backend of an operation.

  Args:
    backend: The one that was asked for, if any.
    why_not_cpu: Why 'cpu' cannot run it; empty if it can.

  Raises:
    BackendError: If the one that was asked for, here or by
      `GEMMA_EXT_BACKEND`, cannot run it or does not exist.
  """
  if backend == 'cpu' and why_not_cpu:
    raise errors.BackendError(f"backend='cpu' cannot run here: {why_not_cpu}.")
  if backend is None:
    return 'xla' if why_not_cpu else _preferred()
  return backend


def on_cpu() -> bool:
  """Whether operations run in the C++ kernels by default."""
  return choose(None, _cpu.unavailable()) == 'cpu'


def _preferred() -> str:
  """The backend where all of them can run."""
  named = os.environ.get('GEMMA_EXT_BACKEND', '')
  if named and named not in BACKENDS:
    raise errors.BackendError(
      f'GEMMA_EXT_BACKEND={named!r}; expected one of {BACKENDS}.'
    )
  # An array may be sharded over devices, which a kernel would gather.
  return named or ('cpu' if jax.device_count() == 1 else 'xla')
