# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of second-order statistics: exact where they are, else measured."""

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.compress import _statistics
from tests import tiny

_TABLE = 'embedder/input_embedding'


def _tokens(batch=4, length=48):
  tokens = np.random.default_rng(0).integers(5, 500, (batch, length))
  tokens[:, 0] = 2
  return tokens.astype(np.int32)


@pytest.mark.parametrize('family', ['gemma2', 'gemma3', 'gemma4'])
def test_the_diagonal_is_that_of_second_moments(family):
  model = tiny.model(family)
  params = tiny.params(model)
  found = gx.compress.statistics(model, params, _tokens(), random_share=0)
  want = gx.compress.second_moments(model, params, _tokens())
  assert found.tokens == 4 * 47
  assert set(want) <= set(found.inputs)
  for path, moment in want.items():
    np.testing.assert_allclose(
      np.diagonal(found.inputs[path]), moment, rtol=2e-3, atol=1e-6
    )
    rows = next(s for s in gx.nn.sites(model) if s.path == path).layout.rows
    assert found.outputs[path].shape == (int(np.prod(rows)),)
    assert np.all(found.outputs[path] >= 0)


@pytest.mark.parametrize('family', ['gemma3', 'gemma4_moe'])
def test_of_a_single_token_it_is_the_squared_gradient(family):
  model = tiny.model(family)
  params = tiny.params(model)
  tokens = jnp.array([[7]])
  found = gx.compress.statistics(model, params, tokens, seed=3, random_share=0)
  logits = model.apply({'params': params}, tokens).logits.astype(jnp.float32)
  label = jax.random.categorical(jax.random.key(3), logits)[0, 0]

  def loss(params):
    logits = model.apply({'params': params}, tokens).logits
    return jax.nn.log_softmax(logits.astype(jnp.float32))[0, 0, label]

  grads = traverse_util.flatten_dict(jax.grad(loss)(params), sep='/')
  for site in gx.nn.sites(model):
    if site.path == _TABLE:
      continue
    assert site.path in found.inputs
    fisher, hessian = found.outputs[site.path], found.inputs[site.path]
    got = np.outer(fisher, np.diagonal(hessian))
    want = np.asarray(site.layout.to_rows(grads[site.path])) ** 2
    if site.path.endswith('mlp/linear/w'):
      # Of the experts that ran one H, the mean of theirs.
      experts = fisher.reshape(len(want), -1).sum(axis=1)
      ran = np.flatnonzero(experts)
      assert len(ran) == model.config.top_k_experts
      norms = want[ran].sum(axis=(1, 2)) / experts[ran]
      np.testing.assert_allclose(np.trace(hessian), norms.mean(), rtol=2e-3)
      continue
    np.testing.assert_allclose(
      got, want.reshape(got.shape), rtol=2e-3, atol=1e-3 * want.max()
    )
  p = jax.nn.softmax(logits[0, 0])
  np.testing.assert_allclose(found.outputs[_TABLE], p * (1 - p), rtol=1e-4)
  assert found.expected.argmax() == 7
  assert found.expected.sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize('family', ['gemma3', 'gemma4_moe'])
def test_predicts_what_errors_cost(family):
  """Noise in one weight at a time, predicted against measured divergence."""
  model = tiny.model(family)
  params = tiny.params(model)
  tokens = _tokens(8)
  found = gx.compress.statistics(model, params, tokens)
  flat = traverse_util.flatten_dict(params, sep='/')
  predicted, measured = [], []
  for i, site in enumerate(gx.nn.sites(model)):
    if 'router' in site.path:
      # Where a choice jumps there is no second order; and no allocation.
      continue
    w = flat[site.path]
    # Different sizes, so that there is something to predict.
    size = 0.05 * (1 + i % 3) * float(jnp.std(w))
    noise = size * jax.random.normal(jax.random.key(i), w.shape, w.dtype)
    changed = traverse_util.unflatten_dict(
      flat | {site.path: w + noise}, sep='/'
    )
    rows = site.layout.to_rows(noise).reshape(-1, site.layout.cols)
    predicted.append(float(jnp.sum(found.loss(site.path, rows))))
    measured.append(
      gx.compress.divergence(model, params, model, changed, tokens)
    )
  ratio = np.array(measured) / np.array(predicted)
  assert 0.5 < np.exp(np.mean(np.log(ratio))) < 2, ratio
  assert np.all((ratio > 0.2) & (ratio < 5)), ratio
  assert scipy.stats.spearmanr(predicted, measured).statistic > 0.9


def test_rows_of_a_table_are_those_of_the_whole():
  model = tiny.model('gemma3')
  found = gx.compress.statistics(model, tiny.params(model), _tokens())
  error = np.random.default_rng(0).standard_normal((512, 128))
  whole = found.loss(_TABLE, jnp.asarray(error, jnp.float32))
  part = found.loss(
    _TABLE, jnp.asarray(error[40:90], jnp.float32), np.arange(40, 90)
  )
  np.testing.assert_allclose(part, whole[40:90], rtol=1e-4)
  # What never came counts as well, if less.
  seen = np.isin(np.arange(tiny.VOCAB_SIZE), _tokens())
  assert whole[~seen].min() > 0
  assert np.mean(whole[seen]) > 2 * np.mean(whole[~seen])


def test_divergence_of_a_model_from_itself_is_zero():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  got = gx.compress.divergence(model, params, model, params, _tokens())
  assert abs(got) < 1e-6


def test_divergence_is_that_of_float32():
  model = tiny.model('gemma3', dtype=jnp.bfloat16)
  params = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16), tiny.params(tiny.model('gemma3'))
  )
  recipe = gx.Recipe.of({'.*': gx.Int(bits=8, group=32)})
  packed = gx.compress(model, params, recipe)
  other = gx.nn.Compressed(model=model, recipe=recipe)
  tokens = _tokens(2)
  got = gx.compress.divergence(model, params, other, packed, tokens)
  # The same numbers in a model that computes in float32.
  wide = tiny.model('gemma3')
  dense = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  again = gx.nn.Compressed(model=wide, recipe=recipe)
  want = 0.0
  for row in tokens:
    p, q = (
      jax.nn.log_softmax(m.apply({'params': v}, row[None]).logits[0])
      for m, v in ((wide, dense), (again, packed))
    )
    want += float(jnp.sum((jnp.exp(p) * (p - q))[1:])) / 94
  assert got == pytest.approx(want, rel=0.05)


def test_bad_input_is_an_error():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  for tokens in (np.zeros((2, 4), np.int32), np.zeros((0, 4), np.int32)):
    with pytest.raises(errors.ShapeError, match='Calibration tokens'):
      gx.compress.statistics(model, params, tokens)
  found = gx.compress.statistics(model, params, _tokens())
  with pytest.raises(errors.ShapeError, match="'layer_9/x'"):
    found.loss('layer_9/x', jnp.zeros((1, 1)))


def test_more_text_is_counted():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  tokens = np.array([[2, 7, 7, 9]])
  alone = gx.compress.statistics(model, params, tokens)
  more = np.array([[2, 9, 9, 9, 11, 0]])
  both = gx.compress.statistics(model, params, tokens, counted=more)
  assert alone.expected.argmax() == 7 and both.expected.argmax() == 9
  assert both.expected[11] > 3 * alone.expected[11]
  assert both.importance(_TABLE)[11] > 2 * alone.importance(_TABLE)[11]
  for path in alone.outputs:
    np.testing.assert_array_equal(alone.outputs[path], both.outputs[path])
  with pytest.raises(errors.ShapeError, match='counted holds tokens'):
    gx.compress.statistics(
      model, params, tokens, counted=np.array([[3, tiny.VOCAB_SIZE]])
    )


def test_looked_up_rows_are_as_steep_as_those_of_like_tokens():
  rng = np.random.default_rng(0)
  counts = 1.0 / np.arange(1, 4001)
  seen = rng.poisson(3000 * counts / counts.sum()).astype(float)
  truth = counts**-0.3
  squares = np.array(
    [truth[v] * rng.exponential(1.0, int(n)).sum() for v, n in enumerate(seen)]
  )
  got = _statistics._steepness(squares, seen, counts / counts.sum())
  want = truth * seen.sum() / squares.sum()
  # Where tokens were seen; beyond, as the rarest of those.
  known = seen > 2
  assert np.abs(np.log(got[known] / want[known])).mean() < 0.25
  assert got[-500:].std() / got[-500:].mean() < 0.1
  assert got[0] < 0.3 * got[-1]
  # The mean over what was seen is one.
  assert (got * seen).sum() / seen.sum() == pytest.approx(1, abs=0.2)
  few = _statistics._steepness(squares[:3], np.ones(3), np.ones(3))
  np.testing.assert_array_equal(few, 1)


def test_gradients_of_looked_up_rows_are_those_of_their_tokens():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  tokens = np.array([[7, 9, 7, 11]])
  found = gx.compress.statistics(model, params, tokens)
  assert found.steepness.shape == found.expected.shape
  # With so few there is nothing to tell them apart by.
  np.testing.assert_array_equal(found.steepness, 1)
  hidden = found.varied
  assert np.linalg.eigvalsh(hidden).min() > -1e-3 * np.trace(hidden)
  np.testing.assert_allclose(found.slopes(_TABLE), hidden)
  assert found.slopes('layer_0/mlp/linear') is None


def test_rows_of_a_table_have_an_input_of_their_own():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  found = gx.compress.statistics(model, params, _tokens(8))
  rows = np.array([5, 6, 40])
  some = found.hessian(_TABLE, rows)
  error = jnp.asarray(np.random.default_rng(0).standard_normal(128))
  # Of as many rows alike: half of its form is what they lose in all.
  loss = found.loss(_TABLE, jnp.tile(error, (3, 1)), rows)
  assert float(loss.sum()) == pytest.approx(
    0.5 * float(error @ some @ error), rel=1e-3
  )
  np.testing.assert_array_equal(found.hessian(_TABLE), found.inputs[_TABLE])


def test_random_tokens_have_a_share():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  tokens = np.full((2, 20), 7)
  text, half = (
    gx.compress.statistics(model, params, tokens, random_share=share)
    for share in (0, 0.5)
  )
  for path in text.inputs:
    if path == _TABLE:
      continue
    was, now = text.inputs[path], half.inputs[path]
    # As large as before, and of more directions.
    np.testing.assert_allclose(np.trace(now), np.trace(was), rtol=1e-4)
    rank = lambda x: np.trace(x) ** 2 / np.sum(x * x)
    assert rank(now) > 1.5 * rank(was)
    assert np.linalg.eigvalsh(now - 0.5 * was).min() > -1e-4 * np.trace(was)
    np.testing.assert_array_equal(text.outputs[path], half.outputs[path])
  np.testing.assert_array_equal(text.slopes(_TABLE), half.slopes(_TABLE))
  np.testing.assert_array_equal(text.expected, half.expected)
  with pytest.raises(errors.ShapeError, match='random_share=1'):
    gx.compress.statistics(model, params, tokens, random_share=1)


def test_fingerprints_are_of_what_statistics_are_computed_of():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  more = _tokens(3)[2:] % 40 + 5
  changes = ({}, {'random_share': 0}, {'counted': more}, {'seed': 1})
  marks = [gx.compress.text_fingerprint(_tokens(2), **c) for c in changes]
  marks.append(gx.compress.text_fingerprint(_tokens(3)))
  assert len({*marks}) == 5
  found = gx.compress.statistics(model, params, _tokens(2), counted=more)
  assert found.text == marks[2]
  with pytest.raises(errors.ShapeError):
    gx.compress.text_fingerprint(np.zeros((0, 3), int))
