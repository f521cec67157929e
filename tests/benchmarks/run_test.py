# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the harness on tiny models."""

import html.parser
import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from gemma_ext import errors
from tests import tiny
from tools.benchmarks import _measure
from tools.benchmarks import _speed
from tools.benchmarks import _suite
from tools.benchmarks import run

_WORDS = 'the capital of a group is one river that flows'.split()


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A folder with a suite, its checkpoints and data, run once."""
  folder = tmp_path_factory.mktemp('suite')
  tiny.checkpoint(folder / 'dense', one_layer=True)
  tiny.checkpoint(folder / 'other', seed=5, one_layer=True)
  (folder / 'texts').mkdir()
  rng = np.random.default_rng(0)
  for i in range(12):
    text = ' '.join(rng.choice(_WORDS, 40))
    (folder / 'texts' / f'{i}.txt').write_text(text)
  quiz = [
    {
      'prompt': ' '.join(rng.choice(_WORDS, 4)),
      'choices': [' river', ' capital of'],
      'answer': int(rng.integers(2)),
      'cluster': str(i // 2),
    }
    for i in range(12)
  ]
  text = '\n'.join(map(json.dumps, quiz))
  (folder / 'quiz.jsonl').write_text(text)
  (folder / 'words.jsonl').write_text(
    '\n'.join(
      json.dumps({'prompt': word, 'answer': word}) for word in _WORDS[:3]
    )
  )
  suite = {
    'baseline': 'dense',
    'challengers': ['int8'],
    'models': {
      'other': {'checkpoint': 'other'},
      'int8': {'checkpoint': 'dense', 'recipe': 'int8'},
      'dense': {'checkpoint': 'dense'},
      '1b': {'shape': 'Gemma3_1B', 'recipe': 'int4'},
    },
    'tasks': {
      'texts': {'kind': 'perplexity', 'text': 'texts', 'window': 32},
      'quiz': {'kind': 'choices', 'items': 'quiz.jsonl'},
      'words': {
        'kind': 'generate',
        'items': 'words.jsonl',
        'check': 'exact_match',
        'max_new_tokens': 3,
        'temperature': 1.0,
        'seeds': [0, 1],
      },
      'speed': {'kind': 'speed', 'rounds': 6, 'tokens': 2, 'prompt_tokens': 4},
    },
  }
  (folder / 'suite.json').write_text(json.dumps(suite))
  with pytest.MonkeyPatch.context() as patch:
    # Random weights of a 1B are for people with time.
    patch.setattr(_speed, '_free_bytes', lambda: 1e8)
    assert run.main(_argv(folder)) == 0
  return folder


def _argv(folder, *more):
  return [f'--suite={folder}/suite.json', f'--output={folder}/out', *more]


def _records(folder):
  lines = (folder / 'out' / 'results.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_every_pair_is_a_line(made):
  records = _records(made)
  assert len(records) == 16
  found = {(r['model'], r['task']): r for r in records}
  dense, int8 = found['dense', 'texts'], found['int8', 'texts']
  assert len(dense['nll']) == len(dense['tokens']) == 12
  assert dense['tokens'] == int8['tokens'] and dense['nll'] != int8['nll']
  np.testing.assert_allclose(dense['nll'], int8['nll'], rtol=0.02)
  assert int8['bytes'] < 0.6 * dense['bytes'] == 0.6 * dense['dense_bytes']
  assert np.shape(found['int8', 'quiz']['scores']) == (1, 12)
  assert np.shape(found['int8', 'words']['scores']) == (2, 3)
  assert found['1b', 'texts']['skipped']
  assert 0.5e9 < found['1b', 'texts']['bytes'] < 0.7e9
  assert found['1b', 'speed']['skipped']
  speed = found['int8', 'speed']
  for key in ('token', 'first', 'baseline_token', 'baseline_first'):
    assert len(speed[f'{key}_seconds']) == 6
    assert min(speed[f'{key}_seconds']) > 0
  assert 'baseline_token_seconds' not in found['dense', 'speed']
  for key in (
    'machine',
    'device',
    'versions',
    'code',
    'data_sha256',
    'seconds',
  ):
    assert key in dense


def test_reports(made):
  out = made / 'out'
  text = (out / 'report.md').read_text()
  assert '| int8 | texts |' in text and 'ratio 1.0' in text
  assert '| 1b | texts |' in text and '| not run |' in text
  assert '| 1b | quiz | a shape has no weights |' in text
  # Of no fewer bytes than the challenger, with tasks: one model.
  duels = text.partition('## Challengers')[2]
  assert duels.count('| other | ') == 3 and '| dense |' not in duels
  assert '| int8 |' in duels
  page = (out / 'report.html').read_text()
  html.parser.HTMLParser().feed(page)
  for written in (text, page):
    assert 'bits/byte' in written and 'adjusted by Holm' in written
  assert 'data:image/png;base64,' in page and 'http' not in page
  bench = json.loads((out / 'benchmark.json').read_text())
  assert all({'name', 'unit', 'value'} <= set(row) for row in bench)
  assert any(row['name'] == 'int8: texts' and 'range' in row for row in bench)
  units = {row['name']: row['unit'] for row in bench}
  assert units['int8: speed'] == 's/token'
  assert units['int8: speed.first'] == 's'
  assert units['int8: quiz, error rate'] == 'errors/item'
  assert units['int8: texts, bits per byte'] == 'bits/byte'
  for what in ('bytes', 'speed'):
    assert f'texts: quality against {what}' in page
  junit = ElementTree.parse(out / 'junit.xml').getroot()
  assert junit.get('failures') == '0' and len(junit) == 19
  assert junit.get('skipped') == str(len(junit.findall('testcase/skipped')))
  assert junit.get('skipped') == '4'


def test_gates(made, capsys):
  # A model of other random weights is not within 0.1% for certain.
  argv = _argv(made, '--gate=other:texts_ratio<=0.5')
  assert run.main(argv) == 1
  assert 'gate: other: texts_ratio' in capsys.readouterr().err
  junit = ElementTree.parse(made / 'out' / 'junit.xml').getroot()
  assert junit.get('failures') == '1'
  assert 'texts_ratio' in junit.find('testcase/failure').get('message')
  assert run.main(_argv(made, '--gate=int8:texts_ratio<=1.05')) == 0
  assert run.main(_argv(made, '--gate=int8:perplexity_ratio<=1.05')) == 0
  assert run.main(_argv(made, '--gate=perplexity_ratio<=0.5')) == 1
  capsys.readouterr()
  assert run.main(_argv(made, '--gate=1b:quiz_difference>=-1')) == 1
  assert '1b: a shape has no weights' in capsys.readouterr().err
  junit = ElementTree.parse(made / 'out' / 'junit.xml').getroot()
  assert 'no weights' in junit.find('testcase/failure').get('message')
  assert run.main(_argv(made, '--gate=quiz_difference>=-1')) == 0
  assert run.main(_argv(made, '--gate=speed_times>=1000')) == 1
  assert run.main(_argv(made, '--gate=other:speed.first_times<=1000')) == 0


def test_what_is_there_is_not_measured_again(made, monkeypatch):
  measured = []
  once = _measure.run
  monkeypatch.setattr(
    _measure,
    'run',
    lambda task, *args: measured.append(task.name) or once(task, *args),
  )
  assert run.main(_argv(made)) == 0
  assert measured == []
  # A line that a kill tore is measured again, the others are kept.
  path = made / 'out' / 'results.jsonl'
  whole = path.read_text()
  lines = whole.splitlines(keepends=True)
  torn = next(i for i, line in enumerate(lines) if '"task": "quiz"' in line)
  moved = lines[:torn] + lines[torn + 1 :] + [lines[torn][:40]]
  path.write_text(''.join(moved))
  assert run.main(_argv(made)) == 0
  assert measured == ['quiz']
  assert len(_records(made)) == 16
  # In the middle it is no accident.
  path.write_text('{"key"\n' + whole)
  assert run.main(_argv(made)) == 2
  path.write_text(whole)


def test_speed_of_a_shape_without_weights():
  model = tiny.model('gemma3')
  loaded = _measure.Loaded(nbytes=1, dense_bytes=1, shape=model)
  options = {'rounds': 1, 'tokens': 2, 'prompt_tokens': 3}
  found = _speed.measure(loaded, loaded, options)
  assert set(found) == {
    f'{whose}{what}_seconds'
    for whose in ('', 'baseline_')
    for what in ('first', 'token')
  }


def test_without_matplotlib_it_fails_before_it_measures(
  tmp_path, monkeypatch, capsys
):
  suite = {
    'baseline': 'd',
    'models': {'d': {'checkpoint': 'x'}, 'e': {'checkpoint': 'y'}},
    'tasks': {'t': {'kind': 'perplexity', 'text': 'sample'}},
  }
  (tmp_path / 'suite.json').write_text(json.dumps(suite))
  monkeypatch.setattr(_measure, 'load', None)  # Would be a TypeError.
  for gate in ('f:t_ratio<=1', 'd:t_ratio<=1', 't_difference<=1'):
    assert run.main(_argv(tmp_path, f'--gate={gate}')) == 2
    assert '--gate' in capsys.readouterr().err
  monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
  assert run.main(_argv(tmp_path)) == 2
  assert 'gemma_ext[notebook]' in capsys.readouterr().err


@pytest.mark.parametrize(
  'change, message',
  [
    ({'challengers': ['x']}, 'challengers are some of'),
    ({'challengers': 'd'}, 'challengers are some of'),
    ({'baseline': 'x'}, "baseline 'x' is none"),
    ({'models': {}}, "'models' must be"),
    ({'models': {'d': {'checkpoint': 'a', 'gguf': 'b'}}}, 'expected one of'),
    ({'models': {'d': {'checkpoint': 'a', 'x': 'b'}}}, 'expected some of'),
    (
      {'models': {'d': {'checkpoint': 'a', 'quantize': 'Q4_0'}}},
      "'quantize' is for",
    ),
    ({'models': {'d': {'gguf': 'a', 'quantize': 'Q9'}}}, "quantize: 'Q9'"),
    ({'models': {'d': {'shape': 'Gemma3_1B'}}}, 'cannot be the baseline'),
    ({'models': {'d': {'gguf': 'a'}}}, 'gguf cannot be the baseline'),
    ({'models': {'d': {'checkpoint': ''}}}, 'all values texts'),
    ({'device': 'gpus'}, "device: 'gpus'; expected"),
    (
      {'models': {'d': {'checkpoint': 'a', 'recipe': 'int8', 'budget': '9%'}}},
      "'budget' is for a 'checkpoint' without a recipe",
    ),
    (
      {'models': {'d': {'checkpoint': 'a', 'calibration': 'none'}}},
      "'calibration' and 'compensate' for one with either",
    ),
    (
      {
        'models': {'d': {'checkpoint': 'a', 'budget': '9%', 'compensate': True}}
      },
      'a budget needs a text',
    ),
    (
      {'models': {'d': {'checkpoint': 'a', 'recipe': 'int8', 'compensate': 1}}},
      "'compensate' must be true or false, got 1",
    ),
    (
      {
        'models': {
          'd': {'checkpoint': 'a'},
          's': {'shape': 'Gemma3_1B', 'recipe': 'int8', 'calibration': 'none'},
        }
      },
      "'calibration' and 'compensate' for one with either",
    ),
    ({'tasks': {'t': {'kind': 'x'}}}, "'kind' must be one of"),
    ({'tasks': {'t': {'kind': 'choices'}}}, "'items' is missing"),
    (
      {'tasks': {'t': {'kind': 'choices', 'items': 'a', 'format': 'gsm8k'}}},
      r"one of \['arc', 'truthful_qa', 'fever'\], got 'gsm8k'",
    ),
    ({'tasks': {'t': {'kind': 'speed', 'rounds': 0}}}, 'must be 1 or more'),
    (
      {'tasks': {'t': {'kind': 'speed', 'rounds': -1}}},
      "'rounds' must be 1 or more, got -1",
    ),
    (
      {'tasks': {'t': {'kind': 'choices', 'items': 'a', 'n': 1}}},
      r"no fields \['n'\]",
    ),
    (
      {'tasks': {'t': {'kind': 'choices', 'items': 3}}},
      "'items' must be a str",
    ),
  ],
)
def test_suites_that_are_wrong(tmp_path, change, message):
  good = {
    'baseline': 'd',
    'models': {'d': {'checkpoint': 'gemma3-270m'}},
    'tasks': {'t': {'kind': 'perplexity', 'text': 'sample'}},
  }
  path = tmp_path / 's.json'
  path.write_text(json.dumps(good))
  assert _suite.read(path).baseline == 'd'
  path.write_text(json.dumps(good | change))
  with pytest.raises(errors.ConfigError, match=message):
    _suite.read(path)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'check': 'exactmatch'}, "'check' must be one of .*, got 'exactmatch'"),
    ({'seeds': []}, r"'seeds' must be different numbers .*, got \[\]"),
    ({'seeds': ['a']}, r"'seeds' must be .* got \[\"a\"\]"),
    ({'seeds': [1, 1]}, "'seeds' must be"),
    ({'seeds': [-1]}, "'seeds' must be"),
    ({'seeds': [True]}, "'seeds' must be"),
    ({'stops': [1]}, r"'stops' must be texts, got \[1\]"),
    ({'stops': ['']}, "'stops' must be texts"),
    ({'max_new_tokens': 0}, "'max_new_tokens' must be 1 or more, got 0"),
    ({'temperature': -0.5}, "'temperature' must be 0 or more, got -0.5"),
    ({'temperature': float('nan')}, "'temperature' must be 0 or more"),
    ({'kind': 'perplexity', 'split': 'tets'}, "'split' must be one of"),
    ({'kind': 'perplexity', 'window': 1}, "'window' must be 2 or more, got 1"),
  ],
)
def test_tasks_that_are_wrong(tmp_path, change, message):
  task = {'kind': 'generate', 'items': 'a', 'check': 'exact_match'}
  if 'kind' in change:
    task = {'text': 'sample'}
  suite = {
    'baseline': 'd',
    'models': {'d': {'checkpoint': 'gemma3-270m'}},
    'tasks': {'t': task | change},
  }
  path = tmp_path / 's.json'
  path.write_text(json.dumps(suite))
  with pytest.raises(errors.ConfigError, match=message):
    _suite.read(path)


def test_a_format_says_how_answers_are_judged(tmp_path):
  path = tmp_path / 's.json'
  task = {'kind': 'generate', 'items': 'tfds:gsm8k', 'format': 'gsm8k'}
  suite = {
    'baseline': 'd',
    'models': {'d': {'checkpoint': 'gemma3-270m'}},
    'tasks': {'t': task},
  }
  path.write_text(json.dumps(suite))
  options = _suite.read(path).tasks['t'].options
  assert options['check'] == 'last_number'
  assert options['stops'] == ['\nQuestion:']
  assert options['items'] == 'tfds:gsm8k'


def test_the_suites_in_the_repo_are_valid():
  for path in (run.pathlib.Path(run.__file__).parent / 'suites').glob('*.json'):
    assert _suite.read(path).tasks
