# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories and safetensors files made by hand, to break."""

import json
import pathlib
import shutil
import struct
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sp_proto

DATA = pathlib.Path(__file__).parent / 'data'
FAMILIES = tuple(sorted(p.name for p in DATA.iterdir() if p.is_dir()))


def copy(name: str, folder: pathlib.Path) -> pathlib.Path:
  """Copies one of the stored models to where it may be changed."""
  target = folder / name
  shutil.copytree(DATA / name, target)
  return target


def edit_json(path: pathlib.Path, **changes: Any) -> None:
  """Sets keys of a JSON file; `None` for a key sets null."""
  data = json.loads(path.read_text())
  data.update(changes)
  path.write_text(json.dumps(data))


def pack(header: Any, data: bytes = b'', *, length: int | None = None) -> bytes:
  """A safetensors file of any header, right or wrong.

  Args:
    header: JSON object, or bytes taken as they are.
    data: What follows it.
    length: What the first 8 bytes say; the true length if `None`.
  """
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  return struct.pack('<Q', length) + text + data


def entry(
  shape: list[int], begin: int, end: int, dtype: str = 'F32'
) -> dict[str, Any]:
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


def unpack(path: pathlib.Path) -> tuple[dict[str, Any], bytes]:
  """Header and data of a safetensors file."""
  raw = path.read_bytes()
  (length,) = struct.unpack('<Q', raw[:8])
  return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def tokenizer_json(model: bytes) -> dict[str, Any]:
  """What transformers makes of a SentencePiece BPE model, as tokenizer.json.

  Every way to split a piece into two pieces is a merge; better scores first.
  That goes for pieces that are added tokens as well: runs of spaces are never
  found as such in text, where they are not escaped, and come from merges.
  """
  proto = sp_proto.ModelProto()
  proto.ParseFromString(model)
  kinds = sp_proto.ModelProto.SentencePiece
  pieces = [(p.piece, p.score, p.type) for p in proto.pieces]
  vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
  normal = {
    p: s for p, s, kind in pieces if kind in (kinds.NORMAL, kinds.USER_DEFINED)
  }
  merges = []
  for piece in sorted(normal, key=lambda p: -normal[p]):
    merges += [
      [piece[:i], piece[i:]]
      for i in range(1, len(piece))
      if piece[:i] in normal and piece[i:] in normal
    ]
  added = [
    {
      'id': i,
      'content': piece,
      'single_word': False,
      'lstrip': False,
      'rstrip': False,
      'normalized': False,
      'special': kind != kinds.USER_DEFINED,
    }
    for i, (piece, _, kind) in enumerate(pieces)
    if kind in (kinds.USER_DEFINED, kinds.CONTROL, kinds.UNKNOWN)
  ]
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': added,
    'normalizer': {
      'type': 'Replace',
      'pattern': {'String': ' '},
      'content': '▁',
    },
    'pre_tokenizer': {
      'type': 'Split',
      'pattern': {'String': ' '},
      'behavior': 'MergedWithPrevious',
      'invert': False,
    },
    'post_processor': None,
    'decoder': {
      'type': 'Sequence',
      'decoders': [
        {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '},
        {'type': 'ByteFallback'},
        {'type': 'Fuse'},
      ],
    },
    'model': {
      'type': 'BPE',
      'dropout': None,
      'unk_token': '<unk>',
      'continuing_subword_prefix': None,
      'end_of_word_suffix': None,
      'fuse_unk': True,
      'byte_fallback': True,
      'ignore_merges': False,
      'vocab': vocab,
      'merges': merges,
    },
  }
