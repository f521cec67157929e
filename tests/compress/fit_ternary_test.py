# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the ternary fit: exactness, monotony, densities, bad input."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext.compress import _fit_ternary

fit = _fit_ternary.fit_ternary
relative_error = _fit_ternary.relative_error
KEPT = [{'density': 0.5}, {'pattern': (3, 4)}]


def _weights(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


def _curvature(n, seed=1):
  rng = np.random.default_rng(seed)
  return rng.lognormal(0, 1.5, n).astype(np.float32)


def _error(w, codes, scale, h):
  """Weighted squared error per row of one group, float64 [rows]."""
  codes, scale = np.asarray(codes, np.float64), np.asarray(scale, np.float64)
  return (h * (w - (codes * scale).sum(0)) ** 2).sum(-1)


def _brute_force(w, h, codes):
  """Least error over all of `codes` [C, n] and bfloat16 scales, per row."""
  w, h = w.astype(np.float64), np.asarray(h, np.float64)
  codes = codes.astype(np.float64)
  a = (h * w) @ codes.T
  b = np.broadcast_to(h, w.shape) @ (codes**2).T
  scale = np.asarray(jnp.asarray(a / b, jnp.bfloat16), np.float64)
  return ((h * w * w).sum(-1)[:, None] - 2 * scale * a + scale**2 * b).min(-1)


def _all_codes(n):
  codes = np.array(list(itertools.product((-1, 0, 1), repeat=n)), np.int8)
  return codes[np.any(codes, axis=-1)]


@pytest.mark.parametrize('n', [1, 2, 5, 8])
@pytest.mark.parametrize('weighted', [False, True])
def test_one_plane_is_the_exact_minimum(n, weighted):
  w = _weights(40, n, seed=n)
  h = _curvature(n) if weighted else np.ones(n, np.float32)
  codes, scale = fit(w, group=n, curvature=h if weighted else None)
  best = _brute_force(w, h, _all_codes(n))
  norm = (h * w.astype(np.float64) ** 2).sum(-1)
  gap = (_error(w, codes, scale, h) - best) / norm
  assert np.abs(gap).max() < 2e-6


def _storable():
  u = np.arange(256)
  return np.where(u, 2.0 ** ((u >> 3) - 20) * (1 + (u & 7) / 8), 0)


@pytest.mark.parametrize('n', [2, 5])
@pytest.mark.parametrize('weighted', [False, True])
def test_one_plane_with_scales_of_one_byte_is_the_exact_minimum(n, weighted):
  w = _weights(40, n, seed=n)
  h = _curvature(n) if weighted else np.ones(n, np.float32)
  codes, scale = fit(
    w, group=n, scale='ue5m3', curvature=h if weighted else None
  )
  assert np.isin(np.asarray(scale, np.float64), _storable()).all()
  best = np.full(40, np.inf)
  for s in _storable()[64:200]:
    best = np.minimum(
      best, (h * (np.abs(w) - s * (np.abs(w) > s / 2)) ** 2).sum(-1)
    )
  norm = (h * w.astype(np.float64) ** 2).sum(-1)
  assert np.abs((_error(w, codes, scale, h) - best) / norm).max() < 2e-6


@pytest.mark.parametrize('planes', [2, 3])
@pytest.mark.parametrize('weighted', [False, True])
def test_tied_planes_with_scales_of_one_byte_are_the_minimum(planes, weighted):
  w = _weights(60, 8, seed=planes)
  h = _curvature(8) if weighted else np.ones(8, np.float32)
  codes, scale = fit(
    w,
    group=8,
    planes=planes,
    scale='ue5m3',
    tied=True,
    curvature=h if weighted else None,
  )
  scale = np.asarray(scale, np.float64)
  for p in range(planes - 1):
    np.testing.assert_array_equal(scale[p], 3 * scale[p + 1])
  assert np.isin(scale[-1], _storable()).all()
  half = 3**planes // 2
  best = np.full(60, np.inf)
  for s in _storable()[64:200]:
    q = np.clip(np.round(w.astype(np.float64) / s), -half, half)
    best = np.minimum(best, (h * (w - q * s) ** 2).sum(-1))
  norm = (h * w.astype(np.float64) ** 2).sum(-1)
  gap = (_error(w, codes, scale, h) - best) / norm
  # Under a steep curvature the best scale may be one that clips nearly all.
  assert np.abs(np.sort(gap)[:-2]).max() < 2e-6 and gap.max() < 0.01


def test_half_the_scale_bits_for_half_the_group():
  w = _weights(256, 640)
  error = lambda **kwargs: relative_error(w, *fit(w, **kwargs))
  assert error(group=16, scale='ue5m3') < 0.94 * error(group=32)
  two = error(group=32, planes=2)
  assert error(group=16, planes=2, scale='ue5m3') < 0.85 * two
  assert error(group=8, planes=2, scale='ue5m3', tied=True) < 0.7 * two


def test_tied_planes_fix_no_density():
  with pytest.raises(errors.RecipeError, match='density=0.5'):
    fit(_weights(2, 32), group=32, planes=2, tied=True, density=0.5)
  with pytest.raises(errors.RecipeError, match="scale='fp8'"):
    fit(_weights(2, 32), group=32, scale='fp8')


def test_duplicates_zeros_and_signs():
  w = np.array([[1, -1, 1, 0], [0.5, 0.5, 0.5, -4]], np.float32)
  codes, scale = fit(w, group=4)
  assert np.asarray(codes)[0].tolist() == [[1, -1, 1, 0], [0, 0, 0, -1]]
  assert np.asarray(scale, np.float32)[0].tolist() == [[1.0], [4.0]]


@pytest.mark.parametrize(
  'size', [1e-30, 1.0, 1e30], ids=['tiny', 'one', 'huge']
)
def test_size_of_weights_does_not_matter(size):
  w = _weights(4, 64).astype(np.float64)
  want = relative_error(
    w.astype(np.float32), *fit(w.astype(np.float32), group=32)
  )
  codes, scale = fit((w * size).astype(np.float32), group=32)
  got = relative_error(
    w.astype(np.float32), codes, np.asarray(scale, np.float64) / size
  )
  assert got == pytest.approx(want, rel=1e-3)


def test_shapes_and_types():
  codes, scale = fit(
    jnp.asarray(_weights(2, 3, 96), jnp.bfloat16), group=32, planes=2
  )
  assert codes.shape == (2, 2, 3, 96) and codes.dtype == jnp.int8
  assert scale.shape == (2, 2, 3, 3) and scale.dtype == jnp.bfloat16


def test_gaussian_errors_by_planes():
  w = _weights(256, 128)
  got = [relative_error(w, *fit(w, group=128, planes=p)) for p in (1, 2, 3, 4)]
  # A 3-level Lloyd-Max quantiser of a Gaussian has 0.1902; groups gain 1.5%.
  np.testing.assert_allclose(got, [0.187, 0.0281, 0.0035, 0.00038], rtol=0.06)


@pytest.mark.parametrize('planes, weighted', [(2, True), (3, False), (4, True)])
def test_iterations_never_increase_the_error(planes, weighted):
  w, h = _weights(64, 64), _curvature(64) if weighted else None
  h64 = np.ones(64) if h is None else h.astype(np.float64)
  before = None
  first = None
  for iterations in (0, 1, 2, 4, 12):
    codes, scale = fit(
      w, group=64, planes=planes, curvature=h, iterations=iterations
    )
    err = _error(w, codes, scale, h64)
    if before is None:
      first = err.sum()
    else:
      assert (err <= before * (1 + 1e-5) + 1e-6).all()
    before = err
  assert before.sum() < 0.97 * first


@pytest.mark.parametrize('planes', [2, 3])
def test_better_than_greedy(planes):
  w = _weights(64, 64)
  rest = w
  for _ in range(planes):
    codes, scale = fit(rest, group=64)
    rest = rest - np.asarray(codes[0]) * np.asarray(scale[0], np.float32)
  greedy = (rest.astype(np.float64) ** 2).sum() / (w**2).sum()
  assert relative_error(w, *fit(w, group=64, planes=planes)) < 0.95 * greedy


def test_two_planes_near_the_brute_force_minimum():
  w = _weights(12, 4, seed=7)
  every = _all_codes(4)
  best = np.full(12, np.inf)
  for a in every:
    for b in every:
      m = np.stack([a, b], -1).astype(np.float64)
      if np.linalg.matrix_rank(m) == 2:
        s = np.linalg.lstsq(m, w.T, rcond=None)[0]
        best = np.minimum(best, ((w.T - m @ s) ** 2).sum(0))
  codes, scale = fit(w, group=4, planes=2)
  got = _error(w, codes, scale, np.ones(4))
  norm = (w**2).sum(-1)
  assert ((got - best) / norm).mean() < 0.01


@pytest.mark.parametrize(
  'density, planes, weighted',
  [(0.01, 1, True), (0.3, 1, False), (0.5, 2, True), (1.0, 2, False)],
)
def test_density_is_exact_in_every_group(density, planes, weighted):
  codes, scale = fit(
    _weights(8, 96),
    group=48,
    planes=planes,
    density=density,
    curvature=_curvature(96) if weighted else None,
  )
  count = np.abs(np.asarray(codes)).reshape(planes, 8, 2, 48).sum(-1)
  assert (count == max(1, round(density * 48))).all()
  assert scale.shape == (planes, 8, 2)


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('pattern', [(3, 4), (2, 4), (1, 16), (4, 4)], ids=str)
def test_pattern_is_exact_everywhere(pattern, weighted):
  n, m = pattern
  codes, _ = fit(
    _weights(8, 96),
    group=32,
    pattern=pattern,
    curvature=_curvature(96) if weighted else None,
  )
  assert (np.abs(np.asarray(codes)).reshape(-1, m).sum(-1) == n).all()


def _kept_codes(n, keep, block):
  codes = _all_codes(n)
  return codes[
    (np.abs(codes).reshape(len(codes), -1, block).sum(-1) == keep).all(-1)
  ]


@pytest.mark.parametrize('how', KEPT, ids=str)
def test_fixed_density_is_the_exact_minimum(how):
  w = _weights(40, 8, seed=3)
  kept = _kept_codes(8, *((4, 8) if 'density' in how else (3, 4)))
  codes, scale = fit(w, group=8, **how)
  gap = _error(w, codes, scale, np.ones(8)) - _brute_force(w, np.ones(8), kept)
  assert np.abs(gap / (w**2).sum(-1)).max() < 2e-6


@pytest.mark.parametrize('how', KEPT, ids=str)
def test_fixed_density_with_curvature_is_near_the_minimum(how):
  w, h = _weights(100, 8, seed=3), _curvature(8)
  kept = _kept_codes(8, *((4, 8) if 'density' in how else (3, 4)))
  codes, scale = fit(w, group=8, curvature=h, **how)
  gap = _error(w, codes, scale, h) - _brute_force(w, h, kept)
  gap = gap / (h * w**2).sum(-1)
  assert gap.min() > -2e-6
  assert gap.mean() < 1e-3 and (gap < 1e-5).mean() > 0.9


def test_two_planes_at_a_density_beat_one():
  w = _weights(32, 64)
  one = relative_error(w, *fit(w, group=64, density=0.5))
  start = relative_error(
    w, *fit(w, group=64, density=0.5, planes=2, iterations=0)
  )
  two = relative_error(w, *fit(w, group=64, density=0.5, planes=2))
  assert two < 0.98 * start < 0.5 * one


def test_curvature_moves_the_error_where_it_costs_least():
  w, h = _weights(64, 64), _curvature(64)
  with_h, without = fit(w, group=64, curvature=h), fit(w, group=64)
  assert relative_error(w, *with_h, h) < relative_error(w, *without, h)
  assert relative_error(w, *with_h) > relative_error(w, *without)


def test_curvature_for_every_row():
  w = _weights(4, 64)
  h = np.stack([_curvature(64, seed) for seed in range(4)])
  codes, scale = fit(w, group=32, curvature=h)
  for row in range(4):
    c, s = fit(w[row], group=32, curvature=h[row])
    np.testing.assert_array_equal(codes[:, row], c)
    np.testing.assert_array_equal(scale[:, row], s)


def test_inputs_that_never_fire():
  w = _weights(3, 64)
  h = np.concatenate([np.zeros(32, np.float32), _curvature(32)])
  codes, scale = fit(w, group=32, curvature=h)
  plain_codes, plain_scale = fit(w[:, :32], group=32)
  np.testing.assert_array_equal(codes[..., :32], plain_codes)
  np.testing.assert_array_equal(scale[..., :1], plain_scale)


@pytest.mark.parametrize(
  'how', [{}, {'planes': 3}, {'density': 0.5}, {'pattern': (3, 4)}], ids=str
)
def test_groups_of_zeros(how):
  w = _weights(2, 64)
  w[0, :32] = 0
  codes, scale = fit(w, group=32, **how)
  assert not np.asarray(codes)[:, 0, :32].any()
  assert not np.asarray(scale, np.float32)[:, 0, 0].any()
  assert np.asarray(codes)[:, 1].any()


def test_chunks_change_nothing(monkeypatch):
  w, h = _weights(10, 96), _curvature(96)
  whole = fit(w, group=32, planes=2, curvature=h)
  monkeypatch.setattr(_fit_ternary._groups, 'CHUNK', 7 * 32)
  for a, b in zip(whole, fit(w, group=32, planes=2, curvature=h), strict=True):
    np.testing.assert_array_equal(a, b)


def test_relative_error_by_hand():
  w = np.array([[3.0, 4.0]], np.float32)
  codes = np.array([[[1, 1]], [[0, 1]]], np.int8)
  scale = np.array([[[3.0]], [[2.0]]], np.float32)
  assert relative_error(w, codes, scale) == pytest.approx(1 / 25)
  h = np.array([1.0, 10.0])
  assert relative_error(w, codes, scale, h) == pytest.approx(10 / 169)
  assert relative_error(w, codes[0], scale[0]) == pytest.approx(1 / 25)
  assert relative_error(0 * w, codes[0], 0 * scale[0]) == 0


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_non_finite_weights(value):
  w = _weights(4, 64)
  w[2, 5] = value
  with pytest.raises(errors.NonFiniteError, match='NaN or infinity'):
    fit(w, group=32)


@pytest.mark.parametrize('value', [math.nan, math.inf, -1.0])
def test_bad_curvature_values(value):
  h = _curvature(64)
  h[3] = value
  with pytest.raises(errors.NonFiniteError, match='curvature'):
    fit(_weights(4, 64), group=32, curvature=h)


@pytest.mark.parametrize('shape', [(63,), (1,), (), (3, 64), (1, 4, 64)])
def test_bad_curvature_shape(shape):
  with pytest.raises(errors.ShapeError, match='curvature'):
    fit(_weights(4, 64), group=32, curvature=np.ones(shape, np.float32))


@pytest.mark.parametrize(
  'how, error',
  [
    ({'group': 33}, errors.GroupSizeError),
    ({'group': 0}, errors.GroupSizeError),
    ({'pattern': (3, 5)}, errors.GroupSizeError),
    ({'pattern': (5, 4)}, errors.RecipeError),
    ({'pattern': (0, 4)}, errors.RecipeError),
    ({'density': 0.0}, errors.RecipeError),
    ({'density': 1.5}, errors.RecipeError),
    ({'density': 0.5, 'pattern': (3, 4)}, errors.RecipeError),
    ({'planes': 0}, errors.RecipeError),
    ({'planes': 5}, errors.RecipeError),
    ({'iterations': -1}, errors.RecipeError),
  ],
  ids=str,
)
def test_bad_arguments(how, error):
  with pytest.raises(error):
    fit(_weights(4, 64), **{'group': 32, **how})


@pytest.mark.parametrize('w', [np.zeros((2, 32), np.int8), np.zeros((0, 32))])
def test_bad_weights(w):
  with pytest.raises(errors.ShapeError, match='expected floating'):
    fit(w, group=32)
