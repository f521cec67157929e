# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of fits with a correction of low rank."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext.compress import _compensate
from gemma_ext.compress import _low_rank
from gemma_ext.compress import _sensitivity
from gemma_ext.compress import _weight
from gemma_ext.nn import _sites
from tests import tiny

_INT3 = gx.Int(bits=3, group=32)


def _site(rows, cols):
  layout = _sites.Layout(shape=(rows, cols), in_axes=(1,))
  return _sites.Site(path='w', layout=layout, kind=_sites.Kind.EINSUM)


def _costs(rows, cols, rng):
  """Inputs of a few strong directions, and outputs that differ."""
  x = rng.standard_normal((4 * cols, cols)) * np.geomspace(10, 0.1, cols)
  x = x @ np.linalg.qr(rng.standard_normal((cols, cols)))[0]
  hessian = jnp.asarray(x.T @ x / len(x), jnp.float32)
  outputs = np.geomspace(1, 1e-3, rows).astype(np.float32)
  return _low_rank.Costs(
    inputs=_compensate.Factored.of(hessian), outputs=rng.permutation(outputs)
  )


def _loss(error, costs):
  hessian = np.asarray(costs.inputs.hessian, np.float64)
  return np.einsum('n,ni,ij,nj->', costs.outputs, error, hessian, error)


@pytest.mark.parametrize('rows, cols', [(48, 128), (128, 48)])
def test_no_correction_of_that_rank_loses_less(rows, cols):
  rng = np.random.default_rng(0)
  costs = _costs(rows, cols, rng)
  error = rng.standard_normal((rows, cols))
  found = _low_rank.directions(error, 8, costs)
  assert found.shape == (8, cols)
  hessian = np.asarray(costs.inputs.hessian, np.float64)
  lower = np.linalg.cholesky(hessian)
  scaled = np.sqrt(costs.outputs)[:, None] * (error @ lower)
  least = np.sum(np.linalg.svd(scaled, compute_uv=False)[8:] ** 2)
  left = error - _low_rank._solve(error, found, costs) @ found
  assert least <= _loss(left, costs) * (1 + 1e-6)
  assert _loss(left, costs) == pytest.approx(least, rel=1e-3)
  # What is nearest in plain numbers is not.
  u, s, v = np.linalg.svd(error, full_matrices=False)
  plain = error - (u[:, :8] * s[:8]) @ v[:8]
  assert _loss(plain, costs) > 1.2 * least
  # The first directions are those of a smaller rank.
  few = _low_rank.directions(error, 3, costs)
  left, same = (
    error - _low_rank._solve(error, rows, costs) @ rows
    for rows in (few, found[:3])
  )
  assert _loss(same, costs) == pytest.approx(_loss(left, costs), rel=1e-6)


@pytest.mark.parametrize('known', ['all', 'curvature', 'nothing'])
@pytest.mark.parametrize('rows, cols', [(64, 128), (256, 64)])
def test_an_error_of_that_rank_is_found(rows, cols, known):
  rng = np.random.default_rng(1)
  site = _site(rows, cols)
  scale = 0.01 * rng.uniform(1, 2, (rows, cols // 32)).repeat(32, -1)
  codes = rng.integers(-4, 4, (rows, cols))
  codes[:, ::32] = -4  # So that the scale of a group is that of its codes.
  more = rng.standard_normal((rows, 4)) @ rng.standard_normal((4, cols))
  w = jnp.asarray(scale * codes + 1e-3 * more, jnp.float32)
  costs = {
    'all': _costs(rows, cols, rng),
    'curvature': _low_rank.Costs(curvature=jnp.ones(cols)),
    'nothing': _low_rank.Costs(),
  }[known]
  method = gx.LowRank(weights=_INT3, rank=16)
  parts = _low_rank.parts_of(site, method)
  leaves = _low_rank.fit(w, parts, costs)
  error = _low_rank.residual(w, *parts['base'], leaves['base'])
  left = _low_rank.remaining(error, leaves, parts)
  # A quarter of its directions hold most of what is wrong.
  if known != 'all':
    assert np.sum(left**2) < 0.75 * np.sum(error**2)
  else:
    assert _loss(left, costs) < 0.5 * _loss(error, costs)
    rows_of = _low_rank.directions(error, 16, costs)
    best = error - _low_rank._solve(error, rows_of, costs) @ rows_of
    # In 8 bits factors are as good as in all.
    assert _loss(left, costs) < 1.02 * _loss(best, costs)


def test_fewer_bits_are_coarser_and_smaller():
  rng = np.random.default_rng(2)
  site = _site(96, 128)
  costs = _costs(96, 128, rng)
  w = jnp.asarray(0.05 * rng.standard_normal((96, 128)), jnp.float32)
  losses, sizes = [], []
  for bits in (8, 6, 3):
    method = gx.LowRank(weights=_INT3, rank=16, bits=bits)
    parts = _low_rank.parts_of(site, method)
    leaves = _low_rank.fit(w, parts, costs)
    error = _low_rank.residual(w, *parts['base'], leaves['base'])
    losses.append(_loss(_low_rank.remaining(error, leaves, parts), costs))
    sizes.append(gx.nn.nbytes_of(site, method))
  assert losses[0] < losses[1] < losses[2]
  assert sizes[0] > sizes[1] > sizes[2]


def test_fewer_tokens_than_inputs():
  # One direction in all of them, so that rounding leaves less than nothing.
  rng = np.random.default_rng(4)
  common = rng.standard_normal(256)
  x = rng.standard_normal((100, 256)) + 30 * common
  hessian = np.float32(x).T @ np.float32(x) / np.float32(100)
  assert np.linalg.eigvalsh(np.float64(hessian))[0] < -1e-6 * np.mean(
    np.diag(hessian)
  )
  costs = _low_rank.Costs(
    inputs=_compensate.Factored.of(jnp.asarray(hessian)),
    outputs=np.ones(300, np.float32),
  )
  site = _site(300, 256)
  w = jnp.asarray(0.05 * rng.standard_normal((300, 256)), jnp.float32)
  parts = _low_rank.parts_of(site, gx.LowRank(weights=_INT3, rank=8))
  leaves = _low_rank.fit(w, parts, costs)
  error = _low_rank.residual(w, *parts['base'], leaves['base'])
  left = _low_rank.remaining(error, leaves, parts)
  assert np.all(np.isfinite(left))
  assert _loss(left, costs) < _loss(error, costs)


def test_a_weight_without_errors_is_left_alone():
  site = _site(64, 128)
  codes = np.random.default_rng(3).integers(-4, 4, (64, 128))
  codes[:, ::32] = -4
  w = jnp.asarray(codes / 64, jnp.float32)
  parts = _low_rank.parts_of(site, gx.LowRank(weights=_INT3, rank=8))
  leaves = _low_rank.fit(w, parts, _low_rank.Costs())
  error = _low_rank.residual(w, *parts['base'], leaves['base'])
  np.testing.assert_array_equal(error, 0)
  left = _low_rank.remaining(error, leaves, parts)
  assert np.max(np.abs(left)) < 1e-6


def test_candidates_say_what_compress_makes():
  model = tiny.shallow()
  params = tiny.params(model)
  tokens = np.random.default_rng(0).integers(1, tiny.VOCAB_SIZE, (2, 32))
  statistics = gx.compress.statistics(model, params, tokens, random_share=0)
  path = 'layer_0/mlp/linear'
  site = {s.path: s for s in gx.nn.sites(model)}[path]
  w = params['layer_0']['mlp']['linear']
  methods = [
    gx.LowRank(weights=_INT3, rank=rank) for rank in (4, 16, site.layout.cols)
  ]
  found = _sensitivity._corrected(
    w,
    site,
    methods,
    statistics,
    _weight.fitting(site, statistics)['hessian'],
  )
  # One of that rank would be no smaller.
  assert [c.method for c in found] == methods[:2]
  assert found[1].loss < found[0].loss
  for candidate in found:
    recipe = gx.Recipe.of({path: candidate.method})
    packed = gx.compress(model, params, recipe, calibration=statistics)
    dense = tiny.unpacked(gx.nn.Compressed(model=model, recipe=recipe), packed)
    parts = dense['layer_0']['mlp']['linear']
    error = w - gx.nn.add_low_rank(site.layout, **parts)
    rows = site.layout.to_rows(error).reshape(-1, site.layout.cols)
    loss = float(np.sum(statistics.loss(path, rows)))
    assert candidate.loss == pytest.approx(loss, rel=0.02)
    leaf = packed['layer_0']['mlp']['linear']
    nbytes = sum(
      math.prod(x.shape) * x.dtype.itemsize
      for part in leaf.values()
      for x in part.values()
    )
    assert candidate.nbytes == nbytes


def test_budgets_choose_corrections_where_they_pay():
  model = tiny.shallow()
  params = tiny.params(model)
  # The same few directions are wrong everywhere: what no grid has.
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, tiny.VOCAB_SIZE, (2, 32))
  statistics = gx.compress.statistics(model, params, tokens, random_share=0)
  corrected = gx.LowRank(weights=gx.Int(bits=2, group=32), rank=8)
  found = gx.compress.sensitivities(
    model,
    params,
    statistics,
    candidates=(gx.Int(bits=2, group=32), corrected, gx.Int(bits=8, group=32)),
    bands=1,
  )
  again = gx.compress.Sensitivities.from_json(found.to_json())
  assert again == found
  choice = {
    path: next((c for c in each if c.method == corrected), each[0])
    for path, each in found.candidates.items()
  }
  chosen = gx.compress.Allocation(choice=choice, sensitivities=found)
  methods = {path: candidate.method for path, candidate in choice.items()}
  assert corrected in methods.values()
  assert methods['embedder/input_embedding'] != corrected
  best = gx.compress.solve(found, gx.compress.Budget(nbytes=chosen.nbytes))
  assert best.loss <= chosen.loss
  assert gx.plan(model, chosen.recipe).nbytes == chosen.nbytes
  fits = gx.compress.Fits()
  packed, same = (
    gx.compress(model, params, chosen.recipe, calibration=statistics, fits=fits)
    for _ in range(2)
  )
  path = next(p for p, m in methods.items() if m == corrected)
  node, other = packed, same
  for name in path.split('/'):
    node, other = node[name], other[name]
  assert node['up']['codes'] is not None
  np.testing.assert_array_equal(node['up']['codes'], other['up']['codes'])
