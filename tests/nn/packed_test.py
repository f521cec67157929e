# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of `PackedWeight` and `packed_param`: einsums, look-ups, init."""

import math

from flax import linen as nn
from gemma.gm.utils import _dtype_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext.nn import _sites
from tests import tiny
from tests.kernels import packed_weights

_METHODS = {
  'ternary': gx.Ternary(group=16, planes=2),
  '5trit': gx.Ternary(group=32, packing='5trit'),
  'tied': gx.Ternary(group=8, planes=2, scale='ue5m3', tied=True),
  'int8': gx.Int(bits=8),
  'int4': gx.Int(bits=4, group=16),
  'int3': gx.Int(bits=3, group=32),
}


def _weight(shape, in_axes, method, dtype=jnp.float32, seed=0):
  """A random packed weight and what it stands for in float64."""
  layout = gx.nn.Layout(shape=shape, in_axes=in_axes)
  fmt = gx.nn.format_of(method, layout.cols)
  leaf = packed_weights.packed(fmt, layout.rows, layout.cols, seed)
  weight = gx.nn.PackedWeight(leaf=leaf, fmt=fmt, layout=layout, dtype=dtype)
  dense = packed_weights.dense(leaf, fmt, layout.cols)
  return weight, layout.from_rows(dense)


# ---------------------------------- einsums ----------------------------------

# Every equation of the official models, with the shapes of input and weight.
_EQUATIONS = {
  'BTD,NDH->BTNH': ((2, 3, 32), (4, 32, 5)),
  'BSD,CKDH->CBSKH': ((2, 3, 32), (2, 4, 32, 5)),
  'BTD,SNDH->SBTNH': ((2, 4, 32), (3, 5, 32, 6)),
  'BSD,KDH->BSKH': ((2, 3, 32), (4, 32, 5)),
  'BTNH,NHD->BTD': ((2, 3, 4, 16), (4, 16, 5)),
  '...F,NHF->...NH': ((2, 3, 32), (2, 5, 32)),
  '...F,NFH->...NH': ((2, 3, 32), (2, 32, 5)),
  '...H,HF->...F': ((2, 3, 32), (32, 5)),
  'gsd,de->gse': ((2, 3, 32), (32, 4)),
  'gecd,ekfd->kgecf': ((2, 3, 4, 32), (3, 2, 5, 32)),
  'gecf,efd->gecd': ((2, 3, 4, 32), (3, 32, 5)),
  '...td,dnp->...tnp': ((2, 3, 32), (32, 4, 5)),
  'btd,dr->btr': ((2, 3, 32), (32, 5)),
  '...D,DP->...P': ((2, 3, 32), (32, 5)),
  '...d,vd->...v': ((2, 3, 32), (7, 32)),
}


@pytest.mark.parametrize('method', ['ternary', 'int4'])
@pytest.mark.parametrize('eqn', _EQUATIONS)
def test_einsum(eqn, method):
  x_shape, shape = _EQUATIONS[eqn]
  layout = _sites.einsum_layout(eqn, shape)
  weight, dense = _weight(shape, layout.in_axes, _METHODS[method])
  x = np.random.default_rng(1).standard_normal(x_shape).astype(np.float32)
  got = jax.jit(lambda x: weight.einsum(eqn, x))(x)
  want = np.einsum(eqn, x.astype(np.float64), dense)
  assert got.shape == want.shape
  assert got.dtype == jnp.float32
  assert packed_weights.relative(got, want) < 1e-6


@pytest.mark.parametrize('lead', [(), (3,), (2, 1, 3), (1, 2, 1, 2)])
@pytest.mark.parametrize('eqn', ['...F,NHF->...NH', '...H,HF->...F'])
def test_einsum_of_any_leading_rank(eqn, lead):
  _, shape = _EQUATIONS[eqn]
  layout = _sites.einsum_layout(eqn, shape)
  weight, dense = _weight(shape, layout.in_axes, _METHODS['5trit'])
  rng = np.random.default_rng(1)
  x = rng.standard_normal((*lead, 32)).astype(np.float32)
  got = jax.jit(lambda x: weight.einsum(eqn, x))(x)
  want = np.einsum(eqn, x.astype(np.float64), dense)
  assert got.shape == want.shape
  assert packed_weights.relative(got, want) < 1e-6


def test_einsum_with_letters_in_any_order():
  # The output interleaves axes of both; the ellipsis takes unused letters.
  weight, dense = _weight((3, 32, 4), (1,), _METHODS['int8'])
  x = np.random.default_rng(1).standard_normal((2, 5, 32)).astype(np.float32)
  for eqn in ('abz,czd->dacb', '...az,bzc->b...ac'):
    got = jax.jit(lambda x, eqn=eqn: weight.einsum(eqn, x))(x)
    want = np.einsum(eqn, x.astype(np.float64), dense)
    assert got.shape == want.shape
    assert packed_weights.relative(got, want) < 1e-6


def test_einsum_in_bfloat16():
  weight, dense = _weight((4, 32, 5), (1,), _METHODS['int4'], jnp.bfloat16)
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.standard_normal((2, 3, 32)), jnp.bfloat16)
  got = jax.jit(lambda x: weight.einsum('BTD,NDH->BTNH', x))(x)
  assert got.dtype == jnp.bfloat16
  want = np.einsum('BTD,NDH->BTNH', np.asarray(x, np.float64), dense)
  assert packed_weights.relative(got, want) < 2**-8


# --------------------------- in place of an array ----------------------------


@pytest.mark.parametrize('method', _METHODS)
def test_dequantize(method):
  for shape, in_axes in [((4, 32, 5), (1,)), ((4, 16, 5), (0, 1))]:
    weight, dense = _weight(shape, in_axes, _METHODS[method])
    got = jax.jit(weight.dequantize)()
    assert (weight.shape, weight.ndim) == (shape, 3)
    assert (got.shape, got.dtype) == (shape, jnp.float32)
    assert packed_weights.relative(got, dense) < 1e-6


def test_code_that_expects_an_array_sees_the_dense_one():
  weight, dense = _weight((7, 32), (1,), _METHODS['int8'])
  x = np.random.default_rng(1).standard_normal((3, 7)).astype(np.float32)

  @jax.jit
  def run(x):
    return (
      x @ weight,
      jnp.einsum('...v,ve->...e', x, weight),  # As `encode_logits` does.
      jnp.sum(jnp.asarray(weight), axis=0),
      x.T + weight[:, :3],
    )

  got = run(x)
  want = (x @ dense, x @ dense, dense.sum(0), x.T + dense[:, :3])
  for a, b in zip(got, want, strict=True):
    assert a.shape == b.shape
    assert packed_weights.relative(a, b) < 1e-6


@pytest.mark.parametrize('method', _METHODS)
@pytest.mark.parametrize(
  'shape', [(11, 32), (11, 3, 32)], ids=['table', 'per_layer_table']
)
def test_look_up(shape, method):
  weight, dense = _weight(shape, (len(shape) - 1,), _METHODS[method])
  ids = jnp.array([[0, 10, 3], [3, 7, -1]])
  # As embedders write it, and as anybody would.
  for got in jax.jit(lambda ids: (weight[(ids,)], weight[ids]))(ids):
    assert got.shape == (2, 3, *shape[1:])
    assert packed_weights.relative(got, dense[np.asarray(ids)]) < 1e-6


def test_look_up_unpacks_only_the_rows_that_are_asked_for():
  weight, _ = _weight((512, 32), (1,), _METHODS['int4'])
  jaxpr = jax.make_jaxpr(lambda ids: weight[(ids,)])(jnp.arange(3))
  sizes = [
    math.prod(v.aval.shape)
    for eqn in jaxpr.jaxpr.eqns
    for v in eqn.outvars
    if jnp.issubdtype(v.aval.dtype, jnp.floating)
  ]
  assert 0 < max(sizes) <= 3 * 32


def test_look_up_along_other_axes():
  weight, dense = _weight((4, 32, 5), (1,), _METHODS['int8'])
  got = jax.jit(lambda: (weight[2], weight[1, :, 3], weight[..., 0]))()
  for a, b in zip(got, (dense[2], dense[1, :, 3], dense[..., 0]), strict=True):
    assert packed_weights.relative(a, b) < 1e-6


# --------------------------------- parameters --------------------------------

_LAYOUT = gx.nn.Layout(shape=(4, 64, 3), in_axes=(1,))


class _Module(nn.Module):
  method: gx.recipe.Method = _METHODS['int4']

  @nn.compact
  def __call__(self):
    weight = gx.nn.packed_param(
      self, 'w', layout=_LAYOUT, method=self.method, dtype=jnp.float32
    )
    self.param('other', nn.initializers.ones, (2,), jnp.float32)
    return weight.dequantize()


_DTYPES = {
  'ternary': jnp.uint8,
  '5trit': jnp.uint8,
  'tied': jnp.uint8,
  'int8': jnp.int8,
  'int4': jnp.uint8,
  'int3': jnp.uint8,
}


@pytest.mark.parametrize('method', _METHODS)
def test_init_ignores_the_type_that_is_asked_for(method):
  # What `Transformer` does around the init of all its parameters.
  with _dtype_params.initialize_param_with_dtype(jnp.float16):
    module = _Module(method=_METHODS[method])
    params = jax.eval_shape(module.init, jax.random.key(0))['params']
  fmt = gx.nn.format_of(_METHODS[method], 64)
  assert params['other'].dtype == jnp.float16
  assert params['w']['codes'].dtype == _DTYPES[method]
  assert params['w']['scale'].dtype == fmt.scale_dtype
  assert params['w']['codes'].shape == fmt.codes_shape((4, 3), 64)
  assert params['w']['scale'].shape == fmt.scale_shape((4, 3), 64)


@pytest.mark.parametrize('method', _METHODS)
def test_init_is_small_noise(method):
  module = _Module(method=_METHODS[method])

  @jax.jit
  def run(key):
    params = module.init(key)
    return params, module.apply(params)

  params, w = run(jax.random.key(0))
  assert len(np.unique(np.asarray(w))) > 2
  assert 0.003 < float(jnp.std(w)) < 0.03
  other, _ = run(jax.random.key(1))
  assert (params['params']['w']['codes'] != other['params']['w']['codes']).any()


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_init_inside_a_transformer(family):
  # Asks for bfloat16 everywhere; packed leaves must not follow.
  model = tiny.model(family, dtype=jnp.bfloat16)
  compressed = gx.nn.Compressed(
    model=model, recipe={'mlp2?': gx.Ternary(), '.*': gx.Int(bits=8)}
  )
  params = jax.eval_shape(
    compressed.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32)
  )['params']
  found = set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = path[-1].key
    mlp = any(key.key in ('mlp', 'mlp2') for key in path)
    if name == 'codes':
      assert leaf.dtype == (jnp.uint8 if mlp else jnp.int8), path
    elif 'altup' not in jax.tree_util.keystr(path):
      assert leaf.dtype == jnp.bfloat16, path
    found.add(str(leaf.dtype))
  assert {'uint8', 'int8', 'bfloat16'} <= found


def _leaf(**changes):
  fmt = gx.nn.format_of(_METHODS['int4'], 64)
  leaf = packed_weights.packed(fmt, (4, 3), 64)
  return {k: v for k, v in {**leaf, **changes}.items() if v is not None}


_BAD = {
  'dense': lambda: jnp.zeros((4, 64, 3)),
  'no_codes': lambda: _leaf(codes=None),
  'no_scale': lambda: _leaf(scale=None),
  'more_keys': lambda: _leaf(bias=jnp.zeros(3)),
  'nested_dense': lambda: {'w': jnp.zeros((4, 64, 3))},
  'codes_of_the_dense_layout': lambda: _leaf(
    codes=jnp.zeros((4, 32, 3), jnp.uint8)
  ),
  'codes_of_more_bits': lambda: _leaf(codes=jnp.zeros((4, 3, 64), jnp.uint8)),
  'codes_of_another_type': lambda: _leaf(codes=jnp.zeros((4, 3, 32), jnp.int8)),
  'latent_codes_cut': lambda: _leaf(codes=jnp.zeros((4, 3, 32))),
  'scale_of_another_group': lambda: _leaf(
    scale=jnp.zeros((4, 3, 2), jnp.bfloat16)
  ),
  'scale_integer': lambda: _leaf(scale=jnp.zeros((4, 3, 4), jnp.int32)),
  'scale_flat': lambda: _leaf(scale=jnp.zeros((48,), jnp.bfloat16)),
}


@pytest.mark.parametrize('case', _BAD)
def test_wrong_parameter(case):
  variables = {'params': {'w': _BAD[case](), 'other': jnp.ones(2)}}
  with pytest.raises(errors.ParamsMismatchError) as e:
    _Module().apply(variables)
  assert "'w'" in str(e.value)


def test_right_parameters():
  plain, nested = _leaf(), {'w': _leaf()}
  latent = _leaf()
  fmt = gx.nn.format_of(_METHODS['int4'], 64)
  unpacked = packed_weights.unpacked(latent, fmt, 64)
  latent['codes'] = jnp.asarray(unpacked, jnp.float32)
  want = _LAYOUT.from_rows(packed_weights.dense(plain, fmt, 64))
  # Nested as in some Gemma 4 checkpoints, and with latent codes.
  for leaf in (plain, nested, latent):
    got = _Module().apply({'params': {'w': leaf, 'other': jnp.ones(2)}})
    assert packed_weights.relative(got, want) < 1e-6


# ---------------------------------- formats ----------------------------------


def test_format_of_method():
  assert gx.nn.format_of(
    gx.Ternary(planes=3, group=128, packing='5trit'), 640
  ) == kernels.TernaryFormat(planes=3, group=128, packing='5trit')
  assert gx.nn.format_of(gx.Int(bits=5), 640) == kernels.IntFormat(
    bits=5, group=None
  )
  # 128 does not divide 1152 / 2 = 576, of which 96 is a divisor.
  assert gx.nn.format_of(gx.Ternary(group=128), 576).group == 96


def test_no_group_fits():
  with pytest.raises(errors.GroupSizeError, match='divides an input axis of'):
    gx.nn.format_of(gx.Int(bits=4, group=32), 131)


def test_no_group_fits_names_the_weight():
  recipe = gx.Recipe.of({'mlp': gx.Ternary(group=4)})
  with pytest.raises(errors.GroupSizeError, match='layer_0/mlp/gating_einsum'):
    gx.nn.methods_of(tiny.model('gemma3'), recipe)


def test_keep_has_no_format():
  with pytest.raises(errors.RecipeError, match='no packed format'):
    gx.nn.format_of(gx.Keep(), 128)


def test_activations_are_rounded_where_the_recipe_says_so(monkeypatch):
  monkeypatch.setenv('GEMMA_EXT_BACKEND', 'cpu')
  jax.clear_caches()
  model = tiny.model('gemma3')
  params = tiny.params(model)
  tokens = jnp.array([[2, 7, 9, 30]])
  logits = []
  for x_bits in (16, 8):
    recipe = gx.Recipe.of({'.*': gx.Int(bits=8, group=64, x_bits=x_bits)})
    packed = gx.compress(model, params, recipe)
    compressed = gx.nn.Compressed(model=model, recipe=recipe)
    logits.append(compressed.apply({'params': packed}, tokens).logits)
  jax.clear_caches()
  error = float(jnp.max(jnp.abs(logits[0] - logits[1])))
  assert 0 < error < 0.05 * float(jnp.max(jnp.abs(logits[0])))
