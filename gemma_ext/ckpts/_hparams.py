# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Hparams`: what a checkpoint says about its model, checked and bounded."""

import dataclasses
import math

from gemma_ext import errors

FAMILIES = ('gemma2', 'gemma3', 'gemma3n', 'gemma4')
LOCAL = 'local'
GLOBAL = 'global'

# Far above every released Gemma, and low enough that no size taken from a
# file can make a shape whose product overflows or a loop that never ends.
LIMITS = {
  'vocab_size': (1, 1 << 22),
  'embed_dim': (1, 1 << 16),
  'hidden_dim': (1, 1 << 19),
  'num_layers': (1, 512),
  'num_heads': (1, 1024),
  'num_kv_heads': (1, 1024),
  'head_dim': (2, 1 << 13),
  'sliding_window': (1, 1 << 24),
  'global_head_dim': (2, 1 << 13),
  'num_global_kv_heads': (1, 1024),
  'per_layer_dim': (0, 1 << 13),
  'num_kv_shared_layers': (0, 512),
  'shared_hidden_dim': (1, 1 << 19),
  'num_experts': (0, 1 << 12),
  'expert_dim': (0, 1 << 17),
  'top_k_experts': (0, 1 << 12),
}
_FLOAT_LIMIT = 1e9


def check_int(name: str, value: object, limits: tuple[int, int]) -> int:
  """Returns `value` if it is an integer within `limits`, both included.

  Raises:
    HeaderError: If it is no integer, or too small.
    HeaderTooLargeError: If it is too large.
  """
  low, high = limits
  if isinstance(value, bool) or not isinstance(value, int):
    raise errors.HeaderError(
      f'{name} is {value!r}; expected an integer in [{low}, {high}].'
    )
  if value > high:
    raise errors.HeaderTooLargeError(
      f'{name} is {value}; no Gemma has more than {high}. The checkpoint is'
      ' damaged or not a Gemma.'
    )
  if value < low:
    raise errors.HeaderError(f'{name} is {value}; expected at least {low}.')
  return value


def check_float(name: str, value: object, *, above: float = 0.0) -> float:
  """Returns `value` as a finite float above `above`.

  Raises:
    HeaderError: If it is no number, not finite, or out of range.
  """
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise errors.HeaderError(f'{name} is {value!r}; expected a number.')
  try:
    number = float(value)
  except OverflowError as e:
    raise errors.HeaderError(f'{name} is too large for a float.') from e
  if not math.isfinite(number) or not above < number <= _FLOAT_LIMIT:
    raise errors.HeaderError(
      f'{name} is {value!r}; expected a number above {above} and at most'
      f' {_FLOAT_LIMIT:g}.'
    )
  return number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hparams:
  """Sizes and constants of a Gemma text model, as its checkpoint gives them.

  Attributes:
    family: One of `FAMILIES`.
    vocab_size: Rows of the embedding table in the file.
    embed_dim: Width of the residual stream.
    hidden_dim: Hidden width of the dense FFN (the shared FFN of a MoE).
    num_heads: Query heads.
    num_kv_heads: Key and value heads (of the sliding layers, for Gemma 4).
    head_dim: Width of a head (of the sliding layers, for Gemma 4).
    attention_types: 'local' or 'global' for each layer.
    sliding_window: Positions that a local layer sees, its own included.
    query_scale: 'head_dim' for 1/sqrt(head_dim), 'embed_per_head' for
      1/sqrt(embed_dim / num_heads). Gemma 4 has no query scale and ignores it.
    attn_softcap: Cap of the attention logits, or `None`.
    final_softcap: Cap of the output logits, or `None`.
    local_rope_base: RoPE base of local layers.
    global_rope_base: RoPE base of global layers.
    local_rope_scale: Position divisor of local layers.
    global_rope_scale: Position divisor of global layers.
    use_qk_norm: Whether queries and keys are RMS-normalised.
    use_post_attn_norm: Whether attention has an output norm.
    use_post_ffw_norm: Whether the FFN has an output norm.
    global_head_dim: Gemma 4: head width of global layers, `None` for head_dim.
    num_global_kv_heads: Gemma 4: key heads of global layers, `None` for
      num_kv_heads.
    k_eq_v_global: Gemma 4: global layers use keys as values.
    global_rope_proportion: Gemma 4: rotated share of a global head.
    local_rope_proportion: Gemma 4: rotated share of a local head.
    per_layer_dim: Gemma 4 E models: width of a per-layer embedding, 0 without.
    num_kv_shared_layers: Gemma 4: last layers that reuse earlier keys, values.
    shared_hidden_dim: Gemma 4: FFN width of those layers, `None` for the same.
    num_experts: Gemma 4 MoE: experts per layer, 0 without.
    expert_dim: Gemma 4 MoE: hidden width of an expert.
    top_k_experts: Gemma 4 MoE: experts that a token goes through.
  """

  family: str
  vocab_size: int
  embed_dim: int
  hidden_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  attention_types: tuple[str, ...]
  sliding_window: int | None = None
  query_scale: str = 'head_dim'
  attn_softcap: float | None = None
  final_softcap: float | None = None
  local_rope_base: float = 10_000.0
  global_rope_base: float = 10_000.0
  local_rope_scale: float = 1.0
  global_rope_scale: float = 1.0
  use_qk_norm: bool = False
  use_post_attn_norm: bool = True
  use_post_ffw_norm: bool = True
  global_head_dim: int | None = None
  num_global_kv_heads: int | None = None
  k_eq_v_global: bool = False
  global_rope_proportion: float = 0.25
  local_rope_proportion: float = 1.0
  per_layer_dim: int = 0
  num_kv_shared_layers: int = 0
  shared_hidden_dim: int | None = None
  num_experts: int = 0
  expert_dim: int = 0
  top_k_experts: int = 0

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise errors.UnsupportedTypeError(
        f'Unknown model family {self.family!r}; expected one of {FAMILIES}.'
      )
    check_int('num_layers', len(self.attention_types), LIMITS['num_layers'])
    for i, kind in enumerate(self.attention_types):
      if kind not in (LOCAL, GLOBAL):
        raise errors.HeaderError(
          f'Attention type of layer {i} is {kind!r}; expected {LOCAL!r} or'
          f' {GLOBAL!r}.'
        )
    for name, limits in LIMITS.items():
      value = getattr(self, name)
      if value is not None:
        check_int(name, value, limits)
    self._check_floats()
    self._check_attention()
    if self.family == 'gemma4':
      self._check_gemma4()

  @property
  def num_layers(self) -> int:
    return len(self.attention_types)

  def _check_floats(self) -> None:
    for name in ('attn_softcap', 'final_softcap'):
      if getattr(self, name) is not None:
        check_float(name, getattr(self, name))
    for name in ('local_rope_base', 'global_rope_base'):
      check_float(name, getattr(self, name), above=1.0)
    for name in ('local_rope_scale', 'global_rope_scale'):
      # The official RoPE rejects a factor below one when the model is traced.
      check_float(name, getattr(self, name), above=1.0 - 1e-9)
    for name in ('local_rope_proportion', 'global_rope_proportion'):
      if check_float(name, getattr(self, name)) > 1.0:
        raise errors.HeaderError(
          f'{name} is {getattr(self, name)}; expected at most 1.'
        )

  def _check_attention(self) -> None:
    if self.query_scale not in ('head_dim', 'embed_per_head'):
      raise errors.HeaderError(
        f"query_scale is {self.query_scale!r}; expected 'head_dim' or"
        " 'embed_per_head'."
      )
    for name in ('num_kv_heads', 'num_global_kv_heads'):
      value = getattr(self, name)
      if value is not None and self.num_heads % value:
        raise errors.HeaderError(
          f'{self.num_heads} query heads do not divide over {name}={value}.'
        )
    for name in ('head_dim', 'global_head_dim'):
      if (getattr(self, name) or 0) % 2:
        raise errors.HeaderError(
          f'{name} is {getattr(self, name)}; RoPE needs an even width.'
        )
    if LOCAL in self.attention_types and self.sliding_window is None:
      raise errors.HeaderError(
        'The model has sliding-window layers but no window size.'
      )

  def _check_gemma4(self) -> None:
    if self.num_experts and not (
      self.expert_dim and 1 <= self.top_k_experts <= self.num_experts
    ):
      raise errors.HeaderError(
        f'A mixture of {self.num_experts} experts needs expert_dim and 1 to'
        f' {self.num_experts} experts per token, got'
        f' expert_dim={self.expert_dim}, top_k={self.top_k_experts}.'
      )
    shared = self.num_kv_shared_layers
    if not shared:
      return
    own = self.num_layers - shared
    if own < 2 or self.attention_types[own - 2 : own] != (LOCAL, GLOBAL):
      raise errors.UnsupportedTypeError(
        f'The last {shared} of {self.num_layers} layers share keys and values'
        ' of earlier layers; that needs a local and then a global layer just'
        f' before them, got {self.attention_types[max(own - 2, 0) : own]}.'
      )
