# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The plots of a report, one figure each, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any, TYPE_CHECKING

from gemma_ext import errors

if TYPE_CHECKING:
  import matplotlib.figure

# Okabe and Ito's palette, told apart with any colour vision.
_BLUE, _ORANGE, _GREEN, _GREY = '#0072B2', '#D55E00', '#009E73', '#767676'
_CYCLE = (_BLUE, _ORANGE, _GREEN, '#CC79A7', '#56B4E9', '#E69F00')
_MARKERS = 'osD^vP'


def figures(
  record: Mapping[str, Any],
) -> dict[str, matplotlib.figure.Figure]:
  """Draws what a record has the data for: error, codes, ratio, convergence.

  Raises:
    OptionalDependencyError: If matplotlib is not installed.
  """
  try:
    import matplotlib
    import matplotlib.figure
  except ImportError as e:
    raise errors.OptionalDependencyError(
      "The report needs matplotlib: pip install 'gemma_ext[notebook]'."
    ) from e
  settings: dict[Any, Any] = {
    'axes.axisbelow': True,
    'axes.grid': True,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'font.size': 10,
    'grid.color': '#e5e5e5',
    'legend.frameon': False,
    'lines.markersize': 5,
  }
  layers = sorted(record.get('layers') or (), key=lambda row: row['layer'])
  curves = record.get('curves') or {}
  with matplotlib.rc_context(settings):
    drawn = {
      'error': _draw_error(layers),
      'codes': _draw_codes(layers),
      'ratio': _draw_ratio(layers),
      'convergence': _draw_convergence(curves),
    }
  return {name: figure for name, figure in drawn.items() if figure is not None}


def _figure(rows: int = 1, columns: int = 1, height: float = 3.6) -> Any:
  import matplotlib.figure

  figure = matplotlib.figure.Figure(
    figsize=(8.4, height * rows), layout='constrained'
  )
  return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _column(
  rows: Sequence[Mapping[str, Any]], key: str, *, scale: float = 1
) -> list[float]:
  """Values of a column; NaN, which is not drawn, where there is none."""
  return [
    scale * row[key] if is_number(row.get(key)) else math.nan for row in rows
  ]


def is_number(value: Any) -> bool:
  return (
    isinstance(value, (int, float))
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def has(rows: Sequence[Mapping[str, Any]], *keys: str) -> bool:
  return any(is_number(row.get(key)) for row in rows for key in keys)


def _label_axes(axes: Any, x: str, y: str, *, whole: bool = False) -> None:
  import matplotlib.ticker

  axes.set(xlabel=x, ylabel=y)
  if whole:
    axes.xaxis.set_major_locator(
      matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1)
    )


def _log_y(axes: Any) -> None:
  """Log scale, with ticks in plain numbers where there are few decades."""
  import matplotlib.ticker

  axes.set_yscale('log', nonpositive='mask')
  low, high = axes.get_ylim()
  if not 0 < low < high or high / low > 1000:
    return
  # Ends that are nearly equal would leave no tick between them.
  middle = math.sqrt(low * high)
  low, high = min(low, middle / 1.2), max(high, middle * 1.2)
  axes.set_ylim(low, high)
  steps = (1, 1.5, 2, 3, 5, 7) if high / low < 30 else (1, 2, 5)
  axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=steps))
  axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter('{x:g}'))
  axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def _pair(axes: Any, rows: Any, name: str, scale: float = 1) -> None:
  """Draws a column before and after, hollow and full."""
  x = _column(rows, 'layer')
  style = {'linestyle': '-', 'linewidth': 1.2}
  before = _column(rows, f'{name}_before', scale=scale)
  after = _column(rows, f'{name}_after', scale=scale)
  axes.plot(
    x, before, **style, color=_ORANGE, marker='o', mfc='w', label='before'
  )
  axes.plot(x, after, **style, color=_BLUE, marker='s', label='after')


def _draw_error(rows: Sequence[Mapping[str, Any]]) -> Any:
  if not has(rows, 'error_before', 'error_after'):
    return None
  figure, (axes,) = _figure()
  _pair(axes, rows, 'error')
  _log_y(axes)
  _label_axes(axes, 'layer', 'held-out error (log scale)', whole=True)
  axes.legend(ncols=2, loc='lower right', bbox_to_anchor=(1, 1))
  return figure


def _draw_codes(rows: Sequence[Mapping[str, Any]]) -> Any:
  changes = (
    ('zero_to_nonzero', '0 to ±1', _GREEN),
    ('nonzero_to_zero', '±1 to 0', '#E69F00'),
    ('sign_flips', 'sign flips', '#CC79A7'),
  )
  panels = [
    ('density_before', 'density_after'),
    tuple(key for key, _, _ in changes),
  ]
  shown = [i for i, keys in enumerate(panels) if has(rows, *keys)]
  if not shown:
    return None
  figure, panes = _figure(len(shown), height=3)
  for axes, panel in zip(panes, shown):
    if panel == 0:
      _pair(axes, rows, 'density', 100)
      _label_axes(axes, 'layer', 'codes not zero, %', whole=True)
    else:
      x = _column(rows, 'layer')
      for i, (key, label, color) in enumerate(changes):
        place = [value + 0.27 * (i - 1) for value in x]
        heights = _column(rows, key, scale=100)
        axes.bar(place, heights, 0.25, color=color, label=label)
      _label_axes(axes, 'layer', 'codes changed, %', whole=True)
    axes.set_xlim(min(_column(rows, 'layer')) - 0.6, None)
    axes.set_xlim(None, max(_column(rows, 'layer')) + 0.6)
    axes.legend(ncols=3, loc='lower right', bbox_to_anchor=(1, 1))
  return figure


def _draw_ratio(rows: Sequence[Mapping[str, Any]]) -> Any:
  if not has(rows, 'ratio'):
    return None
  figure, (axes,) = _figure(height=3)
  axes.plot(
    _column(rows, 'layer'),
    _column(rows, 'ratio'),
    color=_BLUE,
    marker='s',
    linewidth=1.2,
    label='compressed',
  )
  axes.axhline(1, color=_GREY, linestyle='--', linewidth=1.2, label='dense')
  _log_y(axes)
  label = 'perplexity ratio (log scale)'
  _label_axes(axes, 'healed up to layer', label, whole=True)
  axes.legend(ncols=2, loc='lower right', bbox_to_anchor=(1, 1))
  return figure


def _draw_convergence(curves: Mapping[str, Mapping[str, Any]]) -> Any:
  """A panel for each pair of axes: losses of different kinds do not compare."""
  panels: dict[tuple[str, str], list[str]] = {}
  for name, curve in curves.items():
    points = [*zip(curve['x'], curve['y']), *(curve.get('held_out') or ())]
    if any(is_number(x) and is_number(y) for x, y in points):
      labels = curve.get('x_label', 'step'), curve.get('y_label', 'loss')
      panels.setdefault(labels, []).append(name)
  if not panels:
    return None
  figure, panes = _figure(len(panels))
  for axes, ((x_label, y_label), names) in zip(panes, panels.items()):
    for i, name in enumerate(names):
      _draw_curve(axes, curves[name], name, _line_style(i, len(names)))
    _log_y(axes)
    ends = axes.dataLim.intervalx
    if 0 < 100 * ends[0] <= ends[1]:  # A point at 0 has no place on it.
      axes.set_xscale('log')
      x_label = f'{x_label} (log scale)'
    _label_axes(axes, x_label, f'{y_label} (log scale)')
    axes.legend(
      loc='upper left',
      bbox_to_anchor=(1.01, 1),
      fontsize=8,
      ncols=1 + (len(names) - 1) // 20,
    )
  return figure


def _line_style(index: int, count: int) -> dict[str, Any]:
  """Unlike colours for a few curves, an ordered scale for many."""
  marker = _MARKERS[index % len(_MARKERS)]
  if count <= len(_CYCLE):
    return {'color': _CYCLE[index], 'marker': marker}
  import matplotlib

  # The light end of the map would not show on white.
  color = matplotlib.colormaps['viridis'](0.92 * index / (count - 1))
  return {'color': color, 'marker': marker}


def _draw_curve(
  axes: Any, curve: Mapping[str, Any], name: str, style: dict[str, Any]
) -> None:
  color, marker = style['color'], style['marker']
  # A `$` would start a formula, and a leading `_` hide it from the legend.
  label = '\u200b' + name.replace('$', r'\$')
  held_out = curve.get('held_out') or ()
  x, y = ([float(v) for v in curve[k]] for k in ('x', 'y'))
  axes.plot(x, y, color=color, linewidth=1.2, label=label)
  if held_out:
    xs, ys = zip(*held_out)
    axes.plot(
      xs, ys, color=color, marker=marker, linestyle='', mec='w', mew=0.6
    )
