# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of Hugging Face directories, as the official classes read them.

`tokenizer.model` is SentencePiece already. `tokenizer.json` lists BPE merges,
from which a SentencePiece model that merges alike is rebuilt: a piece scores
minus the rank of the first merge that makes it.
"""

from collections.abc import Mapping
import hashlib
import os
import pathlib
from typing import Any

from absl import logging
from flax import linen as nn
from gemma import gm
from google.protobuf import message
import numpy as np
from sentencepiece import sentencepiece_model_pb2

from gemma_ext import errors
from gemma_ext.ckpts import _cache
from gemma_ext.ckpts import _families
from gemma_ext.ckpts import _strict_json
from gemma_ext.ckpts import _vocab

SENTENCEPIECE_NAME = 'tokenizer.model'
JSON_NAME = 'tokenizer.json'

_MAX_SENTENCEPIECE_BYTES = 64 << 20
_MAX_JSON_BYTES = 128 << 20
_MAX_MERGES = 1 << 23
_SPECIAL = ('<pad>', '<eos>', '<bos>', '<unk>')
_SPACE = '▁'
# Share of merges that may be out of step with any SentencePiece model.
_TOLERANCE = 1e-3

# Its members are made when it is imported, where no type checker sees them.
_sp_proto: Any = sentencepiece_model_pb2

# Token types that `_vocab` takes.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def read(
  directory: os.PathLike | str, model: nn.Module
) -> gm.text.Tokenizer | None:
  """Reads the tokenizer of a directory; `None` if it has none.

  Args:
    directory: Holds tokenizer.model or tokenizer.json.
    model: The model it is for; chooses the class and bounds the vocabulary.

  Raises:
    TokenizerError: If the file is malformed or does not fit the model.
  """
  directory = pathlib.Path(directory)
  if (directory / SENTENCEPIECE_NAME).is_file():
    return from_sentencepiece(directory / SENTENCEPIECE_NAME, model)
  if (directory / JSON_NAME).is_file():
    return from_json(directory / JSON_NAME, model)
  return None


def from_sentencepiece(
  path: os.PathLike | str, model: nn.Module
) -> gm.text.Tokenizer:
  """Checks a SentencePiece file and wraps it for `model`; raises as `read`."""
  with open(path, 'rb') as f:
    data = f.read(_MAX_SENTENCEPIECE_BYTES + 1)
  if len(data) > _MAX_SENTENCEPIECE_BYTES:
    raise errors.TokenizerError(
      f'{path} is larger than {_MAX_SENTENCEPIECE_BYTES} bytes.'
    )
  proto = _sp_proto.ModelProto()
  try:
    proto.ParseFromString(data)
  except message.DecodeError as e:
    raise errors.TokenizerError(
      f'{path} is not a SentencePiece model: {e}'
    ) from e
  names = [p.piece for p in proto.pieces[: len(_SPECIAL)]]
  _check_special(names, path)
  _check_size(len(proto.pieces), model, path)
  if not np.isfinite([p.score for p in proto.pieces]).all():
    raise errors.TokenizerError(f'{path} has scores that are not finite.')
  tokenizer = _families.tokenizer_class(model)(path=os.fspath(path))
  try:
    size = tokenizer.vocab_size
  except (RuntimeError, OSError) as e:
    raise errors.TokenizerError(f'{path}: SentencePiece rejects it: {e}') from e
  if size != len(proto.pieces):
    raise errors.TokenizerError(
      f'{path} holds {len(proto.pieces)} pieces, but SentencePiece reads'
      f' {size}.'
    )
  return tokenizer


def from_json(path: os.PathLike | str, model: nn.Module) -> gm.text.Tokenizer:
  """Rebuilds SentencePiece from a tokenizer.json; raises as `read`.

  The result is kept in the cache folder under the hash of the file.
  """
  cls = _families.tokenizer_class(model)
  rows = model.config.num_embed
  try:
    with open(path, 'rb') as f:
      data = f.read(_MAX_JSON_BYTES + 1)
    if len(data) > _MAX_JSON_BYTES:
      raise errors.TokenizerError(
        f'{path} is larger than {_MAX_JSON_BYTES} bytes.'
      )
    key = hashlib.sha256(b'gemma_ext json 1 %d ' % rows + data).hexdigest()
    cached = _cache.cache_dir() / 'tokenizers' / f'{key}.model'
    if not cached.is_file():
      parsed = _strict_json.parse_object(data, what=os.fspath(path))
      proto = _rebuild(parsed, cls, model, path)
      with _cache.atomic_file(cached) as file:
        file.write(proto)
  except errors.HeaderError as e:
    raise errors.TokenizerError(str(e)) from e
  return from_sentencepiece(cached, model)


def _rebuild(
  data: Mapping[str, Any],
  cls: type[gm.text.Tokenizer],
  model: nn.Module,
  path: os.PathLike | str,
) -> bytes:
  """Returns a serialised SentencePiece model."""
  bpe = _checked_model(data, path)
  vocab = _checked_vocab(bpe['vocab'], path)
  added = _added_tokens(data.get('added_tokens'), path)
  pieces = {i: token for token, i in vocab.items()}
  for i, token in added.items():
    # Placeholders for images lie beyond the rows of text-only models.
    if i < model.config.num_embed:
      if pieces.setdefault(i, token) != token:
        raise errors.TokenizerError(
          f'{path}: id {i} is both {pieces[i]!r:.50} and {token!r:.50}.'
        )
  if sorted(pieces) != list(range(len(pieces))):
    raise errors.TokenizerError(
      f'{path}: the ids of its {len(pieces)} tokens are not 0 to'
      f' {len(pieces) - 1}.'
    )
  tokens = [pieces[i] for i in range(len(pieces))]
  _check_special(tokens[: len(_SPECIAL)], path)
  _check_size(len(tokens), model, path)
  types = np.full(len(tokens), _NORMAL, np.int32)
  for i in added:
    if i < len(tokens):
      types[i] = _USER_DEFINED
  for byte in range(256):
    piece = f'<0x{byte:02X}>'
    if piece not in vocab:
      raise errors.TokenizerError(
        f'{path}: no piece {piece}, which byte fallback needs.'
      )
    types[vocab[piece]] = _BYTE
  ranks = _ranks(bpe['merges'], path)
  _check_merges(ranks, tokens, types, path)
  first: dict[str, int] = {}
  for (left, right), rank in ranks.items():
    first.setdefault(left + right, rank)
  scores = np.array([-float(first.get(t, 0)) for t in tokens], np.float32)
  try:
    encoded = [t.encode('utf-8') for t in tokens]
  except UnicodeEncodeError as e:
    raise errors.TokenizerError(f'{path}: a token is not text: {e}') from e
  return _vocab.sentencepiece_model(encoded, scores, types, cls.special_tokens)


def _checked_model(
  data: Mapping[str, Any], path: os.PathLike | str
) -> Mapping[str, Any]:
  """The BPE model, unless SentencePiece would not do what it does."""
  bpe = data.get('model')
  if (
    not isinstance(bpe, Mapping)
    or bpe.get('type', 'BPE') != 'BPE'
    or not isinstance(bpe.get('vocab'), Mapping)
    or not isinstance(bpe.get('merges'), list)
  ):
    raise errors.TokenizerError(
      f'{path}: expected a BPE model with vocab and merges.'
    )
  wanted = {
    'byte_fallback': (True,),
    'dropout': (None, 0, 0.0),
    'continuing_subword_prefix': (None, ''),
    'end_of_word_suffix': (None, ''),
    'ignore_merges': (None, False),
  }
  for name, accepted in wanted.items():
    if bpe.get(name) not in accepted:
      raise errors.TokenizerError(
        f'{path}: {name} is {bpe.get(name)!r:.50}; Gemma tokenizers have one'
        f' of {accepted}.'
      )
  normalizer = data.get('normalizer')
  if isinstance(normalizer, Mapping) and normalizer.get('type') == 'Sequence':
    inner = normalizer.get('normalizers')
    normalizer = inner[0] if isinstance(inner, list) and len(inner) == 1 else 0
  splitter = data.get('pre_tokenizer')
  escapes = normalizer == {
    'type': 'Replace',
    'pattern': {'String': ' '},
    'content': _SPACE,
  }
  # After the normaliser there are no spaces left to split at.
  splits_at_spaces = (
    isinstance(splitter, Mapping)
    and splitter.get('type') == 'Split'
    and splitter.get('pattern') == {'String': ' '}
  )
  metaspace = (
    isinstance(splitter, Mapping)
    and splitter.get('type') == 'Metaspace'
    and splitter.get('replacement') == _SPACE
    and splitter.get('prepend_scheme') == 'never'
    and splitter.get('split') is False
  )
  if not (escapes and (splitter is None or splits_at_spaces)) and not (
    normalizer is None and metaspace
  ):
    raise errors.TokenizerError(
      f'{path}: normalizer {normalizer!r:.200} and pre_tokenizer'
      f' {splitter!r:.200} are not those of a Gemma. Use its'
      f' {SENTENCEPIECE_NAME}.'
    )
  return bpe


def _checked_vocab(
  vocab: Mapping[str, Any], path: os.PathLike | str
) -> dict[str, int]:
  seen = set()
  for token, i in vocab.items():
    if not _is_id(i) or i in seen:
      raise errors.TokenizerError(
        f'{path}: token {token!r:.50} has the id {i!r:.50}; expected an'
        ' integer of its own.'
      )
    seen.add(i)
  return dict(vocab)


def _added_tokens(added: Any, path: os.PathLike | str) -> dict[int, str]:
  """Id -> text of the tokens that are matched before merging."""
  out: dict[int, str] = {}
  for token in added or []:
    if (
      not isinstance(token, Mapping)
      or not isinstance(token.get('content'), str)
      or not token['content']
      or not _is_id(token.get('id'))
      or token['id'] in out
    ):
      raise errors.TokenizerError(
        f'{path}: added token {token!r:.200} is malformed.'
      )
    if any(token.get(k) for k in ('single_word', 'lstrip', 'rstrip')):
      raise errors.TokenizerError(
        f'{path}: added token {token["content"]!r:.50} strips or asks for'
        ' whole words, which SentencePiece does not.'
      )
    out[token['id']] = token['content']
  return out


def _is_id(value: Any) -> bool:
  is_int = isinstance(value, int) and not isinstance(value, bool)
  return is_int and value >= 0


def _ranks(
  merges: list[Any], path: os.PathLike | str
) -> dict[tuple[str, str], int]:
  """(left, right) -> rank. Merges are 'left right' or [left, right]."""
  if len(merges) > _MAX_MERGES:
    raise errors.TokenizerError(
      f'{path}: {len(merges)} merges; at most {_MAX_MERGES} are accepted.'
    )
  out: dict[tuple[str, str], int] = {}
  for rank, merge in enumerate(merges):
    parts = merge.split(' ') if isinstance(merge, str) else merge
    if (
      not isinstance(parts, list)
      or len(parts) != 2
      or not all(isinstance(p, str) and p for p in parts)
    ):
      raise errors.TokenizerError(
        f'{path}: merge {rank} is {merge!r:.100}; expected two pieces.'
      )
    out.setdefault((parts[0], parts[1]), rank)
  return out


def _check_merges(
  ranks: Mapping[tuple[str, str], int],
  tokens: list[str],
  types: np.ndarray,
  path: os.PathLike | str,
) -> None:
  """Checks that merging by score does what merging by rank does.

  SentencePiece merges whatever two pieces make a third, best score first. A
  list of merges says the same if it has every way to make each piece, and all
  of them one after the other.
  """
  normal = {t for t, k in zip(tokens, types) if k == _NORMAL}
  known = set(tokens)
  unknown = runs = 0
  before = None
  made = set()
  for left, right in ranks:
    piece = left + right
    if piece not in known or left not in known or right not in known:
      unknown += 1
    if piece != before:
      runs += piece in made
      made.add(piece)
      before = piece
  lacking = 0
  for piece in normal:
    lacking += any(
      piece[:i] in normal
      and piece[i:] in normal
      and (piece[:i], piece[i:]) not in ranks
      for i in range(1, len(piece))
    )
  if unknown:
    raise errors.TokenizerError(
      f'{path}: {unknown} merges use or make pieces that are not in the'
      ' vocabulary.'
    )
  wrong = runs + lacking
  if wrong > _TOLERANCE * len(tokens):
    raise errors.TokenizerError(
      f'{path}: {wrong} of {len(tokens)} pieces are merged in an order that'
      f' no SentencePiece model has. Use the {SENTENCEPIECE_NAME} of the'
      ' model.'
    )
  if wrong:
    logging.warning(
      '%s: %d pieces may be merged in another order.', path, wrong
    )


def _check_special(names: list[str], path: os.PathLike | str) -> None:
  if tuple(names) != _SPECIAL:
    raise errors.TokenizerError(
      f'{path}: the first tokens are {names!r:.100}; those of a Gemma are'
      f' {list(_SPECIAL)}.'
    )


def _check_size(size: int, model: nn.Module, path: os.PathLike | str) -> None:
  rows = model.config.num_embed
  if size > rows:
    raise errors.TokenizerError(
      f'{path} has {size} tokens, but the embedding table of the model has'
      f' {rows} rows.'
    )
