# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""GGUF files of Gemma 3 shapes with random weights, for speed alone.

Types are those that llama.cpp's own quantiser gives a model with a tied head
under Q4_0: the table in Q6_K, or Q8_0 where blocks of 256 do not fit.
"""

from collections.abc import Iterator
import os
from typing import Any

import gguf
import numpy as np

# Bytes of a block and where its half-precision scale lies in it.
_BLOCKS = {'Q4_0': (32, 18, 0), 'Q8_0': (32, 34, 0), 'Q6_K': (256, 210, 208)}


def write(
  path: str | os.PathLike[str],
  config: Any,
  vocabulary: str | os.PathLike[str],
) -> None:
  """Writes a file that llama.cpp opens.

  Args:
    path: The file.
    config: Config of an official Gemma 3 text model.
    vocabulary: GGUF file whose tokens it gets.
  """
  writer = gguf.GGUFWriter(os.fspath(path), 'gemma3')
  writer.add_context_length(32_768)
  writer.add_embedding_length(config.embed_dim)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(config.hidden_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_layer_norm_rms_eps(1e-6)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_rope_freq_base(1e6)
  writer.add_sliding_window(config.sliding_window_size)
  fields = gguf.GGUFReader(os.fspath(vocabulary)).fields
  read = lambda name: fields[f'tokenizer.ggml.{name}'].contents()
  writer.add_tokenizer_model('llama')
  writer.add_token_list(read('tokens'))
  writer.add_token_scores(read('scores'))
  writer.add_token_types(read('token_type'))
  writer.add_bos_token_id(2)
  writer.add_eos_token_id(1)
  rng = np.random.default_rng(0)
  for name, shape in _tensors(config):
    if len(shape) == 1:
      writer.add_tensor(name, np.ones(shape, np.float32))
      continue
    kind = 'Q4_0'
    if name == 'token_embd.weight':
      kind = 'Q6_K' if shape[1] % 256 == 0 else 'Q8_0'
    writer.add_tensor(
      name,
      _blocks(rng, kind, *shape),
      raw_dtype=gguf.GGMLQuantizationType[kind],
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _tensors(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
  width, hidden = config.embed_dim, config.hidden_dim
  queries = config.num_heads * config.head_dim
  keys = config.num_kv_heads * config.head_dim
  yield 'token_embd.weight', (config.num_embed, width)
  yield 'output_norm.weight', (width,)
  for i in range(config.num_layers):
    for name, shape in {
      'attn_norm': (width,),
      'attn_q': (queries, width),
      'attn_k': (keys, width),
      'attn_v': (keys, width),
      'attn_q_norm': (config.head_dim,),
      'attn_k_norm': (config.head_dim,),
      'attn_output': (width, queries),
      'post_attention_norm': (width,),
      'ffn_norm': (width,),
      'ffn_gate': (hidden, width),
      'ffn_up': (hidden, width),
      'ffn_down': (width, hidden),
      'post_ffw_norm': (width,),
    }.items():
      yield f'blk.{i}.{name}.weight', shape


def _blocks(
  rng: np.random.Generator, kind: str, rows: int, cols: int
) -> np.ndarray:
  """Random codes and small scales, as bytes `[rows, bytes]`."""
  block, nbytes, at = _BLOCKS[kind]
  shape = (rows, cols // block, nbytes)
  found = np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8)
  found = found.reshape(shape).copy()
  found[..., at : at + 2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
  return found.reshape(rows, -1)
