# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sensitivities: of every weight and candidate, its bytes and its cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import _patterns
from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _candidates
from gemma_ext.compress import _compress
from gemma_ext.compress import _fingerprint
from gemma_ext.compress import _low_rank
from gemma_ext.compress import _plan
from gemma_ext.compress import _statistics
from gemma_ext.compress import _threads
from gemma_ext.compress import _weight

# Of a table of embeddings, and the rows that their ends are multiples of.
BANDS = 24
_BAND_STEP = 64
# Sizes of a bin of rows over that of the one before.
_BIN_GROWTH = 1.04
# Rows that are fitted of a weight, to tell what all of them cost.
_SAMPLE = 1024

# How scales of one byte are stored.
_BYTE = 'e4m3'
CANDIDATES: tuple[recipe_lib.Method, ...] = (
  recipe_lib.Ternary(group=16, packing='5trit', scale='ue5m3'),
  *(
    recipe_lib.Int(bits=bits, group=group, scale=scale)
    for bits, group, scale in (
      (2, 32, _BYTE),
      (3, 64, _BYTE),
      (3, 32, _BYTE),
      (4, 64, _BYTE),
      (4, 32, _BYTE),
      (5, 64, _BYTE),
      (5, 32, _BYTE),
      (5, 32, 'bf16'),
      (6, 64, _BYTE),
      (6, 32, _BYTE),
      (6, 32, 'bf16'),
      (7, 64, _BYTE),
      (8, 128, 'bf16'),
      (8, 32, 'bf16'),
    )
  ),
)
# Others that can be had: sums of planes, patterns of N among M, corrections of
# low rank. On the 270M a budget of 20% chose corrections for two of 20 weights,
# and none of 25% or 28% any of these; see `tools.benchmarks.candidates`.
MORE_CANDIDATES: tuple[recipe_lib.Method, ...] = (
  recipe_lib.Ternary(group=16, pattern=(2, 4), scale='ue5m3'),
  recipe_lib.Ternary(group=16, pattern=(3, 4), packing='3of4', scale='ue5m3'),
  recipe_lib.Ternary(planes=2, group=32, packing='5trit', scale='ue5m3'),
  recipe_lib.Ternary(planes=2, group=16, packing='5trit', scale='ue5m3'),
  *(
    recipe_lib.Ternary(
      planes=planes, group=group, packing='5trit', scale='ue5m3', tied=True
    )
    for planes, group in ((2, 16), (3, 32))
  ),
  *(
    recipe_lib.LowRank(
      weights=recipe_lib.Int(bits=bits, group=group, scale=_BYTE), rank=rank
    )
    for bits, group in ((2, 32), (3, 64), (3, 32), (4, 64))
    for rank in (8, 16, 32, 64)
  ),
)


def sensitivities(
  model: nn.Module,
  params: Mapping[str, Any],
  statistics: _statistics.Statistics,
  *,
  candidates: Sequence[recipe_lib.Method] | None = None,
  bands: int | None = None,
  known: _candidates.Sensitivities | None = None,
  keep: Callable[[_candidates.Sensitivities], None] = lambda found: None,
  progress: bool = False,
) -> _candidates.Sensitivities:
  """Fits every weight with every candidate and adds up what it costs.

  Args:
    model: The official model.
    params: Its dense parameters.
    statistics: Of `gx.compress.statistics`.
    candidates: Methods, for all weights; `CANDIDATES` by default.
    bands: Of the table of embeddings, bands of rows that have a choice each;
      `BANDS` by default.
    known: Results so far; weights in it are not fitted again.
    keep: Told the results so far after every weight, to be resumed from.
    progress: Whether to show a progress bar.

  Returns:
    The sensitivities. Routers, and weights that the statistics have not seen,
    are left out and stay dense.

  Raises:
    ParamsMismatchError: If the parameters do not belong to the model.
    RecipeError: If `known` was measured of something else.
  """
  candidates = CANDIDATES if candidates is None else candidates
  bands = BANDS if bands is None else bands
  flat = _compress.check_params(model, params)
  sites = {
    part.path: part
    for site in gx_nn.sites(model)
    # Routers stay dense, as in any recipe that does not name them: what they
    # choose jumps, which no second order sees.
    if site.path in statistics.inputs and _patterns.matches('.*', site.path)
    for part in (
      _parts(site, bands, statistics)
      if statistics.is_table(site.path)
      else (site,)
    )
  }
  wholes = {site.whole for site in sites.values()}
  ordered = {site.whole for site in sites.values() if site.ordered}
  abstract = _plan.abstract_params(model)
  size = lambda path: math.prod(abstract[path].shape)
  nbytes = lambda path: size(path) * abstract[path].dtype.itemsize
  mark = _fingerprint.of(flat, statistics.text, candidates, bands)
  if known is not None:
    _check(known, mark)
  found = dict(known.candidates) if known else {}
  result = _candidates.Sensitivities(
    candidates=found,
    weights=sum(map(size, abstract)),
    other_bytes=sum(nbytes(p) for p in abstract if p not in wholes)
    + sum(4 * sum(abstract[p].shape) for p in ordered),
    corrections=dict(known.corrections) if known else {},
    fingerprint=mark,
    measured=len(sites),
    rows={p: site.rows for p, site in sites.items() if site.rows is not None},
  )
  made = _threads.each(
    lambda site: fitted(flat[site.whole], site, candidates, statistics),
    {path: site for path, site in sites.items() if path not in found},
    desc='sensitivities',
    progress=progress,
  )
  for path, each in made:
    found[path] = each
    keep(result)
  ordered_found = {path: found[path] for path in sites if path in found}
  return dataclasses.replace(result, candidates=ordered_found)


def check_known(
  known: _candidates.Sensitivities,
  model: nn.Module,
  params: Mapping[str, Any],
  text: str,
  *,
  candidates: Sequence[recipe_lib.Method] | None = None,
  bands: int | None = None,
) -> None:
  """Raises an error unless these sensitivities are those of what is given.

  Args:
    known: What was measured.
    model: The official model.
    params: Its dense parameters.
    text: `Statistics.text`, or `gx.compress.text_fingerprint`.
    candidates: As of `sensitivities`.
    bands: As of `sensitivities`.

  Raises:
    ParamsMismatchError: If the parameters do not belong to the model.
    RecipeError: If they were measured of something else, saying of what.
  """
  flat = _compress.check_params(model, params)
  candidates = CANDIDATES if candidates is None else candidates
  bands = BANDS if bands is None else bands
  _check(known, _fingerprint.of(flat, text, candidates, bands))


def _check(known: _candidates.Sensitivities, mark: Mapping[str, str]) -> None:
  if differences := _fingerprint.differences(known.fingerprint, mark):
    raise errors.RecipeError(
      f'These sensitivities were measured with other {differences}. They are'
      ' kept as they are: give the path of another file, or remove this one, to'
      ' measure again.'
    )


def fitted(
  w: jax.Array,
  site: gx_nn.Site,
  methods: Sequence[recipe_lib.Method],
  statistics: _statistics.Statistics,
) -> tuple[_candidates.Candidate, ...]:
  """Returns the candidates of one weight, fitted on a sample of its rows.

  Corrections of low rank are fitted on all of them.

  Args:
    w: The dense weight, of a band of rows the whole table.
    site: Its site.
    methods: How it may be stored; those that do not fit are left out.
    statistics: Of the model.

  Returns:
    Those that none with as few bytes beats, smallest first.
  """
  cols = site.layout.cols
  order = statistics.order(site.whole) if site.ordered else None
  part = jnp.asarray(site.part(w, order))
  if site.centered:
    part = part.astype(jnp.float32) - _weight.mean_of(w)
  matrix = site.layout.to_rows(part)
  matrix = matrix.reshape(-1, cols)
  importance = statistics.importance(site.whole)
  numbers = site.part(np.arange(len(importance)), order)
  rows, times = _sample(importance[numbers])
  matrix, numbers = matrix[rows], numbers[rows]
  sampled = dataclasses.replace(
    site,
    layout=gx_nn.Layout(shape=(len(rows), cols), in_axes=(1,)),
  )
  known = _weight.fitting(site, statistics, order)
  found = []
  for method in methods:
    if isinstance(method, recipe_lib.LowRank):
      continue
    try:
      fmt = gx_nn.format_of(method, cols)
    except errors.GroupSizeError:
      continue
    leaf = _weight.compress_weight(matrix, sampled, method, **known)
    got = kernels.dequantize(leaf, fmt, cols, dtype=jnp.float32)
    error = matrix.astype(jnp.float32) - got.reshape(matrix.shape)
    loss = np.asarray(statistics.loss(site.whole, error, numbers), np.float64)
    found.append(
      _candidates.Candidate(
        method=method,
        nbytes=fmt.nbytes(site.layout.rows, cols),
        loss=float(loss @ times),
      )
    )
  corrected = [m for m in methods if isinstance(m, recipe_lib.LowRank)]
  if site.kind == gx_nn.Kind.EINSUM:
    found += _corrected(part, site, corrected, statistics, known['hessian'])
  return _frontier(found)


def _corrected(
  w: jax.Array,
  site: gx_nn.Site,
  methods: Sequence[recipe_lib.LowRank],
  statistics: _statistics.Statistics,
  hessian: Any,
) -> list[_candidates.Candidate]:
  """Candidates with a correction of low rank, fitted on all rows.

  A sample of them would have a correction that all of them do not have.
  """
  costs = _low_rank.Costs(inputs=hessian, outputs=statistics.outputs[site.path])
  found = []
  for base, bits in dict.fromkeys((m.weights, m.bits) for m in methods):
    parts = {}
    for method in methods:
      if (method.weights, method.bits) == (base, bits):
        try:
          parts[method] = _low_rank.parts_of(site, method)
        except (errors.GroupSizeError, errors.RecipeError):
          continue  # The weight is too small for it.
    if not parts:
      continue
    leaf = _weight.compress_weight(w, site, base, hessian=hessian)
    error = _low_rank.residual(w, site, base, leaf)
    # Those of a smaller rank are the first ones of the largest.
    largest = max(parts, key=lambda method: method.rank)
    rows = _low_rank.directions(error, largest.rank, costs)
    place = parts[largest][gx_nn.DOWN]
    most = _low_rank.pack_down(error, rows, place, costs)
    for method, part in parts.items():
      down = _low_rank.first_rows(most, method.rank)
      up = _low_rank.pack_up(error, down, part, costs)
      leaves = {gx_nn.DOWN: down, gx_nn.UP: up}
      left = _low_rank.remaining(error, leaves, part)
      loss = statistics.loss(site.path, jnp.asarray(left, jnp.float32))
      found.append(
        _candidates.Candidate(
          method=method,
          nbytes=gx_nn.nbytes_of(site, method),
          loss=float(np.sum(np.asarray(loss, np.float64))),
        )
      )
  return found


def _sample(importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rows to fit, and for how many each of them stands.

  The most important half, and others at random; those stand for the importance
  of all the rest. Always as many, as each number of rows compiles anew: of a
  weight of fewer, the first is there again and stands for none.
  """
  count = len(importance)
  if count <= _SAMPLE:
    extra = np.zeros(_SAMPLE - count, np.int64)
    rows = np.concatenate([np.arange(count), extra])
    return rows, np.concatenate([np.ones(count), extra])
  order = np.argsort(-importance, kind='stable')
  first, rest = order[: _SAMPLE // 2], order[_SAMPLE // 2 :]
  rng = np.random.default_rng(0)
  some = rng.choice(rest, _SAMPLE - len(first), replace=False)
  share = np.sum(importance[rest]) / max(np.sum(importance[some]), 1e-30)
  times = np.zeros(count)
  times[first], times[some] = 1.0, share
  rows = np.flatnonzero(times)
  return rows, times[rows]


def _parts(
  site: gx_nn.Site, bands: int, statistics: _statistics.Statistics
) -> tuple[gx_nn.Site, ...]:
  """Bands of the ordered rows of a table, or the table if there is one."""
  order = statistics.order(site.path)
  ends = _edges(statistics.importance(site.path)[order], bands)
  if not ends:
    return (site,)
  any_method = recipe_lib.Int()
  method = recipe_lib.Rows(
    bands=tuple((e, any_method) for e in (*ends, None)),
    ordered=True,
    centered=True,
  )
  return tuple(part for part, _ in gx_nn.split(site, method))


def _edges(importance: np.ndarray, bands: int) -> list[int]:
  """Where bands end, the last one's end left out.

  Rows that cost alike want as many bits, one for every factor of four: bands
  have the least variance of the logarithm of what their rows cost.

  Args:
    importance: What rows cost, descending.
    bands: The most bands.
  """
  count = len(importance)
  step = min(_BAND_STEP, max(1, count // (4 * bands)))
  starts = _bins(count, step)
  size = np.diff([*starts, count])
  mean = np.add.reduceat(importance, starts) / size
  x = np.log(np.maximum(mean, 1e-30))
  n = len(x)
  if bands >= n:
    return [int(i) for i in starts[1:]] if bands > 1 else []
  sums = [np.concatenate([[0.0], np.cumsum(size * x**k)]) for k in range(3)]
  # cost[i, j] of a band of bins i to j, j left out.
  i, j = np.arange(n + 1)[:, None], np.arange(n + 1)[None]
  total, first, second = (s[j] - s[i] for s in sums)
  cost = np.where(j > i, second - first**2 / np.maximum(total, 1), np.inf)
  best, froms = cost[0].copy(), []
  for _ in range(bands - 1):
    through = best[:, None] + cost
    froms.append(np.argmin(through, axis=0))
    best = np.min(through, axis=0)
  ends, at = [], n
  for source in reversed(froms):
    at = int(source[at])
    ends.append(int(starts[at]))
  return ends[::-1]


def _bins(count: int, step: int) -> np.ndarray:
  """Starts of bins that grow, all multiples of `step`."""
  starts = [0]
  while starts[-1] < count:
    size = starts[-1] * (_BIN_GROWTH - 1)
    starts.append(starts[-1] + step * max(1, int(size / step)))
  return np.array(starts[:-1])


def _frontier(
  found: Sequence[_candidates.Candidate],
) -> tuple[_candidates.Candidate, ...]:
  """Candidates that none with as few bytes beats, smallest first."""
  kept: list[_candidates.Candidate] = []
  for candidate in sorted(found, key=lambda c: (c.nbytes, c.loss)):
    if not kept or candidate.loss < kept[-1].loss:
      kept.append(candidate)
  return tuple(kept)
