# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of what is measured again, of pairs that fail, and of the flags.

Nothing is measured: models and scores are made up.
"""

import importlib.util
import json
import types

import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext import evals
from gemma_ext import recipe as recipe_lib
from gemma_ext.train import _store
from tests import tiny
from tools.benchmarks import _checks
from tools.benchmarks import _measure
from tools.benchmarks import _records
from tools.benchmarks import _reports
from tools.benchmarks import _suite
from tools.benchmarks import run

_QUIZ = [
  {'prompt': f'{i}', 'choices': [' a', ' b'], 'answer': i % 2}
  for i in range(12)
]
_TOKENIZER = object()


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
  return tiny.checkpoint(
    tmp_path_factory.mktemp('models') / 'dense', one_layer=True
  )


class _Fake:
  """A suite in a folder, and what the harness did with it."""

  def __init__(self, folder, dense):
    self.folder = folder
    self.loaded, self.measured = [], []
    self.raises = {}
    self.nan = None
    self.write('quiz.jsonl', '\n'.join(map(json.dumps, _QUIZ)))
    self.recipe(4)
    self.suite = {
      'baseline': 'dense',
      'models': {
        'int8': {'checkpoint': str(dense), 'recipe': 'int8'},
        'mine': {'checkpoint': str(dense), 'recipe': 'mine.json'},
        'dense': {'checkpoint': str(dense)},
      },
      'tasks': {
        'quiz': {'kind': 'choices', 'items': 'quiz.jsonl'},
        'speed': {'kind': 'speed', 'rounds': 6},
      },
    }

  def write(self, name, text):
    (self.folder / name).write_text(text)

  def recipe(self, bits):
    made = recipe_lib.Recipe.of(f'int{bits}', num_layers=1)
    self.write('mine.json', json.dumps(made.to_json()))

  def load(self, spec, tokenizer):
    self.loaded.append(spec.name)
    if error := self.raises.get(spec.name):
      raise error
    assert tokenizer in (None, _TOKENIZER)
    loaded = _measure.Loaded(nbytes=10, dense_bytes=20, model=spec.name)
    return loaded, _TOKENIZER

  def run(self, task, loaded, tokenizer, found, baseline):
    assert tokenizer is _TOKENIZER
    name = loaded.model
    if error := self.raises.get((name, task.name)):
      raise error
    self.measured.append((name, task.name))
    if task.kind == 'speed':
      times = {'token_seconds': [0.1] * 6, 'first_seconds': [1.0] * 6}
      if (beside := baseline()) is not None:
        assert beside.model == 'dense'
        times |= {f'baseline_{k}': v for k, v in times.items()}
      return times
    scores = [float(len(name) > i % 7) for i in range(len(found))]
    if (name, task.name) == self.nan:
      scores[3] = float('nan')
    ids = [item.id for item in found]
    return {'scores': [scores], 'ids': ids, 'clusters': ids}

  def __call__(self, *more):
    self.loaded.clear()
    self.measured.clear()
    self.write('s.json', json.dumps(self.suite))
    out = self.folder / 'out'
    return run.main([f'--suite={self.folder}/s.json', f'--output={out}', *more])

  def records(self):
    lines = (self.folder / 'out' / 'results.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]

  def report(self):
    return (self.folder / 'out' / 'report.md').read_text()


@pytest.fixture
def fake(tmp_path, dense, monkeypatch):
  found = _Fake(tmp_path, dense)
  monkeypatch.setattr(_measure, 'load', found.load)
  monkeypatch.setattr(_measure, 'run', found.run)
  monkeypatch.setattr(_measure, 'free', lambda loaded: None)
  # Plots take seconds; those of a run are tested elsewhere.
  monkeypatch.setattr(_reports, 'pictures', lambda *args: {})
  return found


_ALL = {(m, t) for m in ('dense', 'int8', 'mine') for t in ('quiz', 'speed')}


def test_nothing_is_loaded_if_nothing_is_missing(fake):
  assert fake() == 0
  # The baseline once, though others are timed beside it.
  assert fake.loaded == ['dense', 'int8', 'mine']
  assert set(fake.measured) == _ALL
  assert fake() == 0 and fake.loaded == fake.measured == []
  assert '| int8 | quiz |' in fake.report()


def test_what_a_result_depends_on(fake, monkeypatch):
  assert fake() == 0
  # Items.
  text = (fake.folder / 'quiz.jsonl').read_text()
  fake.write('quiz.jsonl', text.replace(' b', ' c'))
  assert fake() == 0
  assert set(fake.measured) == {(m, 'quiz') for m in ('dense', 'int8', 'mine')}
  # The contents of a recipe.
  fake.recipe(8)
  assert fake() == 0
  assert set(fake.measured) == {('mine', 'quiz'), ('mine', 'speed')}
  # Of speed, the machine.
  machine = {'cpu': 'other', 'cores': 1, 'python': '3'}
  monkeypatch.setattr('tools.benchmarks._timing.machine', lambda: machine)
  assert fake() == 0
  assert {task for _, task in fake.measured} == {'speed'}
  # Versions of what it needs, and not of others.
  versions = evals.package_versions()
  other = versions | {'qwix': '999'}
  monkeypatch.setattr(evals, 'package_versions', lambda: other)
  assert fake() == 0 and fake.measured == []
  other = versions | {'flax': '999'}
  monkeypatch.setattr(evals, 'package_versions', lambda: other)
  assert fake() == 0 and set(fake.measured) == _ALL
  # What was measured before is there still.
  fake.recipe(4)
  monkeypatch.setattr(evals, 'package_versions', lambda: versions)
  fake.write('quiz.jsonl', text)
  assert fake('--tasks=quiz') == 0 and fake.measured == []


def test_other_code(fake, monkeypatch, capsys):
  assert fake('--models=dense,int8') == 0
  first = _records.code_sha256()
  monkeypatch.setattr(_records, 'code_sha256', lambda: 'other')
  assert fake('--code=any') == 0
  assert {model for model, _ in fake.measured} == {'mine'}
  assert 'different code are compared' in capsys.readouterr().err
  # The report says what the results were made with, not what is there now.
  page = (fake.folder / 'out' / 'report.html').read_text()
  assert first in page and '&quot;other&quot;' in page
  assert fake() == 0
  assert {model for model, _ in fake.measured} == {'dense', 'int8'}
  assert 'different code' not in capsys.readouterr().err
  assert first not in (fake.folder / 'out' / 'report.html').read_text()


def test_the_hash_of_code(tmp_path):
  path = tmp_path / 'package'
  (path / 'inner').mkdir(parents=True)
  (path / 'a.py').write_text('x = 1')
  first = _records.sources_sha256([path])
  (path / 'inner' / 'b.pyc').write_text('compiled')
  assert _records.sources_sha256([path]) == first
  (path / 'inner' / 'b.inc').write_text('y')
  second = _records.sources_sha256([path])
  assert second != first
  (path / 'inner' / 'b.inc').rename(path / 'inner' / 'c.inc')
  assert _records.sources_sha256([path]) not in (first, second)
  assert len(_records.code_sha256()) == 64


def test_pairs_that_fail(fake, capsys):
  fake.raises = {
    'int8': errors.CheckpointError('torn\nand more'),
    ('mine', 'quiz'): MemoryError(),
  }
  fake.nan = ('dense', 'quiz')
  assert fake('--gate=speed_times>=1000') == run.EXIT_UNMEASURED == 3
  assert set(fake.measured) == {
    ('dense', 'quiz'),
    ('dense', 'speed'),
    ('mine', 'speed'),
  }
  out, err = capsys.readouterr()
  assert 'int8: quiz failed: torn\n' in err and 'gate: mine: speed' in err
  assert 'mine: quiz failed: MemoryError' in err
  assert 'dense: quiz failed: The scores hold NaN' in err
  assert out.count('failed: ') == 4
  found = {(r['model'], r['task']) for r in fake.records()}
  assert found == {('dense', 'speed'), ('mine', 'speed')}
  assert '4 of 6 pairs are missing' in fake.report()
  # They alone are measured once they can be.
  fake.raises, fake.nan = {}, None
  assert fake() == 0
  assert set(fake.measured) == _ALL - found
  assert 'missing' not in fake.report()


def test_a_baseline_that_cannot_be_loaded(fake):
  fake.raises = {'dense': errors.CheckpointError('torn')}
  fake.suite['challengers'] = ['int8']
  assert fake() == 3
  assert fake.measured == [] and '6 of 6 pairs are missing' in fake.report()
  # It is tried once.
  assert fake.loaded == ['dense']


def test_a_fault_of_the_program_is_no_result(fake):
  fake.raises = {('mine', 'quiz'): ZeroDivisionError('fault')}
  with pytest.raises(ZeroDivisionError):
    fake()
  # What was measured before has its report.
  assert '| int8 | quiz |' in fake.report()


def test_subsets_and_reports_alone(fake, capsys):
  assert fake('--report_only') == 0
  assert fake.loaded == [] and '6 of 6 pairs' in fake.report()
  assert fake('--models=int8', '--tasks=quiz') == 0
  assert fake.measured == [('int8', 'quiz')]
  # For its tokenizer.
  assert fake.loaded == ['dense', 'int8']
  assert fake('--tasks=speed') == 0
  assert set(fake.measured) == {(m, 'speed') for m in ('dense', 'int8', 'mine')}
  assert fake('--report_only', '--gate=int8:speed_times<=0.1') == 1
  assert fake.loaded == []
  assert '| int8 | quiz |' in fake.report()
  for flag in (
    '--models=x',
    '--tasks=x',
    '--device=x',
    '--gate=x:quiz_ratio<=1',
  ):
    assert fake(flag) == 2
  assert "['x'] are none of the suite" in capsys.readouterr().err


def test_one_model_by_two_names(fake, capsys):
  fake.suite['models']['again'] = fake.suite['models']['int8']
  fake.suite['tasks']['same'] = fake.suite['tasks']['quiz']
  assert fake('--tasks=quiz,same') == 0
  assert set(fake.measured) == {(m, 'quiz') for m in ('dense', 'int8', 'mine')}
  assert 'int8, again: one and the same model' in capsys.readouterr().err
  assert '| again | same |' in fake.report()


def test_two_runs_at_once(fake, capsys):
  with _store.Store(fake.folder / 'out', fingerprint='').lock():
    assert fake() == 2
  assert 'Another run is at work' in capsys.readouterr().err
  assert fake.loaded == [] and fake() == 0


def test_devices(fake, capsys):
  fake.suite['device'] = 'cpu'
  assert fake() == 0
  assert fake('--device=tpu') == 2
  assert "No device 'tpu'" in capsys.readouterr().err
  one = _records.about('gpu:1')
  assert one['device'] == f'{_records.about()["device"]} (gpu:1)'
  fake.suite['device'] = 'tpu:x'
  assert fake() == 2


@pytest.mark.parametrize(
  'model, package, message',
  [
    ({'peer': 'qwix int4 g32'}, 'qwix', 'gemma_ext\\[peers\\]'),
    ({'budget': '28%'}, 'gensim', "calibration of 'm'"),
  ],
)
def test_packages_are_looked_for_first(
  fake, dense, monkeypatch, model, package, message
):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *rest: None if name == package else find(name, *rest),
  )
  fake.suite['models']['m'] = {'checkpoint': str(dense)} | model
  fake.write('s.json', json.dumps(fake.suite))
  suite = _suite.read(fake.folder / 's.json')
  with pytest.raises(errors.OptionalDependencyError, match=message):
    _checks.check(suite, {'dense': [], 'm': ['quiz']})
  assert fake() == 2 and fake.loaded == []


@pytest.mark.parametrize(
  'model, error, message',
  [
    ({'gguf': 'none.gguf'}, errors.ConfigError, "no file 'none.gguf'"),
    ({'shape': 'Gemma9'}, errors.ConfigError, "has no 'Gemma9'"),
    ({'checkpoint': 'none'}, errors.CheckpointNotFoundError, 'none'),
  ],
)
def test_files_are_looked_for_first(fake, model, error, message):
  if 'gguf' in model:
    pytest.importorskip('xllamacpp')
  fake.suite['models']['m'] = model
  fake.write('s.json', json.dumps(fake.suite))
  suite = _suite.read(fake.folder / 's.json')
  with pytest.raises(error, match=message):
    _checks.check(suite, {'m': ['quiz']})
  # Of what is not asked for, nothing is needed.
  _checks.check(suite, {'dense': ['quiz']})
  assert fake() == 2 and fake.loaded == []
  assert fake('--models=dense,int8') == 0


def test_programs_are_confined_first(fake, monkeypatch, capsys):
  program = {'prompt': 'def f(', 'test': 'def check(x): pass'}
  fake.write('code.jsonl', json.dumps(program | {'entry_point': 'f'}))
  fake.suite['tasks']['code'] = {
    'kind': 'generate',
    'items': 'code.jsonl',
    'check': 'code',
  }
  asked = []

  def require():
    asked.append('code')
    raise errors.BackendError('no namespaces')

  with monkeypatch.context() as patch:
    patch.setattr(evals, 'require_sandbox', require)
    assert fake() == 2 and fake.loaded == []
    assert 'no namespaces' in capsys.readouterr().err
    # Nobody else needs it.
    assert fake('--tasks=quiz') == 0
    assert fake('--report_only') == 0
    assert asked == ['code']
  suite = _suite.read(fake.folder / 's.json')
  monkeypatch.setattr('sys.platform', 'darwin')
  with pytest.raises(errors.BackendError, match='cannot confine programs'):
    _checks.check(suite, {'dense': ['code']})


def test_data_are_read_first(fake, capsys):
  fake.write('quiz.jsonl', '{"prompt": 3}')
  assert fake() == 2 and fake.loaded == []
  rows = [row | {'cluster': 'one'} for row in _QUIZ]
  fake.write('quiz.jsonl', '\n'.join(map(json.dumps, rows)))
  assert fake() == 2
  assert "all 12 items are of one cluster, 'one'" in capsys.readouterr().err
  rows = [row | {'cluster': str(i % 3)} for i, row in enumerate(_QUIZ)]
  fake.write('quiz.jsonl', '\n'.join(map(json.dumps, rows)))
  assert fake() == 0
  assert 'quiz: 3 clusters are few' in capsys.readouterr().err


def test_no_nan_is_stored(tmp_path):
  results = _records.Results(tmp_path / 'r.jsonl', 'x')
  record = {'key': 'a', 'nll': [1.0], 'code_sha256': 'x'}
  results.append(record)
  with pytest.raises(errors.NonFiniteError):
    results.append(record | {'key': 'b', 'nll': [float('inf')]})
  assert results.find('b') is None and results.find('a') == record
  assert (tmp_path / 'r.jsonl').read_text().count('\n') == 1


def test_of_other_code_there_may_be_none(tmp_path):
  path = tmp_path / 'r.jsonl'
  for code in 'xyz':
    _records.Results(path, code).append({'key': 'a', 'code_sha256': code})
  find = lambda code, **kwargs: _records.Results(path, code, **kwargs).find('a')
  assert find('y')['code_sha256'] == 'y' and find('w') is None
  # Its own where it is there, else the last.
  assert find('x', others=True)['code_sha256'] == 'x'
  assert find('w', others=True)['code_sha256'] == 'z'


def test_a_peer_of_nan(tmp_path):
  text = tmp_path / 't.txt'
  text.write_text('the river flows ' * 8)
  task = _suite.Task(
    name='t',
    kind='perplexity',
    options={
      'text': str(text),
      'text_field': 'text',
      'split': 'all',
      'max_tokens': 0,
      'window': 16,
    },
  )
  source = _measure.source_of(task)
  tokenizer = tiny.tokenizer(3)
  (windows, sizes), _ = _measure.data_of(task, source, tokenizer)
  assert sizes == [len(text.read_bytes())]

  def go(value):
    logits = lambda row: np.full((len(row), 512), value, np.float32)
    peer = types.SimpleNamespace(logits=logits)
    loaded = _measure.Loaded(nbytes=1, dense_bytes=0, peer=peer)
    found = (windows, sizes)
    return _measure.run(task, loaded, tokenizer, found, lambda: None)

  count = int(windows.score_mask.sum())
  assert go(2.0)['nll'] == [pytest.approx(count * np.log(512))]
  with pytest.raises(errors.NonFiniteError, match='gives nan nats for'):
    go(np.nan)
