# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels for CPUs, behind `jax.ffi`.

The library is built with the package. Without it everything still runs, on
XLA, and says once that it is slow.
"""

from collections.abc import Mapping, Sequence
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
  f'gemma_ext_{name}'
  for name in (
    *('matmul', 'gated', 'experts', 'neurons', 'attend', 'block', 'pick'),
    'read',
  )
)
_LAYOUTS = {'bytes': 0, 'fields': 1, 'trits': 2, 'stream': 3, 'quads': 4}
_TERNARY = {'2bit': 'fields', '5trit': 'trits', '3of4': 'quads'}


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
  kinds = _kinds(formats, x.shape[-1], hidden)

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


def cuts(fmt: _formats.Format, cols: int, size: int) -> bool:
  """Whether rows of a packed weight can be cut into slices of `size` codes."""
  bits = 2 if isinstance(fmt, _formats.TernaryFormat) else fmt.bits
  blocks = {'bytes': 1, 'stream': 8, 'fields': 256 // bits, 'trits': 160}
  if size == cols:
    return True
  if _layout(fmt) not in blocks:
    return False
  block = blocks[_layout(fmt)]
  group = fmt.group or cols
  return not (cols % size or size % block or (size % group and group % size))


def experts(
  x: jax.Array,  # [N, I]
  gate: Mapping[str, jax.Array],  # of [2, S * f, I], or [S, 2, f, I]
  down: Mapping[str, jax.Array],  # of [O, S * f] or [S, O, f]
  chosen: jax.Array,  # int32[N, K]
  weight: jax.Array,  # float32[N, K]
  formats: tuple[_formats.Format, _formats.Format],
  *,
  size: int,  # f
  shared: int,  # slices before those of the experts
  x_bits: int,
  named: str = '',
) -> jax.Array:  # [N, O]
  """The sum of the shared slices and of the chosen ones, times their weights.

  x and what the down projection multiplies are rounded. Duplicates add up.
  """
  gate_rows = _params.rows_of(gate, formats[0])
  down_rows = _params.rows_of(down, formats[1])
  stacked = len(gate_rows) == 3
  count = gate_rows[0] if stacked else gate_rows[1] // size
  apart = len(down_rows) == 2
  kinds = _kinds(formats, x.shape[-1], size if apart else size * count)
  cut = np.array([stacked, apart, shared, count - shared, size], np.int64)

  @jax.custom_batching.custom_vmap
  def call(x, chosen, weight, *weights):
    out = jax.ShapeDtypeStruct((x.shape[0], down_rows[-1]), x.dtype)
    return jax.ffi.ffi_call('gemma_ext_experts', out)(
      x,
      *weights,
      chosen,
      weight,
      **kinds,
      cut=cut,
      wide=np.int64(x_bits == 16),
      kernels=named,
    )

  call.def_vmap(functools.partial(_batched, call, rows=3))
  return call(
    x,
    chosen,
    weight,
    *(gate['codes'], gate['scale'], down['codes'], down['scale']),
  )


def neurons(
  x: jax.Array,  # [N, I]
  gate: Mapping[str, jax.Array],  # of [2, H, I]
  down: Mapping[str, jax.Array],  # of [H, O]
  routing: tuple[jax.Array, ...],  # float32 [H] and [E], int32 k, threshold
  formats: tuple[_formats.Format, _formats.Format],
  *,
  size: int,
  shared: int,
  outs: int,  # O
  x_bits: int,
  named: str = '',
) -> jax.Array:  # [N, O]
  """The neurons that the gates choose for each row of x, x rounded."""
  hidden = _params.rows_of(gate, formats[0])[1]
  kinds = _kinds(formats, x.shape[-1], outs)
  cut = np.array([shared, hidden // size - shared, size], np.int64)

  @jax.custom_batching.custom_vmap
  def call(x, *others):
    out = jax.ShapeDtypeStruct((x.shape[0], outs), x.dtype)
    return jax.ffi.ffi_call('gemma_ext_neurons', out)(
      x,
      *others,
      **kinds,
      cut=cut,
      wide=np.int64(x_bits == 16),
      kernels=named,
    )

  call.def_vmap(functools.partial(_batched, call))
  return call(
    x,
    *(gate['codes'], gate['scale'], down['codes'], down['scale']),
    *(each.reshape(-1) for each in routing),
  )


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


def block(
  x: jax.Array,  # [B, T, D]
  sin: jax.Array,  # [B, T, H / 2]
  cos: jax.Array,
  positions: jax.Array,  # [B, T]
  mask: jax.Array,  # [B, T, S]
  cache: Mapping[str, jax.Array],
  norms: Sequence[jax.Array],  # in the order of `_block.NORMS`, empty if none
  weights: Sequence[Mapping[str, jax.Array]],  # of `_block.PRODUCTS`
  *,
  formats: Sequence[_formats.Format],
  x_bits: Sequence[int],
  heads: int,
  hidden: int,
  window: int,
  query_scale: float,
  soft_cap: float,
  more: float,
  named: str = '',
) -> Sequence[jax.Array]:
  """A transformer block: y, and the arrays of the cache, in place."""
  held = [cache[name] for name in ('k', 'v', 'positions', 'end_index')]
  width = held[0].shape[-1]
  cols = x.shape[-1], x.shape[-1], heads * width, x.shape[-1], hidden
  numbers = [
    [*_attributes(fmt, size).values(), np.int64(bits == 16)]
    for fmt, size, bits in zip(formats, cols, x_bits, strict=True)
  ]
  outs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, *held)]
  call = jax.ffi.ffi_call(
    'gemma_ext_block',
    outs,
    input_output_aliases={5: 1, 6: 2, 7: 3, 8: 4},
    vmap_method='sequential',
  )
  return call(
    x,
    sin,
    cos,
    positions,
    mask,
    *held,
    *norms,
    *(p[name] for p in weights for name in ('codes', 'scale')),
    formats=np.array(numbers, np.int64).reshape(-1),
    heads=np.int64(heads),
    hidden=np.int64(hidden),
    window=np.int64(window),
    query_scale=np.float32(query_scale),
    soft_cap=np.float32(soft_cap),
    more=np.float32(more),
    kernels=named,
  )


def pick(
  x: jax.Array,  # [N, I]
  places: jax.Array,  # int32 [O]
) -> jax.Array:  # [N, O]
  """`x[:, places]`."""

  @jax.custom_batching.custom_vmap
  def call(x, places):
    out = jax.ShapeDtypeStruct((x.shape[0], places.shape[0]), x.dtype)
    return jax.ffi.ffi_call('gemma_ext_pick', out)(x, places)

  call.def_vmap(functools.partial(_batched, call))
  return call(x, places)


def read(x: jax.Array) -> jax.Array:
  """Reads all of x and little else, for benchmarks to compare with."""
  out = jax.ShapeDtypeStruct((2,), jnp.uint32)
  return jax.ffi.ffi_call('gemma_ext_read', out)(x)


def _batched(call, size, in_batched, *args, rows=1):
  """The rule for `jax.vmap` of a product of x `[N, I]` with weights.

  The first `rows` arguments have a row for each of x; the others are weights.
  """
  args = tuple(
    jnp.broadcast_to(a, (size, *a.shape)) if among and not batched else a
    for a, batched, among in zip(
      args,
      in_batched,
      [i < rows or any(in_batched[rows:]) for i in range(len(args))],
      strict=True,
    )
  )
  if not any(in_batched[rows:]):
    # More rows of x, against a weight that is read once.
    flat = (a.reshape(-1, a.shape[-1]) for a in args[:rows])
    y = call(*flat, *args[rows:])
    return y.reshape(size, -1, y.shape[-1]), True
  return jax.lax.map(lambda each: call(*each), args), True


def _kinds(
  formats: tuple[_formats.Format, _formats.Format], cols: int, hidden: int
) -> dict[str, np.ndarray]:
  """The formats of a gate and a down projection as attributes."""
  return {
    name: np.array([*_attributes(fmt, width).values()], np.int64)
    for name, fmt, width in (
      ('gate_format', formats[0], cols),
      ('down_format', formats[1], hidden),
    )
  }


def _layout(fmt: _formats.Format) -> str:
  if isinstance(fmt, _formats.TernaryFormat):
    return _TERNARY[fmt.packing]
  return {8: 'bytes', 4: 'fields', 2: 'fields'}.get(fmt.bits, 'stream')


def _attributes(fmt: _formats.Format, cols: int) -> dict[str, np.int64]:
  ternary = isinstance(fmt, _formats.TernaryFormat)
  if isinstance(fmt, _formats.TernaryFormat):
    planes, tied, group, bits = fmt.planes, fmt.tied, fmt.group, 2
  else:
    planes, tied, group, bits = 1, False, fmt.group or cols, fmt.bits
  return {
    'layout': np.int64(_LAYOUTS[_layout(fmt)]),
    'bits': np.int64(bits),
    'planes': np.int64(planes),
    'tied': np.int64(tied),
    'ternary': np.int64(ternary),
    'group': np.int64(group),
  }
