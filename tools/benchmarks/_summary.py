# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""From records to what can be said of every model, and gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import numpy as np

from gemma_ext import errors
from gemma_ext import evals
from tools.benchmarks import _timing

# Behind the name of a task of speed: its time to the first token.
FIRST = '.first'
_GATE = re.compile(
  r'(?:(?P<model>[^:]+):)?(?P<metric>[\w.-]+)\s*(?P<op><=|>=)\s*'
  r'(?P<bound>-?\d+(?:\.\d+)?)'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """A model on a task.

  Attributes:
    model: Its name.
    task: The task's.
    metric: What `value` is: 'perplexity', 'accuracy', 'tokens/s', or 's' to the
      first token.
    value: Of the model alone.
    low: Of the 95% interval.
    high: Of it.
    effect: 'ratio', 'difference' or 'times' as fast: what `change` is.
    change: Against the baseline; `None` of the baseline itself.
    change_low: Of its 95% interval.
    change_high: Of it.
    verdict: 'better', 'worse', 'tied', or ''.
    p_value: Of no change, adjusted over tasks (Holm).
    smallest: The smallest change that would have been found, 4 times of 5.
    bits_per_byte: Of perplexity.
    units: Documents or items.
  """

  model: str
  task: str
  metric: str
  value: float
  low: float
  high: float
  effect: str = ''
  change: float | None = None
  change_low: float = math.nan
  change_high: float = math.nan
  verdict: str = ''
  p_value: float = math.nan
  smallest: float = math.nan
  bits_per_byte: float | None = None
  units: int = 0


def summarise(
  records: Sequence[Mapping[str, Any]], baseline: str
) -> list[Line]:
  """Returns a line for every record, compared with the baseline's.

  Args:
    records: Of the results file, one a model and task.
    baseline: Name of the baseline.
  """
  of = {(r['model'], r['task']): r for r in records}
  lines = []
  for (model, task), record in of.items():
    base = of.get((baseline, task)) if model != baseline else None
    if 'token_seconds' in record:
      _check_same_data(record, base)
      lines += _speed(record)
    else:
      lines.append(_quality(record, base))
  # Every model is a family of tests, one a task.
  adjusted = {}
  for model in {line.model for line in lines}:
    own = {
      n.task: n.p_value
      for n in lines
      if n.model == model and n.effect != 'times'
    }
    for task, p in evals.holm(own).items():
      adjusted[model, task] = p
  return [
    dataclasses.replace(n, p_value=adjusted.get((n.model, n.task), math.nan))
    for n in lines
  ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Duel:
  """A challenger on a task against a model of no fewer bytes.

  Attributes:
    line: The challenger's, its change against `model`.
    model: Name of the other.
  """

  line: Line
  model: str


def duels(
  records: Sequence[Mapping[str, Any]],
  sizes: Mapping[str, Mapping[str, int]],
  challengers: Sequence[str],
  baseline: str,
) -> list[Duel]:
  """Compares the other models with the largest challenger of no more bytes.

  Args:
    records: Of the results file, one a model and task.
    sizes: By model, 'bytes'.
    challengers: Their names.
    baseline: Left out.
  """
  of = {(r['model'], r['task']): r for r in records}
  nbytes = lambda name: sizes[name]['bytes']
  found = []
  for (model, task), record in of.items():
    if model in (*challengers, baseline) or 'token_seconds' in record:
      continue
    able = [
      name
      for name in challengers
      if nbytes(name) <= nbytes(model) and (name, task) in of
    ]
    if not able:
      continue
    mine = of[max(able, key=nbytes), task]
    found.append(Duel(line=_quality(mine, record), model=model))
  return found


def _check_same_data(
  record: Mapping[str, Any], base: Mapping[str, Any] | None
) -> None:
  if base is not None and base['data_sha256'] != record['data_sha256']:
    raise errors.DataError(
      f'{record["model"]!r} and {base["model"]!r} did {record["task"]!r} on'
      ' different data.'
    )


def _quality(record: Mapping[str, Any], base: Mapping[str, Any] | None) -> Line:
  """The line of a task that is scored."""
  _check_same_data(record, base)
  compare = _perplexity if 'nll' in record else _accuracy
  return compare(record, base)


def _perplexity(
  record: Mapping[str, Any], base: Mapping[str, Any] | None
) -> Line:
  nll, tokens = np.array(record['nll']), np.array(record['tokens'], float)
  used = tokens > 0
  nll, tokens = nll[used], tokens[used]
  own = evals.bootstrap_ci(nll, tokens)
  text_bytes = np.array(record['text_bytes'], float)[used].sum()
  line = Line(
    model=record['model'],
    task=record['task'],
    metric='perplexity',
    value=own.value,
    low=own.low,
    high=own.high,
    units=own.units,
    bits_per_byte=(
      nll.sum() / math.log(2) / text_bytes if record['whole'] else None
    ),
  )
  if base is None:
    return line
  other = np.array(base['nll'])[used]
  if len(other) != len(nll) or np.any(np.array(base['tokens'])[used] != tokens):
    raise errors.DataError(
      f'{record["model"]!r} and {base["model"]!r} scored different tokens of'
      f' {record["task"]!r}.'
    )
  ratio = evals.bootstrap_ci(nll - other, tokens)
  # By document, each weighed by its tokens.
  weight = tokens / tokens.mean()
  test = evals.compare(
    weight * nll / tokens, weight * other / tokens, higher_is_better=False
  )
  verdict = 'tied'
  if ratio.low > 1 or ratio.high < 1:
    verdict = 'worse' if ratio.low > 1 else 'better'
  return dataclasses.replace(
    line,
    effect='ratio',
    change=ratio.value,
    change_low=ratio.low,
    change_high=ratio.high,
    verdict=verdict,
    p_value=test.p_value,
    smallest=math.exp(min(test.smallest, 700.0)),
  )


def _accuracy(
  record: Mapping[str, Any], base: Mapping[str, Any] | None
) -> Line:
  scores, clusters = np.array(record['scores']), record['clusters']
  own = evals.mean(scores, clusters)
  low, high = own.low, own.high
  right = scores.sum()
  if scores.shape[0] == 1 and own.clusters == own.items and own.items < 100:
    low, high = evals.wilson(int(right), own.items)
  line = Line(
    model=record['model'],
    task=record['task'],
    metric='accuracy',
    value=own.value,
    low=low,
    high=high,
    units=own.items,
  )
  if base is None:
    return line
  found = evals.compare(scores, np.array(base['scores']), clusters)
  return dataclasses.replace(
    line,
    effect='difference',
    change=found.difference.value,
    change_low=found.difference.low,
    change_high=found.difference.high,
    verdict=found.verdict,
    p_value=found.p_value,
    smallest=found.smallest,
  )


def _speed(record: Mapping[str, Any]) -> list[Line]:
  """Two lines: tokens a second, and seconds to the first."""
  lines = []
  for what, task, metric, of in (
    ('token', '', 'tokens/s', lambda seconds: 1 / seconds),
    ('first', FIRST, 's', lambda seconds: seconds),
  ):
    taken = record[f'{what}_seconds']
    own = _timing.summary([of(t) for t in taken])
    low, high = (math.nan if x is None else x for x in own['ci95'])
    line = Line(
      model=record['model'],
      task=record['task'] + task,
      metric=metric,
      value=own['median'],
      low=low,
      high=high,
      units=own['n'],
    )
    if base := record.get(f'baseline_{what}_seconds'):
      times = _timing.ratio(base, taken)
      low, high = (math.nan if x is None else x for x in times['ci95'])
      verdict = 'tied'
      if low > 1 or high < 1:
        verdict = 'better' if low > 1 else 'worse'
      line = dataclasses.replace(
        line,
        effect='times',
        change=times['median'],
        change_low=low,
        change_high=high,
        verdict=verdict,
      )
    lines.append(line)
  return lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
  """A bound: `[MODEL:]TASK_ratio<=1.02`, `TASK_times>=2` and so on.

  Attributes:
    text: As it was given.
    model: Its name; '' for all but the baseline.
    metric: The task and effect.
    op: '<=' or '>='.
    bound: The number.
  """

  text: str
  model: str
  metric: str
  op: str
  bound: float

  @classmethod
  def parse(cls, text: str, tasks: Sequence[str]) -> Gate:
    """Reads a gate.

    Args:
      text: The gate.
      tasks: Names of tasks.

    Raises:
      ConfigError: If it is none, or of no task.
    """
    found = _GATE.fullmatch(text.strip())
    names = [
      f'{t}_{e}' for t in tasks for e in ('ratio', 'difference', 'times')
    ]
    names += [f'{t}{FIRST}_times' for t in tasks]
    if not found or found['metric'] not in names:
      raise errors.ConfigError(
        f'--gate: {text!r}; expected [MODEL:]METRIC<=NUMBER or >=, METRIC one'
        f' of {names}.'
      )
    return cls(
      text=text,
      model=found['model'] or '',
      metric=found['metric'],
      op=found['op'],
      bound=float(found['bound']),
    )

  def failures(self, lines: Sequence[Line]) -> list[str]:
    """Returns what is beyond the bound for certain: its whole interval is."""
    out = []
    for line in lines:
      if line.change is None or f'{line.task}_{line.effect}' != self.metric:
        continue
      if self.model and self.model != line.model:
        continue
      beyond = (
        line.change_low > self.bound
        if self.op == '<='
        else line.change_high < self.bound
      )
      if beyond:
        out.append(
          f'{line.model}: {self.metric} {line.change:.4f}'
          f' [{line.change_low:.4f}, {line.change_high:.4f}] is not {self.op}'
          f' {self.bound:g}'
        )
    return out
