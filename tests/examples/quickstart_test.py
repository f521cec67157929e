# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The quickstart notebook, executed on a tiny model."""

import pathlib
import re

import nbformat
import pytest

from tests import tiny
from tools import run_notebook

_ROOT = pathlib.Path(__file__).parents[2]
_NOTEBOOK = _ROOT / 'examples/enhancements/quickstart.ipynb'


@pytest.fixture(scope='module')
def printed(tmp_path_factory):
  path = tmp_path_factory.mktemp('quickstart') / 'tiny'
  tiny.checkpoint(path)
  with pytest.MonkeyPatch.context() as patch:
    # The kernel is a process of its own: it is to import what is tested here.
    patch.setenv('PYTHONPATH', str(_ROOT))
    patch.setenv('GEMMA_EXT_QUICKSTART_CHECKPOINT', str(path))
    return run_notebook.printed(run_notebook.execute(_NOTEBOOK, timeout=300))


def _numbers(pattern: str, text: str) -> list[float]:
  match = re.search(pattern, text)
  assert match, text
  return [float(group.replace(',', '')) for group in match.groups()]


def test_compressed_bytes_are_about_half(printed):
  small, dense = _numbers(r'([\d,]+) bytes instead of ([\d,]+)', printed)
  assert 0.3 * dense < small < 0.65 * dense


def test_perplexities_have_intervals_around_them(printed):
  for name in ('dense', 'compressed'):
    value, low, high = _numbers(
      rf'{name} +perplexity +([\d.]+) +\[([\d.]+), ([\d.]+)\]', printed
    )
    assert 1 < low < value < high


def test_ratio_is_that_of_the_perplexities(printed):
  dense, small = (
    _numbers(rf'{name} +perplexity +([\d.]+)', printed)[0]
    for name in ('dense', 'compressed')
  )
  ratio, low, high = _numbers(
    r'ratio ([\d.]+) +\[([\d.]+), ([\d.]+)\]', printed
  )
  assert low <= ratio <= high
  assert ratio == pytest.approx(small / dense, rel=1e-3)


def test_both_models_go_on_with_the_prompt(printed):
  assert printed.count('The capital of France is') == 2


def test_reloaded_model_gives_the_same_perplexity(printed):
  (small,) = _numbers(r'compressed +perplexity +([\d.]+)', printed)
  (again,) = _numbers(r'perplexity after loading ([\d.]+), the same', printed)
  assert again == small


def test_notebook_is_committed_without_outputs():
  notebook = nbformat.read(_NOTEBOOK, as_version=4)
  nbformat.validate(notebook)
  cells = [c for c in notebook.cells if c.cell_type == 'code']
  assert len(cells) >= 10
  assert not [c.id for c in cells if c.outputs or c.execution_count]
  assert '%pip install' in cells[0].source
