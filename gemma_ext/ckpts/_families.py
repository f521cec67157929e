# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""From what a checkpoint says to a model of `gm`, its class chosen for it."""

import dataclasses
from typing import Any

from flax import linen as nn
from gemma import gm
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.ckpts import _hparams
from gemma_ext.ckpts import _model_classes
from gemma_ext.ckpts import _model_json

Hparams = _hparams.Hparams
model_to_json = _model_json.model_to_json
model_from_json = _model_json.model_from_json

# Fields in which a file may differ from an official class and still be it:
# padding of the vocabulary, the layout of a weight, what only images use.
_LOOSE_FIELDS = (
  'num_embed',
  'transpose_gating_einsum',
  'vision_encoder',
  'audio_encoder',
  'use_bidirectional_attention',
)


def model_from_hparams(
  hparams: Hparams, dtype: Any = jnp.bfloat16
) -> nn.Module:
  """Returns the model that a checkpoint of these sizes belongs to.

  The official class (`gm.nn.Gemma3_270M()`) where its text configuration is
  the file's, with the file's vocabulary size where only that differs, else
  the generic class of the family.

  Args:
    hparams: Sizes and constants from the checkpoint.
    dtype: Parameter dtype of the model.

  Raises:
    UnsupportedTypeError: For Gemma 3n, whose sizes are more than `Hparams`.
  """
  family = _model_classes.FAMILIES[hparams.family]
  if hparams.family == 'gemma3n':
    raise errors.UnsupportedTypeError(
      'Gemma 3n is read from official checkpoints only; use'
      ' gm.ckpts.CheckpointPath.'
    )
  if hparams.family == 'gemma4':
    config = _gemma4_config(hparams)
  else:
    config = _dense_config(hparams)
  for cls in family.official:
    official = _model_classes.text_config(cls)
    loose = {
      name: getattr(official, name)
      for name in _LOOSE_FIELDS
      if hasattr(official, name)
    }
    if dataclasses.replace(config, **loose) == official:
      fitted = dataclasses.replace(official, num_embed=config.num_embed)
      return _model_classes.build(cls, fitted, dtype)
  return _model_classes.build(family.generic, config, dtype)


def tokenizer_class(model: nn.Module) -> type[gm.text.Tokenizer]:
  """Returns the `gm.text` tokenizer class of the model's family.

  Raises:
    UnsupportedTypeError: If the model is no Gemma Transformer.
  """
  return _model_classes.family_of(model).tokenizer


def _number(value: float) -> float:
  """Returns an int where the value is whole, as the official configs do."""
  return int(value) if float(value).is_integer() else float(value)


def _common(hparams: Hparams, config: Any) -> dict[str, Any]:
  types = config._modules.AttentionType  # pylint: disable=protected-access
  return {
    'num_embed': hparams.vocab_size,
    'embed_dim': hparams.embed_dim,
    'hidden_dim': hparams.hidden_dim,
    'num_heads': hparams.num_heads,
    'head_dim': hparams.head_dim,
    'num_kv_heads': hparams.num_kv_heads,
    'final_logit_softcap': hparams.final_softcap,
    'use_post_attn_norm': hparams.use_post_attn_norm,
    'use_post_ffw_norm': hparams.use_post_ffw_norm,
    'attention_types': tuple(
      types.LOCAL_SLIDING if t == _hparams.LOCAL else types.GLOBAL
      for t in hparams.attention_types
    ),
    'attn_logits_soft_cap': hparams.attn_softcap,
    'sliding_window_size': hparams.sliding_window,
    'local_base_frequency': _number(hparams.local_rope_base),
    'global_base_frequency': _number(hparams.global_rope_base),
    'local_scale_factor': float(hparams.local_rope_scale),
    'global_scale_factor': float(hparams.global_rope_scale),
  }


def _dense_config(hparams: Hparams) -> Any:
  config = _model_classes.dense_config
  scale = config.QueryPreAttentionNormalisation
  return config.TransformerConfig(
    **_common(hparams, config),
    query_pre_attn_norm=scale.BY_ONE_OVER_SQRT_HEAD_DIM
    if hparams.query_scale == 'head_dim'
    else scale.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
    transpose_gating_einsum=True,
    use_qk_norm=hparams.use_qk_norm,
  )


def _gemma4_config(hparams: Hparams) -> Any:
  config = _model_classes.gemma4_config
  sharing = None
  if hparams.num_kv_shared_layers:
    sharing = config.KVCacheSharingConfig(
      frac_shared_layers=_shared_fraction(
        hparams.num_kv_shared_layers, hparams.num_layers
      ),
      share_global=True,
      share_local=True,
    )
  moe = {}
  if hparams.num_experts:
    moe = {
      'enable_moe': True,
      'num_experts': hparams.num_experts,
      'expert_dim': hparams.expert_dim,
      'top_k_experts': hparams.top_k_experts,
      'moe_dense_hidden_dim': hparams.hidden_dim,
    }
  return config.TransformerConfig(
    **_common(hparams, config),
    qk_norm_with_scale=True,
    num_global_kv_heads=hparams.num_global_kv_heads,
    global_key_size=hparams.global_head_dim,
    k_eq_v_global=hparams.k_eq_v_global,
    global_rope_proportion=float(hparams.global_rope_proportion),
    local_rope_proportion=float(hparams.local_rope_proportion),
    per_layer_input_dim=hparams.per_layer_dim,
    kv_cache_sharing_config=sharing,
    override_kv_shared_ffw_hidden=hparams.shared_hidden_dim,
    **moe,
  )


def _shared_fraction(shared: int, layers: int) -> float:
  """Returns a fraction that the official code turns back into `shared`.

  It truncates `layers - fraction * layers`, which for some sizes is one layer
  off when the fraction is the plain quotient.
  """
  fraction = float(shared) / layers
  if int(layers - fraction * layers) != layers - shared:
    fraction = (shared - 0.5) / layers
  return fraction
