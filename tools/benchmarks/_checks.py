# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a suite needs, looked for before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
import importlib.util
import pathlib

import jax

from gemma_ext import ckpts
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext.ckpts import _sample
from tools.benchmarks import _suite


def use(device: str) -> None:
  """Makes JAX run on a device.

  Args:
    device: 'cpu', 'gpu', 'gpu:1', 'tpu'; '' leaves it as it is.

  Raises:
    BackendError: If there is none, or JAX runs elsewhere already.
  """
  platform, _, number = device.partition(':')
  if not platform:
    return
  if platform == 'cpu':
    jax.config.update('jax_platforms', 'cpu')
  if number:
    jax.config.update('jax_cuda_visible_devices', number)
  try:
    found = jax.default_backend()
    count = jax.local_device_count()
  except RuntimeError as e:  # No such number, of drivers and so on.
    raise errors.BackendError(f'No device {device!r}: {e}') from e
  if found != platform or (number and count != 1):
    raise errors.BackendError(
      f'No device {device!r}: JAX runs on {count} of {found!r}.'
    )


def check(suite: _suite.Suite, missing: Mapping[str, Collection[str]]) -> None:
  """Looks for what the pairs that are to be measured need.

  Args:
    suite: The suite.
    missing: By model, the tasks that are to be measured.

  Raises:
    OptionalDependencyError: If a package of an extra is missing.
    CheckpointError: If a checkpoint is missing.
    ConfigError: If a file or class is missing.
    BackendError: If programs cannot be confined here.
  """
  for name, tasks in missing.items():
    model = suite.models[name]
    if not tasks:
      continue
    _check_model(model)
    checks = {suite.tasks[task].options.get('check') for task in tasks}
    if 'code' in checks and model.kind == 'checkpoint':
      evals.require_sandbox()


def _check_model(model: _suite.Model) -> None:
  if model.kind == 'gguf':
    _package('xllamacpp', 'peers', f'the model {model.name!r}')
    if (
      model.source != _sample.NAME and not pathlib.Path(model.source).is_file()
    ):
      raise errors.ConfigError(
        f'Model {model.name!r}: no file {model.source!r}.'
      )
  elif model.kind == 'shape':
    _suite.shape_class(model)
  else:
    ckpts.locate(model.source)
  if model.peer.startswith('qwix'):
    _package('qwix', 'peers', f'the model {model.name!r}')
  sampled = model.calibration == 'sample' or (
    model.budget and model.calibration in ('', 'auto')
  )
  if sampled or 'imatrix' in model.quantize or 'gptq' in model.peer:
    _package('gensim', 'samples', f'the calibration of {model.name!r}')


def _package(name: str, extra: str, what: str) -> None:
  if importlib.util.find_spec(name) is None:
    raise errors.OptionalDependencyError(
      f'{name} is missing, which {what} needs: pip install'
      f' "gemma_ext[{extra}]" (or pip install {name}).'
    )
