# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models as data: class name and text configuration, to JSON and back."""

from collections.abc import Mapping, Sequence
import dataclasses
import enum
from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.ckpts import _hparams
from gemma_ext.ckpts import _model_classes

_ENCODERS = ('vision_encoder', 'audio_encoder')
_LIMITS = _hparams.LIMITS
_INTS = {
  'num_embed': _LIMITS['vocab_size'],
  'embed_dim': _LIMITS['embed_dim'],
  'hidden_dim': _LIMITS['hidden_dim'],
  'num_heads': _LIMITS['num_heads'],
  'head_dim': _LIMITS['head_dim'],
  'num_kv_heads': _LIMITS['num_kv_heads'],
  'per_layer_input_dim': _LIMITS['per_layer_dim'],
  'num_experts': _LIMITS['num_experts'],
  'expert_dim': _LIMITS['expert_dim'],
  'top_k_experts': _LIMITS['top_k_experts'],
  'moe_dense_hidden_dim': (0, _LIMITS['hidden_dim'][1]),
  'num_altup_inputs': (1, 64),
  'laurel_rank': (1, 1 << 13),
}
_OPTIONAL_INTS = {
  'sliding_window_size': _LIMITS['sliding_window'],
  'num_global_kv_heads': _LIMITS['num_global_kv_heads'],
  'global_key_size': _LIMITS['global_head_dim'],
  'override_kv_shared_ffw_hidden': _LIMITS['shared_hidden_dim'],
}
_BOOLS = frozenset(
  (
    'use_post_attn_norm',
    'use_post_ffw_norm',
    'transpose_gating_einsum',
    'use_qk_norm',
    'qk_norm_with_scale',
    'use_value_norm',
    'k_eq_v_global',
    'enable_moe',
    'use_altup',
    'use_laurel',
    'scale_plus_one',
    'guard_against_excess_precision',
  )
)
_FLOATS = {
  'local_base_frequency': 1.0,
  'global_base_frequency': 1.0,
  'local_scale_factor': 1.0 - 1e-9,
  'global_scale_factor': 1.0 - 1e-9,
}
_OPTIONAL_FLOATS = frozenset(
  (
    'final_logit_softcap',
    'attn_logits_soft_cap',
    'altup_coef_clip',
    'global_rope_proportion',
    'local_rope_proportion',
  )
)


def model_to_json(model: nn.Module) -> dict[str, Any]:
  """Returns the class name and the text configuration of `model`.

  Media encoders are left out, and so are fields that a subclass adds to the
  official configuration.

  Args:
    model: An official or generic Gemma Transformer, or a subclass of one.

  Returns:
    `{'class': name, 'config': {field: value}}`, made of JSON types only.

  Raises:
    UnsupportedTypeError: If the model is no Gemma Transformer.
  """
  family = _model_classes.family_of(model)
  name = next(
    (
      cls.__name__
      for cls in type(model).__mro__
      if _model_classes.CLASSES.get(cls.__name__, (None,))[0] is cls
    ),
    family.generic.__name__,
  )
  fields = {}
  for field in dataclasses.fields(family.config.TransformerConfig):
    if field.name not in _ENCODERS:
      value = getattr(model.config, field.name)
      fields[field.name] = _to_json(field.name, value)
  return {'class': name, 'config': fields}


def model_from_json(
  data: Mapping[str, Any], *, dtype: Any = jnp.bfloat16
) -> nn.Module:
  """Builds the model that `model_to_json` described.

  Args:
    data: What `model_to_json` returned; read as data, nothing in it is run.
    dtype: Parameter dtype of the model.

  Raises:
    UnsupportedTypeError: If the class is not one that may be built.
    HeaderError: If a field is missing, unknown or of the wrong type.
    HeaderTooLargeError: If a size is beyond any Gemma.
  """
  if not isinstance(data, Mapping) or set(data) != {'class', 'config'}:
    raise errors.HeaderError(
      "A model is described by {'class', 'config'}, got"
      f' {sorted(map(str, data)) if isinstance(data, Mapping) else data!r}.'
    )
  name, fields = data['class'], data['config']
  if not isinstance(name, str) or name not in _model_classes.CLASSES:
    raise errors.UnsupportedTypeError(
      f'Unknown model class {name!r}; expected one of'
      f' {sorted(_model_classes.CLASSES)}.'
    )
  cls, family = _model_classes.CLASSES[name]
  if not isinstance(fields, Mapping):
    raise errors.HeaderError(f'The config of {name} is {fields!r}, no mapping.')
  known = {
    f.name: f
    for f in dataclasses.fields(family.config.TransformerConfig)
    if f.name not in _ENCODERS
  }
  unknown = sorted(map(str, set(fields) - set(known)))
  if unknown:
    raise errors.HeaderError(
      f'The config of {name} has unknown fields {unknown}; expected'
      f' {sorted(known)}.'
    )
  kwargs = {k: _from_json(k, v, family.config) for k, v in fields.items()}
  missing = sorted(
    k
    for k, f in known.items()
    if k not in kwargs and f.default is dataclasses.MISSING
  )
  if missing:
    raise errors.HeaderError(f'The config of {name} lacks {missing}.')
  config = family.config.TransformerConfig(**kwargs)
  _check_consistency(config)
  return _model_classes.build(cls, config, dtype)


def _check_consistency(config: Any) -> None:
  """Rejects what would only fail, obscurely, when the model is traced."""
  for kv_heads in (
    config.num_kv_heads,
    getattr(config, 'num_global_kv_heads', None),
  ):
    if kv_heads is not None and config.num_heads % kv_heads:
      raise errors.HeaderError(
        f'{config.num_heads} query heads do not divide over {kv_heads} key'
        ' heads.'
      )
  sparsity = getattr(config, 'activation_sparsity_pattern', None)
  if sparsity is not None and len(sparsity) != config.num_layers:
    raise errors.HeaderError(
      f'activation_sparsity_pattern has {len(sparsity)} entries for'
      f' {config.num_layers} layers.'
    )
  local = any(t.name == 'LOCAL_SLIDING' for t in config.attention_types)
  if local and config.sliding_window_size is None:
    raise errors.HeaderError(
      'The model has sliding-window layers but no sliding_window_size.'
    )


def _to_json(name: str, value: Any) -> Any:
  """Converts the value of a configuration field to JSON types."""
  if isinstance(value, enum.Enum):
    return value.name
  if dataclasses.is_dataclass(value):
    return {
      f.name: _to_json(f.name, getattr(value, f.name))
      for f in dataclasses.fields(value)
    }
  if isinstance(value, Sequence) and not isinstance(value, str):
    return [_to_json(name, v) for v in value]
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise errors.UnsupportedTypeError(
    f'Field {name} of the model configuration holds {type(value).__name__},'
    ' which has no JSON form here.'
  )


def _from_json(name: str, value: Any, config: Any) -> Any:
  """Checks and converts one configuration field; `config` is its module."""
  if name in _BOOLS:
    return _bool(name, value)
  if name in _INTS:
    return _hparams.check_int(name, value, _INTS[name])
  if name in _FLOATS:
    _hparams.check_float(name, value, above=_FLOATS[name])
    return value
  if value is None and name not in ('attention_types', 'query_pre_attn_norm'):
    return None
  if name in _OPTIONAL_INTS:
    return _hparams.check_int(name, value, _OPTIONAL_INTS[name])
  if name in _OPTIONAL_FLOATS:
    return _hparams.check_float(name, value)
  if name == 'attention_types':
    kinds = _list(name, value)
    _hparams.check_int('num_layers', len(kinds), _LIMITS['num_layers'])
    return tuple(
      _enum(name, v, config._modules.AttentionType)  # pylint: disable=protected-access
      for v in kinds
    )
  if name == 'query_pre_attn_norm':
    return _enum(name, value, config.QueryPreAttentionNormalisation)
  if name == 'activation_sparsity_pattern':
    return tuple(
      _hparams.check_float(name, v, above=-1e-9) for v in _list(name, value)
    )
  if name == 'use_bidirectional_attention':
    if value != 'vision':
      raise errors.HeaderError(f"{name} is {value!r}; expected 'vision'.")
    return value
  if name == 'kv_cache_sharing_config':
    return _sharing(value, config)
  raise errors.UnsupportedTypeError(
    f'This version cannot read the configuration field {name}; it knows the'
    ' fields of gemma 4.0.1.'
  )


def _sharing(value: Any, config: Any) -> Any:
  expected = {'frac_shared_layers', 'share_global', 'share_local'}
  if not isinstance(value, Mapping) or set(value) != expected:
    raise errors.HeaderError(
      f'kv_cache_sharing_config is {value!r}; expected {sorted(expected)}.'
    )
  fraction = _hparams.check_float(
    'frac_shared_layers', value['frac_shared_layers'], above=-1e-9
  )
  if fraction > 1.0:
    raise errors.HeaderError(
      f'frac_shared_layers is {fraction}; expected at most 1.'
    )
  return config.KVCacheSharingConfig(
    frac_shared_layers=fraction,
    share_global=_bool('share_global', value['share_global']),
    share_local=_bool('share_local', value['share_local']),
  )


def _bool(name: str, value: Any) -> bool:
  if not isinstance(value, bool):
    raise errors.HeaderError(f'{name} is {value!r}; expected true or false.')
  return value


def _list(name: str, value: Any) -> list[Any]:
  if not isinstance(value, (list, tuple)):
    raise errors.HeaderError(f'{name} is {value!r}; expected a list.')
  limit = _LIMITS['num_layers'][1]
  if len(value) > limit:
    raise errors.HeaderTooLargeError(
      f'{name} has {len(value)} entries; expected at most {limit}.'
    )
  return list(value)


def _enum(name: str, value: Any, kind: type[enum.Enum]) -> enum.Enum:
  if not isinstance(value, str) or value not in kind.__members__:
    raise errors.HeaderError(
      f'{name} is {value!r}; expected one of {sorted(kind.__members__)}.'
    )
  return kind[value]
