# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed matmul: `[..., I] x [*rows, I] -> [..., *rows]`.

Backends: 'xla' unpacks and multiplies, everywhere; the others read packed
codes: 'cpu' in C++, see `cpu/`; 'gpu' and 'tpu' in Pallas, see `mosaic_gpu/`
and `tpu/`.
"""

from collections.abc import Mapping
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.kernels import _backends
from gemma_ext.kernels import _cpu
from gemma_ext.kernels import _dequantize
from gemma_ext.kernels import _formats
from gemma_ext.kernels import _params

# Rows of x up to which unpacking outweighs multiplying, so that float32 weights
# cost nothing (and XLA's CPU dot is ten times faster in float32 at one row).
FEW_ROWS = 32
CHUNK = 1 << 20  # weights dequantised at a time on a CPU: 4 MiB of float32


def matmul(
  x: jax.Array,
  p: Mapping[str, jax.Array],
  fmt: _formats.Format,
  *,
  backend: str | None = None,
  x_bits: int = 16,
) -> jax.Array:
  """Multiplies activations with a packed weight, contracting the input axis.

  Differentiable with respect to `x`, `p['scale']` and latent (floating)
  `p['codes']`; the dense weight is made again in the backward pass instead of
  being kept.

  Args:
    x: Activations `[..., I]`, floating.
    p: `{'codes', 'scale'}` of a weight `[*rows, I]`.
    fmt: Their format.
    backend: 'xla', the reference: unpack, then a dense dot. 'cpu', C++, for
      codes and scales as they are stored and x in float32 or bfloat16. 'gpu',
      for x in bfloat16 on Hopper; beyond `FEW_ROWS` rows of it, for one plane
      of whole bits in groups of a multiple of 32. 'tpu',
      which has not run on one yet. By default 'cpu' where it can be had, on one
      CPU device, or what the environment variable `GEMMA_EXT_BACKEND` names,
      and 'xla' for what that cannot do.
    x_bits: What 'cpu' rounds x to, in blocks of at most 512: 16 (15 bits and a
      sign, finer than bfloat16), or 8, faster and coarser, in blocks of at most
      128. 'xla' does not round it.

  Returns:
    `[..., *rows]` in `x.dtype`, accumulated in float32. Error on the CPU
    against float64, in the 2-norm and relative to that of the product of
    absolute values: 'xla' below 1e-6 for float32; 'cpu' below 2^-14 with
    x_bits=16 and 2^-7 with 8; all of them 2^-8 relative to the result more for
    bfloat16, whose rounding of the result that is. Off the CPU and beyond
    `FEW_ROWS` rows of x 'xla' rounds weights to `x.dtype`.

  Raises:
    ParamsMismatchError: If `p` does not have the shapes that `fmt` and x need.
    ShapeError: If `x` is not floating or the backend is unknown.
    BackendError: If the backend cannot run here.
  """
  _backends.check(backend, x_bits)
  check_x(x)
  rows = _params.rows_of(p, fmt)
  _params.validate(p, fmt, rows, x.shape[-1], part=True)
  chosen = _backends.choose(backend, why_not(x, p, fmt))
  if chosen == 'xla':
    return matmul_xla(x, p, fmt)
  if chosen != 'cpu' or not _cpu.contiguous(p, fmt):
    p = _params.own(p, fmt)
  return _packed(fmt, chosen, x_bits, x, p['codes'], p['scale'])


def check_x(x: jax.Array) -> None:
  """Raises ShapeError unless x is floating `[..., I]`."""
  if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise errors.ShapeError(
      f'x is {x.dtype}{list(x.shape)}; expected floating [..., I].'
    )


def why_not(
  x: Any, p: Mapping[str, jax.Array], fmt: _formats.Format
) -> dict[str, str]:
  """Returns why each backend cannot take a product; empty if it can."""
  return {
    'cpu': _cpu.why_not(x, p, fmt),
    'gpu': _why_not_gpu(x, p, fmt),
    'tpu': _why_not_tpu(x, p, fmt),
  }


def _why_not_gpu(x, p, fmt) -> str:
  if reason := _backends.no_device('gpu'):
    return reason
  from gemma_ext.kernels import mosaic_gpu

  capability = float(getattr(jax.devices()[0], 'compute_capability', 0) or 0)
  if capability < 9:
    return f'the GPU has compute capability {capability}, expected 9 or more'
  return mosaic_gpu.why_not(x, p['codes'], p['scale'], fmt)


def _why_not_tpu(x, p, fmt) -> str:
  if reason := _backends.no_device('tpu'):
    return reason
  from gemma_ext.kernels import tpu

  return tpu.why_not(x, p['codes'], p['scale'], fmt)


def packed(
  backend: str,
  x: jax.Array,
  p: Mapping[str, jax.Array],
  fmt: _formats.Format,
  *,
  x_bits: int = 16,
  gated: bool = False,
) -> jax.Array:
  """`matmul` of a backend other than 'xla', which can take it.

  Args:
    backend: The backend.
    x: Activations `[N, I]`.
    p: Packed weight, its own codes.
    fmt: Its format.
    x_bits: As for `matmul`.
    gated: Whether the rows are gate and up, and the result
      `gelu(gate) * up`; not on 'cpu'.

  Returns:
    `[N, O]`, or half of it.
  """
  codes, scale = p['codes'], p['scale']
  if backend == 'cpu':
    return _cpu.matmul(x, codes, scale, fmt, x_bits=x_bits)
  if backend == 'gpu':
    from gemma_ext.kernels import mosaic_gpu

    return mosaic_gpu.matmul(x, codes, scale, fmt, gated=gated)
  from gemma_ext.kernels import tpu

  y = tpu.matmul(x, codes, scale, fmt)
  if not gated:
    return y
  gate, up = jnp.split(y, 2, axis=-1)
  return jax.nn.gelu(gate) * up


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _packed(fmt, backend, x_bits, x, codes, scale):
  cols = x.shape[-1]
  rows = _params.rows_of({'scale': scale}, fmt)
  flat = x.reshape(-1, cols)
  y = packed(
    backend, flat, {'codes': codes, 'scale': scale}, fmt, x_bits=x_bits
  )
  return y.reshape(*x.shape[:-1], *rows)


def _packed_jvp(fmt, backend, x_bits, primals, tangents):
  # Both are linear in x, so that XLA's derivative is that of the kernel.
  out = _packed(fmt, backend, x_bits, *primals)
  x, codes, scale = primals
  dx, _, ds = tangents
  zero = jax.custom_derivatives.SymbolicZero
  total = None
  if not isinstance(dx, zero):
    total = matmul_xla(dx, {'codes': codes, 'scale': scale}, fmt)
  if not isinstance(ds, zero) and jnp.issubdtype(scale.dtype, jnp.floating):
    of_scale = lambda s: matmul_xla(x, {'codes': codes, 'scale': s}, fmt)
    _, more = jax.jvp(of_scale, (scale,), (ds,))
    total = more if total is None else total + more
  return out, jnp.zeros_like(out) if total is None else total


_packed.defjvp(_packed_jvp, symbolic_zeros=True)


def matmul_xla(
  x: jax.Array,
  p: Mapping[str, jax.Array],
  fmt: _formats.Format,
  *,
  chunk: int | None = None,
) -> jax.Array:
  """`matmul` by unpacking and a dense dot.

  Args:
    x: Activations `[..., I]`.
    p: Packed weight, checked.
    fmt: Its format.
    chunk: Weights dequantised at a time; 0 for all at once, `None` chooses.

  Returns:
    `[..., *rows]` in `x.dtype`.
  """
  cols = x.shape[-1]
  few = math.prod(x.shape[:-1]) <= FEW_ROWS
  # A loop over slices would gather a weight that is sharded over devices, and
  # accelerators fuse the unpacking themselves.
  alone = jax.default_backend() == 'cpu' and jax.device_count() == 1
  if chunk is None:
    chunk = CHUNK if alone else 0
  dtype = jnp.dtype(jnp.float32) if few and alone else x.dtype
  axis = int(isinstance(fmt, _formats.TernaryFormat))
  rows = _params.rows_of(p, fmt)
  p = _params.own(p, fmt)

  @jax.checkpoint
  def run(x, p):
    lead = x.shape[:-1]
    x = x.reshape(-1, cols)
    p = {
      name: v.reshape(*v.shape[:axis], math.prod(rows), v.shape[-1])
      for name, v in p.items()
    }
    out = _chunked(x, p, fmt, dtype, axis, chunk // cols if chunk else 0)
    return out.reshape(*lead, *rows)

  return run(x, dict(p))


def _dot(
  x: jax.Array,  # [N, I]
  p: Mapping[str, jax.Array],  # of [O, I]
  fmt: _formats.Format,
  dtype: jnp.dtype,
) -> jax.Array:  # [N, O]
  w = _dequantize.dense(p, fmt, x.shape[-1], dtype)
  out = jax.lax.dot_general(
    x.astype(dtype),
    w,
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  return out.astype(x.dtype)


def _chunked(
  x: jax.Array,  # [N, I]
  p: Mapping[str, jax.Array],  # of [O, I]
  fmt: _formats.Format,
  dtype: jnp.dtype,
  axis: int,  # of the rows in codes and scale
  size: int,  # rows of the weight a chunk; 0: all
) -> jax.Array:  # [N, O]
  """`_dot` by blocks of the weight's rows, one in memory at a time."""
  rows = p['scale'].shape[axis]
  size = max(size, 64) if size else rows
  count = rows // size
  if count < 2:
    return _dot(x, p, fmt, dtype)

  def block(start, length):
    return _dot(
      x,
      {
        name: jax.lax.dynamic_slice_in_dim(v, start, length, axis)
        for name, v in p.items()
      },
      fmt,
      dtype,
    )

  out = jax.lax.map(lambda i: block(i * size, size), jnp.arange(count))
  out = out.swapaxes(0, 1).reshape(x.shape[0], count * size)
  if count * size == rows:
    return out
  rest = block(count * size, rows - count * size)
  return jnp.concatenate([out, rest], axis=1)
