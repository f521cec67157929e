# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""GGUF vocabulary -> SentencePiece model -> `gm.text` tokenizer.

The result tokenises as the official tokenizers do: control tokens written in
the text (`<start_of_turn>`, `<unused7>`) become their ids, except padding,
end, begin and unknown, which stay text. That is llama.cpp with
`parse_special=True` for text without those four, and with
`parse_special=False` for text without any other control token. (Runs of the
character U+2581 itself differ: to SentencePiece they are spaces.)

Gemma 4's vocabulary is stored as BPE merges without scores. SentencePiece
merges the pair whose result has the highest score, so that the lowest rank of
the merges that yield a piece, negated, serves as its score.
"""

import hashlib
import pathlib
from typing import Any

from gemma import gm
import numpy as np
from sentencepiece import sentencepiece_model_pb2

from gemma_ext import errors
from gemma_ext.ckpts import _cache

_FORMAT = b'gemma_ext vocabulary 1'
_SPACE = '▁'
_MAX_PIECE_BYTES = 1 << 12
_MODELS = ('llama', 'gemma4')

# Token types of GGUF.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

# Generated code: its classes exist only at run time.
sp_proto: Any = sentencepiece_model_pb2
_Piece = sp_proto.ModelProto.SentencePiece
_TO_SENTENCEPIECE = {
  _NORMAL: _Piece.NORMAL,
  _UNKNOWN: _Piece.UNKNOWN,
  # Official vocabularies mark these as user-defined; converters to GGUF
  # change them so that llama.cpp hides them in its output.
  _CONTROL: _Piece.USER_DEFINED,
  _USER_DEFINED: _Piece.USER_DEFINED,
  _UNUSED: _Piece.UNUSED,
  _BYTE: _Piece.BYTE,
}


def tokenizer_of(
  metadata: dict[str, Any],
  cls: type[gm.text.Tokenizer],
  *,
  max_tokens: int,
) -> gm.text.Tokenizer | None:
  """Returns the tokenizer of a GGUF file, `None` if it has no vocabulary.

  The SentencePiece model is written once into the cache folder, under the
  hash of what it is made from.

  Args:
    metadata: Metadata of the file.
    cls: Tokenizer class of the model's family.
    max_tokens: Rows of the embedding table.

  Raises:
    TokenizerError: If the vocabulary is malformed, larger than the embedding
      table, or of another kind than Gemma's.
  """
  if 'tokenizer.ggml.tokens' not in metadata:
    return None
  kind = metadata.get('tokenizer.ggml.model')
  if kind not in _MODELS:
    raise errors.TokenizerError(
      f'The vocabulary is of the kind {kind!r}; expected one of {_MODELS}.'
    )
  tokens, scores, types = _checked(metadata, max_tokens)
  merges = _merges(metadata) if kind == 'gemma4' else None
  special = cls.special_tokens
  bos = metadata.get('tokenizer.ggml.bos_token_id', int(special.BOS))
  if bos != special.BOS:
    raise errors.TokenizerError(
      f'The file begins texts with token {bos!r}; {cls.__name__} has'
      f' {int(special.BOS)}.'
    )
  key = _content_hash(tokens, scores, types, merges)
  path = _cache.cache_dir() / 'tokenizers' / f'{key}.model'
  if path.is_file():
    tokenizer = _opened(path, cls, len(tokens))
    if tokenizer is not None:
      return tokenizer
  if merges is not None:
    scores, types = _from_merges(tokens, types, merges)
  model = sentencepiece_model(tokens, scores, types, special)
  with _cache.atomic_file(path) as file:
    file.write(model)
  tokenizer = _opened(path, cls, len(tokens))
  if tokenizer is None:
    path.unlink(missing_ok=True)
    raise errors.TokenizerError(
      'SentencePiece rejects the vocabulary of the file. The checkpoint is'
      ' damaged or not a Gemma.'
    )
  return tokenizer


def sentencepiece_model(
  tokens: list[bytes],
  scores: np.ndarray,
  types: np.ndarray,
  special: type[gm.text.SpecialTokens],
) -> bytes:
  """Returns a serialised SentencePiece model of the vocabulary.

  BPE with byte fallback, no dummy prefix, identity normaliser.

  Args:
    tokens: Text of each token, in UTF-8.
    scores: float32 [tokens]; of the pairs in a text, the one whose merged
      piece has the highest score is merged first.
    types: int [tokens]; GGUF's token types.
    special: Ids of the padding, end, begin and unknown token.

  Raises:
    TokenizerError: If a token is empty, too long, or not UTF-8.
  """
  ids = {
    int(special.PAD): _Piece.CONTROL,
    int(special.EOS): _Piece.CONTROL,
    int(special.BOS): _Piece.CONTROL,
    int(special.UNK): _Piece.UNKNOWN,
  }
  if len(tokens) <= max(ids):
    raise errors.TokenizerError(
      f'The vocabulary has {len(tokens)} tokens; it needs more than'
      f' {max(ids)} for the special ones.'
    )
  model = sp_proto.ModelProto()
  texts = [_text(i, token) for i, token in enumerate(tokens)]
  # llama.cpp keeps the last of several tokens with one text, and so do we.
  last = {text: i for i, text in enumerate(texts)}
  for i, (text, score, kind) in enumerate(
    zip(texts, scores.tolist(), types.tolist())
  ):
    piece_type = ids.get(i, _TO_SENTENCEPIECE[kind])
    if piece_type == _Piece.UNKNOWN and i != special.UNK:
      piece_type = _Piece.UNUSED
    if last[text] != i:
      text, piece_type = f'{text}<duplicate {i}>', _Piece.UNUSED
    model.pieces.add(piece=text, score=score, type=piece_type)
  _fill_specs(model, special)
  return model.SerializeToString()


def _fill_specs(model: Any, special: type[gm.text.SpecialTokens]) -> None:
  trainer = model.trainer_spec
  trainer.model_type = sp_proto.TrainerSpec.BPE
  trainer.vocab_size = len(model.pieces)
  trainer.byte_fallback = True
  for name, value in (
    ('pad', special.PAD),
    ('eos', special.EOS),
    ('bos', special.BOS),
    ('unk', special.UNK),
  ):
    setattr(trainer, f'{name}_id', int(value))
    setattr(trainer, f'{name}_piece', model.pieces[int(value)].piece)
  normalizer = model.normalizer_spec
  normalizer.name = 'identity'
  normalizer.add_dummy_prefix = False
  normalizer.remove_extra_whitespaces = False
  normalizer.escape_whitespaces = True


def _text(i: int, token: bytes) -> str:
  if not 1 <= len(token) <= _MAX_PIECE_BYTES or b'\0' in token:
    raise errors.TokenizerError(
      f'Token {i} has {len(token)} bytes, or a zero byte; expected 1 to'
      f' {_MAX_PIECE_BYTES} bytes of text.'
    )
  try:
    # GGUF has the spaces of user-defined tokens as they are.
    return token.decode('utf-8').replace(' ', _SPACE)
  except UnicodeDecodeError as e:
    raise errors.TokenizerError(
      f'Token {i} is not UTF-8: {token[:32]!r}.'
    ) from e


def _checked(
  metadata: dict[str, Any], max_tokens: int
) -> tuple[list[bytes], np.ndarray, np.ndarray]:
  """Tokens, scores and types with the right types and lengths."""
  tokens = metadata['tokenizer.ggml.tokens']
  if not isinstance(tokens, list) or not all(
    isinstance(t, bytes) for t in tokens
  ):
    raise errors.TokenizerError('tokenizer.ggml.tokens is no list of strings.')
  if not 1 <= len(tokens) <= max_tokens:
    raise errors.TokenizerError(
      f'The vocabulary has {len(tokens)} tokens, the embedding table'
      f' {max_tokens} rows.'
    )
  scores = metadata.get('tokenizer.ggml.scores')
  if metadata['tokenizer.ggml.model'] == 'gemma4' and scores is None:
    scores = np.zeros(len(tokens), np.float32)
  types = metadata.get('tokenizer.ggml.token_type')
  for name, values, kinds in (
    ('scores', scores, 'f'),
    ('token_type', types, 'iu'),
  ):
    if (
      not isinstance(values, np.ndarray)
      or values.shape != (len(tokens),)
      or values.dtype.kind not in kinds
    ):
      raise errors.TokenizerError(
        f'tokenizer.ggml.{name} is missing, or not one number for each of the'
        f' {len(tokens)} tokens.'
      )
  scores, types = np.asarray(scores), np.asarray(types)
  if not np.isfinite(scores).all():
    raise errors.TokenizerError('A score of the vocabulary is not finite.')
  if types.min() < _NORMAL or types.max() > _BYTE:
    raise errors.TokenizerError(
      f'Token types range from {types.min()} to {types.max()}; expected'
      f' {_NORMAL} to {_BYTE}.'
    )
  return tokens, scores.astype(np.float32), types


def _merges(metadata: dict[str, Any]) -> list[bytes]:
  merges = metadata.get('tokenizer.ggml.merges')
  if not isinstance(merges, list) or not all(
    isinstance(m, bytes) for m in merges
  ):
    raise errors.TokenizerError(
      'The vocabulary is stored as merges, but tokenizer.ggml.merges is'
      ' missing or no list of strings.'
    )
  return merges


def _from_merges(
  tokens: list[bytes], types: np.ndarray, merges: list[bytes]
) -> tuple[np.ndarray, np.ndarray]:
  """Scores from merge ranks, and types as the official vocabulary has them."""
  rank: dict[bytes, int] = {}
  for i, merge in enumerate(merges):
    left, space, right = merge.partition(b' ')
    if not left or not space or not right or b' ' in right:
      raise errors.TokenizerError(
        f'Merge {i} is {merge[:64]!r}; expected two pieces and a space.'
      )
    rank.setdefault(left + right, i)
  scores = np.zeros(len(tokens), np.float32)
  types = types.copy()
  for i, token in enumerate(tokens):
    scores[i] = -float(rank.get(token, 0))
    if types[i] != _NORMAL:
      continue
    text = token.decode('utf-8', 'replace')
    # What no merge yields can only have been matched whole. Runs of one white
    # space are matched whole too, longest first, whatever merges they have.
    is_run = len(text) > 1 and set(text) in ({'\n'}, {'\t'}, {_SPACE})
    if is_run or (len(text) > 1 and token not in rank):
      types[i] = _USER_DEFINED
  return scores, types


def _content_hash(
  tokens: list[bytes],
  scores: np.ndarray,
  types: np.ndarray,
  merges: list[bytes] | None,
) -> str:
  digest = hashlib.sha256(_FORMAT)
  for strings in (tokens, merges or []):
    lengths = np.fromiter(map(len, strings), np.int64, len(strings))
    digest.update(lengths.tobytes() + b'|')
    digest.update(b''.join(strings))
  digest.update(scores.tobytes() + types.astype('<i4').tobytes())
  return digest.hexdigest()


def _opened(
  path: pathlib.Path, cls: type[gm.text.Tokenizer], size: int
) -> gm.text.Tokenizer | None:
  """The tokenizer of a model file, `None` if SentencePiece rejects it."""
  tokenizer = cls(path=str(path))
  try:
    return tokenizer if tokenizer.vocab_size == size else None
  except (RuntimeError, OSError):
    return None
