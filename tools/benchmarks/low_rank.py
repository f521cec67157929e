# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Would low-rank corrections of errors pay? What budgets would gain by them.

  python -m tools.benchmarks.low_rank --sensitivities=FILE.json \
      [--budgets=28%,20%] [--json=FILE]

For every weight of the layers, integers and a correction of rank 8 to 64 as
further candidates, the best ones that there are: those that lose least under
the curvature of the weight, in closed form (after EoRA, arXiv 2410.21271, with
the Fisher information of the outputs as well). They are better here than they
can be: their factors take one byte a number, without scales and without errors
of their own. The same knapsack chooses with and without them. The file is one
of `gemma_ext.compress --sensitivities` or of `tools.benchmarks.front`, of the
same checkpoint.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
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


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  _texts.define_flags(values)
  flags.DEFINE_string('sensitivities', None, 'The file.', flag_values=values)
  flags.DEFINE_integer('tokens', 8192, 'Of it.', 1, flag_values=values)
  flags.DEFINE_list('budgets', ['28%', '20%'], 'Budgets.', flag_values=values)
  flags.DEFINE_string('json', None, 'File for the results.', flag_values=values)


def _corrected(
  w: Any, site: gx_nn.Site, statistics: gx_compress.Statistics
) -> list[gx_compress.Candidate]:
  """Candidates with a correction."""
  known = _compress.fitting(site, statistics)
  hessian = np.asarray(statistics.hessian(site.path), np.float64)
  ridge = 1e-6 * np.mean(np.diag(hessian)) + 1e-30
  root = np.linalg.cholesky(hessian + ridge * np.eye(len(hessian)))
  fisher = np.sqrt(statistics.outputs[site.path].astype(np.float64))
  cols = site.layout.cols
  dense = np.asarray(site.layout.to_rows(w), np.float32).reshape(-1, cols)
  found = []
  for method in _BASES:
    try:
      fmt = gx_nn.format_of(method, cols)
    except errors.GroupSizeError:
      continue
    leaf = _compress.compress_weight(w, site, method, **known)
    got = np.asarray(kernels.dequantize(leaf, fmt, cols, dtype=jnp.float32))
    error = fisher[:, None] * ((dense - got.reshape(dense.shape)) @ root)
    squares = np.linalg.svd(error, compute_uv=False) ** 2
    for rank in _RANKS:
      if rank >= min(dense.shape):
        continue
      found.append(
        gx_compress.Candidate(
          method=method,
          nbytes=fmt.nbytes(site.layout.rows, cols) + rank * sum(dense.shape),
          loss=0.5 * float(squares[rank:].sum()),
        )
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
  sites = [s for s in gx_nn.sites(dense.model) if s.path in found.candidates]
  added = {
    site.path: _corrected(flat[site.path], site, statistics)
    for site in tqdm.tqdm(sites, desc='low rank', unit='weight')
  }
  more = dataclasses.replace(
    found,
    candidates={
      path: (*some, *added.get(path, ()))
      for path, some in found.candidates.items()
    },
  )
  reserve = _budgeted.reserve(found, dense.params)
  rows, out = [], []
  for name, budget in budgets.items():
    without = gx_compress.solve(found, budget, reserve=reserve)
    both = gx_compress.solve(more, budget, reserve=reserve)
    picked = [
      path
      for path, some in added.items()
      if any(both.choice[path] is c for c in some)
    ]
    row = {
      'budget': name,
      'loss': without.loss,
      'loss_with_low_rank': both.loss,
      'ratio': both.loss / without.loss,
      'chosen': len(picked),
      'weights': len(sites),
      'kinds': sorted({path.rpartition('/')[2] for path in picked}),
    }
    out.append(row)
    rows.append(
      (
        name,
        f'{without.loss:.5f}',
        f'{both.loss:.5f}',
        f'{row["ratio"]:.4f}',
        f'{len(picked)} of {len(sites)}',
      )
    )
  _cli.print_table(
    'predicted loss, nats a token',
    ('budget', 'without', 'with low rank', 'ratio', 'weights that take it'),
    rows,
  )
  if args.json:
    _cli.write_json(args.json, {'machine': _timing.machine(), 'budgets': out})


if __name__ == '__main__':
  sys.exit(main())
