# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rules about the repository as a whole: imports, documents, headers."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_PACKAGE = _ROOT / 'gemma_ext'

# The house, from the top floor to the ground: imports run down only, also
# within a line, where they run from left to right.
_ORDER = (
  'commands',
  'train',
  'evals',
  'text',
  'compress',
  'ckpts',
  'nn',
  'kernels',
  'recipe',
  'data',
  'errors',
)
# Files of the top folder that are part of a room.
_PARTS = {'_methods': 'recipe', '_patterns': 'recipe'}

_ENHANCEMENTS = (
  *('1.1', '1.2', '1.3', '1.4', '2.1', '2.2', '2.3', '2.4'),
  *('3.1', '3.2', '3.3', '3.4', '4.1', '4.2', '4.3'),
  *('5.1', '5.2', '5.3', '6.1', '6.2'),
)
_STATUSES = ('Works now', 'Partly', 'Not started')


def _files() -> list[str]:
  """Paths of all files that are tracked, or new and not ignored."""
  out = subprocess.run(
    ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
    cwd=_ROOT,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  return [f for f in out.split('\0') if f and (_ROOT / f).is_file()]


_FILES = _files()
_PYTHON = [f for f in _FILES if f.endswith('.py')]
_MODULES = [f for f in _PYTHON if f.startswith('gemma_ext/')]
_PAGES = [f for f in _FILES if f.endswith('.md')]


def _text(path: str) -> str:
  return (_ROOT / path).read_text(encoding='utf-8')


# ---------------------------------- imports ----------------------------------


def _imports(path: str) -> set[str]:
  """Full names of the modules that a file imports, at any depth of it."""
  tree = ast.parse(_text(path), path)
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}:{node.lineno}: a relative import'
      # `from gemma_ext import x` names the room in the alias.
      names.update(f'{node.module}.{alias.name}' for alias in node.names)
  return names


def _room(path: str) -> str:
  """Room of a file of the package, given as 'gemma_ext/...'."""
  parts = pathlib.PurePath(path).parts[1:]
  if parts[-1] == '__main__.py':
    return 'commands'
  if len(parts) > 1:
    return parts[0]
  name = parts[0].removesuffix('.py')
  name = _PARTS.get(name, name)
  return name if name in _ORDER else 'commands'


def _rooms(path: str) -> set[str]:
  """Rooms that a file imports from, its own left out."""
  rooms = set()
  for name in _imports(path):
    if name.split('.')[0] != 'gemma_ext':
      continue
    part = (name.split('.') + [''])[1]
    part = _PARTS.get(part, part)
    if (_PACKAGE / part).is_dir() or part in _ORDER:
      rooms.add(part)
    elif (_PACKAGE / f'{part}.py').is_file():
      rooms.add('commands')
  return rooms - {_room(path)}


def _inside(path: str) -> bool:
  """Whether the import rule holds for it: all but the front door."""
  return path != 'gemma_ext/__init__.py'


@pytest.mark.parametrize('path', [p for p in _MODULES if _inside(p)])
def test_imports_run_down_the_list(path):
  place = _ORDER.index(_room(path))
  up = {room for room in _rooms(path) if _ORDER.index(room) <= place}
  assert not up, f'{path} ({_room(path)}) imports from above: {sorted(up)}'


def test_rooms_have_no_import_cycle():
  below: dict[str, set[str]] = {room: set() for room in _ORDER}
  for path in filter(_inside, _MODULES):
    below[_room(path)] |= _rooms(path)
  done: set[str] = set()
  while ready := {r for r in below if r not in done and below[r] <= done}:
    done |= ready
  assert done == set(_ORDER), {r: below[r] - done for r in set(_ORDER) - done}


def test_every_room_is_on_the_list():
  rooms = {
    p.parent.relative_to(_PACKAGE).parts[0] for p in _PACKAGE.glob('*/**/*.py')
  }
  assert rooms <= set(_ORDER), f'add to the list: {rooms - set(_ORDER)}'


def test_errors_import_nothing():
  assert _imports('gemma_ext/errors.py') == set()


def test_kernels_import_only_jax_and_numpy_and_errors():
  allowed = set(sys.stdlib_module_names) | {'jax', 'jaxlib', 'numpy'}
  for path in _MODULES:
    if not path.startswith('gemma_ext/kernels/'):
      continue
    for name in _imports(path):
      ours = name == 'gemma_ext.errors' or name.startswith('gemma_ext.kernels')
      assert ours or name.split('.')[0] in allowed, f'{path} imports {name}'


# --------------------------------- documents ---------------------------------


def test_relative_links_lead_somewhere():
  count = 0
  for page in _PAGES:
    for link in re.findall(r'\]\(([^)\s]+)\)', _text(page)):
      if re.match(r'[a-z]+:', link) or link.startswith('#'):
        continue
      target = (_ROOT / page).parent / link.split('#')[0]
      assert target.exists(), f'{page} links to {link}'
      count += 1
  assert count >= 10


def test_pages_name_only_what_exists():
  commands, paths = 0, 0
  makefile = set(re.findall(r'^([a-z]+):', _text('Makefile'), re.M))
  for page in _PAGES:
    text = _text(page)
    for module in re.findall(r'python -m ((?:gemma_ext|tools)[\w.]*)', text):
      file = _ROOT / module.replace('.', '/')
      assert (
        file.with_suffix('.py').is_file() or (file / '__main__.py').is_file()
      ), f'{page} names python -m {module}'
      commands += 1
    for target in re.findall(r'(?:^|`)make ([a-z]+)', text, re.M):
      assert target in makefile, f'{page} names make {target}'
      commands += 1
    for path in re.findall(
      r'`((?:gemma_ext|docs|tools|tests|examples)/[a-z_./-]*)`', text
    ):
      assert (_ROOT / path).exists(), f'{page} names {path}'
      paths += 1
  assert commands >= 10
  assert paths >= 10


def test_every_row_of_the_enhancement_table_has_a_status():
  rows = [
    [cell.strip() for cell in line.strip().strip('|').split('|')]
    for line in _text('docs/enhancements/README.md').splitlines()
    if line.startswith('|') and not line.startswith('|-')
  ]
  statuses = [
    cell
    for row in rows
    for cell in row
    if re.match(rf'({"|".join(_STATUSES)})\b', cell)
  ]
  headers = [row for row in rows if 'status' in row]
  assert len(headers) == 5
  assert len(statuses) == len(rows) - len(headers)


def test_every_enhancement_of_the_plan_is_in_the_table():
  numbers = re.findall(
    r'^\| (\d\.\d) \|', _text('docs/enhancements/README.md'), re.M
  )
  plan = tuple(n for n in numbers if n in _ENHANCEMENTS)
  assert plan == _ENHANCEMENTS


# ----------------------------------- files -----------------------------------


@pytest.mark.parametrize(
  'path',
  [
    f
    for f in _FILES
    if f.endswith(('.py', '.sh', '.yml', '.toml', '.cc', '.h'))
    or f in ('Makefile', '.ci/run')
  ],
)
def test_licence_header(path):
  head = '\n'.join(_text(path).splitlines()[:4])
  assert 'Copyright 2026 The gemma_ext Authors.' in head
  assert 'SPDX-License-Identifier: Apache-2.0' in head


@pytest.mark.parametrize('path', _PYTHON)
def test_file_has_a_docstring_and_one_subject(path):
  assert ast.get_docstring(ast.parse(_text(path))), 'no docstring'
  assert len(_text(path).splitlines()) <= 500


def test_files_of_slow_tests_exist():
  # That the tests do, tests/conftest.py checks.
  for line in _text('tests/slow.txt').splitlines():
    path = _ROOT / 'tests' / line.partition('::')[0]
    assert line.startswith('#') or path.is_file(), line


def test_no_path_of_a_machine():
  # Spelt so that this file does not match itself.
  private = re.compile(
    r'(?<![\w.])/(?:home|root|Users|work|farm)' + r'/\w|[A-Z]:\\\\?Users'
  )
  for path in _FILES:
    try:
      text = _text(path)
    except UnicodeDecodeError:
      continue
    match = private.search(text)
    assert not match, f'{path}: {match and match.group()}'


def test_version_is_the_same_everywhere():
  project = tomllib.loads(_text('pyproject.toml'))['project']
  assert f"__version__ = '{project['version']}'" in _text(
    'gemma_ext/__init__.py'
  )


def test_package_is_typed():
  assert (_PACKAGE / 'py.typed').is_file()
