# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Reports: what is drawn, what is escaped, what is left out."""

import base64
import html.parser
import math
import re
import struct
import sys
import types

import pytest

from gemma_ext import errors
from gemma_ext import train
from gemma_ext.train import _plots
from gemma_ext.train import _report

_EVIL = '<script>alert("x")</script> & \'y\' $\\frac'
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
_RECORD = {
  'title': _EVIL,
  'config': {'text': _EVIL, 'steps': 60},
  'table': [
    {'name': _EVIL, 'value': 1.0286, 'ci95': [1.0224, 1.0347]},
    {'name': 'kept', 'value': 18, 'ci95': None},
  ],
  'layers': _LAYERS,
  'curves': _CURVES,
  'samples': [{'prompt': _EVIL, 'text': _EVIL}],
}


class _Page(html.parser.HTMLParser):
  """Collects text by tag and the attributes of images; checks nesting."""

  _VOID = ('meta', 'img')

  def __init__(self, text: str):
    super().__init__()
    self.texts: dict[str, list[str]] = {}
    self.attributes: list[tuple[str, str, str]] = []
    self._open: list[str] = []
    self.feed(text)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.attributes += [(tag, k, v or '') for k, v in attrs]
    if tag not in self._VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    if self._open and data.strip():
      self.texts.setdefault(self._open[-1], []).append(data)


def _size(png: bytes) -> tuple[int, int]:
  assert png[:8] == b'\x89PNG\r\n\x1a\n'
  assert png[-8:-4] == b'IEND'
  return struct.unpack('>II', png[16:24])


def test_page_and_plots(tmp_path):
  path = _report.write(tmp_path / 'a' / 'b', _RECORD)
  assert path == tmp_path / 'a' / 'b' / 'report.html'
  names = ['error', 'codes', 'ratio', 'convergence']
  assert sorted(p.name for p in path.parent.iterdir()) == sorted(
    [f'{name}.png' for name in names] + ['report.html']
  )
  page = _Page(path.read_text(encoding='utf-8'))
  sources = [v for tag, k, v in page.attributes if (tag, k) == ('img', 'src')]
  assert len(sources) == 4
  for name, source in zip(names, sources):
    data = base64.b64decode(source.removeprefix('data:image/png;base64,'))
    assert data == (path.parent / f'{name}.png').read_bytes()
    width, height = _size(data)
    assert width > 1000 and height > 400
  cells = page.texts['td']
  assert '1.0286' in cells and '[1.0224, 1.0347]' in cells
  assert '53.0' in cells and '0.30' in cells  # Density and flips of layer 3.


def test_everything_is_escaped(tmp_path):
  text = _report.write(tmp_path, _RECORD).read_text(encoding='utf-8')
  assert '<script' not in text
  page = _Page(text)
  assert page.texts['h1'] == [_EVIL] and page.texts['title'] == [_EVIL]
  assert page.texts['dt'] == [_EVIL]
  assert _EVIL in page.texts['td'] and _EVIL in page.texts['pre']
  assert '"steps": 60' in page.texts['pre'][-1]


def test_nothing_comes_from_elsewhere(tmp_path):
  text = _report.write(tmp_path, _RECORD).read_text(encoding='utf-8')
  assert not re.search(r'https?:|url\(|@import', text)
  page = _Page(text)
  assert {k for _, k, _ in page.attributes} <= {
    *('lang', 'charset', 'http-equiv', 'content', 'name', 'alt', 'src'),
    'class',
  }
  policy = [v for tag, k, v in page.attributes if k == 'content']
  assert policy[0].startswith("default-src 'none'")


@pytest.mark.parametrize('section', [*_RECORD, None])
def test_missing_sections_are_left_out(tmp_path, section):
  record = {k: v for k, v in _RECORD.items() if section and k != section}
  page = _Page(_report.write(tmp_path, record).read_text(encoding='utf-8'))
  headings = page.texts.get('h2', [])
  want = {
    'table': 'Results',
    'layers': 'Layers',
    'samples': 'Samples',
    'config': 'Config',
  }
  assert [h for h in headings if h != 'Plots'] == [
    want[k] for k in ('table', 'layers', 'samples', 'config') if k in record
  ]
  plots = len(list(tmp_path.glob('*.png')))
  assert plots == 3 * ('layers' in record) + ('curves' in record)
  assert ('Plots' in headings) == (plots > 0)
  if section == 'title' or section is None:
    assert page.texts['h1'] == ['Report']


def test_numbers_that_are_missing_or_not_finite(tmp_path):
  layers = [
    {'layer': 0, 'error_before': math.nan, 'error_after': 0.0, 'ratio': None},
    {'layer': 1, 'error_before': 2.0, 'error_after': math.inf},
  ]
  record = {
    'layers': layers,
    'curves': {
      'a': {'x': [1, 2], 'y': [math.nan, 1.0], 'held_out': []},
      'empty': {'x': [], 'y': []},
      'none': {'x': [1], 'y': [math.inf]},
    },
    'table': [{'name': 'ratio', 'value': math.nan, 'ci95': [1.0, math.inf]}],
  }
  page = _Page(_report.write(tmp_path, record).read_text(encoding='utf-8'))
  assert 'nan' in page.texts['td'] and '[1, ?]' in page.texts['td']


def test_unknown_section(tmp_path):
  with pytest.raises(errors.TrainError, match='layer_list'):
    _report.write(tmp_path, {'layer_list': []})
  assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  with pytest.raises(
    errors.OptionalDependencyError, match=r"pip install 'gemma_ext\[notebook\]'"
  ):
    _report.write(tmp_path / 'r', _RECORD)
  assert not (tmp_path / 'r').exists()


def test_place_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.TrainError, match='Cannot write the report'):
    _report.write(tmp_path / 'file' / 'report', _RECORD)


def test_the_same_record_gives_the_same_bytes(tmp_path):
  a, b = (_report.write(tmp_path / name, _RECORD) for name in 'ab')
  assert a.read_bytes() == b.read_bytes()


def _entry(stage, unit, before, after, layers=(), **changes):
  return {
    'stage': stage,
    'unit': unit,
    'held_out_before': before,
    'held_out_after': after,
    'kept': after < before,
    'steps': 60,
    'seconds': 10.0,
    'curve': [[1, before], [60, after]],
    'ratio': 2.0,
    'layers': [
      {
        'layer': layer,
        'density_before': density,
        'density_after': density + 0.1,
        'sign_flips': 0.01,
        'zero_to_nonzero': 0.12,
        'nonzero_to_zero': 0.02,
      }
      for layer, density in layers
    ],
    **changes,
  }


def test_record_of_a_run():
  config = train.Heal(
    stages=(
      train.Block(optimizer=train.Gradient()),
      train.Distill(optimizer=train.Mezo()),
    )
  )
  log = [
    _entry(0, 'layer_2', 0.5, 0.2, [(2, 0.5)]),
    _entry(0, 'layer_3', 0.5, 0.6),  # Not kept.
    _entry(1, 'model', 3.0, 1.0, [(2, 0.6), (3, 0.4)], ratio=1.3),
  ]
  run = types.SimpleNamespace(config=config, log=log)
  record = _report.record_of(run, {'seed': 0})
  two, three = record['layers']
  assert (two['layer'], three['layer']) == (2, 3)
  assert (two['error_before'], two['error_after']) == (0.5, 0.2)
  assert (three['error_before'], three['error_after']) == (0.5, 0.5)
  assert two['density_before'] == 0.5
  assert two['density_after'] == pytest.approx(0.7)
  assert two['sign_flips'] == pytest.approx(0.02)
  assert three['sign_flips'] == pytest.approx(0.01)
  assert list(record['curves']) == [
    '1. Gradient, layer_2',
    '1. Gradient, layer_3',
    '2. Mezo, model',
  ]
  last = record['curves']['2. Mezo, model']
  assert last['held_out'] == [[0, 3.0], [60, 1.0]]
  assert last['y_label'] == 'Distill loss'
  values = {row['name']: row['value'] for row in record['table']}
  assert values['perplexity ratio, 4 held-out windows'] == 1.3
  assert (values['kept'], values['time, s']) == (2, 30.0)
  assert len(_plots.figures(record)['convergence'].axes) == 2
