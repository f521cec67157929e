# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Official orbax checkpoints, their model class found from their shapes."""

from collections.abc import Mapping
import os
from typing import Any

from etils import epath
from flax import linen as nn
from gemma import gm
from gemma.gm.ckpts import _checkpoint as gm_checkpoint
import jax
import jax.numpy as jnp
from orbax import checkpoint as ocp

from gemma_ext import errors
from gemma_ext.ckpts import _assemble
from gemma_ext.ckpts import _checkpoint
from gemma_ext.ckpts import _hf_tokenizer
from gemma_ext.ckpts import _model_classes

MARKERS = ('_METADATA', '_CHECKPOINT_METADATA', 'manifest.ocdbt')

# pylint: disable=protected-access

# Knows the layouts that official checkpoints come in.
_Layouts = gm_checkpoint._CheckpointTree

# Parameters of vision and audio encoders, by their first keys.
_MEDIA = (
  ('vision_encoder',),
  ('audio_encoder',),
  ('embedder', 'mm_input_projection'),
  ('embedder', 'mm_soft_embedding_norm'),
  ('embedder', 'mm_pre_projection_norm'),
  ('embedder', 'audio_input_projection'),
  ('embedder', 'audio_soft_embedding_norm'),
  ('embedder', 'audio_input_embedding'),
)


def load(
  path: epath.PathLike,
  *,
  dtype: Any = jnp.bfloat16,
  model: nn.Module | None = None,
) -> _checkpoint.Checkpoint:
  """Loads a checkpoint written by `gm.ckpts.save_params` or a gm trainer.

  Args:
    path: Its directory, local or `gs://`.
    dtype: Type of the parameters and of the model.
    model: The model, where its class cannot be told from the shapes. Must be
      given for sizes that no official class has.

  Returns:
    The checkpoint; text only unless `model` says otherwise.

  Raises:
    HeaderError: If it is not an orbax checkpoint of parameters.
    UnsupportedTypeError: If no official class has its shapes.
    TensorShapeError: If it does not fit `model`.
    MissingTensorError: If it lacks parameters of `model`.
    UnexpectedTensorError: If it has others.
    TruncatedFileError: If its data cannot be read.
  """
  path = epath.Path(path)
  if '://' not in os.fspath(path):
    path = epath.Path(os.path.abspath(os.fspath(path)))
  tree = _nested_shapes(path)
  if model is None:
    model = infer_model(tree, dtype=dtype, source=str(path))
  else:
    check_tree(tree, _assemble.expected_params(model), source=str(path))
  # Without a device orbax would give numpy arrays.
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  wanted = _assemble.expected_params(model)
  has_vision = 'vision_encoder' in wanted
  # gm leaves vision out by itself; what only audio needs is read and dropped.
  target = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, dtype, sharding=device),
    tree if has_vision else _without_vision(tree),
  )
  try:
    params = gm.ckpts.load_params(path, params=target)
  except Exception as e:  # orbax and tensorstore raise of every kind
    raise errors.TruncatedFileError(
      f'{path}: orbax cannot read the parameters: {e!s:.500}'
    ) from e
  return _checkpoint.Checkpoint(
    model=model,
    params=_only(params, wanted),
    tokenizer=_tokenizer(path, model),
    source=str(path),
  )


def is_orbax(path: epath.PathLike) -> bool:
  """Whether a directory has the files that orbax writes."""
  return any((epath.Path(path) / name).exists() for name in MARKERS)


def _nested_shapes(path: epath.Path) -> dict[str, Any]:
  """Shapes and types in the NESTED layout, whatever the stored one is."""
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      tree, _ = gm_checkpoint._get_metadata_and_path(checkpointer, path)
    nested = _Layouts.shape_dtype_struct_like(tree=tree).nested_tree
  except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
    raise errors.HeaderError(
      f'{path} is not an orbax checkpoint of Gemma parameters: {e!s:.300}'
    ) from e
  if not isinstance(nested, Mapping) or 'embedder' not in nested:
    raise errors.HeaderError(
      f'{path} does not hold Gemma parameters: expected the keys embedder,'
      f' layer_0, ..., final_norm, got {sorted(nested)[:5]}.'
    )
  return dict(nested)


def infer_model(
  tree: Mapping[str, Any], *, dtype: Any = jnp.bfloat16, source: str = ''
) -> nn.Module:
  """Finds the official class whose parameters have these shapes.

  Args:
    tree: Nested parameters or their shapes.
    dtype: Parameter type of the model.
    source: Names the checkpoint in the error.

  Raises:
    UnsupportedTypeError: If there is none. Shapes do not tell window sizes,
      soft caps and position scales, so that no model is made up for them.
  """
  shapes = flat_shapes(tree)
  layers = len({k.split('/')[0] for k in shapes if k.startswith('layer_')})
  table = shapes.get('embedder/input_embedding')
  for family in _model_classes.FAMILIES.values():
    for cls in family.official:
      config = _model_classes.text_config(cls)
      if (config.num_layers, (config.num_embed, config.embed_dim)) != (
        layers,
        table,
      ):
        continue
      model = _model_classes.build(cls, config, dtype)
      if flat_shapes(_assemble.expected_params(model)) == shapes:
        return model
  raise errors.UnsupportedTypeError(
    f'{source}: no official Gemma has {layers} layers and an embedding table'
    f' of {table} with these shapes. Shapes alone do not tell window sizes,'
    ' soft caps and position scales: pass the model that wrote it,'
    ' load(path, model=...).'
  )


def flat_shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """'layer_0/mlp/linear' -> shape, without the encoders of other media."""
  out = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    path = tuple(k.key for k in keys)
    if not any(path[: len(m)] == m for m in _MEDIA):
      out['/'.join(path)] = tuple(leaf.shape)
  return out


def check_tree(
  tree: Mapping[str, Any], expected: Mapping[str, Any], *, source: str
) -> None:
  """Checks the shapes of stored parameters against those of a model.

  Raises:
    MissingTensorError: If the model has parameters that are not stored.
    UnexpectedTensorError: If others are stored.
    TensorShapeError: If a shape differs.
  """
  have, want = flat_shapes(tree), flat_shapes(expected)
  missing = sorted(want.keys() - have.keys())
  if missing:
    raise errors.MissingTensorError(
      f'{source} lacks {len(missing)} parameters of the model, first'
      f' {missing[:5]}.'
    )
  unexpected = sorted(have.keys() - want.keys())
  if unexpected:
    raise errors.UnexpectedTensorError(
      f'{source} has {len(unexpected)} parameters that the model has no'
      f' place for, first {unexpected[:5]}.'
    )
  for name, shape in want.items():
    if have[name] != shape:
      raise errors.TensorShapeError(
        f'{source}: {name} has shape {have[name]}; the model needs {shape}.'
      )


def _without_vision(tree: dict[str, Any]) -> dict[str, Any]:
  if 'vision_encoder' not in tree:
    return tree
  return _Layouts(tree=tree).as_nested(remove_mm=True).tree


def _only(params: Mapping[str, Any], wanted: Mapping[str, Any]) -> Any:
  """The part of `params` that the model has."""
  return {
    k: _only(params[k], v) if isinstance(v, Mapping) else params[k]
    for k, v in wanted.items()
  }


def _tokenizer(path: epath.Path, model: nn.Module) -> gm.text.Tokenizer | None:
  """From a tokenizer.model in the directory or beside it, else the default."""
  if '://' not in os.fspath(path):
    for folder in (path, path.parent):
      file = folder / _hf_tokenizer.SENTENCEPIECE_NAME
      if file.is_file():
        return _hf_tokenizer.from_sentencepiece(file, model)
  return _checkpoint.default_tokenizer(model)
