# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels for CPUs, behind `jax.ffi`.

The library is built with the package. Without it everything still runs, on
XLA, and says once that it is slow.
"""

from collections.abc import Mapping
import ctypes
import functools
import math
import os
import pathlib
import sysconfig
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext.kernels import _formats
from gemma_ext.kernels import _params

_NAMES = ('libgemma_ext_cpu.so', 'libgemma_ext_cpu.dylib')
# Beside this file, or where an editable install puts what it builds.
_FOLDERS = (
  pathlib.Path(__file__).parent,
  pathlib.Path(sysconfig.get_path('platlib'), 'gemma_ext', 'kernels'),
)
_OPERATIONS = tuple(
  f'gemma_ext_{name}' for name in ('matmul', 'gated', 'attend', 'read')
)
_LAYOUTS = {'bytes': 0, 'fields': 1, 'trits': 2, 'stream': 3}


@functools.cache
def library() -> ctypes.CDLL | None:
  """The loaded library, its operations registered; `None` without one.

  `GEMMA_EXT_CPU_LIBRARY` names another file, or none if it is empty.
  """
  named = os.environ.get('GEMMA_EXT_CPU_LIBRARY')
  if named == '':
    return None
  files = (
    [pathlib.Path(named)]
    if named
    else [folder / name for folder in _FOLDERS for name in _NAMES]
  )
  found = [file for file in files if file.exists()]
  if not found:
    warnings.warn(
      'The CPU kernels of gemma_ext were not built, and packed weights run on'
      f' XLA, several times slower: there is none of {[*map(str, files)]}.'
      ' Install a C++ compiler and then gemma_ext again.',
      stacklevel=2,
    )
    return None
  lib = ctypes.CDLL(str(found[0]))
  lib.gemma_ext_kernels.restype = ctypes.c_char_p
  for name in _OPERATIONS:
    capsule = jax.ffi.pycapsule(getattr(lib, name))
    jax.ffi.register_ffi_target(name, capsule, platform='cpu')
  return lib


def instructions() -> str:
  """Kernels in use: 'avx512', 'avx2' or 'portable'; '' without a library.

  `GEMMA_EXT_CPU_KERNELS` names others, if the machine has them.
  """
  lib = library()
  return '' if lib is None else lib.gemma_ext_kernels().decode()


def has(name: str) -> bool:
  """Whether this machine can run the kernels of a name."""
  lib = library()
  return lib is not None and bool(lib.gemma_ext_has_kernels(name.encode()))


def why_not(x: Any, p: Mapping[str, jax.Array], fmt: _formats.Format) -> str:
  """Why the kernels cannot run a product; empty if they can."""
  if isinstance(fmt, _formats.TernaryFormat) and fmt.tied and fmt.planes > 5:
    return f'it sums up to 5 tied planes, not {fmt.planes}'
  for what, array, types in (
    ('x', x, (jnp.float32, jnp.bfloat16)),
    ('codes', p['codes'], (fmt.codes_dtype,)),
    ('scale', p['scale'], (fmt.scale_dtype,)),
  ):
    if array.dtype not in [np.dtype(t) for t in types]:
      return f'{what} is {array.dtype}; it takes {types}'
  return unavailable()


def unavailable() -> str:
  """Why the kernels cannot run at all; empty if they can."""
  if jax.default_backend() != 'cpu':
    return f'the default backend is {jax.default_backend()}'
  if library() is None:
    return 'its library was not built (no C++ compiler?)'
  return ''


def contiguous(p: Mapping[str, jax.Array], fmt: _formats.Format) -> bool:
  """Whether the codes of a part of a weight lie one after another."""
  if not isinstance(fmt, _formats.TernaryFormat) or fmt.planes == 1:
    return True
  return p['codes'].shape[1:-1] == _params.rows_of(p, fmt)


def matmul(
  x: jax.Array,  # [N, I]
  codes: jax.Array,  # packed, of [*rows, I] or a weight that begins so
  scale: jax.Array,
  fmt: _formats.Format,
  *,
  x_bits: int,
  named: str = '',
) -> jax.Array:  # [N, prod(rows)]
  """`x W^T`, with x rounded to 16 or 8 bits in blocks.

  `named` asks for kernels other than those in use.
  """

  @jax.custom_batching.custom_vmap
  def call(x, codes, scale):
    rows = math.prod(_params.rows_of({'scale': scale}, fmt))
    out = jax.ShapeDtypeStruct((x.shape[0], rows), x.dtype)
    return jax.ffi.ffi_call('gemma_ext_matmul', out)(
      x,
      codes,
      scale,
      **_attributes(fmt, x.shape[-1]),
      wide=np.int64(x_bits == 16),
      kernels=named,
    )

  call.def_vmap(functools.partial(_batched, call))
  return call(x, codes, scale)


def gated(
  x: jax.Array,  # [N, I]
  gate: Mapping[str, jax.Array],  # of [2, H, I]
  down: Mapping[str, jax.Array],  # of [O, H]
  formats: tuple[_formats.Format, _formats.Format],
  *,
  x_bits: int,
  named: str = '',
) -> jax.Array:  # [N, O]
  """`(gelu(x G^T) * (x U^T)) D^T`, x and what D multiplies rounded."""
  (_, hidden) = _params.rows_of(gate, formats[0])
  (rows,) = _params.rows_of(down, formats[1])
  kinds = {
    name: np.array([*_attributes(fmt, cols).values()], np.int64)
    for name, fmt, cols in (
      ('gate_format', formats[0], x.shape[-1]),
      ('down_format', formats[1], hidden),
    )
  }

  @jax.custom_batching.custom_vmap
  def call(x, *weights):
    out = jax.ShapeDtypeStruct((x.shape[0], rows), x.dtype)
    return jax.ffi.ffi_call('gemma_ext_gated', out)(
      x,
      *weights,
      **kinds,
      hidden=np.int64(hidden),
      wide=np.int64(x_bits == 16),
      kernels=named,
    )

  call.def_vmap(functools.partial(_batched, call))
  return call(x, gate['codes'], gate['scale'], down['codes'], down['scale'])


def attend(
  q: jax.Array,  # [B, T, N, H]
  k: jax.Array,  # [B, T, K, H]
  v: jax.Array,
  cache_k: jax.Array,  # [B, S, K, H]
  cache_v: jax.Array,
  start: jax.Array,
  mask: jax.Array,  # [B, T, S]
  *,
  soft_cap: float,
  named: str = '',
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Attention to caches that k and v are written to first, in place."""
  outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, cache_k, cache_v)]
  call = jax.ffi.ffi_call(
    'gemma_ext_attend',
    outs,
    input_output_aliases={3: 1, 4: 2},
    vmap_method='sequential',
  )
  out, new_k, new_v = call(
    q,
    k,
    v,
    cache_k,
    cache_v,
    start.astype(jnp.int32),
    mask,
    soft_cap=np.float32(soft_cap),
    kernels=named,
  )
  return out, new_k, new_v


def read(x: jax.Array) -> jax.Array:
  """Reads all of x and little else, for benchmarks to compare with."""
  out = jax.ShapeDtypeStruct((2,), jnp.uint32)
  return jax.ffi.ffi_call('gemma_ext_read', out)(x)


def _batched(call, size, in_batched, x, *weights):
  """The rule for `jax.vmap` of a product of x `[N, I]` with weights."""
  if in_batched[0] and not any(in_batched[1:]):
    # More rows of x, against a weight that is read once.
    y = call(x.reshape(-1, x.shape[-1]), *weights)
    return y.reshape(size, -1, y.shape[-1]), True
  args = [
    a if b else jnp.broadcast_to(a, (size, *a.shape))
    for a, b in zip((x, *weights), in_batched, strict=True)
  ]
  return jax.lax.map(lambda each: call(*each), tuple(args)), True


def _attributes(fmt: _formats.Format, cols: int) -> dict[str, object]:
  ternary = isinstance(fmt, _formats.TernaryFormat)
  if isinstance(fmt, _formats.TernaryFormat):
    planes, tied, group = fmt.planes, fmt.tied, fmt.group
    bits = 2
    layout = 'fields' if fmt.packing == '2bit' else 'trits'
  else:
    planes, tied, group, bits = 1, False, fmt.group or cols, fmt.bits
    layout = {8: 'bytes', 4: 'fields', 2: 'fields'}.get(bits, 'stream')
  return {
    'layout': np.int64(_LAYOUTS[layout]),
    'bits': np.int64(bits),
    'planes': np.int64(planes),
    'tied': np.int64(tied),
    'ternary': np.int64(ternary),
    'group': np.int64(group),
  }
