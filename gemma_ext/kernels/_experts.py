# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse feed-forward layers on packed weights: slices of neurons, some a row.

Backends: 'xla' computes every neuron and multiplies those that were not chosen
by zero, or, of stacked experts, walks over those that were chosen; 'cpu' reads
no more than the packed weights of the chosen slices.
"""

from collections.abc import Mapping
import functools

import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.kernels import _backends
from gemma_ext.kernels import _cpu
from gemma_ext.kernels import _dequantize
from gemma_ext.kernels import _experts_dense
from gemma_ext.kernels import _formats
from gemma_ext.kernels import _matmul
from gemma_ext.kernels import _params


def experts_ffn(
  x: jax.Array,
  gate: Mapping[str, jax.Array],
  gate_fmt: _formats.Format,
  down: Mapping[str, jax.Array],
  down_fmt: _formats.Format,
  chosen: jax.Array,
  weight: jax.Array,
  *,
  size: int | None = None,
  shared: int = 0,
  backend: str | None = None,
  x_bits: int = 16,
  adapters: _experts_dense.Adapters = _experts_dense.NO_ADAPTERS,
) -> jax.Array:
  """Computes some slices of a gated feed-forward layer, chosen for each row.

  A slice is f neurons of `(gelu(x G^T) * (x U^T)) D^T`, gelu by tanh as Gemma
  has it. The first `shared` of S slices always run, with weight 1; the others
  are the experts. Weights come in one of three layouts: stacked, an axis of
  slices before the others, as the official MoE of Gemma 4 has them; wide, all
  slices as one layer of H = S f neurons, slice after slice; or cut, G and U
  wide and D stacked. Wide ones are slower at decode, as every row of D is read
  in pieces.

  Differentiable as `matmul` is, and with respect to `weight` and `adapters`.

  Args:
    x: Activations `[..., I]`, floating.
    gate: Packed weight `[S, 2, f, I]` or `[2, H, I]`: G, then U.
    gate_fmt: Its format.
    down: Packed weight `[S, O, f]`, or with a wide gate also `[O, H]`.
    down_fmt: Its format.
    chosen: Numbers of experts, integers `[..., K]`, 0 for the first after the
      shared slices; -1 for none. One that is named twice counts twice.
    weight: What each is multiplied by, floating `[..., K]`.
    size: f, for a wide gate.
    shared: Slices that always run.
    backend: 'xla' or 'cpu', as for `matmul`. 'cpu' needs slices of the wide
      down projection that are made of whole blocks of codes (docs/formats.md)
      and of whole groups, or lie within one.
    x_bits: What 'cpu' rounds x and the hidden activations to, as for `matmul`.
    adapters: Added to stacked weights, none of them shared; on 'xla' only.

  Returns:
    `[..., O]` in `x.dtype`. 'xla' rounds hidden activations to `x.dtype`; 'cpu'
    keeps them in float32, and refuses numbers of experts that do not exist,
    which 'xla' cannot see.

  Raises:
    ParamsMismatchError: If the parameters do not have the shapes that their
      formats and x need.
    ShapeError: If the arguments do not fit each other or the backend is
      unknown.
    BackendError: If `backend='cpu'` cannot run here.
  """
  _backends.check(backend, x_bits)
  _matmul.check_x(x)
  _experts_dense.check_routes(x, chosen, weight)
  f = _size(gate, gate_fmt, down, down_fmt, size, shared)
  rows = _params.rows_of(down, down_fmt)
  stacked = len(_params.rows_of(gate, gate_fmt)) == 3
  hidden = f if len(rows) == 2 else _params.rows_of(gate, gate_fmt)[1]
  _params.validate(
    gate, gate_fmt, _params.rows_of(gate, gate_fmt), x.shape[-1], part=True
  )
  _params.validate(down, down_fmt, rows, hidden, part=True)
  adapted = any(pair is not None for pair in adapters)
  if adapted:
    if not stacked or shared:
      raise errors.ShapeError(
        f'Adapters are for stacked slices, none shared; got {shared=},'
        f' {"stacked" if stacked else "a wide gate"}.'
      )
    _experts_dense.check_adapters(adapters, rows[0], f, x, rows[-1])
  between = jax.ShapeDtypeStruct((*x.shape[:-1], hidden), x.dtype)
  why_not = (
    ('there are adapters' if adapted else '')
    or _cpu.why_not(x, gate, gate_fmt)
    or _cpu.why_not(between, down, down_fmt)
    or _why_not_cut(down_fmt, hidden, f)
  )
  backend = _backends.choose(backend, why_not)
  flat, route = _experts_dense.flatten(x, chosen, weight)
  gate, down = _params.own(gate, gate_fmt), _params.own(down, down_fmt)
  static = (gate_fmt, down_fmt), f, shared, x_bits
  if backend == 'xla':
    y = _xla(static, flat, dict(gate), dict(down), *route, adapters)
  else:
    y = _packed(static, flat, dict(gate), dict(down), *route)
  return y.reshape(*x.shape[:-1], rows[-1])


def _size(gate, gate_fmt, down, down_fmt, size, shared) -> int:
  """Neurons of a slice."""
  rows = _params.rows_of(gate, gate_fmt)
  outs = _params.rows_of(down, down_fmt)
  wide = len(rows) == 2 and rows[0] == 2 and len(outs) in (1, 2)
  stacked = (
    len(rows) == 3 and rows[1] == 2 and len(outs) == 2 and outs[0] == rows[0]
  )
  if not wide and not stacked:
    raise errors.ShapeError(
      f'Weights have rows {rows} and {outs}; expected [S, 2, f] and [S, O], or'
      ' [2, H] and [S, O] or [O].'
    )
  if stacked:
    if size not in (None, rows[2]):
      raise errors.ShapeError(
        f'{size=} of stacked slices of {rows[2]} neurons.'
      )
    size, slices = rows[2], rows[0]
  else:
    if size is None or size < 1 or rows[1] % size:
      raise errors.ShapeError(
        f'{size=}; expected a divisor of the {rows[1]} neurons.'
      )
    slices = rows[1] // size
    if len(outs) == 2 and outs[0] != slices:
      raise errors.ShapeError(
        f'{outs[0]} slices of down and {slices} of gate, {rows[1]} neurons at'
        f' {size=}; expected as many.'
      )
  if not 0 <= shared < slices:
    raise errors.ShapeError(
      f'{shared=} of {slices} slices; expected fewer, at least 0.'
    )
  return size


def _why_not_cut(fmt, hidden: int, size: int) -> str:
  if _cpu.cuts(fmt, hidden, size):
    return ''
  return (
    f'slices of {size} neurons are not whole blocks and groups of a row of'
    f' {hidden} codes, {fmt}'
  )


def _xla(
  static, x, gate, down, chosen, weight, adapters=_experts_dense.NO_ADAPTERS
):
  formats, size, shared, _ = static
  if len(_params.rows_of(gate, formats[0])) == 3:
    # As if they had been chosen.
    always = jnp.tile(jnp.arange(shared), (len(x), 1))
    after = jnp.where(chosen < 0, -1, chosen + shared)
    chosen = jnp.concatenate([always, after], axis=1, dtype=jnp.int32)
    weight = jnp.pad(weight, ((0, 0), (shared, 0)), constant_values=1)
    return _xla_stacked(formats, x, gate, down, chosen, weight, adapters)
  both = _matmul.matmul_xla(x, gate, formats[0])
  slices = both.shape[-1] // size
  n, k = chosen.shape
  # What is not chosen goes to a slice that does not exist.
  at = jnp.where(chosen < 0, slices, chosen + shared)
  mask = jnp.zeros((n, slices), jnp.float32).at[:, :shared].set(1)
  mask = mask.at[jnp.arange(n)[:, None], at].add(weight, mode='drop')
  hidden = jax.nn.gelu(both[:, 0]) * both[:, 1]
  hidden = hidden.reshape(n, slices, size) * mask[..., None]
  hidden = hidden.astype(x.dtype)
  if len(_params.rows_of(down, formats[1])) == 2:
    d = _dequantize.dense(down, formats[1], size, x.dtype)
    y = jnp.einsum('nsf,sof->no', hidden, d, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
  hidden = hidden.reshape(n, slices * size)
  return _matmul.matmul_xla(hidden, down, formats[1])


def _xla_stacked(formats, x, gate, down, chosen, weight, adapters):
  axes = [int(isinstance(f, _formats.TernaryFormat)) for f in formats]
  count, _, size = _params.rows_of(gate, formats[0])
  rows = _params.rows_of(down, formats[1])[1]

  def pick(take):
    return (
      {name: take(v, axis) for name, v in p.items()}
      for p, axis in zip((gate, down), axes)
    )

  def dense(g, d):
    """`[*, 2, f, I]` and `[*, f, O]`."""
    return (
      _dequantize.dense(g, formats[0], x.shape[-1], x.dtype),
      _dequantize.dense(d, formats[1], size, x.dtype).swapaxes(-1, -2),
    )

  if jax.default_backend() == 'cpu':

    def expert(e, x):
      g, d = pick(
        lambda v, axis: jax.lax.dynamic_index_in_dim(v, e, axis, False)
      )
      own = jax.tree.map(lambda a: a[e], adapters)
      both = _matmul.matmul_xla(x, g, formats[0])
      both = _experts_dense.adapted(both, own.gate, x).astype(x.dtype)
      hidden = jax.nn.gelu(both[:, 0]) * both[:, 1]
      y = _matmul.matmul_xla(hidden, d, formats[1])
      return _experts_dense.adapted(y, own.down, hidden)

    y = _experts_dense.by_block(x, chosen, weight, count, expert, rows)
  elif chosen.size <= _experts_dense.FEW_PAIRS:
    e = jnp.maximum(chosen.reshape(-1), 0)
    g, d = dense(*pick(lambda v, axis: jnp.take(v, e, axis)))
    own = jax.tree.map(lambda a: a[e], adapters)
    y = _experts_dense.few(x, chosen, weight, g, d, own)
  else:
    g, d = dense(gate, down)
    y = _experts_dense.ragged(x, chosen, weight, g, d, adapters)
  return y.astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _packed(static, x, gate, down, chosen, weight):
  formats, size, shared, x_bits = static
  return _cpu.experts(
    x,
    gate,
    down,
    chosen,
    weight,
    formats,
    size=size,
    shared=shared,
    x_bits=x_bits,
  )


@_packed.defjvp
def _packed_jvp(static, primals, tangents):
  out = _packed(static, *primals)
  x, gate, down, chosen, weight = primals
  dx, dgate, ddown, _, dweight = tangents

  def of(x, gate_scale, down_scale, weight):
    g, d = (
      {'codes': p['codes'], 'scale': s}
      for p, s in ((gate, gate_scale), (down, down_scale))
    )
    return _xla(static, x, g, d, chosen, weight)

  _, tangent = jax.jvp(
    of,
    (x, gate['scale'], down['scale'], weight),
    (dx, dgate['scale'], ddown['scale'], dweight),
  )
  return out, tangent
