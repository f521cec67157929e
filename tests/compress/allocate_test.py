# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of sensitivities and of the choice under a budget."""

import dataclasses
import itertools
import json
import math

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.compress import _fingerprint
from gemma_ext.compress import _sensitivity
from gemma_ext.compress import _weight
from tests import tiny

_TABLE = 'embedder/input_embedding'
_METHODS = (
  gx.Ternary(group=16, packing='5trit', scale='ue5m3'),
  gx.Int(bits=3, group=64),
  gx.Int(bits=5, group=64),
  gx.Int(bits=8, group=128),
)


def _tokens(seed=0, batch=6):
  tokens = np.random.default_rng(seed).integers(5, 400, (batch, 48))
  tokens[:, 0] = 2
  return tokens.astype(np.int32)


@pytest.fixture(scope='module')
def case():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  statistics = gx.compress.statistics(model, params, _tokens())
  found = gx.compress.sensitivities(
    model, params, statistics, candidates=_METHODS, bands=2
  )
  return model, params, statistics, found


def _made_up(seed=0, weights=5, methods=4):
  rng = np.random.default_rng(seed)
  candidates = {}
  for i in range(weights):
    nbytes = np.sort(rng.integers(10, 200, methods))
    loss = np.sort(rng.exponential(size=methods))[::-1]
    candidates[f'layer_{i}/mlp/w'] = tuple(
      gx.compress.Candidate(
        method=gx.Int(bits=2 + j), nbytes=int(n), loss=float(x)
      )
      for j, (n, x) in enumerate(zip(nbytes, loss, strict=True))
    )
  return gx.compress.Sensitivities(
    candidates=candidates, weights=1000, other_bytes=7
  )


def test_solve_finds_what_trying_all_finds():
  for seed in range(6):
    found = _made_up(seed)
    all_choices = [*itertools.product(*found.candidates.values())]
    nbytes = lambda choice: 7 + sum(c.nbytes for c in choice)
    loss = lambda choice: sum(c.loss for c in choice)
    least = min(map(nbytes, all_choices))
    budget = int(least * 1.4)
    got = gx.compress.solve(found, gx.Budget(nbytes=budget))
    fit = [c for c in all_choices if nbytes(c) <= budget]
    assert got.nbytes <= budget
    less = gx.compress.solve(found, gx.Budget(nbytes=budget + 9), reserve=9)
    assert less.choice == got.choice
    assert got.loss == pytest.approx(min(map(loss, fit)), rel=1e-3)
    most = min(map(loss, all_choices)) * 1.5
    got = gx.compress.solve(found, gx.Budget(ratio=float(np.exp(most))))
    fit = [c for c in all_choices if loss(c) <= most]
    assert got.loss <= most * (1 + 1e-6)
    assert got.nbytes == pytest.approx(min(map(nbytes, fit)), rel=1e-3)
    assert got.ratio == pytest.approx(np.exp(got.loss))


def test_budgets_in_other_units_and_corrections():
  found = _made_up()
  by_share = gx.compress.solve(found, gx.Budget(share=0.3))
  by_bits = gx.compress.solve(found, gx.Budget(bits=4.8))
  assert by_share.choice == by_bits.choice and by_share.nbytes <= 600
  twice = dataclasses.replace(found, corrections={'mlp': ((1.0, 2.0),)})
  got = gx.compress.solve(twice, gx.Budget(share=0.3))
  assert got.loss == pytest.approx(2 * by_share.loss, rel=1e-3)


def test_corrections_are_those_of_the_loss():
  found = _made_up()
  budgets = [gx.Budget(share=share) for share in (0.3, 0.45)]
  plain = [gx.compress.solve(found, b).plain_losses()['mlp'] for b in budgets]
  assert plain[0] > plain[1]
  pairs = ((plain[1], 0.5 * plain[1]), (plain[0], 3 * plain[0]))
  better = dataclasses.replace(found, corrections={'mlp': pairs})
  for budget, factor, loss in zip(budgets, (3, 0.5), plain, strict=True):
    got = gx.compress.solve(better, budget)
    assert got.loss == pytest.approx(factor * loss, rel=1e-6)
  middle = math.sqrt(plain[0] * plain[1])
  assert better.at({'mlp': middle})['mlp'] == pytest.approx(math.sqrt(1.5))
  assert better.at({'mlp': 10 * plain[0]})['mlp'] == pytest.approx(3)
  assert found.at({'mlp': 1.0}) == {}


def test_budgets_that_cannot_be_had():
  found = _made_up()
  with pytest.raises(errors.RecipeError, match='bytes at least'):
    gx.compress.solve(found, gx.Budget(nbytes=20))
  with pytest.raises(errors.RecipeError, match='a ratio of'):
    gx.compress.solve(found, gx.Budget(ratio=1 + 1e-9))


@pytest.mark.parametrize(
  'text, want',
  [
    ('28%', {'share': 0.28}),
    ('4.5bits', {'bits': 4.5}),
    ('3 bits', {'bits': 3.0}),
    ('150MB', {'nbytes': 150_000_000}),
    ('ratio=1.02', {'ratio': 1.02}),
  ],
)
def test_parse(text, want):
  assert gx.Budget.parse(text) == gx.Budget(**want)


@pytest.mark.parametrize(
  'text', ['', '28', '-3%', '0bits', '101%', 'ratio=1', '1e5MB', 'ratio=.9']
)
def test_parse_refuses(text):
  with pytest.raises(errors.RecipeError, match='budget|Budget'):
    gx.Budget.parse(text)


def test_a_budget_is_one_number():
  for kwargs in ({}, {'bits': 3.0, 'share': 0.2}, {'bits': float('inf')}):
    with pytest.raises(errors.RecipeError):
      gx.Budget(**kwargs)


def test_more_bytes_cost_less_and_bytes_are_those_of_the_plan(case):
  model, _, _, found = case
  assert {f'{_TABLE}/rows_{i}' for i in range(2)} <= set(found.candidates)
  assert len(found.candidates) == len(gx.nn.sites(model)) + 1
  for candidates in found.candidates.values():
    assert len(candidates) >= 3
    sizes = [c.nbytes for c in candidates]
    losses = [c.loss for c in candidates]
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 50
  for share in (0.25, 0.4):
    got = gx.compress.solve(found, gx.Budget(share=share))
    assert gx.plan(model, got.recipe).nbytes <= got.nbytes * 1.01
    assert gx.plan(model, got.recipe).nbytes >= got.nbytes * 0.99
    assert 0.9 * share < got.nbytes / found.bfloat16_bytes <= share


def _measure(case, recipe):
  model, params, statistics, _ = case
  packed = gx.compress(model, params, recipe, calibration=statistics)
  compressed = gx.nn.Compressed(model=model, recipe=recipe)
  return gx.compress.divergence(
    model, params, compressed, packed, _tokens(seed=9)
  )


def test_better_than_uniform(case):
  model, _, _, found = case
  uniform = gx.Recipe.of({'.*': gx.Int(bits=4, group=64)})
  nbytes = gx.plan(model, uniform).nbytes
  got = gx.compress.solve(found, gx.Budget(nbytes=nbytes))
  measured = _measure(case, got.recipe)
  # A random model of 128 columns leaves little to choose.
  assert measured < 0.9 * _measure(case, uniform)


def test_corrections_are_measured(case):
  model, params, statistics, found = case
  got = gx.compress.solve(found, gx.Budget(share=0.25))
  unseen = _tokens(seed=8)
  better = gx.compress.corrected(got, model, params, statistics, unseen)
  assert set(better.corrections) == {'attn', 'mlp', 'embedder'}
  plain = got.plain_losses()
  for kind, ((predicted, measured),) in better.corrections.items():
    assert predicted == plain[kind] and 0.3 < measured / predicted < 4
  # The same is not measured again.
  refuse = lambda *args, **kwargs: pytest.fail('measures again')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('gemma_ext.compress._divergence.divergence', refuse)
    same = gx.compress.corrected(
      dataclasses.replace(got, sensitivities=better),
      model,
      params,
      statistics,
      unseen,
    )
  assert same.corrections == better.corrections
  # A choice of another loss adds what is measured there.
  kept = []
  more = gx.compress.refined(
    better,
    [gx.Budget(share=0.4), gx.Budget(share=0.4)],
    model,
    params,
    statistics,
    unseen,
    keep=kept.append,
  )
  assert kept[-1].corrections == more.corrections
  assert len(kept) >= 3 and kept[0].corrections != more.corrections
  assert {len(pairs) for pairs in more.corrections.values()} <= {2, 3}
  assert all(pairs == (*sorted(pairs),) for pairs in more.corrections.values())
  # Errors of a layer meet those of others, and are fitted to few tokens here;
  # that is corrected.
  again = gx.compress.solve(better, gx.Budget(share=0.25))
  assert 0.6 < _measure(case, again.recipe) / again.loss < 1.6
  kind = got.of_kind('mlp')
  assert all('/mlp/' in path for path in kind.choice)
  assert 0 < kind.loss < got.loss


def test_goes_on_from_what_is_known(case, monkeypatch):
  model, params, statistics, found = case
  kept = []
  fitted = []
  compress_weight = _weight.compress_weight

  def counted(*args, **kwargs):
    fitted.append(args[1].path)
    return compress_weight(*args, **kwargs)

  monkeypatch.setattr(_weight, 'compress_weight', counted)
  left = [*found.candidates][-2:]
  part = dataclasses.replace(
    found,
    candidates={p: c for p, c in found.candidates.items() if p not in left},
  )
  part = gx.compress.Sensitivities.from_json(
    json.loads(json.dumps(part.to_json()))
  )
  again = gx.compress.sensitivities(
    model,
    params,
    statistics,
    candidates=_METHODS,
    bands=2,
    known=part,
    keep=lambda x: kept.append(len(x.candidates)),
  )
  assert set(fitted) == set(left)
  assert kept == [len(found.candidates) - 1, len(found.candidates)]
  assert again.to_json() == found.to_json()
  assert again.complete and not part.complete
  with pytest.raises(errors.RecipeError, match='with other candidates'):
    gx.compress.sensitivities(
      model, params, statistics, candidates=_METHODS[:1], bands=1, known=part
    )


def test_what_was_measured_of_something_else_is_refused():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  flat = traverse_util.flatten_dict(params, sep='/')
  mark = _fingerprint.of(flat, 'a text', _METHODS, 2)
  found = dataclasses.replace(_made_up(), fingerprint=mark)
  check = lambda params=params, text='a text', bands=2: gx.compress.check_known(
    found, model, params, text, candidates=_METHODS, bands=bands
  )
  check()
  other = jax.tree.map(lambda x: x, params)
  table = other['embedder']['input_embedding']
  # Rows have changed places: any sum of all numbers is the same.
  other['embedder']['input_embedding'] = table[::-1]
  with pytest.raises(errors.RecipeError, match='with other parameters. They'):
    check(other)
  with pytest.raises(errors.RecipeError, match='other calibration text'):
    check(text='another')
  with pytest.raises(errors.RecipeError, match='other candidates'):
    check(bands=3)


def test_corrections_cover_what_is_near_or_in_between():
  pairs = {'mlp': ((1.0, 1.0), (4.0, 4.0)), 'attn': ((2.0, 2.0),)}
  found = dataclasses.replace(_made_up(), corrections=pairs)
  assert found.covers({'mlp': 2.0, 'attn': 2.5})
  assert found.covers({'mlp': 5.9, 'attn': 2.0})
  assert not found.covers({'mlp': 6.1, 'attn': 2.0})
  assert not found.covers({'mlp': 0.6, 'attn': 2.0})
  # What is little of the whole may be anywhere.
  assert found.covers({'mlp': 2.0, 'attn': 0.01})
  assert not found.covers({'mlp': 2.0, 'other': 1.0})
  assert not _made_up().covers({'mlp': 1.0})


def test_experts_of_gemma_4_have_a_choice():
  model = tiny.model('gemma4_moe')
  params = tiny.params(model)
  statistics = gx.compress.statistics(
    model, params, _tokens(batch=1), random_share=0
  )
  found = gx.compress.sensitivities(
    model, params, statistics, candidates=_METHODS[1:3], bands=1
  )
  chosen = gx.compress.solve(found, gx.Budget(share=0.28))
  # All but the routers, which no rule names.
  sites = {site.path: site for site in gx.nn.sites(model)}
  assert {*chosen.choice} == {p for p in sites if 'router' not in p}
  packed = gx.compress.compress(
    model, params, chosen.recipe, calibration=statistics
  )
  nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
  assert nbytes == pytest.approx(chosen.nbytes, rel=0.01)
  # Errors are compensated along what experts read: their outputs are nearer.
  path = 'layer_1/mlp/gating_einsum/w'
  method = chosen.choice[path].method
  w = sites[path].layout.to_rows(params['layer_1']['mlp']['gating_einsum']['w'])
  plain, better = (
    _weight.compress_weight(
      w.reshape(sites[path].layout.shape), sites[path], method, hessian=hessian
    )
    for hessian in (None, statistics.inputs[path])
  )

  def loss(leaf):
    fmt = gx.nn.format_of(method, sites[path].layout.cols)
    got = gx.kernels.dequantize(leaf, fmt, w.shape[-1], dtype=jnp.float32)
    error = (got - w).reshape(-1, w.shape[-1])
    return float(jnp.sum(statistics.loss(path, error)))

  assert loss(better) < 0.9 * loss(plain)


def test_a_sample_of_rows_stands_for_all(monkeypatch):
  rng = np.random.default_rng(0)
  importance = rng.pareto(1.0, 4000)
  cost = importance * rng.uniform(0.8, 1.2, 4000)
  monkeypatch.setattr(_sensitivity, '_SAMPLE', 400)
  rows, times = _sensitivity._sample(importance)
  assert len(rows) == 400 and np.all(np.diff(rows) > 0)
  assert cost[rows] @ times == pytest.approx(cost.sum(), rel=0.03)
  rows, times = _sensitivity._sample(importance[:300])
  assert len(rows) == 400 and times.sum() == 300
  assert set(rows[times == 1]) == set(range(300))


def test_bands_end_where_frequency_changes():
  importance = np.full(4096, 1e-6)
  importance[:256] = 1.0
  importance[256:760] = 1e-2
  assert _sensitivity._edges(importance, 3) == [256, 768]
  ends = _sensitivity._edges(np.exp(-np.arange(4096) / 300), 8)
  assert len(ends) == 7 and ends == sorted(set(ends))
  # A straight slope: bands of one size, but for rounding.
  assert np.all(np.abs(np.diff([0, *ends, 4096]) - 512) <= 128)
  assert _sensitivity._edges(importance, 1) == []
  assert _sensitivity._edges(np.ones(3), 8) == [1, 2]


@pytest.mark.parametrize(
  'change, message',
  [
    ({'version': 1}, 'Version 1'),
    ({'weights': -1}, 'weights must be an integer'),
    ({'weights': True}, 'weights must be an integer'),
    ({'corrections': []}, "'corrections' must be an object"),
    ({'corrections': {'mlp': 'x'}}, 'corrections.mlp must be a list'),
    ({'corrections': {'mlp': [[1.0]]}}, r'mlp must hold \[predicted'),
    ({'corrections': {'mlp': [[1.0, 0.0]]}}, 'mlp must be above zero'),
    ({'rows': {'a': [3, 3]}}, 'rows.a must ascend'),
    ({'rows': {'a': 3}}, 'rows.a must be'),
    ({'candidates': {'a': []}}, 'a list of candidates'),
    ({'candidates': {'a': [{'bytes': 1}]}}, r'a\[0\] must be'),
    (
      {'candidates': {'a': [{'method': 'x', 'bytes': 1, 'loss': 1}]}},
      'Unknown method',
    ),
    (
      {'candidates': {'a': [{'method': 'int', 'bytes': 1, 'loss': None}]}},
      'loss must be a number',
    ),
  ],
)
def test_files_that_are_not_valid(change, message):
  good = _made_up().to_json()
  gx.compress.Sensitivities.from_json(good)
  with pytest.raises(errors.RecipeError, match=message):
    gx.compress.Sensitivities.from_json(good | change)
  with pytest.raises(errors.RecipeError, match='have the keys'):
    gx.compress.Sensitivities.from_json({'weights': 1})


def test_allocate_gives_a_recipe_within_the_budget(monkeypatch):
  monkeypatch.setattr(_sensitivity, 'CANDIDATES', _METHODS[2:4])
  monkeypatch.setattr(_sensitivity, 'BANDS', 2)
  model = tiny.shallow()
  params = tiny.params(model)
  recipe = gx.allocate(model, params, '40%', _tokens(batch=2))
  dense = sum(x.nbytes for x in jax.tree.leaves(params))
  packed = gx.compress(model, params, recipe, calibration=_tokens(batch=2))
  assert sum(x.nbytes for x in jax.tree.leaves(packed)) <= 0.4 * dense
  compressed = gx.nn.Compressed(model=model, recipe=recipe)
  assert jnp.isfinite(
    compressed.apply({'params': packed}, jnp.array([[2, 9]])).logits
  ).all()


def test_what_is_measured_on_was_not_fitted_on():
  tokens = np.arange(14).reshape(7, 2)
  fitted, measured = gx.compress.held_out(tokens)
  assert len(fitted) == 5 and len(measured) == 2
  np.testing.assert_array_equal(np.concatenate([fitted, measured]), tokens)
  for few in (tokens[:1], tokens[:2]):
    for part in gx.compress.held_out(few):
      np.testing.assert_array_equal(part, few)


def test_more_candidates_are_chosen_where_they_pay():
  # A sum of two planes.
  rng = np.random.default_rng(0)
  model = tiny.shallow()
  params = tiny.params(model)
  statistics = gx.compress.statistics(
    model, params, _tokens(batch=1), random_share=0
  )
  path = 'layer_0/mlp/linear'
  site = {s.path: s for s in gx.nn.sites(model)}[path]
  rows, cols = math.prod(site.layout.rows), site.layout.cols
  codes = rng.integers(-1, 2, (2, rows, cols))
  # Scales that a byte holds, the second a half to a third of the first.
  first = (1 + rng.integers(0, 8, (rows, cols // 16)) / 8) / 16
  second = first / 2 * rng.choice([1, 0.75], first.shape)
  scale = np.stack([first, second]).repeat(16, -1)
  w = jnp.asarray(np.sum(codes * scale, axis=0), jnp.float32)
  planes = gx.compress.MORE_CANDIDATES[3]
  ints = [gx.Int(bits=bits, group=32, scale='e4m3') for bits in (3, 4, 5)]
  fitted = _sensitivity.fitted(
    site.layout.from_rows(w.reshape(*site.layout.rows, cols)),
    site,
    (planes, *ints),
    statistics,
  )
  # Smallest first, and each better than those before: it is one of them.
  assert [c.method for c in fitted] == [*ints[:2], planes, ints[2]]
  assert fitted[2].loss < 0.7 * fitted[1].loss
