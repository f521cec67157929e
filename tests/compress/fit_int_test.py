# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the integer fit: against absmax, brute force, and bad input."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext.compress import _fit_int

fit = _fit_int.fit_int
relative_error = _fit_int.relative_error


def _weights(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


def _curvature(n, seed=1):
  rng = np.random.default_rng(seed)
  return rng.lognormal(0, 1.5, n).astype(np.float32)


def _bf16(x):
  return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def _errors(w, scale, h, bits):
  """Weighted squared error per row with nearest codes, float64 [rows]."""
  half = 1 << (bits - 1)
  w = w.astype(np.float64)
  safe = np.where(scale == 0, 1, scale)[:, None]
  codes = np.clip(np.round(w / safe), -half, half - 1)
  return (h * (w - codes * scale[:, None]) ** 2).sum(-1)


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('weighted', [False, True])
def test_never_worse_than_absmax(bits, weighted):
  rng = np.random.default_rng(bits)
  rows = [
    rng.standard_normal((40, 32)),
    rng.standard_t(2, (40, 32)),
    rng.uniform(-1, 1, (40, 32)),
    np.abs(rng.standard_normal((40, 32))),
    rng.integers(-2, 2, (40, 32)) * 0.37,
  ]
  w = np.concatenate(rows).astype(np.float32)
  h = _curvature(32).astype(np.float64) if weighted else np.ones(32)
  codes, scale = fit(w, bits=bits, curvature=h if weighted else None)
  fitted = np.asarray(codes, np.float64) * np.asarray(scale, np.float64)
  got = (h * (w - fitted) ** 2).sum(-1)
  plain = _bf16(np.abs(w).max(-1) / ((1 << (bits - 1)) - 1))
  norm = (h * w.astype(np.float64) ** 2).sum(-1)
  assert (got <= _errors(w, plain, h, bits) + 1e-6 * norm).all()
  assert got.sum() < 0.99 * _errors(w, plain, h, bits).sum()


@pytest.mark.parametrize('kind', ['ue5m3', 'e4m3'])
@pytest.mark.parametrize('bits', [2, 3, 4, 6, 8])
def test_scales_of_one_byte(bits, kind):
  w = _weights(80, 64, seed=bits)
  h = _curvature(32)
  codes, scale = fit(
    w, bits=bits, group=32, scale=kind, curvature=np.tile(h, 2)
  )
  stored = np.asarray(scale, np.float32)
  assert (stored > 0).all() if kind == 'ue5m3' else (stored != 0).all()
  np.testing.assert_array_equal(
    stored, np.asarray(kernels.round_scale(jnp.asarray(stored), kind))
  )
  split = w.reshape(-1, 32).astype(np.float64)
  found = np.asarray(codes, np.float64).reshape(-1, 32)
  got = (h * (split - found * stored.reshape(-1, 1)) ** 2).sum(-1)
  # The best of all scales that can be stored.
  peak = np.abs(split).max(-1)
  best = np.full(len(split), np.inf)
  half = 1 << (bits - 1)
  signs = (1,) if kind == 'ue5m3' else (1, -1)
  for ratio in np.outer(signs, np.geomspace(0.1, 2.4, 400)).ravel():
    tried = kernels.round_scale(jnp.asarray(ratio * peak / half), kind)
    best = np.minimum(best, _errors(split, np.asarray(tried), h, bits))
  assert got.sum() < 1.02 * best.sum()
  with pytest.raises(errors.RecipeError, match='scale='):
    fit(w, bits=bits, scale='fp8')


@pytest.mark.parametrize('bits', [2, 3, 4])
@pytest.mark.parametrize('weighted', [False, True])
def test_near_the_brute_force_minimum(bits, weighted):
  w = _weights(60, 12, seed=bits)
  h = _curvature(12).astype(np.float64) if weighted else np.ones(12)
  codes, scale = fit(w, bits=bits, curvature=h if weighted else None)
  got = (
    h * (w - np.asarray(codes, np.float64) * np.asarray(scale, np.float64)) ** 2
  ).sum(-1)
  peak = np.abs(w).max(-1).astype(np.float64)
  half = 1 << (bits - 1)
  best = np.full(60, np.inf)
  for sign in (1, -1):
    for ratio in np.geomspace(0.05, 2.0, 4000):
      best = np.minimum(best, _errors(w, sign * ratio * peak / half, h, bits))
  norm = (h * w.astype(np.float64) ** 2).sum(-1)
  assert ((got - best) / norm).mean() < 0.002
  assert got.sum() < 1.05 * best.sum()


@pytest.mark.parametrize(
  'bits, group, want',
  [
    (8, None, 5.57e-5),
    (8, 128, 4.00e-5),
    (6, 128, 6.37e-4),
    (5, 128, 2.44e-3),
    (4, 32, 6.56e-3),
    (4, 128, 9.32e-3),
    (3, 128, 0.0345),
    (2, 128, 0.132),
  ],
)
def test_gaussian_errors(bits, group, want):
  w = _weights(128, 640)
  got = relative_error(w, *fit(w, bits=bits, group=group))
  assert got == pytest.approx(want, rel=0.03)


@pytest.mark.parametrize('bits', range(2, 9))
def test_codes_use_the_full_range(bits):
  codes, _ = fit(_weights(64, 64), bits=bits)
  half = 1 << (bits - 1)
  assert np.asarray(codes).min() == -half
  assert np.asarray(codes).max() == half - 1


def test_negative_scale_gives_the_largest_weight_the_extra_code():
  w = np.array([[8.0, 7.0, 1.0, -7.0]], np.float32)
  codes, scale = fit(w, bits=4)
  assert np.asarray(codes).tolist() == [[-8, -7, -1, 7]]
  assert np.asarray(scale, np.float32).tolist() == [[-1.0]]


def test_shapes_and_types():
  w = jnp.asarray(_weights(2, 3, 96), jnp.bfloat16)
  codes, scale = fit(w, bits=4, group=32)
  assert codes.shape == (2, 3, 96) and codes.dtype == jnp.int8
  assert scale.shape == (2, 3, 3) and scale.dtype == jnp.bfloat16
  assert fit(w, bits=8)[1].shape == (2, 3, 1)


def test_groups_of_zeros():
  w = _weights(2, 64)
  w[0, :32] = 0
  codes, scale = fit(w, bits=4, group=32)
  assert not np.asarray(codes)[0, :32].any()
  assert np.asarray(scale, np.float32)[0, 0] == 0
  assert np.asarray(codes)[1].any()


def test_inputs_that_never_fire():
  w = _weights(3, 64)
  h = np.concatenate([np.zeros(32, np.float32), _curvature(32)])
  codes, scale = fit(w, bits=3, group=32, curvature=h)
  plain_codes, plain_scale = fit(w[:, :32], bits=3, group=32)
  np.testing.assert_array_equal(codes[:, :32], plain_codes)
  np.testing.assert_array_equal(scale[:, :1], plain_scale)


def test_curvature_lowers_the_weighted_error():
  w, h = _weights(64, 64), _curvature(64)
  with_h = relative_error(w, *fit(w, bits=3, curvature=h), h)
  assert with_h < 0.97 * relative_error(w, *fit(w, bits=3), h)


def test_chunks_change_nothing(monkeypatch):
  w = _weights(10, 96)
  whole = fit(w, bits=4, group=32)
  monkeypatch.setattr(_fit_int._groups, 'CHUNK', 7 * 32)
  for a, b in zip(whole, fit(w, bits=4, group=32), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('bits', [0, 1, 9, 4.5])
def test_bad_bits(bits):
  with pytest.raises(errors.RecipeError, match='2 to 8'):
    fit(_weights(4, 64), bits=bits)


def test_group_does_not_divide():
  with pytest.raises(errors.GroupSizeError, match='does not divide'):
    fit(_weights(4, 64), bits=4, group=48)


def test_non_finite_weights():
  w = _weights(4, 64)
  w[2, 5] = np.nan
  with pytest.raises(errors.NonFiniteError, match='NaN'):
    fit(w, bits=4)


def test_bad_curvature():
  with pytest.raises(errors.ShapeError, match='curvature'):
    fit(_weights(4, 64), bits=4, curvature=np.ones(32, np.float32))
