# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Finds checkpoints by name: own folders, Hugging Face cache, Kaggle cache."""

from collections.abc import Iterator
import dataclasses
import difflib
import os
import pathlib

from gemma_ext import errors

MODELS_ENV = 'GEMMA_EXT_MODELS'

# A name is looked for among at most so many entries of one folder.
_MAX_ENTRIES = 10_000
_SUFFIXES = ('', '.gguf', '.safetensors')
# Kaggle keeps one model in several frameworks; the first that is there wins.
_KAGGLE_FRAMEWORKS = ('flax', 'jax', 'transformers', 'safetensors', 'gguf')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
  """A folder that is searched.

  Attributes:
    title: What it is, for messages.
    path: The folder.
  """

  title: str
  path: pathlib.Path

  def __str__(self) -> str:
    state = '' if self.path.is_dir() else ' (no such folder)'
    return f'{self.title}: {self.path}{state}'


def find(name: str) -> pathlib.Path:
  """Returns the path of the checkpoint called `name`.

  Looks in the folders of the environment variable GEMMA_EXT_MODELS (for
  `name`, `name.gguf` and `name.safetensors`), in the Hugging Face cache (for
  'org/name' or 'name') and in the Kaggle cache (for 'variation',
  'model/framework/variation' or the same with the owner in front).

  Args:
    name: The name.

  Returns:
    An existing file or directory.

  Raises:
    CheckpointNotFoundError: If there is none; lists every place looked at and
      the names there that are most like it.
  """
  found: dict[str, pathlib.Path] = {}
  for candidate, path in _all_candidates():
    if candidate == name and path.exists():
      return path
    found.setdefault(candidate, path)
  lines = [f'No checkpoint {name!r}: it is not a path, and not found in']
  lines += [f'  {place}' for place in places()]
  near = near_misses(name, found)
  if near:
    lines.append('Did you mean ' + ' or '.join(repr(n) for n in near) + '?')
  lines.append(f'Give a path, or add the folder that holds it to {MODELS_ENV}.')
  raise errors.CheckpointNotFoundError('\n'.join(lines))


def names() -> list[str]:
  """Every name that `find` would find now."""
  return sorted({name for name, _ in _all_candidates()})


def near_misses(name: str, candidates) -> list[str]:
  """The up to 5 candidates that look most like `name`, whatever their case."""
  by_lower = {c.lower(): c for c in candidates}
  near = difflib.get_close_matches(name.lower(), by_lower, n=5, cutoff=0.5)
  return [by_lower[n] for n in near]


def places() -> list[Place]:
  """The folders that are searched, in order."""
  out = [Place(title=MODELS_ENV, path=path) for path in _own_folders()]
  if not out:
    out.append(Place(title=f'{MODELS_ENV} is not set', path=pathlib.Path('-')))
  out.append(Place(title='Hugging Face cache', path=_hf_folder()))
  out.append(Place(title='Kaggle cache', path=_kaggle_folder()))
  return out


def _own_folders() -> list[pathlib.Path]:
  value = os.environ.get(MODELS_ENV, '')
  return [pathlib.Path(p).expanduser() for p in value.split(os.pathsep) if p]


def _hf_folder() -> pathlib.Path:
  """As `huggingface_hub` chooses it."""
  if value := os.environ.get('HF_HUB_CACHE'):
    return pathlib.Path(value).expanduser()
  if value := os.environ.get('HF_HOME'):
    return pathlib.Path(value).expanduser() / 'hub'
  cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(cache).expanduser() / 'huggingface' / 'hub'


def _kaggle_folder() -> pathlib.Path:
  """As `kagglehub` chooses it."""
  value = os.environ.get('KAGGLEHUB_CACHE') or '~/.cache/kagglehub'
  return pathlib.Path(value).expanduser() / 'models'


def _all_candidates() -> Iterator[tuple[str, pathlib.Path]]:
  """Yields (name, path), better candidates for one name first."""
  for folder in _own_folders():
    for entry in _entries(folder):
      for suffix in _SUFFIXES:
        if entry.name.endswith(suffix):
          yield entry.name.removesuffix(suffix), entry
  yield from _hf_candidates(_hf_folder())
  yield from _kaggle_candidates(_kaggle_folder())


def _hf_candidates(
  folder: pathlib.Path,
) -> Iterator[tuple[str, pathlib.Path]]:
  """Snapshots of models--org--name; those of google first."""
  repos = [e for e in _entries(folder) if e.name.startswith('models--')]
  repos.sort(key=lambda e: (not e.name.startswith('models--google--'), e.name))
  for repo in repos:
    snapshot = _snapshot(repo)
    if snapshot is None:
      continue
    org, _, name = repo.name.removeprefix('models--').partition('--')
    if name:
      yield f'{org}/{name}', snapshot
    yield name or org, snapshot


def _snapshot(repo: pathlib.Path) -> pathlib.Path | None:
  """The snapshot that refs/main names, else the newest one."""
  snapshots = {e.name: e for e in _entries(repo / 'snapshots') if e.is_dir()}
  try:
    with open(repo / 'refs' / 'main', 'rb') as f:
      revision = f.read(200).decode('ascii', 'replace').strip()
  except OSError:
    revision = ''
  # Looked up among the entries, so that a ref cannot point elsewhere.
  if revision in snapshots:
    return snapshots[revision]
  return max(snapshots.values(), key=lambda e: e.stat().st_mtime, default=None)


def _kaggle_candidates(
  folder: pathlib.Path,
) -> Iterator[tuple[str, pathlib.Path]]:
  """owner/model/framework/variation/version; the highest version."""
  out = []
  for owner in _entries(folder):
    for model in _entries(owner):
      for framework in _entries(model):
        for choice in _entries(framework):
          versions = [
            e for e in _entries(choice) if e.name.isdecimal() and e.is_dir()
          ]
          if versions:
            best = max(versions, key=lambda e: int(e.name))
            out.append((owner.name, framework.name.lower(), choice, best))
  out.sort(key=lambda t: (t[0] != 'google', _framework_rank(t[1]), str(t[2])))
  for _, _, folder, path in out:
    parts = folder.parts
    yield parts[-1], path
    yield '/'.join(parts[-3:]), path
    yield '/'.join(parts[-4:]), path


def _framework_rank(name: str) -> int:
  if name in _KAGGLE_FRAMEWORKS:
    return _KAGGLE_FRAMEWORKS.index(name)
  return len(_KAGGLE_FRAMEWORKS)


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
  """Entries of a folder by name; none if it cannot be listed."""
  out = []
  try:
    with os.scandir(folder) as it:
      for entry in it:
        out.append(folder / entry.name)
        if len(out) >= _MAX_ENTRIES:
          break
  except OSError:
    return []
  return sorted(out)
