# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for people and for machines."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import html
import importlib
import io
import json
import math
import pathlib
from typing import Any
from xml.etree import ElementTree

from gemma_ext import _cli
from gemma_ext import errors
from tools.benchmarks import _summary

_VERDICT = 'verdict (Holm)'
_HEAD = (
  'model',
  'task',
  'weights',
  'of bf16',
  'value',
  '95% interval',
  'bits/byte',
  'change',
  '95% interval',
  _VERDICT,
  'p (Holm)',
  'would show',
)
_DUELS = (
  'model',
  'task',
  'weights',
  'challenger',
  'its weights',
  'its change',
  '95% interval',
  _VERDICT,
  'p (Holm)',
)
_NOT_RUN = ('model', 'task', 'reason')
# Below the first table.
_LEGEND = (
  'Intervals and what would show are of a task alone. A verdict takes the other'
  ' tasks of the model into account: better and worse are where the interval'
  f' holds no change and p, adjusted by Holm, is below {_summary.ALPHA:g}.'
  ' Speed has no p-value; its verdict is that of the interval.'
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; color: #222;
  margin: 2rem auto; padding: 0 1rem; background: #fff }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
.better { color: #007a3d } .worse { color: #b3261e }
img { max-width: 100% }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """A table of a report.

  Attributes:
    title: Its title; '' of the first, which is under that of the report.
    head: Names of the columns.
    rows: Cells.
  """

  title: str
  head: tuple[str, ...]
  rows: list[tuple[str, ...]]


def check_plots() -> None:
  """Makes sure, before slow work, that plots can be drawn.

  Raises:
    OptionalDependencyError: matplotlib is missing.
  """
  try:
    importlib.import_module('matplotlib.figure')
  except ImportError as e:
    raise errors.OptionalDependencyError(
      "The report needs matplotlib: pip install 'gemma_ext[notebook]'."
    ) from e


def tables(
  lines: Sequence[_summary.Line],
  sizes: Mapping[str, Mapping[str, int]],
  fights: Sequence[_summary.Duel] = (),
) -> list[Table]:
  """The tables of a run, the first of all models and tasks.

  Args:
    lines: What can be said.
    sizes: By model, 'bytes' and 'dense_bytes'.
    fights: Of challengers.
  """
  out = [
    Table(title='', head=_HEAD, rows=[_row(n, sizes[n.model]) for n in lines])
  ]
  if fights:
    out.append(
      Table(
        title='Challengers against models of no fewer bytes',
        head=_DUELS,
        rows=[_duel(duel, sizes) for duel in fights],
      )
    )
  if left_out := [(n.model, n.task, n.reason) for n in lines if n.reason]:
    out.append(Table(title='Not run', head=_NOT_RUN, rows=left_out))
  return out


def _duel(
  duel: _summary.Duel, sizes: Mapping[str, Mapping[str, int]]
) -> tuple[str, ...]:
  """Cells of a challenger."""
  weights = lambda name: _cli.human_bytes(sizes[name]['bytes'])
  line = duel.line
  return (
    duel.model,
    line.task,
    weights(duel.model),
    line.model,
    weights(line.model),
    f'{line.effect} {line.change:.4f}',
    _cli.human_interval((line.change_low, line.change_high), 4),
    line.verdict,
    _number(line.p_value, '.3g'),
  )


def _number(x: float, form: str) -> str:
  if math.isnan(x):
    return ''
  return f'{x:{form}}' if math.isfinite(x) else '-'


def _row(line: _summary.Line, size: Mapping[str, int]) -> tuple[str, ...]:
  head = (line.model, line.task, *_size(size))
  if line.reason:
    return (*head, 'not run', *[''] * (len(_HEAD) - len(head) - 1))
  change = ('', '', '', '', '')
  if line.change is not None:
    change = (
      f'{line.effect} {line.change:.4f}',
      _cli.human_interval((line.change_low, line.change_high), 4),
      line.verdict,
      _number(line.p_value, '.3g'),
      _number(line.smallest, '.4f'),
    )
  bits = ''
  if line.bits_per_byte is not None:
    ends = _cli.human_interval((line.bits_low, line.bits_high), 3)
    bits = f'{line.bits_per_byte:.4g} {ends}'
  return (
    *head,
    f'{line.metric} {line.value:.4g}',
    _cli.human_interval(
      (line.low, line.high), 1 if line.metric == 'tokens/s' else 3
    ),
    bits,
    *change,
  )


def _size(size: Mapping[str, int]) -> tuple[str, str]:
  dense = size['dense_bytes']
  share = f'{size["bytes"] / dense:.1%}' if dense else ''
  return _cli.human_bytes(size['bytes']), share


def show(title: str, found: Sequence[Table]) -> None:
  """Prints the tables, the first in two, as terminals are narrow."""
  (first, *others), end = found, _HEAD.index('change')
  _cli.print_table(title, first.head[:end], [r[:end] for r in first.rows])
  changes = [(*row[:2], *row[end:]) for row in first.rows if row[end]]
  if changes:
    _cli.print_table('Changes', (*_HEAD[:2], *_HEAD[end:]), changes)
  for table in others:
    _cli.print_table(table.title, table.head, table.rows)
  _cli.console().print(_LEGEND)


def markdown(title: str, found: Sequence[Table]) -> str:
  """The tables as Markdown."""
  line = lambda row: (
    '| ' + ' | '.join(c.replace('|', '\\|') for c in row) + ' |'
  )
  out = [f'# {title}', '']
  for table in found:
    out += [f'## {table.title}', ''] if table.title else []
    out += [line(table.head), line(['---'] * len(table.head))]
    out += [*map(line, table.rows), '']
    out += [] if table.title else [_LEGEND, '']
  return '\n'.join(out)


def page(
  title: str,
  found: Sequence[Table],
  pictures: Mapping[str, bytes],
  about: Mapping[str, Any],
) -> str:
  """A page that needs nothing else.

  Args:
    title: Its title.
    found: The tables.
    pictures: PNGs by caption.
    about: Machine, versions and so on.
  """
  esc = html.escape
  body = ''
  for table in found:
    body += f'<h2>{esc(table.title)}</h2>' if table.title else ''
    body += _html(table)
    body += '' if table.title else f'<p>{esc(_LEGEND)}</p>'
  body += ''.join(
    f'<h2>{esc(caption)}</h2><img alt="{esc(caption)}"'
    f' src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    for caption, png in pictures.items()
  )
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{esc(title)}</title><style>{_STYLE}</style>'
    f'<h1>{esc(title)}</h1>{body}'
    f'<h2>Made with</h2><pre>{esc(json.dumps(dict(about), indent=2))}</pre>'
  )


def _html(table: Table) -> str:
  """A table, its rows of the class of their verdict."""
  esc = html.escape
  names = ''.join(f'<th>{esc(name)}</th>' for name in table.head)
  verdict = lambda row: dict(zip(table.head, row, strict=True)).get(_VERDICT)
  body = ''.join(
    f'<tr class="{esc(verdict(row) or "")}">'
    + ''.join(f'<td>{esc(cell)}</td>' for cell in row)
    + '</tr>'
    for row in table.rows
  )
  return f'<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>'


def pictures(
  lines: Sequence[_summary.Line], sizes: Mapping[str, Mapping[str, int]]
) -> dict[str, bytes]:
  """Quality against bytes, and speed, with Pareto fronts: PNGs by task."""
  out = {}
  speeds = [n for n in lines if n.metric == 'tokens/s']
  axes: list[tuple[str, str, Mapping[str, float], bool]] = [
    (
      'bytes',
      'weights, MB',
      {model: size['bytes'] / 1e6 for model, size in sizes.items()},
      True,
    )
  ]
  for task in dict.fromkeys(n.task for n in speeds):
    of = {n.model: n.value for n in speeds if n.task == task}
    axes.append((task, 'tokens a second', of, False))
  tasks = dict.fromkeys(
    n.task for n in lines if n.metric in ('perplexity', 'accuracy')
  )
  for task in tasks:
    for name, label, x_of, less in axes:
      own = [
        (x_of[n.model], n)
        for n in lines
        if n.task == task
        and all(map(math.isfinite, (n.value, n.low, n.high)))
        and n.model in x_of
      ]
      if own:
        out[f'{task}: quality against {name}'] = _picture(own, label, less)
  return out


def _picture(
  points: Sequence[tuple[float, _summary.Line]], label: str, less: bool
) -> bytes:
  """A PNG.

  Args:
    points: Where each line is along the axis.
    label: Of the axis.
    less: Whether less of it is better.
  """
  import matplotlib.figure  # pylint: disable=g-import-not-at-top

  figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout='constrained')
  axes = figure.subplots()
  for x, n in points:
    spread = [[n.value - n.low], [n.high - n.value]]
    axes.errorbar([x], [n.value], yerr=spread, fmt='o', capsize=3)
    axes.annotate(
      n.model, (x, n.value), textcoords='offset points', xytext=(6, 4)
    )
  metric = points[0][1].metric
  sign = 1 if metric == 'perplexity' else -1
  front: list[tuple[float, float]] = []
  for x, y in sorted(
    ((x, n.value) for x, n in points), key=lambda p: p if less else -p[0]
  ):
    if not front or sign * y < sign * front[-1][1]:
      front.append((x, y))
  axes.step(
    *zip(*front, strict=True),
    where='post',
    color='#767676',
    lw=1,
  )
  if metric == 'perplexity':
    axes.set_yscale('log')
  axes.set_xlabel(label)
  axes.set_ylabel(f'{metric}, 95% interval')
  axes.grid(True, which='both', color='#e5e5e5')
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=130)
  return buffer.getvalue()


def benchmark_json(
  lines: Sequence[_summary.Line], sizes: Mapping[str, Mapping[str, int]]
) -> tuple[list[dict[str, Any]], list[str]]:
  """What benchmark actions of CI read: name, unit, value, range.

  Less is better of all of them, as these actions have it of a file as a whole:
  accuracy becomes the rate of errors, tokens a second become seconds a token.

  Args:
    lines: What can be said.
    sizes: By model, 'bytes'.

  Returns:
    Entries; and the names of those that were left out, because they are not
    finite. Of an interval that is not, only the range is left out.
  """
  entries = [
    (f'{model}: bytes', 'B', size['bytes'], None, None)
    for model, size in sizes.items()
  ]
  for n in lines:
    if not n.reason:
      entries += _less_is_better(n)
  out, left_out = [], []
  for name, unit, value, low, high in entries:
    if not math.isfinite(value):
      left_out.append(name)
      continue
    entry = {'name': name, 'unit': unit, 'value': value}
    if low is not None and math.isfinite(low) and math.isfinite(high):
      entry['range'] = f'{low:.4g} to {high:.4g}'
    out.append(entry)
  return out, left_out


def _less_is_better(
  n: _summary.Line,
) -> list[tuple[str, str, float, float | None, float | None]]:
  """Entries of a line: name, unit, value, and ends of its interval."""
  name = f'{n.model}: {n.task}'
  if n.metric == 'tokens/s':
    return [(name, 's/token', 1 / n.value, 1 / n.high, 1 / n.low)]
  if n.metric == 'accuracy':
    out = [
      (f'{name}, error rate', 'errors/item', 1 - n.value, 1 - n.high, 1 - n.low)
    ]
    if n.change is not None:
      out.append(
        (
          f'{name}, error rate minus the baseline',
          'errors/item',
          -n.change,
          -n.change_high,
          -n.change_low,
        )
      )
    return out
  if n.metric == 'perplexity' and n.change is not None:
    out = [
      (name, 'perplexity ratio', n.change, n.change_low, n.change_high),
    ]
  else:
    out = [(name, n.metric, n.value, n.low, n.high)]
  if n.bits_per_byte is not None:
    out.append(
      (
        f'{name}, bits per byte',
        'bits/byte',
        n.bits_per_byte,
        n.bits_low,
        n.bits_high,
      )
    )
  return out


def junit(
  lines: Sequence[_summary.Line], gates: Sequence[_summary.Gate]
) -> str:
  """Gates as test cases of JUnit."""
  suite = ElementTree.Element('testsuite', name='benchmarks')
  failed = 0
  for gate in gates:
    case = ElementTree.SubElement(
      suite, 'testcase', classname='gate', name=gate.text
    )
    if found := gate.failures(lines):
      failed += 1
      failure = ElementTree.SubElement(case, 'failure', message=found[0])
      failure.text = '\n'.join(found)
  for line in lines:
    case = ElementTree.SubElement(
      suite, 'testcase', classname=line.task, name=line.model
    )
    if line.reason:
      ElementTree.SubElement(case, 'skipped', message=line.reason)
      continue
    out = ElementTree.SubElement(case, 'system-out')
    out.text = f'{line.metric} {line.value:.6g} {line.verdict}'
  suite.set('tests', str(len(gates) + len(lines)))
  suite.set('failures', str(failed))
  suite.set('skipped', str(sum(bool(line.reason) for line in lines)))
  return ElementTree.tostring(suite, encoding='unicode', xml_declaration=True)


def write_all(
  folder: pathlib.Path,
  title: str,
  lines: Sequence[_summary.Line],
  sizes: Mapping[str, Mapping[str, int]],
  gates: Sequence[_summary.Gate],
  about: Mapping[str, Any],
  fights: Sequence[_summary.Duel] = (),
) -> None:
  """Writes report.md, junit.xml, benchmark.json and report.html."""
  found = tables(lines, sizes, fights)
  bench, left_out = benchmark_json(lines, sizes)
  for name in left_out:
    _cli.note(f'benchmark.json: {name!r} is not finite and left out.')
  write = lambda name, text: (folder / name).write_text(text, encoding='utf-8')
  write('report.md', markdown(title, found))
  write('junit.xml', junit(lines, gates))
  write('benchmark.json', json.dumps(bench, indent=2, allow_nan=False))
  # Last, as it draws.
  write('report.html', page(title, found, pictures(lines, sizes), about))
