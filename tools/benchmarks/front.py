# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Quality against bytes: budgets, uniform widths, and llama.cpp's types.

  python -m tools.benchmarks.front --output=DIR [--budgets=50%,35%,28%,20%] \
      [--json=FILE] [--plot=FILE.png]

Every point of ours is a directory that `python -m gemma_ext.compress` wrote and
`python -m gemma_ext.evaluate` loaded: bytes are those of the parameters on
disk, perplexity is that of held-out text, its ratio to the dense model paired
by document, with a 95% interval. Uniform widths are fitted with the same
statistics as budgets. What is there already is not made again.
"""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
import sys
from typing import Any

from absl import flags

from gemma_ext import _cli
from gemma_ext import errors
from gemma_ext import evaluate
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import __main__ as compress
from tools.benchmarks import _timing

_SAMPLE = 'sample'
UNIFORM = {
  f'int{bits} g{group}': recipe_lib.Int(bits=bits, group=group)
  for bits, group in (
    (8, 128),
    (6, 128),
    (5, 64),
    (4, 32),
    (4, 128),
    (3, 32),
    (3, 128),
  )
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  def string(name: str, default: str | None, text: str) -> None:
    flags.DEFINE_string(name, default, text, flag_values=values)

  string('checkpoint', 'gemma3-270m', 'The dense checkpoint.')
  string('output', None, 'Directory for checkpoints and results.')
  flags.DEFINE_list(
    'budgets', ['50%', '35%', '28%', '20%'], 'Budgets.', flag_values=values
  )
  flags.DEFINE_list(
    'uniform', [*UNIFORM], 'Uniform widths, or none.', flag_values=values
  )
  string('text', _SAMPLE, 'Text to measure on, as evaluate takes it.')
  flags.DEFINE_integer(
    'max_tokens', 20_440, 'Tokens of it.', lower_bound=1, flag_values=values
  )
  string('json', None, 'File for the results.')
  string('plot', None, 'PNG to draw.')


def _command(name: str, run: Any, argv: Sequence[str]) -> None:
  """Runs a command of the package, whose errors have been printed."""
  if status := run(argv):
    raise errors.GemmaExtError(f'{name} {" ".join(argv)} ended with {status}.')


def _point(args: Any, folder: pathlib.Path, flags_: list[str]) -> Any:
  """The results of one point, made if they are not there."""
  made, measured = folder / 'compress.json', folder / 'evaluate.json'
  folder.mkdir(parents=True, exist_ok=True)
  if not made.exists():
    _command(
      'compress',
      compress.main,
      [
        f'--checkpoint={args.checkpoint}',
        f'--output={folder / "checkpoint"}',
        '--overwrite',
        f'--plot={folder / "bits.png"}',
        f'--json={made}',
        *flags_,
      ],
    )
  if not measured.exists():
    _command(
      'evaluate',
      evaluate.main,
      [
        f'--checkpoint={folder / "checkpoint"}',
        f'--baseline={args.checkpoint}',
        f'--text={args.text}',
        f'--max_tokens={args.max_tokens}',
        f'--json={measured}',
      ],
    )
  return json.loads(made.read_text()), json.loads(measured.read_text())


def _row(name: str, made: Mapping[str, Any], found: Any) -> dict[str, Any]:
  paired, dense = found['paired_delta'], 2 * made['plan']['weights']
  row = {
    'name': name,
    'bytes': made['bytes_on_disk']['params'],
    'share': made['bytes_on_disk']['params'] / dense,
    'ratio': paired['ratio'],
    'ci95': paired['ci95'],
    'tokens': found['tokens'],
    'perplexity': found['perplexity'],
  }
  if allocation := made.get('allocation'):
    row['predicted_bytes'] = allocation['predicted_bytes']
    row['predicted_loss'] = sum(allocation['predicted_loss_by_weight'].values())
    row['measured_loss'] = allocation['measured_loss']
    row['held_out_loss'] = math.log(paired['ratio'])
  return row


def _run(args: Any) -> None:
  if not args.output:
    raise errors.DataError('Nowhere to write: give --output=DIR.')
  _cli.check_output(args.json)
  _cli.check_output(args.plot)
  for name in args.uniform:
    if name not in UNIFORM:
      raise errors.ConfigError(f'--uniform: {name!r} is none of {[*UNIFORM]}.')
  output = pathlib.Path(args.output)
  output.mkdir(parents=True, exist_ok=True)
  rows = []
  for budget in args.budgets:
    flags_ = [
      f'--budget={budget}',
      f'--sensitivities={output / "sensitivities.json"}',
    ]
    folder = output / budget.replace('%', '_percent')
    rows.append(_row(budget, *_point(args, folder, flags_)))
    _report(rows)
  for name in args.uniform:
    recipe = recipe_lib.Recipe(rules=(('.*', UNIFORM[name]),))
    folder = output / name.replace(' ', '_')
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'recipe.json'
    path.write_text(json.dumps(recipe.to_json()))
    flags_ = [f'--recipe={path}', '--compensate', f'--calibration={_SAMPLE}']
    rows.append(_row(name, *_point(args, folder, flags_)))
    _report(rows)
  if args.json:
    _cli.write_json(
      args.json,
      {
        'machine': _timing.machine(),
        'checkpoint': args.checkpoint,
        'text': args.text,
        'points': rows,
      },
    )
  if args.plot:
    _plot(rows, args.plot)


def _report(rows: Sequence[Mapping[str, Any]]) -> None:
  cells = [
    (
      row['name'],
      _cli.human_bytes(row['bytes']),
      f'{row["share"]:.1%}',
      f'{row["ratio"]:.4f}',
      _cli.human_interval(row['ci95'], 4),
      f'{row["predicted_loss"]:.4f}' if 'predicted_loss' in row else '',
      f'{row["measured_loss"]:.4f}' if 'measured_loss' in row else '',
      f'{row["held_out_loss"]:.4f}' if 'held_out_loss' in row else '',
    )
    for row in rows
  ]
  _cli.print_table(
    'perplexity ratio to dense on held-out text; loss in nats a token',
    (
      'budget or width',
      'on disk',
      'of bf16',
      'ratio',
      '95% interval',
      'predicted',
      'measured',
      'held out',
    ),
    cells,
  )


def _plot(rows: Sequence[Mapping[str, Any]], path: str) -> None:
  import matplotlib.figure  # pylint: disable=g-import-not-at-top

  figure = matplotlib.figure.Figure(figsize=(6.4, 4), layout='constrained')
  axes = figure.subplots()
  for label, budgets, style in (
    ('budget', True, 'o-'),
    ('uniform width', False, 's--'),
  ):
    points = sorted(
      (r['share'] * 100, r['ratio'], *r['ci95'])
      for r in rows
      if ('predicted_loss' in r) == budgets
    )
    if not points:
      continue
    x, y, low, high = zip(*points, strict=True)
    spread = (
      [a - b for a, b in zip(y, low, strict=True)],
      [b - a for a, b in zip(y, high, strict=True)],
    )
    axes.errorbar(x, y, yerr=spread, fmt=style, label=label, capsize=3)
  axes.set_xlabel('bytes on disk, % of bfloat16')
  axes.set_ylabel('perplexity ratio to dense')
  axes.set_yscale('log')
  axes.grid(True, which='both', color='#e5e5e5')
  axes.legend(frameon=False)
  figure.savefig(path, dpi=150)


if __name__ == '__main__':
  sys.exit(main())
