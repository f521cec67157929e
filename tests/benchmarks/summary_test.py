# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of what is said of records, of gates, and of reports."""

import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from gemma_ext import errors
from tools.benchmarks import _reports
from tools.benchmarks import _suite
from tools.benchmarks import _summary


def _texts(model, nll, task='t', tokens=100):
  """A record of a task of perplexity."""
  return {
    'model': model,
    'task': task,
    'nll': list(nll),
    'tokens': [tokens] * len(nll),
    'scored_bytes': [4 * tokens] * len(nll),
    'data_sha256': 'x',
  }


def _quiz(model, scores, task='quiz'):
  """A record of a task of right and wrong answers."""
  return {
    'model': model,
    'task': task,
    'scores': [list(scores)],
    'clusters': list(range(len(scores))),
    'data_sha256': 'x',
  }


def _skipped(model, task, kind, **spec):
  """A record of what a model cannot do."""
  spec = [spec, {'kind': kind}]
  return {'model': model, 'task': task, 'skipped': True, 'spec': spec}


def _suite_of(models='base a llama', **kinds):
  kinds = kinds or {'t': 'perplexity', 'quiz': 'choices', 's': 'speed'}
  return _suite.Suite(
    baseline='base',
    models=dict.fromkeys(models.split()),
    tasks={
      name: _suite.Task(name=name, kind=kind, options={})
      for name, kind in kinds.items()
    },
  )


def test_speed_is_compared_round_by_round():
  record = {
    'model': 'a',
    'task': 's',
    'token_seconds': [0.1, 0.2] * 5,
    'baseline_token_seconds': [0.2, 0.4] * 5,
    'first_seconds': [1.0] * 10,
    'baseline_first_seconds': [0.5] * 10,
    'data_sha256': '',
  }
  token, first = _summary.summarise([record], 'base')
  assert (token.metric, token.effect, token.change) == ('tokens/s', 'times', 2)
  assert token.verdict == 'better' and token.value == pytest.approx(7.5)
  assert (first.task, first.change, first.verdict) == ('s.first', 0.5, 'worse')
  few = record | {'token_seconds': [0.1] * 3, 'first_seconds': [1.0] * 3}
  few |= {f'baseline_{k}_seconds': [1.0] * 3 for k in ('token', 'first')}
  # Of three rounds nothing is said.
  assert _summary.summarise([few], 'base')[0].verdict == 'tied'


def test_an_interval_decides():
  rng = np.random.default_rng(0)
  base = 300 + 20 * rng.standard_normal(30)
  lines = _summary.summarise(
    [
      _texts('base', base),
      _texts('worse', base + 2 + rng.standard_normal(30)),
      _texts('same', base + rng.standard_normal(30)),
    ],
    'base',
  )
  found = {line.model: line for line in lines}
  assert found['worse'].verdict == 'worse' and found['same'].verdict == 'tied'
  assert found['worse'].change == pytest.approx(np.exp(0.02), abs=0.005)
  assert found['worse'].p_value < 1e-6 < 0.01 < found['same'].p_value
  assert found['same'].smallest < 1.01
  bits = found['base']
  assert bits.bits_per_byte == pytest.approx(base.sum() / np.log(2) / 12_000)
  assert bits.bits_low < bits.bits_per_byte < bits.bits_high
  # Of documents of one length it is perplexity on another scale.
  assert bits.bits_high == pytest.approx(np.log2(bits.high) / 4)
  silent = _texts('base', base) | {'scored_bytes': [0] * len(base)}
  assert _summary.summarise([silent], 'base')[0].bits_per_byte is None
  gate = _summary.Gate.parse('t_ratio<=1.01', _suite_of())
  assert len(gate.failures(lines)) == 1
  other = _texts('other', base) | {'data_sha256': 'y'}
  with pytest.raises(errors.DataError, match='on different data'):
    _summary.summarise([_texts('base', base), other], 'base')


def test_verdicts_follow_adjusted_p_values():
  base, better = np.zeros((2, 40))
  better[:6] = 1
  once = [_quiz('base', base), _quiz('a', better)]
  line = _summary.summarise(once, 'base')[1]
  assert line.verdict == 'better' and line.change_low > 0
  assert 0.025 < line.p_value < 0.05
  # Of two tasks the better one is no finding.
  twice = [_quiz(m, base, 'other') for m in ('base', 'a')]
  lines = _summary.summarise(once + twice, 'base')
  found = next(n for n in lines if (n.model, n.task) == ('a', 'quiz'))
  assert found.p_value == pytest.approx(2 * line.p_value)
  assert found.verdict == 'tied' and found.change_low == line.change_low
  # Nor is it in a duel.
  sizes = {'base': {'bytes': 9}, 'a': {'bytes': 1}, 'b': {'bytes': 2}}
  peer = [_quiz('b', base), _quiz('b', base, 'other')]
  (duel,) = _summary.duels(once + peer[:1], sizes, ['a'], 'base')
  assert (duel.model, duel.line.verdict) == ('b', 'better')
  duels = _summary.duels(once + twice + peer, sizes, ['a'], 'base')
  assert [d.line.verdict for d in duels] == ['tied', 'tied']
  assert duels[0].line.p_value == found.p_value


def test_the_terminal_shows_values_and_changes(capsys):
  base = 300 + np.random.default_rng(0).standard_normal(20)
  lines = _summary.summarise(
    [
      _texts('base', base),
      _texts('a', base + 1),
      _skipped('b', 't', 'perplexity', shape='Gemma3_1B'),
    ],
    'base',
  )
  sizes = {m: {'bytes': 8, 'dense_bytes': 16} for m in ('base', 'a', 'b')}
  _reports.show('of base', _reports.tables(lines, sizes))
  values, _, rest = capsys.readouterr().out.partition('Changes')
  changes, _, left_out = rest.partition('Not run')
  assert 'of base' in values and 'bits/byte' in values and 'not run' in values
  assert values.count('perplexity') == 2 and 'perplexity' not in changes
  assert 'ratio 1.0101' in changes and 'worse' in changes
  assert 'a shape has no weights' in left_out and 'Holm' in left_out


def test_answers_that_never_differ_are_not_known_to_be_the_same():
  same = [_quiz(m, np.ones(40)) for m in ('base', 'a')]
  own, line = _summary.summarise(same, 'base')
  assert own.low < 0.95 and line.change == 0 and line.verdict == 'tied'
  assert line.change_low < -0.05 and 0.05 < line.change_high
  assert line.smallest > 0.1
  twice = _quiz('base', np.zeros(40))
  twice['scores'] *= 2
  (line,) = _summary.summarise([twice], 'base')
  assert line.value == line.low == 0 and line.high > 0.05


def test_gates_that_check_nothing_fail():
  rng = np.random.default_rng(0)
  base = 300 + rng.standard_normal(20)
  lines = _summary.summarise(
    [
      _texts('base', base),
      _texts('a', base),
      _quiz('base', np.ones(9)),
      _skipped('a', 'quiz', 'choices', shape='Gemma3_1B'),
      _texts('base', base[:1], 'one'),
      _texts('a', base[:1], 'one'),
      _skipped('a', 's', 'speed', shape='Gemma3_1B'),
      _skipped('llama', 'quiz', 'choices', gguf='x.gguf'),
      _skipped('base', 'none', 'choices', gguf='x.gguf'),
      _quiz('a', np.ones(9), 'none'),
    ],
    'base',
  )
  suite = _suite_of(
    t='perplexity', one='perplexity', quiz='choices', none='choices', s='speed'
  )
  for text, why in (
    ('one_ratio<=9', 'no finite interval over 1 unit'),
    ('perplexity_ratio<=9', 'a: one_ratio'),
    ('a:quiz_difference>=-1', 'a: a shape has no weights'),
    ('llama:quiz_difference>=-1', 'llama.cpp is given perplexity and speed'),
    ('quiz_difference>=-1', 'all models: quiz_difference was not measured'),
    ('none_difference>=-1', 'base: llama.cpp is given'),
    ('s_times>=0', 'random weights of this shape do not fit'),
    ('s.first_times>=0', 'random weights of this shape do not fit'),
    ('llama:t_ratio<=2', 'llama: t_ratio was not measured'),
  ):
    gate = _summary.Gate.parse(text, suite)
    (found,) = gate.failures(lines)
    assert why in found, text
    junit = ElementTree.fromstring(_reports.junit(lines, [gate]))
    assert junit.get('failures') == '1'
    assert junit.find('testcase/failure').get('message') == found
  assert not _summary.Gate.parse('t_ratio<=1', suite).failures(lines)
  assert not _summary.Gate.parse('a:t_ratio>=1', suite).failures(lines)


def test_perplexity_ratio_is_of_all_texts():
  rng = np.random.default_rng(0)
  base = 300 + rng.standard_normal(20)
  worse = base + 5 + rng.standard_normal(20)
  lines = _summary.summarise(
    [_texts('base', base, task) for task in ('wiki', 'news')]
    + [_texts('a', base, 'wiki'), _texts('a', worse, 'news')],
    'base',
  )
  suite = _suite_of(wiki='perplexity', news='perplexity', quiz='choices')
  parse = lambda text: _summary.Gate.parse(text, suite)
  (found,) = parse('perplexity_ratio<=1.02').failures(lines)
  assert found.startswith('a: news_ratio 1.05')
  assert not parse('a:perplexity_ratio <= 1.10').failures(lines)
  assert parse('wiki_ratio<=1.02').failures(lines) == []
  with pytest.raises(errors.ConfigError, match='--gate'):
    _summary.Gate.parse('perplexity_ratio<=1.02', _suite_of(quiz='choices'))


def test_less_is_better_of_every_entry_for_ci():
  base, better = np.zeros((2, 40))
  better[:10] = 1
  broken = np.full(20, 1e6)
  lines = _summary.summarise(
    [
      _quiz('base', base),
      _quiz('a', better),
      _texts('base', broken / 1e4),
      _texts('b', broken),
    ],
    'base',
  )
  sizes = {m: {'bytes': 8, 'dense_bytes': 16} for m in ('base', 'a', 'b')}
  rows, left_out = _reports.benchmark_json(lines, sizes)
  json.dumps(rows, allow_nan=False)
  found = {row['name']: row for row in rows}
  assert found['base: quiz, error rate']['value'] == 1
  assert found['a: quiz, error rate']['value'] == 0.75
  less = found['a: quiz, error rate minus the baseline']
  assert less['value'] == -0.25
  low, high = map(float, less['range'].split(' to '))
  assert low < -0.25 < high < 0
  assert left_out == ['b: t', 'b: t, bits per byte']
  assert not {*left_out} & {*found} and 'base: t' in found


def test_what_needs_no_plots_is_written_first(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
  lines = _summary.summarise([_texts('base', [300.0, 310.0])], 'base')
  sizes = {'base': {'bytes': 8, 'dense_bytes': 16}}
  with pytest.raises(ImportError):
    _reports.write_all(tmp_path, 'x', lines, sizes, [], {})
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {'report.md', 'junit.xml', 'benchmark.json'}


def test_the_largest_challenger_of_no_more_bytes():
  rng = np.random.default_rng(0)
  record = lambda name, base: {
    'model': name,
    'task': 't',
    'data_sha256': 'x',
    'nll': list(base + 100 + rng.standard_normal(30)),
    'tokens': [100] * 30,
    'scored_bytes': [400] * 30,
  }
  added = {
    'dense': 0,
    'small': 20,
    'mine': 10,
    'large': 5,
    'peer': 12,
    'tiny': 9,
  }
  sizes = {
    name: {'bytes': size}
    for name, size in zip(added, (100, 20, 50, 80, 60, 10), strict=True)
  }
  records = [record(name, by) for name, by in added.items()]
  mine = ('small', 'mine', 'large')
  (duel,) = _summary.duels(records, sizes, mine, 'dense')
  assert (duel.model, duel.line.model) == ('peer', 'mine')
  assert duel.line.change == pytest.approx(np.exp(-0.02), abs=0.005)
  assert duel.line.verdict == 'better'
  sizes['peer']['bytes'] = 50
  assert _summary.duels(records, sizes, mine, 'dense') == [duel]
  other = records[2] | {'data_sha256': 'y'}
  with pytest.raises(errors.DataError, match='on different data'):
    _summary.duels([*records[4:], other], sizes, ['mine'], 'dense')


@pytest.mark.parametrize(
  'text',
  [
    *('x<=1', 't_ratio=1', 't_ratio<=x', 't_ratio < 1', 't_times<=1'),
    *('quiz_ratio<=1', 't_difference<=1', 's_ratio<=1', 't.first_times<=1'),
    *('itn8:t_ratio<=1', 'base:t_ratio<=1', 'a:b:t_ratio<=1'),
  ],
)
def test_gates_that_are_wrong(text):
  with pytest.raises(errors.ConfigError, match='--gate'):
    _summary.Gate.parse(text, _suite_of())
