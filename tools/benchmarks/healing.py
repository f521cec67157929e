# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What each way of healing buys: every layer alone, made ternary and healed.

  python -m tools.benchmarks.healing --json=FILE [--layers=0,8] \
      [--methods=mse,fisher] [--plot=FILE.png]

Each cell is the perplexity ratio to the dense model on documents that neither
calibration nor healing saw, with a 95% interval, paired by document. Methods:
one_shot; gradients against the output of the dense layer, its error weighted as
mse, norm, fisher or fisher_full; and without gradients closed_form, evolution
(codes and scales, row by row), mezo (scales and norms) and mezo_codes (latent
codes, too). select_rows and select_global give mutants of the down projection
as many forward passes, and let each row choose its own or one loss choose for
all. The file is written after every cell, and the same command goes on
from there.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
import sys
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import _cli
from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import data
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext import train
from gemma_ext.train import _branch
from gemma_ext.train import _run

_WEIGHTINGS = ('mse', 'norm', 'fisher', 'fisher_full')
_METHODS = (
  'one_shot',
  *_WEIGHTINGS,
  *('closed_form', 'evolution', 'mezo', 'mezo_codes'),
  *('select_rows', 'select_global'),
)
_SETTINGS = (
  *('checkpoint', 'text', 'tokens', 'test_tokens', 'steps', 'batch_tokens'),
  *('window', 'planes', 'learning_rate'),
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _main, argv)


def _define_flags(values: flags.FlagValues) -> None:
  integer = lambda name, default, text: flags.DEFINE_integer(
    name, default, text, lower_bound=1, flag_values=values
  )
  string = lambda name, default, text: flags.DEFINE_string(
    name, default, text, flag_values=values
  )
  string('checkpoint', 'gemma3-270m', 'Dense checkpoint.')
  string('text', 'sample', 'Text; calibration and test take disjoint parts.')
  string('json', None, 'File of the results.')
  string('plot', None, 'PNG of the table.')
  string('cache', 'out/healing.calibration', 'Where calibrations are kept.')
  flags.DEFINE_list('layers', [], 'Numbers; all if empty.', flag_values=values)
  flags.DEFINE_list(
    'methods',
    ['one_shot', 'mse', 'fisher', 'fisher_full'],
    ', '.join(_METHODS),
    flag_values=values,
  )
  integer('tokens', 16_384, 'Tokens to calibrate on.')
  integer('test_tokens', 8192, 'Tokens to measure on.')
  integer('steps', 60, 'Steps of gradients.')
  integer('batch_tokens', 1024, 'Tokens of a gradient step.')
  integer('window', 512, 'Tokens of a window.')
  integer('planes', 1, 'Ternary planes of the layer.')
  flags.DEFINE_float(
    'learning_rate', 8e-3, 'Of gradients, for latents.', flag_values=values
  )


def stages(method: str, args: Any) -> tuple[Any, ...]:
  """How a method heals a layer."""
  gradient = train.Gradient(
    steps=args.steps,
    learning_rate=args.learning_rate,
    scale_rate=args.learning_rate / 2,
    norm_rate=args.learning_rate / 4,
  )
  match method:
    case 'one_shot':
      return ()
    case 'closed_form':
      return (train.Block(optimizer=train.ClosedForm(), weighting='norm'),)
    case 'evolution':
      return tuple(
        train.Block(
          optimizer=train.EvolveRows(
            steps=2, generations=generations, population=2
          ),
          weights=weights,
          weighting='fisher',
          batch_tokens=tokens,
        )
        for weights, generations, tokens in (
          ('gating_einsum', 200, 8192),
          ('linear', 1500, 16_384),
        )
      )
    case 'mezo' | 'mezo_codes':
      # As many forward passes as `evolution` judges mutants of every row:
      # (2 * 200 + 2 * 1500) * 2.
      codes = method == 'mezo_codes'
      return (
        train.Block(
          optimizer=train.Mezo(
            steps=850,
            pairs=4,
            form='latent' if codes else 'fixed',
            sigma=1e-2,
            learning_rate=1e-4 if codes else 1e-3,
          ),
          weighting='fisher',
          batch_tokens=args.batch_tokens,
        ),
      )
    case 'select_rows' | 'select_global':
      rows = method == 'select_rows'
      return (
        train.Block(
          optimizer=train.Evolution(
            steps=50,
            population=64,
            chunk=4,
            form='integer',
            discrete='select',
            fitness='unit' if rows else 'global',
            share=1.0 if rows else 0.05,
          ),
          weights='linear',
          weighting='fisher',
          batch_tokens=args.batch_tokens,
        ),
      )
    case _:
      return (
        train.Block(
          optimizer=gradient, weighting=method, batch_tokens=args.batch_tokens
        ),
      )


def _main(args: Any) -> None:
  for method in args.methods:
    if method not in _METHODS:
      raise errors.ConfigError(
        f'--methods: {method!r} is none of {", ".join(_METHODS)}.'
      )
  if not args.json:
    raise errors.ConfigError('Give --json=FILE; cells are kept there.')
  file = pathlib.Path(args.json)
  settings = {name: getattr(args, name) for name in _SETTINGS}
  cells = _saved(file, settings)
  done = {(c['layer'], c['method']) for c in cells}
  bench = _Bench(args)
  layers = [int(i) for i in args.layers] or list(range(bench.num_layers))
  for layer in layers:
    for method in args.methods:
      if (layer, method) in done:
        continue
      cells.append(bench.cell(layer, method))
      c = cells[-1]
      _cli.note(
        f'layer {layer}, {method}: {c["ratio"]:.4f} in {c["seconds"]:.0f} s'
      )
      _cli.write_json(
        str(file),
        {
          'settings': settings,
          'measured_tokens': bench.measured_tokens,
          'cells': cells,
        },
      )
  _table(cells, layers, args.methods)
  if args.plot:
    _plot(cells, layers, args.methods, args.plot)


def _saved(
  file: pathlib.Path, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Cells of an earlier run with the same settings."""
  if not file.exists():
    return []
  found = json.loads(file.read_text())
  if found['settings'] != settings:
    raise errors.ConfigError(
      f'{file} was measured with {found["settings"]}, not with {settings}.'
      ' Give another --json.'
    )
  return found['cells']


class _Bench:
  """The dense model, its calibration and the one-shot fit of every layer."""

  def __init__(self, args: Any):
    self._args = args
    self._method = recipe_lib.Ternary(group=128, planes=args.planes)
    self._config = train.Heal(
      checkpoint=args.checkpoint,
      text=args.text,
      tokens=args.tokens,
      window=args.window,
      recipe=recipe_lib.Recipe(rules=((r'layer_\d+/mlp', self._method),)),
    )
    self._dense = ckpts.load(args.checkpoint, dtype=jnp.bfloat16)
    assert self._dense.tokenizer is not None
    tokens = _run.tokens_of(self._config, self._dense.tokenizer)
    self._calibration = train.calibrate(
      self._dense.model,
      self._dense.params,
      tokens,
      directory=args.cache,
      progress=True,
    )
    everything = gx_nn.Compressed(
      model=self._dense.model, recipe=self._config.recipe
    )
    self._packed = gx_compress.compress(
      self._dense.model,
      self._dense.params,
      everything.recipe,
      calibration=tokens[: 8192 // args.window],
      progress=True,
    )
    split = data.split(tuple(data.load_documents(args.text)), seed=0)
    self._windows = data.windows(
      self._dense.tokenizer,
      split.test.documents,
      length=args.window,
      max_tokens=args.test_tokens,
    )
    self.measured_tokens = int(self._windows.num_scored)
    self._base = evals.perplexity(
      self._dense.model, self._dense.params, self._windows, progress=True
    )
    self.num_layers = self._dense.model.config.num_layers

  def cell(self, number: int, method: str) -> dict[str, Any]:
    """Heals one layer in one way and measures it."""
    layer = f'layer_{number}'
    model = gx_nn.Compressed(
      model=self._dense.model,
      recipe=recipe_lib.Recipe(rules=((rf'{layer}/mlp', self._method),)),
    )
    run = train.Run(
      config=self._config,
      dense=self._dense,
      model=model,
      params=_branch.with_params(
        self._dense.params, layer, _branch.params_of(self._packed, layer)
      ),
      calibration=self._calibration,
      log=[],
    )
    begun = time.monotonic()
    losses = [
      _heal_once(run, stage, layer, (self._config.seed, i))
      for i, stage in enumerate(stages(method, self._args))
    ]
    seconds = time.monotonic() - begun
    found = evals.perplexity(run.model, run.params, self._windows)
    paired = evals.paired_ratio(found, self._base)
    return {
      'layer': number,
      'method': method,
      'seconds': seconds,
      'held_out_losses': losses,
      **evals.paired_json(paired),
    }


def _heal_once(
  run: train.Run, stage: Any, layer: str, seed: tuple[int, ...]
) -> list[float]:
  """One stage of one layer; the held-out loss before and after."""
  task = stage.task(run, layer)
  key = jax.random.key(int(np.random.SeedSequence(seed).generate_state(1)[0]))
  moving = task.moving
  state = stage.optimizer.init(moving, key)
  before = task.held_out(moving)
  for step in range(stage.optimizer.steps):
    moving, state, _ = task.step(
      moving, state, task.batch(step, seed), jax.random.fold_in(key, step)
    )
  after = task.held_out(moving)
  if after < before:
    run.params = task.close(moving)
  return [before, after]


def _by_place(cells: Sequence[Mapping[str, Any]]) -> dict[Any, Any]:
  return {(c['layer'], c['method']): c for c in cells}


def _table(
  cells: Sequence[Mapping[str, Any]],
  layers: Sequence[int],
  methods: Sequence[str],
) -> None:
  found = _by_place(cells)

  def text(layer: int, method: str) -> str:
    c = found.get((layer, method))
    if c is None:
      return '-'
    return f'{c["ratio"]:.4f} {_cli.human_interval(c["ci95"], 4)}'

  rows = [(str(n), *(text(n, m) for m in methods)) for n in layers]
  means = []
  for method in methods:
    ratios = [found[n, method]['ratio'] for n in layers if (n, method) in found]
    means.append(f'{np.exp(np.mean(np.log(ratios))):.4f}' if ratios else '-')
  rows.append(('geometric mean', *means))
  _cli.print_table(
    'One layer ternary, the others dense: perplexity ratio',
    ('layer', *methods),
    rows,
  )


def _plot(
  cells: Sequence[Mapping[str, Any]],
  layers: Sequence[int],
  methods: Sequence[str],
  path: str,
) -> None:
  # Charts are no part of the benchmark; matplotlib is an extra.
  from matplotlib import figure  # pylint: disable=g-import-not-at-top

  found = _by_place(cells)
  fig = figure.Figure(figsize=(9, 4), layout='constrained')
  axes = fig.add_subplot()
  width = 0.8 / len(methods)
  for i, method in enumerate(methods):
    here = [n for n in layers if (n, method) in found]
    ratios = np.array([found[n, method]['ratio'] for n in here])
    ends = np.array([found[n, method]['ci95'] for n in here]).T
    axes.errorbar(
      np.array([layers.index(n) for n in here])
      + (i - len(methods) / 2) * width,
      ratios,
      yerr=np.abs(ends - ratios),
      fmt='o',
      capsize=2,
      label=method,
    )
  axes.set_xticks(range(len(layers)), [str(n) for n in layers])
  axes.set(
    xlabel='layer made ternary, the others dense',
    ylabel='perplexity ratio, 95% interval',
    yscale='log',
  )
  axes.axhline(1.0, color='0.6', linewidth=1)
  axes.legend()
  fig.savefig(path, dpi=150)


if __name__ == '__main__':
  sys.exit(main())
