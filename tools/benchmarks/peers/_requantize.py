# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""GGUF files in other types, as `llama-quantize` makes them.

A type as `Q4_K_M` is a mix: which tensor gets which type is llama.cpp's rule,
as of llama-quant.cpp of build 11434, for Gemma's dense models. Rows that blocks
of 256 do not fit get a type of blocks of 32. A table that is the output head as
well keeps 6 or 8 bits, unless the type is asked for as 'pure': then every
tensor gets it. With 'imatrix', errors are weighed by the mean square of what a
column meets on the calibration text.

Types without a search and without an importance matrix are quantised by the
package `gguf`, llama.cpp's reference; others by the library in `xllamacpp`.
"""

from collections.abc import Mapping
import dataclasses
import os
import re
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np

from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import data
from gemma_ext import errors

PLAIN = ('Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'TQ1_0', 'TQ2_0')
# By name, the type that most tensors get.
MIXES = {
  'Q2_K': 'Q2_K',
  'Q3_K_S': 'Q3_K',
  'Q3_K_M': 'Q3_K',
  'Q4_K_S': 'Q4_K',
  'Q4_K_M': 'Q4_K',
  'Q5_K_M': 'Q5_K',
  'Q6_K': 'Q6_K',
  'IQ4_NL': 'IQ4_NL',
  'IQ4_XS': 'IQ4_XS',
}
TYPES = (*PLAIN, *MIXES)
_TABLE = 'token_embd.weight'
# Of types in blocks of 256, those in blocks of 32.
_FALLBACK = {
  'TQ1_0': 'Q4_0',
  'TQ2_0': 'Q4_0',
  'Q2_K': 'Q4_0',
  'Q3_K': 'Q4_0',
  'Q4_K': 'Q5_0',
  'Q5_K': 'Q5_1',
  'Q6_K': 'Q8_0',
  'IQ4_XS': 'IQ4_NL',
}
_BLOCK = re.compile(r'blk\.(\d+)\.(\w+)\.weight')
_SITES = {
  'attn_q': 'attn/q_einsum/w',
  'attn_k': 'attn/kv_einsum/w',
  'attn_v': 'attn/kv_einsum/w',
  'attn_output': 'attn/attn_vec_einsum/w',
  'ffn_gate': 'mlp/gating_einsum',
  'ffn_up': 'mlp/gating_einsum',
  'ffn_down': 'mlp/linear',
}
_CALIBRATION_TOKENS = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
  """What a file is quantised to.

  Attributes:
    name: One of `TYPES`.
    pure: Whether all tensors get the same type.
    imatrix: Whether errors are weighed.
  """

  name: str
  pure: bool
  imatrix: bool


def parse(text: str) -> Kind:
  """Reads 'Q4_K_M', 'Q4_0 pure' or 'Q4_0 pure imatrix'.

  Args:
    text: The type.

  Raises:
    ConfigError: If there is no such type.
  """
  name, *more = text.split(' ')
  if name not in TYPES or more not in (
    [],
    ['pure'],
    ['imatrix'],
    ['pure', 'imatrix'],
  ):
    raise errors.ConfigError(
      f"quantize: {text!r}; expected one of {TYPES}, then 'pure' for the table"
      " as well, then 'imatrix'."
    )
  return Kind(name=name, pure='pure' in more, imatrix='imatrix' in more)


def requantize(
  source: str | os.PathLike[str], target: str | os.PathLike[str], text: str
) -> None:
  """Writes a file again in another type.

  Args:
    source: A GGUF file.
    target: The file to write.
    text: As for `parse`.

  Raises:
    OptionalDependencyError: If the type needs xllamacpp and it is missing.
  """
  kind = parse(text)
  reader = gguf.GGUFReader(os.fspath(source))
  architecture = reader.fields['general.architecture'].contents()
  importance = _importance(source) if kind.imatrix else {}
  writer = gguf.GGUFWriter(os.fspath(target), architecture)
  for key, field in reader.fields.items():
    if key.startswith('GGUF.') or key == 'general.architecture':
      continue
    inner = field.types[1] if len(field.types) > 1 else None
    writer.add_key_value(key, field.contents(), field.types[0], inner)
  about = {
    key: int(reader.fields[f'{architecture}.{key}'].contents())
    for key in ('block_count', 'attention.head_count')
  }
  key = f'{architecture}.attention.head_count_kv'
  heads = about['attention.head_count']
  shared = heads // int(reader.fields[key].contents())
  for tensor in reader.tensors:
    if len(tensor.shape) < 2:
      writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
      continue
    chosen = type_of(
      kind,
      tensor.name,
      cols=int(tensor.shape[0]),
      layers=about['block_count'],
      shared=shared,
    )
    rows = np.asarray(
      gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32
    )
    packed = _quantize(rows, chosen, importance.get(tensor.name))
    of = gguf.GGMLQuantizationType[chosen]
    writer.add_tensor(tensor.name, packed, raw_dtype=of)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def tensor_bytes(path: str | os.PathLike[str]) -> int:
  """Bytes of a file's tensors, without vocabulary and other metadata.

  Args:
    path: A GGUF file.
  """
  return sum(int(t.n_bytes) for t in gguf.GGUFReader(os.fspath(path)).tensors)


def type_of(
  kind: Kind, name: str, *, cols: int, layers: int, shared: int
) -> str:
  """Returns the type of a tensor.

  Args:
    kind: What the file is quantised to.
    name: The tensor's.
    cols: Numbers in a row of it.
    layers: Of the model.
    shared: Query heads for one head of keys and values.
  """
  chosen = MIXES.get(kind.name, kind.name)
  if not kind.pure:
    if name == _TABLE:
      small = cols % _block(chosen)
      chosen = 'Q8_0' if small or chosen == 'Q8_0' else 'Q6_K'
    elif found := _BLOCK.fullmatch(name):
      layer, part = int(found[1]), found[2]
      chosen = _mixed(kind, chosen, part, layer, layers, shared)
  if cols % _block(chosen):
    chosen = _FALLBACK.get(chosen, 'F16')
  return chosen if not cols % _block(chosen) else 'F16'


def _mixed(
  kind: Kind, chosen: str, part: str, layer: int, layers: int, shared: int
) -> str:
  """The type that the mix gives a tensor of a layer."""
  eighth = layers // 8
  more = (
    layer < eighth
    or layer >= 7 * layers // 8
    or (layer >= eighth and (layer - eighth) % 3 == 2)
  )
  first, match = layer < eighth, (kind.name, part)
  if part == 'ffn_down' and kind.imatrix and kind.name in ('Q4_0', 'Q5_0'):
    return {'Q4_0': 'Q4_1', 'Q5_0': 'Q5_1'}[kind.name] if first else chosen
  if part == 'ffn_down' and kind.name in ('IQ4_NL', 'IQ4_XS'):
    return 'Q5_K' if first and not kind.imatrix else chosen
  if part == 'attn_v' and kind.name in ('IQ4_NL', 'IQ4_XS'):
    return 'Q5_K' if shared >= 4 else chosen
  rules = {
    ('Q2_K', 'attn_v'): 'Q4_K' if shared >= 4 else 'Q3_K',
    ('Q2_K', 'ffn_down'): 'Q3_K',
    ('Q2_K', 'attn_output'): 'Q3_K',
    ('Q3_K_M', 'attn_v'): 'Q5_K' if layer < 2 else 'Q4_K',
    ('Q3_K_M', 'ffn_down'): 'Q5_K' if layer < layers // 16 else 'Q4_K',
    ('Q3_K_M', 'attn_output'): 'Q4_K',
    ('Q4_K_S', 'attn_v'): 'Q5_K' if layer < 4 else chosen,
    ('Q4_K_S', 'ffn_down'): 'Q5_K' if first else chosen,
    ('Q4_K_M', 'attn_v'): 'Q6_K' if more else chosen,
    ('Q4_K_M', 'ffn_down'): 'Q6_K' if more else chosen,
    ('Q5_K_M', 'attn_v'): 'Q6_K' if more else chosen,
    ('Q5_K_M', 'ffn_down'): 'Q6_K' if more else chosen,
  }
  return rules.get(match, chosen)


def _block(name: str) -> int:
  return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]


def _quantize(
  rows: np.ndarray, name: str, importance: np.ndarray | None
) -> np.ndarray:
  of = gguf.GGMLQuantizationType[name]
  if name in (*PLAIN, 'F16') and importance is None:
    return gguf.quants.quantize(rows, of)
  # pylint: disable-next=g-import-not-at-top
  from tools.benchmarks.peers import _ggml

  return _ggml.quantize(rows, of, importance)


def _importance(source: str | os.PathLike[str]) -> Mapping[str, np.ndarray]:
  """By tensor, mean squares of what its columns meet on calibration text.

  As with `llama-imatrix`, the table has none.
  """
  dense: Any = ckpts.load(os.fspath(source), dtype=jnp.bfloat16)
  documents = data.split(tuple(data.load_documents('sample'))).calibration
  windows = data.windows(
    dense.tokenizer,
    documents.documents,
    length=512,
    max_tokens=_CALIBRATION_TOKENS,
  )
  moments = gx_compress.second_moments(
    dense.model, dense.params, windows.tokens, progress=True
  )
  found = {}
  for path, values in moments.items():
    layer, _, site = path.partition('/')
    number = layer.removeprefix('layer_')
    for part, of in _SITES.items():
      if site == of:
        found[f'blk.{number}.{part}.weight'] = np.asarray(values)
  if not found:
    raise errors.CheckpointError(
      f'{os.fspath(source)!r}: no tensor has a known place; got'
      f' {sorted(moments)[:5]}.'
    )
  return found
