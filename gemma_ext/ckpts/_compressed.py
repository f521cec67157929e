# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Our own directories: an orbax tree, `recipe.json` and the tokenizer.

  DIR/recipe.json      model, recipe, shapes and hashes; data only
  DIR/params/          the parameters as orbax stores them, uncompressed
  DIR/tokenizer.model  SentencePiece

The chunks are stored as they are, so that the size of a directory is the size
of its parameters, whatever the values. Plain `ocp.StandardCheckpointer` and
`gm.ckpts.load_params` read DIR/params too.
"""

from collections.abc import Mapping
import hashlib
import math
import os
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from orbax import checkpoint as ocp

from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.ckpts import _assemble
from gemma_ext.ckpts import _checkpoint
from gemma_ext.ckpts import _families
from gemma_ext.ckpts import _manifest
from gemma_ext.ckpts import _store
from gemma_ext.ckpts import _strict_json

PARAMS_NAME = 'params'
TOKENIZER_NAME = 'tokenizer.model'

_BLOCK = 1 << 22
# Leaves of a packed weight.
_PACKED = {'codes', 'scale'}
_FLOATS = ('bfloat16', 'float16', 'float32')


def is_own(path: os.PathLike | str) -> bool:
  """Whether a directory is one that `save` wrote."""
  file = pathlib.Path(path) / _manifest.NAME
  try:
    data = _strict_json.read_object(file, limit=_manifest.MAX_BYTES)
  except errors.CheckpointError:
    return False
  return data.get('format') == _manifest.FORMAT


def load(
  path: os.PathLike | str, *, dtype: Any = None
) -> _checkpoint.Checkpoint:
  """Loads a directory that `save` wrote.

  Everything is checked against `recipe.json`, and that against the model, the
  recipe and the size of the files, before any parameter is read.

  Args:
    path: The directory.
    dtype: Type of dense parameters and of the model; `None` for the one it was
      saved with. Packed codes and their scales keep their own.

  Returns:
    The checkpoint. Its model is a `gx.nn.Compressed` if it has a recipe.

  Raises:
    HeaderError: If recipe.json is malformed or of another version.
    HeaderTooLargeError: If it, or a size in it, is too large.
    RecipeError: If the recipe in it is not valid for the model.
    ParamsMismatchError: If the parameters are not those of model and recipe.
    TruncatedFileError: If the parameters cannot be read.
    NonFiniteError: If a parameter holds NaN or infinity.
    ChecksumError: If the tokenizer does not have its hash.
    MissingTensorError: If a file is missing.
  """
  path = pathlib.Path(path).expanduser().absolute()
  manifest = _manifest.read(path / _manifest.NAME)
  spec = manifest['params']
  _check_bytes(path / PARAMS_NAME, spec)
  saved_dtype = jnp.dtype(manifest['dtype'])
  dense = _families.model_from_json(
    manifest['model'], dtype=saved_dtype if dtype is None else dtype
  )
  _check_layers(dense, spec, path)
  model, recipe = dense, None
  if manifest['recipe'] is not None:
    recipe = recipe_lib.Recipe.from_json(manifest['recipe'])
    model = gx_nn.Compressed(model=dense, recipe=recipe)
  expected = _assemble.expected_params(model)
  _check_spec(spec, expected, path)
  tokenizer = _load_tokenizer(path, manifest['tokenizer'], dense)
  params = _restore(path / PARAMS_NAME, spec)
  check_finite(params, path)
  _check_ranks(model, params, path)
  if dtype is not None and jnp.dtype(dtype) != saved_dtype:
    params = _cast_dense(params, dtype)
  return _checkpoint.Checkpoint(
    model=model,
    params=params,
    tokenizer=tokenizer,
    source=str(path),
    recipe=recipe,
    metadata=manifest['metadata'],
  )


def tree_spec(params: Mapping[str, Any]) -> dict[str, Any]:
  """Shape and type of every leaf: 'layer_0/mlp/linear' -> {shape, dtype}."""
  out = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    names: list[Any] = [getattr(k, 'key', None) for k in keys]
    if not all(isinstance(n, str) and n and '/' not in n for n in names):
      raise errors.ParamsMismatchError(
        f'Parameters must be nested dicts with names as keys, got {keys!r}.'
      )
    out['/'.join(names)] = {
      'shape': list(leaf.shape),
      'dtype': jnp.dtype(leaf.dtype).name,
    }
  return out


def check_params(
  params: Mapping[str, Any], model: nn.Module, *, what: str
) -> None:
  """Checks that parameters are those of a model.

  Raises:
    ParamsMismatchError: If they are not.
  """
  _check_spec(tree_spec(params), _assemble.expected_params(model), what)


def handler(
  processes: ocp.options.MultiprocessingOptions | None = None,
) -> ocp.PyTreeCheckpointHandler:
  """The orbax handler of our directories: one store, chunks as they are."""
  return ocp.PyTreeCheckpointHandler(
    use_ocdbt=True,
    use_zarr3=False,
    use_compression=False,
    multiprocessing_options=processes or ocp.options.MultiprocessingOptions(),
  )


def _check_bytes(folder: pathlib.Path, spec: Mapping[str, Any]) -> None:
  """Bounds what will be allocated by what is on disk."""
  if not folder.is_dir():
    raise errors.MissingTensorError(f'{folder}: no such directory.')
  promised = sum(_leaf_bytes(v) for v in spec.values())
  present = folder_bytes(folder)
  if promised > present:
    raise errors.TruncatedFileError(
      f'{folder} holds {present} bytes, but {_manifest.NAME} promises'
      f' {promised} bytes of parameters.'
    )


def folder_bytes(folder: pathlib.Path) -> int:
  """Bytes of all files below a folder."""
  return sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())


def _leaf_bytes(leaf: Mapping[str, Any]) -> int:
  shape, dtype = _shape_and_type(leaf)
  return math.prod(shape) * dtype.itemsize


def _check_layers(
  model: nn.Module, spec: Mapping[str, Any], path: pathlib.Path
) -> None:
  """A cheap look before the model is traced, which takes time per layer."""
  have = len({k.split('/')[0] for k in spec if k.startswith('layer_')})
  if have != model.config.num_layers:
    raise errors.ParamsMismatchError(
      f'{path}: the model has {model.config.num_layers} layers, the'
      f' parameters {have}.'
    )


def _check_spec(
  spec: Mapping[str, Any], expected: Mapping[str, Any], source: Any
) -> None:
  """Checks shapes and types of leaves against what the model expects."""
  want = tree_spec(expected)
  missing = sorted(want.keys() - spec.keys())
  unexpected = sorted(spec.keys() - want.keys())
  if missing or unexpected:
    raise errors.ParamsMismatchError(
      f'{source}: the parameters are not those of the model and its recipe:'
      f' {len(missing)} are missing, first {missing[:3]};'
      f' {len(unexpected)} have no place, first {unexpected[:3]}.'
    )
  for name, leaf in want.items():
    got = spec[name]
    same_type = got['dtype'] == leaf['dtype'] or (
      got['dtype'] in _FLOATS and leaf['dtype'] in _FLOATS
    )
    if got['shape'] != leaf['shape'] or not same_type:
      raise errors.ParamsMismatchError(
        f'{source}: {name} is {got["dtype"]}{got["shape"]}; the model and'
        f' its recipe need {leaf["dtype"]}{leaf["shape"]}.'
      )


def _restore(folder: pathlib.Path, spec: Mapping[str, Any]) -> dict[str, Any]:
  """Reads every array onto the default device, types as stored.

  Host memory peaks at the result and some blocks, where `save` wrote from one
  device, and at the result and the largest array at most.
  """
  params: dict[str, Any] = {}
  try:
    with ocp.Checkpointer(handler()) as checkpointer:
      _check_stored(checkpointer.metadata(folder), spec, folder)
    store = _store.Store(folder)
    packed = _room_for_packed(spec)
    # The largest first: what reading it takes is free again for the others.
    for name in sorted(spec, key=lambda n: -_leaf_bytes(spec[n])):
      array = packed.pop(name, None)
      if array is None:
        array = _assemble.aligned_empty(*_shape_and_type(spec[name]))
      store.read(name, array)
      *parents, last = name.split('/')
      branch = params
      for key in parents:
        branch = branch.setdefault(key, {})
      # Waiting keeps a transfer to an accelerator from piling up buffers.
      branch[last] = _assemble.to_device(array).block_until_ready()
  except errors.GemmaExtError:
    raise
  except Exception as e:  # orbax and tensorstore raise of every kind
    raise errors.TruncatedFileError(
      f'{folder}: the parameters cannot be read: {e!s:.500}'
    ) from e
  return params


def _room_for_packed(spec: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Memory for packed weights, in the order that a CPU will read them in."""
  if jax.local_devices()[0].platform != 'cpu':
    return {}
  # Others may be cast, and their memory is to be free then.
  names = [n for n in spec if n.rpartition('/')[2] in _PACKED]
  arrays = kernels.empty_side_by_side(_shape_and_type(spec[n]) for n in names)
  return dict(zip(names, arrays, strict=True))


def _shape_and_type(
  leaf: Mapping[str, Any],
) -> tuple[tuple[int, ...], np.dtype]:
  return tuple(leaf['shape']), np.dtype(leaf['dtype'])


def _check_stored(
  metadata: Any, spec: Mapping[str, Any], folder: pathlib.Path
) -> None:
  """Checks what orbax says it stores against recipe.json."""
  item = getattr(metadata, 'item_metadata', metadata)
  if item is None:
    raise errors.HeaderError(f'{folder} is not an orbax checkpoint.')
  stored = tree_spec(getattr(item, 'tree', item))
  if stored != dict(spec):
    wrong = sorted(
      k for k in stored.keys() | spec.keys() if stored.get(k) != spec.get(k)
    )
    raise errors.ParamsMismatchError(
      f'{folder} stores {wrong[0]} as {stored.get(wrong[0])};'
      f' {_manifest.NAME} says {spec.get(wrong[0])} ({len(wrong)} differ).'
    )


def check_finite(params: Mapping[str, Any], path: pathlib.Path) -> None:
  """Raises NonFiniteError if a parameter, or a scale, is not finite."""
  for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      continue
    flat = np.asarray(leaf).reshape(-1)
    # In blocks, because the check makes temporaries of their size.
    if not all(
      _assemble.all_finite(flat[i : i + _BLOCK])
      for i in range(0, flat.size, _BLOCK)
    ):
      name = '/'.join(k.key for k in keys)
      raise errors.NonFiniteError(f'{path}: {name} holds NaN or infinity.')


def _check_ranks(
  model: nn.Module, params: Mapping[str, Any], path: pathlib.Path
) -> None:
  """Raises ParamsMismatchError unless places of rows are all there once."""
  if not isinstance(model, gx_nn.Compressed):
    return
  sites = gx_nn.methods_of(model.model, model.recipe).values()
  for whole in {site.whole for site, _ in sites if site.ordered}:
    leaf: Any = params
    for key in gx_nn.rank_path(whole).split('/'):
      leaf = leaf[key]
    if not np.array_equal(np.sort(leaf), np.arange(leaf.size)):
      raise errors.ParamsMismatchError(
        f'{path}: the places of the rows of {whole} are not 0 to'
        f' {leaf.size - 1}, each once.'
      )


def _cast_dense(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
  """Casts floating leaves, except those of packed weights."""
  out: dict[str, Any] = {}
  for key, value in params.items():
    if isinstance(value, Mapping):
      packed = set(value) == _PACKED
      out[key] = dict(value) if packed else _cast_dense(value, dtype)
    elif jnp.issubdtype(value.dtype, jnp.floating) and 'rows_0' not in params:
      out[key] = value.astype(dtype)
    else:
      out[key] = value
  return out


def _load_tokenizer(
  path: pathlib.Path, entry: Mapping[str, Any] | None, model: nn.Module
) -> Any:
  if entry is None:
    return _checkpoint.default_tokenizer(model)
  file = path / entry['file']
  try:
    with open(file, 'rb') as f:
      digest = hashlib.file_digest(f, 'sha256').hexdigest()
  except OSError as e:
    raise errors.MissingTensorError(f'{file}: {e.strerror}.') from e
  if digest != entry['sha256']:
    raise errors.ChecksumError(
      f'{file} has sha256 {digest}; {_manifest.NAME} says {entry["sha256"]}.'
    )
  cls = _families.tokenizer_class(model)
  custom = {int(k): v for k, v in entry['custom_tokens'].items()}
  return cls(path=str(file), custom_tokens=custom)
