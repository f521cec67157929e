# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`recipe.json`, the manifest of our own directories: schema and limits."""

from collections.abc import Mapping
import json
import os
import re
from typing import Any

from gemma_ext import errors
from gemma_ext.ckpts import _safetensors
from gemma_ext.ckpts import _strict_json

NAME = 'recipe.json'
FORMAT = 'gemma_ext'
# 1 had other bytes for five trits, and rows that ended within a block.
VERSION = 2
MAX_BYTES = 8 << 20

_KEYS = {
  'format',
  'version',
  'model',
  'recipe',
  'dtype',
  'tokenizer',
  'params',
  'source',
  'metadata',
  'created_with',
}
_MODEL_DTYPES = ('bfloat16', 'float16', 'float32')
_LEAF_DTYPES = (*_MODEL_DTYPES, 'uint8', 'int8', 'int32')
_MAX_RANK = 8
_MAX_DIM = 1 << 40
_MAX_LEAVES = 100_000
_SHA256 = re.compile(r'[0-9a-f]{64}')


def read(path: os.PathLike | str) -> dict[str, Any]:
  """Reads and checks a manifest; its model and recipe are only objects yet.

  Args:
    path: A `recipe.json`.

  Raises:
    MissingTensorError: If there is no such file.
    HeaderTooLargeError: If it, or a size in it, is too large.
    HeaderError: If it is not a manifest of this version.
    PathEscapeError: If its tokenizer lies outside of the directory.
    UnsupportedTypeError: If a leaf has a type that is never stored.
  """
  data = _strict_json.read_object(path, limit=MAX_BYTES)
  what = os.fspath(path)
  if data.get('format') != FORMAT:
    raise errors.HeaderError(
      f'{what}: format is {data.get("format")!r:.50}; expected {FORMAT!r}.'
    )
  version = data.get('version')
  if version == 1 and not isinstance(version, bool):
    raise errors.HeaderError(
      f'{what}: version is 1, whose packed weights this gemma_ext no longer'
      ' reads. Make the checkpoint again.'
    )
  if version != VERSION or isinstance(version, bool):
    raise errors.HeaderError(
      f'{what}: version is {version!r:.50}; this gemma_ext reads {VERSION}.'
      ' A newer one may read it.'
    )
  if set(data) != _KEYS:
    raise errors.HeaderError(
      f'{what}: the keys {sorted(set(data) ^ _KEYS)} are missing or unknown.'
    )
  if data['dtype'] not in _MODEL_DTYPES:
    raise errors.UnsupportedTypeError(
      f'{what}: dtype is {data["dtype"]!r:.50}; expected one of'
      f' {_MODEL_DTYPES}.'
    )
  for key in ('model', 'metadata', 'created_with'):
    if not isinstance(data[key], Mapping):
      raise errors.HeaderError(f'{what}: {key} must be an object.')
  if data['recipe'] is not None and not isinstance(data['recipe'], Mapping):
    raise errors.HeaderError(f'{what}: recipe must be an object or null.')
  if not isinstance(data['source'], str):
    raise errors.HeaderError(f'{what}: source must be a string.')
  _check_tokenizer(data['tokenizer'], what)
  _check_params(data['params'], what)
  return data


def write(path: os.PathLike | str, data: Mapping[str, Any]) -> None:
  """Writes a manifest, a line for each key and for each parameter."""
  lines = []
  for key, value in data.items():
    if key == 'params':
      leaves = ',\n'.join(
        f'  {json.dumps(k)}: {json.dumps(v)}' for k, v in value.items()
      )
      text = f'{{\n{leaves}\n}}'
    else:
      text = json.dumps(value, allow_nan=False)
    lines.append(f'{json.dumps(key)}: {text}')
  text = '{\n' + ',\n'.join(lines) + '\n}\n'
  with open(path, 'w', encoding='utf-8') as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())


def _check_tokenizer(entry: Any, what: str) -> None:
  if entry is None:
    return
  if not isinstance(entry, Mapping) or set(entry) != {
    'file',
    'sha256',
    'custom_tokens',
  }:
    raise errors.HeaderError(
      f'{what}: tokenizer must be null or have file, sha256 and'
      f' custom_tokens, got {entry!r:.200}.'
    )
  _safetensors.check_file_name(entry['file'], where=what)
  digest = entry['sha256']
  if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
    raise errors.HeaderError(f'{what}: sha256 is {digest!r:.100}.')
  custom = entry['custom_tokens']
  if not isinstance(custom, Mapping) or not all(
    re.fullmatch(r'\d{1,2}', k) and isinstance(v, str)
    for k, v in custom.items()
  ):
    raise errors.HeaderError(
      f'{what}: custom_tokens must map numbers to strings, got {custom!r:.100}.'
    )


def _check_params(params: Any, what: str) -> None:
  if not isinstance(params, Mapping) or not params:
    raise errors.HeaderError(f'{what}: params must be a non-empty object.')
  if len(params) > _MAX_LEAVES:
    raise errors.HeaderTooLargeError(
      f'{what}: {len(params)} parameters; at most {_MAX_LEAVES} accepted.'
    )
  for name, leaf in params.items():
    at = f'{what}: parameter {name!r:.200}'
    if not isinstance(leaf, Mapping) or set(leaf) != {'shape', 'dtype'}:
      raise errors.HeaderError(f'{at} must have shape and dtype.')
    shape, dtype = leaf['shape'], leaf['dtype']
    if dtype not in _LEAF_DTYPES:
      raise errors.UnsupportedTypeError(
        f'{at} has type {dtype!r:.50}; expected one of {_LEAF_DTYPES}.'
      )
    if not isinstance(shape, list) or len(shape) > _MAX_RANK:
      raise errors.HeaderError(f'{at} has shape {shape!r:.100}.')
    for size in shape:
      if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise errors.HeaderError(f'{at} has shape {shape!r:.100}.')
      if size > _MAX_DIM:
        raise errors.HeaderTooLargeError(f'{at} has shape {shape!r:.100}.')
