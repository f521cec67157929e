# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for people and for machines."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
import html
import io
import json
import math
import pathlib
from typing import Any
from xml.etree import ElementTree

from gemma_ext import _cli
from tools.benchmarks import _summary

_HEAD = (
  'model',
  'task',
  'weights',
  'of bf16',
  'value',
  '95% interval',
  'change',
  '95% interval',
  'verdict',
  'p (Holm)',
  'would show',
)
_CHALLENGE = 'Challengers against models of no fewer bytes'
_DUELS = (
  'model',
  'task',
  'weights',
  'challenger',
  'its weights',
  'its change',
  '95% interval',
  'verdict',
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


def rows(
  lines: Sequence[_summary.Line], sizes: Mapping[str, Mapping[str, int]]
) -> list[tuple[str, ...]]:
  """Cells of the table of a run.

  Args:
    lines: What can be said.
    sizes: By model, 'bytes' and 'dense_bytes'; those without tasks as well.
  """
  out = []
  seen = set()
  for line in lines:
    seen.add(line.model)
    out.append(_row(line, sizes[line.model]))
  for model, size in sizes.items():
    if model not in seen:
      out.append((model, '', *_size(size), *[''] * (len(_HEAD) - 4)))
  return out


def duels(
  found: Sequence[_summary.Duel], sizes: Mapping[str, Mapping[str, int]]
) -> list[tuple[str, ...]]:
  """Cells of the table of challengers."""
  weights = lambda name: _cli.human_bytes(sizes[name]['bytes'])
  return [
    (
      duel.model,
      duel.line.task,
      weights(duel.model),
      duel.line.model,
      weights(duel.line.model),
      f'{duel.line.effect} {duel.line.change:.4f}',
      _cli.human_interval((duel.line.change_low, duel.line.change_high), 4),
      duel.line.verdict,
    )
    for duel in found
  ]


def _row(line: _summary.Line, size: Mapping[str, int]) -> tuple[str, ...]:
  change = ('', '', '', '', '')
  if line.change is not None:
    change = (
      f'{line.effect} {line.change:.4f}',
      _cli.human_interval((line.change_low, line.change_high), 4),
      line.verdict,
      '' if math.isnan(line.p_value) else f'{line.p_value:.3g}',
      '' if math.isnan(line.smallest) else f'{line.smallest:.4f}',
    )
  return (
    line.model,
    line.task,
    *_size(size),
    f'{line.metric} {line.value:.4g}',
    _cli.human_interval(
      (line.low, line.high), 1 if line.metric == 'tokens/s' else 3
    ),
    *change,
  )


def _size(size: Mapping[str, int]) -> tuple[str, str]:
  dense = size['dense_bytes']
  share = f'{size["bytes"] / dense:.1%}' if dense else ''
  return _cli.human_bytes(size['bytes']), share


def table(
  title: str,
  cells: Sequence[tuple[str, ...]],
  fights: Sequence[tuple[str, ...]] = (),
) -> None:
  """Prints the tables."""
  _cli.print_table(title, _HEAD, cells)
  if fights:
    _cli.print_table(_CHALLENGE, _DUELS, fights)


def markdown(
  title: str,
  cells: Sequence[tuple[str, ...]],
  head: Sequence[str] = _HEAD,
  level: int = 1,
) -> str:
  """A table as Markdown."""
  line = lambda row: (
    '| ' + ' | '.join(c.replace('|', '\\|') for c in row) + ' |'
  )
  return '\n'.join(
    [f'{"#" * level} {title}', '', line(head), line(['---'] * len(head))]
    + [line(row) for row in cells]
    + ['']
  )


def page(
  title: str,
  cells: Sequence[tuple[str, ...]],
  pictures: Mapping[str, bytes],
  about: Mapping[str, Any],
  fights: Sequence[tuple[str, ...]] = (),
) -> str:
  """A page that needs nothing else.

  Args:
    title: Its title.
    cells: The table.
    pictures: PNGs by caption.
    about: Machine, versions and so on.
    fights: The table of challengers.
  """
  esc = html.escape
  second = ''
  if fights:
    second = f'<h2>{esc(_CHALLENGE)}</h2>{_html(_DUELS, fights)}'
  images = ''.join(
    f'<h2>{esc(caption)}</h2><img alt="{esc(caption)}"'
    f' src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    for caption, png in pictures.items()
  )
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{esc(title)}</title><style>{_STYLE}</style>'
    f'<h1>{esc(title)}</h1>{_html(_HEAD, cells)}{second}{images}'
    f'<h2>Made with</h2><pre>{esc(json.dumps(dict(about), indent=2))}</pre>'
  )


def _html(head: Sequence[str], cells: Sequence[tuple[str, ...]]) -> str:
  """A table, its rows of the class of their verdict."""
  esc = html.escape
  names = ''.join(f'<th>{esc(name)}</th>' for name in head)
  verdict = head.index('verdict')
  body = ''.join(
    f'<tr class="{esc(row[verdict])}">'
    + ''.join(f'<td>{esc(cell)}</td>' for cell in row)
    + '</tr>'
    for row in cells
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
        if n.task == task and not math.isnan(n.low) and n.model in x_of
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
) -> list[dict[str, Any]]:
  """What benchmark actions of CI read: name, unit, value, range."""
  out = []
  for model, size in sizes.items():
    out.append({'name': f'{model}: bytes', 'unit': 'B', 'value': size['bytes']})
  for n in lines:
    value, low, high, unit = n.value, n.low, n.high, n.metric
    if unit == 'tokens/s':  # Actions read that less is better.
      value, low, high, unit = 1 / value, 1 / high, 1 / low, 's/token'
    elif n.change is not None and n.effect != 'times':
      value, low, high = n.change, n.change_low, n.change_high
      unit = f'{n.metric} {n.effect}'
    out.append(
      {
        'name': f'{n.model}: {n.task}',
        'unit': unit,
        'value': value,
        'range': f'{low:.4g} to {high:.4g}',
      }
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
    out = ElementTree.SubElement(case, 'system-out')
    out.text = f'{line.metric} {line.value:.6g} {line.verdict}'
  suite.set('tests', str(len(gates) + len(lines)))
  suite.set('failures', str(failed))
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
  """Writes report.md, report.html, junit.xml and benchmark.json."""
  cells, second = rows(lines, sizes), duels(fights, sizes)
  report = markdown(title, cells)
  if second:
    report += '\n' + markdown(_CHALLENGE, second, _DUELS, level=2)
  for name, text in {
    'report.md': report,
    'report.html': page(title, cells, pictures(lines, sizes), about, second),
    'junit.xml': junit(lines, gates),
    'benchmark.json': json.dumps(benchmark_json(lines, sizes), indent=2),
  }.items():
    (folder / name).write_text(text, encoding='utf-8')
