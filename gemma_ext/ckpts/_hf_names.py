# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face weight names, as a `TensorSource` for `_assemble`."""

from collections.abc import Mapping
import re

import ml_dtypes
import numpy as np

from gemma_ext import errors
from gemma_ext.ckpts import _assemble
from gemma_ext.ckpts import _safetensors

# Longest first. What wraps the text model differs by class and version.
_PREFIXES = (
  'model.language_model.model.',
  'language_model.model.',
  'model.language_model.',
  'language_model.',
  'model.',
  '',
)
_LAYER = re.compile(r'layers\.(0|[1-9]\d{0,3})\.(.+)')
_TOP = {
  'embed_tokens.weight': 'embed',
  'norm.weight': 'final_norm',
  'embed_tokens_per_layer.weight': 'per_layer_embed',
  'per_layer_model_projection.weight': 'per_layer_projection',
  'per_layer_projection_norm.weight': 'per_layer_projection_norm',
}
_IN_LAYER = {
  'self_attn.q_proj.weight': 'q',
  'self_attn.k_proj.weight': 'k',
  'self_attn.v_proj.weight': 'v',
  'self_attn.o_proj.weight': 'o',
  'self_attn.q_norm.weight': 'q_norm',
  'self_attn.k_norm.weight': 'k_norm',
  'mlp.gate_proj.weight': 'gate',
  'mlp.up_proj.weight': 'up',
  'mlp.down_proj.weight': 'down',
  'input_layernorm.weight': 'pre_attn_norm',
  'post_attention_layernorm.weight': 'post_attn_norm',
  'pre_feedforward_layernorm.weight': 'pre_ffw_norm',
  'post_feedforward_layernorm.weight': 'post_ffw_norm',
  'layer_scalar': 'skip_scale',
  'per_layer_input_gate.weight': 'per_layer_gate',
  'per_layer_projection.weight': 'per_layer_out',
  'post_per_layer_input_norm.weight': 'per_layer_norm',
  'router.proj.weight': 'router',
  'router.scale': 'router_scale',
  'router.per_expert_scale': 'expert_scale',
  'experts.gate_up_proj': 'experts_gate_up',
  'experts.down_proj': 'experts_down',
  'post_feedforward_layernorm_1.weight': 'dense_post_norm',
  'post_feedforward_layernorm_2.weight': 'moe_post_norm',
}
# In a mixture of experts, transformers calls the norm before the dense FFN as
# it is called without experts, and numbers that of the experts 2.
_IN_MOE_LAYER = _IN_LAYER | {
  'pre_feedforward_layernorm.weight': 'dense_pre_norm',
  'pre_feedforward_layernorm_2.weight': 'pre_ffw_norm',
}
_READ_AS_IS = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))


def canonical_name(name: str, *, is_moe: bool) -> str | None:
  """Returns the canonical name of a weight; `None` if it has none.

  Args:
    name: As the file has it, e.g. 'model.layers.3.mlp.up_proj.weight'.
    is_moe: Whether the model is a mixture of experts.
  """
  if name in ('lm_head.weight', 'language_model.lm_head.weight'):
    return 'output'
  for prefix in _PREFIXES:
    if name.startswith(prefix):
      rest = name.removeprefix(prefix)
      if rest in _TOP:
        return _TOP[rest]
      match = _LAYER.fullmatch(rest)
      if match:
        layer, rest = match.groups()
        known = _IN_MOE_LAYER if is_moe else _IN_LAYER
        return f'layer_{layer}/{known[rest]}' if rest in known else None
  return None


class HfSource:
  """Tensors of safetensors files under the canonical names of `_assemble`."""

  # Gemma 2 and 3 add the 1 in the model; Gemma 4 has none.
  norm_offset = 0.0

  def __init__(
    self, entries: Mapping[str, _safetensors.Entry], *, is_moe: bool
  ):
    """Gives the tensors of a checkpoint their canonical names.

    Args:
      entries: From `_safetensors.read_header` or `read_directory`.
      is_moe: Whether the model is a mixture of experts.

    Raises:
      HeaderError: If two tensors stand for the same weight.
    """
    self._entries: dict[str, _safetensors.Entry] = {}
    self._names: dict[str, str] = {}
    self._unknown: list[str] = []
    self._used: set[str] = set()
    for name, entry in entries.items():
      canonical = canonical_name(name, is_moe=is_moe)
      if canonical is None:
        self._unknown.append(name)
      elif canonical in self._entries:
        raise errors.HeaderError(
          f'{entry.path}: tensors {self._names[canonical]!r} and {name!r}'
          ' stand for the same weight.'
        )
      else:
        self._entries[canonical] = entry
        self._names[canonical] = name

  def has(self, name: str) -> bool:
    return name in self._entries

  def shape(self, name: str) -> tuple[int, ...]:
    self._used.add(name)
    return self._entries[name].shape

  def read(
    self, name: str, start: int = 0, stop: int | None = None
  ) -> np.ndarray:
    entry = self._entries[name]
    rows = _safetensors.read_rows(entry, start, stop, name=self._names[name])
    if rows.dtype not in _READ_AS_IS:
      rows = rows.astype(np.float32)
    return rows

  def unused(self) -> list[str]:
    unused = self._entries.keys() - self._used
    names = self._unknown + [self._names[n] for n in unused]
    return [n for n in names if not _assemble.is_harmless(n)]
