# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Quality of a dense model's feed-forward layers as mixtures of experts.

  python -m tools.benchmarks.moe --output=DIR [--active=75%,50%,25%] \
      [--healed=DIR,...] [--json=FILE] [--plot=FILE.png]

Carves the experts, measures what leaving some out costs in each layer, chooses
how many each layer gets at every share of active neurons, and measures the
perplexity of the test split beside the dense model's, paired by document, with
95% intervals. Two controls run through the same code at the same shares: the
neurons that contribute most, always the same ones, and random experts with a
random router. --healed names directories of `python -m gemma_ext.train` to
measure in the same run. What is there already is not measured again.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
import re
import sys
import time
from typing import Any

from absl import flags
from flax import traverse_util
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
from gemma_ext.compress import _carve
from tools.benchmarks import _timing

_WINDOW = 512
# Windows of the calibration text that curves are measured on.
_CURVES = 4


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  def string(name: str, default: str | None, text: str) -> None:
    flags.DEFINE_string(name, default, text, flag_values=values)

  def integer(name: str, default: int, text: str, least: int = 1) -> None:
    flags.DEFINE_integer(name, default, text, least, flag_values=values)

  string('checkpoint', 'gemma3-270m', 'The dense checkpoint.')
  string('output', None, 'Directory for what was measured.')
  integer('experts', 64, 'Slices of each layer, shared ones among them.')
  integer('shared', 0, 'Experts that always run.', 0)
  flags.DEFINE_enum(
    'router', 'norm', ['norm', 'gate'], 'See `gx.MoE`.', flag_values=values
  )
  flags.DEFINE_list(
    'active',
    ['75%', '50%', '25%'],
    'Shares of the neurons that run.',
    flag_values=values,
  )
  flags.DEFINE_list(
    'healed', [], 'Directories of healed mixtures.', flag_values=values
  )
  flags.DEFINE_boolean('controls', True, 'Also the two.', flag_values=values)
  string('text', 'sample', 'Text, as evaluate takes it; it is split.')
  integer('tokens', 32_768, 'Tokens to carve on.')
  integer('max_tokens', 20_440, 'Tokens to measure on.')
  flags.DEFINE_enum(
    'dtype',
    'bfloat16',
    ['bfloat16', 'float32'],
    'Of what is not packed.',
    flag_values=values,
  )
  string('json', None, 'File for the results.')
  string('plot', None, 'PNG to draw.')


class _Bench:
  """What all points share."""

  def __init__(self, args: Any):
    self.args = args
    self.dense = ckpts.load(args.checkpoint, dtype=jnp.dtype(args.dtype))
    documents = data.split(tuple(data.load_documents(args.text)))
    cut = functools.partial(data.windows, self.dense.tokenizer, length=_WINDOW)
    self.windows = cut(documents.test.documents, max_tokens=args.max_tokens)
    self.tokens = cut(
      documents.calibration.documents, max_tokens=args.tokens
    ).tokens
    method = recipe_lib.MoE(
      num_experts=args.experts - args.shared,
      top_k=args.experts - args.shared,
      shared=args.shared,
      router=args.router,
    )
    self.recipe = recipe_lib.Recipe.of({r'layer_\d+/mlp2?': method})
    self.model = gx_nn.Compressed(model=self.dense.model, recipe=self.recipe)
    # Controls choose by linear routers, of 64 experts at most.
    count = min(64, method.num_experts)
    method = dataclasses.replace(
      method, num_experts=count, top_k=count, router='norm'
    )
    self.control_recipe = recipe_lib.Recipe.of({r'layer_\d+/mlp2?': method})
    self.control = gx_nn.Compressed(
      model=self.dense.model, recipe=self.control_recipe
    )

  @functools.cached_property
  def baseline(self) -> evals.PerplexityResult:
    return evals.perplexity(
      self.dense.model, self.dense.params, self.windows, progress=True
    )

  def measure(
    self, name: str, model: Any, params: Mapping[str, Any], **more: Any
  ) -> dict[str, Any]:
    """The result of a model, measured if it is not there."""
    found = evals.perplexity(model, params, self.windows, progress=True)
    paired = evals.paired_json(evals.paired_ratio(found, self.baseline))
    return {
      'name': name,
      'perplexity': found.to_json()['perplexity'],
      'dtype': self.args.dtype,
      'ratio': paired['ratio'],
      'ci95': paired['ci95'],
      **more,
    }


def _pruned(bench: _Bench) -> dict[str, Any]:
  """The neurons that contribute most first, and a router that never changes."""

  def change(mixture, flat, x):
    gate, down = _carve.weights_of(flat, mixture.path)
    norms = np.linalg.norm(down, axis=1)
    # pylint: disable=protected-access
    found = np.asarray(_carve._contributions(x[:4096], gate, norms))
    _carve.reorder(flat, mixture, np.argsort(-np.square(found).mean(axis=0)))
    count = mixture.method.num_experts
    return np.zeros((count, mixture.features)), -np.arange(count)

  return _control(bench, change)


def _random(bench: _Bench) -> dict[str, Any]:
  """Experts and routers by chance."""
  rng = np.random.default_rng(0)

  def change(mixture, flat, x):
    del x
    _carve.reorder(flat, mixture, rng.permutation(mixture.hidden))
    count = mixture.method.num_experts
    return rng.standard_normal((count, mixture.features)), np.zeros(count)

  return _control(bench, change)


def _control(bench: _Bench, change: Any) -> dict[str, Any]:
  layers = gx_nn.mixtures_of(bench.dense.model, bench.control_recipe)
  flat = traverse_util.flatten_dict(bench.dense.params, sep='/')
  few = bench.tokens[: 4096 // _WINDOW]
  for path, x in _carve.inputs_of(
    bench.dense.model, bench.dense.params, few, list(layers)
  ):
    w, bias = change(layers[path], flat, x)
    flat |= {
      f'{path}/router/w': jnp.asarray(w, jnp.bfloat16),
      f'{path}/router/bias': jnp.asarray(bias, jnp.bfloat16),
      f'{path}/router/k': jnp.int32(layers[path].method.top_k),
      f'{path}/router/threshold': jnp.bfloat16(-1e30),
    }
  return traverse_util.unflatten_dict(flat, sep='/')


def _points(bench: _Bench) -> Iterator[tuple[str, Any]]:
  """Names, and what makes the result."""
  shares = [float(text.removesuffix('%')) / 100 for text in bench.args.active]

  @functools.cache
  def carved():
    begun = time.monotonic()
    params = gx_compress.compress(
      bench.dense.model,
      bench.dense.params,
      bench.recipe,
      calibration=bench.tokens,
      progress=True,
    )
    seconds = time.monotonic() - begun
    curves = gx_compress.expert_curves(
      bench.model, params, bench.tokens[:_CURVES], progress=True
    )
    return params, curves, seconds

  def every():
    params, curves, seconds = carved()
    return bench.measure(
      'all experts',
      bench.model,
      params,
      active=1.0,
      carving_seconds=seconds,
      curves=curves.to_json(),
    )

  def chosen(share):
    params, curves, _ = carved()
    k = gx_compress.choose_experts(curves, share)
    return bench.measure(
      f'carved {share:.0%}',
      bench.model,
      gx_compress.with_experts(bench.model, params, k),
      active=curves.active(k),
      predicted_loss=curves.cost(k),
      experts=k,
    )

  def control(name, make, share):
    params = gx_compress.with_experts(
      bench.control, make(), _uniform(bench, share)
    )
    return bench.measure(
      f'{name} {share:.0%}', bench.control, params, active=share
    )

  yield 'all experts', every
  for share in shares:
    yield f'carved {share:.0%}', functools.partial(chosen, share)
  if bench.args.controls:
    for name, make in (('pruned', _pruned), ('random', _random)):
      for share in shares:
        yield (
          f'{name} {share:.0%}',
          functools.partial(
            control, name, functools.partial(make, bench), share
          ),
        )
  for folder in bench.args.healed:
    yield folder, functools.partial(_healed, bench, folder)


def _uniform(bench: _Bench, share: float) -> dict[str, int]:
  return {
    path: max(1, round(share * m.method.slices) - m.method.shared)
    for path, m in gx_nn.mixtures_of(
      bench.dense.model, bench.control_recipe
    ).items()
  }


def _healed(bench: _Bench, folder: str) -> dict[str, Any]:
  loaded = ckpts.load(folder, dtype=jnp.dtype(bench.args.dtype))
  mixtures = gx_nn.mixtures_of(loaded.model.model, loaded.recipe)
  if not mixtures:
    raise errors.RecipeError(f'{folder} has no mixtures of experts.')
  flat = traverse_util.flatten_dict(loaded.params, sep='/')
  some = sum(
    (m.method.shared + int(flat[f'{path}/router/k'])) * m.size
    for path, m in mixtures.items()
  )
  every = sum(m.hidden for m in mixtures.values())
  return bench.measure(
    f'healed {pathlib.Path(folder).name}',
    loaded.model,
    loaded.params,
    active=some / every,
  )


def _run(args: Any) -> None:
  if not args.output:
    raise errors.DataError('Nowhere to write: give --output=DIR.')
  for path in (args.json, args.plot):
    _cli.check_output(path)
  for share in args.active:
    if not re.fullmatch(r'\d{1,3}(\.\d+)?%', share):
      raise errors.DataError(f"A share looks like '75%', got {share!r}.")
  if args.experts <= args.shared:
    raise errors.DataError(f'{args.shared} of {args.experts} experts shared.')
  folder = pathlib.Path(args.output)
  folder.mkdir(parents=True, exist_ok=True)
  bench = _Bench(args)
  rows = []
  for name, make in _points(bench):
    file = folder / f'{re.sub(r"[^A-Za-z0-9.]+", "_", name)}.json'
    if file.exists():
      rows.append(json.loads(file.read_text()))
    else:
      _cli.note(f'{name} ...')
      rows.append(make())
      _cli.write_json(str(file), rows[-1])
    row = rows[-1]
    low, high = row['ci95']
    print(
      f'{row["name"]:<28} {row["active"]:>7.1%} active'
      f'  ratio {row["ratio"]:.4f} [{low:.4f}, {high:.4f}]',
      flush=True,
    )
  out = {
    'machine': _timing.machine(),
    'experts': args.experts,
    'router': args.router,
    'shared': args.shared,
    'tokens': args.tokens,
    'dense_perplexity': bench.baseline.to_json()['perplexity'],
    'points': rows,
  }
  if args.json:
    _cli.write_json(args.json, out)
  if args.plot:
    plot(rows, args.plot)


def plot(rows: Sequence[Mapping[str, Any]], path: str) -> None:
  """Draws ratios against the share of neurons that run.

  Args:
    rows: Points of the result.
    path: PNG to write.
  """
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
  kinds = sorted({row['name'].split()[0] for row in rows} - {'all'})
  for kind in kinds:
    some = sorted(
      (row['active'], row['ratio'], *row['ci95'])
      for row in rows
      if row['name'].startswith(kind)
    )
    active, ratio, low, high = np.array(some).T
    axes.errorbar(
      100 * active,
      ratio,
      yerr=[ratio - low, high - ratio],
      marker='o',
      capsize=3,
      label=kind,
    )
  axes.axhline(1, color='0.7', lw=1)
  axes.set(
    xlabel='neurons that run, %',
    ylabel='perplexity, times the dense model',
    yscale='log',
  )
  axes.legend(frameon=False)
  figure.savefig(path, dpi=150)
  plt.close(figure)


if __name__ == '__main__':
  sys.exit(main())
