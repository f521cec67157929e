# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""GGUF metadata of Gemma 2, 3 and 4 -> `Hparams`.

What the file leaves out follows llama.cpp, whose files these are: the sliding
pattern (every second layer global in Gemma 2, every sixth in Gemma 3), the
local RoPE base 10,000, and the query scale of the 27B models, which it knows
by their number of layers.
"""

from typing import Any

import numpy as np

from gemma_ext import errors
from gemma_ext.ckpts import _gguf_header
from gemma_ext.ckpts import _hparams

ARCHITECTURES = ('gemma2', 'gemma3', 'gemma4')

_PATTERN = {'gemma2': 2, 'gemma3': 6}
# Layers of the models whose queries are scaled by embed_dim / num_heads.
_LAYERS_OF_27B = {'gemma2': 46, 'gemma3': 62}


def _missing(key: str) -> errors.MissingTensorError:
  return errors.MissingTensorError(f'The file has no metadata key {key}.')


_REQUIRED = object()


class Metadata:
  """Metadata values with the types that are expected of them."""

  def __init__(self, values: dict[str, Any]):
    self._values = values

  def get(self, key: str, default: Any = _REQUIRED) -> Any:
    value = self._values.get(key, default)
    if value is _REQUIRED:
      raise _missing(key)
    return value

  def text(self, key: str, default: Any = _REQUIRED) -> str:
    value = self.get(key, default)
    if not isinstance(value, str):
      raise errors.HeaderError(f'{key} is {value!r}; expected text.')
    return value

  def integer(self, key: str, default: Any = _REQUIRED) -> Any:
    value = self.get(key, default)
    if value is default and default is not _REQUIRED:
      return value
    if isinstance(value, bool) or not isinstance(value, int):
      raise errors.HeaderError(f'{key} is {value!r}; expected an integer.')
    return value

  def number(self, key: str, default: Any = _REQUIRED) -> Any:
    value = self.get(key, default)
    if value is default and default is not _REQUIRED:
      return value
    return _hparams.check_float(key, value)

  def per_layer(self, key: str, layers: int) -> tuple[int, ...]:
    """An integer for every layer, stored once or for each of them."""
    value = self.get(key)
    if not isinstance(value, np.ndarray):
      return (self.integer(key),) * layers
    if value.shape != (layers,) or value.dtype.kind not in 'iu':
      raise errors.HeaderError(
        f'{key} is an array of {value.size} {value.dtype}; expected {layers}'
        ' integers, one a layer.'
      )
    return tuple(int(v) for v in value)

  def uniform(self, key: str, layers: int) -> int:
    """An integer that all layers share."""
    values = set(self.per_layer(key, layers))
    if len(values) > 1:
      raise errors.UnsupportedTypeError(
        f'{key} differs between layers: {sorted(values)}; gm has one value'
        ' for all.'
      )
    return values.pop()


def hparams_of(
  header: _gguf_header.Header, rope_factors: np.ndarray | None = None
) -> _hparams.Hparams:
  """Returns the hyper-parameters in the header.

  Args:
    header: Header of the file.
    rope_factors: Gemma 4: the tensor `rope_freqs.weight`.

  Raises:
    UnsupportedTypeError: If the architecture is none of `ARCHITECTURES`.
    MissingTensorError: If a metadata key or the embedding table is missing.
    HeaderError: If a value has the wrong type or makes no sense.
  """
  meta = Metadata(header.metadata)
  arch = meta.text('general.architecture')
  if arch not in ARCHITECTURES:
    raise errors.UnsupportedTypeError(
      f'The file holds a {arch!r} model; expected one of {ARCHITECTURES}.'
    )
  if meta.integer('split.count', 0) > 1:
    raise errors.UnsupportedTypeError(
      'The model is split over several GGUF files; merge them with'
      ' `llama-gguf-split --merge` first.'
    )
  embed = header.tensors.get('token_embd.weight')
  if embed is None:
    raise errors.MissingTensorError('The file has no tensor token_embd.weight.')
  if len(embed.shape) != 2:
    raise errors.TensorShapeError(
      f'token_embd.weight has shape {embed.shape}; expected two axes.'
    )
  layers = _hparams.check_int(
    f'{arch}.block_count',
    meta.integer(f'{arch}.block_count'),
    _hparams.LIMITS['num_layers'],
  )
  embed_dim = meta.integer(f'{arch}.embedding_length')
  num_heads = meta.uniform(f'{arch}.attention.head_count', layers)
  _hparams.check_int('num_heads', num_heads, _hparams.LIMITS['num_heads'])
  common = {
    'family': arch,
    'vocab_size': embed.shape[0],
    'embed_dim': embed_dim,
    'num_heads': num_heads,
    'sliding_window': meta.integer(f'{arch}.attention.sliding_window', None),
    'final_softcap': meta.number(f'{arch}.final_logit_softcapping', None),
    'attn_softcap': meta.number(f'{arch}.attn_logit_softcapping', None),
    'attention_types': _attention_types(meta, arch, layers),
  }
  if arch == 'gemma4':
    return _gemma4(header, meta, common, layers, rope_factors)
  return _dense(meta, arch, common, layers)


def _dense(
  meta: Metadata, arch: str, common: dict[str, Any], layers: int
) -> _hparams.Hparams:
  """Gemma 2 and 3."""
  base = meta.number(f'{arch}.rope.freq_base', 10_000.0)
  local_base = base if arch == 'gemma2' else 10_000.0
  is_27b = layers == _LAYERS_OF_27B[arch]
  return _hparams.Hparams(
    **common,
    hidden_dim=meta.uniform(f'{arch}.feed_forward_length', layers),
    num_kv_heads=meta.uniform(f'{arch}.attention.head_count_kv', layers),
    head_dim=meta.integer(
      f'{arch}.attention.key_length',
      common['embed_dim'] // common['num_heads'],
    ),
    query_scale='embed_per_head' if is_27b else 'head_dim',
    local_rope_base=meta.number(f'{arch}.rope.freq_base_swa', local_base),
    global_rope_base=base,
    global_rope_scale=_rope_scale(meta, arch),
    use_qk_norm=arch == 'gemma3',
  )


def _rope_scale(meta: Metadata, arch: str) -> float:
  kind = meta.text(f'{arch}.rope.scaling.type', 'none')
  factor = meta.number(f'{arch}.rope.scaling.factor', 1.0)
  if kind == 'none':
    return 1.0
  if kind != 'linear':
    raise errors.UnsupportedTypeError(
      f'RoPE scaling of the type {kind!r} is not supported by gm; expected'
      " 'linear'."
    )
  return factor


def _attention_types(meta: Metadata, arch: str, layers: int) -> tuple[str, ...]:
  key = f'{arch}.attention.sliding_window_pattern'
  value = meta.get(key, _PATTERN.get(arch))
  if value is None:
    raise _missing(key)
  if isinstance(value, np.ndarray):
    if value.shape != (layers,):
      raise errors.HeaderError(
        f'{key} has {value.size} entries for {layers} layers.'
      )
    is_local = [bool(v) for v in value]
  else:
    period = meta.integer(key, value)
    _hparams.check_int(key, period, (1, _hparams.LIMITS['num_layers'][1]))
    is_local = [(i + 1) % period != 0 for i in range(layers)]
  return tuple(_hparams.LOCAL if x else _hparams.GLOBAL for x in is_local)


def _gemma4(
  header: _gguf_header.Header,
  meta: Metadata,
  common: dict[str, Any],
  layers: int,
  rope_factors: np.ndarray | None,
) -> _hparams.Hparams:
  """Gemma 4, dense, with per-layer embeddings, or mixture of experts."""
  types = common['attention_types']
  kv_heads = meta.per_layer('gemma4.attention.head_count_kv', layers)
  local_kv = _of_type(kv_heads, types, _hparams.LOCAL, 'head_count_kv')
  global_kv = _of_type(kv_heads, types, _hparams.GLOBAL, 'head_count_kv')
  head_dim = meta.integer('gemma4.attention.key_length_swa')
  global_head_dim = meta.integer('gemma4.attention.key_length')
  shared = meta.integer('gemma4.attention.shared_kv_layers', 0)
  _hparams.check_int('shared_kv_layers', shared, (0, layers))
  hidden = meta.per_layer('gemma4.feed_forward_length', layers)
  own, wide = set(hidden[: layers - shared]), set(hidden[layers - shared :])
  if len(own) > 1 or len(wide) > 1 or not own:
    raise errors.UnsupportedTypeError(
      f'FFN widths {hidden} differ other than between layers with keys of'
      ' their own and layers that share them.'
    )
  has_own = range(layers - shared)
  k_eq_v = {
    f'blk.{i}.attn_v.weight' not in header.tensors
    for i in has_own
    if types[i] == _hparams.GLOBAL
  }
  if len(k_eq_v) > 1:
    raise errors.MissingTensorError(
      'Some global layers have attn_v.weight and others have not.'
    )
  rotated = meta.integer('gemma4.rope.dimension_count_swa', head_dim)
  _hparams.check_int('head_dim', head_dim, _hparams.LIMITS['head_dim'])
  return _hparams.Hparams(
    **common,
    hidden_dim=own.pop(),
    shared_hidden_dim=wide.pop() if wide - {hidden[0]} else None,
    num_kv_heads=local_kv or global_kv or 0,
    num_global_kv_heads=global_kv if global_kv != local_kv else None,
    head_dim=head_dim,
    global_head_dim=global_head_dim,
    k_eq_v_global=k_eq_v == {True},
    local_rope_base=meta.number('gemma4.rope.freq_base_swa', 10_000.0),
    global_rope_base=meta.number('gemma4.rope.freq_base', 1_000_000.0),
    global_rope_scale=_rope_scale(meta, 'gemma4'),
    local_rope_proportion=rotated / head_dim,
    global_rope_proportion=_rotated_share(rope_factors, global_head_dim),
    use_qk_norm=True,
    per_layer_dim=meta.integer('gemma4.embedding_length_per_layer_input', 0),
    num_kv_shared_layers=shared,
    num_experts=meta.integer('gemma4.expert_count', 0),
    expert_dim=meta.integer('gemma4.expert_feed_forward_length', 0),
    top_k_experts=meta.integer('gemma4.expert_used_count', 0),
  )


def _of_type(
  values: tuple[int, ...], types: tuple[str, ...], kind: str, name: str
) -> int | None:
  """The value that all layers of one attention type have."""
  found = {v for v, t in zip(values, types) if t == kind}
  if len(found) > 1:
    raise errors.UnsupportedTypeError(
      f'{name} differs between {kind} layers: {sorted(found)}.'
    )
  return found.pop() if found else None


def _rotated_share(factors: np.ndarray | None, head_dim: int) -> float:
  """The share of a global head that RoPE turns.

  llama.cpp divides each frequency by a factor: one for the dimensions that
  turn, 1e30 for those that do not.
  """
  if factors is None:
    raise errors.MissingTensorError(
      'The file has no tensor rope_freqs.weight, which says how much of a'
      ' global head RoPE turns.'
    )
  if factors.shape != (head_dim // 2,):
    raise errors.TensorShapeError(
      f'rope_freqs.weight has shape {factors.shape}; expected'
      f' {(head_dim // 2,)}, half of a global head.'
    )
  turned = int((factors == 1.0).sum())
  if not (factors[:turned] == 1.0).all() or not (factors[turned:] > 1e20).all():
    raise errors.UnsupportedTypeError(
      'rope_freqs.weight holds factors other than ones followed by 1e30,'
      ' which gm cannot express.'
    )
  return turned / (head_dim // 2)
