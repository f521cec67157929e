# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of `compress`: errors of the weights, what is kept, what is refused."""

import dataclasses
import sys

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import kernels
from tests import tiny

_PATH = 'layer_1/mlp/linear'


def _flat(params):
  return traverse_util.flatten_dict(params, sep='/')


def _with(params, path, value):
  return traverse_util.unflatten_dict({**_flat(params), path: value}, sep='/')


def _site(model, path=_PATH):
  return {s.path: s for s in gx.nn.sites(model)}[path]


def _dense(leaf, site, method):
  """The weight that a compressed leaf stands for, `[*rows, cols]`."""
  fmt = gx.nn.format_of(method, site.layout.cols)
  weight = gx.nn.PackedWeight(
    leaf=leaf, fmt=fmt, layout=site.layout, dtype=jnp.float32
  )
  return np.asarray(site.layout.to_rows(jax.jit(weight.dequantize)()))


def _codes(leaf, site, method):
  fmt = gx.nn.format_of(method, site.layout.cols)
  cols = site.layout.cols
  return np.asarray(jax.jit(lambda c: fmt.unpack(c, cols))(leaf['codes']))


def _weight(site, seed=0):
  """Weights like trained ones: heavier tails than a normal's."""
  rng = np.random.default_rng(seed)
  w = 0.02 * rng.standard_t(5, site.layout.shape)
  return jnp.asarray(w, jnp.float32)


# ----------------------------------- values ----------------------------------


# Of a normal distribution one plane leaves 0.436; heavier tails cost more.
@pytest.mark.parametrize(
  'method,low,high',
  [
    (gx.Ternary(group=128), 0.46, 0.52),
    (gx.Ternary(group=32), 0.44, 0.50),
    (gx.Ternary(group=128, planes=2), 0.17, 0.30),
    (gx.Ternary(group=128, packing='5trit'), 0.46, 0.52),
    (gx.Int(bits=8), 0.004, 0.013),
    (gx.Int(bits=4, group=32), 0.06, 0.13),
    (gx.Int(bits=3, group=32), 0.13, 0.26),
  ],
)
def test_relative_error(method, low, high):
  site = _site(tiny.model('gemma3'))
  w = _weight(site)
  leaf = gx.compress.compress_weight(w, site, method)
  rows = np.asarray(site.layout.to_rows(w))
  error = np.linalg.norm(_dense(leaf, site, method) - rows)
  assert low < error / np.linalg.norm(rows) < high


def test_more_bits_less_error():
  site = _site(tiny.model('gemma3'))
  w = _weight(site)
  rows = np.asarray(site.layout.to_rows(w))
  norms = []
  for bits in (2, 4, 6, 8):
    method = gx.Int(bits=bits)
    leaf = gx.compress.compress_weight(w, site, method)
    norms.append(np.linalg.norm(_dense(leaf, site, method) - rows))
  for more, less in zip(norms, norms[1:]):
    assert less < 0.4 * more


@pytest.mark.parametrize('density', [0.25, 0.5])
def test_density(density):
  site = _site(tiny.model('gemma3'))
  method = gx.Ternary(group=64, density=density)
  leaf = gx.compress.compress_weight(_weight(site), site, method)
  codes = _codes(leaf, site, method).reshape(-1, 64)
  assert set(np.unique(codes)) == {-1, 0, 1}
  assert set((codes != 0).sum(-1)) == {int(64 * density)}


@pytest.mark.parametrize('pattern', [(2, 4), (1, 8)])
def test_pattern(pattern):
  n, m = pattern
  site = _site(tiny.model('gemma3'))
  method = gx.Ternary(group=64, pattern=pattern)
  leaf = gx.compress.compress_weight(_weight(site), site, method)
  codes = _codes(leaf, site, method).reshape(-1, m)
  assert set((codes != 0).sum(-1)) == {n}


def test_curvature_lowers_the_weighted_error():
  site = _site(tiny.model('gemma3'))
  w, method = _weight(site), gx.Ternary(group=64)
  rng = np.random.default_rng(1)
  curvature = rng.lognormal(0, 2, site.layout.cols).astype(np.float32)
  rows = np.asarray(site.layout.to_rows(w))
  weighted = []
  for c in (None, jnp.asarray(curvature)):
    leaf = gx.compress.compress_weight(w, site, method, curvature=c)
    error = _dense(leaf, site, method) - rows
    weighted.append((curvature * error**2).sum())
  assert weighted[1] < 0.8 * weighted[0]


def test_calibration_lowers_the_error_of_the_output():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  # A norm that makes some inputs of the FFN much larger than others.
  rng = np.random.default_rng(2)
  norm = jnp.asarray(rng.lognormal(0, 1.5, 128) - 1, jnp.float32)
  params = _with(params, 'layer_1/pre_ffw_norm/scale', norm)
  tokens = rng.integers(3, 500, (4, 32))
  tokens[:, 0] = 2
  recipe = gx.Recipe.of({'layer_1/mlp/gating_einsum': gx.Ternary(group=64)})
  moments = gx.compress.second_moments(model, params, tokens)
  site = _site(model, 'layer_1/mlp/gating_einsum')
  rows = np.asarray(site.layout.to_rows(_flat(params)[site.path]))
  found = []
  for calibration in (None, tokens):
    packed = gx.compress(model, params, recipe, calibration=calibration)
    leaf = packed['layer_1']['mlp']['gating_einsum']
    error = _dense(leaf, site, gx.Ternary(group=64)) - rows
    found.append((np.asarray(moments[site.path]) * error**2).sum())
  assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize(
  'path', ['layer_0/mlp/gating_einsum', 'layer_0/attn/attn_vec_einsum/w']
)
@pytest.mark.parametrize(
  'method', [gx.Ternary(group=64, planes=2), gx.Int(bits=3)]
)
def test_blocks_change_nothing(monkeypatch, path, method):
  site = _site(tiny.model('gemma3'), path)
  w = _weight(site)
  whole = gx.compress.compress_weight(w, site, method)
  # 48 rows a block, which does not divide the number of rows.
  block = 48 * site.layout.cols
  monkeypatch.setattr('gemma_ext.compress._weight._BLOCK', block)
  assert np.prod(site.layout.rows) % 48
  parts = gx.compress.compress_weight(w, site, method)
  jax.tree.map(np.testing.assert_array_equal, parts, whole)


# ------------------------------------ trees ----------------------------------


@pytest.mark.parametrize(
  'method',
  [gx.Ternary(group=32, packing='5trit', planes=2), gx.Int(bits=4, group=64)],
  ids=['ternary', 'int'],
)
def test_slices_are_those_of_the_whole(method):
  """Rows that are stored in slices are fitted, and compensated, whole."""
  site = _site(tiny.model('gemma3'), 'layer_0/mlp/linear')
  w = _weight(site)
  x = np.random.default_rng(1).standard_normal((600, site.layout.cols))
  x = x @ np.diag(np.linspace(0.1, 3, site.layout.cols)) + x.mean(1)[:, None]
  layout = dataclasses.replace(site.layout, slices=2)
  cut = dataclasses.replace(site, layout=layout)
  whole, slices = (
    gx.compress.compress_weight(w, each, method, hessian=jnp.asarray(x.T @ x))
    for each in (site, cut)
  )
  assert slices['scale'].shape[-3:-1] == (2, 128)
  np.testing.assert_array_equal(
    layout.from_rows(_dense(slices, cut, method)),
    site.layout.from_rows(_dense(whole, site, method)),
  )


def test_kept_leaves_are_the_same_arrays():
  model = tiny.model('gemma4')
  params = tiny.params(model)
  before = jax.tree.map(np.asarray, params)
  recipe = gx.Recipe.of(
    {
      'layer_0/mlp/linear': gx.Keep(),
      'layer_0/mlp': gx.Int(bits=8),
    }
  )
  packed = gx.compress(model, params, recipe)
  flat = _flat(packed)
  changed = set(_flat(params)) - set(flat)
  assert changed == {'layer_0/mlp/gating_einsum'}
  assert set(flat) - set(_flat(params)) == {
    'layer_0/mlp/gating_einsum/codes',
    'layer_0/mlp/gating_einsum/scale',
  }
  for path, leaf in _flat(params).items():
    if path not in changed:
      assert flat[path] is leaf, path
  # Nothing was changed in place.
  jax.tree.map(np.testing.assert_array_equal, params, before)


def test_logits_stay_near():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  recipe = gx.Recipe.of({r'layer_\d+/mlp': gx.Int(bits=8)})
  packed = gx.compress(model, params, recipe)
  tokens = jnp.array([[2, 5, 6, 7, 8, 9, 10, 11]])
  compressed = gx.nn.Compressed(model=model, recipe=recipe)
  got = compressed.apply({'params': packed}, tokens).logits
  want = model.apply({'params': params}, tokens).logits
  error = np.linalg.norm(got - want) / np.linalg.norm(want)
  assert 1e-5 < error < 0.02


def test_gating_nested_as_in_some_gemma4_checkpoints():
  model = tiny.model('gemma4')
  params = tiny.params(model)
  nested = dict(params)
  for layer in ('layer_0', 'layer_1'):
    mlp = {k: {'w': v} for k, v in params[layer]['mlp'].items()}
    nested[layer] = {**params[layer], 'mlp': mlp}
  recipe = gx.Recipe.of({'layer_0/mlp': gx.Int(bits=8)})
  got = gx.compress(model, nested, recipe)
  want = gx.compress(model, params, recipe)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_parameters_of_vision_pass_through():
  model = tiny.model('gemma3')
  params = {**tiny.params(model), 'vision_encoder': {'w': jnp.ones((3, 4))}}
  recipe = gx.Recipe.of({_PATH: gx.Int(bits=8)})
  packed = gx.compress(model, params, recipe)
  assert packed['vision_encoder']['w'] is params['vision_encoder']['w']


def test_room_and_verb():
  assert gx.compress is sys.modules['gemma_ext.compress']
  w = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
  codes, scale = gx.compress.fit_int(w, bits=8)
  assert (codes.shape, scale.shape) == ((4, 32), (4, 1))
  error = np.asarray(codes) * np.asarray(scale, np.float32) - w
  assert np.abs(error).max() < np.abs(w).max() / 127
  model = tiny.model('gemma3')
  params = tiny.params(model)
  recipe = {_PATH: gx.Int(bits=8)}
  packed = gx.compress(model, params, recipe)
  again = gx.compress.compress(
    gx.nn.Compressed(model=model, recipe=recipe), params, recipe
  )
  jax.tree.map(np.testing.assert_array_equal, packed, again)
  assert packed['layer_1']['mlp']['linear']['codes'].dtype == jnp.int8


def test_every_method_has_a_fit():
  # Bands of rows, experts and what is corrected have methods of their own.
  outer = {gx.Rows, gx.MoE, gx.LowRank}
  methods = set(gx.recipe.METHODS.values()) - {gx.Keep} - outer
  assert set(gx.compress.FITS) == methods


# --------------------------------- bad input ---------------------------------


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_non_finite_weight_names_the_path(value):
  model = tiny.model('gemma3')
  params = tiny.params(model)
  w = _flat(params)[_PATH].at[200, 7].set(value)
  with pytest.raises(errors.NonFiniteError, match=f"'{_PATH}' holds NaN"):
    gx.compress(model, _with(params, _PATH, w), {_PATH: gx.Int(bits=8)})


def _without(params, path):
  flat = _flat(params)
  del flat[path]
  return traverse_util.unflatten_dict(flat, sep='/')


_BAD_PARAMS = {
  'missing': (
    lambda p: _without(p, _PATH),
    f"no '{_PATH}', which the model expects with shape .256, 128.",
  ),
  'empty': (lambda p: {}, 'no .*, which the model expects'),
  'transposed': (
    lambda p: _with(p, _PATH, jnp.zeros((128, 256))),
    r'shape \(128, 256\), the model expects \(256, 128\)',
  ),
  'scalar': (lambda p: _with(p, _PATH, 0.5), r'shape \(\), the model expects'),
  'another_family': (
    lambda p: tiny.params(tiny.model('gemma2')),
    'the model expects',
  ),
  'variables': (lambda p: {'params': p}, 'Are they the params of this model'),
  'compressed_already': (
    lambda p: _with(
      p, _PATH, {'codes': jnp.zeros((128, 256), jnp.int8), 'scale': 0}
    ),
    f"'{_PATH}' is compressed already",
  ),
}


@pytest.mark.parametrize('case', _BAD_PARAMS)
def test_params_of_something_else(case):
  change, message = _BAD_PARAMS[case]
  model = tiny.model('gemma3')
  params = change(tiny.params(model))
  with pytest.raises(errors.ParamsMismatchError, match=message):
    gx.compress(model, params, {_PATH: gx.Int(bits=8)})


def test_recipe_is_checked_before_the_params():
  model = tiny.model('gemma3')
  with pytest.raises(errors.UnmatchedRuleError, match='layer_0/mlp'):
    gx.compress(model, {}, {'layer_0/mpl': gx.Int(bits=8)})
  with pytest.raises(errors.RecipeError, match='layers that a model of 3'):
    gx.compress(model, {}, 'tssn-last-4')


def test_method_without_a_fit(monkeypatch):
  monkeypatch.delitem(gx.compress.FITS, gx.Int)
  model = tiny.model('gemma3')
  with pytest.raises(errors.RecipeError, match=r'Int\(.*Ternary'):
    gx.compress(model, tiny.params(model), {_PATH: gx.Int(bits=8)})


def test_model_that_is_none_of_gemma():
  with pytest.raises(errors.ParamsMismatchError, match='official Gemma model'):
    gx.compress(None, {}, 'int8')


def test_rows_keep_what_the_head_sees_of_them():
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.standard_normal((256, 128)), jnp.float32)
  mix = rng.standard_normal((128, 128)) * rng.uniform(0.2, 2, 128)
  slopes = jnp.asarray(mix @ mix.T, jnp.float32)
  site = gx.nn.Site(
    path='embedder/input_embedding',
    kind=gx.nn.Kind.EMBEDDING,
    layout=gx.nn.Layout(shape=(256, 128), in_axes=(1,)),
  )
  method = gx.Int(bits=3, group=32, scale='e4m3')
  fmt = gx.nn.format_of(method, 128)
  kept = {}
  for name, given in (('plain', None), ('kept', slopes)):
    leaf = gx.compress.compress_weight(
      w, site, method, hessian=slopes + jnp.eye(128), slopes=given
    )
    q = kernels.dequantize(leaf, fmt, 128, dtype=jnp.float32)
    kept[name] = float(jnp.sum(q * (w @ slopes)) / jnp.sum(w * (w @ slopes)))
  assert kept['plain'] < 0.995
  assert abs(kept['kept'] - 1) < 0.3 * (1 - kept['plain'])
