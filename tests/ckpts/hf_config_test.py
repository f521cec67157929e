# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""config.json -> Hparams -> model, of the hub and of transformers 5."""

import json

from gemma import gm
import pytest

from gemma_ext import errors
from gemma_ext.ckpts import _families
from gemma_ext.ckpts import _hf_config
from tests.ckpts import hf_fixtures

# The keys that matter of configurations published on the hub.
_GEMMA2_9B = {
  'architectures': ['Gemma2ForCausalLM'],
  'attention_bias': False,
  'attn_logit_softcapping': 50.0,
  'final_logit_softcapping': 30.0,
  'head_dim': 256,
  'hidden_act': 'gelu_pytorch_tanh',
  'hidden_activation': 'gelu_pytorch_tanh',
  'hidden_size': 3584,
  'intermediate_size': 14336,
  'model_type': 'gemma2',
  'num_attention_heads': 16,
  'num_hidden_layers': 42,
  'num_key_value_heads': 8,
  'query_pre_attn_scalar': 256,
  'rms_norm_eps': 1e-06,
  'rope_theta': 10000.0,
  'sliding_window': 4096,
  'vocab_size': 256000,
}
_GEMMA2_27B = _GEMMA2_9B | {
  'head_dim': 128,
  'hidden_size': 4608,
  'intermediate_size': 36864,
  'num_attention_heads': 32,
  'num_hidden_layers': 46,
  'num_key_value_heads': 16,
  'query_pre_attn_scalar': 144,
}
_GEMMA3_1B = {
  'architectures': ['Gemma3ForCausalLM'],
  'attention_bias': False,
  'attn_logit_softcapping': None,
  'final_logit_softcapping': None,
  'head_dim': 256,
  'hidden_activation': 'gelu_pytorch_tanh',
  'hidden_size': 1152,
  'intermediate_size': 6912,
  'model_type': 'gemma3_text',
  'num_attention_heads': 4,
  'num_hidden_layers': 26,
  'num_key_value_heads': 1,
  'query_pre_attn_scalar': 256,
  'rms_norm_eps': 1e-06,
  'rope_local_base_freq': 10000,
  'rope_scaling': None,
  'rope_theta': 1000000,
  'sliding_window': 512,
  'sliding_window_pattern': 6,
  'vocab_size': 262144,
}
_GEMMA3_27B = {
  'architectures': ['Gemma3ForConditionalGeneration'],
  'model_type': 'gemma3',
  'text_config': {
    'head_dim': 128,
    'hidden_size': 5376,
    'intermediate_size': 21504,
    'model_type': 'gemma3_text',
    'num_attention_heads': 32,
    'num_hidden_layers': 62,
    'num_key_value_heads': 16,
    'query_pre_attn_scalar': 168,
    'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
    'sliding_window': 1024,
  },
  'vision_config': {'hidden_size': 1152},
}
_GEMMA3_4B = {
  'architectures': ['Gemma3ForConditionalGeneration'],
  'text_config': {
    'hidden_size': 2560,
    'intermediate_size': 10240,
    'num_hidden_layers': 34,
    'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
    'sliding_window': 1024,
  },
}
_GEMMA4_31B = {
  'architectures': ['Gemma4ForConditionalGeneration'],
  'text_config': {
    'attention_k_eq_v': True,
    'final_logit_softcapping': 30.0,
    'global_head_dim': 512,
    'head_dim': 256,
    'hidden_size': 5376,
    'hidden_size_per_layer_input': 0,
    'intermediate_size': 21504,
    'num_attention_heads': 32,
    'num_global_key_value_heads': 4,
    'num_hidden_layers': 60,
    'num_key_value_heads': 16,
    'sliding_window': 1024,
    'use_bidirectional_attention': 'vision',
    'vocab_size': 262144,
  },
}
_GEMMA4_E2B = {
  'architectures': ['Gemma4ForConditionalGeneration'],
  'text_config': {
    'final_logit_softcapping': 30.0,
    'hidden_size': 1536,
    'hidden_size_per_layer_input': 256,
    'intermediate_size': 6144,
    'layer_types': (['sliding_attention'] * 4 + ['full_attention']) * 7,
    'num_attention_heads': 8,
    'num_hidden_layers': 35,
    'num_key_value_heads': 1,
    'num_kv_shared_layers': 20,
    'sliding_window': 512,
    'use_double_wide_mlp': True,
    'vocab_size_per_layer_input': 262144,
  },
}
_GEMMA4_26B_A4B = {
  'architectures': ['Gemma4ForConditionalGeneration'],
  'text_config': {
    'attention_k_eq_v': True,
    'enable_moe_block': True,
    'final_logit_softcapping': 30.0,
    'hidden_size': 2816,
    'hidden_size_per_layer_input': 0,
    'intermediate_size': 2112,
    'moe_intermediate_size': 704,
    'num_attention_heads': 16,
    'num_experts': 128,
    'num_global_key_value_heads': 2,
    'num_hidden_layers': 30,
    'num_key_value_heads': 8,
    'sliding_window': 1024,
    'top_k_experts': 8,
  },
}


@pytest.mark.parametrize(
  'config, cls',
  [
    (_GEMMA2_9B, gm.nn.Gemma2_9B),
    (_GEMMA2_27B, gm.nn.Gemma2_27B),
    (_GEMMA3_1B, gm.nn.Gemma3_1B),
    (_GEMMA3_4B, gm.nn.Gemma3_4B),
    (_GEMMA3_27B, gm.nn.Gemma3_27B),
    (_GEMMA4_31B, gm.nn.Gemma4_31B),
    (_GEMMA4_E2B, gm.nn.Gemma4_E2B),
    (_GEMMA4_26B_A4B, gm.nn.Gemma4_26B_A4B),
  ],
  ids=lambda v: v.__name__ if isinstance(v, type) else '',
)
def test_published_configs_give_the_official_class(config, cls):
  model = _families.model_from_hparams(_hf_config.parse(config))
  assert type(model) is cls


def test_defaults_of_the_format():
  hparams = _hf_config.parse(_GEMMA3_4B)
  assert hparams.vocab_size == 262_208
  assert (hparams.num_heads, hparams.num_kv_heads) == (8, 4)
  assert hparams.attention_types.count('global') == 5
  assert (hparams.local_rope_scale, hparams.global_rope_scale) == (1.0, 8.0)
  assert (hparams.local_rope_base, hparams.global_rope_base) == (1e4, 1e6)


def test_old_and_new_keys_agree():
  new = {
    k: v
    for k, v in _GEMMA3_1B.items()
    if k not in ('rope_theta', 'rope_local_base_freq', 'rope_scaling')
  } | {
    'rope_parameters': {
      'full_attention': {'rope_type': 'default', 'rope_theta': 1e6},
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
    },
    'layer_types': [
      'full_attention' if i % 6 == 5 else 'sliding_attention' for i in range(26)
    ],
  }
  assert _hf_config.parse(new) == _hf_config.parse(_GEMMA3_1B)


def test_per_layer_config_and_global_keys_agree():
  new = json.loads(json.dumps(_GEMMA4_31B))
  text = new['text_config']
  del text['global_head_dim'], text['num_global_key_value_heads']
  text['per_layer_config'] = {
    str(i): {'head_dim': 512, 'num_key_value_heads': 4} for i in range(5, 60, 6)
  }
  assert _hf_config.parse(new) == _hf_config.parse(_GEMMA4_31B)


_E, _U, _M = (
  errors.HeaderError,
  errors.UnsupportedTypeError,
  errors.MissingTensorError,
)
_BAD = {
  'architecture_unknown': ({'architectures': ['LlamaForCausalLM']}, _U),
  'architecture_gemma1': ({'architectures': ['GemmaForCausalLM']}, _U),
  'architecture_missing': ({'architectures': None}, _E),
  'text_config_not_an_object': ({'text_config': 3}, _E),
  'hidden_size_missing': ({'hidden_size': None}, _M),
  'hidden_size_a_string': ({'hidden_size': '1152'}, _E),
  'hidden_size_zero': ({'hidden_size': 0}, _E),
  'hidden_size_huge': (
    {'hidden_size': 1 << 40},
    errors.HeaderTooLargeError,
  ),
  'layers_huge': (
    {'num_hidden_layers': 1 << 40},
    errors.HeaderTooLargeError,
  ),
  'layer_types_too_few': ({'layer_types': ['full_attention']}, _E),
  'layer_types_unknown': ({'layer_types': ['mamba'] * 26}, _U),
  'pattern_zero': ({'sliding_window_pattern': 0}, _E),
  'heads_do_not_divide': ({'num_key_value_heads': 3}, _E),
  'query_scale_unknown': ({'query_pre_attn_scalar': 100}, _U),
  'norm_epsilon': ({'rms_norm_eps': 1e-5}, _U),
  'attention_bias': ({'attention_bias': True}, _U),
  'untied': ({'tie_word_embeddings': False}, _U),
  'activation': ({'hidden_activation': 'silu'}, _U),
  'bidirectional': ({'use_bidirectional_attention': True}, _U),
  'quantised': ({'quantization_config': {'bits': 4}}, _U),
  'rope_type': ({'rope_scaling': {'rope_type': 'yarn'}}, _U),
  'rope_theta_infinite': ({'rope_theta': 1e300}, _E),
  'rope_factor_below_one': (
    {'rope_scaling': {'rope_type': 'linear', 'factor': 0.5}},
    _E,
  ),
  'rope_not_an_object': ({'rope_parameters': 'x'}, _E),
  'window_a_float': ({'sliding_window': 1.5}, _E),
}


@pytest.mark.parametrize('case', sorted(_BAD))
def test_bad_config(case):
  change, error = _BAD[case]
  with pytest.raises(error) as e:
    _hf_config.parse(_GEMMA3_1B | change)
  assert e.type is error


@pytest.mark.parametrize(
  'change, error',
  [
    ({'vocab_size_per_layer_input': 100}, _U),
    ({'num_kv_shared_layers': 34}, _U),
    ({'enable_moe_block': True}, _M),
    ({'enable_moe_block': 'yes'}, _E),
    ({'per_layer_config': {'0': {'head_dim': 512}}}, _U),
    ({'per_layer_config': {'0': {'sliding_window': 1}}}, _E),
    ({'per_layer_config': [1]}, _E),
    ({'rope_parameters': [1]}, _E),
  ],
)
def test_bad_gemma4_config(change, error):
  text = _GEMMA4_E2B['text_config'] | change
  with pytest.raises(error):
    _hf_config.parse(_GEMMA4_E2B | {'text_config': text})


def test_file_missing(tmp_path):
  with pytest.raises(errors.MissingTensorError):
    _hf_config.read(tmp_path / 'config.json')


def test_file_too_large(tmp_path, monkeypatch):
  monkeypatch.setattr(_hf_config, '_MAX_BYTES', 100)
  path = hf_fixtures.DATA / 'gemma2' / 'config.json'
  with pytest.raises(errors.HeaderTooLargeError):
    _hf_config.read(path)


def test_duplicate_key(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text('{"hidden_size": 1, "hidden_size": 2}')
  with pytest.raises(errors.HeaderError, match='twice'):
    _hf_config.read(path)
