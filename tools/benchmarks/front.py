# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Quality against bytes: budgets beside uniform widths.

  python -m tools.benchmarks.front --output=DIR [--budgets=50%,35%,28%,20%] \
      [--json=FILE] [--plot=FILE.png]
  python -m tools.benchmarks.front --output=DIR --json=FILE --rounds=7

Every point is a directory that `gx.ckpts.save` wrote and `load` read: bytes are
those of the parameters on disk. Perplexity is that of the test split, its ratio
to the dense model paired by document, with a 95% interval; statistics are those
of two thirds of the calibration text, divergences of the others. Uniform widths
are fitted with the same statistics as budgets, and each is compared, document
by document, with the largest budget that takes no more bytes. What is there
already is not made again. The second command times all points of FILE, loaded
from DIR, in turn.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import math
import pathlib
import re
import sys
from typing import Any

from absl import flags
import jax.numpy as jnp
import numpy as np

from gemma_ext import _budgeted
from gemma_ext import _cli
from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import data
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext import recipe as recipe_lib
from gemma_ext import text as gx_text
from gemma_ext.compress import _heatmap
from tools.benchmarks import _texts
from tools.benchmarks import _timing

_DENSE = 'dense, bfloat16'
_PROMPT = 'The history of the lighthouse begins'
# Tokens of a text whose time is subtracted, and of one that is timed.
_FEW, _MANY = 16, 80
# Share of bfloat16 at which kinds of weights are measured, to correct them.
_CORRECTED = (0.45, 0.32, 0.22)
BUDGETS = tuple(
  f'{x}%'
  for x in ('55', '50', '45', '39', '35', '32', '28', '25', '21.5', '20')
)
UNIFORM = {
  f'int{bits} g{group}': recipe_lib.Int(bits=bits, group=group)
  for bits, group in (
    (8, 128),
    (6, 64),
    (5, 64),
    (4, 32),
    (3, 32),
  )
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  def string(name: str, default: str | None, text: str) -> None:
    flags.DEFINE_string(name, default, text, flag_values=values)

  _texts.define_flags(values)
  string('output', None, 'Directory for checkpoints and results.')
  flags.DEFINE_list('budgets', [*BUDGETS], 'Budgets.', flag_values=values)
  flags.DEFINE_list(
    'uniform', [*UNIFORM], 'Uniform widths, or none.', flag_values=values
  )
  flags.DEFINE_integer(
    'tokens', 12_288, 'Tokens to calibrate on.', 1, flag_values=values
  )
  flags.DEFINE_integer(
    'max_tokens', 20_440, 'Tokens of it.', lower_bound=1, flag_values=values
  )
  flags.DEFINE_float(
    'random_share',
    gx_compress.RANDOM_SHARE,
    'Share of random tokens in the statistics.',
    0,
    1,
    flag_values=values,
  )
  flags.DEFINE_integer(
    'rounds',
    0,
    'Rounds that the points of --json are timed for; else they are made.',
    lower_bound=0,
    flag_values=values,
  )
  string('json', None, 'File for the results.')
  string('plot', None, 'PNG to draw.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bench:
  """What all points share."""

  args: Any
  dense: ckpts.Checkpoint
  statistics: gx_compress.Statistics
  unseen: np.ndarray
  windows: data.Windows
  baseline: evals.PerplexityResult
  fits: gx_compress.Fits = dataclasses.field(default_factory=gx_compress.Fits)

  @property
  def made_of(self) -> dict[str, str]:
    """Hashes of the texts that points are made and measured with."""
    return {
      'statistics': self.statistics.text,
      'unseen': gx_compress.text_fingerprint(self.unseen),
      'test': self.windows.sha256,
    }

  def point(self, name: str, recipe: recipe_lib.Recipe) -> dict[str, Any]:
    """The result of a recipe, made and measured if it is not there."""
    folder = _folder(self.args.output, name)
    result = folder / 'result.json'
    if result.exists():
      found = json.loads(result.read_text())
      if (
        found['recipe'] == recipe.to_json()
        and found.get('made_of') == self.made_of
      ):
        return found
    _cli.note(f'{name}: fitting ...')
    params = gx_compress.compress(
      self.dense.model,
      self.dense.params,
      recipe,
      calibration=self.statistics,
      fits=self.fits,
      progress=True,
    )
    path = ckpts.save(
      folder,
      model=self.dense.model,
      params=params,
      tokenizer=self.dense.tokenizer,
      recipe=recipe,
      source=self.dense.source,
      overwrite=True,
    )
    del params
    loaded = ckpts.load(path, dtype=jnp.bfloat16)
    measured = gx_compress.divergence(
      self.dense.model,
      self.dense.params,
      loaded.model,
      loaded.params,
      self.unseen,
      progress=True,
    )
    quality = evals.perplexity(
      loaded.model, loaded.params, self.windows, progress=True
    )
    paired = evals.paired_json(evals.paired_ratio(quality, self.baseline))
    plan = gx_compress.plan(self.dense.model, recipe)
    _heatmap.plot(plan, path / 'bits.png')
    nbytes = ckpts.directory_bytes(path)['params']
    found = {
      'name': name,
      'window_nll': quality.window_nll.tolist(),
      'bytes': nbytes,
      'share': nbytes / (2 * plan.num_weights),
      'planned_bytes': plan.nbytes,
      'perplexity': quality.to_json()['perplexity'],
      'ratio': paired['ratio'],
      'ci95': paired['ci95'],
      'measured_loss': measured,
      'held_out_loss': math.log(paired['ratio']),
      'recipe': recipe.to_json(),
      'made_of': self.made_of,
    }
    _cli.write_json(str(result), found)
    return found


def _folder(output: str, name: str) -> pathlib.Path:
  """Where a point is: '28' of '28%'."""
  return pathlib.Path(output) / re.sub(r'[^\w.]+', '_', name).strip('_')


def _against(
  rows: Sequence[dict[str, Any]], baseline: evals.PerplexityResult
) -> None:
  """Sets `against` of uniform widths: a budget of no more bytes over them."""
  result = lambda row: dataclasses.replace(
    baseline, window_nll=np.asarray(row['window_nll'])
  )
  budgets = [row for row in rows if 'predicted_loss' in row]
  for row in rows:
    smaller = [b for b in budgets if b['bytes'] <= row['bytes']]
    if 'predicted_loss' in row or not smaller:
      continue
    best = max(smaller, key=lambda b: b['bytes'])
    paired = evals.paired_json(evals.paired_ratio(result(best), result(row)))
    row['against'] = {
      'name': best['name'],
      'bytes': best['bytes'],
      'ratio': paired['ratio'],
      'ci95': paired['ci95'],
    }


def _time(args: Any) -> None:
  """Times the points of a file and the dense model, and writes that there."""
  result = json.loads(pathlib.Path(args.json).read_text())
  paths = {
    row['name']: _folder(args.output, row['name']) for row in result['points']
  }
  paths[_DENSE] = args.checkpoint
  runs = {}
  for name, path in paths.items():
    loaded = ckpts.load(path, dtype=jnp.bfloat16)
    runs[name] = functools.partial(_seconds_a_token, loaded)
    _cli.note(f'{name}: compiling ...')
    runs[name]()
  times = _timing.rounds(runs, args.rounds, _cli.note)
  speed = lambda name: [1 / t for t in times[name]]
  result['dense_tokens_per_second'] = _timing.summary(speed(_DENSE))
  cells = [(_DENSE, '', _timing.spread(speed(_DENSE)), '')]
  for row in result['points']:
    mine = times[row['name']]
    row['tokens_per_second'] = _timing.summary(speed(row['name']))
    ratios = [a / b for a, b in zip(times[_DENSE], mine, strict=True)]
    row['speedup'] = _timing.summary(ratios)
    cells.append(
      (
        row['name'],
        _cli.human_bytes(row['bytes']),
        _timing.spread(speed(row['name'])),
        _timing.spread(ratios),
      )
    )
  result['timed_on'] = _timing.machine()
  _cli.write_json(args.json, result)
  _cli.print_table(
    'decoding with the packed kernels, medians and 95% intervals',
    ('budget or width', 'on disk', 'tokens a second', 'over dense'),
    cells,
  )


def _seconds_a_token(loaded: ckpts.Checkpoint) -> float:
  """Seconds of a decoded token, prefill subtracted."""

  def run(count: int) -> None:
    stream = gx_text.stream(loaded, _PROMPT, max_new_tokens=count)
    for _ in stream:
      pass
    if len(stream.tokens) < count:
      raise errors.SamplingError(
        f'The text ended after {len(stream.tokens)} tokens; expected {count}.'
      )

  run(_FEW)  # What ran before has left the caches to itself.
  few = _timing.seconds(lambda: run(_FEW))
  return (_timing.seconds(lambda: run(_MANY)) - few) / (_MANY - _FEW)


def _bench(args: Any) -> _Bench:
  """Loads, measures the dense model, and collects statistics."""
  dense = ckpts.load(args.checkpoint, dtype=jnp.bfloat16)
  texts = _texts.Texts.of(
    dense, args.text, tokens=args.tokens, max_tokens=args.max_tokens
  )
  text = texts.calibration
  return _Bench(
    args=args,
    dense=dense,
    statistics=gx_compress.statistics(
      dense.model,
      dense.params,
      text.fitted,
      counted=text.counted,
      random_share=args.random_share,
      progress=True,
    ),
    unseen=text.unseen,
    windows=texts.test,
    baseline=evals.perplexity(
      dense.model, dense.params, texts.test, progress=True
    ),
  )


def _budget(share: float) -> gx_compress.Budget:
  return gx_compress.Budget(share=share)


def _sensitivities(bench: _Bench, path: pathlib.Path) -> Any:
  """Those of the file, or measured."""
  known = gx_compress.read_sensitivities(path) if path.exists() else None
  keep = lambda found: _cli.write_json(str(path), found.to_json())
  model, params = bench.dense.model, bench.dense.params
  found = gx_compress.sensitivities(
    model, params, bench.statistics, known=known, keep=keep, progress=True
  )
  names = _budgeted.reserve(found, params)
  plain = gx_compress.solve(found, _budget(1.0), reserve=names).plain_losses()
  done = min(len(found.corrections.get(kind, ())) for kind in plain)
  for share in _CORRECTED[done:]:
    found = gx_compress.corrected(
      gx_compress.solve(found, _budget(share), reserve=names),
      model,
      params,
      bench.statistics,
      bench.unseen,
      keep=keep,
      fits=bench.fits,
      progress=True,
    )
  return found


def _run(args: Any) -> None:
  if not args.output:
    raise errors.DataError('Nowhere to write: give --output=DIR.')
  if args.rounds:
    if not args.json or not pathlib.Path(args.json).exists():
      raise errors.DataError(f'--json={args.json}: no points to time.')
    _time(args)
    return
  _cli.check_output(args.json)
  _cli.check_output(args.plot)
  for name in args.uniform:
    if name not in UNIFORM:
      raise errors.ConfigError(f'--uniform: {name!r} is none of {[*UNIFORM]}.')
  budgets = {text: gx_compress.Budget.parse(text) for text in args.budgets}
  output = pathlib.Path(args.output)
  output.mkdir(parents=True, exist_ok=True)
  bench = _bench(args)
  found = _sensitivities(bench, output / 'sensitivities.json')
  rows: list[dict[str, Any]] = []
  names = _budgeted.reserve(found, bench.dense.params)
  for text, budget in budgets.items():
    allocation = gx_compress.solve(found, budget, reserve=names)
    row = bench.point(text, allocation.recipe)
    rows.append(row | {'predicted_loss': allocation.loss})
    _report(rows)
    _keep(bench, found, rows)
  for name in args.uniform:
    recipe = recipe_lib.Recipe(rules=(('.*', UNIFORM[name]),))
    rows.append(bench.point(name, recipe))
    _against(rows, bench.baseline)
    _report(rows)
    _keep(bench, found, rows)


def _keep(
  bench: _Bench,
  found: gx_compress.Sensitivities,
  rows: Sequence[Mapping[str, Any]],
) -> None:
  """Writes what there is by now, for those who look while it goes on."""
  args = bench.args
  if args.json:
    _cli.write_json(
      args.json,
      {
        'machine': _timing.machine(),
        'versions': evals.package_versions(),
        'checkpoint': args.checkpoint,
        'text': args.text,
        'tokens': int(bench.windows.num_scored),
        'corrections': found.corrections,
        'baseline_nll': bench.baseline.window_nll.tolist(),
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
      f'{row["measured_loss"]:.4f}',
      f'{row["held_out_loss"]:.4f}',
      f'{row["against"]["ratio"]:.4f}'
      f' {_cli.human_interval(row["against"]["ci95"], 4)}'
      f' ({row["against"]["name"]})'
      if 'against' in row
      else '',
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
      'budget over it',
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
  axes.yaxis.set_major_formatter('{x:.3g}')
  axes.yaxis.set_minor_formatter('{x:.3g}')
  axes.grid(True, which='both', color='#e5e5e5')
  axes.legend(frameon=False)
  figure.savefig(path, dpi=150)


if __name__ == '__main__':
  sys.exit(main())
