# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Would other candidates pay? What budgets would gain by them.

  python -m tools.benchmarks.candidates --sensitivities=FILE.json \
      [--budgets=28%,20%] [--every=3] [--json=FILE]

Fits the weights of the layers, or of every third one, with methods that are not
among the candidates of budgets, adds them, and lets the same knapsack choose
with and without them, for the bytes that a budget of the whole model spends on
these weights:

* low rank: integers and a correction of rank 8 to 64, the best that there are:
  those that lose least under the curvature of the weight, in closed form (after
  EoRA, arXiv 2410.21271, with the Fisher information of the outputs as well).
  They are better here than they can be: their factors take one byte a number,
  without scales and without errors of their own;
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
from gemma_ext import kernels
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _compress
from tools.benchmarks import _texts
from tools.benchmarks import _timing

_RANKS = (8, 16, 32, 64)
_BASES = tuple(
  recipe_lib.Int(bits=bits, group=group, scale='e4m3')
  for bits, group in ((2, 32), (3, 64), (3, 32), (4, 64), (4, 32), (5, 32))
)
_OTHERS = {
  'planes': tuple(m for m in gx_compress.MORE_CANDIDATES if m.pattern is None),
  'N:M': tuple(m for m in gx_compress.MORE_CANDIDATES if m.pattern is not None),
}
_LOW_RANK = 'low rank'


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


class _Weight:
  """A weight, and what an error of it costs."""

  def __init__(self, w: Any, site: gx_nn.Site, of: gx_compress.Statistics):
    self.w, self.site = w, site
    self.known = _compress.fitting(site, of)
    hessian = np.asarray(of.hessian(site.path), np.float64)
    ridge = 1e-6 * np.mean(np.diag(hessian)) + 1e-30
    self.root = np.linalg.cholesky(hessian + ridge * np.eye(len(hessian)))
    self.fisher = np.sqrt(of.outputs[site.path].astype(np.float64))
    rows = np.asarray(site.layout.to_rows(w), np.float32)
    self.dense = rows.reshape(-1, site.layout.cols)

  def fitted(self, method: recipe_lib.Method) -> tuple[int, np.ndarray] | None:
    """Bytes, and the error in units of its cost; none if it does not fit."""
    cols = self.site.layout.cols
    try:
      fmt = gx_nn.format_of(method, cols)
    except errors.GroupSizeError:
      return None
    leaf = _compress.compress_weight(self.w, self.site, method, **self.known)
    got = np.asarray(kernels.dequantize(leaf, fmt, cols, dtype=jnp.float32))
    error = (self.dense - got.reshape(self.dense.shape)) @ self.root
    return fmt.nbytes(self.site.layout.rows, cols), self.fisher[:, None] * error

  def order(self) -> dict[str, tuple[float, float]]:
    """Loss with and without activation order, by method."""
    cols = self.site.layout.cols
    dense = jnp.asarray(self.dense)
    found = {}
    for method in _BASES:
      try:
        fmt = gx_nn.format_of(method, cols)
      except errors.GroupSizeError:
        continue
      losses = []
      for yes in (True, False):
        codes, scale = gx_compress.compensate(
          dense,
          method=method,
          fmt=fmt,
          hessian=self.known['hessian'],
          activation_order=yes,
        )
        wide = jnp.repeat(scale.astype(jnp.float32), fmt.group, axis=-1)
        error = np.asarray(dense - codes * wide) @ self.root
        losses.append(0.5 * float(np.sum((self.fisher[:, None] * error) ** 2)))
      found[f'int{method.bits} g{method.group}'] = (losses[0], losses[1])
    return found

  def candidates(self) -> dict[str, list[gx_compress.Candidate]]:
    """Candidates by family."""
    found: dict[str, list[gx_compress.Candidate]] = {_LOW_RANK: []}
    add = lambda family, method, nbytes, square: found.setdefault(
      family, []
    ).append(
      gx_compress.Candidate(method=method, nbytes=nbytes, loss=0.5 * square)
    )
    for method in _BASES:
      fit = self.fitted(method)
      if fit is None:
        continue
      squares = np.linalg.svd(fit[1], compute_uv=False) ** 2
      for rank in _RANKS:
        if rank < min(self.dense.shape):
          nbytes = fit[0] + rank * sum(self.dense.shape)
          add(_LOW_RANK, method, nbytes, float(squares[rank:].sum()))
    for family, methods in _OTHERS.items():
      for method in methods:
        fit = self.fitted(method)
        if fit is not None:
          add(family, method, fit[0], float(np.sum(np.square(fit[1]))))
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
  for family in (_LOW_RANK, *_OTHERS):
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
        'kinds': sorted({path.rpartition('/')[2] for path in picked}),
      }
    )
  return rows


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
    weight = _Weight(flat[site.path], site, statistics)
    orders.append(weight.order())
    if args.budgets:
      added[site.path] = weight.candidates()
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
