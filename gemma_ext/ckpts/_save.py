# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes our own directories, all or nothing."""

from collections.abc import Mapping
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
from typing import Any
import uuid

from absl import logging
from etils import epath
from flax import linen as nn
from gemma import gm
from gemma.gm.utils import _file_cache
import jax
import jax.numpy as jnp
import numpy as np
from orbax import checkpoint as ocp

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.ckpts import _checkpoint
from gemma_ext.ckpts import _compressed
from gemma_ext.ckpts import _families
from gemma_ext.ckpts import _manifest

_PACKAGES = ('gemma_ext', 'gemma', 'jax', 'flax', 'orbax-checkpoint')
# Of an array: its name, shape and place, as orbax writes them; 650 to 760.
_LEAF_BYTES = 800
_FOLDER_BYTES = 32_768
# That parameters are written, if orbax keeps more than that.
_TIMES = 3


def save(
  path: os.PathLike | str,
  checkpoint: _checkpoint.Checkpoint | None = None,
  *,
  model: nn.Module | None = None,
  params: Mapping[str, Any] | None = None,
  tokenizer: gm.text.Tokenizer | None = None,
  recipe: recipe_lib.Recipe | None = None,
  source: str = '',
  metadata: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> pathlib.Path:
  """Saves a checkpoint as a directory that `load` reads.

  It is written beside its place under another name and renamed when it is
  complete, so that a directory is never half of one. Under `jax.distributed`
  one process alone calls this.

  Args:
    path: The directory, local.
    checkpoint: What to save; or give its parts:
    model: The model, dense or a `gx.nn.Compressed`.
    params: Its parameters, in the nested layout.
    tokenizer: Its tokenizer.
    recipe: What `params` are packed with, if `model` is the dense model.
    source: Where the dense parameters came from.
    metadata: Anything more to keep, as JSON values.
    overwrite: Whether to replace what `save` wrote at `path` earlier.

  Returns:
    The absolute path of the directory.

  Raises:
    ParamsMismatchError: If the parameters are not those of model and recipe.
    NonFiniteError: If a parameter holds NaN or infinity.
    CheckpointExistsError: If there is something at `path` that may not be
      replaced.
  """
  if checkpoint is not None:
    if model is not None or params is not None:
      raise errors.ParamsMismatchError(
        'Give a checkpoint, or model and params, not both.'
      )
    model, params = checkpoint.model, checkpoint.params
    tokenizer = tokenizer or checkpoint.tokenizer
    recipe = recipe or checkpoint.recipe
    source = source or checkpoint.source
    metadata = checkpoint.metadata if metadata is None else metadata
  if model is None or params is None:
    raise errors.ParamsMismatchError(
      'Nothing to save: give a checkpoint, or model= and params=.'
    )
  target = check_target(path, overwrite=overwrite)
  dense, recipe = _unwrap(model, recipe)
  whole = (
    dense if recipe is None else gx_nn.Compressed(model=dense, recipe=recipe)
  )
  params = _as_dict(params)
  _compressed.check_params(params, whole, what='save')
  _compressed.check_finite(params, target)
  manifest = {
    'format': _manifest.FORMAT,
    'version': _manifest.VERSION,
    'model': _families.model_to_json(dense),
    'recipe': None if recipe is None else recipe.to_json(),
    'dtype': jnp.dtype(dense.dtype).name,
    'tokenizer': None,
    'source': source,
    'metadata': _json_metadata(metadata),
    'created_with': _versions(),
    'params': _compressed.tree_spec(params),
  }
  target.parent.mkdir(parents=True, exist_ok=True)
  unique = uuid.uuid4().hex[:12]
  partial = target.with_name(f'.{target.name}.{unique}.partial')
  try:
    partial.mkdir()
    manifest['tokenizer'] = _save_tokenizer(partial, tokenizer)
    _save_params(partial / _compressed.PARAMS_NAME, params)
    _manifest.write(partial / _manifest.NAME, manifest)
    _move(partial, target, unique)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return target


def _save_params(path: pathlib.Path, params: dict[str, Any]) -> None:
  leaves = jax.tree.leaves(params)
  size = sum(leaf.nbytes for leaf in leaves)
  most = size + max(overhead_bytes(len(leaves)), size // 1000)
  for _ in range(_TIMES):
    shutil.rmtree(path, ignore_errors=True)
    _write_params(path, params)
    # Of a small model what orbax keeps of commits on the way is many bytes.
    if _compressed.folder_bytes(path) <= most:
      break


def _write_params(path: pathlib.Path, params: dict[str, Any]) -> None:
  options = ocp.options.MultiprocessingOptions()
  if jax.process_count() > 1:
    # Orbax would wait for the other processes, which save nothing.
    options = ocp.options.MultiprocessingOptions(
      primary_host=jax.process_index(),
      active_processes={jax.process_index()},
      barrier_sync_key_prefix=uuid.uuid4().hex,
    )
    # Nor would it write the arrays of one process.
    params = jax.tree.map(np.asarray, params)
  handler = _compressed.handler(options)
  with ocp.Checkpointer(
    handler, multiprocessing_options=options
  ) as checkpointer:
    checkpointer.save(path, ocp.args.PyTreeSave(params))


def directory_bytes(path: os.PathLike | str) -> dict[str, int]:
  """Sizes of a directory that `save` wrote, in bytes.

  Returns:
    'params': of DIR/params, 'tokenizer': of DIR/tokenizer.model, 'total': of
    every file.
  """
  path = pathlib.Path(path).expanduser().absolute()
  if not _compressed.is_own(path):
    raise errors.UnknownFormatError(
      f'{path} is not a directory that gx.ckpts.save wrote.'
    )
  tokenizer = path / _compressed.TOKENIZER_NAME
  return {
    'params': _compressed.folder_bytes(path / _compressed.PARAMS_NAME),
    'tokenizer': tokenizer.stat().st_size if tokenizer.exists() else 0,
    'total': _compressed.folder_bytes(path),
  }


def overhead_bytes(leaves: int) -> int:
  """Bytes of DIR/params beside the numbers of so many arrays, at most.

  Orbax writes 650 to 760 bytes an array, its name, shape and place, and some
  thousands for all of them; where it is slow it commits more often, and keeps
  the tree of every commit.

  Args:
    leaves: Number of arrays.
  """
  return _FOLDER_BYTES + _LEAF_BYTES * leaves


def check_target(
  path: os.PathLike | str, *, overwrite: bool = False
) -> pathlib.Path:
  """Checks that `save` may write to `path`, before there is work to lose.

  Returns:
    The absolute path.

  Raises:
    CheckpointExistsError: If there is something that may not be replaced.
  """
  if '://' in os.fspath(path):
    raise errors.UnsupportedTypeError(
      f'{path}: save to a local directory and copy it from there.'
    )
  target = pathlib.Path(path).expanduser().absolute()
  if not os.path.lexists(target):
    return target
  if not _compressed.is_own(target) or target.is_symlink():
    raise errors.CheckpointExistsError(
      f'{target} exists and is not a directory that gx.ckpts.save wrote; it'
      ' is left alone. Choose another path.'
    )
  if not overwrite:
    raise errors.CheckpointExistsError(
      f'{target} exists. Pass overwrite=True to replace it.'
    )
  return target


def _unwrap(
  model: nn.Module, recipe: recipe_lib.Recipe | None
) -> tuple[nn.Module, recipe_lib.Recipe | None]:
  if not isinstance(model, gx_nn.Compressed):
    return model, recipe
  if recipe is not None and recipe != model.recipe:
    raise errors.ParamsMismatchError(
      'The model is compressed with another recipe than the one given.'
    )
  return model.model, model.recipe


def _as_dict(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Plain dicts, of which orbax keeps the keys as they are."""
  return {
    k: _as_dict(v) if isinstance(v, Mapping) else v for k, v in tree.items()
  }


def _json_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
  metadata = dict(metadata or {})
  try:
    json.dumps(metadata, allow_nan=False)
  except (TypeError, ValueError) as e:
    raise errors.CheckpointError(f'metadata is not made of JSON: {e}') from e
  return metadata


def _versions() -> dict[str, str]:
  out = {}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      out[name] = importlib.metadata.version(name)
  return out


def _save_tokenizer(
  folder: pathlib.Path, tokenizer: gm.text.Tokenizer | None
) -> dict[str, Any] | None:
  """Copies the SentencePiece file; returns its entry in the manifest."""
  if tokenizer is None:
    return None
  try:
    cached = _file_cache.maybe_get_from_cache(
      remote_file_path=tokenizer.path, cache_subdir='tokenizer'
    )
    data = epath.Path(cached).read_bytes()
  except Exception as e:  # whatever a remote file system raises
    if '://' not in os.fspath(tokenizer.path):
      raise errors.TokenizerError(
        f'The tokenizer {tokenizer.path} cannot be read: {e}'
      ) from e
    # It is the official one, which `load` then refers to again.
    logging.warning('%s cannot be reached and is not copied.', tokenizer.path)
    return None
  (folder / _compressed.TOKENIZER_NAME).write_bytes(data)
  return {
    'file': _compressed.TOKENIZER_NAME,
    'sha256': hashlib.sha256(data).hexdigest(),
    'custom_tokens': {str(k): v for k, v in tokenizer.custom_tokens.items()},
  }


def _move(partial: pathlib.Path, target: pathlib.Path, unique: str) -> None:
  """Puts the new directory in its place."""
  if not target.exists():
    os.rename(partial, target)
    return
  # Directories cannot be exchanged in one step everywhere: until the second
  # rename is done the earlier one is whole, under this name.
  earlier = target.with_name(f'.{target.name}.{unique}.replaced')
  os.rename(target, earlier)
  try:
    os.rename(partial, target)
  except OSError:
    os.rename(earlier, target)
    raise
  shutil.rmtree(earlier)
