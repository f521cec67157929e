# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Plasticity: experts that divide where a router is saturated, and die unused.

A layer has a fixed number of slots for experts, those that are empty never run,
and every shape stays as it is. What is decided here is a pure function of what
was observed; `_division` carries it out.

All thresholds are relative: loads to their mean over the experts that are in
use, gradients to the layer's past. Each has to be crossed for some windows in a
row, counts start again only below (above) a second level, and the young are
left alone, so that none of them fires always, or at noise.

The past is the lowest that the layer's gradient was, smoothed: what it is where
the layer has learned what it can. Smoothed over more windows than `patience`,
as the lowest of noisy numbers is below all of them, and with the norm of the
whole layer, which does not fall because there are more experts.

That gradient rises for a few windows when a task becomes another one: most of
what is left of it is noise. So a rise opens a time of growth, in which who has
more to bear than the others divides; else it takes an overload. A layer that
has lost an expert had one to spare and grows again only after another rise, so
that births and deaths do not take turns.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.train import _division
from gemma_ext.train import _routing

BIRTH, DEATH = 'birth', 'death'
# Share of the past in the smoothed gradient, about nine windows of it.
_SMOOTH = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plasticity:
  """When experts divide and die. A window is what is observed at once.

  Attributes:
    saturated: Pressure on an expert above which it is to divide in a time of
      growth. The pressure is its load, relative to the mean of those in use,
      times the norm of its gradient, relative to what theirs was in the past.
      An expert like all others on a task that stays has 1.
    overloaded: Pressure above which it is to divide at any other time, as long
      as the layer had no expert to spare.
    surge: Gradient of a layer, relative to the past, that opens a time of
      growth.
    growth: Windows that it lasts.
    relaxed: Pressure below which the count of its windows starts again.
    unused: Load relative to the mean of all below which it is to die.
    used: Load above which the count starts again.
    alike: Cosine between outputs of two experts above which the one with less
      load is to die.
    unlike: Cosine below which the count starts again.
    patience: Windows in a row that it takes.
    age: Windows that an expert lives before it divides or dies.
    adult: Windows that both of two live before they count as alike: those that
      were one differ by nothing at first.
    pause: Windows between a birth or a death in a layer and the next birth.
    memory: Share of the past in the gradient that is usual, in a window of
      more; what is less, smoothed, is usual at once.
    slip: Share of the tokens that may change hands at a birth, see
      `divide_expert`; 0 keeps the function as it was.
    least: Experts that a layer keeps.
    most: Experts that a layer has at most; all its slots by default.
  """

  saturated: float = 1.25
  overloaded: float = 4.0
  surge: float = 2.0
  growth: int = 30
  relaxed: float = 1.1
  unused: float = 0.1
  used: float = 0.2
  alike: float = 0.98
  unlike: float = 0.95
  patience: int = 3
  age: int = 5
  adult: int = 20
  pause: int = 2
  memory: float = 0.99
  slip: float = 0.005
  least: int = 1
  most: int | None = None

  def __post_init__(self):
    pairs = (
      ('relaxed', 'saturated', 1.0, np.inf),
      ('saturated', 'overloaded', 1.0, np.inf),
      ('relaxed', 'surge', 1.0, np.inf),
      ('unused', 'used', 0.0, 1.0),
      ('unlike', 'alike', -1.0, 1.0),
    )
    for low, high, start, stop in pairs:
      a, b = getattr(self, low), getattr(self, high)
      if not start <= a <= b <= stop:
        raise errors.ConfigError(
          f'Plasticity needs {start} <= {low} <= {high} <= {stop}, got {a} and'
          f' {b}.'
        )
    for name in ('growth', 'patience', 'age', 'adult', 'pause', 'least'):
      if type(value := getattr(self, name)) is not int or value < 1:
        raise errors.ConfigError(
          f'Plasticity.{name} must be an integer from 1, got {value!r}.'
        )
    if not 0 <= self.memory < 1:
      raise errors.ConfigError(
        f'Plasticity.memory must be in [0, 1), got {self.memory!r}.'
      )
    if not 0 <= self.slip < 1:
      raise errors.ConfigError(
        f'Plasticity.slip must be in [0, 1), got {self.slip!r}.'
      )
    if self.most is not None and not self.least <= self.most:
      raise errors.ConfigError(
        f'Plasticity.most must be at least {self.least}, got {self.most!r}.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
  """What a window showed of a layer.

  Attributes:
    live: Slots that hold an expert, bool `[E]`.
    load: Share of the tokens that each got, `[E]`.
    gradient: Norm of the gradient of the weights of each, `[E]`.
    similarity: Cosines between their outputs, `[E, E]`, if they are known.
  """

  live: np.ndarray
  load: np.ndarray
  gradient: np.ndarray
  similarity: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
  """What is remembered of a layer from window to window.

  Attributes:
    age: Windows since an expert was born or divided, `[E]`.
    busy: Windows in a row of too much pressure, `[E]`.
    idle: Windows in a row of too little load, `[E]`.
    twin: Windows in a row in which two were alike, `[E, E]`.
    level: Logarithm of the norm of the layer's gradient, smoothed; `None` at
      the start.
    usual: The lowest of it in the past, or a little more.
    since: Windows since the last birth or death.
    growth: Windows that are left of a time of growth.
    spare: Whether an expert died, and there was no such time since.
  """

  age: np.ndarray
  busy: np.ndarray
  idle: np.ndarray
  twin: np.ndarray
  level: float | None = None
  usual: float = 0.0
  since: int = 0
  growth: int = 0
  spare: bool = False

  @classmethod
  def start(cls, slots: int) -> History:
    """Nothing has been observed yet of so many slots."""
    zeros = np.zeros(slots, int)
    return cls(
      age=zeros, busy=zeros, idle=zeros, twin=np.zeros((slots, slots), int)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
  """A birth or a death.

  Attributes:
    kind: 'birth' or 'death'.
    expert: The slot that is filled or emptied.
    other: Who divides; of two that are alike, who stays; else -1.
    reason: 'saturated', 'unused' or 'redundant'.
    values: The numbers that decided it.
  """

  kind: str
  expert: int
  other: int
  reason: str
  values: dict[str, float]


def decide(
  settings: Plasticity, history: History, seen: Observation
) -> tuple[History, list[Event]]:
  """Decides on births and deaths in a layer. Changes nothing.

  Args:
    settings: The thresholds.
    history: Of the windows before.
    seen: The window.

  Returns:
    The history with the window, and deaths before births, at most one birth.
  """
  live = np.asarray(seen.live, bool)
  count = int(live.sum())
  load = np.where(live, seen.load, 0.0)
  load = load / max(load.sum() / max(count, 1), 1e-12)
  # Those that are about to die have no part in what the others have to bear.
  used = live & (load >= settings.unused)
  share = used.sum() / max(count, 1)
  gradient = np.where(live, seen.gradient, 0.0)
  norm = math.log(max(np.linalg.norm(gradient), 1e-30))
  level, usual = norm, norm
  if history.level is not None:
    level, usual = history.level, history.usual
  each = math.exp(usual) / math.sqrt(max(used.sum(), 1))
  gradient = gradient / each
  pressure = load * share * gradient
  age = np.where(live, history.age + 1, 0)
  growth, spare = max(history.growth - 1, 0), history.spare
  if norm - usual > math.log(settings.surge):
    growth, spare = settings.growth, False
  limit = settings.saturated
  if not growth:
    limit = np.inf if spare else settings.overloaded
  busy = _count(
    history.busy,
    live & (pressure > limit),
    ~live | (pressure < settings.relaxed),
  )
  idle = _count(
    history.idle,
    live & (load < settings.unused),
    ~live | (load > settings.used),
  )
  twin = np.zeros_like(history.twin)
  adult = live & (age > settings.adult)
  if seen.similarity is not None:
    both = adult[:, None] & adult[None] & ~np.eye(len(live), dtype=bool)
    twin = _count(
      history.twin,
      both & (seen.similarity > settings.alike),
      ~both | (seen.similarity < settings.unlike),
    )
  events: list[Event] = []
  grown = live & (age > settings.age)

  def die(expert: int, other: int, reason: str, **values: float) -> None:
    nonlocal count
    events.append(
      Event(
        kind=DEATH, expert=expert, other=other, reason=reason, values=values
      )
    )
    live[expert] = grown[expert] = False
    count -= 1
    age[expert] = busy[expert] = idle[expert] = 0
    twin[expert] = twin[:, expert] = 0

  for e in np.argsort(load, kind='stable'):
    if grown[e] and idle[e] >= settings.patience and count > settings.least:
      die(int(e), -1, 'unused', load=float(load[e]))
  pairs = np.argwhere(twin >= settings.patience)
  for a, b in pairs:
    if grown[a] and grown[b] and a < b and count > settings.least:
      less, more = (a, b) if load[a] <= load[b] else (b, a)
      similarity = float(np.asarray(seen.similarity)[a, b])
      values = {'similarity': similarity, 'load': float(load[less])}
      die(int(less), int(more), 'redundant', **values)
  level = _SMOOTH * level + (1 - _SMOOTH) * norm
  usual = min(level, settings.memory * usual + (1 - settings.memory) * level)
  if events:
    spare = True
    if adult[[e.expert for e in events]].any():
      growth = 0
  since = 0 if events else history.since + 1
  most = min(settings.most or len(live), len(live))
  ready = grown & (busy >= settings.patience)
  free = np.flatnonzero(~live)
  if ready.any() and count < most and len(free) and since > settings.pause:
    parent = int(np.argmax(np.where(ready, pressure, -1)))
    child = int(free[0])
    events.append(
      Event(
        kind=BIRTH,
        expert=child,
        other=parent,
        reason='saturated',
        values={
          'pressure': float(pressure[parent]),
          'load': float(load[parent]),
          'gradient': float(gradient[parent]),
        },
      )
    )
    since = 0
    for e in (parent, child):
      age[e] = busy[e] = idle[e] = 0
      twin[e] = twin[:, e] = 0
  after = History(
    age=age,
    busy=busy,
    idle=idle,
    twin=twin,
    level=level,
    usual=usual,
    since=since,
    growth=growth,
    spare=spare,
  )
  return after, events


def _count(before: np.ndarray, up: np.ndarray, reset: np.ndarray) -> np.ndarray:
  """Windows in a row: between the two levels a count stays as it is."""
  return np.where(up, before + 1, np.where(reset, 0, before))


@functools.partial(jax.jit, static_argnames='mixture')
def _add(sums, load, gate, down, mixture):
  """Loads and norms of gradients, added to those of the window."""
  norms = _division.norms(gate, down, mixture)
  return sums[0] + load, sums[1] + norms


class Plastic:
  """Plasticity of some layers during a training of any kind.

  Every step: `observe`. Every window of steps: `update`, which returns other
  parameters and another state of the optimiser, of the same shapes.
  """

  def __init__(
    self,
    settings: Plasticity,
    layers: Mapping[str, gx_nn.Mixture],
    *,
    log: str | os.PathLike[str] | None = None,
    seed: int = 0,
  ):
    """Starts with nothing observed.

    Args:
      settings: When experts divide and die.
      layers: As `gx.nn.mixtures_of` returns them.
      log: A file that gets a line of JSON for each birth and death.
      seed: Of the directions that experts are divided along.

    Raises:
      ParamsMismatchError: If there is no layer.
      TrainError: If experts of a router never divide: 'gate', 'expert_choice'.
    """
    if not layers:
      raise errors.ParamsMismatchError('Plastic(layers=...) has no mixture.')
    for mixture in layers.values():
      _division.check_router(mixture)
    self._settings = settings
    self._layers = dict(layers)
    self._log = None if log is None else pathlib.Path(log)
    self._rng = np.random.default_rng(seed)
    self._history = {
      path: History.start(m.method.num_experts) for path, m in layers.items()
    }
    self._sums: dict[str, tuple[Any, Any]] = {}
    self._steps = 0
    self.records: list[dict[str, Any]] = []

  def observe(
    self, intermediates: Mapping[str, Any], grads: Mapping[str, Any]
  ) -> None:
    """Takes in a step.

    Args:
      intermediates: What the model has sown.
      grads: The gradients, as a tree like the parameters.
    """
    found = _routing.routing(intermediates)
    for path, mixture in self._layers.items():
      gate, down = _division.weights(grads, mixture)
      old = self._sums.get(path, (0.0, 0.0))
      self._sums[path] = _add(old, found[path]['load'], gate, down, mixture)
    self._steps += 1

  def update(
    self,
    step: int,
    params: Any,
    opt_state: Any = None,
    *,
    inputs: Mapping[str, Any] | None = None,
  ) -> tuple[Any, Any, list[Event]]:
    """Ends a window: decides, and carries it out.

    Args:
      step: Its number, for the log.
      params: The parameters.
      opt_state: The optimiser's state, see `divide`.
      inputs: What some of the layers read, `[N, D]` by path: makes experts
        divide across the direction in which their inputs differ most, and
        shows which of them are alike.

    Returns:
      Both with what was decided done, and the events of all layers.

    Raises:
      TrainError: If nothing was observed, or a router could not divide without
        a change of the function, with as many experts as its layer may grow to.
        Nothing is changed then, from the first window on.
    """
    if not self._steps:
      raise errors.TrainError('Plastic.update: nothing was observed before.')
    settings = self._settings
    for mixture in self._layers.values():
      _division.check(params, mixture, least=settings.least, most=settings.most)
    events: list[Event] = []
    for path, mixture in self._layers.items():
      load, gradient = (
        np.asarray(x, np.float64) / self._steps
        for x in jax.device_get(self._sums[path])
      )
      x = (inputs or {}).get(path)
      alike = None if x is None else _division.similarity(params, mixture, x)
      live = _division.live(params, mixture)
      seen = Observation(
        live=live, load=load, gradient=gradient, similarity=alike
      )
      self._history[path], found = decide(
        self._settings, self._history[path], seen
      )
      for event in found:
        if event.kind == BIRTH:
          params, opt_state = _division.divide(
            params,
            opt_state,
            mixture,
            event.other,
            event.expert,
            rng=self._rng,
            inputs=x,
            slip=self._settings.slip,
          )
        else:
          params, opt_state = _division.remove(
            params, opt_state, mixture, event.expert
          )
        self._write(step, path, event, _division.live(params, mixture))
      events += found
    self._sums, self._steps = {}, 0
    return params, opt_state, events

  def _write(
    self, step: int, path: str, event: Event, live: np.ndarray
  ) -> None:
    record = {
      'step': step,
      'layer': path,
      **dataclasses.asdict(event),
      'experts': int(live.sum()),
    }
    self.records.append(record)
    if self._log is not None:
      with self._log.open('a', encoding='utf-8') as f:
        f.write(json.dumps(record) + '\n')
