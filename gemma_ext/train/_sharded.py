# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`sharded_update`: one population over many devices, of one host or more."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from absl import logging
import jax

from gemma_ext import errors
from gemma_ext.train import _evolution
from gemma_ext.train import _mezo
from gemma_ext.train import _problem


def sharded_update(
  optimizer: _evolution.Evolution | _mezo.Mezo,
  problem: _problem.Problem,
  mesh: jax.sharding.Mesh,
  *,
  donate: bool = False,
) -> Callable[..., Any]:
  """Compiles an update whose population is split over a mesh.

  Every device holds the parameters and evaluates its share of the members;
  losses are gathered, and each device then makes all the noise again and takes
  the same step. No gradient and no parameter is sent. Works alike on the
  devices of one process and, under `jax.distributed`, of several.

  Args:
    optimizer: What to run; its population divides among the devices.
    problem: What to minimise.
    mesh: Of one axis.
    donate: Whether parameters and state give their memory to the result.

  Returns:
    `(params, state, batch, key)` to the same as `Evolution.update`.

  Raises:
    ConfigError: If the mesh has more than one axis.
  """
  if len(mesh.axis_names) != 1:
    raise errors.ConfigError(
      f'A mesh of one axis is needed, got {mesh.axis_names}.'
    )
  optimizer = dataclasses.replace(optimizer, axis=mesh.axis_names[0])
  everywhere = jax.sharding.PartitionSpec()
  mapped = jax.shard_map(
    lambda *args: optimizer.update(problem, *args),
    mesh=mesh,
    in_specs=everywhere,
    out_specs=everywhere,
    # Equal by construction, which the checker cannot see.
    check_vma=False,
  )
  return jax.jit(mapped, donate_argnums=(0, 1) if donate else ())


def compiled(optimizer: Any, problem: _problem.Problem) -> Callable[..., Any]:
  """Compiles `optimizer.update`, split over all devices where it can be.

  Arrays go in and come out as this process's own. What has no population to
  split runs alike in every process.

  Raises:
    ConfigError: Under `jax.distributed`, if a population does not divide
      among the devices.
  """
  devices = jax.device_count()
  whole = functools.partial(optimizer.update, problem)
  members = getattr(optimizer, 'members', None)
  if devices > 1 and members is None and jax.process_count() > 1:
    logging.warning(
      '%s has no population; every process takes all of its steps.',
      type(optimizer).__name__,
    )
  elif devices > 1 and members is not None and members % devices:
    text = (
      f'{members} members or pairs of {type(optimizer).__name__} do not divide'
      f' among {devices} devices.'
    )
    if jax.process_count() > 1:
      raise errors.ConfigError(f'{text} Change `population` or `pairs`.')
    logging.warning('%s They run on one device.', text)
  elif devices > 1 and members is not None:
    mesh = jax.make_mesh((devices,), ('members',))
    return _Local(sharded_update(optimizer, problem, mesh, donate=True), mesh)
  return jax.jit(whole, donate_argnums=(0, 1))


class _Local:
  """An update over a mesh, for arrays of one process."""

  def __init__(self, update: Callable[..., Any], mesh: jax.sharding.Mesh):
    self._update = update
    self._devices = mesh.local_devices
    self._sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec()
    )
    # Much of a batch is the same arrays in every step; those are sent once.
    self._sent: dict[str, tuple[jax.Array, jax.Array]] = {}

  def __call__(self, params: Any, state: Any, batch: Any, key: jax.Array):
    params, state = jax.tree.map(self._spread, (params, state))
    batch = jax.tree_util.tree_map_with_path(self._send, batch)
    out = self._update(params, state, batch, self._spread(key))
    return jax.tree.map(lambda x: x.addressable_data(0), out)

  def _send(self, path: Any, x: jax.Array) -> jax.Array:
    if len(self._devices) == 1:  # Then nothing is copied.
      return self._spread(x)
    name = jax.tree_util.keystr(path)
    last = self._sent.get(name)
    if last is None or last[0] is not x:
      self._sent[name] = (x, self._spread(x))
    return self._sent[name][1]

  def _spread(self, x: jax.Array) -> jax.Array:
    return jax.make_array_from_single_device_arrays(
      x.shape, self._sharding, [jax.device_put(x, d) for d in self._devices]
    )
