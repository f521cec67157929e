# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of peers on tiny models, where the extra `peers` is installed."""

from gemma import gm
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import ckpts
from gemma_ext import data
from gemma_ext import errors
from tests import tiny
from tests.ckpts import gguf_fixtures
from tools.benchmarks import _measure
from tools.benchmarks import _speed
from tools.benchmarks import _suite
from tools.benchmarks.peers import _jax_peers
from tools.benchmarks.peers import _llama_cpp
from tools.benchmarks.peers import _random_gguf
from tools.benchmarks.peers import _requantize

_TOKENS = np.random.default_rng(0).integers(110, 500, 700).astype(np.int32)


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
  return tiny.checkpoint(
    tmp_path_factory.mktemp('peers') / 'dense', one_layer=True
  )


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A model, its parameters, its file in float32, and one in random blocks."""
  pytest.importorskip('xllamacpp')
  folder = tmp_path_factory.mktemp('gguf')
  model = tiny.model('gemma3')
  params = tiny.params(model)
  more = {
    'gemma3.context_length': 2048,
    'gemma3.attention.layer_norm_rms_epsilon': 1e-6,
    'gemma3.attention.value_length': model.config.head_dim,
  }
  gguf_fixtures.write(folder / 'f32.gguf', model, params, change=more)
  _random_gguf.write(folder / 'random.gguf', model.config, folder / 'f32.gguf')
  return folder, model, params


def _cosine(a, b):
  a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
  return a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize('length', [8, 700])
def test_llama_cpp_gives_the_logits_of_the_model(files, length):
  folder, model, params = files
  tokens = np.concatenate([[2], _TOKENS[: length - 1]]).astype(np.int32)
  want = model.apply({'params': params}, jnp.asarray(tokens)[None]).logits[0]
  with _llama_cpp.LlamaCpp(folder / 'f32.gguf') as peer:
    assert peer.window == 512 and peer.vocab_size == tiny.VOCAB_SIZE
    got = peer.logits(tokens).copy()
    # Longer than the default context, which then is larger.
    assert peer.window == (768 if length > 512 else 512)
    last = peer.extend(np.array([7]), length)
    assert np.isfinite(last).all()
    peer.clear()
    np.testing.assert_allclose(peer.extend(tokens, 0), got[-1], atol=1e-3)
  assert got.shape == want.shape
  assert _cosine(got, want) > 0.999


def test_files_of_suites(files):
  folder, model, params = files
  load = lambda **fields: _measure.load(
    _suite.Model(
      name='m', kind='gguf', source=str(folder / 'f32.gguf'), **fields
    ),
    'tokenizer',
  )
  loaded, tokenizer = load()
  assert tokenizer == 'tokenizer' and loaded.model is None
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  # Query and key norms and the like are float32 as well.
  assert loaded.nbytes == 4 * count
  tokens = np.concatenate([[2], _TOKENS[:30]])
  want = loaded.peer.logits(tokens).copy()
  small, _ = load(quantize='Q8_0')
  matrices = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1)
  assert small.nbytes == matrices * 34 // 32 + 4 * (count - matrices)
  assert _cosine(small.peer.logits(tokens), want) > 0.99
  # A program's answers are asked of models of JAX only.
  task = _suite.Task(name='t', kind='choices', options={})
  assert _measure.run(task, loaded, None, [], lambda: None) is None
  for each in (loaded, small):
    _measure.free(each)
    assert each.peer is None


def test_speed_of_a_file(files, monkeypatch):
  monkeypatch.setattr('tools.benchmarks._shapes.TOKENS', (5, 500))
  folder, *_ = files
  with _llama_cpp.LlamaCpp(folder / 'random.gguf') as peer:
    # A prompt beyond the default context, and rounds that go over its end.
    timed = _speed.Peer(peer, 600)
    assert timed.first() > 0 and peer.window == 768
    for _ in range(3):
      assert timed.seconds(100) > 0
    assert timed.seconds(300) > 0 and peer.window == 1024
    assert np.isfinite(peer.logits(np.array([2, 7]))).all()


def test_a_random_file_has_the_types_of_q4_0(files):
  folder, model, _ = files
  found = {
    t.name: t.tensor_type.name
    for t in gguf.GGUFReader(folder / 'random.gguf').tensors
  }
  # Rows of 128 are no block of 256.
  assert found['token_embd.weight'] == 'Q8_0'
  assert found['blk.0.ffn_up.weight'] == 'Q4_0'
  assert found['blk.0.attn_norm.weight'] == 'F32'
  layers = {name.split('.')[1] for name in found if name.startswith('blk.')}
  assert len(layers) == model.config.num_layers
  assert _requantize.tensor_bytes(folder / 'random.gguf') < (
    _requantize.tensor_bytes(folder / 'f32.gguf') / 4
  )


@pytest.mark.parametrize('text', ['none.gguf', 'text.gguf'])
def test_files_that_are_none(files, tmp_path, text):
  (tmp_path / 'text.gguf').write_text('no model')
  with pytest.raises(errors.CheckpointError, match='cannot load'):
    _llama_cpp.LlamaCpp(tmp_path / text)
  if text == 'text.gguf':
    for quantize in ('', 'Q4_0'):
      spec = _suite.Model(
        name='m',
        kind='gguf',
        source=str(tmp_path / text),
        quantize=quantize,
      )
      with pytest.raises(errors.CheckpointError, match='cannot be read'):
        _measure.load(spec, None)


def test_what_qwix_refuses(dense):
  pytest.importorskip('qwix')
  with pytest.raises(errors.ConfigError, match='qwix refuses it: .*100'):
    _jax_peers.load(str(dense), 'qwix int4 g100')


def _sizes(dense):
  flat = jax.tree.leaves(ckpts.load(dense).params)
  matrices = sum(x.size for x in flat if x.ndim > 1)
  return matrices, sum(x.size for x in flat) - matrices


@pytest.mark.parametrize(
  'peer, bits, group, cosine',
  [
    ('qwix int8 g32', 8, 32, 0.9999),
    ('qwix int4 g32', 4, 32, 0.98),
    ('qwix int3 g32', 3, 32, 0.93),
  ],
)
def test_qwix(dense, peer, bits, group, cosine):
  pytest.importorskip('qwix')
  spec = _suite.Model(name='m', kind='checkpoint', source=str(dense), peer=peer)
  loaded, tokenizer = _measure.load(spec, None)
  assert tokenizer is not None and loaded.stands_in
  matrices, vectors = _sizes(dense)
  assert loaded.dense_bytes == 2 * (matrices + vectors)
  # So many bits, a scale of two bytes a group, and norms in bfloat16.
  assert loaded.nbytes == pytest.approx(
    matrices * bits / 8 + 2 * matrices / group + 2 * vectors, rel=0.01
  )
  before = ckpts.load(dense, dtype=jnp.float32).params
  for a, b in zip(
    jax.tree.leaves(before), jax.tree.leaves(loaded.params), strict=True
  ):
    assert a.shape == b.shape and b.dtype == jnp.bfloat16
    if a.ndim > 1:
      assert cosine < _cosine(a, b) < 1 - 1e-6
    else:
      np.testing.assert_allclose(a, b, rtol=0.01)


def test_gptq_of_qwix(dense, monkeypatch):
  pytest.importorskip('qwix')
  pytest.importorskip('gensim')
  monkeypatch.setattr(_jax_peers, '_TOKENS', 600)
  load = lambda peer: _jax_peers.load(str(dense), peer)
  found, model, params, nbytes = load('qwix gptq int4 g32')
  _, _, plain, plain_bytes = load('qwix int4 g32')
  assert nbytes == plain_bytes
  # The table is rounded to the nearest code by both.
  table = ('embedder', 'input_embedding')
  for path, same in ((table, True), (('layer_0', 'mlp', 'linear'), False)):
    a, b = params, plain
    for key in path:
      a, b = a[key], b[key]
    assert np.array_equal(a, b) == same
  # On text it is nearer to the dense model than the nearest codes are.
  text = data.split(tuple(data.load_documents('sample'))).calibration.documents
  rows = data.windows(found.tokenizer, text, length=512, max_tokens=600).tokens
  run = jax.jit(lambda params: model.apply({'params': params}, rows[:1]).logits)
  want = run(found.params)
  error = lambda params: float(jnp.sum((run(params) - want) ** 2))
  mixed = plain | {'layer_0': params['layer_0']}
  assert error(mixed) < error(plain)


@pytest.mark.parametrize('bits', [4, 8])
def test_the_official_wrapper(dense, bits):
  spec = _suite.Model(
    name='m',
    kind='checkpoint',
    source=str(dense),
    peer=f'IntWrapper int{bits}',
  )
  loaded, _ = _measure.load(spec, None)
  assert isinstance(loaded.model, gm.nn.IntWrapper) and not loaded.stands_in
  found = ckpts.load(dense, dtype=jnp.bfloat16)
  tokens = jnp.asarray(_TOKENS[None, :16])
  want = found.model.apply({'params': found.params}, tokens).logits
  got = loaded.model.apply({'params': loaded.params}, tokens).logits
  assert (0.9 if bits == 4 else 0.999) < _cosine(got, want) < 1
  # The table of embeddings stays as it is.
  table = 2 * found.params['embedder']['input_embedding'].size
  rest = loaded.nbytes - table
  assert rest == pytest.approx(
    (loaded.dense_bytes - table) * bits / 16, rel=0.1
  )


def test_peers_take_dense_checkpoints(dense, tmp_path):
  found = ckpts.load(dense)
  params = gx.compress(found.model, found.params, 'int8')
  ckpts.save(
    tmp_path / 'int8',
    model=found.model,
    params=params,
    tokenizer=found.tokenizer,
    recipe=gx.Recipe.of('int8', num_layers=1),
  )
  with pytest.raises(errors.ConfigError, match='compressed already'):
    _jax_peers.load(str(tmp_path / 'int8'), 'IntWrapper int8')
  for text in ('qwix int9', 'IntWrapper int3', 'qwix gptq int3'):
    with pytest.raises(errors.ConfigError, match='peer: '):
      _jax_peers.check(text)
