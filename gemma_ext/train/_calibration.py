# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Calibration for healing: what the dense model does, kept on disk.

One pass over the text keeps, for every layer, the residual stream after the
feed-forward branch (the target of healing) and its norms; a second one, over
fewer windows, the Fisher information of the loss at the same place. All of it
is memory-mapped, so that healing a layer needs that layer's pages only, and
named by a hash of model, parameters and tokens, so that it is made once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any, Literal

from absl import logging
from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tqdm

from gemma_ext import errors
from gemma_ext.train import _capture

_VERSION = 1
_PAD, _BOS = 0, 2
_FLUSH = 16  # Windows between two entries in the journal.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """Activations and statistics of the dense model on a text.

  Attributes:
    path: Directory of the files.
    tokens: Token ids `[W, L]`, padded with 0.
    layers: Names of the layers, in order.
    width: D, of the residual stream.
  """

  path: pathlib.Path
  tokens: np.ndarray
  layers: tuple[str, ...]
  width: int

  def target(self, layer: str) -> np.ndarray:
    """bfloat16 `[W, L, D]`: the residual stream after a layer's branch."""
    return _open(self._file(layer), self._shape, mode='r')

  @property
  def final(self) -> np.ndarray:
    """bfloat16 `[W, L, D]`: what the output head reads."""
    return _open(self._file('final'), self._shape, mode='r')

  @functools.cached_property
  def fisher(self) -> dict[str, np.ndarray]:
    """float32 `[D, D]` by layer: mean of `|t|^2 g g^T` over tokens.

    g is the gradient of the negative log-likelihood with respect to the
    residual stream t after the branch.
    """
    with np.load(self.path / 'fisher.npz', allow_pickle=False) as file:
      return {layer: file[layer] for layer in self.layers}

  @property
  def mask(self) -> np.ndarray:
    """Bool `[W, L]`: tokens that are not padding."""
    return self.tokens != _PAD

  @property
  def _shape(self) -> tuple[int, int, int]:
    return (*self.tokens.shape, self.width)

  def _file(self, name: str) -> pathlib.Path:
    return self.path / f'{name}.bf16'


def nbytes(model: nn.Module, tokens: np.ndarray) -> int:
  """Bytes on disk that `calibrate` will take."""
  layers, width = model.config.num_layers, model.config.embed_dim
  return (layers + 1) * tokens.size * width * 2 + layers * width * width * 4


def calibrate(
  model: nn.Module,
  params: Mapping[str, Any],
  tokens: Any,
  *,
  directory: str | os.PathLike[str],
  fisher_windows: int = 16,
  max_bytes: int = 16 << 30,
  seed: int = 0,
  progress: bool = False,
) -> Calibration:
  """Runs the dense model over a text once, or finds that it was run.

  A run that was killed goes on where it stopped.

  Args:
    model: The official model.
    params: Its dense parameters.
    tokens: Token ids `[W, L]`, padded with 0.
    directory: Where calibrations are kept, one folder each.
    fisher_windows: Windows that the Fisher information is taken from.
    max_bytes: Bytes on disk that may be used.
    seed: Of the labels that are drawn from the model for the Fisher.
    progress: Whether to show bars with the time left.

  Returns:
    The calibration.

  Raises:
    TrainError: If the tokens are no integer matrix, the model cannot be healed
      by layers, or more than `max_bytes` would be needed.
    NonFiniteError: If the model gives NaN or infinity.
  """
  _capture.check(model)
  tokens = np.asarray(tokens)
  if (
    tokens.ndim != 2
    or not tokens.size
    or not np.issubdtype(tokens.dtype, np.integer)
  ):
    raise errors.TrainError(
      'Calibration tokens must be integers of shape [windows, length], got'
      f' {tokens.dtype} {tokens.shape}.'
    )
  tokens = tokens.astype(np.int32)
  need = nbytes(model, tokens)
  if need > max_bytes:
    raise errors.TrainError(
      f'Calibration on {tokens.size:,} tokens takes {need / 1e9:.1f} GB on'
      f' disk, more than the {max_bytes / 1e9:.1f} GB allowed. Give fewer'
      ' tokens, or a larger max_bytes.'
    )
  key = _fingerprint(model, params, tokens, fisher_windows, seed)
  path = pathlib.Path(directory).expanduser().absolute() / key
  path.mkdir(parents=True, exist_ok=True)
  out = Calibration(
    path=path,
    tokens=tokens,
    layers=tuple(f'layer_{i}' for i in range(model.config.num_layers)),
    width=model.config.embed_dim,
  )
  probe = _capture.probe(model)
  _activations(probe, params, out, progress)
  if not (path / 'fisher.npz').exists():
    _fisher(probe, params, out, fisher_windows, seed, progress)
  return out


def _activations(probe, params, out: Calibration, progress: bool) -> None:
  """Fills the memory-mapped files, window by window."""
  journal = out.path / 'done.json'
  done = _done(journal)
  count = len(out.tokens)
  if done >= count:
    logging.info('Calibration found at %s.', out.path)
    return
  names = (*out.layers, 'final')
  files = {n: _open(out._file(n), out._shape, mode='r+') for n in names}
  bar = tqdm.tqdm(
    range(done, count),
    initial=done,
    total=count,
    desc='calibrate',
    unit='window',
    disable=not progress,
  )
  for i in bar:
    found = _window(params, jnp.asarray(out.tokens[i : i + 1]), model=probe)
    for name, value in found.items():
      value = np.asarray(value[0])
      if not np.isfinite(value.astype(np.float32)).all():
        raise errors.NonFiniteError(
          f'The dense model gives NaN or infinity at {name!r} on window {i}.'
          ' Its weights are damaged, or its dtype cannot hold activations.'
        )
      files[name][i] = value
    if (i + 1) % _FLUSH == 0 or i + 1 == count:
      for file in files.values():
        file.flush()
      _write_json(journal, {'windows': i + 1})


@functools.partial(jax.jit, static_argnames='model')
def _window(params, tokens, *, model) -> dict[str, jax.Array]:
  out, taps = _capture.branches(
    model, params, tokens, return_hidden_states=True
  )
  found = {k: v['residual'] + v['branch'] for k, v in taps.items()}
  found['final'] = out.hidden_states
  return {k: v.astype(jnp.bfloat16) for k, v in found.items()}


def _fisher(
  probe, params, out: Calibration, windows: int, seed: int, progress: bool
) -> None:
  total: dict[str, jax.Array] | None = None
  count = 0
  chosen = np.linspace(0, len(out.tokens) - 1, windows).astype(int)
  for i in tqdm.tqdm(
    np.unique(chosen), desc='fisher', unit='window', disable=not progress
  ):
    tokens = jnp.asarray(out.tokens[i : i + 1])
    key = jax.random.fold_in(jax.random.key(seed), int(i))
    sums, n = _fisher_window(params, tokens, key, model=probe)
    count += int(n)
    total = sums if total is None else jax.tree.map(jnp.add, total, sums)
  if total is None or not count:
    raise errors.TrainError('The calibration tokens hold only padding.')
  arrays = {k: np.asarray(v) / count for k, v in total.items()}
  temporary = out.path / '.fisher.npz'
  with open(temporary, 'wb') as file:
    np.savez(file, allow_pickle=False, **arrays)
  os.replace(temporary, out.path / 'fisher.npz')


@functools.partial(jax.jit, static_argnames='model')
def _fisher_window(params, tokens, key, *, model):
  """Sums of `|t|^2 g g^T` over the tokens of a window, and their number.

  Labels are drawn from the model itself, which makes this the Fisher matrix
  and not the empirical one.
  """
  shape = (*tokens.shape, model.config.embed_dim)
  shifts = {
    f'layer_{i}': jnp.zeros(shape, jnp.float32)
    for i in range(model.config.num_layers)
  }

  def loss(shifts):
    out, taps = _capture.branches(model, params, tokens, shifts=shifts)
    logits = out.logits.astype(jnp.float32)
    labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(tokens != _PAD, nll, 0)), taps

  grads, taps = jax.grad(loss, has_aux=True)(shifts)
  mask = ((tokens != _PAD) & (tokens != _BOS))[..., None]
  out = {}
  for layer, g in grads.items():
    t = (taps[layer]['residual'] + taps[layer]['branch']).astype(jnp.float32)
    g = jnp.where(mask, g * jnp.linalg.norm(t, axis=-1, keepdims=True), 0)
    out[layer] = jnp.einsum('bli,blj->ij', g, g)
  return out, jnp.sum(mask)


def params_fingerprint(params: Mapping[str, Any]) -> str:
  """Hash of the parameters: paths, shapes, types and all values."""
  digest = hashlib.sha256()
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  for path, leaf in sorted(flat.items()):
    digest.update(f'{path} {leaf.dtype} {leaf.shape}'.encode())
    value = np.ascontiguousarray(np.asarray(leaf))
    digest.update(value.reshape(-1).view(np.uint8))
  return digest.hexdigest()


def _fingerprint(model, params, tokens, *more: Any) -> str:
  digest = hashlib.sha256(params_fingerprint(params).encode())
  digest.update(f'{_VERSION} {model!r} {tokens.shape} {more}'.encode())
  digest.update(np.ascontiguousarray(tokens))
  return digest.hexdigest()[:24]


def _open(
  path: pathlib.Path, shape: Sequence[int], *, mode: Literal['r', 'r+']
) -> np.memmap:
  size = int(np.prod(shape)) * 2
  if mode == 'r+':
    with open(path, 'ab') as file:
      file.truncate(size)
  elif not path.is_file() or path.stat().st_size != size:
    raise errors.StateError(
      f'{path} should hold {size} bytes of activations and does not. Remove'
      f' {path.parent} to calibrate again.'
    )
  return np.memmap(
    path, dtype=ml_dtypes.bfloat16, mode=mode, shape=tuple(shape)
  )


def _done(journal: pathlib.Path) -> int:
  try:
    return int(json.loads(journal.read_text())['windows'])
  except (OSError, ValueError, KeyError, TypeError):
    return 0


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  temporary = path.with_name(f'.{path.name}')
  with open(temporary, 'w') as file:
    json.dump(value, file)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
