# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of packed weights with a correction of low rank."""

from flax import traverse_util
from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import train
from gemma_ext.compress import _heatmap
from gemma_ext.nn import _sites
from gemma_ext.train import _distill
from tests import tiny

_INT8 = gx.Int(bits=8, group=64)
_LOW_RANK = gx.LowRank(weights=gx.Int(bits=3, group=32), rank=8)
_LAYERS = r'layer_\d+/(attn|mlp)'
_RULES = {_LAYERS: _LOW_RANK, '.*': _INT8}


def _packed(family='gemma3', rules=None):
  """A model of a family, or of one layer, and its parameters."""
  model = tiny.model(family) if family else tiny.shallow()
  recipe = gx.Recipe.of(_RULES if rules is None else rules)
  dense = tiny.params(model)
  params = gx.compress(model, dense, recipe)
  return gx.nn.Compressed(model=model, recipe=recipe), params, dense


def _dense(model, params):
  """The weights, each with its correction added up by hand, by path."""
  flat = traverse_util.flatten_dict(tiny.unpacked(model, params), sep='/')
  for site, _ in gx.nn.methods_of(model.model, model.recipe).values():
    if site.role == 'base':
      base, down, up = (
        np.asarray(flat.pop(f'{site.whole}/{role}'), np.float64)
        for role in ('base', 'down', 'up')
      )
      product = up.reshape(-1, len(down)) @ down.reshape(len(down), -1)
      rows = product.reshape(*site.layout.rows, site.layout.cols)
      flat[site.whole] = base + site.layout.from_rows(rows)
  return flat


@pytest.mark.parametrize('family', ['gemma2', 'gemma3', 'gemma3n', 'gemma4'])
def test_equals_dense_weights_of_the_same_numbers(family):
  model, params, _ = _packed(family)
  tokens = jnp.asarray(
    np.random.default_rng(0).integers(0, tiny.VOCAB_SIZE, (2, 24))
  )
  got = model.apply({'params': params}, tokens).logits
  summed = jax.tree.map(jnp.float32, _dense(model, params))
  tree = traverse_util.unflatten_dict(summed, sep='/')
  want = model.model.apply({'params': tree}, tokens).logits
  without = traverse_util.unflatten_dict(
    {path: jnp.float32(leaf) for path, leaf in _base(model, params).items()},
    sep='/',
  )
  plain = model.model.apply({'params': without}, tokens).logits
  np.testing.assert_allclose(got, want, atol=2e-3, rtol=2e-3)
  assert float(jnp.max(jnp.abs(plain - want))) > 0.05


def _base(model, params):
  """The weights without their corrections, by path."""
  flat = traverse_util.flatten_dict(tiny.unpacked(model, params), sep='/')
  return {
    path.removesuffix('/base'): leaf
    for path, leaf in flat.items()
    if not path.endswith(('/down', '/up'))
  }


def _at(params, path):
  node = params
  for name in path.split('/'):
    node = node[name]
  return node


@pytest.mark.parametrize(
  'eqn, shape',
  [
    ('BTD,NDH->BTNH', (4, 96, 32)),
    ('...D,CKDH->...CKH', (2, 2, 96, 32)),
    ('BTNH,NHD->BTD', (4, 32, 96)),
    ('...F,NHF->...NH', (2, 64, 96)),
    ('...H,HF->...F', (64, 96)),
    # Rows apart from what is contracted: the weight is unpacked.
    ('BTD,NDH->BTNDH', (4, 96, 32)),
  ],
)
def test_einsums_are_those_of_the_dense_weight(eqn, shape):
  layout = _sites.einsum_layout(
    'BTD,NDH->BTNH' if eqn.endswith('NDH') else eqn, shape
  )
  site = _sites.Site(path='w', layout=layout, kind=_sites.Kind.EINSUM)
  w = 0.05 * jax.random.normal(jax.random.key(0), shape)
  weights = {}
  for part, method in gx.nn.split(site, _LOW_RANK):
    size = part.layout.shape
    numbers = (
      w
      if part.role == 'base'
      else 0.05 * jax.random.normal(jax.random.key(len(weights)), size)
    )
    weights[part.role] = gx.nn.PackedWeight(
      leaf=gx.compress.compress_weight(numbers, part, method),
      fmt=gx.nn.format_of(method, part.layout.cols),
      layout=part.layout,
      dtype=jnp.float32,
    )
  packed = gx.nn.PackedLowRank(**weights)
  assert packed.shape == shape and packed.ndim == len(shape)
  whole = packed.dequantize()
  without = weights['base'].dequantize()
  assert float(jnp.max(jnp.abs(whole - without))) > 1e-3
  np.testing.assert_array_equal(jnp.asarray(packed), whole)
  np.testing.assert_array_equal(packed[1], whole[1])
  inputs, letters, _ = _sites.split_equation(eqn)
  sizes = dict(zip(letters, shape, strict=True)) | {'B': 2, 'T': 3, '.': 1}
  lead = inputs.replace('...', 'BT')
  x = jax.random.normal(jax.random.key(9), tuple(sizes[c] for c in lead))
  got = packed.einsum(eqn, x)
  want = jnp.einsum(eqn, x, whole)
  assert got.dtype == x.dtype
  np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-3)


def test_the_samplers_run_it():
  model, params, _ = _packed()
  tokenizer = tiny.tokenizer(model.INFO.tokenizer_version)
  stream = gx.text.stream((model, params, tokenizer), 'A', max_new_tokens=4)
  list(stream)
  assert len(stream.tokens) == 4
  # With a cache, a token at a time, as in one go.
  tokens = jnp.array([[2, *stream.tokens[:3]]])
  sampler = gm.text.Sampler(
    model=model, params=params, tokenizer=tokenizer, cache_length=512
  )
  assert isinstance(sampler.sample('A', max_new_tokens=3), str)
  cache = model.init_cache(batch_size=1, dtype=jnp.float32, cache_length=8)
  last = None
  for i in range(tokens.shape[1]):
    mask = jnp.arange(8)[None, None] <= i
    out = model.apply(
      {'params': params},
      tokens[:, i : i + 1],
      positions=jnp.array([[i]]),
      attention_mask=mask,
      cache=cache,
    )
    cache, last = out.cache, out.logits[0, -1]
  want = model.apply({'params': params}, tokens).logits[0, -1]
  np.testing.assert_allclose(last, want, atol=5e-3, rtol=5e-3)


def test_saved_loaded_and_planned(tmp_path):
  model, params, _ = _packed()
  gx.ckpts.save(tmp_path / 'c', model=model, params=params)
  loaded = gx.ckpts.load(tmp_path / 'c', dtype=jnp.float32)
  assert loaded.recipe == model.recipe
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
  plan = gx.plan(model.model, model.recipe)
  nbytes = sum(x.nbytes for x in jax.tree.leaves(params))
  assert plan.nbytes == nbytes
  sizes = gx.evals.weight_sizes(loaded.model, loaded.params)
  assert sizes.weight_bytes == nbytes
  assert sizes.num_weights == plan.num_weights
  assert plan.num_weights == gx.plan(model.model, {'.*': _INT8}).num_weights
  rows = {row.path: row for row in plan.rows}
  assert rows['layer_0/mlp/linear/down'].shape == (8, 256)
  assert rows['layer_0/mlp/linear/up'].shape == (128, 8)
  assert rows['layer_0/mlp/linear/up'].size == 0
  site = {s.path: s for s in gx.nn.sites(model.model)}['layer_0/mlp/linear']
  assert gx.nn.nbytes_of(site, _LOW_RANK) == sum(
    rows[f'layer_0/mlp/linear/{role}'].nbytes for role in gx.nn.ROLES
  )


def test_ternary_weights_and_coarser_activations():
  rule = gx.LowRank(weights=gx.Ternary(planes=2, group=32), rank=8)
  model, params, _ = _packed('', rules={_LAYERS: rule, '.*': _INT8})
  tokens = jnp.array([[1, 5, 7]])
  logits = lambda m, p: m.apply({'params': p}, tokens).logits
  want = logits(model, params)
  latent = gx.nn.to_latent(model, params)
  back = gx.nn.from_latent(model, latent)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  np.testing.assert_allclose(logits(model, latent), want, atol=2e-3, rtol=2e-3)
  coarse = gx.nn.Compressed(
    model=model.model, recipe=model.recipe.with_x_bits(8)
  )
  got = logits(coarse, params)
  np.testing.assert_allclose(got, want, atol=0.1 * float(jnp.max(want)))
  draft, fewer = gx.nn.part(model, params, planes=1)
  assert draft.recipe.method_of('layer_0/mlp/linear').weights.planes == 1
  assert np.all(np.isfinite(logits(draft, fewer)))


def test_adapters_go_around_it():
  model, params, _ = _packed('')
  tokens = jnp.array([[1, 5, 7]])
  lora = gx.nn.LoRA(rank=2, model=model)
  both = lora.init(jax.random.key(0), tokens)['params']
  both = _merged(both, params)
  got = lora.apply({'params': both}, tokens).logits
  want = model.apply({'params': params}, tokens).logits
  # Fresh adapters change nothing.
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)

  def loss(adapters):
    out = lora.apply({'params': _merged(both, adapters)}, tokens).logits
    return jnp.sum(jnp.square(out))

  flat = traverse_util.flatten_dict(both, sep='/')
  adapters = {k: v for k, v in flat.items() if '/lora/' in k}
  found = jax.grad(loss)(traverse_util.unflatten_dict(adapters, sep='/'))
  assert any(np.any(x != 0) for x in jax.tree.leaves(found))


def _merged(tree, other):
  flat = traverse_util.flatten_dict(tree, sep='/')
  flat |= traverse_util.flatten_dict(other, sep='/')
  return traverse_util.unflatten_dict(flat, sep='/')


def test_energy_counts_weights_and_reads_all():
  model, params, _ = _packed('')
  found = gx.text.cost(model, params)
  plain, fewer, _ = _packed('', rules={_LAYERS: _LOW_RANK.weights, '.*': _INT8})
  less = gx.text.cost(plain, fewer)
  assert found.parameters == less.parameters
  assert found.nbytes > less.nbytes and found.operations > less.operations


def test_pictures_have_one_cell_for_both(tmp_path):
  pytest.importorskip('matplotlib')
  plan = gx.plan(tiny.model('gemma3'), _RULES)
  rows = {row.path: row for row in _heatmap._summed(plan)}
  path = 'layer_0/mlp/linear'
  assert not any(p.startswith(f'{path}/') for p in rows)
  parts = [row for row in plan.rows if row.path.startswith(f'{path}/')]
  assert rows[path].nbytes == sum(row.nbytes for row in parts)
  _heatmap.plot(plan, tmp_path / 'bits.png')
  assert (tmp_path / 'bits.png').read_bytes().startswith(b'\x89PNG')
  found = {row['path']: row for row in plan.to_json()['rows']}
  assert found[f'{path}/up']['group'] is None
  assert found[f'{path}/down']['group'] == 128


def test_split_and_join_are_inverse():
  model, *_ = _packed()
  methods = gx.nn.methods_of(model.model, model.recipe)
  joined = gx.nn.join(methods)
  assert joined['layer_0/mlp/linear'] == _LOW_RANK
  assert joined['embedder/input_embedding'] == _INT8
  assert not any(path.endswith('/base') for path in joined)


def test_drafts_of_fewer_layers_keep_corrections():
  model, params, _ = _packed()
  part, less = gx.nn.part(model, params, layers=[0, 2])
  tokens = jnp.array([[1, 5, 7]])
  assert part.recipe.method_of('layer_1/mlp/linear') == _LOW_RANK
  np.testing.assert_array_equal(
    less['layer_1']['mlp']['linear']['up']['codes'],
    params['layer_2']['mlp']['linear']['up']['codes'],
  )
  assert part.apply({'params': less}, tokens).logits.shape[:2] == (1, 3)


@pytest.fixture(name='folder', scope='module')
def _folder(tmp_path_factory):
  return tiny.folder(tmp_path_factory.mktemp('low_rank'), texts=3)


def _heal(folder, output, layers, *stages):
  return train.Heal(
    checkpoint=str(folder / 'dense'),
    recipe=gx.Recipe.of({layers: _LOW_RANK}),
    output=str(folder / output),
    cache=str(folder / 'cache'),
    text=str(folder / 'text_*.txt'),
    tokens=1024,
    window=64,
    fit_tokens=512,
    dtype='float32',
    stages=stages,
  )


def test_healing_sees_the_sum(folder):
  model, params, dense = _packed()
  flat = traverse_util.flatten_dict(params, sep='/')
  unpacked = _distill.unpack(flat, model=model)
  assert set(unpacked) == set(traverse_util.flatten_dict(dense, sep='/'))
  path = 'layer_1/mlp/gating_einsum'
  want = _dense(model, params)[path]
  np.testing.assert_allclose(unpacked[path], want, atol=1e-5)
  gradient = train.Gradient(steps=30, learning_rate=1e-2)
  config = _heal(
    folder,
    'healed',
    r'layer_\d+/mlp',
    train.Block(optimizer=gradient, batch_tokens=256, layers='layer_0'),
    train.Distill(optimizer=gradient, batch_windows=4, vocabulary=256),
  )
  run = train.heal(config)
  for record in run.log:
    assert record['held_out_after'] < record['held_out_before'], record
  back = gx.ckpts.load(folder / 'healed')
  assert back.recipe == config.recipe
  before, after = (
    _at(tree, 'layer_0/mlp/linear/up/codes')
    for tree in (
      gx.compress(run.dense.model, run.dense.params, config.recipe),
      back.params,
    )
  )
  assert before.shape == after.shape and not np.array_equal(before, after)


@pytest.mark.parametrize(
  'stage',
  [
    train.Block(optimizer=train.ClosedForm(), batch_tokens=256),
    train.Block(
      optimizer=train.Evolution(steps=2, population=4), batch_tokens=256
    ),
    train.Distill(optimizer=train.Mezo(steps=2), vocabulary=256),
  ],
  ids=['closed form', 'evolution', 'mezo'],
)
def test_only_gradients_heal_it(folder, stage):
  name = type(stage.optimizer).__name__
  config = _heal(folder, f'refused {name}', 'layer_0/mlp', stage)
  with pytest.raises(errors.TrainError, match='correction of low rank'):
    train.heal(config)


@pytest.mark.parametrize('weights', [_LOW_RANK.weights, gx.Ternary(group=32)])
def test_whole_numbers_that_move_have_all_their_parts(weights):
  rule = gx.LowRank(weights=weights, rank=8)
  model, params, dense = _packed('', rules={_LAYERS: rule, '.*': _INT8})
  moving, fixed = _distill.open_model(
    model, params, form='latent', dense=dense, integers='w'
  )
  path = 'layer_0/attn/q_einsum/w'
  moved = [p for p in moving if p.startswith(path)]
  assert len(moved) == (6 if isinstance(weights, gx.Int) else 0)
  both = _distill.unpack(fixed | moving, model=model)
  want = _distill.unpack(
    traverse_util.flatten_dict(params, sep='/'), model=model
  )
  np.testing.assert_allclose(both[path], want[path], atol=1e-5)


def test_what_can_have_none_is_an_error():
  model = tiny.model('gemma3')
  with pytest.raises(errors.RecipeError, match='is no weight of an einsum'):
    gx.plan(model, {'.*': _LOW_RANK})
  large = gx.LowRank(weights=_INT8, rank=128)
  with pytest.raises(errors.RecipeError, match='less than 128 outputs and 256'):
    gx.plan(model, {'layer_0/mlp/linear': large})
  packed, params, dense = _packed()
  again = {**dense, 'layer_0': params['layer_0']}
  with pytest.raises(errors.ParamsMismatchError, match='compressed already'):
    gx.compress(model, again, {_LAYERS: _INT8})
  with pytest.raises(errors.ParamsMismatchError, match="must be \\['base'"):
    params_of = {**params, 'layer_0': dense['layer_0']}
    packed.apply({'params': params_of}, jnp.array([[1]]))
  mlp = params['layer_0']['mlp']
  broken = {**mlp['linear'], 'up': mlp['linear']['down']}
  layer = {**params['layer_0'], 'mlp': {**mlp, 'linear': broken}}
  with pytest.raises(errors.ParamsMismatchError, match='linear/up'):
    packed.apply({'params': {**params, 'layer_0': layer}}, jnp.array([[1]]))
