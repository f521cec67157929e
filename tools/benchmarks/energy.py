# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether the time of a token follows the budget that it was given.

  python -m tools.benchmarks.energy [--json=FILE] [--plot=FILE.png] \
      [--shape=4b] [--experts=16] [--complexity=gemma3-270m]

A model of a real shape whose feed-forward layers are mixtures in int4, random
weights, decoding in one compiled loop. Budgets are shares of the experts'
parameters; `gx.text.cost` counts bytes, and a `gx.text.Machine` that was fitted
to other budgets says how long a token is going to take. All are timed in turn,
in another order every round. Then budgets in seconds, from that machine: how
long tokens really take. With `--complexity` the checkpoint estimates how hard
some prompts are, each of which gets the budget of its own.
"""

from collections.abc import Mapping, Sequence
import math
import sys
from typing import Any

from absl import flags
import jax.numpy as jnp
import numpy as np
import scipy.stats

from gemma_ext import _cli
from gemma_ext import ckpts
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext import text
from gemma_ext.kernels import _cpu
from gemma_ext.text import _loop
from tools.benchmarks import _shapes
from tools.benchmarks import _timing

_CONTEXT = 16
_CACHE = 1024
_WEIGHTS = recipe_lib.Int(bits=4, group=128)
# Of the way from one expert a layer to all of them, in time.
_ASKED = (0.2, 0.4, 0.6, 0.8)
# From those that say what comes next to those that do not.
PROMPTS = (
  'one two three one two three one two three one two three one two three one',
  'Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday,',
  'The capital of France is Paris. The capital of Italy is Rome. The capital',
  'The history of the city begins in the year in which the river was crossed',
  'quartz lamp verb olive seven beneath trumpet glacier unless copper tax moth',
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  string = lambda name, default, text: flags.DEFINE_string(
    name, default, text, flag_values=values
  )
  integer = lambda name, default, least, text: flags.DEFINE_integer(
    name, default, text, lower_bound=least, flag_values=values
  )
  string('shape', '4b', 'Of a model.')
  integer('experts', 16, 2, 'Slices of the neurons.')
  integer('rounds', 15, 1, 'Rounds.')
  integer('tokens', 3, 1, 'Tokens of a budget in a round.')
  flags.DEFINE_list(
    'budgets',
    ['12.5%', '25%', '37.5%', '50%', '62.5%', '75%', '87.5%', '100%'],
    'That are judged.',
    flag_values=values,
  )
  flags.DEFINE_list(
    'calibration',
    ['7%', '32%', '57%', '82%'],
    'Budgets that the machine is fitted to, none of those.',
    flag_values=values,
  )
  string('complexity', None, 'Checkpoint that reads the prompts.')
  string('json', None, 'File for the results.')
  string('plot', None, 'File for a picture.')


class Decoder:
  """One compiled loop that decodes under any budget.

  Attributes:
    model: The model.
    params: Its parameters, every expert running.
  """

  def __init__(self, name: str, experts: int, tokens: int):
    """Compiles it.

    Args:
      name: Shape.
      experts: Slices of the neurons of every layer.
      tokens: Of a measurement.
    """
    method = recipe_lib.MoE(
      num_experts=experts, top_k=experts, weights=_WEIGHTS
    )
    recipe = recipe_lib.Recipe(
      rules=((r'layer_\d+/mlp', method), ('.*', _WEIGHTS))
    )
    self.model, self.params = _shapes.compressed(name, recipe)
    self._tokens = tokens
    # Of this loop alone: others may be there already.
    self._before = _loop.advance._cache_size()  # pylint: disable=protected-access
    cache = self.model.init_cache(
      batch_size=1, dtype=jnp.bfloat16, cache_length=_CACHE
    )
    self._loop = _shapes.Decoding(
      self.model, self.params, cache, context=_CONTEXT
    )
    self._loop.seconds(tokens)

  @property
  def compilations(self) -> int:
    """How often the loop was compiled."""
    now = _loop.advance._cache_size()  # pylint: disable=protected-access
    return now - self._before

  def times(
    self, settings: Mapping[str, Any], rounds: int
  ) -> dict[str, list[float]]:
    """Seconds of a token, one number a round, by name of the parameters."""
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in settings}
    for i in range(rounds):
      # What drifts within a round must not look like a budget.
      for name in rng.permutation(list(settings)):
        self._loop.params = settings[name]
        found[name].append(self._loop.seconds(self._tokens))
      last = ', '.join(f'{k} {1e3 * v[-1]:.1f}' for k, v in found.items())
      _cli.note(f'round {i + 1} of {rounds}, ms: {last}')
    return found

  def under(self, budget: str | text.Budget, **kwargs: Any) -> dict[str, Any]:
    """Parameters of a budget."""
    return text.with_budget(self.model, self.params, budget, **kwargs)


def correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
  """Pearson's, with the 95% interval of Fisher's transformation.

  Args:
    x: Numbers, four or more for an interval.
    y: As many.
  """
  r = float(np.corrcoef(x, y)[0, 1])
  low = high = None
  if len(x) > 3 and abs(r) < 1:
    width = scipy.stats.norm.ppf(0.975) / math.sqrt(len(x) - 3)
    low, high = (
      math.tanh(math.atanh(r) + sign * width) for sign in (-1.0, 1.0)
    )
  return {'pearson': r, 'ci95': [low, high], 'n': len(x)}


def _k(decoder: Decoder, params: Mapping[str, Any]) -> dict[str, int]:
  """Experts by layer."""
  paths = gx_nn.mixtures_of(decoder.model.model, decoder.model.recipe)
  found = {}
  for path in paths:
    leaf: Any = params
    for name in (*path.split('/'), 'router', 'k'):
      leaf = leaf[name]
    found[path] = int(leaf)
  return found


def _follow(decoder: Decoder, args: Any) -> tuple[dict[str, Any], text.Machine]:
  """Times of the budgets beside what a fitted machine says."""
  names = [*args.budgets, *args.calibration]
  settings = {name: decoder.under(name) for name in names}
  experts = {name: _k(decoder, p) for name, p in settings.items()}
  for name in args.calibration:
    if any(experts[name] == experts[other] for other in args.budgets):
      raise errors.ConfigError(
        f'--calibration: {name} is as many experts as one of --budgets.'
      )
  costs = {n: text.cost(decoder.model, p) for n, p in settings.items()}
  times = decoder.times(settings, args.rounds)
  median = {name: float(np.median(t)) for name, t in times.items()}
  machine = text.Machine.of(
    [costs[n] for n in args.calibration], [median[n] for n in args.calibration]
  )
  if not machine.seconds_per_byte:
    raise errors.DataError(
      'Tokens of --calibration take no longer with more experts; no machine'
      ' can be fitted. Is other work running?'
    )
  predicted = {name: machine.seconds_of(c) for name, c in costs.items()}
  said = [predicted[n] for n in args.budgets]
  of_rounds = [
    float(np.corrcoef(said, [times[n][i] for n in args.budgets])[0, 1])
    for i in range(args.rounds)
  ]
  off = {n: predicted[n] / median[n] - 1 for n in args.budgets}
  return {
    'machine_fitted': {
      'seconds_per_byte': machine.seconds_per_byte,
      'seconds': machine.seconds,
      'on': args.calibration,
    },
    'settings': {
      name: {
        'judged': name in args.budgets,
        'experts_of_a_layer': sorted(set(experts[name].values())),
        'bytes': costs[name].nbytes,
        'active_parameters': costs[name].parameters,
        'joules': machine.joules_of(costs[name]),
        'predicted_seconds': predicted[name],
        'measured_seconds': _timing.summary(times[name]),
      }
      for name in names
    },
    'correlation': correlation(said, [median[n] for n in args.budgets]),
    'correlation_of_a_round': _timing.summary(of_rounds),
    'largest_relative_error': max(map(abs, off.values())),
    'mean_relative_error': float(np.mean([abs(v) for v in off.values()])),
  }, machine


def _asked(
  decoder: Decoder, machine: text.Machine, args: Any
) -> dict[str, Any]:
  """Budgets in seconds and joules, from the fitted machine."""
  least, most = (
    text.cost(decoder.model, decoder.params, dict.fromkeys(paths, k))
    for paths in [_k(decoder, decoder.params)]
    for k in (1, args.experts)
  )
  found: dict[str, Any] = {}
  settings: dict[str, Any] = {}
  for i, share in enumerate(_ASKED):
    field = ('seconds', 'joules')[i % 2]
    ends = [getattr(machine, f'{field}_of')(each) for each in (least, most)]
    value = ends[0] + share * (ends[1] - ends[0])
    unit = {'seconds': 'ms', 'joules': 'mJ'}[field]
    name = f'{1e3 * value:.4g}{unit}'
    settings[name] = decoder.under(name, machine=machine)
    cost = text.cost(decoder.model, settings[name])
    found[name] = {
      'experts_of_a_layer': sorted(set(_k(decoder, settings[name]).values())),
      'joules': machine.joules_of(cost),
      'predicted_seconds': machine.seconds_of(cost),
    }
    if field == 'seconds':
      found[name]['asked_seconds'] = value
    else:
      found[name]['asked_joules'] = value
  for name, times in decoder.times(settings, args.rounds).items():
    found[name]['measured_seconds'] = _timing.summary(times)
  return found


def _prompts(decoder: Decoder, args: Any) -> list[dict[str, Any]]:
  """Budgets of prompts by how hard a checkpoint finds them."""
  loaded = ckpts.load(args.complexity)
  found: list[dict[str, Any]] = []
  settings = {}
  for prompt in PROMPTS:
    tokens = loaded.tokenizer.encode(prompt, add_bos=True)
    bits = text.complexity(loaded.model, loaded.params, tokens)
    budget = text.active_for(bits)
    settings[prompt] = decoder.under(budget)
    found.append(
      {
        'prompt': prompt,
        'bits': bits,
        'active': budget.active,
        'experts_of_a_layer': sorted(
          set(_k(decoder, settings[prompt]).values())
        ),
      }
    )
  del loaded
  times = decoder.times(settings, args.rounds)
  for row in found:
    row['measured_seconds'] = _timing.summary(times[row['prompt']])
  return found


def _run(args: Any) -> None:
  for file in (args.json, args.plot):
    _cli.check_output(file)
  if args.shape not in _shapes.MODELS:
    raise errors.ConfigError(f'--shape: none of {[*_shapes.MODELS]}.')
  if len(args.budgets) < 2 or len(args.calibration) < 2:
    raise errors.ConfigError('--budgets and --calibration: two of each.')
  most = len(args.budgets) + len(args.calibration) + len(_ASKED)
  most += len(PROMPTS) if args.complexity else 0
  if args.tokens * (args.rounds * most + 1) + _CONTEXT > _CACHE:
    raise errors.ConfigError(
      f'--rounds and --tokens decode more than {_CACHE - _CONTEXT} tokens.'
    )
  _cli.note(f'{args.shape}: compiling ...')
  decoder = Decoder(args.shape, args.experts, args.tokens)
  result: dict[str, Any] = {
    'machine': _timing.machine() | {'instructions': _cpu.instructions()},
    'shape': args.shape,
    'experts': args.experts,
    'weights': repr(_WEIGHTS),
    'bytes': _shapes.nbytes(decoder.params),
  }
  found, machine = _follow(decoder, args)
  result |= found
  result['asked'] = _asked(decoder, machine, args)
  if args.complexity:
    result['prompts'] = _prompts(decoder, args)
  result['compilations'] = decoder.compilations
  _report(result)
  if args.json:
    _cli.write_json(args.json, result)
  if args.plot:
    _plot(result, args.plot)


def _report(result: Mapping[str, Any]) -> None:
  def ms(cell):
    median, (low, high) = cell['median'], cell['ci95']
    ends = '' if low is None else f' [{1e3 * low:.1f}, {1e3 * high:.1f}]'
    return f'{1e3 * median:.1f}{ends}'

  rows = []
  cells = result['settings'] | result['asked']
  cells |= {f'{r["bits"]:.2f} bits': r for r in result.get('prompts', ())}
  for name, cell in cells.items():
    k = cell['experts_of_a_layer']
    said = cell.get('predicted_seconds')
    rows.append(
      (
        name if cell.get('judged', True) else f'{name} (fitted to)',
        '-'.join(map(str, sorted({k[0], k[-1]}))),
        f'{cell["joules"]:.3f}' if 'joules' in cell else '',
        f'{1e3 * said:.1f}' if said else '',
        ms(cell['measured_seconds']),
      )
    )
  _cli.print_table(
    f'{result["shape"]}, {result["experts"]} experts, one token',
    ('budget', 'experts', 'J', 'predicted ms', 'measured ms'),
    rows,
  )
  r = result['correlation']
  ends = _cli.human_interval(r['ci95'], 4) if r['ci95'][0] is not None else ''
  print(
    f'correlation {r["pearson"]:.4f} {ends}; largest error'
    f' {result["largest_relative_error"]:.1%}; compiled'
    f' {result["compilations"]} times'
  )


def _plot(result: Mapping[str, Any], path: str) -> None:
  import matplotlib.figure  # pylint: disable=g-import-not-at-top

  figure = matplotlib.figure.Figure(figsize=(5.2, 4), layout='constrained')
  axes = figure.subplots()
  for label, judged, style in (
    ('judged', True, 'o'),
    ('fitted to', False, 'x'),
  ):
    points = [
      (1e3 * c['predicted_seconds'], 1e3 * c['measured_seconds']['median'])
      for c in result['settings'].values()
      if c['judged'] == judged
    ]
    axes.plot(*zip(*points, strict=True), style, label=label)
  ends = axes.get_xlim()
  axes.plot(ends, ends, '-', color='#bbbbbb', zorder=0)
  axes.set_xlabel('predicted, ms a token')
  axes.set_ylabel('measured, ms a token')
  axes.set_title(f'correlation {result["correlation"]["pearson"]:.4f}')
  axes.grid(True, color='#e5e5e5')
  axes.legend(frameon=False)
  figure.savefig(path, dpi=150)


if __name__ == '__main__':
  sys.exit(main())
