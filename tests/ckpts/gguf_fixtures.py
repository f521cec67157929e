# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny GGUF files made from tiny models, and headers made byte by byte.

The way from parameters to file is written out here on its own, so that it and
the loader's way back check each other.
"""

from collections.abc import Mapping
import pathlib
import struct
from typing import Any

import gguf
import numpy as np
from sentencepiece import sentencepiece_model_pb2 as sp_proto

from tests import tiny

F32 = gguf.GGMLQuantizationType.F32
_VERSIONS = {'gemma2': 2, 'gemma3': 3, 'gemma4': 4}
_CONTROL, _NORMAL, _USER, _UNUSED, _BYTE = 3, 1, 4, 5, 6


def family_of(model: Any) -> str:
  """'gemma2', 'gemma3' or 'gemma4'."""
  return f'gemma{model.INFO.tokenizer_version}'


def exact(params: Any) -> Any:
  """Rounds vectors so that adding one to them and subtracting it is exact."""
  if isinstance(params, Mapping):
    return {k: exact(v) for k, v in params.items()}
  value = np.asarray(params, np.float32)
  return np.round(value * 256) / 256 if value.ndim == 1 else value


def tensors(model: Any, params: Any) -> dict[str, np.ndarray]:
  """The file's tensors in float32, rows first, norms as llama.cpp has them."""
  config, family = model.config, family_of(model)
  plus = 0.0 if family == 'gemma4' else 1.0
  embedder = params['embedder']
  out = {
    'token_embd.weight': embedder['input_embedding'],
    'output_norm.weight': params['final_norm']['scale'] + plus,
  }
  if 'per_layer_embeddings' in embedder:
    table = embedder['per_layer_embeddings']
    projection = embedder['per_layer_model_projection']['w']
    out['per_layer_token_embd.weight'] = table.reshape(table.shape[0], -1)
    out['per_layer_model_proj.weight'] = np.einsum(
      'dlp->lpd', projection
    ).reshape(-1, projection.shape[0])
    out['per_layer_proj_norm.weight'] = embedder['per_layer_projection_norm'][
      'scale'
    ]
  if family == 'gemma4':
    half = config.global_key_size // 2
    turned = int(config.global_rope_proportion * half)
    out['rope_freqs.weight'] = np.array(
      [1.0] * turned + [1e30] * (half - turned), np.float32
    )
  for i in range(config.num_layers):
    layer = _layer(params[f'layer_{i}'], config, plus)
    out.update({f'blk.{i}.{name}': value for name, value in layer.items()})
  return {k: np.ascontiguousarray(v, np.float32) for k, v in out.items()}


def _layer(p: Any, config: Any, plus: float) -> dict[str, np.ndarray]:
  """Tensors of one layer."""
  norm = lambda name: p[name]['scale'] + plus
  attn = p['attn']
  out = {
    'attn_norm.weight': norm('pre_attention_norm'),
    'post_attention_norm.weight': norm('post_attention_norm'),
    'post_ffw_norm.weight': norm('post_ffw_norm'),
    'attn_output.weight': np.einsum(
      'hkd->dhk', attn['attn_vec_einsum']['w']
    ).reshape(config.embed_dim, -1),
  }
  rows = lambda w: np.einsum('hdk->hkd', w).reshape(-1, config.embed_dim)
  if 'qkv_einsum' in attn:
    for name, w in zip('qkv', attn['qkv_einsum']['w']):
      out[f'attn_{name}.weight'] = rows(w)
  else:
    out['attn_q.weight'] = rows(attn['q_einsum']['w'])
  if 'kv_einsum' in attn:
    for name, w in zip('kv', attn['kv_einsum']['w']):
      out[f'attn_{name}.weight'] = rows(w)
  if 'k_einsum' in attn:
    out['attn_k.weight'] = rows(attn['k_einsum']['w'])
  for name, file_name in (('query', 'q'), ('key', 'k')):
    for key in (f'{name}_norm', f'_{name}_norm'):
      if key in attn:
        out[f'attn_{file_name}_norm.weight'] = attn[key]['scale'] + plus
  if 'skip_scale' in p:
    out['layer_output_scale.weight'] = p['skip_scale']
  if 'per_layer_input_gate' in p:
    out['inp_gate.weight'] = p['per_layer_input_gate']['w'].T
    out['proj.weight'] = p['per_layer_projection']['w'].T
    out['post_norm.weight'] = p['post_per_layer_input_norm']['scale']
  if 'mlp2' in p:
    out.update(_moe(p))
  dense = p.get('mlp2', p['mlp'])
  gating = dense['gating_einsum']
  if not getattr(config, 'transpose_gating_einsum', True):
    gating = np.einsum('ndf->nfd', gating)
  out['ffn_gate.weight'], out['ffn_up.weight'] = gating
  out['ffn_down.weight'] = dense['linear'].T
  first = 'pre_ffw2_norm' if 'mlp2' in p else 'pre_ffw_norm'
  out['ffn_norm.weight'] = norm(first)
  return out


def _moe(p: Any) -> dict[str, np.ndarray]:
  moe = p['mlp']
  gate_up = moe['gating_einsum']['w']
  experts, _, _, embed = gate_up.shape
  return {
    'post_ffw_norm_1.weight': p['post_ffw2_norm']['scale'],
    'pre_ffw_norm_2.weight': p['pre_ffw_norm']['scale'],
    'post_ffw_norm_2.weight': p['post_ffw1_norm']['scale'],
    'ffn_gate_inp.weight': moe['router_logits']['w'].T,
    'ffn_gate_inp.scale': moe['router_scale'],
    'ffn_gate_up_exps.weight': gate_up.reshape(experts, -1, embed),
    'ffn_down_exps.weight': np.einsum('efd->edf', moe['linear']['w']),
    'ffn_down_exps.scale': moe['per_expert_scale'],
  }


def metadata(model: Any) -> dict[str, Any]:
  """Metadata as llama.cpp's converter writes it, without the vocabulary."""
  c, family = model.config, family_of(model)
  is_local = [t.name == 'LOCAL_SLIDING' for t in c.attention_types]
  out: dict[str, Any] = {
    'block_count': c.num_layers,
    'embedding_length': c.embed_dim,
    'feed_forward_length': c.hidden_dim,
    'attention.head_count': c.num_heads,
    'attention.head_count_kv': c.num_kv_heads,
    'attention.key_length': c.head_dim,
    'attention.sliding_window': c.sliding_window_size,
    'rope.freq_base': float(c.global_base_frequency),
  }
  if c.final_logit_softcap:
    out['final_logit_softcapping'] = c.final_logit_softcap
  if c.attn_logits_soft_cap:
    out['attn_logit_softcapping'] = c.attn_logits_soft_cap
  if family == 'gemma3':
    out['attention.sliding_window_pattern'] = 2
  if family == 'gemma4':
    shared = 0
    if c.kv_cache_sharing_config:
      fraction = c.kv_cache_sharing_config.frac_shared_layers
      shared = c.num_layers - int(c.num_layers - fraction * c.num_layers)
    wide = c.override_kv_shared_ffw_hidden or c.hidden_dim
    global_kv = c.num_global_kv_heads or c.num_kv_heads
    out |= {
      'attention.key_length': c.global_key_size,
      'attention.key_length_swa': c.head_dim,
      'attention.sliding_window_pattern': is_local,
      'attention.head_count_kv': [
        c.num_kv_heads if local else global_kv for local in is_local
      ],
      'attention.shared_kv_layers': shared,
      'embedding_length_per_layer_input': c.per_layer_input_dim,
      'rope.freq_base_swa': float(c.local_base_frequency),
      'rope.dimension_count_swa': c.head_dim,
      'feed_forward_length': [c.hidden_dim] * (c.num_layers - shared)
      + [wide] * shared,
    }
    if c.enable_moe:
      out |= {
        'expert_count': c.num_experts,
        'expert_used_count': c.top_k_experts,
        'expert_feed_forward_length': c.expert_dim,
      }
  return {f'{family}.{key}': value for key, value in out.items()}


def vocabulary(model: Any) -> dict[str, Any]:
  """The vocabulary of the tiny tokenizer, as llama.cpp's converter has it."""
  family = family_of(model)
  proto = sp_proto.ModelProto()
  proto.ParseFromString(tiny.tokenizer_model(version=_VERSIONS[family]))
  tokens, types = [], []
  for piece in proto.pieces:
    text = piece.piece
    if piece.type == piece.USER_DEFINED:
      # The converter hides what looks like a marker from the output.
      types.append(_CONTROL if text.startswith('<') else _USER)
      text = text.replace('▁', ' ')
    elif piece.type == piece.BYTE:
      types.append(_BYTE)
    elif piece.type in (piece.CONTROL, piece.UNKNOWN):
      types.append(_CONTROL)
    else:
      types.append(_NORMAL)
    tokens.append(text)
  out = {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.scores': [float(p.score) for p in proto.pieces],
    'tokenizer.ggml.token_type': types,
    'tokenizer.ggml.bos_token_id': 2,
  }
  if family == 'gemma4':
    out['tokenizer.ggml.model'] = 'gemma4'
    out['tokenizer.ggml.merges'] = _merges(proto)
    out['tokenizer.ggml.scores'] = [-1000.0] * len(tokens)
  return out


def _merges(proto: sp_proto.ModelProto) -> list[str]:
  """Every way to put a piece together from two, the best piece first."""
  normal = [p for p in proto.pieces if p.type == p.NORMAL]
  known = {p.piece for p in normal}
  out = []
  for piece in sorted(normal, key=lambda p: -p.score):
    text = piece.piece
    for cut in range(1, len(text)):
      if text[:cut] in known and text[cut:] in known:
        out.append(f'{text[:cut]} {text[cut:]}')
  return out


def write(
  path: pathlib.Path,
  model: Any,
  params: Any,
  *,
  kind: gguf.GGMLQuantizationType = F32,
  change: Mapping[str, Any] | None = None,
  change_tensors: Mapping[str, Any] | None = None,
  arch: str | None = None,
) -> dict[str, np.ndarray]:
  """Writes a GGUF file and returns its tensors before quantisation.

  Args:
    path: The file.
    model: A tiny Gemma 2, 3 or 4.
    params: Its parameters.
    kind: Type of the matrices; vectors are float32 as in real files.
    change: Metadata to put in place of the right one; `None` leaves it out.
    change_tensors: The same for tensors.
    arch: Architecture to claim.
  """
  content = tensors(model, params) | dict(change_tensors or {})
  content = {k: v for k, v in content.items() if v is not None}
  values = metadata(model) | vocabulary(model) | dict(change or {})
  writer = gguf.GGUFWriter(path, arch or family_of(model))
  for key, value in values.items():
    _add(writer, key, value)
  for name, value in content.items():
    stored = kind if value.ndim > 1 else F32
    raw = gguf.quants.quantize(value, stored)
    writer.add_tensor(name, raw, raw_dtype=stored)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return content


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
  match value:
    case None:
      pass
    case bool():
      writer.add_bool(key, value)
    case int():
      writer.add_uint32(key, value)
    case float():
      writer.add_float32(key, value)
    case str():
      writer.add_string(key, value)
    case _:
      writer.add_array(key, value)


# ---------------------------- headers by the byte ----------------------------


def string(text: str | bytes) -> bytes:
  """A GGUF string."""
  raw = text.encode() if isinstance(text, str) else text
  return struct.pack('<Q', len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
  """A metadata pair whose value is already encoded."""
  return string(key) + struct.pack('<I', kind) + value


def tensor_info(
  name: str | bytes,
  dims: tuple[int, ...] = (32,),
  *,
  kind: int = 0,
  offset: int = 0,
  num_dims: int | None = None,
) -> bytes:
  """A tensor info; `dims` in the order of the file."""
  count = len(dims) if num_dims is None else num_dims
  return (
    string(name)
    + struct.pack(f'<I{len(dims)}Q', count, *dims)
    + struct.pack('<IQ', kind, offset)
  )


def header(
  pairs: tuple[bytes, ...] = (),
  infos: tuple[bytes, ...] = (),
  *,
  magic: bytes = b'GGUF',
  version: int = 3,
  num_pairs: int | None = None,
  num_tensors: int | None = None,
  data: int = 0,
) -> bytes:
  """A whole file: header, padding to 32 bytes, `data` zero bytes."""
  raw = magic + struct.pack(
    '<IQQ',
    version,
    len(infos) if num_tensors is None else num_tensors,
    len(pairs) if num_pairs is None else num_pairs,
  )
  raw += b''.join(pairs) + b''.join(infos)
  return raw + bytes(-len(raw) % 32) + bytes(data)
