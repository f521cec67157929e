# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers of which the gates choose the neurons, packed.

Backends: 'xla' computes every neuron and multiplies those that were not chosen
by zero; 'cpu' reads all of the gate, and of the other two matrices no more than
the rows of the chosen neurons: the down projection is stored by neuron.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.kernels import _backends
from gemma_ext.kernels import _cpu
from gemma_ext.kernels import _dequantize
from gemma_ext.kernels import _formats
from gemma_ext.kernels import _matmul
from gemma_ext.kernels import _params

# The bias of an expert that is not there; below any logit.
DEAD = -1e9


def neurons_ffn(
  x: jax.Array,
  gate: Mapping[str, jax.Array],
  gate_fmt: _formats.Format,
  down: Mapping[str, jax.Array],
  down_fmt: _formats.Format,
  router: Mapping[str, jax.Array],
  *,
  features: int | None = None,
  size: int = 1,
  shared: int = 0,
  backend: str | None = None,
  x_bits: int = 16,
) -> jax.Array:
  """Computes the neurons of a gated feed-forward layer that its gates choose.

  The layer is `(gelu(x G^T) * (x U^T)) D`, gelu by tanh as Gemma has it; its H
  neurons are S slices of f. The first `shared` always run; of the others, the
  experts, those run whose neurons' `gelu(gate) * norms` have the largest norm.

  Differentiable as `matmul` is, and with respect to the router, as
  `open_gates` is.

  Args:
    x: Activations `[..., I]`, floating.
    gate: Packed weight `[2, H, I]`: G, then U.
    gate_fmt: Its format.
    down: Packed weight `[H, O]`, a row for every neuron.
    down_fmt: Its format.
    router: 'w' `[H]`, what a neuron adds for each unit of its gate; 'bias'
      `[E]` of the logits, at most `DEAD` / 2 for an expert that is not there;
      'k', how many experts a row gets at most, and 'threshold', above which
      their logits have to be.
    features: O; I by default.
    size: f.
    shared: Slices that always run.
    backend: 'xla' or 'cpu', as for `matmul`.
    x_bits: What 'cpu' rounds x to, as for `matmul`.

  Returns:
    `[..., O]` in `x.dtype`. 'xla' rounds hidden activations to `x.dtype`; 'cpu'
    keeps them in float32.

  Raises:
    ParamsMismatchError: If the parameters do not have the shapes that their
      formats and x need.
    ShapeError: If the arguments do not fit each other or the backend is
      unknown.
    BackendError: If `backend='cpu'` cannot run here.
  """
  _backends.check(backend, x_bits)
  _matmul.check_x(x)
  rows = _params.rows_of(gate, gate_fmt)
  hidden = _params.rows_of(down, down_fmt)
  if len(rows) != 2 or rows[0] != 2 or hidden != rows[1:]:
    raise errors.ShapeError(
      f'Weights have rows {rows} and {hidden}; expected [2, H] and [H].'
    )
  if size < 1 or rows[1] % size or not 0 <= shared < rows[1] // size:
    raise errors.ShapeError(
      f'{size=} and {shared=}; expected a divisor of the {rows[1]} neurons, and'
      ' fewer than there are slices.'
    )
  count = rows[1] // size - shared
  shapes = {'w': rows[1:], 'bias': (count,), 'k': (), 'threshold': ()}
  got = {name: tuple(router[name].shape) for name in shapes}
  if got != shapes:
    raise errors.ShapeError(f'A router of shapes {got}; expected {shapes}.')
  _params.validate(gate, gate_fmt, rows, x.shape[-1], part=True)
  outs = features or x.shape[-1]
  _params.validate(down, down_fmt, hidden, outs, part=True)
  between = jax.ShapeDtypeStruct((*x.shape[:-1], outs), x.dtype)
  why_not = _cpu.why_not(x, gate, gate_fmt) or _cpu.why_not(
    between, down, down_fmt
  )
  backend = _backends.choose(backend, why_not)
  wide = functools.partial(jnp.asarray, dtype=jnp.float32)
  routing = (
    wide(router['w']),
    wide(router['bias']),
    jnp.asarray(router['k'], jnp.int32),
    wide(router['threshold']),
  )
  gate, down = _params.own(gate, gate_fmt), _params.own(down, down_fmt)
  static = (gate_fmt, down_fmt), size, shared, outs, x_bits
  run = _xla if backend == 'xla' else _packed
  y = run(static, x.reshape(-1, x.shape[-1]), dict(gate), dict(down), routing)
  return y.reshape(*x.shape[:-1], outs)


def neuron_logits(
  gates: jax.Array, norms: jax.Array, *, size: int, shared: int
) -> jax.Array:
  """What the gates of all neurons say of the experts.

  Args:
    gates: Before the activation, floating `[..., H]`.
    norms: What a neuron adds for each unit of its gate, `[H]`.
    size: Neurons of a slice.
    shared: Slices that are no experts.

  Returns:
    Log of the squared norm of what an expert adds, float32 `[..., E]`.
  """
  found = jax.nn.gelu(gates.astype(jnp.float32)) * norms.astype(jnp.float32)
  found = jnp.square(found[..., size * shared :])
  found = found.reshape(*found.shape[:-1], found.shape[-1] // size, size)
  return jnp.log(found.sum(axis=-1) + 1e-20)


def open_gates(
  logits: jax.Array, k: jax.Array, threshold: jax.Array
) -> jax.Array:
  """Ones for the k largest logits, zeros for the others.

  Gradients pass as if each one were the sigmoid of how far its logit is above
  that of the first expert that was left out.

  Args:
    logits: With their bias, float32 `[..., E]`; at most `DEAD` / 2 for those
      that are not there.
    k: How many.
    threshold: What they have to be above.

  Returns:
    Float32 `[..., E]`. Logits that are the same as the last one all count.
  """
  select = jax.lax.stop_gradient(logits)
  keep = select >= _kth(select, jnp.clip(k, 1, logits.shape[-1]))
  keep &= (select > threshold) & (select > DEAD / 2)
  # The first one that was left out, by number or by threshold.
  out = jnp.where(keep, -jnp.inf, select).max(axis=-1, keepdims=True)
  out = jnp.maximum(out, threshold)
  out = jnp.where(out > DEAD / 2, out, select.min(axis=-1, keepdims=True))
  soft = jax.nn.sigmoid(logits - out)
  weight = 1 + soft - jax.lax.stop_gradient(soft)
  return jnp.where(keep, weight, 0)


def _kth(x: jax.Array, k: jax.Array) -> jax.Array:
  """The k-th largest of float32 `[..., E]`: `[..., 1]`, exact, not sorted."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  # Integers in the order of the numbers.
  keys = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
  least = jnp.full((*x.shape[:-1], 1), -(2**31), jnp.int32)

  def halve(i, found):
    # From the sign down: the largest key that k of them reach.
    bit = jnp.left_shift(jnp.int32(1), 31 - i)
    tried = jnp.where(i == 0, jnp.zeros_like(found), found | bit)
    enough = (keys >= tried).sum(axis=-1, keepdims=True, dtype=jnp.int32) >= k
    return jnp.where(enough, tried, found)

  key = jax.lax.fori_loop(0, 32, halve, least)
  bits = jnp.where(key < 0, key ^ jnp.int32(0x7FFFFFFF), key)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _xla(static: Any, x, gate, down, routing):
  formats, size, shared, outs, _ = static
  w, bias, k, threshold = routing
  both = _matmul.matmul_xla(x, gate, formats[0])
  logits = neuron_logits(both[:, 0], w, size=size, shared=shared) + bias
  gates = jnp.repeat(open_gates(logits, k, threshold), size, axis=-1)
  gates = jnp.pad(gates, ((0, 0), (size * shared, 0)), constant_values=1)
  hidden = jax.nn.gelu(both[:, 0]) * both[:, 1] * gates.astype(x.dtype)
  dense = _dequantize.dense(down, formats[1], outs, x.dtype)
  return jnp.einsum(
    'nh,ho->no', hidden, dense, preferred_element_type=jnp.float32
  ).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _packed(static, x, gate, down, routing):
  formats, size, shared, outs, x_bits = static
  return _cpu.neurons(
    x,
    gate,
    down,
    routing,
    formats,
    size=size,
    shared=shared,
    outs=outs,
    x_bits=x_bits,
  )


@_packed.defjvp
def _packed_jvp(static, primals, tangents):
  out = _packed(static, *primals)
  x, gate, down, (w, bias, k, threshold) = primals
  dx, dgate, ddown, (dw, dbias, _, _) = tangents

  def of(x, gate_scale, down_scale, w, bias):
    g, d = (
      {'codes': p['codes'], 'scale': s}
      for p, s in ((gate, gate_scale), (down, down_scale))
    )
    return _xla(static, x, g, d, (w, bias, k, threshold))

  _, tangent = jax.jvp(
    of,
    (x, gate['scale'], down['scale'], w, bias),
    (dx, dgate['scale'], ddown['scale'], dw, dbias),
  )
  return out, tangent
