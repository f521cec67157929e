# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Fuzz test: whatever the bytes, the GGUF loader ends in one of our errors."""

import pathlib
import random
import struct
import tempfile
import tracemalloc

from gemma import gm
import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext.ckpts import _gguf
from gemma_ext.ckpts import _gguf_header
from gemma_ext.ckpts import _vocab
from tests import tiny
from tests.ckpts import gguf_fixtures as fx

_SETTINGS = hypothesis.settings(
  max_examples=300,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)
_MAX_BYTES = 64 << 20
# Hypothesis prefers small integers; places in a file shall be even.
_PLACES = st.integers(0, 1 << 30).map(lambda seed: random.Random(seed).random())


@pytest.fixture(scope='module')
def valid(tmp_path_factory):
  """A small valid file, and where its tensor data begins."""
  folder = tmp_path_factory.mktemp('fuzz')
  model = tiny.model('gemma3')
  params = fx.exact(jax.tree.map(np.asarray, tiny.params(model)))
  path = folder / 'm.gguf'
  fx.write(path, model, params)
  with path.open('rb', buffering=0) as file:
    tensors = _gguf_header.read_header(file).tensors
  return path.read_bytes(), min(t.offset for t in tensors.values())


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
  monkeypatch.setenv('GEMMA_EXT_CACHE', str(tmp_path))


def _headers_only(raw: bytes) -> None:
  """Everything that is done before tensor data is read."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'x.gguf'
    path.write_bytes(raw)
    with path.open('rb', buffering=0) as file:
      header = _gguf_header.read_header(file)
      source = _gguf.GgufSource(file, header)
      _gguf._families.model_from_hparams(source.hparams)
      _vocab.tokenizer_of(
        header.metadata,
        gm.text.Gemma3Tokenizer,
        max_tokens=source.hparams.vocab_size,
      )
      for name in ('embed', 'layer_0/q', 'layer_2/down', 'final_norm'):
        if source.has(name):
          shape = source.shape(name)
          assert source.read(name, 0, min(4, shape[0])).size > 0
      source.unused()


def _ends_well(raw: bytes) -> bool:
  tracemalloc.start()
  try:
    _headers_only(raw)
    ended = True
  except errors.GemmaExtError as e:
    assert str(e)
    ended = False
  finally:
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
  assert peak < _MAX_BYTES, f'{peak} bytes for a file of {len(raw)}'
  return ended


def test_the_valid_file_is_accepted(valid):
  assert _ends_well(valid[0])


@_SETTINGS
@hypothesis.given(data=st.data())
def test_changed_bytes(valid, data):
  raw, start = bytearray(valid[0]), valid[1]
  for _ in range(data.draw(st.integers(1, 4))):
    at = int(data.draw(_PLACES) * start)
    raw[at] = data.draw(st.integers(0, 255))
  _ends_well(bytes(raw))


_NUMBERS = st.sampled_from(
  [0, 1, 2, 7, 8, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1]
)


@_SETTINGS
@hypothesis.given(data=st.data())
def test_changed_words(valid, data):
  """Counts and lengths are 8-byte words: put extreme ones anywhere."""
  raw, start = bytearray(valid[0]), valid[1]
  keys = [b'gemma3.', b'blk.', b'tokenizer.', b'general.']
  near = data.draw(st.sampled_from(keys))
  found = [i for i in range(start - 64) if raw.startswith(near, i)]
  at = found[int(data.draw(_PLACES) * len(found))]
  at += data.draw(st.integers(-16, 60))
  at = min(max(at, 4), start - 8)
  raw[at : at + 8] = struct.pack('<Q', data.draw(_NUMBERS))
  _ends_well(bytes(raw))


@_SETTINGS
@hypothesis.given(data=st.data())
def test_truncated(valid, data):
  raw = valid[0]
  limit = data.draw(st.sampled_from([64, valid[1], len(raw)]))
  cut = raw[: int(data.draw(_PLACES) * limit)]
  assert not _ends_well(cut)


@_SETTINGS
@hypothesis.given(data=st.data())
def test_pieces_removed_or_doubled(valid, data):
  raw, start = valid
  first = 24 + int(data.draw(_PLACES) * (start - 26))
  last = data.draw(st.integers(first + 1, min(start, first + 400)))
  times = data.draw(st.sampled_from([0, 2, 3]))
  _ends_well(raw[:first] + raw[first:last] * times + raw[last:])


_VALUE = st.one_of(
  st.tuples(st.just(4), st.binary(min_size=4, max_size=4)),
  st.tuples(st.just(8), st.text(max_size=9).map(fx.string)),
  st.tuples(st.integers(0, 14), st.binary(max_size=24)),
  st.tuples(
    st.just(9),
    st.tuples(st.integers(0, 13), _NUMBERS, st.binary(max_size=40)).map(
      lambda t: struct.pack('<IQ', t[0], t[1]) + t[2]
    ),
  ),
)


_KEYS = st.sampled_from(
  [
    'general.alignment',
    'split.count',
    'tokenizer.ggml.tokens',
    'tokenizer.ggml.scores',
    *fx.metadata(tiny.model('gemma3')),
  ]
)
_NAMES = st.sampled_from(
  ['token_embd.weight', 'output.weight', 'x', 'rope_freqs.weight']
)


@_SETTINGS
@hypothesis.given(
  pairs=st.lists(st.tuples(_KEYS | st.text(max_size=8), _VALUE), max_size=4),
  infos=st.lists(
    st.tuples(
      _NAMES,
      st.lists(st.sampled_from([1, 2, 32]) | _NUMBERS, max_size=5),
      st.integers(0, 3) | st.integers(0, 45),
      st.sampled_from([0, 32, 128]) | _NUMBERS,
    ),
    max_size=3,
  ),
  data=st.integers(0, 512),
)
def test_random_headers(pairs, infos, data):
  raw = fx.header(
    (fx.pair('general.architecture', 8, fx.string('gemma3')),)
    + tuple(fx.pair(key, *value) for key, value in pairs),
    tuple(
      fx.tensor_info(name, tuple(dims), kind=kind, offset=offset)
      for name, dims, kind, offset in infos
    ),
    data=data,
  )
  assert not _ends_well(raw)


@_SETTINGS
@hypothesis.given(raw=st.binary(max_size=400), magic=st.booleans())
def test_random_bytes(raw, magic):
  assert not _ends_well((b'GGUF\3\0\0\0' if magic else b'') + raw)


@hypothesis.settings(_SETTINGS, max_examples=12)
@hypothesis.given(data=st.data())
def test_whole_load_of_changed_bytes(valid, data, tmp_path_factory):
  """The same through the public loader, tensors and all."""
  raw = bytearray(valid[0])
  at = int(data.draw(_PLACES) * len(raw))
  raw[at] ^= 1 << data.draw(st.integers(0, 7))
  path = tmp_path_factory.mktemp('load') / 'm.gguf'
  path.write_bytes(bytes(raw))
  try:
    _gguf.load_gguf(path)
  except errors.GemmaExtError as e:
    assert str(e)
