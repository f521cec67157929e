# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What `allocate` chooses from, and the file that keeps it."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
import os
import re
from typing import Any

import numpy as np

from gemma_ext import errors
from gemma_ext import recipe as recipe_lib

_JSON_VERSION = 6
_MAX_JSON_BYTES = 1 << 26
# Beyond the losses that corrections were measured at, how far they are taken to
# hold, and the share of the whole below which a kind needs none.
_FAR = 1.5
_LITTLE = 0.05


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
    corrections: By kind of weight (`kind_of`), losses that were predicted and
      what was measured, `(predicted, measured)` in ascending order.
    factors: What losses of a kind are multiplied by, if not by the mean of its
      corrections; see `at`.
    fingerprint: Of parameters, text and candidates, each a hash. Empty if they
      are of no weights in particular.
    measured: Weights that there are when all of them have been fitted.
    rows: Of bands of a table, their places `(start, stop)` in the order of
      `Statistics.order`, by path.
  """

  candidates: dict[str, tuple[Candidate, ...]]
  weights: int
  other_bytes: int
  corrections: dict[str, tuple[tuple[float, float], ...]] = dataclasses.field(
    default_factory=dict
  )
  factors: dict[str, float] = dataclasses.field(default_factory=dict)
  fingerprint: dict[str, str] = dataclasses.field(default_factory=dict)
  measured: int = 0
  rows: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

  @property
  def complete(self) -> bool:
    """Whether every weight has been fitted."""
    return 0 < self.measured <= len(self.candidates)

  @property
  def bfloat16_bytes(self) -> int:
    """Bytes of the model, all dense in two bytes a weight."""
    return 2 * self.weights

  def loss(self, path: str, candidate: Candidate) -> float:
    """Returns the corrected loss of a candidate, in nats a token."""
    kind = kind_of(path)
    factor = self.factors.get(kind)
    if factor is None:
      ratios = [math.log(y / x) for x, y in self.corrections.get(kind, ())]
      factor = math.exp(sum(ratios) / len(ratios)) if ratios else 1.0
    return candidate.loss * factor

  def at(self, losses: Mapping[str, float]) -> dict[str, float]:
    """Returns the factors where kinds of weights have these plain losses.

    In between those that were measured in proportion to the logarithm, beyond
    them the nearest.

    Args:
      losses: By kind, before corrections.
    """
    found = {}
    for kind, pairs in self.corrections.items():
      if pairs and losses.get(kind, 0) > 0:
        x, y = np.log(np.array(pairs, np.float64)).T
        here = math.log(losses[kind])
        found[kind] = math.exp(float(np.interp(here, x, y - x)))
    return found

  def covers(self, losses: Mapping[str, float]) -> bool:
    """Whether corrections were measured near or around these plain losses.

    Kinds that make up little of the whole need none.

    Args:
      losses: By kind, before corrections.
    """
    factors = self.at(losses)
    costs = {kind: x * factors.get(kind, 1.0) for kind, x in losses.items()}
    for kind, loss in losses.items():
      if costs[kind] <= _LITTLE * sum(costs.values()):
        continue
      pairs = self.corrections.get(kind, ())
      if not pairs or not (pairs[0][0] / _FAR <= loss <= pairs[-1][0] * _FAR):
        return False
    return True

  def to_json(self) -> dict[str, Any]:
    """Returns all as plain JSON values."""
    return {
      'version': _JSON_VERSION,
      'fingerprint': dict(self.fingerprint),
      'measured': self.measured,
      'weights': self.weights,
      'other_bytes': self.other_bytes,
      'corrections': {
        kind: [list(pair) for pair in pairs]
        for kind, pairs in self.corrections.items()
      },
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
      'measured',
      'weights',
      'other_bytes',
      'corrections',
      'rows',
      'candidates',
    }
    if isinstance(data, dict) and data.get('version', _JSON_VERSION) != (
      _JSON_VERSION
    ):
      raise errors.RecipeError(
        f'Version {data["version"]!r} of sensitivities is not supported,'
        f' expected {_JSON_VERSION}.'
      )
    if not isinstance(data, dict) or set(data) != fields:
      got = sorted(data) if isinstance(data, dict) else type(data).__name__
      raise errors.RecipeError(
        f'Sensitivities in JSON have the keys {sorted(fields)}, got {got}.'
      )
    numbers = {
      name: _number(name, data[name], whole=True)
      for name in ('measured', 'weights', 'other_bytes')
    }
    for name in ('corrections', 'candidates', 'rows', 'fingerprint'):
      if not isinstance(data[name], dict):
        raise errors.RecipeError(f'{name!r} must be an object by name.')
    corrections, candidates = data['corrections'], data['candidates']
    return cls(
      candidates={
        path: _candidates_from_json(path, found)
        for path, found in candidates.items()
      },
      corrections={
        kind: _pairs_from_json(f'corrections.{kind}', pairs)
        for kind, pairs in corrections.items()
      },
      fingerprint={k: str(v) for k, v in data['fingerprint'].items()},
      rows={
        path: _rows_from_json(path, rows) for path, rows in data['rows'].items()
      },
      **numbers,
    )


def kind_of(path: str) -> str:
  """Returns the kind of weight: the module that owns it, without its number."""
  parts = re.sub(r'layer_\d+/', '', path).split('/')
  return parts[0]


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


def _pairs_from_json(name: str, pairs: Any) -> tuple[tuple[float, float], ...]:
  if not isinstance(pairs, list):
    raise errors.RecipeError(
      f'{name} must be a list of [predicted, measured], got {pairs!r}.'
    )
  found = []
  for pair in pairs:
    if not isinstance(pair, list) or len(pair) != 2:
      raise errors.RecipeError(
        f'{name} must hold [predicted, measured], got {pair!r}.'
      )
    one, two = (_number(name, value) for value in pair)
    if not min(one, two) > 0:
      raise errors.RecipeError(f'{name} must be above zero, got {pair!r}.')
    found.append((one, two))
  return (*sorted(found),)


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
