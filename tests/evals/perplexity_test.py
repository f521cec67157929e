# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of perplexity against a slow float64 reference."""

import dataclasses

from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import data
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext.evals import _perplexity
from tests import tiny

_TEXTS = (
  'The capital of France is Paris. ' * 6,
  'A river.',
)


def _windows(model, **kwargs):
  tokenizer = tiny.tokenizer(model.INFO.tokenizer_version)
  documents = [
    data.Document(text=t, id=f'd{i}', source='t') for i, t in enumerate(_TEXTS)
  ]
  return data.windows(tokenizer, documents, **kwargs)


def _reference(model, params, windows):
  """float64 sums per window, each window alone and without padding."""
  sums = []
  for tokens, mask in zip(windows.tokens, windows.score_mask, strict=True):
    tokens = tokens[tokens != 0]
    logits = model.apply({'params': params}, jnp.asarray(tokens)[None]).logits
    logits = np.asarray(logits[0], np.float64)
    peak = logits.max(-1, keepdims=True)
    log_p = logits - peak
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    nll = -log_p[np.arange(len(tokens) - 1), tokens[1:]]
    sums.append(nll[mask[1 : len(tokens)]].sum())
  return np.array(sums)


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_equals_float64_reference(family):
  model = tiny.model(family)
  params = tiny.params(model)
  # Full, padded and overlapping windows, and a last batch that is not full.
  windows = _windows(model, length=33, stride=20)
  assert len(windows) % 3 and (windows.tokens == 0).any()
  result = evals.perplexity(model, params, windows, batch_size=3)
  expected = _reference(model, params, windows)
  np.testing.assert_allclose(result.window_nll, expected, rtol=1e-4)
  assert result.perplexity == pytest.approx(
    np.exp(expected.sum() / windows.num_scored), rel=1e-4
  )
  # A random model is worse than one that knows nothing.
  assert tiny.VOCAB_SIZE * 0.8 < result.perplexity < tiny.VOCAB_SIZE * 3


@pytest.mark.parametrize('batch_size, chunk', [(1, 64), (2, 7), (7, 1000)])
def test_batches_and_chunks_do_not_matter(batch_size, chunk, monkeypatch):
  model = tiny.model('gemma3')
  params = tiny.params(model)
  windows = _windows(model, length=24)
  base = evals.perplexity(model, params, windows)
  monkeypatch.setattr(_perplexity, '_CHUNK', chunk)
  # A new name for the same function, since the chunk is baked in by tracing.
  monkeypatch.setattr(
    _perplexity,
    '_batch_nll',
    jax.jit(_perplexity._batch_nll.__wrapped__, static_argnames='model'),
  )
  other = evals.perplexity(model, params, windows, batch_size=batch_size)
  np.testing.assert_allclose(other.window_nll, base.window_nll, rtol=1e-5)
  assert other.window_tokens.tolist() == base.window_tokens.tolist()


def test_compiles_once():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  windows = _windows(model, length=19)
  before = _perplexity._batch_nll._cache_size()
  for _ in range(2):
    evals.perplexity(model, params, windows, batch_size=4)
  assert len(windows) % 4
  assert _perplexity._batch_nll._cache_size() == before + 1


def test_lora_wrapper():
  model = tiny.model('gemma3')
  lora = gm.nn.LoRA(rank=2, model=model)
  params = tiny.params(model)
  tokens = jnp.ones((1, 4), jnp.int32)
  shapes = jax.eval_shape(lora.init, jax.random.key(0), tokens)['params']
  # Adapters that are zero change nothing.
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def merge(base, extra):
    return {
      k: merge(base.get(k, {}), v) if isinstance(v, dict) else base.get(k, v)
      for k, v in extra.items()
    }

  windows = _windows(model, length=24)
  result = evals.perplexity(lora, merge(params, zeros), windows)
  base = evals.perplexity(model, params, windows)
  np.testing.assert_allclose(result.window_nll, base.window_nll, rtol=1e-5)


def test_result_of_bf16_model_is_close():
  windows = _windows(tiny.model('gemma3'), length=24)
  model = tiny.model('gemma3')
  base = evals.perplexity(model, tiny.params(model), windows)
  small = tiny.model('gemma3', dtype=jnp.bfloat16)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params(model))
  result = evals.perplexity(small, params, windows)
  assert result.window_nll.dtype == np.float64
  assert result.perplexity == pytest.approx(base.perplexity, rel=0.02)
  assert result.perplexity != base.perplexity


def test_progress_goes_to_stderr(capsys):
  model = tiny.model('gemma3')
  windows = _windows(model, length=24)
  evals.perplexity(model, tiny.params(model), windows, progress=True)
  captured = capsys.readouterr()
  assert 'perplexity' in captured.err
  assert not captured.out


def test_nan_weights_are_named():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  norm = params['final_norm']['scale']
  params['final_norm']['scale'] = norm.at[0].set(jnp.nan)
  with pytest.raises(
    errors.NonFiniteError, match=r"token 1 of window 0 \(document 'd0'\)"
  ):
    evals.perplexity(model, params, _windows(model, length=24))


def test_token_beyond_the_vocabulary():
  model = tiny.model('gemma3')
  windows = _windows(model, length=24)
  tokens = windows.tokens.copy()
  tokens[0, 1] = tiny.VOCAB_SIZE
  windows = dataclasses.replace(windows, tokens=tokens)
  lora = gm.nn.LoRA(rank=2, model=model)
  for m in (model, lora):
    with pytest.raises(errors.DataError, match='id 512, but the model knows'):
      evals.perplexity(m, {}, windows)


def test_batch_size_below_one():
  model = tiny.model('gemma3')
  with pytest.raises(errors.DataError, match='batch_size of at least 1'):
    evals.perplexity(model, {}, _windows(model), batch_size=0)
