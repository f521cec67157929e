# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the program that kills suites: it sees every fault."""

import json
import sys

import pytest

from tools.benchmarks import run_killed

_SUITE = {
  'baseline': 'a',
  'models': {'a': {'checkpoint': 'x'}, 'b': {'checkpoint': 'y'}},
  'tasks': {'t': {'kind': 'speed'}, 'u': {'kind': 'speed'}},
}
_LINES = [
  json.dumps({'model': model, 'task': task}) + '\n'
  for model in 'ab'
  for task in 'tu'
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  """Runs the program on a fake suite run, which leaves one text a start."""

  def go(texts):
    (tmp_path / 's.json').write_text(json.dumps(_SUITE))
    out = tmp_path / 'out'
    out.mkdir()
    left = iter(texts)

    def start(command, lines, seconds, results):
      assert command[1:3] == ['-m', 'tools.benchmarks.run']
      assert results == out / 'results.jsonl' and 0 <= seconds <= 45
      results.write_text(next(left))
      return 0 if lines is None else None

    monkeypatch.setattr(run_killed, '_start', start)
    status = run_killed.main(
      [f'--suite={tmp_path}/s.json', f'--output={out}', '--kills=2']
    )
    return status, capsys.readouterr().out

  return go


def _texts(*counts):
  return [''.join(_LINES[:count]) for count in counts]


def test_nothing_is_lost(run):
  one, two, whole, again = _texts(1, 2, 4, 4)
  # A torn line is none.
  status, out = run([one + '{"mod', two, whole, again])
  assert status == 0 and 'No line was lost' in out and '2 kills, 4 of 4' in out


@pytest.mark.parametrize(
  'texts, message',
  [
    (_texts(2, 1, 4, 4), 'after 1 kills, lines were lost'),
    (_texts(1, 2, 3, 3), r"lost: [('b', 'u')]"),
    ([*_texts(1, 2), *[''.join(_LINES + _LINES[:1])] * 2], 'doubled'),
    (_texts(1, 2, 4, 3), 'measured something again'),
  ],
)
def test_faults_are_found(run, texts, message):
  status, out = run(texts)
  assert status == 1 and message in out


def test_a_start_is_killed(tmp_path):
  # pylint: disable=protected-access
  results = tmp_path / 'results.jsonl'
  writes = (
    'import sys, time\n'
    'for i in range(100):\n'
    '  time.sleep(0.05)\n'
    '  open(sys.argv[1], "a").write("line\\n")\n'
  )
  command = [sys.executable, '-c', writes, str(results)]
  assert run_killed._start(command, 3, 0.0, results) is None
  # One more may come before it is seen.
  assert results.read_text() in ('line\n' * 3, 'line\n' * 4)
  ends = [sys.executable, '-c', 'exit(3)']
  assert run_killed._start(ends, None, 0.0, results) == 3
  assert run_killed._start(ends, 9, 5.0, results) == 3


def test_a_used_folder_is_refused(tmp_path, capsys):
  (tmp_path / 's.json').write_text(json.dumps(_SUITE))
  (tmp_path / 'results.jsonl').write_text('')
  status = run_killed.main(
    [f'--suite={tmp_path}/s.json', f'--output={tmp_path}']
  )
  assert status == 2 and 'is there already' in capsys.readouterr().err
