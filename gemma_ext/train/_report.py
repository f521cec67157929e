# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`write`: what a run did, as one HTML page with plots, and the plots as PNG.

The page holds its plots and nothing from elsewhere: no script, font or link.
A record has any of these sections, and a section that is missing is left out:

    title    text
    config   JSON values
    table    [{'name', 'value', 'ci95': [low, high] or None}]
    layers   [{'layer': int, 'error_before', 'error_after', 'density_before',
             'density_after', 'sign_flips', 'zero_to_nonzero',
             'nonzero_to_zero', 'seconds', 'ratio'}], fractions from 0 to 1
    curves   {name: {'x', 'y', 'held_out': [[x, y]], 'x_label', 'y_label'}}
    samples  [{'prompt', 'text'}]
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
import html
import io
import json
import os
import pathlib
import tempfile
from typing import Any, TYPE_CHECKING

from gemma_ext import errors
from gemma_ext.train import _plots

if TYPE_CHECKING:
  from gemma_ext.train import _run

_SECTIONS = ('title', 'config', 'table', 'layers', 'curves', 'samples')
_CAPTIONS = {
  'error': 'Held-out error of each layer, before and after healing.',
  'codes': 'Ternary codes: how many are not zero, and how many changed.',
  'ratio': 'Perplexity relative to the dense model once a layer is healed;'
  ' layers not healed yet are still one-shot.',
  'convergence': 'Loss while healing: lines are what the optimiser saw,'
  ' markers are held out.',
}
_LAYER_COLUMNS = {
  'layer': ('layer', '{:.0f}', 1),
  'error_before': ('error before', '{:.4g}', 1),
  'error_after': ('error after', '{:.4g}', 1),
  'density_before': ('density before, %', '{:.1f}', 100),
  'density_after': ('density after, %', '{:.1f}', 100),
  'sign_flips': ('sign flips, %', '{:.2f}', 100),
  'zero_to_nonzero': ('0 to ±1, %', '{:.2f}', 100),
  'nonzero_to_zero': ('±1 to 0, %', '{:.2f}', 100),
  'seconds': ('time, s', '{:.0f}', 1),
  'ratio': ('perplexity ratio', '{:.4f}', 1),
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .9rem; }
th, td { text-align: right; padding: .3rem .8rem; vertical-align: bottom;
  border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
pre { background: #f5f5f5; padding: .8rem 1rem; border-radius: 4px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
dt { font-weight: 600; margin-top: 1rem; } dd { margin: 0; }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def record_of(run: _run.Run, config: Mapping[str, Any]) -> dict[str, Any]:
  """Makes a record out of the log of a run.

  A layer that several stages touched has one row: its first state before, its
  last one after, its time and its changes of codes added up. Errors are those
  of the stages that work on single layers.

  Args:
    run: That has ended.
    config: Its snapshot.

  Returns:
    The record, for `write`.
  """
  layers: dict[int, dict[str, Any]] = {}
  curves: dict[str, dict[str, Any]] = {}
  for entry in run.log:
    stage = run.config.stages[entry['stage']]
    unit, kept = entry['unit'], entry['kept']
    before = entry['held_out_before']
    after = entry['held_out_after'] if kept else before
    name = f'{entry["stage"] + 1}. {type(stage.optimizer).__name__}, {unit}'
    steps, losses = zip(*entry['curve']) if entry['curve'] else ((), ())
    curves[name] = {
      'x': list(steps),
      'y': list(losses),
      'x_label': 'step',
      'y_label': f'{type(stage).__name__} loss',
      'held_out': [[0, before], [entry['steps'], entry['held_out_after']]],
    }
    if unit.startswith('layer_'):
      row = layers.setdefault(int(unit.split('_')[1]), {})
      row.setdefault('error_before', before)
      row |= {'error_after': after, 'ratio': entry['ratio']}
      row['seconds'] = row.get('seconds', 0) + entry['seconds']
    for moved in entry.get('layers', ()):
      row = layers.setdefault(moved['layer'], {})
      row.setdefault('density_before', moved['density_before'])
      row['density_after'] = moved['density_after']
      for key in ('sign_flips', 'zero_to_nonzero', 'nonzero_to_zero'):
        row[key] = row.get(key, 0) + moved[key]
  table = [
    {'name': 'units of work', 'value': len(run.log)},
    {'name': 'kept', 'value': sum(e['kept'] for e in run.log)},
    {'name': 'time, s', 'value': sum(e['seconds'] for e in run.log)},
  ]
  if run.log:
    name = f'perplexity ratio, {run.config.held_out} held-out windows'
    table.insert(0, {'name': name, 'value': run.log[-1]['ratio']})
  return {
    'title': f'Healing of {run.config.checkpoint}',
    'config': dict(config),
    'table': table,
    'layers': [{'layer': k, **row} for k, row in sorted(layers.items())],
    'curves': curves,
  }


def write(
  directory: str | os.PathLike[str], record: Mapping[str, Any]
) -> pathlib.Path:
  """Writes `report.html` and its plots as PNG.

  Args:
    directory: Made if it is not there; files of an earlier report are replaced.
    record: As above.

  Returns:
    Path of the page.

  Raises:
    TrainError: If a section is unknown, or nothing can be written there.
    OptionalDependencyError: If matplotlib is not installed.
  """
  if unknown := set(record) - set(_SECTIONS):
    raise errors.TrainError(
      f'A report has no section {sorted(unknown)}; it has {list(_SECTIONS)}.'
    )
  folder = pathlib.Path(directory).expanduser()
  plots = {n: _png(f) for n, f in _plots.figures(record).items()}
  page = _page(record, plots)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in plots.items():
      _replace(folder / f'{name}.png', data)
    _replace(folder / 'report.html', page.encode())
  except OSError as e:
    raise errors.TrainError(
      f'Cannot write the report to {folder}: {e.strerror}.'
    ) from e
  return folder / 'report.html'


def _png(figure: Any) -> bytes:
  buffer = io.BytesIO()
  # The version of matplotlib has no place in a file that may be compared.
  figure.savefig(buffer, format='png', dpi=144, metadata={'Software': None})
  return buffer.getvalue()


# ----------------------------------- page ------------------------------------


def _page(record: Mapping[str, Any], plots: Mapping[str, bytes]) -> str:
  parts = []
  if table := record.get('table'):
    rows = [(row['name'], *_value(row)) for row in table]
    head = ['', 'value', '95% interval']
    parts.append(f'<h2>Results</h2>{_html_table(head, rows)}')
  if plots:
    parts.append('<h2>Plots</h2>')
  for name, data in plots.items():
    caption = _CAPTIONS[name]
    image = base64.b64encode(data).decode()
    parts.append(
      f'<figure><img alt="{html.escape(caption)}"'
      f' src="data:image/png;base64,{image}">'
      f'<figcaption>{html.escape(caption)}</figcaption></figure>'
    )
  if layers := record.get('layers'):
    used = {k: v for k, v in _LAYER_COLUMNS.items() if _plots.has(layers, k)}
    cells = [
      [_cell(row.get(key), form, by) for key, (_, form, by) in used.items()]
      for row in sorted(layers, key=lambda row: row['layer'])
    ]
    head = [label for label, _, _ in used.values()]
    parts.append(f'<h2>Layers</h2>{_html_table(head, cells)}')
  if samples := record.get('samples'):
    items = ''.join(
      f'<dt>{html.escape(str(sample["prompt"]))}</dt>'
      f'<dd><pre>{html.escape(str(sample["text"]))}</pre></dd>'
      for sample in samples
    )
    parts.append(f'<h2>Samples</h2><dl>{items}</dl>')
  if (config := record.get('config')) is not None:
    text = html.escape(json.dumps(config, indent=2, ensure_ascii=False))
    parts.append(
      f'<h2>Config</h2><details><summary>JSON</summary><pre>{text}</pre>'
      '</details>'
    )
  title = html.escape(str(record.get('title') or 'Report'))
  return _PAGE.format(title=title, style=_STYLE, body='\n'.join(parts))


def _value(row: Mapping[str, Any]) -> tuple[str, str]:
  value, interval = row['value'], row.get('ci95')
  text = f'{value:,.5g}' if _plots.is_number(value) else str(value)
  if interval is None:
    return text, ''
  low, high = (
    f'{end:,.5g}' if _plots.is_number(end) else '?' for end in interval
  )
  return text, f'[{low}, {high}]'


def _cell(value: Any, form: str, by: float) -> str:
  return form.format(by * value) if _plots.is_number(value) else ''


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [''.join(f'<th>{html.escape(cell)}</th>' for cell in head)]
  for row in rows:
    lines.append(''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row))
  body = '\n'.join(f'<tr>{line}</tr>' for line in lines)
  return f'<div class="wide"><table>\n{body}\n</table></div>'


def _replace(path: pathlib.Path, data: bytes) -> None:
  """Writes a file that is either the old one or the whole new one."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, suffix='.tmp')
  try:
    with os.fdopen(handle, 'wb') as file:
      file.write(data)
    # A temporary file is private; a report is as other new files are.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, path)
  except OSError:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise
