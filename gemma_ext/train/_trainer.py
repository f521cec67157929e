# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs a `kd.train.Trainer` as our command runs everything.

It stops when it is asked to, goes on, refuses a changed config, and leaves a
usable checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import json
import pathlib
from typing import Any

from etils import epath
from gemma import peft
import jax
from kauldron import kd
import numpy as np
import safetensors.numpy

from gemma_ext import ckpts
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.train import _branch
from gemma_ext.train import _init
from gemma_ext.train import _sources
from gemma_ext.train import _store

SNAPSHOT = 'training.json'
RESULT = 'result'
ADAPTERS = 'adapters.safetensors'

# What may change between two parts of a run.
_FREE = (
  'workdir',
  'num_train_steps',
  'stop_after_steps',
  'log_metrics_every',
  'log_summaries_every',
  'evals',
  'writer',
  'profiler',
)


class StoppedError(errors.TrainError):
  """The run was asked to stop, and its state is saved."""


def run(
  trainer: kd.train.Trainer,
  snapshot: Mapping[str, Any],
  *,
  stop: Callable[[], bool] = lambda: False,
) -> pathlib.Path:
  """Trains, or goes on, and writes the result.

  Args:
    trainer: What a config describes.
    snapshot: The config as JSON values; kept in `WORKDIR/training.json`.
    stop: Asked before every step; once it says yes, the state is saved.

  Returns:
    What was written: `WORKDIR/result`, as `gx.ckpts.load` takes it, or for
    adapters `WORKDIR/adapters.safetensors`.

  Raises:
    ConfigError: If the trainer has no workdir or no number of steps.
    StateError: If the workdir is of another config.
    StoppedError: If it was stopped.
  """
  if trainer.workdir == epath.Path():
    raise errors.ConfigError('Trainer.workdir is not set: where results go.')
  if trainer.num_train_steps is None:
    raise errors.ConfigError('Trainer.num_train_steps is not set.')
  workdir = pathlib.Path(str(trainer.workdir)).expanduser().absolute()
  if not _adapters_of(trainer.model):
    ckpts.check_target(workdir / RESULT, overwrite=True)
  trainer = trainer.replace(workdir=epath.Path(workdir))
  _check_snapshot(workdir, snapshot, trainer.checkpointer.latest_step)
  workdir.mkdir(parents=True, exist_ok=True)
  partial = workdir / f'{SNAPSHOT}.partial'
  partial.write_text(json.dumps(snapshot, indent=2) + '\n')
  partial.replace(workdir / SNAPSHOT)
  # As the trainer sets it itself: it is frozen for its users, not for us.
  object.__setattr__(
    trainer, 'checkpointer', _Stopping(trainer.checkpointer, stop)
  )
  state, _ = trainer.train()
  jax.block_until_ready(state.params)
  return _write(trainer, state, workdir, snapshot)


class _Stopping:
  """A checkpointer that saves and ends the run once it is asked to."""

  def __init__(self, inner: Any, stop: Callable[[], bool]):
    self._inner, self._stop = inner, stop

  def __getattr__(self, name: str) -> Any:
    return getattr(self._inner, name)

  def should_save(self, step: int) -> bool:
    """Asked by the trainer before every step."""
    return self._stop() or self._inner.should_save(step)

  def save(self, state: Any, *, step: int, **kwargs: Any) -> bool:
    """Saves; raises `StoppedError` if that was for the last time."""
    stopped = self._stop()
    done = False
    # A step that the run has just come from is there already.
    if not stopped or self._inner.latest_step != step:
      done = self._inner.save(state, step=step, **(kwargs | {'force': stopped}))
    if stopped:
      self._inner.wait_until_finished()
      if isinstance(self._inner, kd.ckpts.NoopCheckpointer):
        raise StoppedError(
          'Stopped; nothing is saved, because the config has no checkpointer.'
        )
      raise StoppedError(
        'Stopped; the state is saved. The same command goes on from here.'
      )
    return done


def _check_snapshot(
  workdir: pathlib.Path, snapshot: Mapping[str, Any], step: int | None
) -> None:
  """Raises `StateError` if the checkpoints there are of another config."""
  file = workdir / SNAPSHOT
  if step is None or not file.exists():
    return
  try:
    old = json.loads(file.read_text())
  except ValueError as e:
    raise errors.StateError(f'{file} is damaged: {e}.') from e
  fixed = lambda tree: {k: v for k, v in tree.items() if k not in _FREE}
  different = list(_store._differences(fixed(old), fixed(snapshot)))
  if different:
    raise errors.StateError(
      f'{workdir} holds step {step} of a run with another config'
      f'{_store._listed(different)}. Choose another workdir, or remove it to'
      ' start again.'
    )


def _write(
  trainer: Any, state: Any, workdir: pathlib.Path, snapshot: Mapping[str, Any]
) -> pathlib.Path:
  adapters = _adapters_of(trainer.model)
  if adapters:
    leaves = _branch.flatten(peft.split_params(state.params).lora)
    path = workdir / ADAPTERS
    partial = path.with_suffix('.partial')
    safetensors.numpy.save_file(
      {k: np.asarray(v) for k, v in leaves.items()}, partial
    )
    partial.replace(path)
    return path
  start = _start_of(trainer.init_transform)
  return ckpts.save(
    workdir / RESULT,
    model=trainer.model,
    params=state.params,
    tokenizer=None if start is None else _tokenizer_of(start),
    source='' if start is None else start.checkpoint,
    metadata={'training': dict(snapshot), 'steps': int(state.step)},
    overwrite=True,
  )


def _adapters_of(model: Any) -> bool:
  """Whether the model wraps another one to adapt it."""
  inner = vars(model).get('model')
  return inner is not None and not isinstance(model, gx_nn.Compressed)


def _start_of(transform: Any) -> _init.FromCheckpoint | None:
  while not isinstance(transform, _init.FromCheckpoint):
    transform = getattr(transform, 'wrapped', None)
    if transform is None:
      return None
  return transform


def _tokenizer_of(start: _init.FromCheckpoint) -> Any:
  try:
    return _sources.tokenizer_of(start.checkpoint)
  except errors.TokenizerError:
    return None  # It trained without; so may the result be.
