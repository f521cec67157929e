# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Fuzz: whatever the bytes, the loader returns or raises our own errors."""

import functools
import json
import pathlib
import tempfile
import warnings

import hypothesis
from hypothesis import strategies as st

import gemma_ext as gx
from gemma_ext.ckpts import _hf_config
from gemma_ext.ckpts import _manifest
from gemma_ext.ckpts import _safetensors
from tests.ckpts import hf_fixtures

_SETTINGS = hypothesis.settings(
  max_examples=300,
  deadline=None,
  database=None,
  derandomize=True,
  suppress_health_check=list(hypothesis.HealthCheck),
)
# Reading a whole model takes longer than reading a header.
_SLOW = hypothesis.settings(_SETTINGS, max_examples=40)


@functools.cache
def _original(name):
  return (hf_fixtures.DATA / 'gemma2_27b_like' / name).read_bytes()


def _read_all(data):
  """Reads header and every tensor; True if nothing was raised."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'x.safetensors'
    path.write_bytes(data)
    try:
      entries = _safetensors.read_header(path)
      for entry in entries.values():
        rows = _safetensors.read_rows(entry)
        # Never more memory than the file has bytes.
        assert rows.nbytes <= len(data)
    except gx.GemmaExtError:
      return False
  return True


@_SETTINGS
@hypothesis.given(
  st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)),
    min_size=1,
    max_size=8,
  )
)
def test_bytes_changed(changes):
  data = bytearray(_original('model.safetensors'))
  for at, value in changes:
    # Nearly all of them in the header, where they matter.
    data[at % 4096] = value
  _read_all(bytes(data))


@_SETTINGS
@hypothesis.given(st.integers(0, 1 << 16))
def test_cut_off(length):
  data = _original('model.safetensors')
  whole = _read_all(data[:length])
  assert whole == (length >= len(data))


@_SETTINGS
@hypothesis.given(st.binary(max_size=300))
def test_random_bytes(data):
  _read_all(data)


_SCALARS = (
  st.none()
  | st.booleans()
  | st.integers(-(1 << 70), 1 << 70)
  | st.floats(allow_nan=False)
  | st.text(max_size=10)
)
_JSON = st.recursive(
  _SCALARS,
  lambda inner: (
    st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8), inner, max_size=4)
  ),
  max_leaves=12,
)
_ENTRY = st.fixed_dictionaries(
  {
    'dtype': st.sampled_from(['F32', 'BF16', 'F8_E4M3', 'I64', 'F4']) | _JSON,
    'shape': st.lists(st.integers(-1, 5), max_size=3) | _JSON,
    'data_offsets': st.lists(st.integers(0, 64), min_size=2, max_size=2)
    | _JSON,
  }
)


@_SETTINGS
@hypothesis.given(
  st.dictionaries(st.text(max_size=8), _ENTRY | _JSON, max_size=4),
  st.binary(max_size=64),
)
def test_random_header(header, data):
  _read_all(hf_fixtures.pack(header, data))


@_SETTINGS
@hypothesis.given(st.data())
def test_changed_values_in_a_true_header(data):
  header = {
    'a': hf_fixtures.entry([2, 2], 0, 16),
    'b': hf_fixtures.entry([4], 16, 24, 'BF16'),
  }
  name = data.draw(st.sampled_from('ab'))
  key = data.draw(st.sampled_from(['dtype', 'shape', 'data_offsets']))
  header[name][key] = data.draw(_JSON)
  _read_all(hf_fixtures.pack(header, bytes(24)))


@_SETTINGS
@hypothesis.given(st.data())
def test_changed_values_in_a_true_config(data):
  config = json.loads(_original('config.json'))
  for _ in range(data.draw(st.integers(1, 3))):
    key = data.draw(st.sampled_from(sorted(config)))
    config[key] = data.draw(_JSON)
  try:
    hparams = _hf_config.parse(config)
  except gx.GemmaExtError:
    return
  assert 1 <= hparams.num_layers <= 512


@_SETTINGS
@hypothesis.given(st.data())
def test_changed_values_in_a_manifest(data):
  manifest = {
    'format': 'gemma_ext',
    'version': _manifest.VERSION,
    'model': {},
    'recipe': None,
    'dtype': 'bfloat16',
    'tokenizer': {
      'file': 'tokenizer.model',
      'sha256': '0' * 64,
      'custom_tokens': {},
    },
    'params': {'w': {'shape': [1], 'dtype': 'uint8'}},
    'source': '',
    'metadata': {},
    'created_with': {},
  }
  where = data.draw(
    st.sampled_from([(), ('tokenizer',), ('params',), ('params', 'w')])
  )
  target = manifest
  for key in where:
    target = target[key]
  target[data.draw(st.sampled_from(sorted(target)))] = data.draw(_JSON)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'recipe.json'
    path.write_text(json.dumps(manifest))
    try:
      _manifest.read(path)
    except gx.GemmaExtError:
      pass


@_SLOW
@hypothesis.given(
  st.sampled_from(['model.safetensors', 'config.json']),
  st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)),
    min_size=1,
    max_size=3,
  ),
)
def test_directory_with_bytes_changed(name, changes):
  data = bytearray(_original(name))
  for at, value in changes:
    data[at % len(data)] = value
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    for file in ('model.safetensors', 'config.json'):
      content = bytes(data) if file == name else _original(file)
      (path / file).write_bytes(content)
    with warnings.catch_warnings():
      # Huge weights overflow on the way to bfloat16, and that is an error.
      warnings.simplefilter('ignore', RuntimeWarning)
      try:
        gx.ckpts.load(path)
      except gx.GemmaExtError:
        pass
