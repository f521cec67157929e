# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts over several devices, each with its share, tokens sent to them.

Tokens are divided over the devices, too. Each device sends every token once to
each device that has some of its experts, in buffers of a fixed size; gets back
the sum of what these add, and adds up. Buffers that are too small for the
tokens of a step are sent again until nothing is left: no token is dropped.

Reference: Lepikhin et al., "GShard", arXiv 2006.16668, without its capacity
limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import itertools
import math
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.nn import _compressed
from gemma_ext.nn import _config
from gemma_ext.nn import _native
from gemma_ext.nn import _packed
from gemma_ext.nn import _stacked

# Leaf of the experts of a layer, and name of what it sows.
EXPERTS, SOWN = 'experts', 'dispatch'
_P = jax.sharding.PartitionSpec
_ids = itertools.count()


class Sharded(_compressed.Compressed):
  """A model whose experts are divided over devices, see `shard_experts`.

  Each of those layers sows 'dispatch' into 'intermediates': 'sent' `[devices]`,
  the tokens that each device got, and 'rounds', how often buffers were sent.

  Attributes:
    mesh: The devices.
    axis: Name of the axis of the mesh that experts are divided over.
    room: Size of buffers, see `shard_experts`.
  """

  mesh: Any = None
  axis: str = 'experts'
  room: float | None = None

  @contextlib.contextmanager
  def _intercept(self):
    methods = _compressed.methods_of(self.model, self.recipe)
    mixtures = _compressed.mixtures_of(self.model, self.recipe)
    send = functools.partial(
      dispatch, mesh=self.mesh, axis=self.axis, room=self.room
    )
    with _compressed.packed_weights(
      methods,
      mixtures=mixtures,
      offload=functools.partial(_mixture, send, methods, mixtures),
      send=functools.partial(_native_mixture, send),
      dtype=self.model.dtype,
      depth=len(self.path),
    ):
      yield


def shard_experts(
  model: _compressed.Compressed,
  params: Mapping[str, Any],
  *,
  mesh: jax.sharding.Mesh,
  axis: str = 'experts',
  room: float | None = None,
) -> tuple[Sharded, dict[str, Any]]:
  """Divides the experts of a model over the devices of a mesh.

  Those of `gx.MoE` and those of Gemma 4, packed or dense. Everything else,
  shared experts too, is on every device. Outputs are those of the model on one
  device, but for the order in which float32 sums are made.

  Args:
    model: A model with mixtures of experts.
    params: Its parameters.
    mesh: The devices.
    axis: Name of its axis that experts are divided over.
    room: Rows of a buffer, from one device to another, over those that an even
      load needs at most: `tokens * min(top_k, devices) / devices`, tokens of
      one device. Smaller buffers take less memory and are sent again where an
      uneven load needs more. By default once is enough for any load.

  Returns:
    The model, and its parameters on the devices of the mesh. Experts of
    `gx.MoE` are stacked, at 'experts' of their layers; others keep their
    places.

  Raises:
    ConfigError: If the mesh has no such axis, or `room` is not above 0.
    RecipeError: If there are no experts, routers are 'gate', or the devices do
      not divide the experts.
  """
  if axis not in mesh.axis_names:
    raise errors.ConfigError(f'{axis=}; the mesh has {mesh.axis_names}.')
  if room is not None and not 0 < room < math.inf:
    raise errors.ConfigError(f'{room=}; expected a number above 0.')
  # Where XLA places what is between the experts: types that say where each
  # array is would have to be in the official code.
  auto = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
  mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=auto)
  devices = mesh.shape[axis]
  mixtures = _compressed.mixtures_of(model.model, model.recipe)
  methods = _compressed.methods_of(model.model, model.recipe)
  native = _native.weights(model.model)
  counts = {p: m.method.num_experts for p, m in mixtures.items()}
  counts |= {path: site.layout.shape[0] for path, site in native.items()}
  if not counts:
    raise errors.RecipeError('The model has no experts to divide.')
  for path, count in counts.items():
    if count % devices:
      raise errors.RecipeError(
        f'{path!r} has {count} experts, which {devices} devices do not divide.'
      )
  if any(m.method.router == 'gate' for m in mixtures.values()):
    raise errors.RecipeError(
      "Routers 'gate' need the gates of all experts; those cannot be divided."
    )
  flat = dict(traverse_util.flatten_dict(dict(params), sep='/'))
  everywhere = jax.sharding.NamedSharding(mesh, _P())
  placed: dict[str, jax.Array] = {}

  def put(path: str, array: Any, at: int) -> None:
    spec = _P(*[None] * at, axis)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    placed[path] = jax.device_put(array, sharding)

  for path, mixture in mixtures.items():
    stacked = _stacked.take(mixture, methods, flat)
    shared = mixture.method.shared
    for i, (array, at) in enumerate(zip(stacked.arrays, stacked.axes)):
      if shared:
        some = jnp.moveaxis(jnp.asarray(array[:shared]), 0, at)
        flat[f'{path}/{EXPERTS}/shared_{i}'] = some
      put(f'{path}/{EXPERTS}/{i}', jnp.moveaxis(array[shared:], 0, at), at)
  for path in native:
    if path in methods:
      site, method = methods[path]
      at = _stacked.axis_of(_packed.format_of(method, site.layout.cols))
      for name in ('codes', 'scale'):
        put(f'{path}/{name}', flat.pop(f'{path}/{name}'), at)
    else:
      put(path, flat.pop(path), 0)
  for path, leaf in flat.items():
    placed[path] = jax.device_put(leaf, everywhere)
  # Of two models only what is in the config tells their traces apart.
  stamped = _config.stamp(model.model, f' sharded {next(_ids)}')
  made = Sharded(
    model=stamped, recipe=model.recipe, mesh=mesh, axis=axis, room=room
  )
  return made, traverse_util.unflatten_dict(placed, sep='/')


def dispatch(
  run: Callable[..., jax.Array],
  x: jax.Array,
  chosen: jax.Array,
  weight: jax.Array,
  arrays: Sequence[jax.Array],
  axes: Sequence[int],
  *,
  mesh: jax.sharding.Mesh,
  axis: str,
  room: float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sums the chosen experts of every row of x, on the devices that have them.

  Differentiable as `run` is.

  Args:
    run: `run(arrays, x [N, D], chosen, weight)` to `[N, D]`, on one device,
      with its share of the arrays and numbers of its own experts, -1 for none.
    x: Activations `[..., D]`.
    chosen: Numbers of experts `[..., K]`; -1 for none.
    weight: What each is multiplied by, `[..., K]`.
    arrays: Of all experts.
    axes: Of each array, its axis of experts.
    mesh: The devices, its axes of the type `Auto`.
    axis: Name of the axis of the mesh that experts are divided over.
    room: Size of buffers, see `shard_experts`.

  Returns:
    `[..., D]` in `x.dtype`; and 'sent' and 'rounds', see `Sharded`.
  """
  devices = mesh.shape[axis]
  experts = arrays[0].shape[axes[0]]
  k = chosen.shape[-1]
  count = math.prod(x.shape[:-1])
  rows = -(-count // devices)
  # Rows that are not there choose nothing.
  fill = lambda v, value: jnp.pad(
    v.reshape(count, v.shape[-1]),
    ((0, rows * devices - count), (0, 0)),
    constant_values=value,
  )
  slots = max(rows, 1)
  if room is not None:
    even = rows * min(k, devices) / devices
    slots = min(max(math.ceil(room * even), 1), slots)
  over = _P(axis)
  mapped = jax.shard_map(
    functools.partial(
      _on_device, run, axis, devices, experts // devices, slots
    ),
    mesh=mesh,
    in_specs=(over, over, over, *(_P(*[None] * at, axis) for at in axes)),
    out_specs=(over, {'sent': over, 'rounds': _P()}),
    # The number of rounds is the same everywhere, which it cannot see.
    check_vma=False,
  )
  y, counts = mapped(
    fill(x, 0),
    fill(chosen.astype(jnp.int32), -1),
    fill(weight.astype(jnp.float32), 0),
    *arrays,
  )
  return y[:count].reshape(x.shape), counts


def _on_device(run, axis, devices, own, slots, x, chosen, weight, *arrays):
  """What one device does with its tokens, and with those it is sent."""
  rows = len(x)
  to = jnp.where(chosen < 0, devices, chosen // own)
  # Whether a token has experts on a device, [devices, rows].
  needs = (to[None] == jnp.arange(devices)[:, None, None]).any(axis=-1)
  counts = needs.sum(axis=1, dtype=jnp.int32)
  rounds = -(-rows // slots)
  # Those that are sent first, in their order.
  order = jnp.argsort(~needs, axis=1, stable=True)
  order = jnp.pad(order, ((0, 0), (0, rounds * slots - rows)))
  most = jax.lax.pmax(counts.max(initial=0), axis)
  exchange = functools.partial(
    jax.lax.all_to_all,
    axis_name=axis,
    split_axis=0,
    concat_axis=0,
    tiled=True,
  )
  first = (jnp.arange(devices) * own)[:, None, None]
  flat = lambda v: v.reshape(devices * slots, v.shape[-1])

  def send(total, i):
    token = jax.lax.dynamic_slice_in_dim(order, i * slots, slots, axis=1)
    there = (i * slots + jnp.arange(slots) < counts[:, None])[..., None]
    mine = chosen[token] - first
    mine = jnp.where(there & (mine >= 0) & (mine < own), mine, -1)
    sent = (jnp.where(there, x[token], 0), mine, weight[token])
    y = run(arrays, *(flat(exchange(v)) for v in sent))
    y = exchange(y.reshape(devices, slots, -1))
    y = jnp.where(there, y, 0).astype(jnp.float32)
    return total.at[token].add(y)

  def step(total, i):
    needed = i * slots < most
    return jax.lax.cond(needed, send, lambda t, _: t, total, i), None

  total = jnp.zeros(x.shape, jnp.float32)
  total, _ = jax.lax.scan(step, total, jnp.arange(rounds))
  sent = jax.lax.psum(counts, axis)[jax.lax.axis_index(axis)]
  return total.astype(x.dtype), {
    'sent': sent[None],
    'rounds': -(-most // slots),
  }


def _mixture(
  send, methods, mixtures, module, path, x, chosen, weight
) -> jax.Array:
  """A layer of `gx.MoE`."""
  mixture = mixtures[path]
  leaf = module.get_variable('params', EXPERTS, {})
  shared = mixture.method.shared
  formats = _stacked.formats_of(mixture, methods)
  names = [str(i) for i in range(4 if formats else 2)]
  if not set(names) <= set(leaf):
    raise errors.ParamsMismatchError(
      f'{path!r} has no {EXPERTS!r}, got {sorted(leaf)}. Did you pass the'
      ' params that `shard_experts` returned?'
    )
  bits = getattr(mixture.method.weights, 'x_bits', 16)
  run = functools.partial(_compute, formats, bits)
  at = _stacked.axis_of(formats[0]) if formats else 0
  arrays = [leaf[name] for name in names]
  y, counts = send(run, x, chosen, weight, arrays, [at] * len(arrays))
  _sow(module, counts)
  if shared:
    every = [leaf[f'shared_{name}'] for name in names]
    chosen = jnp.broadcast_to(jnp.arange(shared), (*x.shape[:-1], shared))
    y += run(every, x, chosen, jnp.ones(chosen.shape, jnp.float32))
  return y


def _compute(formats, bits, arrays, x, chosen, weight) -> jax.Array:
  return _stacked.compute(formats, arrays, x, chosen, weight, x_bits=bits)


def _sow(module: nn.Module, counts: dict[str, jax.Array]) -> None:
  if module.is_mutable_collection('intermediates'):
    module.sow('intermediates', SOWN, counts)


def _native_mixture(send, module, *args) -> jax.Array:
  """A mixture of Gemma 4's own."""
  y, counts = send(*args)
  _sow(module, counts)
  return y
