# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the workflows: what they name exists, and is installed before."""

import importlib
import pathlib
import re
import shlex
import tomllib

from absl import flags
import pytest
import yaml

from tools.benchmarks import _suite
from tools.benchmarks import _summary

_ROOT = pathlib.Path(__file__).parents[2]
_WORKFLOWS = sorted((_ROOT / '.github' / 'workflows').glob('*.yml'))
_PROJECT = tomllib.loads((_ROOT / 'pyproject.toml').read_text())['project']
_EXTRAS = _PROJECT['optional-dependencies']
# Extras that an install names: '.[a,b]'.
_INSTALLED = re.compile(r'\.\[([\w,-]+)\]')


def _steps(path):
  workflow = yaml.safe_load(path.read_text())
  # YAML reads the key `on` as true.
  assert {'name', True, 'jobs'} <= set(workflow)
  return [step for job in workflow['jobs'].values() for step in job['steps']]


def _commands(path):
  """Words of every command that is run."""
  for step in _steps(path):
    assert ('run' in step) != ('uses' in step)
    if 'run' in step:
      for line in step['run'].strip().splitlines():
        yield shlex.split(line)


def _extras(names):
  """The packages of extras, those of the extras that they name among them."""
  found = set()
  for name in names:
    for requirement in _EXTRAS[name]:
      if inner := re.fullmatch(r'gemma_ext\[([\w,-]+)\]', requirement):
        found |= _extras(inner[1].split(','))
      else:
        found.add(re.match(r'[\w-]+', requirement)[0])
  return found


def _flags(module):
  values = flags.FlagValues()
  module._define_flags(values)
  return values


@pytest.mark.parametrize('path', _WORKFLOWS, ids=lambda path: path.stem)
def test_commands_exist(path):
  targets = re.findall(r'^([a-z-]+(?: [a-z-]+)*):', _makefile(), re.M)
  targets = {name for line in targets for name in line.split()}
  count = 0
  for words in _commands(path):
    count += 1
    if words[0] == 'make':
      assert words[-1] in targets, words
    for word in words:
      for extras in _INSTALLED.findall(word):
        assert set(extras.split(',')) <= set(_EXTRAS), words
      if word.startswith(('tools/', '--suite=')):
        assert (_ROOT / word.removeprefix('--suite=')).is_file(), word
    if words[1:2] == ['-m'] and words[2].startswith(('tools.', 'gemma_ext.')):
      given = [w for w in words[3:] if w.startswith('--')]
      module = importlib.import_module(words[2])
      # Raises for a flag that there is not, or a value of another type.
      _flags(module)(['program', *given])
      assert given
  assert count


def _makefile():
  return (_ROOT / 'Makefile').read_text()


def test_the_suite_of_the_example_can_run():
  path = _ROOT / '.github' / 'workflows' / 'benchmarks.yml'
  # What `make setup` installs.
  setup = (_ROOT / 'tools' / 'setup_env.sh').read_text()
  installed = _extras(_INSTALLED.search(setup)[1].split(','))
  assert 'xllamacpp' not in installed and 'matplotlib' in installed
  runs = 0
  for words in _commands(path):
    for extras in _INSTALLED.findall(' '.join(words)):
      installed |= _extras(extras.split(','))
    if 'tools.benchmarks.run' not in words:
      continue
    runs += 1
    given = dict(w.split('=', 1) for w in words if w.startswith('--'))
    suite = _suite.read(_ROOT / given['--suite'])
    assert _summary.Gate.parse(given['--gate'], suite).model == 'int8'
    kinds = {model.kind for model in suite.models.values()}
    assert 'gguf' in kinds and 'xllamacpp' in installed
  assert runs == 1


def test_no_results_are_cached():
  for path in _WORKFLOWS:
    for step in _steps(path):
      if step.get('uses', '').startswith('actions/cache'):
        assert 'results' not in step['with']['path'], path
