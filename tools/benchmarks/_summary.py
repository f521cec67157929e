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
from tools.benchmarks import _suite
from tools.benchmarks import _timing

# A verdict needs an adjusted p-value below this.
ALPHA = 0.05
# Behind the name of a task of speed: its time to the first token.
FIRST = '.first'
_GATE = re.compile(
  r'(?:(?P<model>.+):)?(?P<metric>[^:]+?)\s*(?P<op><=|>=)\s*'
  r'(?P<bound>-?\d+(?:\.\d+)?)'
)
_EFFECTS = {
  'perplexity': 'ratio',
  'choices': 'difference',
  'generate': 'difference',
  'speed': 'times',
}
# Of all tasks of perplexity, whatever they are named.
_ALL_RATIOS = 'perplexity_ratio'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """A model on a task.

  Attributes:
    model: Its name.
    task: The task's.
    metric: What `value` is: 'perplexity', 'accuracy', 'tokens/s', or 's' to the
      first token; '' if it was not run.
    value: Of the model alone.
    low: Of the 95% interval.
    high: Of it.
    effect: 'ratio', 'difference' or 'times' as fast: what `change` is.
    change: Against the baseline; `None` of the baseline itself.
    change_low: Of its 95% interval, of this task alone.
    change_high: Of it.
    verdict: 'better', 'worse', 'tied', or ''. Of quality, no change must be
      outside of the interval and the adjusted p-value below `ALPHA`.
    p_value: Of no change, adjusted over tasks (Holm).
    smallest: The smallest change that this task alone would have shown, 4 times
      of 5.
    bits_per_byte: Of perplexity, where documents were scored whole.
    bits_low: Of its 95% interval.
    bits_high: Of it.
    units: Documents or items.
    reason: Why it was not run; then nothing else is known.
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
  bits_low: float = math.nan
  bits_high: float = math.nan
  units: int = 0
  reason: str = ''


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
    if base is not None and base.get('skipped'):
      base = None
    if record.get('skipped'):
      lines.append(_not_run(record))
    elif 'token_seconds' in record:
      _check_same_data(record, base)
      lines += _speed(record)
    else:
      lines.append(_quality(record, base))
  return _adjusted(lines, [line.model for line in lines])


def _adjusted(lines: Sequence[Line], families: Sequence[str]) -> list[Line]:
  """Lines with p-values adjusted in families, and verdicts that follow them.

  Args:
    lines: At most one a task of each family; those of speed have no p-value.
    families: Which family every line is of.
  """
  adjusted = {}
  for family in set(families):
    own = {
      n.task: n.p_value
      for n, of in zip(lines, families, strict=True)
      if of == family and n.effect in ('ratio', 'difference')
    }
    for task, p in evals.holm(own).items():
      adjusted[family, task] = p
  out = []
  for n, family in zip(lines, families, strict=True):
    p = adjusted.get((family, n.task), math.nan)
    verdict = 'tied' if p >= ALPHA else n.verdict
    out.append(dataclasses.replace(n, p_value=p, verdict=verdict))
  return out


def _not_run(record: Mapping[str, Any]) -> Line:
  """The line of a pair that the model cannot do."""
  model, task = record['spec']
  reason = 'this kind of model has no such task'
  if 'shape' in model and task['kind'] == 'speed':
    reason = 'random weights of this shape do not fit into memory'
  elif 'shape' in model:
    reason = 'a shape has no weights'
  elif 'gguf' in model:
    reason = 'llama.cpp is given perplexity and speed only'
  return Line(
    model=record['model'],
    task=record['task'],
    metric='',
    value=math.nan,
    low=math.nan,
    high=math.nan,
    reason=reason,
  )


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
  of = {(r['model'], r['task']): r for r in records if not r.get('skipped')}
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
  # Every other model is a family of tests, one a task.
  lines = _adjusted([d.line for d in found], [d.model for d in found])
  return [
    dataclasses.replace(duel, line=line)
    for duel, line in zip(found, lines, strict=True)
  ]


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
  line = Line(
    model=record['model'],
    task=record['task'],
    metric='perplexity',
    value=own.value,
    low=own.low,
    high=own.high,
    units=own.units,
  )
  # Special tokens alone have no text.
  scored_bytes = np.array(record['scored_bytes'], float)[used]
  if scored_bytes.sum():
    per_byte = evals.bootstrap_ci(nll, scored_bytes)
    line = dataclasses.replace(
      line,
      bits_per_byte=math.log2(per_byte.value),
      bits_low=math.log2(per_byte.low),
      bits_high=math.log2(per_byte.high),
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
    p_value=ratio.p_value,
    smallest=ratio.smallest,
  )


def _accuracy(
  record: Mapping[str, Any], base: Mapping[str, Any] | None
) -> Line:
  scores, clusters = np.array(record['scores']), record['clusters']
  own = evals.mean(scores, clusters)
  low, high = own.low, own.high
  plain = scores.shape[0] == 1 and own.clusters == own.items
  if plain or own.error == 0:
    # All right, or all wrong, has no spread: what is shared counts once.
    right = round(own.value * own.clusters)
    low, high = evals.wilson(right, own.clusters)
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
    model: Its name; '' for all but the baseline that did the task.
    tasks: Names of the tasks; each must have been done.
    effect: 'ratio', 'difference' or 'times'.
    op: '<=' or '>='.
    bound: The number.
  """

  text: str
  model: str
  tasks: tuple[str, ...]
  effect: str
  op: str
  bound: float

  @classmethod
  def parse(cls, text: str, suite: _suite.Suite) -> Gate:
    """Reads a gate.

    Args:
      text: The gate.
      suite: Whose models and tasks it is about.

    Raises:
      ConfigError: If it is none, or of a task, effect or model that the suite
        does not have.
    """
    known = {}
    for name, task in suite.tasks.items():
      effect = _EFFECTS[task.kind]
      known[f'{name}_{effect}'] = ((name,), effect)
      if task.kind == 'speed':
        known[f'{name}{FIRST}_{effect}'] = ((name + FIRST,), effect)
    if of_kind := tuple(
      n for n, task in suite.tasks.items() if task.kind == 'perplexity'
    ):
      known[_ALL_RATIOS] = (of_kind, 'ratio')
    found = _GATE.fullmatch(text.strip())
    if not found or found['metric'] not in known:
      raise errors.ConfigError(
        f'--gate: {text!r}; expected [MODEL:]METRIC<=NUMBER or >=, METRIC one'
        f' of {[*known]}.'
      )
    others = [name for name in suite.models if name != suite.baseline]
    model = found['model'] or ''
    if (model and model not in others) or not others:
      raise errors.ConfigError(
        f'--gate: {text!r}; the model must be one of {others}, which are'
        f' compared with {suite.baseline!r}.'
      )
    tasks, effect = known[found['metric']]
    return cls(
      text=text,
      model=model,
      tasks=tasks,
      effect=effect,
      op=found['op'],
      bound=float(found['bound']),
    )

  def failures(self, lines: Sequence[Line]) -> list[str]:
    """Returns what is beyond the bound for certain: its whole interval is.

    Also a task without a comparison, and a comparison without an interval: what
    nothing is known of did not pass.

    Args:
      lines: Of `summarise`.
    """
    out = []
    for task in self.tasks:
      own = [n for n in lines if not self.model or n.model == self.model]
      compared = [
        n
        for n in own
        if n.task == task and n.effect == self.effect and n.change is not None
      ]
      if not compared:
        out.append(self._nothing(task, own))
      out += [text for n in compared if (text := self._failure(n))]
    return out

  def _failure(self, line: Line) -> str:
    """What is wrong with a comparison; '' if nothing is."""
    what = f'{line.model}: {line.task}_{line.effect}'
    low, high = line.change_low, line.change_high
    if not (math.isfinite(low) and math.isfinite(high)):
      return (
        f'{what} {line.change:.4f} has no finite interval over {line.units}'
        f' units to hold against {self.op} {self.bound:g}'
      )
    beyond = low > self.bound if self.op == '<=' else high < self.bound
    if not beyond:
      return ''
    return (
      f'{what} {line.change:.4f} [{low:.4f}, {high:.4f}] is not {self.op}'
      f' {self.bound:g}'
    )

  def _nothing(self, task: str, own: Sequence[Line]) -> str:
    """Why there is no comparison of a task."""
    why = [
      f'{n.model}: {n.reason}'
      for n in own
      if n.reason and n.task == task.removesuffix(FIRST)
    ]
    return (
      f'{self.model or "all models"}: {task}_{self.effect} was not measured'
      f' beside the baseline ({"; ".join(why) or "one of them was not run"})'
    )
