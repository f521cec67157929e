# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""From the `config.json` of Hugging Face `transformers` to `Hparams`.

Reads both the keys that checkpoints on the hub were published with and those
that transformers 5 writes. A value that the official modules cannot express is
an error, never ignored.
"""

from collections.abc import Callable, Mapping
import os
from typing import Any

from gemma_ext import errors
from gemma_ext.ckpts import _hparams
from gemma_ext.ckpts import _strict_json

CONFIG_NAME = 'config.json'

_MAX_BYTES = 4 << 20
_LOCAL_NAME = 'sliding_attention'
_GLOBAL_NAME = 'full_attention'
_FAMILIES = {
  'Gemma2ForCausalLM': 'gemma2',
  'Gemma3ForCausalLM': 'gemma3',
  'Gemma3ForConditionalGeneration': 'gemma3',
  'Gemma4ForCausalLM': 'gemma4',
  'Gemma4ForConditionalGeneration': 'gemma4',
}
# Published configurations leave out what has its default value. These are the
# defaults of transformers 5.23.
_DEFAULTS: dict[str, dict[str, Any]] = {
  'gemma2': {
    'vocab_size': 256_000,
    'sliding_window': 4096,
    'final_logit_softcapping': 30.0,
    'attn_logit_softcapping': 50.0,
  },
  'gemma3': {'vocab_size': 262_208, 'sliding_window': 4096},
  'gemma4': {
    'vocab_size': 262_144,
    'sliding_window': 512,
    'global_head_dim': 512,
    'hidden_size_per_layer_input': 256,
  },
}
_COMMON_DEFAULTS: dict[str, Any] = {
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 256,
  'query_pre_attn_scalar': 256,
}


def read(path: os.PathLike | str) -> _hparams.Hparams:
  """Reads a configuration file.

  Args:
    path: A `config.json`.

  Raises:
    MissingTensorError: If there is no such file, or a key is missing.
    HeaderError: If it is malformed.
    HeaderTooLargeError: If the file or a size in it is too large.
    UnsupportedTypeError: If the model is not one that can be loaded.
  """
  return parse(_strict_json.read_object(path, limit=_MAX_BYTES))


def parse(config: Mapping[str, Any]) -> _hparams.Hparams:
  """Converts a parsed configuration; raises as `read`."""
  family = _family(config)
  text = config.get('text_config', config)
  if not isinstance(text, Mapping):
    raise errors.HeaderError(f'text_config is {text!r:.100}, not an object.')
  _check_fixed(config, text)
  values = _Values(_COMMON_DEFAULTS | _DEFAULTS[family] | dict(text))
  types = _attention_types(values, family)
  common: dict[str, Any] = {
    'family': family,
    'vocab_size': values.int('vocab_size'),
    'embed_dim': values.int('hidden_size'),
    'hidden_dim': values.int('intermediate_size'),
    'num_heads': values.int('num_attention_heads'),
    'num_kv_heads': values.int('num_key_value_heads'),
    'head_dim': values.int('head_dim'),
    'attention_types': types,
    'sliding_window': values.optional('sliding_window'),
    'attn_softcap': values.optional('attn_logit_softcapping'),
    'final_softcap': values.optional('final_logit_softcapping'),
  }
  if family == 'gemma4':
    return _hparams.Hparams(**common, **_gemma4(values, types))
  return _hparams.Hparams(
    **common,
    **_rope(values, family),
    query_scale=_query_scale(values),
    use_qk_norm=family == 'gemma3',
  )


class _Values:
  """Looks values up, complaining in our own errors."""

  def __init__(self, config: Mapping[str, Any]):
    self._config = config

  def get(self, name: str, default: Any = None) -> Any:
    return self._config.get(name, default)

  def optional(self, name: str) -> Any:
    return self._config.get(name)

  def int(self, name: str, default: int | None = None) -> int:
    value = self._config.get(name, default)
    if value is None:
      raise errors.MissingTensorError(f'{CONFIG_NAME} lacks {name!r}.')
    if isinstance(value, bool) or not isinstance(value, int):
      raise errors.HeaderError(
        f'{CONFIG_NAME}: {name} is {value!r:.100}; expected an integer.'
      )
    return value

  def bool(self, name: str) -> bool:
    value = self._config.get(name)
    if value not in (True, False, None):
      raise errors.HeaderError(
        f'{CONFIG_NAME}: {name} is {value!r:.100}; expected true or false.'
      )
    return bool(value)


def _family(config: Mapping[str, Any]) -> str:
  architectures = config.get('architectures')
  if not isinstance(architectures, list) or len(architectures) != 1:
    raise errors.HeaderError(
      f'{CONFIG_NAME}: architectures is {architectures!r:.100}; expected a'
      ' list of one name.'
    )
  name = architectures[0]
  if not isinstance(name, str) or name not in _FAMILIES:
    raise errors.UnsupportedTypeError(
      f'{CONFIG_NAME}: architecture {name!r:.100} cannot be loaded; expected'
      f' one of {sorted(_FAMILIES)}.'
    )
  return _FAMILIES[name]


# What the official modules have built in: key -> (accepted, what they do).
_FIXED: dict[str, tuple[Callable[[Any], bool], str]] = {
  'rms_norm_eps': (lambda v: v == 1e-6, '1e-06'),
  'attention_bias': (lambda v: not v, 'no bias'),
  'tie_word_embeddings': (lambda v: v is True, 'tied embeddings'),
  'hidden_activation': (
    lambda v: v in (None, 'gelu_pytorch_tanh'),
    "'gelu_pytorch_tanh'",
  ),
  'use_bidirectional_attention': (
    lambda v: v in (None, False, 'vision'),
    'causal attention over text',
  ),
  'quantization_config': (
    lambda v: v is None,
    'weights as BF16 or another float type; export them unquantised',
  ),
}


def _check_fixed(config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
  """Refuses what the official modules do not compute."""
  for name, (accepts, expected) in _FIXED.items():
    for source in (config, text):
      if name in source and not accepts(source[name]):
        raise errors.UnsupportedTypeError(
          f'{CONFIG_NAME}: {name} is {source[name]!r:.100}; the official'
          f' Gemma modules compute {expected} only.'
        )


def _attention_types(values: _Values, family: str) -> tuple[str, ...]:
  num_layers = _hparams.check_int(
    'num_hidden_layers',
    values.int('num_hidden_layers'),
    _hparams.LIMITS['num_layers'],
  )
  types = values.get('layer_types')
  if types is None:
    default = 2 if family == 'gemma2' else 6
    name = 'sliding_window_pattern'
    period = values.int(name, values.int(f'_{name}', default))
    if period < 1:
      raise errors.HeaderError(f'{name} is {period}; expected at least 1.')
    types = [
      _LOCAL_NAME if (i + 1) % period else _GLOBAL_NAME
      for i in range(num_layers)
    ]
    if family == 'gemma4':
      types[-1] = _GLOBAL_NAME
  if not isinstance(types, list) or len(types) != num_layers:
    raise errors.HeaderError(
      f'{CONFIG_NAME}: layer_types must list all {num_layers} layers, got'
      f' {types!r:.100}.'
    )
  names = {_LOCAL_NAME: _hparams.LOCAL, _GLOBAL_NAME: _hparams.GLOBAL}
  for t in types:
    if not isinstance(t, str) or t not in names:
      raise errors.UnsupportedTypeError(
        f'{CONFIG_NAME}: layer type {t!r:.100}; expected one of'
        f' {sorted(names)}.'
      )
  return tuple(names[t] for t in types)


def _query_scale(values: _Values) -> str:
  scalar = values.get('query_pre_attn_scalar')
  if scalar == values.int('head_dim'):
    return 'head_dim'
  heads = values.int('num_attention_heads')
  if heads > 0 and scalar == values.int('hidden_size') // heads:
    return 'embed_per_head'
  raise errors.UnsupportedTypeError(
    f'{CONFIG_NAME}: query_pre_attn_scalar is {scalar!r:.100}; the official'
    ' modules scale queries by head_dim or hidden_size/num_attention_heads.'
  )


def _rope(values: _Values, family: str) -> dict[str, Any]:
  """Bases and scales of the positions of Gemma 2 and 3."""
  both = values.get('rope_parameters')
  if both is not None and not isinstance(both, Mapping):
    raise errors.HeaderError(
      f'{CONFIG_NAME}: rope_parameters is {both!r:.100}; expected an object.'
    )
  if both and (_LOCAL_NAME in both or _GLOBAL_NAME in both):
    local = both.get(_LOCAL_NAME) or {}
    full = both.get(_GLOBAL_NAME) or {}
  elif both:
    local = full = both
  else:
    scaling = values.get('rope_scaling') or {}
    if not isinstance(scaling, Mapping):
      raise errors.HeaderError(
        f'{CONFIG_NAME}: rope_scaling is {scaling!r:.100}.'
      )
    full = {'rope_theta': values.get('rope_theta')} | dict(scaling)
    # Only the global layers of Gemma 3 are interpolated; Gemma 2 has one base.
    local = (
      full
      if family == 'gemma2'
      else {'rope_theta': values.get('rope_local_base_freq')}
    )
  global_base = 10_000.0 if family == 'gemma2' else 1_000_000.0
  local_base, local_scale, _ = _rope_of(local, 10_000.0, ('default', 'linear'))
  base, scale, _ = _rope_of(full, global_base, ('default', 'linear'))
  return {
    'local_rope_base': local_base,
    'local_rope_scale': local_scale,
    'global_rope_base': base,
    'global_rope_scale': scale,
  }


def _rope_of(
  rope: Any, base: float, kinds: tuple[str, ...]
) -> tuple[float, float, float]:
  """Returns base, divisor of positions, and the share of a head rotated."""
  if not isinstance(rope, Mapping):
    raise errors.HeaderError(
      f'{CONFIG_NAME}: rope parameters are {rope!r:.100}, not an object.'
    )
  kind = rope.get('rope_type') or rope.get('type') or 'default'
  if kind not in kinds:
    raise errors.UnsupportedTypeError(
      f'{CONFIG_NAME}: rope type {kind!r:.100}; expected one of {kinds}.'
    )
  theta = rope.get('rope_theta')
  theta = base if theta is None else theta
  factor = rope.get('factor') if kind != 'default' else None
  factor = 1.0 if factor is None else factor
  share = rope.get('partial_rotary_factor') if kind == 'proportional' else None
  share = 1.0 if share is None else share
  return (
    _hparams.check_float('rope_theta', theta, above=1.0),
    _hparams.check_float('rope factor', factor),
    _hparams.check_float('partial_rotary_factor', share),
  )


def _gemma4(values: _Values, types: tuple[str, ...]) -> dict[str, Any]:
  """What only Gemma 4 has."""
  k_eq_v = values.bool('attention_k_eq_v')
  head_dim: int | None = values.int('global_head_dim')
  kv_heads = values.optional('num_global_key_value_heads') if k_eq_v else None
  per_layer = values.get('per_layer_config')
  if per_layer is not None:
    head_dim, kv_heads = _global_overrides(per_layer, types)
  per_layer_dim = values.int('hidden_size_per_layer_input')
  if per_layer_dim:
    vocab = values.int('vocab_size')
    rows = values.int('vocab_size_per_layer_input', vocab)
    if rows != vocab:
      raise errors.UnsupportedTypeError(
        f'{CONFIG_NAME}: vocab_size_per_layer_input is {rows}; the official'
        f' modules have as many rows as vocab_size, {vocab}.'
      )
  shared = values.int('num_kv_shared_layers', 0)
  double = values.bool('use_double_wide_mlp') and shared > 0
  out = {
    'use_qk_norm': True,
    'global_head_dim': head_dim,
    'num_global_kv_heads': kv_heads,
    'k_eq_v_global': k_eq_v,
    'per_layer_dim': per_layer_dim,
    'num_kv_shared_layers': shared,
    'shared_hidden_dim': 2 * values.int('intermediate_size')
    if double
    else None,
  }
  if values.bool('enable_moe_block'):
    out['num_experts'] = values.int('num_experts')
    out['top_k_experts'] = values.int('top_k_experts')
    out['expert_dim'] = values.int('moe_intermediate_size')
  rope = values.get('rope_parameters') or {
    _GLOBAL_NAME: {
      'rope_type': 'proportional',
      'partial_rotary_factor': 0.25,
    }
  }
  if not isinstance(rope, Mapping):
    raise errors.HeaderError(
      f'{CONFIG_NAME}: rope_parameters is {rope!r:.100}; expected an object.'
    )
  local = _rope_of(
    rope.get(_LOCAL_NAME) or {}, 10_000.0, ('default', 'proportional')
  )
  full = _rope_of(
    rope.get(_GLOBAL_NAME) or {}, 1_000_000.0, ('default', 'proportional')
  )
  for name, (base, scale, share) in (('local', local), ('global', full)):
    out[f'{name}_rope_base'] = base
    out[f'{name}_rope_scale'] = scale
    out[f'{name}_rope_proportion'] = share
  return out


def _global_overrides(
  per_layer: Any, types: tuple[str, ...]
) -> tuple[int | None, int | None]:
  """Head width and key heads that transformers 5 lists layer by layer."""
  expected = {str(i) for i, t in enumerate(types) if t == _hparams.GLOBAL}
  if not isinstance(per_layer, Mapping) or not all(
    isinstance(v, Mapping) and set(v) <= {'head_dim', 'num_key_value_heads'}
    for v in per_layer.values()
  ):
    raise errors.HeaderError(
      f'{CONFIG_NAME}: per_layer_config is {per_layer!r:.200}; expected'
      ' head_dim and num_key_value_heads by layer.'
    )
  overrides = [dict(v) for v in per_layer.values()]
  if overrides and (
    set(map(str, per_layer)) != expected
    or any(v != overrides[0] for v in overrides)
  ):
    raise errors.UnsupportedTypeError(
      f'{CONFIG_NAME}: per_layer_config differs between layers of one type,'
      ' which the official modules cannot express.'
    )
  first = overrides[0] if overrides else {}
  return first.get('head_dim'), first.get('num_key_value_heads')
