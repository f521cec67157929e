# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Windows that the teacher rewrites: which tokens, and what it answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext import train
from gemma_ext.train import _rewrite
from tests import tiny

_IDS = np.arange(0, tiny.VOCAB_SIZE, 3, dtype=np.int32)


@pytest.fixture(scope='module')
def dense():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, tiny.VOCAB_SIZE, (16, 64)).astype(np.int32)
  tokens[:, 0] = 2
  tokens[:, 60:] = 0
  return model, params, tokens, _hidden(model, params, tokens)


def _hidden(model, params, tokens):
  out = model.apply(
    {'params': params}, jnp.asarray(tokens), return_hidden_states=True
  )
  return out.hidden_states


def _rewritten(dense, share, seed=0):
  model, params, tokens, final = dense
  table = params['embedder']['input_embedding'][_IDS]
  got, hidden = _rewrite.rewrite(
    params,
    jnp.asarray(tokens),
    final,
    table,
    jnp.asarray(_IDS),
    jax.random.key(seed),
    model=model,
    share=share,
  )
  return np.asarray(got), np.asarray(hidden)


def test_share_of_the_tokens_changes_and_the_frame_stays(dense):
  tokens = dense[2]
  got, _ = _rewritten(dense, 0.3)
  np.testing.assert_array_equal(got[:, 0], tokens[:, 0])
  np.testing.assert_array_equal(got[:, 60:], tokens[:, 60:])
  changed = got != tokens
  # 16 x 59 draws; one of a few is the token that stood there.
  assert 0.22 < changed[:, 1:60].mean() < 0.34
  assert np.isin(got[changed], _IDS).all()
  assert not np.isin(got[changed], (0, 2)).any()
  assert (_rewritten(dense, 0.3, seed=1)[0] != got).any()
  np.testing.assert_array_equal(_rewritten(dense, 0.3)[0], got)


def test_teacher_answers_the_new_window(dense):
  model, params, tokens, final = dense
  got, hidden = _rewritten(dense, 0.5)
  want = np.asarray(_hidden(model, params, got))
  np.testing.assert_allclose(hidden, want, rtol=1e-4, atol=1e-4)
  same, kept = _rewritten(dense, 0.0)
  np.testing.assert_array_equal(same, tokens)
  np.testing.assert_allclose(kept, np.asarray(final), rtol=1e-4, atol=1e-4)


def test_tokens_follow_the_distribution_of_the_place_before(dense):
  model, params, tokens, _ = dense
  one = np.repeat(tokens[:1], 256, axis=0)
  final = _hidden(model, params, one[:1]).repeat(256, axis=0)
  got, _ = _rewritten((model, params, one, final), 1.0)
  table = np.asarray(params['embedder']['input_embedding'][_IDS], np.float64)
  logits = np.asarray(final[0, 10], np.float64) @ table.T
  logits[(_IDS == 0) | (_IDS == 2)] = -np.inf
  p = np.exp(logits - logits.max())
  p /= p.sum()
  # The sample mean of log p under p, against its expectation.
  with np.errstate(divide='ignore'):
    log_p = np.where(p > 0, np.log(np.where(p > 0, p, 1)), 0)
  values = log_p[np.searchsorted(_IDS, got[:, 11])]
  mean = np.sum(p * log_p)
  deviation = np.sqrt(np.sum(p * (log_p - mean) ** 2) / len(values))
  assert abs(values.mean() - mean) < 4 * deviation


@pytest.mark.parametrize('share', [-0.1, 1.5, 'half'])
def test_share_is_checked(share):
  with pytest.raises(errors.ConfigError, match='Distill.rewrite'):
    train.Distill(optimizer=train.Gradient(), rewrite=share)
