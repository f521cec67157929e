# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of error compensation against the diagonal fit."""

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.compress import _compensate
from gemma_ext.compress import _registry


@pytest.mark.parametrize(
  'method',
  [gx.Ternary(group=32, planes=p) for p in (1, 2, 3)]
  + [
    gx.Ternary(group=32, planes=2, scale='ue5m3', tied=True),
    gx.Ternary(group=32, scale='ue5m3'),
    gx.Int(bits=4, group=32),
    gx.Int(bits=5),
  ],
)
def test_beats_the_diagonal_fit(method):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(500, 64)) @ rng.normal(size=(64, 64))
  h = jnp.asarray(x.T @ x / 500, jnp.float32)
  w = jnp.asarray(rng.normal(size=(40, 64)), jnp.float32)
  new = _compensate.compensate(w, method=method, fmt=method, hessian=h)
  old = _registry.fit_of(method)(w, method, method, jnp.diagonal(h))

  def error(codes, scale):
    groups = 64 // (method.group or 64)
    q = np.asarray(codes, np.float64).reshape(-1, 40, groups, 64 // groups)
    s = np.asarray(scale, np.float64).reshape(-1, 40, groups, 1)
    d = np.asarray(w, np.float64) - (q * s).sum(0).reshape(40, 64)
    return np.einsum('ni,ij,nj->n', d, np.asarray(h, np.float64), d)

  assert new[0].shape == old[0].shape and new[1].shape == old[1].shape
  assert (error(*new) <= error(*old) * 1.001).all()
  assert error(*new).sum() < 0.9 * error(*old).sum()


def test_hessian_shape():
  m = gx.Ternary(group=32)
  with pytest.raises(errors.ShapeError, match='hessian'):
    _compensate.compensate(
      jnp.ones((2, 64)), method=m, fmt=m, hessian=jnp.eye(32)
    )


def test_rounding_anew_lowers_the_error_and_ends_at_a_minimum():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(500, 64)) @ rng.normal(size=(64, 64))
  h = jnp.asarray(x.T @ x / 500, jnp.float32)
  w = jnp.asarray(rng.normal(size=(40, 64)), jnp.float32)
  m = gx.Int(bits=3, group=32)
  upper = _compensate.Factored.of(h).upper
  codes, scale = _compensate._compensated(w, upper, method=m, group=32)
  first = _compensate._error(w, codes, scale, h)
  found = codes[0]
  for _ in range(30):
    found = _compensate._descend(w, found, scale[0], h, bits=3)
  last = np.asarray(_compensate._error(w, found[None], scale, h))
  assert last.sum() < 0.9 * first.sum()
  # No single step of a code makes any row better.
  for i in range(64):
    for step in (-1, 1):
      moved = jnp.clip(found.at[:, i].add(step), -4, 3)
      error = _compensate._error(w, moved[None], scale, h)
      assert (error >= last * 0.999).all()


def test_activation_order():
  rng = np.random.default_rng(2)
  x = rng.normal(size=(900, 128)) @ rng.normal(size=(128, 128)) / 11
  x = x + rng.normal(size=x.shape)
  x = x * np.exp(rng.normal(size=128))
  h = jnp.asarray(x.T @ x / len(x), jnp.float32)
  w = jnp.asarray(rng.normal(size=(60, 128)), jnp.float32)
  m = gx.Int(bits=4, group=32, scale='e4m3')
  factored = _compensate.Factored.of(h)
  assert (np.diff(np.diagonal(h)[factored.order]) <= 0).all()
  error = lambda codes, scale: np.asarray(
    _compensate._error(w, codes[None], scale[None], h)
  )
  codes, scale = _compensate._compensated(w, factored.upper, method=m, group=32)
  codes, scale = codes[0], scale[0]
  order = lambda upper, order: _compensate._in_order(
    w, scale, upper, order, bits=4
  )
  # In the order that they have, it is what groups do one after the other.
  same = order(factored.upper, jnp.arange(128))
  assert (same == codes).mean() > 0.999
  by_size = order(factored.upper_in_order, factored.order)
  assert error(by_size, scale).sum() < 0.9 * error(codes, scale).sum()
  fits = [
    _compensate.compensate(
      w, method=m, fmt=m, hessian=factored, activation_order=yes
    )
    for yes in (True, False)
  ]
  ours, without = (error(*fit) for fit in fits)
  assert (ours <= without).all() and ours.sum() < 0.99 * without.sum()
