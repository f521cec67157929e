# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Readers of the places that text comes from; each yields (id, text)."""

import bz2
from collections.abc import Iterator
import gzip
import json
import pathlib
import re
from typing import Any, cast, IO

import numpy as np

from gemma_ext import errors
from gemma_ext.data import _wikitext

# A bound, so that a wrong file (an archive, a device) cannot fill the memory.
MAX_TEXT_BYTES = 1 << 30
MAX_LINE_BYTES = 64 << 20

_SAMPLE = (
  'test/test_data/'
  'enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2'
)
_MIN_ARTICLE = 1000  # Characters. Shorter ones are stubs and lists of links.
# A name may hold a config and a version ('c4/en:3.1.0'); a split starts with a
# letter and may hold a slice ('train[:10%]').
_TFDS_SPEC = re.compile(r'tfds:([^:]+(?::[\d*][\w.*]*)?)(?::([A-Za-z].*))?')


def wikipedia_sample() -> Iterator[tuple[str, str]]:
  """Articles of the Wikipedia extract in `gensim`, as plain paragraphs.

  About 100 articles, 2.9 million characters (CC BY-SA 3.0, en.wikipedia.org).
  Redirects and articles under 1000 characters are left out.
  """
  try:
    import gensim
    from gensim.corpora import wikicorpus
  except ImportError as e:
    raise errors.OptionalDependencyError(
      "The text 'sample' is inside the package gensim, which is not"
      " installed. Install it with: pip install 'gemma_ext[samples]'"
    ) from e
  path = pathlib.Path(gensim.__file__).parent / _SAMPLE
  if not path.is_file():
    raise errors.DataError(
      f'gensim {gensim.__version__} does not hold the Wikipedia extract'
      f' {path.name!r}. Install gensim 4.3 or 4.4, or give another text.'
    )
  with bz2.open(path) as file:
    for title, markup, _ in wikicorpus.extract_pages(file, ('0',)):
      if markup is None or markup.lstrip().upper().startswith('#REDIRECT'):
        continue
      text = _wikitext.prose(wikicorpus.filter_wiki(markup))
      if len(text) >= _MIN_ARTICLE:
        yield title, f'{title}\n\n{text}'


def text_file(path: pathlib.Path) -> str:
  """Reads one UTF-8 file of at most `MAX_TEXT_BYTES`."""
  try:
    with path.open('rb') as file:
      data = file.read(MAX_TEXT_BYTES + 1)
  except OSError as e:
    raise errors.DataError(f'Cannot read {str(path)!r}: {e.strerror}.') from e
  if len(data) > MAX_TEXT_BYTES:
    raise errors.DataError(
      f'{str(path)!r} is over {MAX_TEXT_BYTES >> 20} MiB, which is too large'
      ' for one document. Split it into files, or use JSON lines.'
    )
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as e:
    raise errors.DataError(
      f'{str(path)!r} is not UTF-8 text: {e.reason} at byte {e.start}.'
      ' Convert it, for example with: iconv -t utf-8.'
    ) from e


def json_lines(
  path: pathlib.Path, text_field: str
) -> Iterator[tuple[str, str]]:
  """Yields a field of every line of a `.jsonl` or `.jsonl.gz` file."""
  for at, record in json_rows(path):
    if text_field not in record:
      raise errors.DataError(
        f'{at}: no field {text_field!r}, the fields are {sorted(record)}.'
        ' Choose one with --text_field (text_field=).'
      )
    text = record[text_field]
    if not isinstance(text, str):
      raise errors.DataError(
        f'{at}: field {text_field!r} must be a string, got'
        f' {type(text).__name__}.'
      )
    yield at, text


def json_rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields every line of a `.jsonl` or `.jsonl.gz` file, and where it is."""
  try:
    with _open_binary(path) as file:
      yield from _json_rows(file, str(path))
  except (OSError, EOFError) as e:  # gzip raises either for a damaged file.
    raise errors.DataError(f'Cannot read {str(path)!r}: {e}.') from e


def _open_binary(path: pathlib.Path) -> IO[bytes]:
  if path.name.endswith('.gz'):
    return cast(IO[bytes], gzip.open(path, 'rb'))
  return path.open('rb')


def _json_rows(
  file: IO[bytes], name: str
) -> Iterator[tuple[str, dict[str, Any]]]:
  number = 0
  while line := file.readline(MAX_LINE_BYTES + 1):
    number += 1
    at = f'{name}:{number}'
    if len(line) > MAX_LINE_BYTES:
      raise errors.DataError(
        f'{at}: the line is over {MAX_LINE_BYTES >> 20} MiB. JSON lines hold'
        ' one document or item a line.'
      )
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as e:
      raise errors.DataError(f'{at}: not JSON: {e}.') from e
    if not isinstance(record, dict):
      raise errors.DataError(
        f'{at}: expected a JSON object, got {type(record).__name__}.'
      )
    yield at, record


def tfds(spec: str, text_field: str) -> Iterator[tuple[str, str]]:
  """Yields a field of a TensorFlow data set, `tfds:NAME` or `tfds:NAME:SPLIT`.

  TFDS downloads and prepares what is not in `TFDS_DATA_DIR` yet.
  """
  for at, example in tfds_rows(spec, text_field):
    value = example[text_field]
    if not isinstance(value, str):
      raise errors.DataError(
        f'TFDS data set {spec!r}: field {text_field!r} is not text but'
        f' {type(value).__name__}.'
      )
    yield at, value


def tfds_rows(
  spec: str, field: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields examples of `tfds:NAME` or `tfds:NAME:SPLIT`, as plain values.

  Args:
    spec: Name, and the split; else 'test' if there is one, or 'train'.
    field: One that they must have.
  """
  match = _TFDS_SPEC.fullmatch(spec)
  if not match:
    raise errors.DataError(
      f'{spec!r} names no data set. Write tfds:NAME or tfds:NAME:SPLIT.'
    )
  name, split = match[1], match[2]
  try:
    import tensorflow_datasets
  except ImportError as e:
    raise errors.OptionalDependencyError(
      f'{spec!r} needs TensorFlow Datasets. Install it with:'
      " pip install 'gemma_ext[tfds]'"
    ) from e
  try:
    builder = tensorflow_datasets.builder(name)
  except (tensorflow_datasets.core.DatasetNotFoundError, ValueError) as e:
    raise errors.DataError(
      f'TFDS knows no data set {name!r}: {_first_line(e)} Set TFDS_DATA_DIR'
      ' to where it was prepared.'
    ) from e
  try:
    if not builder.data_path.exists():
      builder.download_and_prepare()
    splits = sorted(builder.info.splits)
    split = split or ('test' if 'test' in splits else 'train')
    if split.split('[')[0] not in splits:
      raise errors.DataError(
        f'TFDS data set {name!r} has no split {split!r}, only {splits}.'
      )
    features = builder.info.features
    if field is not None and field not in features:
      raise errors.DataError(
        f'TFDS data set {name!r} has no field {field!r}, the fields are'
        f' {sorted(features)}. Choose one with --text_field (text_field=).'
      )
    examples = tensorflow_datasets.as_numpy(builder.as_dataset(split=split))
  except errors.DataError:
    raise
  except Exception as e:  # pylint: disable=broad-exception-caught
    # Downloads fail in the ways of a dozen libraries.
    raise errors.DataError(
      f'TFDS data set {name!r} cannot be prepared:'
      f' {type(e).__name__}: {_first_line(e)}'
    ) from e
  for i, example in enumerate(examples):
    yield f'{name}:{split}:{i}', _plain(example)


def _plain(value: Any) -> Any:
  """Texts, numbers, lists and dicts instead of what TFDS gives."""
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  if isinstance(value, dict):
    return {key: _plain(v) for key, v in value.items()}
  if isinstance(value, np.ndarray):
    return [_plain(v) for v in value.tolist()]
  return value.item() if isinstance(value, np.generic) else value


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__
