# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`sharded_update`: one population over many devices, of one host or more."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from gemma_ext import errors
from gemma_ext.train import _evolution
from gemma_ext.train import _problem


def sharded_update(
  optimizer: _evolution.Evolution,
  problem: _problem.Problem,
  mesh: jax.sharding.Mesh,
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
  return jax.jit(mapped)
