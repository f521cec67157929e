# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding chooses what decoding one by one would choose."""

from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.text import _rejection
from tests import tiny

_PROMPT = 'The river is'
_RECIPE = gx.Recipe.of(
  {
    r'layer_\d+/mlp2?': gx.Ternary(group=64, planes=2),
    'embedder/input_embedding': gx.Int(bits=8),
  }
)
_DRAFTS = {
  'planes': gx.text.Draft(planes=1),
  'layers': gx.text.Draft(layers=1),
  'head_rows': gx.text.Draft(head_rows=64),
  'all': gx.text.Draft(planes=1, layers=slice(None, None, 2), head_rows=300),
}
_VOCAB = 12


def _checkpoint(family='gemma3', recipe=_RECIPE):
  model = tiny.model(family)
  params = tiny.params(model)
  tokenizer = tiny.tokenizer(model.INFO.tokenizer_version)
  if recipe is None:
    return model, params, tokenizer
  params = gx.compress(model, params, recipe)
  return gx.nn.Compressed(model=model, recipe=recipe), params, tokenizer


def _tokens(checkpoint, **kwargs):
  stream = gx.text.stream(checkpoint, _PROMPT, **kwargs)
  text = ''.join(stream)
  return stream, text


@pytest.mark.parametrize(
  ('draft', 'count', 'tokens'),
  [*((draft, 40, 4) for draft in _DRAFTS), ('planes', 17, 2)],
)
def test_greedy_is_exact(draft, count, tokens):
  checkpoint = _checkpoint()
  plain, text = _tokens(checkpoint, max_new_tokens=count)
  got, again = _tokens(
    checkpoint,
    max_new_tokens=count,
    speculative=gx.text.Speculative(draft=_DRAFTS[draft], tokens=tokens),
  )
  assert got.tokens == plain.tokens and again == text
  assert got.ended == plain.ended
  assert len(got.tokens) - got.rounds <= got.accepted <= len(got.tokens)
  assert 0 <= got.acceptance <= 1
  assert got.tokens_per_round == len(got.tokens) / got.rounds
  assert plain.acceptance is None and plain.rounds == len(plain.tokens)


@pytest.mark.parametrize('family', ['gemma2', 'gemma3n', 'gemma4'])
def test_other_families(family):
  checkpoint = _checkpoint(family, recipe=None)
  plain, _ = _tokens(checkpoint, max_new_tokens=20)
  speculative = gx.text.Speculative(draft=gx.text.Draft(head_rows=256))
  got, _ = _tokens(checkpoint, max_new_tokens=20, speculative=speculative)
  assert got.tokens == plain.tokens
  assert got.rounds <= len(got.tokens)


def test_a_draft_that_is_nearly_the_model_saves_rounds():
  checkpoint = _checkpoint()
  speculative = gx.text.Speculative(
    draft=gx.text.Draft(head_rows=tiny.VOCAB_SIZE - 1), tokens=4
  )
  got, _ = _tokens(checkpoint, max_new_tokens=40, speculative=speculative)
  # All drafts are taken but where the last token is the likeliest.
  assert got.rounds <= 12
  assert got.acceptance > 0.8


def test_ends_at_a_stop_token():
  checkpoint = _checkpoint()
  plain, _ = _tokens(checkpoint, max_new_tokens=24)
  stop = plain.tokens[13]
  kwargs = {'max_new_tokens': 24, 'stop_tokens': [stop]}
  want, text = _tokens(checkpoint, **kwargs)
  speculative = gx.text.Speculative(draft=_DRAFTS['head_rows'], tokens=5)
  got, again = _tokens(checkpoint, speculative=speculative, **kwargs)
  assert want.ended and got.ended
  assert got.tokens == want.tokens and again == text


_SAMPLINGS = [
  gm.text.Greedy(),
  gm.text.RandomSampling(temperature=0.7),
  gm.text.TopkSampling(k=4, temperature=1.3),
  gm.text.TopPSampling(p=0.8, temperature=0.9),
  gm.text.TopPSampling(p=1.0),
]


@pytest.mark.parametrize('sampling', _SAMPLINGS, ids=str)
def test_log_probs_are_those_of_the_official_method(sampling):
  """Its draws fit them, by a chi-square test; nothing else is drawn."""
  logits = jax.random.normal(jax.random.key(0), (_VOCAB,)) * 2
  p = np.exp(np.asarray(_rejection.log_probs(sampling, logits), np.float64))
  assert abs(p.sum() - 1) < 1e-5
  count = 20_000
  draw = jax.jit(
    jax.vmap(lambda key: sampling.get_next_tokens(logits[None], key)[0])
  )
  found = np.bincount(
    draw(jax.random.split(jax.random.key(1), count)), minlength=_VOCAB
  )
  assert not found[p < 1e-9].any()
  possible = p >= 1e-9
  if possible.sum() > 1:
    expected = count * p[possible] / p[possible].sum()
    assert scipy.stats.chisquare(found[possible], expected).pvalue > 1e-3


def _verified(log_p, log_q, count, samples, seed=0):
  """`count` + 1 tokens a sample, as a round and the ones after it choose them.

  Drafts do not depend on earlier tokens here, so that the tokens of a sample
  are independent and follow p of their place.
  """

  def sample(key):
    drafting, deciding, choosing, going_on = jax.random.split(key, 4)
    drafts = jax.random.categorical(drafting, log_q)
    taken, rest = _rejection.verify(
      log_p, log_q, drafts, jax.random.uniform(deciding, (count,))
    )
    last = jax.random.categorical(choosing, rest)
    after = jax.random.categorical(going_on, log_p)
    places = jnp.arange(count + 1)
    drafts = jnp.append(drafts, 0)
    new = jnp.where(places == taken, last, after)
    return jnp.where(places < taken, drafts, new), taken

  keys = jax.random.split(jax.random.key(seed), samples)
  tokens, taken = jax.jit(jax.vmap(sample))(keys)
  return np.asarray(tokens), np.asarray(taken)


@pytest.mark.parametrize('rows', [_VOCAB, 7])
@pytest.mark.parametrize('far', [0.0, 0.5, 3.0])
def test_verified_tokens_follow_the_model(rows, far):
  """Chi-square of each place, whatever the draft: far from it, or short."""
  count, samples = 3, 40_000
  rng = np.random.default_rng(0)
  p = rng.standard_normal((count + 1, _VOCAB)) * 1.5
  q = p[:count, :rows] + far * rng.standard_normal((count, rows))
  log_p = jax.nn.log_softmax(jnp.asarray(p, jnp.float32))
  log_q = jax.nn.log_softmax(jnp.asarray(q, jnp.float32))
  tokens, taken = _verified(log_p, log_q, count, samples)
  values = []
  for place in range(count + 1):
    found = np.bincount(tokens[:, place], minlength=_VOCAB)
    expected = np.exp(np.asarray(log_p[place], np.float64))
    expected *= samples / expected.sum()
    values.append(scipy.stats.chisquare(found, expected).pvalue)
  assert min(values) > 1e-3, values
  # The share of first drafts that is taken is the overlap of p and q.
  overlap = np.exp(np.asarray(log_p[0]))[:rows]
  overlap = np.minimum(overlap, np.exp(np.asarray(log_q[0]))).sum()
  assert abs((taken > 0).mean() - overlap) < 4 * 0.5 / samples**0.5


def test_the_test_sees_a_wrong_rule():
  """Without the correction of what comes after a refusal, it fails."""
  samples = 40_000
  rng = np.random.default_rng(0)
  log_p, log_q = jax.nn.log_softmax(
    jnp.asarray(rng.standard_normal((2, _VOCAB)) * 1.5, jnp.float32)
  )
  keys = jax.random.split(jax.random.key(0), (3, samples))
  drafts = jax.random.categorical(keys[0][0], log_q, shape=(samples,))
  uniform = jax.random.uniform(keys[1][0], (samples,))
  taken = jnp.log(uniform) < (log_p - log_q)[drafts]
  other = jax.random.categorical(keys[2][0], log_p, shape=(samples,))
  found = np.bincount(jnp.where(taken, drafts, other), minlength=_VOCAB)
  expected = np.exp(np.asarray(log_p, np.float64))
  expected *= samples / expected.sum()
  assert scipy.stats.chisquare(found, expected).pvalue < 1e-6


def test_sampled_text_follows_the_model():
  """Tokens of many texts, with and without speculation, fit together."""
  checkpoint = _checkpoint()
  speculative = gx.text.Speculative(draft=_DRAFTS['planes'], tokens=2)
  sampling = gm.text.TopkSampling(k=3)

  def second(seed, **kwargs):
    stream, _ = _tokens(
      checkpoint, max_new_tokens=3, sampling=sampling, seed=seed, **kwargs
    )
    return stream.tokens[1]

  plain = [second(seed) for seed in range(120)]
  found = [second(1000 + i, speculative=speculative) for i in range(120)]
  table = np.stack(
    [np.bincount(t, minlength=tiny.VOCAB_SIZE) for t in (plain, found)]
  )
  often = table.sum(0) >= 10
  rare = table[:, ~often].sum(1, keepdims=True)
  groups = np.concatenate([table[:, often], rare], axis=1)
  groups = groups[:, groups.sum(0) > 0]
  assert groups.shape[1] > 3
  assert scipy.stats.chi2_contingency(groups).pvalue > 1e-3


def test_parse():
  parse = gx.text.Speculative.parse
  assert parse('planes=1') == gx.text.Speculative(draft=_DRAFTS['planes'])
  assert parse('layers=::2,head_rows=300,planes=1,tokens=7') == (
    gx.text.Speculative(draft=_DRAFTS['all'], tokens=7)
  )
  assert parse('layers=2:9').draft.kept(18) == tuple(range(2, 9))
  for bad in ('', 'planes', 'planes=x', 'planes=1,planes=2', 'tokens=3', 'x=1'):
    with pytest.raises(errors.SamplingError):
      parse(bad)
  with pytest.raises(errors.SamplingError, match='1, 64'):
    parse('planes=1,tokens=65')


class _Mine(gm.text.Greedy):
  """May choose in any way."""


@pytest.mark.parametrize(
  'draft, message',
  [
    ({'planes': 2}, '1 or more, and fewer'),
    ({'layers': 3}, 'not all'),
    ({'layers': (1, 7)}, 'ascending'),
    ({'head_rows': 512}, '1 to 511'),
  ],
)
def test_a_draft_that_the_model_does_not_have(draft, message):
  speculative = gx.text.Speculative(draft=gx.text.Draft(**draft))
  with pytest.raises(errors.SamplingError, match=message):
    gx.text.stream(_checkpoint(), _PROMPT, speculative=speculative)


def test_wrong_arguments():
  for bad in ({}, {'planes': 0}, {'layers': ()}, {'layers': (2, 1)}):
    with pytest.raises(errors.SamplingError):
      gx.text.Draft(**bad)
  with pytest.raises(errors.SamplingError, match='a `gx.text.Draft`'):
    gx.text.Speculative(draft=3)
  speculative = gx.text.Speculative(draft=_DRAFTS['planes'])
  with pytest.raises(errors.SamplingError, match='how likely'):
    gx.text.stream(
      _checkpoint(), _PROMPT, sampling=_Mine(), speculative=speculative
    )
  with pytest.raises(errors.SamplingError, match='at most 1'):
    gx.text.stream(
      _checkpoint(recipe=gx.Recipe.of('tssn')),
      _PROMPT,
      speculative=speculative,
    )
