# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of hyper-parameters, the choice of class, and models as JSON."""

import dataclasses
import json

from gemma import gm
import jax.numpy as jnp
import pytest

from gemma_ext import errors
from gemma_ext.ckpts import _families
from gemma_ext.ckpts import _model_classes
from tests import tiny

_OFFICIAL = tuple(
  cls for family in _model_classes.FAMILIES.values() for cls in family.official
)
_LOCAL5 = ('local',) * 5 + ('global',)
_SIZES = {
  'Gemma2_2B': dict(embed=2304, hidden=9216, heads=8, kv=4, head=256, n=26),
  'Gemma2_9B': dict(embed=3584, hidden=14336, heads=16, kv=8, head=256, n=42),
  'Gemma2_27B': dict(embed=4608, hidden=36864, heads=32, kv=16, head=128, n=46),
  'Gemma3_270M': dict(embed=640, hidden=2048, heads=4, kv=1, head=256, n=18),
  'Gemma3_1B': dict(embed=1152, hidden=6912, heads=4, kv=1, head=256, n=26),
  'Gemma3_4B': dict(embed=2560, hidden=10240, heads=8, kv=4, head=256, n=34),
  'Gemma3_12B': dict(embed=3840, hidden=15360, heads=16, kv=8, head=256, n=48),
  'Gemma3_27B': dict(embed=5376, hidden=21504, heads=32, kv=16, head=128, n=62),
}


def _dense(name: str, **changes) -> _families.Hparams:
  """The published sizes of Gemma 2 and 3, as a checkpoint states them."""
  s = _SIZES[name]
  is_2 = name.startswith('Gemma2')
  pattern = ('local', 'global') if is_2 else _LOCAL5
  large = name in ('Gemma3_4B', 'Gemma3_12B', 'Gemma3_27B')
  values = dict(
    family='gemma2' if is_2 else 'gemma3',
    vocab_size=256_000 if is_2 else 262_144,
    embed_dim=s['embed'],
    hidden_dim=s['hidden'],
    num_heads=s['heads'],
    num_kv_heads=s['kv'],
    head_dim=s['head'],
    attention_types=(pattern * s['n'])[: s['n']],
    sliding_window=4096 if is_2 else 1024 if large else 512,
    query_scale='embed_per_head' if '27B' in name else 'head_dim',
    attn_softcap=50.0 if is_2 else None,
    final_softcap=30.0 if is_2 else None,
    global_rope_base=10_000.0 if is_2 else 1_000_000.0,
    global_rope_scale=8.0 if large else 1.0,
    use_qk_norm=not is_2,
  )
  return _families.Hparams(**(values | changes))


def _gemma4(**changes) -> _families.Hparams:
  values = dict(
    family='gemma4',
    vocab_size=262_144,
    embed_dim=1536,
    hidden_dim=6144,
    num_heads=8,
    num_kv_heads=1,
    head_dim=256,
    global_head_dim=512,
    attention_types=(('local',) * 4 + ('global',)) * 7,
    sliding_window=512,
    final_softcap=30.0,
    global_rope_base=1_000_000.0,
    use_qk_norm=True,
    per_layer_dim=256,
    num_kv_shared_layers=20,
    shared_hidden_dim=12288,
  )
  return _families.Hparams(**(values | changes))


@pytest.mark.parametrize('name', _SIZES)
def test_published_sizes_give_official_class(name):
  model = _families.model_from_hparams(_dense(name))
  assert type(model) is getattr(gm.nn, name)
  assert model.config.vision_encoder is None
  expected = 256_000 if name.startswith('Gemma2') else 262_144
  assert model.config.num_embed == expected
  if name == 'Gemma3_270M':
    assert model == gm.nn.Gemma3_270M()


@pytest.mark.parametrize(
  ('name', 'changes'),
  [
    ('Gemma4_E2B', {}),
    (
      'Gemma4_E4B',
      dict(
        embed_dim=2560,
        hidden_dim=10240,
        num_kv_heads=2,
        attention_types=_LOCAL5 * 7,
        num_kv_shared_layers=18,
        shared_hidden_dim=None,
      ),
    ),
    (
      'Gemma4_31B',
      dict(
        embed_dim=5376,
        hidden_dim=21504,
        num_heads=32,
        num_kv_heads=16,
        num_global_kv_heads=4,
        k_eq_v_global=True,
        attention_types=_LOCAL5 * 10,
        sliding_window=1024,
        per_layer_dim=0,
        num_kv_shared_layers=0,
        shared_hidden_dim=None,
      ),
    ),
    (
      'Gemma4_26B_A4B',
      dict(
        embed_dim=2816,
        hidden_dim=2112,
        num_heads=16,
        num_kv_heads=8,
        num_global_kv_heads=2,
        k_eq_v_global=True,
        attention_types=_LOCAL5 * 5,
        sliding_window=1024,
        per_layer_dim=0,
        num_kv_shared_layers=0,
        shared_hidden_dim=None,
        num_experts=128,
        expert_dim=704,
        top_k_experts=8,
      ),
    ),
  ],
)
def test_published_gemma4_sizes_give_official_class(name, changes):
  model = _families.model_from_hparams(_gemma4(**changes))
  assert type(model) is getattr(gm.nn, name)
  assert model == getattr(gm.nn, name)(text_only=True)


def test_other_sizes_give_generic_class():
  model = _families.model_from_hparams(
    _dense('Gemma3_270M', embed_dim=128), jnp.float32
  )
  assert type(model) is _model_classes.Gemma3
  assert model.config.embed_dim == 128
  assert model.dtype == jnp.float32
  assert model.INFO.tokenizer_version == 3
  assert _families.tokenizer_class(model) is gm.text.Gemma3Tokenizer


def test_every_shared_layer_count_survives_the_official_rounding():
  config = _model_classes.gemma4_config
  for layers in range(3, 80):
    for shared in range(1, layers - 1):
      fraction = _families._shared_fraction(shared, layers)
      own = int(layers - fraction * layers)
      assert own == layers - shared, (layers, shared)
  model = _families.model_from_hparams(_gemma4())
  pattern = config.create_kv_cache_sharing_patterns(
    model.config.kv_cache_sharing_config, 35, model.config.attention_types
  )
  assert pattern[:15] == list(range(15))
  assert set(pattern[15:]) == {13, 14}


@pytest.mark.parametrize('cls', _OFFICIAL, ids=lambda c: c.__name__)
def test_official_models_survive_json(cls):
  kwargs = {'text_only': True} if hasattr(cls, 'text_only') else {}
  model = cls(**kwargs)
  data = json.loads(json.dumps(_families.model_to_json(model)))
  assert data['class'] == cls.__name__
  assert _families.model_from_json(data) == model


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_user_models_survive_json(family):
  model = tiny.model(family)
  data = json.loads(json.dumps(_families.model_to_json(model)))
  back = _families.model_from_json(data, dtype=jnp.float32)
  assert back.config == model.config
  assert back.dtype == jnp.float32
  assert issubclass(type(model), type(back))


def test_added_config_fields_are_ignored():
  base = gm.nn.Gemma3_270M()

  @dataclasses.dataclass(frozen=True)
  class WithRecipe(_model_classes.dense_config.TransformerConfig):
    recipe: object = None

  fields = {
    f.name: getattr(base.config, f.name)
    for f in dataclasses.fields(base.config)
  }
  model = gm.nn.Gemma3_270M(config=WithRecipe(**fields, recipe=object()))
  assert _families.model_to_json(model) == _families.model_to_json(base)


def test_multimodal_model_becomes_text_only():
  data = _families.model_to_json(gm.nn.Gemma3_4B())
  assert 'vision_encoder' not in data['config']
  assert _families.model_from_json(data) == gm.nn.Gemma3_4B(text_only=True)


def _json(**changes):
  data = json.loads(json.dumps(_families.model_to_json(gm.nn.Gemma4_E2B())))
  return {'class': data['class'], 'config': data['config'] | changes}


@pytest.mark.parametrize(
  ('data', 'error'),
  [
    ([], errors.HeaderError),
    ({'class': 'Gemma3_270M'}, errors.HeaderError),
    ({'class': 'os.system', 'config': {}}, errors.UnsupportedTypeError),
    ({'class': 3, 'config': {}}, errors.UnsupportedTypeError),
    ({'class': 'Gemma3', 'config': []}, errors.HeaderError),
    ({'class': 'Gemma3', 'config': {}}, errors.HeaderError),
    (_json(recipe={}), errors.HeaderError),
    (_json(vision_encoder={}), errors.HeaderError),
    (_json(num_embed=10**12), errors.HeaderTooLargeError),
    (_json(num_embed=-1), errors.HeaderError),
    (_json(num_embed=True), errors.HeaderError),
    (_json(num_embed='4'), errors.HeaderError),
    (_json(num_heads=7, num_kv_heads=2), errors.HeaderError),
    (_json(attention_types=['GLOBAL'] * 100_000), errors.HeaderTooLargeError),
    (_json(attention_types=['SIDEWAYS']), errors.HeaderError),
    (_json(attention_types=None), errors.HeaderError),
    (_json(final_logit_softcap=float('nan')), errors.HeaderError),
    (_json(global_scale_factor=0.5), errors.HeaderError),
    (_json(local_base_frequency=10**400), errors.HeaderError),
    (_json(kv_cache_sharing_config={'frac': 1}), errors.HeaderError),
    (_json(enable_moe=1), errors.HeaderError),
    (_json(sliding_window_size=None), errors.HeaderError),
    (_json(use_bidirectional_attention='audio'), errors.HeaderError),
  ],
)
def test_bad_json(data, error):
  with pytest.raises(error):
    _families.model_from_json(data)


@pytest.mark.parametrize(
  ('changes', 'error'),
  [
    (dict(family='llama'), errors.UnsupportedTypeError),
    (dict(embed_dim=1 << 30), errors.HeaderTooLargeError),
    (dict(embed_dim=0), errors.HeaderError),
    (dict(embed_dim=4.0), errors.HeaderError),
    (dict(num_heads=4, num_kv_heads=3), errors.HeaderError),
    (dict(head_dim=255), errors.HeaderError),
    (dict(attention_types=()), errors.HeaderError),
    (dict(attention_types=('left',)), errors.HeaderError),
    (dict(attention_types=_LOCAL5 * 100), errors.HeaderTooLargeError),
    (dict(sliding_window=None), errors.HeaderError),
    (dict(query_scale='one'), errors.HeaderError),
    (dict(final_softcap=float('inf')), errors.HeaderError),
    (dict(global_rope_scale=0.25), errors.HeaderError),
    (dict(global_rope_base=0.0), errors.HeaderError),
  ],
)
def test_bad_hparams(changes, error):
  with pytest.raises(error):
    _dense('Gemma3_270M', **changes)


@pytest.mark.parametrize(
  ('changes', 'error'),
  [
    (dict(num_kv_shared_layers=34), errors.UnsupportedTypeError),
    (dict(num_kv_shared_layers=19), errors.UnsupportedTypeError),
    (dict(num_experts=4), errors.HeaderError),
    (
      dict(num_experts=4, expert_dim=8, top_k_experts=5),
      errors.HeaderError,
    ),
    (dict(global_rope_proportion=1.5), errors.HeaderError),
  ],
)
def test_bad_gemma4_hparams(changes, error):
  with pytest.raises(error):
    _gemma4(**changes)


def test_gemma3n_is_not_built_from_hparams():
  with pytest.raises(errors.UnsupportedTypeError, match='official'):
    _families.model_from_hparams(_dense('Gemma3_270M', family='gemma3n'))


def test_model_of_another_kind():
  with pytest.raises(errors.UnsupportedTypeError, match='no Gemma model'):
    _families.model_to_json(object())
