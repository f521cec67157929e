# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The real Gemma 3 270M: class, tokens, perplexity and peak memory."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from gemma_ext.ckpts import _sample

_REAL = textwrap.dedent("""
    import json, resource, sys, threading
    import jax, jax.numpy as jnp, numpy as np
    from gemma_ext import errors
    from gemma_ext.ckpts import _gguf, _sample

    def status(key):
      for line in open('/proc/self/status'):
        if line.startswith(key):
          return int(line.split()[1]) * 1024

    jnp.zeros(4).block_until_ready()
    path = _sample.sample_path()
    # Warm what is built once and belongs to no checkpoint.
    with open(path, 'rb', buffering=0) as f:
      header = _gguf._gguf_header.read_header(f)
      source = _gguf.GgufSource(f, header)
    model = _gguf._families.model_from_hparams(source.hparams)
    tokenizer = _gguf._vocab.tokenizer_of(
        header.metadata, _gguf._families.tokenizer_class(model),
        max_tokens=262144)
    _gguf._assemble.expected_params(model)
    del header, source, tokenizer
    before = status('VmRSS')
    open('/proc/self/clear_refs', 'w').write('5')  # Resets the peak.
    model, params, tokenizer = _gguf.load_gguf(path)
    peak = status('VmHWM')
    leaves = jax.tree.leaves(params)
    layers = [sum(x.nbytes for x in jax.tree.leaves(v))
              for k, v in params.items() if k.startswith('layer_')]
    text = ('The Amazon rainforest, also called Amazon jungle, is a moist '
            'broadleaf tropical rainforest in the Amazon biome that covers '
            'most of the Amazon basin of South America. This basin '
            'encompasses 7,000,000 square kilometres, of which 5,500,000 '
            'are covered by the rainforest. This region includes territory '
            'belonging to nine nations. ') * 1
    ids = tokenizer.encode(text, add_bos=True)
    tokens = jnp.asarray([int(i) for i in ids])[None]
    logits = model.apply({'params': params}, tokens).logits[0, :-1]
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -jnp.take_along_axis(logp, tokens[0, 1:, None], -1).mean()
    print(json.dumps({
        'class': type(model).__name__,
        'result': sum(x.nbytes for x in leaves),
        'layer': max(layers),
        'growth': peak - before,
        'perplexity': float(jnp.exp(nll)),
        'tokens': [int(i) for i in ids],
        'chat': [int(i) for i in tokenizer.encode(
            '<start_of_turn>user\\nHello  world!<end_of_turn>')],
        'leaves': len(leaves),
    }))
""")
# Blocks in the file's form and dequantised, less what the allocator had kept.
_READING = 32 << 20


@pytest.fixture(scope='module')
def real(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cache')
  env = os.environ | {
    'GEMMA_EXT_CACHE': str(folder),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',
    'PYTHONPATH': os.getcwd(),
  }
  out = subprocess.run(
    [sys.executable, '-c', _REAL],
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert out.returncode == 0, out.stderr[-3000:]
  return json.loads(out.stdout.splitlines()[-1])


def test_real_file_is_gemma3_270m(real):
  assert real['class'] == 'Gemma3_270M'
  assert real['leaves'] == 2 + 18 * 11
  assert real['result'] == 2 * 268_098_176


def test_real_file_predicts_english(real):
  assert 1.5 < real['perplexity'] < 30.0


def test_real_file_tokenises_as_llama_cpp_does(real):
  assert real['tokens'][:6] == [2, 818, 9593, 71593, 236764, 992]
  assert real['chat'] == [105, 2364, 107, 9259, 138, 12392, 236888, 106]


def test_real_file_takes_the_result_and_two_layers(real):
  print({k: v for k, v in real.items() if isinstance(v, int)})
  assert real['growth'] <= real['result'] + 2 * real['layer'] + _READING


def test_real_file_is_not_hashed_again(tmp_path, monkeypatch):
  monkeypatch.setenv('GEMMA_EXT_CACHE', str(tmp_path))
  path = _sample.sample_path()
  assert path.stat().st_size == 253_113_024
  monkeypatch.setattr(_sample.hashlib, 'sha256', None)
  assert _sample.sample_path() == path
