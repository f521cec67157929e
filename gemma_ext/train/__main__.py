# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Heals a compressed model as a config says.

  python -m gemma_ext.train --config=examples/enhancements/heal_tssn.py \
      [--config.output=DIR] [--config.stages[0].optimizer.steps=100]

The config is a Python file with `get_config()`, and every field that it names
can be changed on the command line. The result is a directory that
`gemma_ext.evaluate` and `gemma_ext.generate` take. Beside it are
`OUTPUT.healing.json` and, if matplotlib is there, `OUTPUT.report/report.html`.

A run that is killed goes on with the same command and ends in the same bits.
SIGTERM saves the state and exits with 0, and so does Ctrl-C; twice, it ends
the run at once.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
import sys
import time
from typing import Any

from absl import flags

from gemma_ext import _cli
from gemma_ext import errors
from gemma_ext.train import _config
from gemma_ext.train import _heal
from gemma_ext.train import _report
from gemma_ext.train import _signals


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  argv = sys.argv[1:] if argv is None else list(argv)
  changes, rest = _config.split_argv(argv)
  return _cli.run(
    __doc__, _define_flags, lambda args: _run(args, changes), rest
  )


def _define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    'config', None, 'The config file.', required=True, flag_values=values
  )


def _run(args: Any, changes: Sequence[str]) -> None:
  config = _config.load(args.config, changes)
  if not isinstance(config.value, _heal.Heal):
    raise errors.ConfigError(
      f'{args.config!r} describes a {type(config.value).__name__}; expected a'
      ' gemma_ext.train.Heal.'
    )
  begun = time.monotonic()
  with _signals.graceful() as stop:
    run = _heal.heal(
      config.value,
      progress=True,
      stop=lambda: stop.requested,
      fingerprint=config.fingerprint,
      report=_Line(begun),
    )
  output = pathlib.Path(config.value.output).expanduser()
  if run is None:
    _cli.note(
      'Stopped; the state is saved. The same command goes on from here.'
    )
    return
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
  """Prints a line for each unit that is done, with the time left."""

  def __init__(self, begun: float):
    self._begun, self._done = begun, 0

  def __call__(self, run: _heal.Run, record: dict[str, Any]) -> None:
    self._done += 1
    units = sum(len(s.units(run.model)) for s in run.config.stages)
    left = units - len(run.log)
    seconds = (time.monotonic() - self._begun) / self._done * left
    _cli.note(
      f'{record["unit"]}: held-out loss {record["held_out_before"]:.4f} ->'
      f' {record["held_out_after"]:.4f}, perplexity ratio'
      f' {record["ratio"]:.4f}, {len(run.log)} of {units} done, about'
      f' {seconds / 60:.0f} min left'
    )


if __name__ == '__main__':
  sys.exit(main())
