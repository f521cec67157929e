# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Document`, and the one function that reads documents from anywhere."""

from collections.abc import Iterable, Iterator
import dataclasses
import itertools
import os
import pathlib
from typing import Any

from gemma_ext import errors
from gemma_ext.data import _hashing
from gemma_ext.data import _sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """One text that is never split between calibration and test.

  Attributes:
    text: The text, not empty.
    id: Unique within its source: a title, file name or line number.
    source: The spec that it was loaded from.
  """

  text: str
  id: str
  source: str

  @property
  def sha256(self) -> str:
    """Hash of the text with its white space normalised."""
    return _hashing.text_sha256(self.text)


def load_documents(
  spec: str | os.PathLike[str],
  *,
  text_field: str = 'text',
  max_documents: int | None = None,
) -> list[Document]:
  """Reads documents from a file, folder, data set or the sample.

  Args:
    spec: One of
      `'sample'`: English Wikipedia articles, from the package `gensim`;
      `FILE.txt`: one document, UTF-8 (any ending but those below);
      a folder: every `.txt` file under it, in order of their names;
      a pattern with `*`, `?` or `[`: every file that matches;
      `FILE.jsonl`, `FILE.jsonl.gz`: one JSON object a line;
      `'tfds:NAME'`, `'tfds:NAME:SPLIT'`: a TensorFlow data set, read from
      `TFDS_DATA_DIR` (default: `~/tensorflow_datasets`), split `test` where it
      has one and `train` otherwise.
    text_field: Field that holds the text, for JSON lines and TFDS.
    max_documents: Stop after that many.

  Returns:
    Documents whose text is not blank, in the order of the source.

  Raises:
    DataError: Nothing there, not UTF-8, malformed, too large, or no text.
    OptionalDependencyError: `gensim` or `tensorflow_datasets` is missing.
  """
  spec = os.fspath(spec)
  if max_documents is not None and max_documents < 1:
    raise errors.DataError(
      f'max_documents must be at least 1, got {max_documents}.'
    )
  pairs = _texts(spec, text_field)
  documents = (
    Document(text=text, id=name, source=spec)
    for name, text in pairs
    if text.strip()
  )
  out = list(itertools.islice(documents, max_documents))
  if not out:
    raise errors.DataError(f'{spec!r} holds no text, every document is blank.')
  return out


def rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields the rows of a data set and where each is from.

  Args:
    path: A `.jsonl` file, gzipped or not, `'tfds:NAME'` or `'tfds:NAME:SPLIT'`.

  Raises:
    DataError: If it cannot be read.
    OptionalDependencyError: If TFDS is missing.
  """
  spec = os.fspath(path)
  if spec.startswith('tfds:'):
    return _sources.tfds_rows(spec)
  return _sources.json_rows(pathlib.Path(spec).expanduser())


def _texts(spec: str, text_field: str) -> Iterator[tuple[str, str]]:
  """Yields (id, text) of a spec."""
  if spec == 'sample':
    return _sources.wikipedia_sample()
  if spec.startswith('tfds:'):
    return _sources.tfds(spec, text_field)
  path = pathlib.Path(spec).expanduser()
  if path.is_dir():
    files = sorted(p for p in path.rglob('*.txt') if p.is_file())
    missing = f'No .txt file under the folder {str(path)!r}.'
  elif path.is_file():
    files, missing = [path], ''
  elif any(c in spec for c in '*?['):
    files = sorted(p for p in _glob(path) if p.is_file())
    missing = f'No file matches {spec!r}.'
  else:
    raise errors.DataError(
      f'No text at {spec!r} (looked at {str(path.absolute())!r}). Give a'
      ' .txt or .jsonl file, a folder of .txt files, a pattern such as'
      " 'texts/*.txt', 'tfds:NAME' or 'sample'."
    )
  if not files:
    raise errors.DataError(missing)
  return _read(files, text_field)


def _glob(path: pathlib.Path) -> Iterable[pathlib.Path]:
  root = pathlib.Path(path.anchor) if path.is_absolute() else pathlib.Path()
  return root.glob(str(path.relative_to(root) if path.is_absolute() else path))


def _read(
  files: list[pathlib.Path], text_field: str
) -> Iterator[tuple[str, str]]:
  for file in files:
    if file.name.endswith(('.jsonl', '.jsonl.gz')):
      yield from _sources.json_lines(file, text_field)
    else:
      yield str(file), _sources.text_file(file)
