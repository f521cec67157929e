# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the commands share: flags, errors in one line, tables, JSON.

A command is a function of parsed flags:

    def _flags(values): flags.DEFINE_string(..., flag_values=values)
    def _run(args): ...
    def main(argv=None): return _cli.run(__doc__, _flags, _run, argv)

Every command has flag values of its own, because absl's global ones refuse two
commands that share a flag name in one process.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import math
import os
import pathlib
import sys
import tempfile
import traceback
from typing import Any

from absl import flags
import rich.console
import rich.table

from gemma_ext import errors

# TensorFlow arrives as a dependency of a dependency, and talks at import.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # Else it says so.

DTYPES = ('bfloat16', 'float32')
EXIT_FAILED = 1
EXIT_ERROR = 2


def run(
  doc: str | None,
  define: Callable[[flags.FlagValues], None],
  command: Callable[[flags.FlagValues], object],
  argv: Sequence[str] | None = None,
) -> int:
  """Parses flags and runs a command.

  Args:
    doc: Shown by --help.
    define: Defines the command's flags on the values it is given.
    command: What to run. It may return what failed, a list.
    argv: Arguments without the program's name; `None` takes the process's.

  Returns:
    Exit status: 0, 1 if the command returned something true, 2 for a
    `GemmaExtError` or wrong flags (one line on stderr, the traceback with
    --debug), 130 if interrupted.
  """
  argv = sys.argv[1:] if argv is None else list(argv)
  values = flags.FlagValues()
  define(values)
  flags.DEFINE_boolean(
    'debug', False, 'Show the traceback of errors.', flag_values=values
  )
  flags.DEFINE_boolean(
    'help', False, 'Show this help.', short_name='h', flag_values=values
  )
  if not flags.FLAGS.is_parsed():  # Libraries may look at theirs.
    flags.FLAGS(['gemma_ext'])
  try:
    # Asking for help must not fail for a flag that is required.
    if {'--help', '-h', '-help'} & set(argv):
      print(f'{(doc or "").strip()}\n{_help(values)}')
      return 0
    rest = values(['gemma_ext', *argv])[1:]
    if rest:
      raise flags.Error(f'Unexpected arguments {rest}; flags start with --.')
  except flags.Error as e:
    _complain(f'{e} See --help.')
    return EXIT_ERROR
  try:
    if command(values):
      return EXIT_FAILED
  except errors.GemmaExtError as e:
    if values['debug'].value:
      traceback.print_exc()
    _complain(str(e))
    return EXIT_ERROR
  except KeyboardInterrupt:
    _complain('interrupted.')
    return 130
  return 0


def define_checkpoint(values: flags.FlagValues) -> None:
  """Defines --checkpoint and --dtype."""
  flags.DEFINE_string(
    'checkpoint',
    None,
    'Folder, file or name of the checkpoint, for example gemma3-270m.',
    required=True,
    flag_values=values,
  )
  flags.DEFINE_enum(
    'dtype',
    'bfloat16',
    DTYPES,
    'Type of the weights that are not packed, and of activations.',
    flag_values=values,
  )


def check_output(path: str | None) -> None:
  """Makes sure, before slow work, that a file can be written at `path`.

  Raises:
    DataError: Its folder is missing or not writable, or it is a folder.
  """
  if not path:
    return
  file = pathlib.Path(path).expanduser()
  parent = file.absolute().parent
  if file.is_dir():
    raise errors.DataError(f'Cannot write {path!r}: it is a folder.')
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise errors.DataError(
      f'Cannot write {path!r}: {str(parent)!r} is not a folder that can be'
      ' written to. Create it first.'
    )


def write_json(path: str, value: Mapping[str, Any]) -> None:
  """Writes a file that is either the old one or the whole new one.

  Raises:
    DataError: It cannot be written.
  """
  file = pathlib.Path(path).expanduser()
  text = json.dumps(value, indent=2, allow_nan=False) + '\n'
  temporary = None
  try:
    with tempfile.NamedTemporaryFile(
      'w', dir=file.absolute().parent, suffix='.tmp', delete=False
    ) as f:
      temporary = f.name
      f.write(text)
    # A temporary file is private; a result is as other new files are.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, file)
  except OSError as e:
    if temporary:
      pathlib.Path(temporary).unlink(missing_ok=True)
    raise errors.DataError(f'Cannot write {path!r}: {e.strerror}.') from e


def print_table(
  title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
  """Prints a table on stdout, its first column left, the others right."""
  table = rich.table.Table(title=title, title_justify='left')
  for i, column in enumerate(columns):
    table.add_column(column, justify='right' if i else 'left', overflow='fold')
  for row in rows:
    table.add_row(*row)
  console().print(table)


def console() -> rich.console.Console:
  """Returns a console on the current stdout."""
  # Where there is no terminal, lines are not broken for its sake.
  width = None if sys.stdout.isatty() else 120
  return rich.console.Console(width=width, highlight=False, markup=False)


def note(text: str) -> None:
  """Prints a line for the reader on stderr."""
  print(text, file=sys.stderr, flush=True)


def human_bytes(n: int) -> str:
  """Returns '536.2 MB', in powers of 1000 as disks and files are sold."""
  if n < 1000:
    return f'{n} B'
  power = min(int(math.log10(n) / 3), 4)
  return f'{n / 1000**power:.1f} {" kMGT"[power]}B'


def human_interval(ends: Sequence[float | None], digits: int) -> str:
  """Returns '[13.2, 15.1]', or a dash where there is no interval."""
  numbers = [x for x in ends if x is not None and math.isfinite(x)]
  if len(numbers) != 2:
    return '-'
  return f'[{numbers[0]:,.{digits}f}, {numbers[1]:,.{digits}f}]'


def _complain(text: str) -> None:
  print(f'error: {text}', file=sys.stderr, flush=True)


def _help(values: flags.FlagValues) -> str:
  lines = ['', 'Flags:']
  for name in sorted(set(values)):
    flag = values[name]
    if name != flag.name:  # A short name.
      continue
    default = 'none' if flag.default is None else repr(flag.default)
    lines += [f'  --{name} ({default})', f'      {flag.help}']
  return '\n'.join(lines)
