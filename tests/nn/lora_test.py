# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA on compressed models: official where it can, ours everywhere."""

import dataclasses

from absl import flags
from flax import traverse_util
from gemma import gm
from gemma import peft
import jax
import jax.numpy as jnp
from kauldron import kd
import numpy as np
import optax
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.kernels import _cpu
from tests import tiny

TOKENS = jnp.array([[2, 5, 6, 7, 8, 9, 10, 11]])
RECIPE = gx.Recipe.of(
  {
    r'layer_\d+/mlp2?': gx.Ternary(group=64),
    r'embedder': gx.Int(bits=8),
    r'.*': gx.Int(bits=4, group=32),
  }
)


def _setup(family, lora_class, rank=2):
  model = tiny.model(family)
  params = gx.compress(model, tiny.params(model), RECIPE)
  compressed = gx.nn.Compressed(model=model, recipe=RECIPE)
  lora = lora_class(rank=rank, model=compressed, dtype=jnp.float32)
  init = jax.jit(lora.init)(jax.random.key(0), TOKENS)['params']
  adapters = peft.split_params(init).lora
  return compressed, lora, params, adapters


def _paths(tree):
  return sorted(traverse_util.flatten_dict(tree, sep='/'))


def test_official_and_ours_have_the_same_paths_shapes_and_outputs():
  _, theirs, params, adapters = _setup('gemma3', gm.nn.LoRA)
  _, ours, _, other = _setup('gemma3', gx.nn.LoRA)
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(adapters) == shapes(other)
  assert len(_paths(adapters)) == 30  # 3 layers, 5 einsums, a and b.
  adapters = jax.tree.map(lambda x: x + 0.05, adapters)
  merged = {'params': peft.merge_params(params, adapters)}
  np.testing.assert_allclose(
    theirs.apply(merged, TOKENS).logits,
    ours.apply(merged, TOKENS).logits,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  'family, count',
  [('gemma2', 20), ('gemma4', 20), ('gemma4_moe', 24), ('gemma3n', 90)],
)
def test_ours_adapts_every_einsum_of_every_family(family, count):
  model = gx.nn.Compressed(model=tiny.model(family), recipe=RECIPE)
  lora = gx.nn.LoRA(rank=2, model=model)
  params = jax.eval_shape(lora.init, jax.random.key(0), TOKENS)['params']
  adapters = peft.split_params(params).lora
  assert len(_paths(adapters)) == count
  assert all('_LoRAEinsum_' in path for path in _paths(adapters))


def test_target_and_rank_are_not_taken_from_an_earlier_trace():
  model = gx.nn.Compressed(model=tiny.model('gemma4'), recipe=RECIPE)
  counts = []
  for rank, target in ((2, '.*'), (4, '.*'), (4, 'attn'), (2, 'mlp')):
    lora = gx.nn.LoRA(rank=rank, model=model, target=target)
    params = jax.eval_shape(lora.init, jax.random.key(0), TOKENS)['params']
    adapters = traverse_util.flatten_dict(
      peft.split_params(params).lora, sep='/'
    )
    ranks = {v.shape[-1] for k, v in adapters.items() if k.endswith('/a')}
    assert ranks == {rank}
    counts.append(len(adapters))
  assert counts == [20, 20, 12, 8]


def test_target_that_matches_nothing_is_an_error():
  model = gx.nn.Compressed(model=tiny.model('gemma4'), recipe=RECIPE)
  lora = gx.nn.LoRA(rank=2, model=model, target='attention')
  with pytest.raises(errors.UnmatchedRuleError, match='attention'):
    lora.init(jax.random.key(0), TOKENS)


@pytest.mark.parametrize('rank', [0, -1, 2.0, True])
def test_rank_that_is_no_positive_integer_is_an_error(rank):
  with pytest.raises(errors.RecipeError, match='rank'):
    gx.nn.LoRA(rank=rank, model=tiny.model('gemma3'))


@pytest.mark.parametrize(
  'family, lora_class',
  [('gemma3', gm.nn.LoRA), ('gemma3', gx.nn.LoRA), ('gemma4', gx.nn.LoRA)],
)
def test_optax_trains_adapters_on_a_frozen_packed_base(family, lora_class):
  compressed, lora, params, adapters = _setup(family, lora_class)
  optimizer = optax.adam(3e-3)

  def loss(adapters):
    merged = peft.merge_params(params, adapters)
    logits = lora.apply({'params': merged}, TOKENS[:, :-1]).logits
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, TOKENS[:, 1:]
    ).mean()

  @jax.jit
  def step(adapters, state):
    value, grads = jax.value_and_grad(loss)(adapters)
    updates, state = optimizer.update(grads, state)
    return value, optax.apply_updates(adapters, updates), state

  state = optimizer.init(adapters)
  values = []
  for _ in range(15):
    value, adapters, state = step(adapters, state)
    values.append(float(value))
  base = compressed.apply({'params': params}, TOKENS[:, :-1]).logits
  base = optax.softmax_cross_entropy_with_integer_labels(base, TOKENS[:, 1:])
  # B starts at zero: the first loss is that of the compressed model itself.
  np.testing.assert_allclose(values[0], base.mean(), rtol=1e-5)
  assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize(
  'family, lora_class', [('gemma3', gm.nn.LoRA), ('gemma4', gx.nn.LoRA)]
)
def test_kauldron_trains_with_partial_updates(family, lora_class, tmp_path):
  flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags.
  model = tiny.model(family)
  params = gx.compress(model, tiny.params(model), RECIPE)
  lora = lora_class(
    rank=2,
    model=gx.nn.Compressed(model=model, recipe=RECIPE),
    dtype=jnp.float32,
  )
  tokens = np.tile(np.asarray(TOKENS), (8, 1))
  trainer = kd.train.Trainer(
    seed=0,
    workdir=tmp_path,
    train_ds=kd.data.py.DataSource(
      data_source=[
        {'input': row[:-1], 'target': row[1:, None]} for row in tokens
      ],
      batch_size=8,
      shuffle=False,
      num_epochs=None,
      num_workers=0,
    ),
    model=lora,
    init_transform=gm.ckpts.SkipLoRA(wrapped=_Given(params)),
    num_train_steps=12,
    train_losses={
      'xentropy': kd.losses.SoftmaxCrossEntropyWithIntLabels(
        logits='preds.logits', labels='batch.target'
      )
    },
    optimizer=optax.chain(
      kd.optim.partial_updates(optax.adam(3e-3), mask=kd.optim.select('lora')),
      gx.nn.freeze_codes(),
    ),
  )
  state = trainer.init_state()
  _assert_base_is(params, state.params)
  losses = []
  batches = iter(trainer.train_ds)
  for _ in range(12):
    state, aux = trainer.trainstep.step(
      state, next(batches), return_losses=True
    )
    losses.append(float(aux.compute().loss_values['losses/xentropy']))
  assert losses[-1] < 0.85 * losses[0]
  trained = peft.split_params(state.params)
  _assert_base_is(params, state.params)
  kinds = {leaf.dtype for leaf in jax.tree.leaves(trained.original)}
  assert {jnp.dtype('uint8'), jnp.dtype('int8')} <= kinds
  moved = [
    np.abs(leaf).max()
    for path, leaf in traverse_util.flatten_dict(trained.lora).items()
    if path[-1] == 'b'
  ]
  assert min(moved) > 0


# --------------------------------- mixtures ----------------------------------


def _mixture(lora_class, **kwargs):
  """One layer of eight experts with adapters, one expert a token."""
  fields = {'num_experts': 8, 'top_k': 4} | kwargs
  recipe = gx.Recipe.of({'mlp': gx.MoE(**fields)})
  dense = tiny.shallow()
  params = tiny.routed(dense, recipe, TOKENS)
  router = params['layer_0']['mlp']['router']
  router['k'] = jnp.ones_like(router['k'])
  compressed = gx.nn.Compressed(model=dense, recipe=recipe)
  lora = lora_class(rank=2, model=compressed, dtype=jnp.float32)
  adapters = tiny.adapters(lora, TOKENS, within='/mlp/')
  return compressed, lora, params, adapters


def _logits(model, params, adapters=None):
  if adapters is not None:
    params = peft.merge_params(params, adapters)
  return np.asarray(model.apply({'params': params}, TOKENS).logits)


@pytest.mark.parametrize(
  'lora_class, router, shared',
  [
    (gx.nn.LoRA, 'norm', 0),
    (gx.nn.LoRA, 'softmax', 8),
    (gx.nn.LoRA, 'gate', 0),
    (gm.nn.LoRA, 'sigmoid', 0),
  ],
)
def test_adapters_of_a_mixture_are_those_of_its_weights(
  lora_class, router, shared
):
  compressed, lora, params, adapters = _mixture(
    lora_class, router=router, shared=shared
  )
  mlp = params['layer_0']['mlp']
  added = adapters['layer_0']['mlp']
  merged = dict(mlp)
  for name, eqn in (('gating_einsum', 'fr,rnh->nhf'), ('linear', 'hr,rf->hf')):
    pair = added[f'_LoRAEinsum_{name}']['lora']
    merged[name] = mlp[name] + jnp.einsum(eqn, pair['a'], pair['b'])
  merged = params | {'layer_0': params['layer_0'] | {'mlp': merged}}
  got, want = _logits(lora, params, adapters), _logits(compressed, merged)
  assert np.abs(want - _logits(compressed, params)).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize('router', ['norm', 'gate'])
def test_adapters_of_packed_experts_follow_the_choice(router, monkeypatch):
  compressed, lora, params, adapters = _mixture(
    gx.nn.LoRA, router=router, weights=gx.Int(bits=4, group=32)
  )
  merged = {'params': peft.merge_params(params, adapters)}
  _, sown = lora.apply(merged, TOKENS, mutable=['intermediates'])
  (routing,) = sown['intermediates']['layer_0']['mlp']['routing']
  unused = np.repeat(np.asarray(routing['load']) == 0, 256 // 8)
  assert unused.any() and not unused.all()
  down = adapters['layer_0']['mlp']['_LoRAEinsum_linear']['lora']
  a = down['a']

  def outputs():
    found = []
    for rows in (unused, ~unused):
      down['a'] = jnp.where(rows[:, None], a + 1, a)
      found.append(_logits(lora, params, adapters))
    down['a'] = a
    return _logits(lora, params, adapters), *found

  want, same, other = outputs()
  np.testing.assert_array_equal(same, want)
  assert np.abs(other - want).max() > 0.01
  assert np.abs(_logits(compressed, params) - want).max() > 0.1
  if _cpu.library() is None:
    return
  monkeypatch.setenv('GEMMA_EXT_BACKEND', 'cpu')
  jax.clear_caches()
  fused = outputs()
  jax.clear_caches()
  np.testing.assert_allclose(fused[0], want, atol=0.02 * np.abs(want).max())
  np.testing.assert_array_equal(fused[1], fused[0])
  np.testing.assert_allclose(fused[2], other, atol=0.02 * np.abs(other).max())


@pytest.mark.parametrize('how', ['offloaded', 'sharded'])
def test_adapters_that_no_expert_would_read_are_refused(how):
  compressed, _, params, _ = _mixture(gx.nn.LoRA)
  if how == 'offloaded':
    away, *_ = gx.nn.offload(compressed, params, slots=4)
  else:
    mesh = jax.make_mesh((4,), ('experts',))
    away, _ = gx.nn.shard_experts(compressed, params, mesh=mesh)
  with pytest.raises(errors.RecipeError, match="'layer_0/mlp/gating.*attn"):
    gx.nn.LoRA(rank=2, model=away).init(jax.random.key(0), TOKENS)


def _assert_base_is(params, actual):
  actual = traverse_util.flatten_dict(actual)
  for path, leaf in traverse_util.flatten_dict(params).items():
    np.testing.assert_array_equal(actual[path], leaf)


@dataclasses.dataclass(frozen=True, eq=False)
class _Given(kd.ckpts.InitTransform):
  """Starts from parameters that are in memory."""

  params: dict

  def transform(self, state):
    # The train step donates its state; the test goes on using these.
    return state.replace(params=jax.tree.map(jnp.copy, self.params))
