# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Heals or trains a model as a config says.

  python -m gemma_ext.train --config=examples/enhancements/heal_tssn.py \
      [--config.output=DIR] [--config.stages[0].optimizer.steps=100]
  python -m gemma_ext.train --config=examples/enhancements/mezo_distill.py \
      [--config.workdir=DIR] [--config.num_train_steps=100]

The config is a Python file with `get_config()`, and every field that it names
can be changed on the command line. It describes one of two things.

A `gemma_ext.train.Heal`: wins back what compression broke. The result is a
directory that `gemma_ext.evaluate` and `gemma_ext.generate` take. Beside it are
`OUTPUT.healing.json` and, if matplotlib is there, `OUTPUT.report/report.html`.

A `kd.train.Trainer` of kauldron: trains end to end, by gradients or without.
WORKDIR/training.json holds the config, WORKDIR/checkpoints the states, WORKDIR
itself what `tensorboard --logdir` shows. At the end WORKDIR/result is a
directory that `gemma_ext.evaluate` and `gemma_ext.generate` take; of adapters
WORKDIR/adapters.safetensors. It goes on from its last checkpoint.

A run that is killed goes on with the same command and ends in the same bits.
SIGTERM saves the state and exits with 0, and so does Ctrl-C; twice, it ends
the run at once.

Several processes share a run, and a population, if each is started with

  --coordinator=HOST:PORT --num_processes=2 --process_id=0  # and 1

on a file system that all of them see. A signal to one stops all. If one dies,
the others end with an error, and the same commands go on. This is for `Heal`.
"""

from __future__ import annotations

from collections.abc import Sequence
import os
import pathlib
import sys
import time
from typing import Any

from absl import flags
import jax
from kauldron import kd

from gemma_ext import _cli
from gemma_ext import errors
from gemma_ext.train import _config
from gemma_ext.train import _heal
from gemma_ext.train import _report
from gemma_ext.train import _run
from gemma_ext.train import _signals
from gemma_ext.train import _trainer


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  argv = sys.argv[1:] if argv is None else list(argv)
  changes, rest = _config.split_argv(argv)
  status = _cli.run(
    __doc__, _define_flags, lambda args: _main(args, changes), rest
  )
  if status and jax.distributed.is_initialized():
    # An orderly exit waits for the others, and they for this one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  return status


def _define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    'config', None, 'The config file.', required=True, flag_values=values
  )
  flags.DEFINE_string(
    'coordinator',
    None,
    'HOST:PORT that process 0 serves and all of them reach.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'num_processes', None, 'Processes of the run.', 1, flag_values=values
  )
  flags.DEFINE_integer(
    'process_id',
    None,
    'Of this process, from 0.',
    0,
    flag_values=values,
  )
  flags.DEFINE_integer(
    'heartbeat_seconds',
    60,
    'Silence after which another process counts as dead.',
    5,
    flag_values=values,
  )


def _join(args: Any) -> None:
  """Meets the other processes, if there are any."""
  given = (args.coordinator, args.num_processes, args.process_id)
  if given == (None, None, None):
    return
  if None in given:
    raise errors.ConfigError(
      '--coordinator, --num_processes and --process_id go together.'
    )
  if args.process_id >= args.num_processes:
    raise errors.ConfigError(
      f'--process_id={args.process_id} must be below'
      f' --num_processes={args.num_processes}.'
    )
  # It would take SIGTERM for itself.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      *given,
      cluster_detection_method='deactivate',
      heartbeat_timeout_seconds=args.heartbeat_seconds,
      shutdown_timeout_seconds=args.heartbeat_seconds,
    )
  except (RuntimeError, ValueError) as e:
    raise errors.ProcessError(
      f'Process {args.process_id} of {args.num_processes} did not meet the'
      f' others at {args.coordinator}: {e!s:.300}'
    ) from e


def _main(args: Any, changes: Sequence[str]) -> None:
  config = _config.load(args.config, changes)
  if isinstance(config.value, kd.train.Trainer):
    _train(args, config)
    return
  if not isinstance(config.value, _run.Heal):
    raise errors.ConfigError(
      f'{args.config!r} describes a {type(config.value).__name__}; expected a'
      ' gemma_ext.train.Heal or a kauldron kd.train.Trainer.'
    )
  _join(args)
  leads = jax.process_index() == 0
  begun = time.monotonic()
  with _signals.graceful() as stop:
    try:
      run = _heal.heal(
        config.value,
        progress=leads,
        stop=lambda: stop.requested,
        report=_Line() if leads else None,
        finish=lambda run: _write(run, config, begun),
      )
    except errors.CheckpointExistsError:
      if not _heal.is_result(config.value):
        raise
      _cli.note(
        f'{config.value.output} is the result of this config already.'
        ' Give it overwrite=True to make it again.'
      )
      return
  if run is None and leads:
    _cli.note(
      'Stopped; the state is saved. The same command goes on from here.'
    )


def _train(args: Any, config: _config.Config) -> None:
  """Runs a trainer of kauldron."""
  if args.coordinator is not None:
    raise errors.ConfigError(
      '--coordinator is for gemma_ext.train.Heal; a kd.train.Trainer runs in'
      ' one process here.'
    )
  with _signals.graceful() as stop:
    try:
      path = _trainer.run(
        config.value, config.snapshot, stop=lambda: stop.requested
      )
    except _trainer.StoppedError as e:
      _cli.note(str(e))
      return
  print(f'Wrote {path}.')
  if path.is_dir():
    print(
      f'Measure with: python -m gemma_ext.evaluate --checkpoint={path}\n'
      f'Run with: python -m gemma_ext.generate --checkpoint={path}'
      " --prompt='The capital of France'"
    )
  else:
    print(
      'These are the adapters alone; load them with'
      f" safetensors.flax.load_file('{path}') and peft.merge_params."
    )


def _write(run: _run.Run, config: _config.Config, begun: float) -> None:
  """Writes what belongs to a result, and prints it."""
  output = pathlib.Path(config.value.output).expanduser()
  record = {
    'config': config.snapshot,
    'seconds': time.monotonic() - begun,
    'log': run.log,
  }
  _cli.write_json(str(output.with_name(f'{output.name}.healing.json')), record)
  try:
    page = _report.write(
      output.with_name(f'{output.name}.report'),
      _report.record_of(run, config.snapshot),
    )
    _cli.note(f'Wrote {page}.')
  except errors.OptionalDependencyError as e:
    _cli.note(f'No report: {e}')
  _cli.print_table(
    f'Healed {output}',
    ('unit', 'held-out loss', 'after', 'perplexity ratio', 'seconds'),
    [
      (
        r['unit'],
        f'{r["held_out_before"]:.4f}',
        f'{r["held_out_after"]:.4f}' if r['kept'] else 'no better, not kept',
        f'{r["ratio"]:.4f}',
        f'{r["seconds"]:.0f}',
      )
      for r in run.log
    ],
  )
  print(
    'The ratio is on a few held-out windows; measure with: python -m'
    f' gemma_ext.evaluate --checkpoint={output}'
    f' --baseline={config.value.checkpoint} --text={config.value.text}'
  )


class _Line:
  """Prints a line for each unit that is done, with the time left of a stage."""

  def __init__(self):
    self._last: float | None = None
    self._stage = -1
    self._seconds: list[float] = []

  def __call__(self, run: _run.Run, record: dict[str, Any]) -> None:
    now, stage = time.monotonic(), record['stage']
    if stage != self._stage:
      self._stage, self._seconds = stage, []
    # Loading and calibration, before the first unit, say nothing of the next.
    last = now - record['seconds'] if self._last is None else self._last
    self._seconds.append(now - last)
    self._last = now
    units = len(run.config.stages[stage].units(run.model))
    done = sum(r['stage'] == stage for r in run.log)
    seconds = sum(self._seconds) / len(self._seconds) * (units - done)
    line = (
      f'{record["unit"]}: held-out loss {record["held_out_before"]:.4f} ->'
      f' {record["held_out_after"]:.4f}, perplexity ratio'
      f' {record["ratio"]:.4f}, {done} of {units} done'
    )
    if len(run.config.stages) > 1:
      line += f' in stage {stage + 1} of {len(run.config.stages)}'
    if done < units:
      line += f', about {max(1, seconds / 60):.0f} min left of it'
    _cli.note(line)


if __name__ == '__main__':
  sys.exit(main())
