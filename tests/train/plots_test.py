# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Plots show the numbers they are given, and nothing where there is none."""

import math

import numpy as np

from gemma_ext.train import _plots

_LAYERS = [
  {
    'layer': i,
    'error_before': 0.5 * (i + 1),
    'error_after': 0.1 * (i + 1),
    'density_before': 0.55,
    'density_after': 0.5 + 0.01 * i,
    'sign_flips': 0.001 * i,
    'zero_to_nonzero': 0.03,
    'nonzero_to_zero': 0.02,
    'seconds': 40.0,
    'ratio': 1.5 - 0.1 * i,
  }
  for i in range(4)
]
_CURVES = {
  'gradient': {'x': [1, 2, 3], 'y': [3.0, 2.0, 1.5], 'held_out': [[3, 1.6]]},
  'evolution': {'x': [1, 2, 3], 'y': [3.0, 2.5, 2.0]},
}


def _lines(axes) -> dict[str, np.ndarray]:
  return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def test_plots_show_the_data():
  # Rows in any order come out by layer.
  drawn = _plots.figures({'layers': _LAYERS[::-1], 'curves': _CURVES})
  (axes,) = drawn['error'].axes
  lines = _lines(axes)
  np.testing.assert_allclose(lines['before'][:, 1], [0.5, 1.0, 1.5, 2.0])
  np.testing.assert_allclose(lines['after'][:, 0], [0, 1, 2, 3])
  np.testing.assert_allclose(lines['after'][:, 1], [0.1, 0.2, 0.3, 0.4])
  assert axes.get_yscale() == 'log'

  density, changes = drawn['codes'].axes
  np.testing.assert_allclose(_lines(density)['after'][:, 1], [50, 51, 52, 53])
  heights = {
    bars.get_label(): [bar.get_height() for bar in bars]
    for bars in changes.containers
  }
  np.testing.assert_allclose(heights['sign flips'], [0, 0.1, 0.2, 0.3])
  np.testing.assert_allclose(heights['0 to ±1'], [3] * 4)
  np.testing.assert_allclose(heights['±1 to 0'], [2] * 4)

  (axes,) = drawn['ratio'].axes
  lines = _lines(axes)
  np.testing.assert_allclose(lines['compressed'][:, 1], [1.5, 1.4, 1.3, 1.2])
  np.testing.assert_allclose(lines['dense'][:, 1], [1, 1])

  (axes,) = drawn['convergence'].axes
  first, held_out, second = axes.get_lines()
  np.testing.assert_allclose(first.get_ydata(), [3, 2, 1.5])
  np.testing.assert_allclose(held_out.get_xydata(), [[3, 1.6]])
  np.testing.assert_allclose(second.get_ydata(), [3, 2.5, 2])
  assert first.get_color() == held_out.get_color() != second.get_color()


def test_losses_of_different_kinds_have_panels_of_their_own():
  curve = {'x': [10, 1000], 'y': [2.0, 1.0], 'x_label': 'forward passes'}
  curves = {
    'a': {**curve, 'y_label': 'KL'},
    'b': {**curve, 'y_label': 'KL'},
    'c': {**curve, 'x': [0, 1000], 'y_label': 'error'},
  }
  panels = _plots.figures({'curves': curves})['convergence'].axes
  assert [len(axes.get_lines()) for axes in panels] == [2, 1]
  assert [axes.get_xscale() for axes in panels] == ['log', 'linear']
  assert panels[0].get_xlabel() == 'forward passes (log scale)'
  assert panels[1].get_ylabel() == 'error (log scale)'


def test_many_curves_have_unlike_colours():
  curves = {f'c{i}': {'x': [1, 2], 'y': [2, 1]} for i in range(62)}
  figure = _plots.figures({'curves': curves})['convergence']
  colors = {tuple(line.get_color()) for line in figure.axes[0].get_lines()}
  assert len(colors) == 62


def test_numbers_that_are_missing_or_not_finite():
  layers = [
    {'layer': 0, 'error_before': math.nan, 'error_after': 0.0, 'ratio': None},
    {'layer': 1, 'error_before': 2.0, 'error_after': math.inf},
  ]
  curves = {
    'a': {'x': [1, 2], 'y': [math.nan, 1.0], 'held_out': []},
    'empty': {'x': [], 'y': []},
    'none': {'x': [1], 'y': [math.inf]},
  }
  drawn = _plots.figures({'layers': layers, 'curves': curves})
  assert list(drawn) == ['error', 'convergence']
  before = _lines(drawn['error'].axes[0])['before'][:, 1]
  np.testing.assert_array_equal(before, [math.nan, 2.0])
  assert len(drawn['convergence'].axes[0].get_lines()) == 1


def test_empty_record():
  assert _plots.figures({}) == {}
