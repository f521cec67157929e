# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""GGUF files of Gemma 2, 3 and 4 -> model, parameters and tokenizer."""

import functools
import math
import os
import pathlib
import re
from typing import Any, BinaryIO

from flax import linen as nn
from gemma import gm
import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemma_ext import errors
from gemma_ext.ckpts import _assemble
from gemma_ext.ckpts import _families
from gemma_ext.ckpts import _gguf_header
from gemma_ext.ckpts import _gguf_hparams
from gemma_ext.ckpts import _hparams
from gemma_ext.ckpts import _vocab

# Dequantisation works on blocks; rows of about so many numbers are fastest.
_FAST_ROW = 4096

_GLOBAL_NAMES = {
  'embed': 'token_embd.weight',
  'output': 'output.weight',
  'final_norm': 'output_norm.weight',
  'per_layer_embed': 'per_layer_token_embd.weight',
  'per_layer_projection': 'per_layer_model_proj.weight',
  'per_layer_projection_norm': 'per_layer_proj_norm.weight',
}
_LAYER_NAMES = {
  'q': 'attn_q.weight',
  'k': 'attn_k.weight',
  'v': 'attn_v.weight',
  'o': 'attn_output.weight',
  'q_norm': 'attn_q_norm.weight',
  'k_norm': 'attn_k_norm.weight',
  'gate': 'ffn_gate.weight',
  'up': 'ffn_up.weight',
  'down': 'ffn_down.weight',
  'pre_attn_norm': 'attn_norm.weight',
  'post_attn_norm': 'post_attention_norm.weight',
  'pre_ffw_norm': 'ffn_norm.weight',
  'post_ffw_norm': 'post_ffw_norm.weight',
  'skip_scale': 'layer_output_scale.weight',
  'per_layer_gate': 'inp_gate.weight',
  'per_layer_out': 'proj.weight',
  'per_layer_norm': 'post_norm.weight',
}
# With experts, the plain FFN tensors are the FFN that all tokens share.
_MOE_NAMES = {
  'dense_pre_norm': 'ffn_norm.weight',
  'dense_post_norm': 'post_ffw_norm_1.weight',
  'pre_ffw_norm': 'pre_ffw_norm_2.weight',
  'moe_post_norm': 'post_ffw_norm_2.weight',
  'router': 'ffn_gate_inp.weight',
  'router_scale': 'ffn_gate_inp.scale',
  'experts_gate_up': 'ffn_gate_up_exps.weight',
  'experts_gate': 'ffn_gate_exps.weight',
  'experts_up': 'ffn_up_exps.weight',
  'experts_down': 'ffn_down_exps.weight',
  'expert_scale': 'ffn_down_exps.scale',
}
_LAYER = re.compile(r'layer_(\d+)/(\w+)')


def load_gguf(
  path: str | os.PathLike[str],
  *,
  dtype: Any = jnp.bfloat16,
  progress: bool = False,
) -> tuple[nn.Module, dict[str, Any], gm.text.Tokenizer | None]:
  """Loads a GGUF file.

  Everything that the header can tell is checked before the first tensor is
  read. The file is read in blocks, never mapped, so that resident memory is
  the result and a few blocks.

  Args:
    path: The file.
    dtype: Dtype of the parameters.
    progress: Whether to show a progress bar.

  Returns:
    The model, its parameters, and the tokenizer rebuilt from the vocabulary
    (`None` if the file has none).

  Raises:
    CheckpointError: One of its subclasses, see `gemma_ext.errors`.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise errors.CheckpointNotFoundError(f'There is no file {path}.')
  with path.open('rb', buffering=0) as file:
    header = _gguf_header.read_header(file)
    source = GgufSource(file, header)
    hparams = source.hparams
    model = _families.model_from_hparams(hparams, dtype)
    tokenizer = _vocab.tokenizer_of(
      header.metadata,
      _families.tokenizer_class(model),
      max_tokens=hparams.vocab_size,
    )
    params = _assemble.assemble(model, source, dtype=dtype, progress=progress)
  return model, params, tokenizer


class GgufSource:
  """Tensors of an open GGUF file under canonical names."""

  def __init__(self, file: BinaryIO, header: _gguf_header.Header):
    """Checks the architecture; reads nothing but Gemma 4's RoPE factors."""
    self._file = file
    self._header = header
    self._used: set[str] = set()
    factors = None
    if 'rope_freqs.weight' in header.tensors:
      info = header.tensors['rope_freqs.weight']
      if math.prod(info.shape) > _hparams.LIMITS['global_head_dim'][1]:
        raise errors.TensorShapeError(
          f'rope_freqs.weight has shape {info.shape}; expected half of a head.'
        )
      factors = self._read_file_tensor(info, 0, info.shape[0])
    self.hparams = _gguf_hparams.hparams_of(header, factors)
    self.norm_offset = 0.0 if self.hparams.family == 'gemma4' else 1.0

  def has(self, name: str) -> bool:
    return self._file_name(name) in self._header.tensors

  def shape(self, name: str) -> tuple[int, ...]:
    info = self._info(name)
    if not can_dequantize(info.kind):
      raise errors.UnsupportedTypeError(
        f'Tensor {info.name} is stored as {info.kind.name}, which the'
        ' installed gguf package cannot dequantise.'
      )
    self._used.add(info.name)
    return info.shape

  def read(
    self, name: str, start: int = 0, stop: int | None = None
  ) -> np.ndarray:
    info = self._info(name)
    stop = info.shape[0] if stop is None else stop
    return self._read_file_tensor(info, start, stop)

  def unused(self) -> list[str]:
    return [
      name
      for name in self._header.tensors
      if name not in self._used and not _assemble.is_harmless(name)
    ]

  def _info(self, name: str) -> _gguf_header.TensorInfo:
    file_name = self._file_name(name)
    info = self._header.tensors.get(file_name)
    if info is None:
      raise errors.MissingTensorError(
        f'The file has no tensor {file_name} ({name}).'
      )
    return info

  def _file_name(self, name: str) -> str:
    """The file's name of a canonical tensor; '' if GGUF has none for it."""
    match = _LAYER.fullmatch(name)
    if match is None:
      return _GLOBAL_NAMES.get(name, '')
    layer, part = match.groups()
    suffix = _LAYER_NAMES.get(part, '')
    if self.hparams.num_experts:
      suffix = _MOE_NAMES.get(part, suffix)
    return f'blk.{layer}.{suffix}' if suffix else ''

  def _read_file_tensor(
    self, info: _gguf_header.TensorInfo, start: int, stop: int
  ) -> np.ndarray:
    """Rows `start:stop` of a tensor, dequantised."""
    if not 0 <= start <= stop <= info.shape[0]:
      raise errors.TensorShapeError(
        f'Rows {start}:{stop} of tensor {info.name} with {info.shape[0]} rows.'
      )
    row_bytes = info.nbytes // info.shape[0]
    # One axis: a "row" of a vector is a single number, or part of a block.
    if len(info.shape) == 1:
      values = dequantize(self._read_bytes(info, 0, info.nbytes), info.kind)
      return values[start:stop]
    raw = self._read_bytes(info, start * row_bytes, (stop - start) * row_bytes)
    return dequantize(raw, info.kind).reshape(stop - start, *info.shape[1:])

  def _read_bytes(
    self, info: _gguf_header.TensorInfo, offset: int, n: int
  ) -> np.ndarray:
    raw = np.empty(n, np.uint8)
    view = memoryview(raw)
    done = 0
    while done < n:
      got = os.preadv(
        self._file.fileno(), [view[done:]], info.offset + offset + done
      )
      if not got:
        raise errors.TruncatedFileError(
          f'The file ended while tensor {info.name} was read.'
        )
      done += got
    return raw


@functools.cache
def can_dequantize(kind: gguf.GGMLQuantizationType) -> bool:
  """Whether the installed gguf package dequantises this type."""
  _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  try:
    dequantize(np.zeros(block_bytes, np.uint8), kind)
  except (NotImplementedError, ValueError):
    return False
  return True


def dequantize(raw: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
  """Returns the numbers in whole blocks of bytes.

  Args:
    raw: uint8 of shape [blocks * bytes per block].
    kind: How the numbers are stored.

  Returns:
    A flat array of float32, or of bfloat16 if that is how they are stored.
  """
  if kind == gguf.GGMLQuantizationType.F32:
    return raw.view('<f4')
  if kind == gguf.GGMLQuantizationType.BF16:
    return raw.view('<u2').view(ml_dtypes.bfloat16)
  if kind == gguf.GGMLQuantizationType.F16:
    return raw.view('<f2').astype(np.float32)
  block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  blocks = raw.size // block_bytes
  width = max(1, _FAST_ROW // block)
  main = blocks - blocks % width
  out = np.empty(blocks * block, np.float32)
  # Damaged scales overflow; the caller looks for non-finite values.
  with np.errstate(all='ignore'):
    for first, last, per_row in ((0, main, width), (main, blocks, 1)):
      if first < last:
        part = raw[first * block_bytes : last * block_bytes]
        out[first * block : last * block] = gguf.quants.dequantize(
          part.reshape(-1, per_row * block_bytes), kind
        ).reshape(-1)
  return out
