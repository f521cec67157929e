# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""llama.cpp through its C interface, from the library inside `xllamacpp`.

The package binds a server that gives no logits of the prompt, but its library
exports llama.h. Parameter structs are passed as the library's own defaults, so
that their layout, which changes, does not matter; but for the context, the
batch and the part of it that is computed at once, the first numbers of theirs,
where a text is longer than the default context.
"""

import ctypes
import os
from typing import Any

import numpy as np

from gemma_ext import errors

WINDOW = 512  # llama.cpp's default context, which the defaults bring along.
# n_ctx, n_batch and n_ubatch, as the defaults begin.
_DEFAULTS = (WINDOW, 2048, 512)


class _Opaque(ctypes.Structure):
  """A parameter struct of unknown layout, larger than any of them."""

  _fields_ = [('bytes', ctypes.c_uint64 * 256)]


class _Batch(ctypes.Structure):
  """`llama_batch` of llama.h."""

  _fields_ = [
    ('n_tokens', ctypes.c_int32),
    ('token', ctypes.POINTER(ctypes.c_int32)),
    ('embd', ctypes.POINTER(ctypes.c_float)),
    ('pos', ctypes.POINTER(ctypes.c_int32)),
    ('n_seq_id', ctypes.POINTER(ctypes.c_int32)),
    ('seq_id', ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
    ('logits', ctypes.POINTER(ctypes.c_int8)),
  ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_PTR = ctypes.c_void_p
_SIGNATURES = {
  'llama_backend_init': (None, []),
  'llama_log_set': (None, [_LOG, _PTR]),
  'llama_model_default_params': (_Opaque, []),
  'llama_model_load_from_file': (_PTR, [ctypes.c_char_p, _Opaque]),
  'llama_model_free': (None, [_PTR]),
  'llama_model_get_vocab': (_PTR, [_PTR]),
  'llama_vocab_n_tokens': (ctypes.c_int32, [_PTR]),
  'llama_context_default_params': (_Opaque, []),
  'llama_init_from_model': (_PTR, [_PTR, _Opaque]),
  'llama_free': (None, [_PTR]),
  'llama_get_memory': (_PTR, [_PTR]),
  'llama_memory_clear': (None, [_PTR, ctypes.c_bool]),
  'llama_set_n_threads': (None, [_PTR, ctypes.c_int32, ctypes.c_int32]),
  'llama_decode': (ctypes.c_int32, [_PTR, _Batch]),
  'llama_get_logits': (ctypes.POINTER(ctypes.c_float), [_PTR]),
  'llama_tokenize': (
    ctypes.c_int32,
    [
      _PTR,
      ctypes.c_char_p,
      ctypes.c_int32,
      ctypes.POINTER(ctypes.c_int32),
      ctypes.c_int32,
      ctypes.c_bool,
      ctypes.c_bool,
    ],
  ),
}


class LlamaCpp:
  """A model file opened by llama.cpp; use as a context manager.

  Attributes:
    window: Tokens of its context.
    vocab_size: Of the model.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Loads the file.

    Raises:
      OptionalDependencyError: If `xllamacpp` is missing or exports too little.
      CheckpointError: If llama.cpp rejects the file.
    """
    self._lib = library()
    self._lib.llama_backend_init()
    self._model = self._lib.llama_model_load_from_file(
      os.fspath(path).encode(), self._lib.llama_model_default_params()
    )
    if not self._model:
      raise errors.CheckpointError(f'llama.cpp cannot load {path}.')
    self._context = None
    self._open(WINDOW)
    self._vocab = self._lib.llama_model_get_vocab(self._model)
    self.vocab_size = self._lib.llama_vocab_n_tokens(self._vocab)

  def _open(self, window: int) -> None:
    """Makes a context of so many tokens; what was in it is forgotten."""
    parameters = self._lib.llama_context_default_params()
    if window > WINDOW:
      numbers = ctypes.cast(
        ctypes.pointer(parameters), ctypes.POINTER(ctypes.c_uint32)
      )
      if tuple(numbers[:3]) != _DEFAULTS:
        raise errors.OptionalDependencyError(
          f'The installed xllamacpp has another struct of parameters: it begins'
          f' {numbers[:3]}, expected {_DEFAULTS}. Texts of at most {WINDOW}'
          ' tokens do not need it.'
        )
      numbers[0] = numbers[1] = numbers[2] = window
    if self._context:
      self._lib.llama_free(self._context)
    self._context = self._lib.llama_init_from_model(self._model, parameters)
    if not self._context:
      raise errors.CheckpointError(
        f'llama.cpp has no memory for a context of {window} tokens.'
      )
    self.window = window
    threads = os.cpu_count() or 1
    self._lib.llama_set_n_threads(self._context, threads, threads)

  def reserve(self, tokens: int) -> None:
    """Makes room for a text, and forgets the one before if there is none.

    Args:
      tokens: Of the text.
    """
    if tokens > self.window:
      self._open(-(-tokens // 256) * 256)

  def __enter__(self):
    return self

  def __exit__(self, *unused: Any) -> None:
    self._lib.llama_free(self._context)
    self._lib.llama_model_free(self._model)

  def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
    """Returns the token ids of `text`, without a begin token."""
    raw = text.encode()
    size = len(raw) + 16
    ids = (ctypes.c_int32 * size)()
    n = self._lib.llama_tokenize(
      self._vocab, raw, len(raw), ids, size, False, parse_special
    )
    if n < 0:
      raise errors.TokenizerError(f'llama.cpp needs {-n} tokens for {text!r}.')
    return list(ids[:n])

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """Returns the logits at every position.

    Args:
      tokens: int [length].

    Returns:
      float32 [length, vocab_size]; a view that the next call overwrites.
    """
    self.reserve(len(tokens))
    self.clear()
    self._decode(tokens, 0, [1] * len(tokens))
    flat = self._lib.llama_get_logits(self._context)
    return np.ctypeslib.as_array(flat, (len(tokens), self.vocab_size))

  def clear(self) -> None:
    """Forgets all tokens."""
    memory = self._lib.llama_get_memory(self._context)
    self._lib.llama_memory_clear(memory, True)

  def extend(self, tokens: np.ndarray, start: int) -> np.ndarray:
    """Goes on with tokens from a position; the logits of the last one.

    Args:
      tokens: int [length].
      start: How many tokens came before.

    Returns:
      float32 [vocab_size]; a view that the next call overwrites.
    """
    self._decode(tokens, start, [0] * (len(tokens) - 1) + [1])
    flat = self._lib.llama_get_logits(self._context)
    return np.ctypeslib.as_array(flat, (self.vocab_size,))

  def _decode(self, tokens: np.ndarray, start: int, wanted: list[int]) -> None:
    n = len(tokens)
    sequence = (ctypes.c_int32 * 1)(0)
    pointer = ctypes.POINTER(ctypes.c_int32)
    batch = _Batch(
      n_tokens=n,
      token=(ctypes.c_int32 * n)(*map(int, tokens)),
      embd=None,
      pos=(ctypes.c_int32 * n)(*range(start, start + n)),
      n_seq_id=(ctypes.c_int32 * n)(*([1] * n)),
      seq_id=(pointer * n)(*([ctypes.cast(sequence, pointer)] * n)),
      logits=(ctypes.c_int8 * n)(*wanted),
    )
    status = self._lib.llama_decode(self._context, batch)
    if status:
      raise errors.CheckpointError(f'llama_decode failed with {status}.')


@_LOG
def _silent(level: int, text: bytes, user: Any) -> None:
  del level, text, user


def library() -> Any:
  """Returns the library with its signatures set.

  Raises:
    OptionalDependencyError: If it is missing or exports too little.
  """
  try:
    # pylint: disable-next=g-import-not-at-top
    from xllamacpp import xllamacpp
  except ImportError as e:
    raise errors.OptionalDependencyError(
      'This comparison needs llama.cpp: pip install "gemma_ext[peers]" (or'
      ' pip install xllamacpp).'
    ) from e
  found = ctypes.CDLL(xllamacpp.__file__)
  for name, (result, arguments) in _SIGNATURES.items():
    try:
      function = getattr(found, name)
    except AttributeError as e:
      raise errors.OptionalDependencyError(
        f'The installed xllamacpp does not export {name}; version'
        ' 2026.10.11549 does.'
      ) from e
    function.restype = result
    function.argtypes = arguments
  found.llama_log_set(_silent, None)
  return found
