# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gated feed-forward layer on packed weights: `(gelu(x G^T) * (x U^T)) D^T`.

Backends: 'xla' is two matmuls with the activation between them; 'cpu' does it
all in one call, so that the hidden activations never leave the cache.
"""

from collections.abc import Mapping
import functools

import jax

from gemma_ext import errors
from gemma_ext.kernels import _backends
from gemma_ext.kernels import _cpu
from gemma_ext.kernels import _formats
from gemma_ext.kernels import _matmul
from gemma_ext.kernels import _params


def gated_ffn(
  x: jax.Array,
  gate: Mapping[str, jax.Array],
  gate_fmt: _formats.Format,
  down: Mapping[str, jax.Array],
  down_fmt: _formats.Format,
  *,
  backend: str | None = None,
  x_bits: int = 16,
) -> jax.Array:
  """Computes a gated feed-forward layer, gelu by tanh as Gemma has it.

  Differentiable as `matmul` is.

  Args:
    x: Activations `[..., I]`, floating.
    gate: Packed weight `[2, H, I]`: G, then U.
    gate_fmt: Its format.
    down: Packed weight `[O, H]`.
    down_fmt: Its format.
    backend: As for `matmul`.
    x_bits: What 'cpu' rounds x and the hidden activations to, as for `matmul`.

  Returns:
    `[..., O]` in `x.dtype`. 'xla' rounds x G^T, x U^T and the hidden
    activations to `x.dtype`; 'cpu' keeps them in float32.

  Raises:
    ParamsMismatchError: If the parameters do not have the shapes that their
      formats and x need.
    ShapeError: If `x` is not floating, the weights do not fit each other or the
      backend is unknown.
    BackendError: If `backend='cpu'` cannot run here.
  """
  _backends.check(backend, x_bits)
  rows, (*outs,) = (
    _params.rows_of(gate, gate_fmt),
    _params.rows_of(down, down_fmt),
  )
  if len(rows) != 2 or rows[0] != 2 or len(outs) != 1:
    raise errors.ShapeError(
      f'Weights have rows {rows} and {tuple(outs)}; expected [2, H] and [O].'
    )
  _matmul.check_x(x)
  _params.validate(gate, gate_fmt, rows, x.shape[-1], part=True)
  _params.validate(down, down_fmt, tuple(outs), rows[1], part=True)
  hidden = jax.ShapeDtypeStruct((*x.shape[:-1], rows[1]), x.dtype)
  first = _matmul.why_not(x, gate, gate_fmt)
  second = _matmul.why_not(hidden, down, down_fmt)
  chosen = _backends.choose(
    backend, {name: first[name] or second[name] for name in first}
  )
  if chosen == 'xla':
    return _xla(x, gate, gate_fmt, down, down_fmt)
  gate, down = _params.own(gate, gate_fmt), _params.own(down, down_fmt)
  formats = gate_fmt, down_fmt
  return _packed_ffn(formats, chosen, x_bits, x, dict(gate), dict(down))


def _xla(x, gate, gate_fmt, down, down_fmt):
  both = _matmul.matmul_xla(x, gate, gate_fmt)
  hidden = jax.nn.gelu(both[..., 0, :]) * both[..., 1, :]
  return _matmul.matmul_xla(hidden, down, down_fmt)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _packed_ffn(formats, backend, x_bits, x, gate, down):
  (rows,) = _params.rows_of(down, formats[1])
  flat = x.reshape(-1, x.shape[-1])
  if backend == 'cpu':
    y = _cpu.gated(flat, gate, down, formats, x_bits=x_bits)
  else:
    hidden = _matmul.packed(backend, flat, gate, formats[0], gated=True)
    y = _matmul.packed(backend, hidden, down, formats[1])
  return y.reshape(*x.shape[:-1], rows)


@_packed_ffn.defjvp
def _packed_ffn_jvp(formats, backend, x_bits, primals, tangents):
  out = _packed_ffn(formats, backend, x_bits, *primals)
  dx, dgate, ddown = tangents
  codes = lambda p, s: {'codes': p['codes'], 'scale': s}
  of = lambda x, gate_scale, down_scale: _xla(
    x,
    codes(primals[1], gate_scale),
    formats[0],
    codes(primals[2], down_scale),
    formats[1],
  )
  x, gate, down = primals
  _, tangent = jax.jvp(
    of,
    (x, gate['scale'], down['scale']),
    (dx, dgate['scale'], ddown['scale']),
  )
  return out, tangent
