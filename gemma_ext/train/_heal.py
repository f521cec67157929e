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

from collections.abc import Callable, Mapping
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
import jax.numpy as jnp
import numpy as np
import tqdm

from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import data
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.train import _branch
from gemma_ext.train import _calibration
from gemma_ext.train import _distill
from gemma_ext.train import _gradient
from gemma_ext.train import _processes
from gemma_ext.train import _stages
from gemma_ext.train import _store

_PAD = 0
# What may differ when a run goes on, because the result does not depend on it.
_FREE = ('overwrite', 'save_seconds', 'cache')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heal:
  """What to heal, on which text, how, and where the result goes.

  Attributes:
    checkpoint: The dense checkpoint, as `gx.ckpts.load` takes it.
    recipe: How it is compressed: a preset, a JSON path or a `Recipe`.
    output: Directory of the result. The state of the run is kept beside it,
      in `OUTPUT.state`, until the result is saved.
    stages: What to do, in order.
    text: Source of the calibration text, as in `gemma_ext.evaluate`.
    tokens: Tokens to calibrate on.
    held_out: Windows at the end of the calibration text that no optimiser
      sees, for the held-out loss.
    fit_tokens: Tokens that weigh the one-shot fit that healing starts from.
    window: Tokens of a window.
    dtype: Of activations and of what is not packed.
    seed: Of the split, the order of batches and all noise.
    save_seconds: Time between two saved states within a unit.
    cache: Where calibrations are kept; `OUTPUT.calibration` by default.
    overwrite: Whether to replace an earlier result.
  """

  checkpoint: str = 'gemma3-270m'
  recipe: Any = 'tssn'
  output: str = 'out/healed'
  stages: tuple[Any, ...] = dataclasses.field(
    default_factory=lambda: (_stages.Block(optimizer=_gradient.Gradient()),)
  )
  text: str = 'sample'
  tokens: int = 32_768
  held_out: int = 4
  fit_tokens: int = 8192
  window: int = 512
  dtype: str = 'bfloat16'
  seed: int = 0
  save_seconds: float = 120.0
  cache: str = ''
  overwrite: bool = False

  def __post_init__(self):
    object.__setattr__(self, 'stages', tuple(self.stages))
    for stage in self.stages:
      if not isinstance(stage, (_stages.Block, _stages.Distill)):
        raise errors.ConfigError(
          f'Heal.stages must be Block or Distill, got {stage!r}.'
        )
    if self.dtype not in ('bfloat16', 'float32'):
      raise errors.ConfigError(
        f"Heal.dtype must be 'bfloat16' or 'float32', got {self.dtype!r}."
      )
    for name, least in (
      ('tokens', 2 * self.window),
      ('held_out', 1),
      ('fit_tokens', 1),
      ('window', 2),
      ('seed', 0),
    ):
      value = getattr(self, name)
      if type(value) is not int or value < least:
        raise errors.ConfigError(
          f'Heal.{name} must be an integer of at least {least}, got {value!r}.'
        )

  def to_json(self) -> dict[str, Any]:
    """Returns every field as JSON values."""
    out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    out['recipe'] = (
      self.recipe.to_json()
      if isinstance(self.recipe, recipe_lib.Recipe)
      else self.recipe
    )
    out['stages'] = [stage.to_json() for stage in self.stages]
    return out


@dataclasses.dataclass(kw_only=True)
class Run:
  """A run under way: the models, the data, and what has been done.

  Attributes:
    config: What was asked for.
    dense: The dense checkpoint.
    model: The compressed model.
    params: Its parameters, healed so far.
    calibration: Of the dense model.
    log: A record for every unit that is done.
    dense_result: Perplexity of the dense model on the held-out windows.
  """

  config: Heal
  dense: ckpts.Checkpoint
  model: gx_nn.Compressed
  params: dict[str, Any]
  calibration: _calibration.Calibration
  log: list[dict[str, Any]]
  dense_result: evals.PerplexityResult | None = None

  @property
  def held_out(self) -> np.ndarray:
    """Indices of the windows that optimisers do not see."""
    count = len(self.calibration.tokens)
    return np.arange(count - self.config.held_out, count)

  @property
  def seen(self) -> np.ndarray:
    """Indices of the others."""
    return np.arange(len(self.calibration.tokens) - self.config.held_out)


def heal(
  config: Heal,
  *,
  progress: bool = False,
  stop: Callable[[], bool] = lambda: False,
  report: Callable[[Run, dict[str, Any]], None] | None = None,
  finish: Callable[[Run], None] | None = None,
) -> Run | None:
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
    run = _start(config, output, saved, stop, progress)
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


def is_result(config: Heal) -> bool:
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


def _described(config: Heal) -> dict[str, Any]:
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
  run: Run,
  saver: _Saver,
  saved: _store.Saved | None,
  stop: Callable[[], bool],
  progress: bool,
  report: Callable[[Run, dict[str, Any]], None] | None,
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
      record['ratio'] = ratio(run)
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


def _start(
  config: Heal,
  output: pathlib.Path,
  saved: _store.Saved | None,
  stop: Callable[[], bool],
  progress: bool,
) -> Run | None:
  """Loads, calibrates and compresses, or takes the saved parameters."""
  recipe_lib.Recipe.of(config.recipe, num_layers=recipe_lib.ANY_LAYERS)
  dense = ckpts.load(
    config.checkpoint, dtype=jnp.dtype(config.dtype), progress=progress
  )
  if dense.recipe is not None:
    raise errors.TrainError(
      f'{config.checkpoint!r} is compressed already. Healing starts from the'
      ' dense checkpoint, whose outputs it aims at.'
    )
  if dense.tokenizer is None:
    raise errors.TokenizerError(
      f'{config.checkpoint!r} has no tokenizer, so no text can be read.'
    )
  model = gx_nn.Compressed(model=dense.model, recipe=config.recipe)
  _check_stages(config, model)
  tokens = _tokens(config, dense.tokenizer)
  calibration = _calibration.attempt(
    dense.model,
    dense.params,
    tokens,
    directory=config.cache or output.with_name(f'{output.name}.calibration'),
    layers=any(isinstance(s, _stages.Block) for s in config.stages),
    seed=config.seed,
    progress=progress,
    stop=stop,
  )
  if calibration is None:
    return None
  if saved is None:
    count = max(1, config.fit_tokens // config.window)
    params = gx_compress.compress(
      dense.model,
      dense.params,
      model.recipe,
      calibration=tokens[: min(count, len(tokens) - config.held_out)],
      progress=progress,
    )
  else:
    params = _restore(model, dense.params, saved)
  return Run(
    config=config,
    dense=dense,
    model=model,
    params=params,
    calibration=calibration,
    log=list(saved.metadata['log']) if saved else [],
  )


def _check_stages(config: Heal, model: gx_nn.Compressed) -> None:
  for stage in config.stages:
    if not stage.units(model):
      raise errors.TrainError(
        f'{stage} has nothing to heal: the recipe compresses the feed-forward'
        f' weights of {list(_distill.compressed_layers(model)) or "no layer"}.'
      )


def _tokens(config: Heal, tokenizer: Any) -> np.ndarray:
  """Windows of the calibration documents, mixed, the held-out ones last."""
  documents = tuple(data.load_documents(config.text))
  if config.text == 'sample':
    split = data.split(documents, seed=config.seed)
    documents = split.calibration.documents
  rows = data.windows(
    tokenizer, documents, length=config.window, max_tokens=config.tokens
  ).tokens
  full = rows[(rows != _PAD).sum(axis=1) > config.window // 2]
  rows = full if len(full) > config.held_out else rows
  if len(rows) <= config.held_out:
    raise errors.DataError(
      f'{config.text!r} gives {len(rows)} windows of {config.window} tokens;'
      f' {config.held_out} of them are held out, so at least'
      f' {config.held_out + 1} are needed. Give more text or less `window`.'
    )
  return np.random.default_rng(config.seed).permutation(rows)


def _packed_leaves(run: Run) -> dict[str, Any]:
  """Leaves that healing may have changed, or that compression made."""
  dense = _branch.flatten(run.dense.params)
  return {
    path: leaf
    for path, leaf in _branch.flatten(run.params).items()
    if dense.get(path) is not leaf
  }


def _restore(
  model: gx_nn.Compressed, dense: Mapping[str, Any], saved: _store.Saved
) -> dict[str, Any]:
  flat = _branch.flatten(dense)
  for path in gx_nn.methods_of(model.model, model.recipe):
    flat.pop(path, None)
  for name, value in saved.arrays.items():
    if name.startswith('params/'):
      flat[name.removeprefix('params/')] = jnp.asarray(value)
  return _branch.unflatten(flat)


class _Saver:
  """Saves the run, at most every so many seconds within a unit."""

  def __init__(
    self,
    store: _store.Store,
    run: Run,
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
      digest = _calibration.params_fingerprint(_packed_leaves(self._run))
      self.group.check_same(f'The parameters ({unit})', digest.encode())

  def save(
    self,
    position: _Position,
    training: Any = None,
    curve: list[list[float]] | None = None,
  ) -> None:
    arrays = {f'params/{k}': v for k, v in _packed_leaves(self._run).items()}
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


def ratio(run: Run) -> float:
  """Perplexity ratio to the dense model on the held-out windows."""
  tokens = run.calibration.tokens[run.held_out]
  mask = tokens != _PAD
  mask[:, 0] = False
  windows = data.Windows(
    tokens=tokens,
    score_mask=mask,
    document=np.arange(len(tokens), dtype=np.int32),
    ids=tuple(f'window_{i}' for i in run.held_out),
    stride=tokens.shape[1] - 1,
    data_sha256='',
  )
  if run.dense_result is None:
    run.dense_result = evals.perplexity(
      run.dense.model, run.dense.params, windows
    )
  found = evals.perplexity(run.model, run.params, windows)
  return evals.paired_ratio(found, run.dense_result, resamples=100).value


def _unit(
  run: Run,
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
