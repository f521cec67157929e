# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""GGUF files in other types, by the quantisers of the package `gguf`.

They are llama.cpp's own reference quantisers, of the types that have no search;
K-types have none there. As llama.cpp does, a table that is the output head as
well keeps 8 bits, unless the type is asked for as 'pure', and rows that blocks
do not fit get the next larger type.
"""

import os

import gguf
import numpy as np

from gemma_ext import errors

TYPES = ('Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'TQ1_0', 'TQ2_0')
_TABLE = 'token_embd.weight'
_FALLBACK = {'TQ1_0': 'Q4_0', 'TQ2_0': 'Q4_0'}


def parse(text: str) -> tuple[str, bool]:
  """Returns the type, and whether it is pure, of 'Q4_0' or 'Q4_0 pure'.

  Args:
    text: The type.

  Raises:
    ConfigError: If there is no such type.
  """
  name, _, pure = text.partition(' ')
  if name not in TYPES or pure not in ('', 'pure'):
    raise errors.ConfigError(
      f"quantize: {text!r}; expected one of {TYPES}, and 'pure' after it for"
      ' the table as well.'
    )
  return name, pure == 'pure'


def requantize(
  source: str | os.PathLike[str], target: str | os.PathLike[str], kind: str
) -> None:
  """Writes a file again in another type.

  Args:
    source: A GGUF file.
    target: The file to write.
    kind: As for `parse`.
  """
  name, pure = parse(kind)
  reader = gguf.GGUFReader(os.fspath(source))
  architecture = reader.fields['general.architecture'].contents()
  writer = gguf.GGUFWriter(os.fspath(target), architecture)
  for key, field in reader.fields.items():
    if key.startswith('GGUF.') or key == 'general.architecture':
      continue
    inner = field.types[1] if len(field.types) > 1 else None
    writer.add_key_value(key, field.contents(), field.types[0], inner)
  for tensor in reader.tensors:
    if len(tensor.shape) < 2:
      writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
      continue
    chosen = 'Q8_0' if tensor.name == _TABLE and not pure else name
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[chosen]][0]
    if int(tensor.shape[0]) % block:
      chosen = _FALLBACK.get(chosen, 'Q8_0')
    of = gguf.GGMLQuantizationType[chosen]
    rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    packed = gguf.quants.quantize(np.asarray(rows, np.float32), of)
    writer.add_tensor(tensor.name, packed, raw_dtype=of)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
