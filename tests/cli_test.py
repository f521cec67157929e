# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of what the commands share."""

import json
import math
import os
import stat

from absl import flags
import pytest

from gemma_ext import _cli
from gemma_ext import errors


def _define(values):
  _cli.define_checkpoint(values)
  flags.DEFINE_integer('n', None, 'A number.', 1, flag_values=values)


def _run(command, *argv):
  return _cli.run('Says what it does.', _define, command, argv)


def test_flags_reach_the_command():
  seen = []
  code = _run(
    lambda args: seen.append((args.checkpoint, args.n, args.dtype)),
    '--checkpoint=a b',
    '--n=3',
  )
  assert (code, seen) == (0, [('a b', 3, 'bfloat16')])


def test_help_needs_no_required_flag(capsys):
  assert _run(lambda args: 1 / 0, '--help') == 0
  out = capsys.readouterr().out
  assert out.startswith('Says what it does.')
  assert '--checkpoint' in out
  assert '--n (none)\n      A number.' in out


@pytest.mark.parametrize(
  'argv, message',
  [
    ((), 'checkpoint'),
    (('--checkpoint=a', '--n=0'), 'n=0'),
    (('--checkpoint=a', '--nonsense'), 'nonsense'),
    (('--checkpoint=a', 'more'), "Unexpected arguments ['more']"),
    (('--checkpoint=a', '--dtype=int3'), 'int3'),
  ],
)
def test_wrong_flags(argv, message, capsys):
  assert _run(lambda args: 1 / 0, *argv) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ')
  assert message in err
  assert 'Traceback' not in err


def _fail(args):
  raise errors.DataError('No text. Give one.')


def test_our_errors_are_one_line(capsys):
  assert _run(_fail, '--checkpoint=a') == 2
  assert capsys.readouterr().err == 'error: No text. Give one.\n'


def test_debug_shows_the_traceback(capsys):
  assert _run(_fail, '--checkpoint=a', '--debug') == 2
  assert 'Traceback' in capsys.readouterr().err


def test_other_errors_are_not_hidden():
  with pytest.raises(ZeroDivisionError):
    _run(lambda args: 1 / 0, '--checkpoint=a')


def test_interrupt(capsys):
  def interrupt(args):
    raise KeyboardInterrupt

  assert _run(interrupt, '--checkpoint=a') == 130
  assert capsys.readouterr().err == 'error: interrupted.\n'


def test_json_is_replaced_whole(tmp_path):
  path = tmp_path / 'a.json'
  path.write_text('old')
  _cli.write_json(str(path), {'x': [1, None]})
  assert json.loads(path.read_text()) == {'x': [1, None]}
  assert os.listdir(tmp_path) == ['a.json']
  assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444


def test_json_keeps_the_old_file_if_it_fails(tmp_path, monkeypatch):
  path = tmp_path / 'a.json'
  path.write_text('old')

  def refuse(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'replace', refuse)
  with pytest.raises(errors.DataError, match='No space left'):
    _cli.write_json(str(path), {})
  assert path.read_text() == 'old'
  assert os.listdir(tmp_path) == ['a.json']


def test_output_is_checked_first(tmp_path):
  _cli.check_output('')
  _cli.check_output(str(tmp_path / 'new.json'))
  with pytest.raises(errors.DataError, match='it is a folder'):
    _cli.check_output(str(tmp_path))
  with pytest.raises(errors.DataError, match='Create it first'):
    _cli.check_output(str(tmp_path / 'no' / 'a.json'))


@pytest.mark.parametrize(
  'n, text',
  [
    (0, '0 B'),
    (999, '999 B'),
    (1000, '1.0 kB'),
    (536_200_000, '536.2 MB'),
    (2 * 10**16, '20000.0 TB'),
  ],
)
def test_human_bytes(n, text):
  assert _cli.human_bytes(n) == text


def test_human_interval():
  assert _cli.human_interval([1234.5678, 2000], 2) == '[1,234.57, 2,000.00]'
  assert _cli.human_interval([None, None], 2) == '-'
  assert _cli.human_interval([1.0, math.inf], 2) == '-'


def test_table_is_not_cut(capsys):
  long = 'x' * 60
  _cli.print_table('Title', ('name', 'n'), [(long, '1'), ('[b]', '2')])
  out = capsys.readouterr().out
  assert long in out
  assert '[b]' in out  # Not taken for markup.
