# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of filling parameter trees from named tensors."""

import re

from gemma import gm
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext.ckpts import _assemble
from tests import tiny


class Source:
  """Tensors in memory; counts reads."""

  def __init__(self, tensors: dict[str, np.ndarray], norm_offset: float = 0.0):
    self.tensors = tensors
    self.norm_offset = norm_offset
    self.reads: list[tuple[str, int]] = []
    self.used: set[str] = set()

  def has(self, name):
    return name in self.tensors

  def shape(self, name):
    self.used.add(name)
    return self.tensors[name].shape

  def read(self, name, start=0, stop=None):
    rows = self.tensors[name][start:stop]
    self.reads.append((name, rows.nbytes))
    return rows

  def unused(self):
    return sorted(set(self.tensors) - self.used)


def _tensors(params) -> dict[str, np.ndarray]:
  """Canonical tensors of a tiny Gemma 3, written out by hand."""
  p = jax.tree.map(np.asarray, params)
  d = p['embedder']['input_embedding'].shape[1]
  out = {
    'embed': p['embedder']['input_embedding'],
    'final_norm': p['final_norm']['scale'],
  }
  for name in sorted(p):
    if not name.startswith('layer_'):
      continue
    layer, attn, mlp = p[name], p[name]['attn'], p[name]['mlp']
    rows = lambda w: w.transpose(0, 2, 1).reshape(-1, d)
    out |= {
      f'{name}/q': rows(attn['q_einsum']['w']),
      f'{name}/k': rows(attn['kv_einsum']['w'][0]),
      f'{name}/v': rows(attn['kv_einsum']['w'][1]),
      f'{name}/o': attn['attn_vec_einsum']['w'].reshape(-1, d).T,
      f'{name}/q_norm': attn['_query_norm']['scale'],
      f'{name}/k_norm': attn['_key_norm']['scale'],
      f'{name}/gate': mlp['gating_einsum'][0],
      f'{name}/up': mlp['gating_einsum'][1],
      f'{name}/down': mlp['linear'].T,
      f'{name}/pre_attn_norm': layer['pre_attention_norm']['scale'],
      f'{name}/post_attn_norm': layer['post_attention_norm']['scale'],
      f'{name}/pre_ffw_norm': layer['pre_ffw_norm']['scale'],
      f'{name}/post_ffw_norm': layer['post_ffw_norm']['scale'],
    }
  return out


@pytest.fixture(scope='module')
def model():
  return tiny.model('gemma3')


@pytest.fixture(scope='module')
def params(model):
  return tiny.params(model, seed=3)


@pytest.fixture
def tensors(params):
  return _tensors(params)


def _equal(actual, expected):
  flat = jax.tree_util.tree_flatten_with_path
  a, b = flat(actual)[0], flat(expected)[0]
  assert [k for k, _ in a] == [k for k, _ in b]
  for (path, x), (_, y) in zip(a, b):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize('block_bytes', [1, 3000, 16 << 20])
def test_equals_the_params_at_any_block_size(
  model, params, tensors, block_bytes, monkeypatch
):
  monkeypatch.setattr(_assemble, 'BLOCK_BYTES', block_bytes)
  source = Source(tensors)
  out = _assemble.assemble(model, source, dtype=jnp.float32)
  _equal(out, params)
  largest = max(t[0].nbytes for t in tensors.values())
  assert max(n for _, n in source.reads) <= max(block_bytes, largest)


def test_bfloat16_is_rounded_to_nearest(model, params, tensors):
  out = _assemble.assemble(model, Source(tensors))
  _equal(out, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_norm_offset_is_subtracted_from_norms_only(model, params, tensors):
  shifted = {
    k: v + 1 if re.search('norm', k) else v for k, v in tensors.items()
  }
  out = _assemble.assemble(model, Source(shifted, 1.0), dtype=jnp.float32)
  for path, leaf in jax.tree_util.tree_flatten_with_path(out)[0]:
    expected = params
    for key in path:
      expected = expected[key.key]
    atol = 2e-7 if path[-1].key == 'scale' else 0.0
    np.testing.assert_allclose(leaf, expected, rtol=0, atol=atol)


def test_many_heads_and_fused_qkv():
  base = tiny.model('gemma2')
  config = base.config
  heads = type(base)(
    dtype=jnp.float32,
    config=type(config)(**{**vars_of(config), 'num_kv_heads': 4}),
  )
  expected = tiny.params(heads, seed=5)
  p = jax.tree.map(np.asarray, expected)
  out = {
    'embed': p['embedder']['input_embedding'],
    'final_norm': p['final_norm']['scale'],
  }
  for name in ('layer_0', 'layer_1'):
    layer, d = p[name], config.embed_dim
    for i, part in enumerate('qkv'):
      w = layer['attn']['qkv_einsum']['w'][i]
      out[f'{name}/{part}'] = w.transpose(0, 2, 1).reshape(-1, d)
    vec = layer['attn']['attn_vec_einsum']['w']
    out[f'{name}/o'] = vec.reshape(-1, d).T
    out[f'{name}/gate'] = layer['mlp']['gating_einsum'][0].T
    out[f'{name}/up'] = layer['mlp']['gating_einsum'][1].T
    out[f'{name}/down'] = layer['mlp']['linear'].T
    for ours, theirs in (
      ('pre_attn_norm', 'pre_attention_norm'),
      ('post_attn_norm', 'post_attention_norm'),
      ('pre_ffw_norm', 'pre_ffw_norm'),
      ('post_ffw_norm', 'post_ffw_norm'),
    ):
      out[f'{name}/{ours}'] = layer[theirs]['scale']
  _equal(_assemble.assemble(heads, Source(out), dtype=jnp.float32), expected)


def vars_of(config):
  return {k: getattr(config, k) for k in config.__dataclass_fields__}


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize('shape', [(1,), (7, 9), (300, 500)])
def test_cpu_arrays_take_over_the_buffer(shape, dtype):
  host = _assemble.aligned_empty(shape, np.dtype(dtype))
  host[...] = 1
  assert host.ctypes.data % 64 == 0
  array = _assemble.to_device(host)
  assert array.unsafe_buffer_pointer() == host.ctypes.data


def test_tied_output_head_is_tolerated(model, params, tensors):
  rng = np.random.default_rng(0)
  noise = rng.standard_normal(tensors['embed'].shape).astype(np.float32)
  head = tensors['embed'] * (1 + 0.1 * noise)  # Quantised differently.
  out = _assemble.assemble(
    model, Source(tensors | {'output': head}), dtype=jnp.float32
  )
  _equal(out, params)


@pytest.mark.parametrize(
  'head',
  [np.ones((512, 64), np.float32), np.ones((512, 128), np.float32)],
  ids=['shape', 'values'],
)
def test_untied_output_head(model, tensors, head):
  with pytest.raises(errors.UnexpectedTensorError, match='output head'):
    _assemble.assemble(model, Source(tensors | {'output': head}))


def test_missing_tensor_before_any_read(model, tensors):
  del tensors['layer_2/post_ffw_norm']
  source = Source(tensors)
  with pytest.raises(errors.MissingTensorError, match='layer_2/post_ffw_norm'):
    _assemble.assemble(model, source)
  assert not source.reads


def test_wrong_shape_before_any_read(model, tensors):
  tensors['layer_2/down'] = tensors['layer_2/down'].T
  source = Source(tensors)
  with pytest.raises(errors.TensorShapeError, match='layer_2/down'):
    _assemble.assemble(model, source)
  assert not source.reads


def test_unexpected_tensor_before_any_read(model, tensors):
  tensors['layer_3/q'] = tensors['layer_2/q']
  source = Source(tensors)
  with pytest.raises(errors.UnexpectedTensorError, match='layer_3/q'):
    _assemble.assemble(model, source)
  assert not source.reads


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('name', ['embed', 'layer_1/k', 'final_norm'])
def test_non_finite_tensor_is_named(model, tensors, name, value):
  tensors[name] = tensors[name].copy()
  tensors[name].flat[5] = value
  with pytest.raises(errors.NonFiniteError, match=name):
    _assemble.assemble(model, Source(tensors))


def test_value_that_float16_cannot_hold(model, tensors):
  tensors['layer_1/k'] = tensors['layer_1/k'].copy()
  tensors['layer_1/k'][0, 0] = 1e6
  with np.errstate(over='ignore'):
    with pytest.raises(errors.NonFiniteError, match='float16'):
      _assemble.assemble(model, Source(tensors), dtype=jnp.float16)
  out = _assemble.assemble(model, Source(tensors), dtype=jnp.bfloat16)
  w = out['layer_1']['attn']['kv_einsum']['w']
  assert float(w[0, 0, 0, 0]) == pytest.approx(1e6, rel=0.01)


def test_source_with_short_reads(model, tensors):
  class Short(Source):
    def read(self, name, start=0, stop=None):
      return super().read(name, start, stop)[:1]

  with pytest.raises(errors.TensorShapeError, match='hold'):
    _assemble.assemble(model, Short(tensors))


def test_integer_dtype(model, tensors):
  with pytest.raises(errors.UnsupportedTypeError, match='int8'):
    _assemble.assemble(model, Source(tensors), dtype=jnp.int8)


def test_gemma3n(tensors):
  with pytest.raises(errors.UnsupportedTypeError, match='official'):
    _assemble.assemble(tiny.model('gemma3n'), Source(tensors))


def test_model_with_vision_encoder(tensors):
  model = gm.nn.Gemma3_4B()
  with pytest.raises(errors.UnsupportedTypeError, match='text-only'):
    _assemble.assemble(model, Source(tensors))


@pytest.mark.parametrize(
  ('name', 'harmless'),
  [
    ('rope_freqs.weight', True),
    ('model.layers.0.self_attn.rotary_emb.inv_freq', True),
    ('model.vision_tower.encoder.0.weight', True),
    ('v.blk.0.attn_q.weight', True),
    ('mm.input_projection.weight', True),
    ('model.layers.0.self_attn.q_proj.weight', False),
    ('blk.0.attn_q.bias', False),
    ('output.weight', False),
  ],
)
def test_harmless_names(name, harmless):
  assert _assemble.is_harmless(name) == harmless


def test_progress_bar_reaches_the_end(model, tensors, capsys):
  _assemble.assemble(model, Source(tensors), progress=True)
  assert '100%' in capsys.readouterr().err
