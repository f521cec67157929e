# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of `python -m gemma_ext.generate` on tiny models."""

import dialog
from gemma import gm
import pytest

from gemma_ext import ckpts
from gemma_ext import generate
from gemma_ext import text
from tests import tiny


def _load(name, *, dtype, progress=False):
  del progress
  family, _, bare = name.partition('-')
  model = tiny.model(family, dtype=dtype)
  return ckpts.Checkpoint(
    model=model,
    params=tiny.params(model),
    tokenizer=None if bare else tiny.tokenizer(model.INFO.tokenizer_version),
    source=name,
  )


@pytest.fixture(autouse=True)
def _loaded(monkeypatch):
  monkeypatch.setattr(ckpts, 'load', _load)


@pytest.mark.parametrize(
  'flags, prompt, sampling',
  [
    ([], 'A river', gm.text.Greedy()),
    (
      ['--chat', '--temperature=0.7', '--seed=5'],
      dialog.Conversation(dialog.User('A river')),
      gm.text.RandomSampling(temperature=0.7),
    ),
  ],
)
def test_command(capsys, flags, prompt, sampling):
  code = generate.main(
    [
      '--checkpoint=gemma3',
      '--prompt=A river',
      '--max_new_tokens=4',
      '--dtype=float32',
      *flags,
    ]
  )
  captured = capsys.readouterr()
  assert code == 0
  expected = text.stream(
    _load('gemma3', dtype='float32'),
    prompt,
    max_new_tokens=4,
    sampling=sampling,
    seed=5,
  )
  assert captured.out == ''.join(expected) + '\n'
  assert f'{len(expected.tokens)} tokens in' in captured.err


def test_speculative(capsys):
  argv = ['--checkpoint=gemma3', '--prompt=A river', '--max_new_tokens=8']
  argv.append('--dtype=float32')
  assert generate.main(argv) == 0
  plain = capsys.readouterr()
  assert generate.main([*argv, '--speculative=head_rows=400,tokens=3']) == 0
  captured = capsys.readouterr()
  assert captured.out == plain.out
  assert 'of the drafts taken' in captured.err
  assert 'drafts' not in plain.err


@pytest.mark.parametrize(
  'argv, message',
  [
    (['--checkpoint=gemma3', '--prompt='], '--prompt is empty'),
    (['--checkpoint=gemma3-bare', '--prompt=x'], 'has no tokenizer'),
    (['--checkpoint=gemma3'], 'prompt'),
    (['--checkpoint=gemma3', '--prompt=x', '--speculative=y'], 'layers='),
  ],
)
def test_errors_are_one_line(capsys, argv, message):
  assert generate.main(argv) == 2
  last = capsys.readouterr().err.splitlines()[-1]
  assert last.startswith('error: ')
  assert message in last
