# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Fills a model's parameter tree from named tensors, streaming row blocks.

Canonical names, shapes as Hugging Face stores them ([out, in], rows first):

  embed [V, D], output [V, D] (tied copy), final_norm [D]
  layer_{i}/ q [H*hd, D], k and v [K*hd, D], o [D, H*hd], q_norm and k_norm
    [hd], gate and up [F, D], down [D, F], pre_attn_norm, post_attn_norm,
    pre_ffw_norm and post_ffw_norm [D]
  Gemma 4: layer_{i}/skip_scale [1]; per_layer_embed [V, L*P],
    per_layer_projection [L*P, D], per_layer_projection_norm [P],
    layer_{i}/ per_layer_gate [P, D], per_layer_out [D, P], per_layer_norm [D]
  Gemma 4 MoE, where gate, up, down are the dense FFN that all tokens share:
    layer_{i}/ router [E, D], router_scale [D], expert_scale [E],
    experts_gate_up [E, 2*F, D] or experts_gate and experts_up [E, F, D],
    experts_down [E, D, F], dense_pre_norm and dense_post_norm [D] of the
    shared FFN, pre_ffw_norm and moe_post_norm [D] of the experts, and
    post_ffw_norm [D] of their sum
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
import re
from typing import Any, Protocol

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tqdm

from gemma_ext import errors
from gemma_ext.ckpts import _layout

BLOCK_BYTES = 16 << 20
_ALIGNMENT = 64  # What XLA's CPU client needs to take over a host buffer.

_HARMLESS = re.compile(
  r'(^|\.)(rope_freqs|rotary_emb|inv_freq)(\.|$)'
  r'|(^|\.)(vision_tower|vision_model|vision_embedder|audio_tower'
  r'|embed_vision|embed_audio|multi_modal_projector)\.'
  r'|^(v|a|mm|mtp)\.'
)


class TensorSource(Protocol):
  """Tensors of a checkpoint under canonical names.

  Attributes:
    norm_offset: What the file adds to RMSNorm scales: 1.0 where it stores
      1 + scale.
  """

  norm_offset: float

  def has(self, name: str) -> bool:
    """Whether the checkpoint holds the tensor."""

  def shape(self, name: str) -> tuple[int, ...]:
    """Logical shape, rows first; marks the tensor as used."""

  def read(
    self, name: str, start: int = 0, stop: int | None = None
  ) -> np.ndarray:
    """Rows `start:stop` of the first axis, in float32 or bfloat16."""

  def unused(self) -> list[str]:
    """The file's own names of tensors that `shape` was never asked for."""


def is_harmless(name: str) -> bool:
  """Whether a text model may ignore the tensor of this name in the file.

  That is tables which the model computes itself, and media encoders.
  """
  return _HARMLESS.search(name) is not None


def expected_params(model: nn.Module) -> dict[str, Any]:
  """Returns the shapes of the model's parameters, without allocating them."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  tree = jax.eval_shape(model.init, jax.random.key(0), tokens)
  return tree['params']


def assemble(
  model: nn.Module,
  source: TensorSource,
  *,
  dtype: Any = jnp.bfloat16,
  progress: bool = False,
) -> dict[str, Any]:
  """Reads the parameters of `model` from `source`.

  All names and shapes are checked before the first read. Each leaf is
  allocated once, in `dtype`, and filled in blocks of at most 16 MB, so that
  peak host memory is the result and a few blocks. On CPU the arrays take over
  the buffers that were filled.

  Args:
    model: A text-only model of Gemma 2, 3 or 4.
    source: The checkpoint.
    dtype: Dtype of the result: bfloat16, float32 or float16.
    progress: Whether to show a progress bar.

  Returns:
    The nested tree that `model.init()['params']` has.

  Raises:
    MissingTensorError: If a tensor of the model is not in the checkpoint.
    TensorShapeError: If a tensor does not have the model's shape.
    UnexpectedTensorError: If the checkpoint has tensors without a place.
    NonFiniteError: If a tensor holds NaN or infinity.
    UnsupportedTypeError: If `dtype` or the model's family is not supported.
  """
  dtype = np.dtype(dtype)
  if dtype not in (np.dtype(ml_dtypes.bfloat16), np.float32, np.float16):
    raise errors.UnsupportedTypeError(
      f'Parameters in {dtype} are not supported; expected bfloat16, float32'
      ' or float16.'
    )
  leaves = _layout.leaves_of(model, expected_params(model), source)
  _check(leaves, source)
  total = sum(math.prod(leaf.shape) * dtype.itemsize for leaf in leaves)
  params: dict[str, Any] = {}
  with tqdm.tqdm(
    total=total, unit='B', unit_scale=True, desc='Loading', disable=not progress
  ) as bar:
    for leaf in leaves:
      array = aligned_empty(leaf.shape, dtype)
      _fill(leaf, array, source, bar.update)
      _insert(params, leaf.path, to_device(array))
  return params


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns an uninitialised array that XLA on CPU can take over as it is."""
  nbytes = math.prod(shape) * dtype.itemsize
  buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
  offset = -buffer.ctypes.data % _ALIGNMENT
  return buffer[offset : offset + nbytes].view(dtype).reshape(shape)


def to_device(array: np.ndarray) -> jax.Array:
  """Puts `array` on the default device; on CPU without a copy.

  The caller must not write to `array` afterwards.
  """
  return jax.device_put(array, may_alias=True)


def _check(leaves: list[_layout.Leaf], source: TensorSource) -> None:
  """Checks names and shapes of all tensors, before any of them is read."""
  missing = [
    part.name
    for leaf in leaves
    for part in leaf.parts
    if not source.has(part.name)
  ]
  if missing:
    raise errors.MissingTensorError(
      f'The checkpoint lacks {len(missing)} tensors of the model, first'
      f' {missing[:5]}.'
    )
  for leaf in leaves:
    for part in leaf.parts:
      shape = tuple(source.shape(part.name))
      if shape != part.shape:
        raise errors.TensorShapeError(
          f'Tensor {part.name} has shape {shape}; {"/".join(leaf.path)}'
          f' needs {part.shape}.'
        )
  if source.has('output'):
    _check_tied(source)
  unexpected = source.unused()
  if unexpected:
    raise errors.UnexpectedTensorError(
      f'The checkpoint holds {len(unexpected)} tensors that the model has no'
      f' place for, first {sorted(unexpected)[:5]}.'
    )


def _check_tied(source: TensorSource) -> None:
  """Accepts an output head only if it repeats the embedding table."""
  shape, embed = source.shape('output'), source.shape('embed')
  if tuple(shape) != tuple(embed):
    raise errors.UnexpectedTensorError(
      f'The output head has shape {tuple(shape)}, the embedding'
      f' {tuple(embed)}; Gemma uses one table for both.'
    )
  # The two may be quantised differently, to as few as two bits.
  tolerance = 0.5
  for start in np.linspace(0, shape[0] - 1, 8, dtype=int):
    stop = min(int(start) + 4, shape[0])
    head = source.read('output', int(start), stop).astype(np.float64)
    table = source.read('embed', int(start), stop).astype(np.float64)
    if np.linalg.norm(head - table) > tolerance * np.linalg.norm(table):
      raise errors.UnexpectedTensorError(
        'The output head is not the embedding table; Gemma uses one table'
        f' for both, and rows {start}:{stop} differ.'
      )


def _fill(
  leaf: _layout.Leaf,
  array: np.ndarray,
  source: TensorSource,
  done: Callable[[int], Any],
) -> None:
  """Writes all parts of `leaf` into `array`, block by block."""
  if leaf.fill is not None:
    array[...] = leaf.fill
    done(array.nbytes)
  offset = source.norm_offset if leaf.is_norm else 0.0
  for part in leaf.parts:
    for block in _blocks(part, array):
      rows = source.read(part.name, block.start, block.stop)
      view = block.view
      if rows.size != view.size:
        raise errors.TensorShapeError(
          f'Rows {block.start}:{block.stop} of tensor {part.name} hold'
          f' {rows.size} numbers; expected {view.size}.'
        )
      if offset:
        rows = rows.astype(np.float32) - np.float32(offset)
      rows = rows.astype(array.dtype, copy=False)
      if not all_finite(rows):
        raise errors.NonFiniteError(
          f'Tensor {part.name} holds NaN or infinity in rows'
          f' {block.start}:{block.stop}. The checkpoint is damaged, or its'
          f' values do not fit {array.dtype}.'
        )
      view[...] = rows.reshape(view.shape)
      done(view.nbytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Block:
  """Rows of a tensor and where in the leaf they go."""

  start: int
  stop: int
  view: np.ndarray


def _blocks(part: _layout.Part, array: np.ndarray) -> Iterator[_Block]:
  """Splits a part into blocks of whole rows, at most `BLOCK_BYTES` each."""
  for start, view in part.views(array):
    row_bytes = 4 * math.prod(view.shape[1:])
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for first in range(0, view.shape[0], step):
      last = min(first + step, view.shape[0])
      yield _Block(
        start=start + first, stop=start + last, view=view[first:last]
      )


def all_finite(rows: np.ndarray) -> bool:
  """Whether no number is NaN or infinite."""
  if rows.dtype == ml_dtypes.bfloat16:
    # All exponent bits set; far faster than the generic loop of ml_dtypes.
    bits = np.ascontiguousarray(rows).view(np.uint16)
    return not bool(((bits & 0x7F80) == 0x7F80).any())
  return bool(np.isfinite(rows).all())


def _insert(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = leaf
