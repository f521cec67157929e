# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Heal`: wins back what compression broke, stage by stage, and survives.

    load -> compress -> calibrate -> stages -> save

A stage heals one layer after the other (`Block`) or the whole model
(`Distill`), with any optimiser. After every unit of work, and every few minutes
within one, the state goes to disk; the same call goes on from there and ends
in the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import time
from typing import Any

from absl import logging
import jax
import numpy as np
import tqdm

from gemma_ext import ckpts
from gemma_ext import errors
from gemma_ext.train import _calibration
from gemma_ext.train import _processes
from gemma_ext.train import _run
from gemma_ext.train import _stages
from gemma_ext.train import _store

# What may differ when a run goes on, because the result does not depend on it.
_FREE = ('overwrite', 'save_seconds', 'cache')


def heal(
  config: _run.Heal,
  *,
  progress: bool = False,
  stop: Callable[[], bool] = lambda: False,
  report: Callable[[_run.Run, dict[str, Any]], None] | None = None,
  finish: Callable[[_run.Run], None] | None = None,
) -> _run.Run | None:
  """Runs a config, or goes on with a run of it.

  Under `jax.distributed` all processes call this alike, on files that all of
  them see. The first one writes; populations are split over all devices.

  Args:
    config: What to do.
    progress: Whether to show progress on stderr.
    stop: Asked in every step; once it says yes, in any process, the state is
      saved.
    report: Called after every unit with its record.
    finish: Called in the first process once the result is saved. Only then is
      the run over: one that is killed before is finished again.

  Returns:
    The run, its result saved; `None` if it was stopped.

  Raises:
    TrainError: If model, text or config do not go together.
    StateError: If the state cannot be saved, is of another config, or another
      run is at work on it.
    ProcessError: If another process has ended or differs.
    CheckpointExistsError: If there is a result already.
  """
  output = pathlib.Path(config.output).expanduser().absolute()
  state = output.with_name(f'{output.name}.state')
  # What a run finds there beside its own state it has put there itself, just
  # before a kill kept it from clearing the state.
  mine = lambda: config.overwrite or any(state.glob('step_*'))
  ckpts.check_target(output, overwrite=mine())
  group = _processes.Group()
  described = _described(config)
  group.check_same('The configs', repr(described).encode())
  store = _store.Store(state, fingerprint=repr(described), config=described)
  with contextlib.ExitStack() as stack:
    group.lead(lambda: stack.enter_context(store.lock()))
    stack.enter_context(group.survived())
    overwrite = mine()  # Another run may have ended since.
    ckpts.check_target(output, overwrite=overwrite)
    saved = store.latest()
    number = b'' if saved is None else str(saved.number).encode()
    group.check_same('The saved states', number)
    run = _run.start(config, output, saved, stop, progress)
    if run is None:
      return None
    saver = _Saver(store, run, 0 if saved is None else saved.number, group)
    if saved is None:  # The fit is not made again.
      saver.check_same('start')
      saver.save(_Position())
    if not _stages_of(run, saver, saved, stop, progress, report):
      return None

    def save() -> None:
      path = ckpts.save(
        output,
        model=run.model,
        params=run.params,
        tokenizer=run.dense.tokenizer,
        source=run.dense.source,
        metadata={'healing': {'config': config.to_json(), 'log': run.log}},
        overwrite=overwrite,
      )
      logging.info('Wrote %s.', path)
      _sweep(output)
      if finish is not None:
        finish(run)
      store.clear()

    group.lead(save)
  return run


def is_result(config: _run.Heal) -> bool:
  """Whether a config's result is there, whole, and its run over."""
  output = pathlib.Path(config.output).expanduser().absolute()
  state = output.with_name(f'{output.name}.state')
  if not output.exists() or any(state.glob('step_*')):
    return False
  made = ckpts.load(output).metadata.get('healing', {}).get('config')
  want = json.loads(json.dumps(_described(config)))
  return isinstance(made, dict) and want == {
    k: v for k, v in made.items() if k not in _FREE
  }


def _described(config: _run.Heal) -> dict[str, Any]:
  return {k: v for k, v in config.to_json().items() if k not in _FREE}


def _sweep(output: pathlib.Path) -> None:
  """Removes what kills left of earlier attempts to save the result."""
  name = re.compile(
    rf'\.{re.escape(output.name)}\.[0-9a-f]{{12}}\.(partial|replaced)'
  )
  for path in output.parent.iterdir():
    if name.fullmatch(path.name):
      shutil.rmtree(path, ignore_errors=True)


def _stages_of(
  run: _run.Run,
  saver: _Saver,
  saved: _store.Saved | None,
  stop: Callable[[], bool],
  progress: bool,
  report: Callable[[_run.Run, dict[str, Any]], None] | None,
) -> bool:
  """Does what is left to do; `False` if it was stopped, its state saved."""
  position = _Position(**saved.metadata['position']) if saved else _Position()
  for number, stage in enumerate(run.config.stages):
    if number < position.stage:
      continue
    units = stage.units(run.model)
    for index, unit in enumerate(units):
      if number == position.stage and index < position.unit:
        continue
      if saver.group.any(stop())[0]:
        return False
      resume = None
      if saved and (number, index) == (position.stage, position.unit):
        resume = (position, saved) if position.step else None
      record = _unit(
        run, stage, unit, (number, index), saver, resume, stop, progress
      )
      if record is None:
        return False
      saver.check_same(unit)
      record['ratio'] = _run.ratio(run)
      run.log.append({'stage': number, 'unit': unit, **record})
      saver.save(_Position(stage=number, unit=index + 1, step=0))
      if report is not None:
        report(run, run.log[-1])
  return True


@dataclasses.dataclass(frozen=True)
class _Position:
  """Where a run is: the steps done of a unit of a stage."""

  stage: int = 0
  unit: int = 0
  step: int = 0


class _Saver:
  """Saves the run, at most every so many seconds within a unit."""

  def __init__(
    self,
    store: _store.Store,
    run: _run.Run,
    number: int,
    group: _processes.Group,
  ):
    self._store, self._run, self._number = store, run, number
    self.group = group
    self._last = time.monotonic()

  def due(self) -> bool:
    return time.monotonic() - self._last > self._run.config.save_seconds

  def check_same(self, unit: str) -> None:
    """Checks that all processes have come to the same parameters."""
    if self.group.count > 1:
      digest = _calibration.params_fingerprint(_run.packed_leaves(self._run))
      self.group.check_same(f'The parameters ({unit})', digest.encode())

  def save(
    self,
    position: _Position,
    training: Any = None,
    curve: list[list[float]] | None = None,
  ) -> None:
    arrays = {
      f'params/{k}': v for k, v in _run.packed_leaves(self._run).items()
    }
    if training is not None:
      arrays |= {f'train/{k}': v for k, v in _store.flatten(training).items()}
    metadata = {
      'position': dataclasses.asdict(position),
      'log': self._run.log,
      'curve': curve or [],
    }
    self._number += 1
    self.group.lead(lambda: self._store.save(self._number, arrays, metadata))
    self._last = time.monotonic()


def _unit(
  run: _run.Run,
  stage: Any,
  unit: str,
  place: tuple[int, int],
  saver: _Saver,
  resume: tuple[_Position, _store.Saved] | None,
  stop: Callable[[], bool],
  progress: bool,
) -> dict[str, Any] | None:
  """Heals one unit; `None` if it was stopped, its state saved."""
  begun = time.monotonic()
  task = stage.task(run, unit)
  optimizer = stage.optimizer
  seed = (run.config.seed, *place)
  base = jax.random.key(int(np.random.SeedSequence(seed).generate_state(1)[0]))
  moving = task.moving
  state = optimizer.init(moving, base)
  before = task.held_out(moving)
  first = 0
  curve: list[list[float]] = []
  if resume is not None:
    first = resume[0].step
    curve = list(resume[1].metadata['curve'])
    prefix = 'train/'
    arrays = {
      k.removeprefix(prefix): v
      for k, v in resume[1].arrays.items()
      if k.startswith(prefix)
    }
    moving, state = _store.unflatten((moving, state), arrays)
  steps = _progress(range(first, optimizer.steps), unit, first, progress)
  for step in steps:
    moving, state, metrics = task.step(
      moving, state, task.batch(step, seed), jax.random.fold_in(base, step)
    )
    if step % max(1, optimizer.steps // 50) == 0:
      curve.append([step + 1, float(metrics['loss'])])
      steps.set_postfix(loss=f'{curve[-1][1]:.4f}')
      if not np.isfinite(curve[-1][1]):
        raise errors.TrainError(
          f'The loss of {unit} is {curve[-1][1]} at step {step}. Lower the'
          ' learning rate.'
        )
    position = _Position(stage=place[0], unit=place[1], step=step + 1)
    due = saver.due() and step + 1 < optimizer.steps
    stopped, due = saver.group.any(stop(), due)
    if stopped or due:
      saver.save(position, (moving, state), curve)
    if stopped:
      return None
  after = task.held_out(moving)
  record = {
    'held_out_before': before,
    'held_out_after': after,
    'kept': after < before,
    'steps': optimizer.steps,
    'seconds': time.monotonic() - begun,
    'curve': curve,
  }
  if after < before:
    old = run.params
    run.params = task.close(moving)
    record |= _stages.changes(run.model, old, run.params, unit)
  return record


def _progress(steps: range, unit: str, first: int, progress: bool) -> Any:
  return tqdm.tqdm(
    steps,
    desc=unit,
    initial=first,
    total=steps.stop,
    disable=not progress,
    unit='step',
  )
