# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts outside of the device, in host memory or files, the hot ones cached.

Each layer has some slots on the device, which hold the experts that were used
last. What is missing is fetched when a router asks for it, and announced one
layer before: the next layer's router, given what this layer reads, guesses well
what it is going to choose, and host threads read it from its file meanwhile.

Reference: Eliseev and Mazur, "Fast Inference of Mixture-of-Experts Language
Models with Offloading", arXiv 2312.17238.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent import futures
import dataclasses
import functools
import itertools
import os
import pathlib
import threading
from typing import Any

from flax import traverse_util
import jax
from jax.experimental import io_callback
import jax.numpy as jnp
import numpy as np

from gemma_ext import errors
from gemma_ext.nn import _compressed
from gemma_ext.nn import _config
from gemma_ext.nn import _moe
from gemma_ext.nn import _native
from gemma_ext.nn import _stacked

COLLECTION = 'experts'
_ids = itertools.count()
_THREADS = 4
# Bytes of experts that are read ahead and that nobody has asked for yet; one
# expert may be larger.
_STAGED = 1 << 28


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
  """The experts of a layer, on the host.

  Attributes:
    mixture: What the layer is.
    stacked: Its experts.
    native: Whether the model has the layer of its own.
  """

  mixture: _moe.Mixture
  stacked: _stacked.Stacked
  native: bool = False

  @property
  def arrays(self) -> tuple[np.ndarray, ...]:
    return self.stacked.arrays

  @property
  def axes(self) -> tuple[int, ...]:
    return self.stacked.axes


class HostExperts:
  """The experts of a model, outside of the device, and threads that read them.

  Attributes:
    layers: By path.
    shared: By path, of layers with shared experts: their parameters.
  """

  def __init__(self, layers: Mapping[str, _Layer]):
    self.layers = dict(layers)
    self._paths = list(self.layers)
    self._lock = threading.Lock()
    self._staged: dict[tuple[int, int], futures.Future] = {}
    self._sizes = [
      sum(a.nbytes // len(a) for a in layer.arrays)
      for layer in self.layers.values()
    ]
    self._pool = futures.ThreadPoolExecutor(_THREADS)
    self.announced = self.read_ahead = self.fetched = 0

  @property
  def nbytes(self) -> int:
    """Bytes of all experts."""
    return sum(a.nbytes for layer in self.layers.values() for a in layer.arrays)

  @property
  def staged_nbytes(self) -> int:
    """Bytes of the experts that are read ahead."""
    return sum(self._sizes[place] for place, _ in self._staged)

  def next_of(self, path: str) -> str | None:
    """The layer after a layer, if its experts are here too."""
    place = self._paths.index(path) + 1
    return self._paths[place] if place < len(self._paths) else None

  def announce(self, place: np.ndarray, experts: np.ndarray) -> None:
    """Starts to read experts of a layer that may be asked for soon.

    No more of them than there is room for, in bytes.
    """
    keys = [(int(place), int(e)) for e in np.unique(experts) if e >= 0]
    size = self._sizes[int(place)]
    with self._lock:
      for key in keys:
        if key in self._staged:
          continue
        # The oldest were read in vain, or nothing would be read ahead again.
        for old in [other for other in self._staged if other not in keys]:
          if self.staged_nbytes + size <= _STAGED:
            break
          self._staged.pop(old).cancel()
        if self._staged and self.staged_nbytes + size > _STAGED:
          break
        self.announced += 1
        self._staged[key] = self._pool.submit(self._read, *key)

  def fetch(self, place: np.ndarray, expert: np.ndarray) -> tuple:
    """Returns the arrays of an expert."""
    key = int(place), int(expert)
    with self._lock:
      ahead = self._staged.pop(key, None)
      self.fetched += 1
      self.read_ahead += ahead is not None
    return self._read(*key) if ahead is None else ahead.result()

  def place_of(self, path: str) -> int:
    """Number of a layer."""
    return self._paths.index(path)

  def _read(self, place: int, expert: int) -> tuple:
    layer = self.layers[self._paths[place]]
    return tuple(np.array(array[expert]) for array in layer.arrays)


class Offloaded(_compressed.Compressed):
  """A compressed model whose experts are outside of the device.

  Its parameters have no experts, see `offload`; `apply` takes and returns the
  collection 'experts', which `offload` returns empty:

      out, state = model.apply(
        {'params': params, 'experts': slots}, token, mutable=['experts']
      )
      slots = state['experts']

  The official samplers and `gx.text.stream` do not carry it on, so that they
  cannot decode with such a model.

  Attributes:
    store: The experts.
  """

  store: Any = None

  def _intercept(self):
    return _compressed.packed_weights(
      _compressed.methods_of(self.model, self.recipe),
      mixtures=_compressed.mixtures_of(self.model, self.recipe),
      offload=functools.partial(_run, self.store),
      dtype=self.model.dtype,
      depth=len(self.path),
    )


def offload(
  model: _compressed.Compressed,
  params: Mapping[str, Any],
  *,
  slots: int,
  directory: os.PathLike | str | None = None,
) -> tuple[Offloaded, dict[str, Any], dict[str, Any]]:
  """Moves the experts of a model out of the device.

  Those of `gx.MoE` and those that Gemma 4 has of its own.

  Args:
    model: A model with mixtures, their weights packed or dense, none shared.
    params: Its parameters.
    slots: Experts of a layer that the device keeps, at least `top_k`.
    directory: Where to keep the experts in files, which are mapped and not
      read; in host memory by default. Files of another model are never
      overwritten, which may be in use.

  Returns:
    The model, its parameters without experts, and its empty slots, the
    collection 'experts' of `apply`.

  Raises:
    RecipeError: If the model has no mixtures, or shared experts, or fewer
      slots than a token needs, or a mixture with one weight packed and the
      other dense.
    CheckpointExistsError: If the directory has such files already.
  """
  native = _native.mixtures(model.model)
  mixtures = _compressed.mixtures_of(model.model, model.recipe) | native
  if not mixtures or any(m.method.shared for m in mixtures.values()):
    raise errors.RecipeError(
      'Offloading is for models with mixtures of experts, none of them shared;'
      f' got {[str(m.method) for m in mixtures.values()][:1] or "none"}.'
    )
  if any(
    m.method.router in ('gate', 'expert_choice') for m in mixtures.values()
  ):
    raise errors.RecipeError(
      "Routers 'gate' and 'expert_choice' need all experts; offloading does not"
      ' go with them.'
    )
  least = max(m.method.top_k for m in mixtures.values())
  most = min(m.method.num_experts for m in mixtures.values())
  if not least <= slots <= most:
    raise errors.RecipeError(
      f'{slots=}; expected {least} (top_k) to {most} (experts of a layer).'
    )
  if directory is not None:
    _check_empty(pathlib.Path(directory), mixtures)
  methods = _compressed.methods_of(model.model, model.recipe)
  flat = dict(traverse_util.flatten_dict(dict(params), sep='/'))
  sites = _native.weights(model.model)
  layers = {}
  for path, mixture in mixtures.items():
    if path in native:
      stacked = _native.take(path, sites, methods, flat)
    else:
      stacked = _stacked.take(mixture, methods, flat)
    layers[path] = _Layer(
      mixture=mixture,
      stacked=_moved(stacked, path, directory),
      native=path in native,
    )
  # Of two models only what is in the config tells their traces apart.
  stamped = _config.stamp(model.model, f' offload {next(_ids)}')
  made = Offloaded(
    model=stamped, recipe=model.recipe, store=HostExperts(layers)
  )
  return (
    made,
    traverse_util.unflatten_dict(flat, sep='/'),
    _empty(made.store, slots),
  )


def hit_rate(state: Mapping[str, Any]) -> float:
  """Share of the experts that were asked for and were in their slots.

  Args:
    state: The collection 'experts' after `apply`.
  """
  flat = traverse_util.flatten_dict(dict(state), sep='/')
  count = lambda name: sum(
    int(leaf) for path, leaf in flat.items() if path.endswith(f'/{name}')
  )
  hits, misses = count('hits'), count('misses')
  return hits / max(hits + misses, 1)


def _check_empty(directory: pathlib.Path, paths: Iterable[str]) -> None:
  """Raises CheckpointExistsError if a layer has files in a directory."""
  for path in paths:
    for file in directory.glob(f'{_name(path)}_*.bin'):
      raise errors.CheckpointExistsError(
        f'{file} has the experts of a model already, which may be reading them.'
        ' Name another directory, or delete what is in this one if no model'
        ' needs it.'
      )


def _name(path: str) -> str:
  """What the files of a layer begin with."""
  return path.replace('/', '_')


def _moved(
  stacked: _stacked.Stacked, path: str, directory: os.PathLike | str | None
) -> _stacked.Stacked:
  """Returns the experts of a layer in files, or in arrays of their own."""
  kept = []
  for i, array in enumerate(stacked.arrays):
    array = np.ascontiguousarray(array)
    if directory is not None:
      file = pathlib.Path(directory) / f'{_name(path)}_{i}.bin'
      file.parent.mkdir(parents=True, exist_ok=True)
      with file.open('xb') as f:
        array.tofile(f)
      array = np.memmap(file, dtype=array.dtype, mode='r', shape=array.shape)
    kept.append(array)
  return dataclasses.replace(stacked, arrays=tuple(kept))


def _empty(store: HostExperts, slots: int) -> dict[str, Any]:
  """Slots with nothing in them."""
  flat = {}
  for path, layer in store.layers.items():
    flat[f'{path}/cache'] = {
      'slots': tuple(
        jnp.zeros(
          (*array.shape[1 : axis + 1], slots, *array.shape[axis + 1 :]),
          array.dtype,
        )
        for array, axis in zip(layer.arrays, layer.axes)
      ),
      'slot_of': jnp.full(layer.mixture.method.num_experts, -1, jnp.int32),
      'expert_in': jnp.full(slots, -1, jnp.int32),
      'used': jnp.zeros(slots, jnp.int32),
      'clock': jnp.int32(0),
      'hits': jnp.int32(0),
      'misses': jnp.int32(0),
    }
  return traverse_util.unflatten_dict(flat, sep='/')


def _run(store, module, path, x, chosen, weight) -> jax.Array:
  """A layer whose experts are in a store."""
  layer = store.layers[path]
  width = x.shape[-1]
  flat = x.reshape(-1, width)
  chosen = chosen.reshape(len(flat), -1)
  weight = weight.reshape(chosen.shape)
  place = np.int32(store.place_of(path))
  following = store.next_of(path)
  if following is not None and len(flat) == 1:
    tree = module.scope.root.variables()['params']
    for name in following.split('/'):
      tree = tree[name]
    after = store.layers[following]
    if after.native:
      guess = _native.guess(after.mixture.method, tree, flat[0])
    else:
      router = tree[_moe.ROUTER]
      guess = _moe.route(after.mixture.method, router, flat).chosen[0]
    io_callback(store.announce, None, np.int32(place + 1), guess, ordered=False)
  fetch = functools.partial(
    jax.pure_callback,
    functools.partial(store.fetch, place),
    tuple(jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in layer.arrays),
    vmap_method='sequential',
  )
  if len(flat) > 1:
    y = _stream_all(layer, fetch, flat, chosen, weight)
  else:
    _check_slots(module, path)
    state = module.get_variable(COLLECTION, 'cache')
    state = _load(layer, fetch, state, chosen[0])
    module.put_variable(COLLECTION, 'cache', state)
    at = jnp.where(chosen < 0, -1, state['slot_of'][jnp.maximum(chosen, 0)])
    y = _compute(layer, state['slots'], flat, at, weight)
  return y.reshape(x.shape)


def _check_slots(module, path) -> None:
  """Raises ParamsMismatchError if there are no slots, or they are fixed."""
  there = module.has_variable(COLLECTION, 'cache')
  if there and module.is_mutable_collection(COLLECTION):
    return
  raise errors.ParamsMismatchError(
    f'The experts of {path!r} are outside of the device, so that one token'
    f' needs the collection {COLLECTION!r}, to be changed: pass what `offload`'
    " returned, `out, state = model.apply({'params': params,"
    f" '{COLLECTION}': slots}}, token, mutable=['{COLLECTION}'])`, and"
    f" `state['{COLLECTION}']` to the next call. The official samplers and"
    ' `gx.text.stream` do not; there, take the model as it was before.'
  )


def _load(layer, fetch, state, chosen) -> dict[str, Any]:
  """Puts the chosen experts into slots, in place of those not used longest."""

  def one(i, state):
    e = chosen[i]
    slot = state['slot_of'][jnp.maximum(e, 0)]
    clock = state['clock'] + 1

    def touch(state, slot):
      return state | {'used': state['used'].at[slot].set(clock), 'clock': clock}

    def hit(state):
      return touch(state, slot) | {'hits': state['hits'] + 1}

    def miss(state):
      victim = jnp.argmin(state['used']).astype(jnp.int32)
      old = state['expert_in'][victim]
      slot_of = jnp.where(
        old >= 0,
        state['slot_of'].at[jnp.maximum(old, 0)].set(-1),
        state['slot_of'],
      )
      return touch(state, victim) | {
        'slots': tuple(
          jax.lax.dynamic_update_index_in_dim(v, new, victim, axis)
          for v, new, axis in zip(state['slots'], fetch(e), layer.axes)
        ),
        'slot_of': slot_of.at[e].set(victim),
        'expert_in': state['expert_in'].at[victim].set(e),
        'misses': state['misses'] + 1,
      }

    found = lambda state: jax.lax.cond(slot >= 0, hit, miss, state)
    return jax.lax.cond(e >= 0, found, lambda state: state, state)

  return jax.lax.fori_loop(0, len(chosen), one, dict(state))


def _stream_all(layer, fetch, x, chosen, weight) -> jax.Array:
  """Many tokens: every expert comes once, and stays for its tokens only."""
  count = layer.mixture.method.num_experts

  def one(e, total):
    gate = jnp.where(chosen == e, weight, 0).sum(axis=1, keepdims=True)

    def add(total):
      arrays = tuple(
        jnp.expand_dims(a, axis) for a, axis in zip(fetch(e), layer.axes)
      )
      at = jnp.where(gate != 0, 0, -1)
      y = _compute(layer, arrays, x, at, gate)
      return total + y.astype(jnp.float32)

    return jax.lax.cond(jnp.any(gate != 0), add, lambda t: t, total)

  total = jnp.zeros(x.shape, jnp.float32)
  return jax.lax.fori_loop(0, count, one, total).astype(x.dtype)


def _compute(layer, arrays, x, at, weight) -> jax.Array:
  stacked = layer.stacked
  return _stacked.compute(
    *(stacked.formats, arrays, x, at, weight), x_bits=stacked.x_bits
  )
