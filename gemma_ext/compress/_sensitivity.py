# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sensitivities: of every weight and candidate, its bytes and its cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import json
import math
import os
import re
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _compress
from gemma_ext.compress import _plan
from gemma_ext.compress import _statistics
from gemma_ext.compress import _threads

_JSON_VERSION = 5
_MAX_JSON_BYTES = 1 << 26
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
      (8, 128, 'bf16'),
      (8, 32, 'bf16'),
    )
  ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """One way to store one weight.

  Attributes:
    method: The way.
    nbytes: Bytes of codes and scales.
    loss: What it adds to the loss, nats a token, to second order.
  """

  method: recipe_lib.Method
  nbytes: int
  loss: float

  def to_json(self) -> dict[str, Any]:
    """Returns all as plain JSON values."""
    return {**self.method.to_json(), 'bytes': self.nbytes, 'loss': self.loss}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivities:
  """What `allocate` chooses from. A file that people keep, edit and share.

  Attributes:
    candidates: By path of the weight.
    weights: Parameters of the model.
    other_bytes: Bytes of what is not among the candidates.
    corrections: By kind of weight (`kind_of`), what losses are multiplied by:
      measured over predicted.
    fingerprint: Of model, parameters and text.
    rows: Of bands of a table, their places `(start, stop)` in the order of
      `Statistics.order`, by path.
  """

  candidates: dict[str, tuple[Candidate, ...]]
  weights: int
  other_bytes: int
  corrections: dict[str, float] = dataclasses.field(default_factory=dict)
  fingerprint: str = ''
  rows: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

  @property
  def bfloat16_bytes(self) -> int:
    """Bytes of the model, all dense in two bytes a weight."""
    return 2 * self.weights

  def loss(self, path: str, candidate: Candidate) -> float:
    """Returns the corrected loss of a candidate, in nats a token."""
    return candidate.loss * self.corrections.get(kind_of(path), 1.0)

  def to_json(self) -> dict[str, Any]:
    """Returns all as plain JSON values."""
    return {
      'version': _JSON_VERSION,
      'fingerprint': self.fingerprint,
      'weights': self.weights,
      'other_bytes': self.other_bytes,
      'corrections': self.corrections,
      'rows': {path: list(rows) for path, rows in self.rows.items()},
      'candidates': {
        path: [c.to_json() for c in found]
        for path, found in self.candidates.items()
      },
    }

  @classmethod
  def from_json(cls, data: Any) -> Sensitivities:
    """Inverse of `to_json`.

    Args:
      data: Parsed JSON.

    Raises:
      RecipeError: If it is none, naming the field.
    """
    fields = {
      'version',
      'fingerprint',
      'weights',
      'other_bytes',
      'corrections',
      'rows',
      'candidates',
    }
    if not isinstance(data, dict) or set(data) != fields:
      got = sorted(data) if isinstance(data, dict) else type(data).__name__
      raise errors.RecipeError(
        f'Sensitivities in JSON have the keys {sorted(fields)}, got {got}.'
      )
    if data['version'] != _JSON_VERSION:
      raise errors.RecipeError(
        f'Version {data["version"]!r} of sensitivities is not supported,'
        f' expected {_JSON_VERSION}.'
      )
    numbers = {
      name: _number(name, data[name], whole=True)
      for name in ('weights', 'other_bytes')
    }
    for name in ('corrections', 'candidates', 'rows'):
      if not isinstance(data[name], dict):
        raise errors.RecipeError(f'{name!r} must be an object by name.')
    corrections, candidates = data['corrections'], data['candidates']
    return cls(
      candidates={
        path: _candidates_from_json(path, found)
        for path, found in candidates.items()
      },
      corrections={
        kind: _number(f'corrections.{kind}', value)
        for kind, value in corrections.items()
      },
      fingerprint=str(data['fingerprint']),
      rows={
        path: _rows_from_json(path, rows) for path, rows in data['rows'].items()
      },
      **numbers,
    )


def kind_of(path: str) -> str:
  """Returns the kind of weight: the module that owns it, without its number."""
  parts = re.sub(r'layer_\d+/', '', path).split('/')
  return parts[0]


def sensitivities(
  model: nn.Module,
  params: Mapping[str, Any],
  statistics: _statistics.Statistics,
  *,
  candidates: Sequence[recipe_lib.Method] | None = None,
  bands: int | None = None,
  known: Sensitivities | None = None,
  keep: Callable[[Sensitivities], None] = lambda found: None,
  progress: bool = False,
) -> Sensitivities:
  """Fits every weight with every candidate and adds up what it costs.

  Args:
    model: The official model.
    params: Its dense parameters.
    statistics: Of `gx.compress.statistics`.
    candidates: Methods, for all weights; `CANDIDATES` by default.
    bands: Of the table of embeddings, bands of rows that have a choice each;
      `BANDS` by default.
    known: Results so far, of the same fingerprint; weights in it are not
      fitted again.
    keep: Told the results so far after every weight, to be resumed from.
    progress: Whether to show a progress bar.

  Returns:
    The sensitivities. Weights that the statistics have not seen are left out
    and stay dense.

  Raises:
    ParamsMismatchError: If the parameters do not belong to the model.
  """
  candidates = CANDIDATES if candidates is None else candidates
  bands = BANDS if bands is None else bands
  flat = _compress.check_params(model, params)
  sites = {
    part.path: part
    for site in gx_nn.sites(model)
    if site.path in statistics.inputs
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
  mark = fingerprint(flat, statistics, candidates, bands)
  if known is not None and known.fingerprint != mark:
    known = None
  found = dict(known.candidates) if known else {}
  result = Sensitivities(
    candidates=found,
    weights=sum(map(size, abstract)),
    other_bytes=sum(nbytes(p) for p in abstract if p not in wholes)
    + sum(4 * sum(abstract[p].shape) for p in ordered),
    corrections=dict(known.corrections) if known else {},
    fingerprint=mark,
    rows={p: site.rows for p, site in sites.items() if site.rows is not None},
  )
  made = _threads.each(
    lambda site: _candidates(flat[site.whole], site, candidates, statistics),
    {path: site for path, site in sites.items() if path not in found},
    desc='sensitivities',
    progress=progress,
  )
  for path, each in made:
    found[path] = each
    keep(result)
  ordered_found = {path: found[path] for path in sites if path in found}
  return dataclasses.replace(result, candidates=ordered_found)


def fingerprint(
  flat: Mapping[str, Any],
  statistics: _statistics.Statistics,
  candidates: Sequence[recipe_lib.Method],
  bands: int,
) -> str:
  """Returns a hash of parameters, statistics and candidates."""
  digest = hashlib.sha256()
  for path in sorted(flat):
    leaf = flat[path]
    # A sum tells parameters apart that differ by training, at no cost.
    total = float(jnp.sum(jnp.abs(leaf.astype(jnp.float32))))
    digest.update(f'{path} {leaf.shape} {leaf.dtype} {total!r};'.encode())
  for path in sorted(statistics.outputs):
    total = float(np.sum(statistics.outputs[path], dtype=np.float64))
    digest.update(f'{path} {total!r};'.encode())
  digest.update(f'{bands};'.encode())
  for method in candidates:
    digest.update(json.dumps(method.to_json()).encode())
  return digest.hexdigest()


def read(path: str | os.PathLike[str]) -> Sensitivities:
  """Reads a file of sensitivities.

  Args:
    path: The file.

  Raises:
    RecipeError: If it cannot be read or is none.
  """
  return Sensitivities.from_json(
    recipe_lib.read_json(os.fspath(path), _MAX_JSON_BYTES)
  )


def _candidates(
  w: jax.Array,
  site: gx_nn.Site,
  methods: Sequence[recipe_lib.Method],
  statistics: _statistics.Statistics,
) -> tuple[Candidate, ...]:
  """The candidates of one weight, fitted on a sample of its rows."""
  cols = site.layout.cols
  order = statistics.order(site.whole) if site.ordered else None
  part = jnp.asarray(site.part(w, order))
  if site.centered:
    part = part.astype(jnp.float32) - _compress.mean_of(w)
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
  known = _compress.fitting(site, statistics, order)
  found = []
  for method in methods:
    try:
      fmt = gx_nn.format_of(method, cols)
    except errors.GroupSizeError:
      continue
    leaf = _compress.compress_weight(matrix, sampled, method, **known)
    got = kernels.dequantize(leaf, fmt, cols, dtype=jnp.float32)
    error = matrix.astype(jnp.float32) - got.reshape(matrix.shape)
    loss = np.asarray(statistics.loss(site.whole, error, numbers), np.float64)
    found.append(
      Candidate(
        method=method,
        nbytes=fmt.nbytes(site.layout.rows, cols),
        loss=float(loss @ times),
      )
    )
  return _frontier(found)


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


def _frontier(found: Sequence[Candidate]) -> tuple[Candidate, ...]:
  """Candidates that none with as few bytes beats, smallest first."""
  kept: list[Candidate] = []
  for candidate in sorted(found, key=lambda c: (c.nbytes, c.loss)):
    if not kept or candidate.loss < kept[-1].loss:
      kept.append(candidate)
  return tuple(kept)


def _candidates_from_json(path: str, found: Any) -> tuple[Candidate, ...]:
  if not isinstance(found, list) or not found:
    raise errors.RecipeError(f'{path!r} must have a list of candidates.')
  result = []
  for i, fields in enumerate(found):
    name = f'{path}[{i}]'
    if not isinstance(fields, dict) or not {'bytes', 'loss'} <= set(fields):
      raise errors.RecipeError(
        f"{name} must be an object with 'method', 'bytes' and 'loss'."
      )
    rest = {k: v for k, v in fields.items() if k not in ('bytes', 'loss')}
    result.append(
      Candidate(
        method=recipe_lib.method_from_json(rest),
        nbytes=int(_number(f'{name}.bytes', fields['bytes'], whole=True)),
        loss=_number(f'{name}.loss', fields['loss']),
      )
    )
  return tuple(result)


def _rows_from_json(path: str, rows: Any) -> tuple[int, int]:
  if not isinstance(rows, list) or len(rows) != 2:
    raise errors.RecipeError(
      f'rows.{path} must be [start, stop], got {rows!r}.'
    )
  start, stop = (_number(f'rows.{path}', x, whole=True) for x in rows)
  if start >= stop:
    raise errors.RecipeError(f'rows.{path} must ascend, got {rows!r}.')
  return start, stop


def _number(name: str, value: Any, *, whole: bool = False) -> Any:
  kinds = (int,) if whole else (int, float)
  if type(value) not in kinds or not math.isfinite(value) or value < 0:
    kind = 'an integer' if whole else 'a number'
    raise errors.RecipeError(f'{name} must be {kind} >= 0, got {value!r}.')
  return value
