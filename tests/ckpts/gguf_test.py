# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of loading GGUF files: every family and type."""

import dataclasses

from gemma import gm
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext.ckpts import _gguf
from gemma_ext.ckpts import _gguf_hparams
from tests import tiny
from tests.ckpts import gguf_fixtures as fx

Q = gguf.GGMLQuantizationType
_FAMILIES = ('gemma2', 'gemma3', 'gemma4', 'gemma4_e2b', 'gemma4_moe')


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
  monkeypatch.setenv('GEMMA_EXT_CACHE', str(tmp_path / 'cache'))


def _model_and_params(family):
  model = tiny.model(family)
  params = jax.tree.map(np.asarray, tiny.params(model, seed=1))
  return model, fx.exact(params)


def _equal(actual, expected):
  flat = jax.tree_util.tree_flatten_with_path
  a, b = flat(actual)[0], flat(expected)[0]
  assert [k for k, _ in a] == [k for k, _ in b]
  for (path, x), (_, y) in zip(a, b):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize('family', _FAMILIES)
def test_file_gives_back_the_params_it_was_made_from(family, tmp_path):
  model, params = _model_and_params(family)
  fx.write(tmp_path / 'm.gguf', model, params)
  loaded, actual, tokenizer = _gguf.load_gguf(
    tmp_path / 'm.gguf', dtype=jnp.float32
  )
  changes = {}
  if family == 'gemma2':
    changes['transpose_gating_einsum'] = True
    for name in ('layer_0', 'layer_1'):
      mlp = params[name]['mlp']
      mlp['gating_einsum'] = mlp['gating_einsum'].transpose(0, 2, 1)
  elif family.startswith('gemma4'):
    changes['use_bidirectional_attention'] = None
  _equal(actual, params)
  assert loaded.config == dataclasses.replace(model.config, **changes)
  assert tokenizer.VERSION == model.INFO.tokenizer_version
  text = 'The river has 12 cities.\n\n<unused3> x'
  reference = tiny.tokenizer(model.INFO.tokenizer_version)
  assert tokenizer.encode(text) == reference.encode(text)
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gemma2_computes_what_the_source_model_does(tmp_path):
  """Gating is stored the other way round in Gemma 2 2B; logits must agree."""
  model, params = _model_and_params('gemma2')
  fx.write(tmp_path / 'm.gguf', model, params)
  loaded, actual, _ = _gguf.load_gguf(tmp_path / 'm.gguf', dtype=jnp.float32)
  tokens = jnp.arange(1, 33)[None]
  a = loaded.apply({'params': actual}, tokens).logits
  b = model.apply({'params': params}, tokens).logits
  assert float(jnp.abs(b).max()) > 1.0
  np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_missing_keys_of_kv_sharing_layers_are_never_used(tmp_path):
  """llama.cpp leaves them out; what stands in must not change the logits."""
  model, params = _model_and_params('gemma4_e2b')
  shared = range(2, model.config.num_layers)
  names = ('attn_k.weight', 'attn_v.weight', 'attn_k_norm.weight')
  gone = {f'blk.{i}.{name}': None for i in shared for name in names}
  fx.write(tmp_path / 'm.gguf', model, params, change_tensors=gone)
  loaded, actual, _ = _gguf.load_gguf(tmp_path / 'm.gguf', dtype=jnp.float32)
  filled = actual['layer_2']['attn']['kv_einsum']['w']
  assert float(jnp.abs(filled).max()) == 0.0
  tokens = jnp.arange(1, 17)[None]
  a = loaded.apply({'params': actual}, tokens).logits
  b = model.apply({'params': params}, tokens).logits
  np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def _quantisable():
  out = []
  for kind in Q:
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    try:
      gguf.quants.quantize(np.zeros((1, block), np.float32), kind)
    except (NotImplementedError, ValueError):
      continue
    out.append(kind)
  return out


@pytest.mark.parametrize('kind', _quantisable(), ids=lambda k: k.name)
def test_quantised_file_equals_the_whole_tensor_dequantised(kind, tmp_path):
  block, _ = gguf.GGML_QUANT_SIZES[kind]
  if block > 128:
    model = tiny.model('gemma3')
    config = dataclasses.replace(
      model.config, embed_dim=256, head_dim=64, num_embed=512
    )
    model = type(model)(dtype=jnp.float32, config=config)
  else:
    model = tiny.model('gemma3')
  params = fx.exact(jax.tree.map(np.asarray, tiny.params(model, seed=2)))
  content = fx.write(tmp_path / 'm.gguf', model, params, kind=kind)
  _, actual, _ = _gguf.load_gguf(tmp_path / 'm.gguf', dtype=jnp.float32)
  whole = lambda name: np.asarray(
    gguf.quants.dequantize(
      gguf.quants.quantize(content[name], kind).view(np.uint8), kind
    ),
    np.float32,
  )
  np.testing.assert_array_equal(
    actual['embedder']['input_embedding'], whole('token_embd.weight')
  )
  np.testing.assert_array_equal(
    actual['layer_1']['mlp']['linear'], whole('blk.1.ffn_down.weight').T
  )


def _dequantisable():
  out = []
  for kind in Q:
    _, nbytes = gguf.GGML_QUANT_SIZES[kind]
    try:
      gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
    except NotImplementedError:
      continue
    out.append(kind)
  return out


@pytest.mark.parametrize('kind', _dequantisable(), ids=lambda k: k.name)
def test_blocks_of_rows_equal_the_whole_tensor(kind):
  """Random bytes: every type that the package dequantises."""
  assert _gguf.can_dequantize(kind)
  block, nbytes = gguf.GGML_QUANT_SIZES[kind]
  rng = np.random.default_rng(kind)
  blocks = 2 * (4096 // block) + 3  # Two fast groups and a remainder.
  raw = rng.integers(0, 256, blocks * nbytes, np.uint8)
  with np.errstate(all='ignore'):
    expected = gguf.quants.dequantize(raw.reshape(blocks, nbytes), kind)
  expected = np.asarray(expected, np.float32).reshape(-1)
  actual = np.asarray(_gguf.dequantize(raw, kind), np.float32)
  assert actual.shape == (blocks * block,)
  np.testing.assert_array_equal(actual, expected)


def test_types_that_are_refused():
  refused = {k for k in Q if not _gguf.can_dequantize(k)}
  assert refused == set(Q) - set(_dequantisable())
  assert {Q.I8, Q.I32, Q.I64, Q.F64, Q.Q8_K} <= refused
  assert len(_dequantisable()) >= 26


def _write(tmp_path, family='gemma3', **kwargs):
  model, params = _model_and_params(family)
  path = tmp_path / 'm.gguf'
  fx.write(path, model, params, **kwargs)
  return path


@pytest.mark.parametrize(
  ('change', 'error'),
  [
    (dict(arch='llama'), errors.UnsupportedTypeError),
    (dict(arch='gemma3n'), errors.UnsupportedTypeError),
    (dict(change={'split.count': 2}), errors.UnsupportedTypeError),
    (
      dict(change={'gemma3.embedding_length': None}),
      errors.MissingTensorError,
    ),
    (dict(change={'gemma3.block_count': 'x'}), errors.HeaderError),
    (dict(change={'gemma3.block_count': True}), errors.HeaderError),
    (
      dict(change={'gemma3.block_count': 1 << 30}),
      errors.HeaderTooLargeError,
    ),
    (dict(change={'gemma3.block_count': 4}), errors.MissingTensorError),
    (dict(change={'gemma3.block_count': 2}), errors.UnexpectedTensorError),
    (
      dict(change={'gemma3.attention.head_count': 0}),
      errors.HeaderError,
    ),
    (
      dict(change={'gemma3.attention.head_count_kv': 3}),
      errors.HeaderError,
    ),
    (
      dict(change={'gemma3.attention.head_count_kv': [1, 2, 1]}),
      errors.UnsupportedTypeError,
    ),
    (
      dict(change={'gemma3.attention.head_count_kv': [1, 1]}),
      errors.HeaderError,
    ),
    (
      dict(change={'gemma3.feed_forward_length': 512}),
      errors.TensorShapeError,
    ),
    (
      dict(change={'gemma3.attention.sliding_window': None}),
      errors.HeaderError,
    ),
    (
      dict(change={'gemma3.attention.sliding_window_pattern': 0}),
      errors.HeaderError,
    ),
    (
      dict(change={'gemma3.attention.sliding_window_pattern': [True]}),
      errors.HeaderError,
    ),
    (
      dict(change={'gemma3.rope.freq_base': float('nan')}),
      errors.HeaderError,
    ),
    (
      dict(
        change={
          'gemma3.rope.scaling.type': 'yarn',
          'gemma3.rope.scaling.factor': 8.0,
        }
      ),
      errors.UnsupportedTypeError,
    ),
    (
      dict(change_tensors={'token_embd.weight': None}),
      errors.MissingTensorError,
    ),
    (
      dict(change_tensors={'blk.1.attn_q.weight': None}),
      errors.MissingTensorError,
    ),
    (
      dict(change_tensors={'blk.1.attn_q.bias': np.zeros(128, np.float32)}),
      errors.UnexpectedTensorError,
    ),
    (
      dict(
        change_tensors={'blk.1.attn_q.weight': np.zeros((64, 128), np.float32)}
      ),
      errors.TensorShapeError,
    ),
    (
      dict(
        change_tensors={
          'blk.1.attn_q.weight': np.full((128, 128), np.nan, np.float32)
        }
      ),
      errors.NonFiniteError,
    ),
    (
      dict(
        change_tensors={'token_embd.weight': np.zeros((4, 4, 4), np.float32)}
      ),
      errors.TensorShapeError,
    ),
  ],
  ids=lambda x: str(x)[:60] if isinstance(x, dict) else None,
)
def test_bad_model(tmp_path, change, error):
  path = _write(tmp_path, **change)
  with pytest.raises(error) as info:
    _gguf.load_gguf(path)
  assert type(info.value) is error


_FREQS = 'rope_freqs.weight'


@pytest.mark.parametrize(
  ('change', 'error'),
  [
    (dict(change_tensors={_FREQS: None}), errors.MissingTensorError),
    (
      dict(change_tensors={_FREQS: np.ones(16, np.float32)}),
      errors.TensorShapeError,
    ),
    (
      dict(change_tensors={_FREQS: np.full(32, 2.0, np.float32)}),
      errors.UnsupportedTypeError,
    ),
    (
      dict(change_tensors={_FREQS: np.ones(1 << 14, np.float32)}),
      errors.TensorShapeError,
    ),
    (
      dict(change={'gemma4.feed_forward_length': [256, 512]}),
      errors.UnsupportedTypeError,
    ),
    (
      dict(change={'gemma4.attention.shared_kv_layers': 99}),
      errors.HeaderTooLargeError,
    ),
    (
      dict(change={'gemma4.attention.sliding_window_pattern': None}),
      errors.MissingTensorError,
    ),
    (
      dict(change={'gemma4.attention.key_length_swa': 0}),
      errors.HeaderError,
    ),
  ],
)
def test_bad_gemma4(tmp_path, change, error):
  path = _write(tmp_path, 'gemma4', **change)
  with pytest.raises(error) as info:
    _gguf.load_gguf(path)
  assert type(info.value) is error


def test_type_that_cannot_be_dequantised(tmp_path):
  model, params = _model_and_params('gemma3')
  path = tmp_path / 'm.gguf'
  fx.write(path, model, params)
  raw = path.read_bytes()
  at = raw.index(b'blk.0.attn_q.weight') + len('blk.0.attn_q.weight')
  at += 4 + 2 * 8  # Past the number of dimensions and both of them.
  path.write_bytes(raw[:at] + int(Q.I32).to_bytes(4, 'little') + raw[at + 4 :])
  with pytest.raises(errors.UnsupportedTypeError, match='I32'):
    _gguf.load_gguf(path)


def test_missing_file(tmp_path):
  with pytest.raises(errors.CheckpointNotFoundError, match='nowhere'):
    _gguf.load_gguf(tmp_path / 'nowhere.gguf')


def test_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
  path = _write(tmp_path)
  monkeypatch.setattr(_gguf.os, 'preadv', lambda *unused: 0)
  with pytest.raises(errors.TruncatedFileError, match='ended while'):
    _gguf.load_gguf(path)


def test_query_scale_that_llama_cpp_knows_by_layers():
  for arch, layers in (('gemma2', 46), ('gemma3', 62)):
    meta = {
      'general.architecture': arch,
      f'{arch}.block_count': layers,
      f'{arch}.embedding_length': 4608 if arch == 'gemma2' else 5376,
      f'{arch}.feed_forward_length': 36864 if arch == 'gemma2' else 21504,
      f'{arch}.attention.head_count': 32,
      f'{arch}.attention.head_count_kv': 16,
      f'{arch}.attention.key_length': 128,
      f'{arch}.attention.sliding_window': 4096,
      f'{arch}.final_logit_softcapping': 30.0,
      f'{arch}.attn_logit_softcapping': 50.0,
    }
    embed = _gguf._gguf_header.TensorInfo(
      name='token_embd.weight',
      shape=(256_000, meta[f'{arch}.embedding_length']),
      kind=Q.F32,
      offset=0,
      nbytes=0,
    )
    hparams = _gguf_hparams.hparams_of(
      _gguf._gguf_header.Header(
        version=3, metadata=meta, tensors={embed.name: embed}
      )
    )
    assert hparams.query_scale == 'embed_per_head'
    if arch == 'gemma2':
      model = _gguf._families.model_from_hparams(hparams)
      assert isinstance(model, gm.nn.Gemma2_27B)
