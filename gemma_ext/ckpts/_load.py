# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`load`: finds a checkpoint, tells its format by content, and reads it."""

from collections.abc import Callable
import dataclasses
import os
import pathlib
from typing import Any

from flax import linen as nn
from gemma import gm
import jax.numpy as jnp

from gemma_ext import errors
from gemma_ext.ckpts import _assemble
from gemma_ext.ckpts import _checkpoint
from gemma_ext.ckpts import _compressed
from gemma_ext.ckpts import _families
from gemma_ext.ckpts import _gguf
from gemma_ext.ckpts import _hf_config
from gemma_ext.ckpts import _hf_names
from gemma_ext.ckpts import _hf_tokenizer
from gemma_ext.ckpts import _manifest
from gemma_ext.ckpts import _orbax
from gemma_ext.ckpts import _safetensors
from gemma_ext.ckpts import _sample
from gemma_ext.ckpts import _search

_GGUF_MAGIC = b'GGUF'
# A folder is listed only so far when nothing in it is recognised.
_MAX_LISTED = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
  """What `load` was asked for beside the path."""

  dtype: Any
  progress: bool
  model: nn.Module | None


def load(
  path_or_name: str | os.PathLike,
  *,
  dtype: Any = jnp.bfloat16,
  progress: bool = False,
  model: nn.Module | None = None,
) -> _checkpoint.Checkpoint:
  """Loads a Gemma checkpoint of any format.

  Args:
    path_or_name: A path (absolute, relative, with `~`, or `gs://` for orbax):
      a .gguf file, a .safetensors file or the directory of a Hugging Face
      model, an orbax directory, a directory that `save` wrote, or a directory
      that holds just one of these. Or a member of `gm.ckpts.CheckpointPath`
      or its name, the name 'gemma3-270m' (extra `samples`), or a name on the
      search path (see `find`). The format is told by content.
    dtype: Type of the parameters; packed ones keep theirs.
    progress: Whether to show a progress bar.
    model: The model that wrote an orbax checkpoint, where its class cannot be
      told from the shapes.

  Returns:
    The checkpoint, which unpacks as model, params, tokenizer.

  Raises:
    CheckpointNotFoundError: If there is no such path or name.
    UnknownFormatError: If it is of no format known here.
    CheckpointError: If it is damaged, by one subclass for each way to be so.
  """
  options = _Options(dtype=dtype, progress=progress, model=model)
  text = _address(path_or_name)
  if '://' in text:
    return _load_orbax(text, options)
  path = _locate(text)
  reader, path = _reader_of(path)
  if model is not None and reader is not _load_orbax:
    raise errors.UnsupportedTypeError(
      f'{path} says itself what model it is; leave out model=.'
    )
  return reader(path, options)


def locate(path_or_name: str | os.PathLike) -> pathlib.Path | str:
  """Finds what `load` would load, without reading it.

  Args:
    path_or_name: As for `load`.

  Returns:
    The absolute path, or the address of a remote checkpoint.

  Raises:
    CheckpointNotFoundError: If there is no such path or name.
  """
  text = _address(path_or_name)
  return text if '://' in text else _locate(text)


def _address(path_or_name: str | os.PathLike) -> str:
  """The path that an official name stands for, else what was given."""
  if isinstance(path_or_name, gm.ckpts.CheckpointPath):
    return path_or_name.value
  text = os.fspath(path_or_name)
  if text in gm.ckpts.CheckpointPath.__members__:
    return gm.ckpts.CheckpointPath[text].value
  return text


def _locate(text: str) -> pathlib.Path:
  """An existing path for what the user typed."""
  path = pathlib.Path(text).expanduser()
  if path.exists():
    return path.absolute()
  if text == _sample.NAME:
    return _sample.sample_path()
  try:
    return _search.find(text).absolute()
  except errors.CheckpointNotFoundError as e:
    builtin = [_sample.NAME, *gm.ckpts.CheckpointPath.__members__]
    near = _search.near_misses(text, builtin)
    hint = f'\nBuilt-in names like it: {", ".join(near)}.' if near else ''
    raise errors.CheckpointNotFoundError(f'{e}{hint}') from None


_Reader = Callable[[Any, _Options], _checkpoint.Checkpoint]


def _reader_of(path: pathlib.Path) -> tuple[_Reader, pathlib.Path]:
  """Tells the format of a file or directory.

  Raises:
    UnknownFormatError: If it is none that can be read.
  """
  if not path.is_dir():
    reader = _file_reader(path)
    if reader is None:
      with open(path, 'rb') as f:
        head = f.read(8)
      raise errors.UnknownFormatError(
        f'{path} begins with {head!r}; expected a GGUF or safetensors file.'
      )
    return reader, path
  reader = _directory_reader(path)
  if reader is not None:
    return reader, path
  entries = sorted(path.iterdir())[:_MAX_LISTED]
  # Kaggle and gsutil put the checkpoint one level down, the tokenizer beside.
  inner = [
    (found, e)
    for e in entries
    if not e.name.startswith('.') and (found := _inner_reader(e))
  ]
  if len(inner) == 1:
    return inner[0]
  names = [e.name for e in entries[:10]]
  raise errors.UnknownFormatError(
    f'{path} holds {len(inner)} checkpoints where one was expected. It holds'
    f' {names}. Looked for {_manifest.NAME}, {_hf_config.CONFIG_NAME},'
    f' {", ".join(_orbax.MARKERS)} and one .gguf file.'
  )


def _inner_reader(path: pathlib.Path) -> _Reader | None:
  if path.is_dir():
    return _directory_reader(path)
  return _load_gguf if _file_reader(path) is _load_gguf else None


def _directory_reader(path: pathlib.Path) -> _Reader | None:
  if (path / _manifest.NAME).is_file():
    return _load_own
  if _orbax.is_orbax(path):
    return _load_orbax
  if (path / _hf_config.CONFIG_NAME).is_file():
    return _load_hf
  return None


def _file_reader(path: pathlib.Path) -> _Reader | None:
  if not path.is_file():
    return None
  with open(path, 'rb') as f:
    if f.read(4) == _GGUF_MAGIC:
      return _load_gguf
  if _safetensors.is_safetensors(path) or path.suffix == _safetensors.SUFFIX:
    return _load_hf
  # An empty or cut file of that name deserves the error of its format.
  return _load_gguf if path.suffix == '.gguf' else None


def _load_gguf(path: pathlib.Path, options: _Options):
  model, params, tokenizer = _gguf.load_gguf(
    path, dtype=options.dtype, progress=options.progress
  )
  return _checkpoint.Checkpoint(
    model=model, params=params, tokenizer=tokenizer, source=str(path)
  )


def _load_orbax(path: Any, options: _Options):
  return _orbax.load(path, dtype=options.dtype, model=options.model)


def _load_own(path: pathlib.Path, options: _Options):
  return _compressed.load(path, dtype=options.dtype)


def _load_hf(path: pathlib.Path, options: _Options):
  """A Hugging Face directory, or one file with its config.json beside it."""
  directory = path if path.is_dir() else path.parent
  hparams = _hf_config.read(directory / _hf_config.CONFIG_NAME)
  if path.is_dir():
    entries = _safetensors.read_directory(path)
  else:
    entries = _safetensors.read_header(path)
  model = _families.model_from_hparams(hparams, dtype=options.dtype)
  # Before the weights, because it is quick and as likely to be wrong.
  tokenizer = _hf_tokenizer.read(directory, model)
  source = _hf_names.HfSource(entries, is_moe=hparams.num_experts > 0)
  params = _assemble.assemble(
    model, source, dtype=options.dtype, progress=options.progress
  )
  return _checkpoint.Checkpoint(
    model=model, params=params, tokenizer=tokenizer, source=str(path)
  )
