# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of `sites`: which weights there are and which axes are contracted."""

from gemma import gm
from gemma.gm.nn.gemma4 import _layers as gemma4_layers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.nn import _sites
from tests import tiny

_TOKENS = jnp.array([[2, 5, 6, 7]])

_EMBEDDER = {'embedder/input_embedding': ((512, 128), (1,))}
_ATTN = {
  'attn/q_einsum/w': ((4, 128, 32), (1,)),
  'attn/kv_einsum/w': ((2, 2, 128, 32), (2,)),
  'attn/attn_vec_einsum/w': ((4, 32, 128), (0, 1)),
}
_ONE_KV_HEAD = _ATTN | {'attn/kv_einsum/w': ((2, 1, 128, 32), (2,))}
# Gemma 4's global layers: heads of 64; where k is also v there is one einsum.
_GLOBAL = {
  'attn/q_einsum/w': ((4, 128, 64), (1,)),
  'attn/kv_einsum/w': ((2, 1, 128, 64), (2,)),
  'attn/attn_vec_einsum/w': ((4, 64, 128), (0, 1)),
}
_K_IS_V = {
  'attn/q_einsum/w': ((4, 128, 64), (1,)),
  'attn/k_einsum/w': ((1, 128, 64), (1,)),
  'attn/attn_vec_einsum/w': ((4, 64, 128), (0, 1)),
}


def _mlp(hidden=256, name='mlp', features_last=True):
  shape = (2, hidden, 128) if features_last else (2, 128, hidden)
  return {
    f'{name}/gating_einsum': (shape, (2,) if features_last else (1,)),
    f'{name}/linear': ((hidden, 128), (0,)),
  }


_PER_LAYER_3N = {
  'embedder/per_layer_input_embedding': ((512, 4, 32), (2,)),
  'embedder/per_layer_input_projection/w': ((128, 4, 32), (0,)),
}
_PER_LAYER_4 = {
  'embedder/per_layer_embeddings': ((512, 4, 32), (2,)),
  'embedder/per_layer_model_projection/w': ((128, 4, 32), (0,)),
}
_ALTUP = {
  f'{name}_{i}/{name}_{i}': ((128, 128), (0,))
  for name in ('altup_projection', 'altup_unembed_projection')
  for i in range(3)
}
_BLOCK_3N = {
  **_ATTN,
  **_mlp(),
  'altup/modality_router/w': ((128, 4), (0,)),
  'laurel/linear_left/w': ((128, 16), (0,)),
  'laurel/linear_right/w': ((16, 128), (0,)),
  'per_layer_mapping/per_layer_input_gate/w': ((128, 32), (0,)),
  'per_layer_mapping/per_layer_projection/w': ((32, 128), (0,)),
}
_PER_LAYER_BLOCK = {
  'per_layer_input_gate/w': ((128, 32), (0,)),
  'per_layer_projection/w': ((32, 128), (0,)),
}
_EXPERTS = {
  **_mlp(name='mlp2'),
  'mlp/router_logits/w': ((128, 4), (0,)),
  'mlp/gating_einsum/w': ((4, 2, 128, 128), (3,)),
  'mlp/linear/w': ((4, 128, 128), (1,)),
}


def _layers(*blocks):
  return {
    f'layer_{i}/{name}': value
    for i, block in enumerate(blocks)
    for name, value in block.items()
  }


_EXPECTED = {
  'gemma2': {**_EMBEDDER, **_layers(*[_ATTN | _mlp(features_last=False)] * 2)},
  'gemma3': {**_EMBEDDER, **_layers(*[_ONE_KV_HEAD | _mlp()] * 3)},
  'gemma3n': {
    **_EMBEDDER,
    **_PER_LAYER_3N,
    **_ALTUP,
    **_layers(*[_BLOCK_3N] * 4),
  },
  'gemma4': {**_EMBEDDER, **_layers(_ATTN | _mlp(), _K_IS_V | _mlp())},
  'gemma4_e2b': {
    **_EMBEDDER,
    **_PER_LAYER_4,
    **_layers(
      _ONE_KV_HEAD | _mlp() | _PER_LAYER_BLOCK,
      _GLOBAL | _mlp() | _PER_LAYER_BLOCK,
      _ONE_KV_HEAD | _mlp(512) | _PER_LAYER_BLOCK,
      _GLOBAL | _mlp(512) | _PER_LAYER_BLOCK,
    ),
  },
  'gemma4_moe': {
    **_EMBEDDER,
    **_layers(_ATTN | _EXPERTS, _K_IS_V | _EXPERTS),
  },
}
# Layers that take keys and values from an earlier one make none in Gemma 3n; in
# Gemma 4 they make them all the same.
_KV_SHARED = {'gemma3n': (2, 3)}


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_exact_sites(family):
  expected = dict(_EXPECTED[family])
  for i in _KV_SHARED.get(family, ()):
    expected.pop(f'layer_{i}/attn/kv_einsum/w')
  found = {
    s.path: (s.layout.shape, s.layout.in_axes)
    for s in gx.nn.sites(tiny.model(family))
  }
  assert found == expected


def test_number_of_sites():
  counts = {f: len(gx.nn.sites(tiny.model(f))) for f in tiny.FAMILIES}
  assert counts == {
    'gemma2': 1 + 2 * 5,
    'gemma3': 1 + 3 * 5,
    'gemma3n': 3 + 6 + 2 * 10 + 2 * 9,
    'gemma4': 1 + 2 * 5,
    'gemma4_e2b': 3 + 4 * 7,
    'gemma4_moe': 1 + 2 * 8,
  }


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_kinds(family):
  for site in gx.nn.sites(tiny.model(family)):
    if site.path.split('/')[-1] in (
      'input_embedding',
      'per_layer_embeddings',
      'per_layer_input_embedding',
    ):
      assert site.kind == gx.nn.Kind.EMBEDDING
    elif family == 'gemma4_moe' and site.path.endswith(
      ('/mlp/gating_einsum/w', '/mlp/linear/w')
    ):
      assert site.kind == gx.nn.Kind.EXPERTS
    else:
      assert site.kind == gx.nn.Kind.EINSUM


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_shapes_are_those_of_the_parameters(family):
  model = tiny.model(family)
  params = jax.eval_shape(model.init, jax.random.key(0), _TOKENS)['params']
  for site in gx.nn.sites(model):
    leaf = params
    for key in site.path.split('/'):
      leaf = leaf[key]
    assert leaf.shape == site.layout.shape
    assert site.layout.size == leaf.size
    assert np.prod(site.layout.rows) * site.layout.cols == leaf.size


# ---------------------------------- layouts ----------------------------------

_LAYOUTS = [
  ((4, 6, 5), (1,)),
  ((2, 3, 6, 5), (2,)),
  ((4, 5, 6), (0, 1)),
  ((2, 6, 7), (2,)),
  ((2, 6, 7), (1,)),
  ((7, 6), (0,)),
  ((7, 6), (1,)),
  ((3, 2, 5, 6), (3,)),
  ((3, 5, 6), (1,)),
]


@pytest.mark.parametrize('shape,in_axes', _LAYOUTS)
def test_layout_round_trip(shape, in_axes):
  layout = gx.nn.Layout(shape=shape, in_axes=in_axes)
  w = np.arange(np.prod(shape)).reshape(shape)
  rows = layout.to_rows(w)
  assert rows.shape == layout.rows + (layout.cols,)
  np.testing.assert_array_equal(layout.from_rows(rows), w)
  # A row is what one output of the layer is the product with.
  index = tuple(slice(None) if i in in_axes else 0 for i in range(len(shape)))
  first = rows.reshape(-1, layout.cols)[0]
  np.testing.assert_array_equal(first, w[index].ravel())


@pytest.mark.parametrize('shape,in_axes', [((12, 5), (0,)), ((2, 5, 8), (2,))])
def test_layout_in_slices(shape, in_axes):
  layout = gx.nn.Layout(shape=shape, in_axes=in_axes, slices=4)
  w = np.arange(np.prod(shape)).reshape(shape)
  rows = layout.to_rows(w)
  assert rows.shape == layout.rows + (layout.cols,)
  assert rows.shape == (4, *layout.uncut.rows, layout.uncut.cols // 4)
  np.testing.assert_array_equal(layout.from_rows(rows), w)
  # Of planes as of a weight.
  whole = layout.uncut.to_rows(w)
  np.testing.assert_array_equal(layout.cut(np.stack([whole] * 3))[1], rows)
  # A slice is a run of neighbouring inputs.
  third = np.split(np.moveaxis(w, in_axes[0], -1), 4, axis=-1)[2]
  np.testing.assert_array_equal(rows[2], third)


def test_layout_of_another_shape():
  layout = gx.nn.Layout(shape=(4, 6), in_axes=(0,))
  with pytest.raises(errors.ShapeError, match=r'\(6, 4\), expected \(4, 6\)'):
    layout.to_rows(np.zeros((6, 4)))


@pytest.mark.parametrize(
  'eqn,shape,in_axes',
  [
    ('BTD,NDH->BTNH', (4, 128, 32), (1,)),
    ('BTNH,NHD->BTD', (4, 32, 128), (0, 1)),
    ('...F,NHF->...NH', (2, 256, 128), (2,)),
    ('...F,NFH->...NH', (2, 128, 256), (1,)),
    ('gecd,ekfd->kgecf', (4, 2, 64, 128), (3,)),
    (' ... D , D P -> ... P ', (128, 8), (0,)),
    # Letters mean nothing: the same einsum spelt differently.
    ('xyz,azb->xyab', (4, 128, 32), (1,)),
  ],
)
def test_axes_are_derived_from_the_equation(eqn, shape, in_axes):
  layout = _sites.einsum_layout(eqn, shape)
  assert (layout.shape, layout.in_axes) == (shape, in_axes)


@pytest.mark.parametrize(
  'eqn,shape',
  [
    ('BTD,NDH->BTNH', (4, 128)),
    ('BTD,NH->BTDNH', (4, 128)),
    ('BTD,BTD->BTD', (2, 3, 4)),
    ('BTD,NDH', (4, 128, 32)),
    ('BTD->BT', (4, 128, 32)),
    ('AB,BC,CD->AD', (4, 128)),
    ('AB,...BC->AC', (4, 128)),
    ('', (4, 128)),
  ],
)
def test_equation_that_contracts_nothing(eqn, shape):
  with pytest.raises(errors.ShapeError, match='[Ee]quation'):
    _sites.einsum_layout(eqn, shape)


# ------------------------------ other modalities -----------------------------


def test_clipped_einsums_are_not_sites():
  assert not issubclass(gemma4_layers.ClippedEinsum, _sites.EINSUMS)


@pytest.mark.parametrize(
  'model,kinds',
  [
    (gm.nn.Gemma3_4B(), ('vision_encoder', 'mm_')),
    (gm.nn.Gemma4_E2B(text_only=False), ('vision_encoder', 'audio_', 'mm_')),
  ],
  ids=['gemma3', 'gemma4'],
)
def test_towers_and_their_projections_are_not_sites(model, kinds):
  assert not any(_sites.is_text(f'embedder/{kind}x/w') for kind in kinds)
  paths = [s.path for s in gx.nn.sites(model)]
  assert len(paths) > 5 * model.config.num_layers
  for path in paths:
    assert not any(part.startswith(kinds) for part in path.split('/')), path
    assert path.startswith(('embedder/', 'layer_')), path


# ---------------------------------- tracing ----------------------------------


def test_tracing_leaves_nothing_behind():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  compute = lambda: np.asarray(model.apply({'params': params}, _TOKENS).logits)
  _sites._sites.cache_clear()
  found = gx.nn.sites(model)
  # The first trace of the model itself comes after that of its probe.
  first = compute()
  _sites._sites.cache_clear()
  assert gx.nn.sites(model) == found
  np.testing.assert_array_equal(compute(), first)
  assert model == tiny.model('gemma3')
  reference = tiny.model('gemma3').clone(return_last_only=True)
  last = reference.apply({'params': params}, _TOKENS).logits
  np.testing.assert_allclose(last, first[:, -1], atol=1e-5)


def test_sites_of_a_compressed_model_are_those_of_the_dense_one():
  model = tiny.model('gemma4')
  compressed = gx.nn.Compressed(model=model, recipe='int8')
  assert gx.nn.sites(compressed.model) == gx.nn.sites(model)


def test_param_hook_goes_away():
  asked = []

  class Module(gm.nn.Embedder):
    def setup(self):
      with _sites.param_hook(self, lambda name, shape: asked.append(name)):
        super().setup()
      assert 'param' not in vars(self)

    def __call__(self, x):
      return self.encode(x)

  module = Module(vocab_size=8, embed_dim=4)
  jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), int))
  assert asked == ['input_embedding']
