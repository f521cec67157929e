# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of fits that several recipes share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.compress import _weight
from tests import tiny


def _leaf(size):
  return {'codes': jnp.zeros(size, jnp.int8), 'scale': jnp.zeros(2, jnp.int8)}


def test_a_weight_that_keeps_its_method_is_fitted_once(monkeypatch):
  model = tiny.model('gemma3')
  params = tiny.params(model)
  tokens = np.random.default_rng(0).integers(4, 60, (2, 16))
  statistics = gx.compress.statistics(model, params, tokens)
  int4, int8 = (gx.Int(bits=bits, group=32) for bits in (4, 8))
  rows = gx.Rows(bands=((16, int8), (None, int4)), ordered=True, centered=True)
  recipes = [
    gx.Recipe(
      rules=(
        ('embedder/input_embedding', rows),
        ('.*mlp.*', int4),
        ('.*attn.*', attention),
      )
    )
    for attention in (int4, int8)
  ]
  fitted = []
  fit = _weight.compress_weight

  def counted(w, site, method, **rest):
    fitted.append(site.path)
    return fit(w, site, method, **rest)

  monkeypatch.setattr(_weight, 'compress_weight', counted)
  want = [
    gx.compress(model, params, recipe, calibration=statistics)
    for recipe in recipes
  ]
  alone = len(fitted)
  del fitted[:]
  fits = gx.compress.Fits()
  run = lambda recipe, **rest: gx.compress(
    model, params, recipe, **{'calibration': statistics, 'fits': fits} | rest
  )
  got = [run(recipe) for recipe in recipes]
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert len(fitted) == len(set(fitted)) + sum('attn' in x for x in set(fitted))
  assert len(fitted) < alone
  # Nothing of it is of another calibration, nor of other parameters.
  del fitted[:]
  run(recipes[0])
  assert not fitted
  other = gx.compress.statistics(model, params, tokens[:1])
  changed = run(recipes[0], calibration=other)
  assert len(fitted) == alone // 2
  plain = gx.compress(model, params, recipes[0], calibration=other)
  jax.tree.map(np.testing.assert_array_equal, changed, plain)
  del fitted[:]
  run(recipes[0], calibration=tokens)
  assert len(fitted) == alone // 2


def test_bytes_are_bounded_and_the_oldest_go():
  fits = gx.compress.Fits(most=25)
  made = []

  def get(key, size=8, source=fits):
    def fit():
      made.append(key)
      return _leaf(size)

    return fits.of(key, (source,), fit)

  a = get('a')
  get('b')
  assert fits.nbytes == 20
  assert get('a') is a
  get('c')  # 'b' was not used for the longest time.
  assert fits.nbytes == 20
  get('a')
  get('b')
  assert made == ['a', 'b', 'c', 'b']
  get('big', size=100)
  assert fits.nbytes == 20
  # A key of another source is another fit, and the old one goes.
  get('b', source=made)
  assert made[-2:] == ['big', 'b']
  assert fits.nbytes == 20


def test_no_room_is_room_for_none():
  fits = gx.compress.Fits(most=0)
  fits.of('a', (), lambda: _leaf(4))
  assert fits.nbytes == 0
  with pytest.raises(errors.ConfigError, match='most: -1'):
    gx.compress.Fits(most=-1)
