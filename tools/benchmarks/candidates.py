# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Would other candidates pay? What budgets would gain by them.

  python -m tools.benchmarks.candidates --sensitivities=FILE.json \
      [--budgets=28%,20%] [--every=3] [--json=FILE]

Fits the weights of the layers, or of every third one, with methods that are not
among the candidates of budgets, adds them, and lets the same knapsack choose
with and without them, for the bytes that a budget of the whole model spends on
these weights:

* low rank: integers and a correction of rank 8 to 64, fitted and stored as a
  recipe has it (`gx.LowRank`);
* planes: ternary sums of two and three planes, free and tied;
* N:M: one ternary plane with 2 or 3 nonzeros among 4.

And what activation order is worth: the loss of the same weights in whole
numbers of 2 to 5 bits, fitted with it and without.

The file is one of `gemma_ext.compress --sensitivities` or of
`tools.benchmarks.front`, of the same checkpoint.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import re
import sys
from typing import Any

from absl import flags
from flax import traverse_util
import jax.numpy as jnp
import numpy as np
import tqdm

from gemma_ext import _budgeted
from gemma_ext import _cli
from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _sensitivity
from gemma_ext.compress import _weight
from tools.benchmarks import _texts
from tools.benchmarks import _timing

_INTEGERS = tuple(
  recipe_lib.Int(bits=bits, group=group, scale='e4m3')
  for bits, group in ((2, 32), (3, 64), (3, 32), (4, 64), (4, 32), (5, 32))
)


def _family(method: recipe_lib.Method) -> str:
  if isinstance(method, recipe_lib.LowRank):
    return 'low rank'
  assert isinstance(method, recipe_lib.Ternary)
  return 'planes' if method.pattern is None else 'N:M'


_FAMILIES = {
  family: tuple(m for m in gx_compress.MORE_CANDIDATES if _family(m) == family)
  for family in ('low rank', 'planes', 'N:M')
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  _texts.define_flags(values)
  flags.DEFINE_string('sensitivities', None, 'The file.', flag_values=values)
  flags.DEFINE_integer('tokens', 8192, 'Of it.', 1, flag_values=values)
  flags.DEFINE_integer(
    'every', 1, 'Of so many layers, one.', 1, flag_values=values
  )
  flags.DEFINE_list('budgets', ['28%', '20%'], 'Budgets.', flag_values=values)
  flags.DEFINE_string('json', None, 'File for the results.', flag_values=values)


def _order(
  w: Any, site: gx_nn.Site, statistics: gx_compress.Statistics
) -> dict[str, tuple[float, float]]:
  """Loss of a weight with and without activation order, by method."""
  cols = site.layout.cols
  dense = site.layout.to_rows(jnp.asarray(w, jnp.float32)).reshape(-1, cols)
  hessian = _weight.fitting(site, statistics)['hessian']
  found = {}
  for method in _INTEGERS:
    try:
      fmt = gx_nn.format_of(method, cols)
    except errors.GroupSizeError:
      continue
    losses = []
    for yes in (True, False):
      codes, scale = gx_compress.compensate(
        dense, method=method, fmt=fmt, hessian=hessian, activation_order=yes
      )
      wide = jnp.repeat(scale.astype(jnp.float32), fmt.group, axis=-1)
      loss = statistics.loss(site.path, dense - codes * wide)
      losses.append(float(np.sum(np.asarray(loss, np.float64))))
    found[f'int{method.bits} g{method.group}'] = (losses[0], losses[1])
  return found


def _with(
  found: gx_compress.Sensitivities,
  budget: gx_compress.Budget,
  reserve: int,
  added: Mapping[str, Mapping[str, Sequence[gx_compress.Candidate]]],
) -> list[dict[str, Any]]:
  """What some weights lose with more candidates, and who takes them."""
  whole = gx_compress.solve(found, budget, reserve=reserve)
  nbytes = sum(whole.choice[path].nbytes for path in added)

  def corrected(path, some):
    loss = whole.sensitivities.loss
    return tuple(dataclasses.replace(c, loss=loss(path, c)) for c in some)

  def solved(family=None):
    some = {
      path: corrected(
        path, (*found.candidates[path], *more.get(family or '', ()))
      )
      for path, more in added.items()
    }
    part = dataclasses.replace(
      found, candidates=some, corrections={}, other_bytes=0
    )
    return gx_compress.solve(part, gx_compress.Budget(nbytes=nbytes))

  without = solved().loss
  rows = []
  for family in _FAMILIES:
    got = solved(family)
    picked = [
      path
      for path, choice in got.choice.items()
      if choice in corrected(path, added[path].get(family, ()))
    ]
    rows.append(
      {
        'family': family,
        'bytes': nbytes,
        'loss': without,
        'loss_with': got.loss,
        'ratio': got.loss / without,
        'chosen': len(picked),
        'weights': len(added),
        'kinds': sorted({_kind(path) for path in picked}),
        'methods': sorted({str(got.choice[path].method) for path in picked}),
      }
    )
  return rows


def _kind(path: str) -> str:
  """The path of a weight without its layer, 'mlp/linear'."""
  return re.sub(r'layer_\d+/', '', path)


def _report_order(
  orders: Sequence[Mapping[str, tuple[float, float]]],
) -> dict[str, Any]:
  """Prints losses with activation order over those without, by method."""
  found: dict[str, Any] = {}
  for name in dict.fromkeys(name for order in orders for name in order):
    ratios = [
      order[name][0] / order[name][1] for order in orders if name in order
    ]
    found[name] = {
      'ratio': float(np.exp(np.mean(np.log(ratios)))),
      'least': min(ratios),
      'most': max(ratios),
      'weights': len(ratios),
    }
  _cli.print_table(
    'loss with activation order over that without, geometric mean of weights',
    ('method', 'ratio', 'from', 'to', 'weights'),
    [
      (
        name,
        *(f'{row[k]:.4f}' for k in ('ratio', 'least', 'most')),
        str(row['weights']),
      )
      for name, row in found.items()
    ],
  )
  return found


def _run(args: Any) -> None:
  if not args.sensitivities:
    raise errors.ConfigError('Give --sensitivities=FILE.json.')
  _cli.check_output(args.json)
  budgets = {text: gx_compress.Budget.parse(text) for text in args.budgets}
  found = gx_compress.read_sensitivities(pathlib.Path(args.sensitivities))
  dense = ckpts.load(args.checkpoint, dtype=jnp.bfloat16)
  texts = _texts.Texts.of(dense, args.text, tokens=args.tokens)
  statistics = gx_compress.statistics(
    dense.model, dense.params, texts.calibration.fitted, progress=True
  )
  flat = traverse_util.flatten_dict(dense.params, sep='/')
  sites = [
    site
    for site in gx_nn.sites(dense.model)
    if site.path in found.candidates
    and (layer := re.search(r'layer_(\d+)', site.path))
    and int(layer[1]) % args.every == 0
  ]
  added, orders = {}, []
  for site in tqdm.tqdm(sites, desc='candidates', unit='weight'):
    w = flat[site.path]
    orders.append(_order(w, site, statistics))
    if args.budgets:
      added[site.path] = {
        family: _sensitivity.fitted(w, site, methods, statistics)
        for family, methods in _FAMILIES.items()
      }
  ratios = _report_order(orders)
  if not budgets:
    if args.json:
      _cli.write_json(
        args.json, {'machine': _timing.machine(), 'activation_order': ratios}
      )
    return
  reserve = _budgeted.reserve(found, dense.params)
  out = [
    {'budget': name} | row
    for name, budget in budgets.items()
    for row in _with(found, budget, reserve, added)
  ]
  _cli.print_table(
    'predicted loss of these weights, nats a token',
    ('budget', 'with', 'without', 'with them', 'ratio', 'weights that take it'),
    [
      (
        row['budget'],
        row['family'],
        f'{row["loss"]:.5f}',
        f'{row["loss_with"]:.5f}',
        f'{row["ratio"]:.4f}',
        f'{row["chosen"]} of {row["weights"]}',
      )
      for row in out
    ],
  )
  if args.json:
    _cli.write_json(
      args.json,
      {
        'machine': _timing.machine(),
        'budgets': out,
        'activation_order': ratios,
      },
    )


if __name__ == '__main__':
  sys.exit(main())
