# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`python -m gemma_ext.train`: result, JSON, SIGTERM and going on."""

import json
import os
import pathlib
import signal
import threading

import numpy as np
import pytest

from gemma_ext import ckpts
from gemma_ext.train import __main__ as main_lib
from gemma_ext.train import _branch
from tests import tiny

_CONFIG = """
from kauldron import konfig
with konfig.imports():
  from gemma_ext import recipe
  from gemma_ext import train

def get_config():
  return train.Heal(
    checkpoint={folder!r} + '/dense',
    recipe=recipe.Recipe(
      rules=(('layer_[01]/mlp', recipe.Ternary(group=128)),)
    ),
    output={folder!r} + '/out',
    cache={folder!r} + '/cache',
    text={folder!r} + '/text.txt',
    tokens=1024,
    window=64,
    dtype='float32',
    stages=(
      train.Block(
        batch_tokens=128,
        optimizer=train.Gradient(steps=400, learning_rate=1e-2),
      ),
    ),
  )
"""


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('main')
  tiny.checkpoint(folder / 'dense')
  words = 'the river flows city was founded in France capital of a set'.split()
  text = ' '.join(np.random.default_rng(0).choice(words, 1500))
  (folder / 'text.txt').write_text(text)
  file = folder / 'config.py'
  file.write_text(_CONFIG.format(folder=str(folder)))
  return file


def _run(config: pathlib.Path, *changes: str) -> int:
  return main_lib.main([f'--config={config}', *changes])


def _interrupted(config: pathlib.Path, outside: object) -> int:
  """Runs the command and sends SIGTERM once it handles that."""
  done = threading.Event()

  def interrupt():
    while not done.wait(0.02):
      if signal.getsignal(signal.SIGTERM) is not outside:
        os.kill(os.getpid(), signal.SIGTERM)
        return

  thread = threading.Thread(target=interrupt)
  thread.start()
  try:
    return _run(config)
  finally:
    done.set()
    thread.join()


def test_sigterm_saves_and_the_same_command_goes_on(config, capsys):
  folder = config.parent
  whole = f'--config.output={folder}/whole'
  assert _run(config, whole) == 0
  assert 'gemma_ext.evaluate' in capsys.readouterr().out
  record = json.loads((folder / 'whole.healing.json').read_text())
  assert record['config']['stages'][0]['optimizer']['steps'] == 400
  assert [r['unit'] for r in record['log']] == ['layer_0', 'layer_1']
  page = (folder / 'whole.report' / 'report.html').read_text()
  assert page.count('data:image/png') == 4
  assert '&quot;steps&quot;: 400' in page

  # Should a signal come too late, it must not end the tests.
  harmless = lambda *_: None
  original = signal.signal(signal.SIGTERM, harmless)
  try:
    for _ in range(2):
      assert _interrupted(config, harmless) == 0
      assert 'goes on from here' in capsys.readouterr().err
      assert not (folder / 'out').exists()
    # As `whole` but for the name, which is not part of the weights.
    assert _run(config) == 0
  finally:
    signal.signal(signal.SIGTERM, original)
  a, b = (
    _branch.flatten(ckpts.load(folder / name).params)
    for name in ('whole', 'out')
  )
  for name, value in a.items():
    np.testing.assert_array_equal(np.asarray(b[name]), np.asarray(value), name)


def test_wrong_config_is_one_line(config, capsys):
  assert _run(config, '--config.sed=1') == 2
  assert "no field 'sed'" in capsys.readouterr().err
  assert main_lib.main(['--config=gone.py']) == 2
  assert 'not there' in capsys.readouterr().err


def test_config_of_something_else(tmp_path, capsys):
  file = tmp_path / 'c.py'
  file.write_text(
    'from kauldron import konfig\n'
    'with konfig.imports():\n  from gemma_ext import train\n'
    'def get_config():\n  return train.Gradient(steps=3)\n'
  )
  assert main_lib.main([f'--config={file}']) == 2
  assert 'expected a gemma_ext.train.Heal' in capsys.readouterr().err


def test_help(capsys):
  assert main_lib.main(['--help']) == 0
  assert 'SIGTERM saves' in capsys.readouterr().out
