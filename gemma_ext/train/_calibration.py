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

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
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
from gemma_ext.train import _processes

_VERSION = 1
_PAD, _BOS = 0, 2
_FLUSH = 16  # Windows between two entries in the journal.
_SECONDS = 60  # Between two copies of unfinished sums.


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


def nbytes(model: nn.Module, tokens: np.ndarray, *, layers: bool = True) -> int:
  """Bytes on disk that `calibrate` will take."""
  count = model.config.num_layers if layers else 0
  width = model.config.embed_dim
  return (count + 1) * tokens.size * width * 2 + count * width * width * 4


def calibrate(
  model: nn.Module,
  params: Mapping[str, Any],
  tokens: Any,
  *,
  directory: str | os.PathLike[str],
  layers: bool = True,
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
    layers: Whether to keep targets and Fisher information of the layers; the
      final hidden states alone take less time and space. Those of a calibration
      that has all are found, too.
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
    StateError: If the disk is full or cannot be written.
  """
  found = attempt(
    model,
    params,
    tokens,
    directory=directory,
    layers=layers,
    fisher_windows=fisher_windows,
    max_bytes=max_bytes,
    seed=seed,
    progress=progress,
  )
  assert found is not None
  return found


def attempt(
  model: nn.Module,
  params: Mapping[str, Any],
  tokens: Any,
  *,
  directory: str | os.PathLike[str],
  layers: bool = True,
  fisher_windows: int = 16,
  max_bytes: int = 16 << 30,
  seed: int = 0,
  progress: bool = False,
  stop: Callable[[], bool] = lambda: False,
) -> Calibration | None:
  """`calibrate`, which `stop` may end; the next call goes on from there.

  `stop` is asked before every window. Under `jax.distributed` the first process
  does the work and all return together.

  Returns:
    The calibration; `None` if it was stopped.
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
  need = nbytes(model, tokens, layers=layers)
  if need > max_bytes:
    raise errors.TrainError(
      f'Calibration on {tokens.size:,} tokens takes {need / 1e9:.1f} GB on'
      f' disk, more than the {max_bytes / 1e9:.1f} GB allowed. Give fewer'
      ' tokens, or a larger max_bytes.'
    )
  weights = params_fingerprint(params)
  key = _fingerprint(model, weights, tokens, 'final')
  whole = _fingerprint(model, weights, tokens, fisher_windows, seed)
  group = _processes.Group()
  group.check_same('Checkpoint and calibration text', whole.encode())
  root = pathlib.Path(directory).expanduser().absolute()
  done = {name: _done(root / name / 'done.json') for name in (key, whole)}
  # One of all layers has the final hidden states, too.
  found = group.first(done[key] == 0 and done[whole] == len(tokens))
  path = root / (whole if layers or found else key)
  out = Calibration(
    path=path,
    tokens=tokens,
    layers=tuple(
      f'layer_{i}' for i in range(model.config.num_layers if layers else 0)
    ),
    width=model.config.embed_dim,
  )
  work = _Work(_capture.probe(model), params, out, stop, group, progress)
  group.lead(work.prepare)
  if not work.activations():
    return None
  if layers and not work.fisher(fisher_windows, seed):
    return None
  return out


@dataclasses.dataclass(frozen=True)
class _Work:
  """Windows of a calibration, one after the other, until `stop` says yes."""

  probe: Any
  params: Any
  out: Calibration
  stop: Callable[[], bool]
  group: _processes.Group
  progress: bool

  def prepare(self) -> None:
    with writing(self.out.path):
      self.out.path.mkdir(parents=True, exist_ok=True)

  def activations(self) -> bool:
    """Fills the memory-mapped files; whether they are complete."""
    out, group = self.out, self.group
    journal = out.path / 'done.json'
    done = group.first(_done(journal))
    count = len(out.tokens)
    if done >= count:
      logging.info('Calibration found at %s.', out.path)
      return True
    names = (*out.layers, 'final')
    files = group.lead(
      lambda: {n: _open(out._file(n), out._shape, mode='r+') for n in names}
    )

    def keep(i: int) -> None:
      with writing(out.path):
        for file in (files or {}).values():
          file.flush()
        _write_json(journal, {'windows': i})

    def window(i: int) -> None:
      tokens = jnp.asarray(out.tokens[i : i + 1])
      found = _window(self.params, tokens, model=self.probe, names=names)
      for name, value in found.items():
        value = np.asarray(value[0])
        if not np.isfinite(value.astype(np.float32)).all():
          raise errors.NonFiniteError(
            f'The dense model gives NaN or infinity at {name!r} on window {i}.'
            ' Its weights are damaged, or its dtype cannot hold activations.'
          )
        assert files is not None
        files[name][i] = value
      if (i + 1) % _FLUSH == 0 or i + 1 == count:
        keep(i + 1)

    for i in self._bar(range(done, count), done, count, 'calibrate'):
      if self._stopped():
        group.lead(functools.partial(keep, i))
        return False
      group.lead(functools.partial(window, i))
    return True

  def fisher(self, windows: int, seed: int) -> bool:
    """Sums the Fisher information; whether it is complete."""
    out, group = self.out, self.group
    final, partial = (out.path / f'{n}.npz' for n in ('fisher', 'fisher_part'))
    if group.first(group.leads and load_arrays(final, out.layers) is not None):
      return True
    chosen = np.linspace(0, len(out.tokens) - 1, windows).astype(int)
    chosen = np.unique(chosen)
    place = ('next', 'count')
    found = load_arrays(partial, (*out.layers, *place)) if group.leads else None
    sums = {k: jnp.asarray(v) for k, v in (found or {}).items()}
    start, count = (int(sums.pop(k, 0)) for k in place)
    start = group.first(start)
    last = time.monotonic()

    def keep(i: int) -> None:
      save_arrays(
        partial, sums | {'next': np.int64(i), 'count': np.int64(count)}
      )

    def window(i: int, number: int) -> None:
      nonlocal sums, count, last
      tokens = jnp.asarray(out.tokens[number : number + 1])
      key = jax.random.fold_in(jax.random.key(seed), number)
      more, n = _fisher_window(self.params, tokens, key, model=self.probe)
      sums = jax.tree.map(jnp.add, sums, more) if sums else more
      count += int(n)
      if time.monotonic() - last > _SECONDS:
        keep(i + 1)
        last = time.monotonic()

    def finish() -> None:
      if not count:
        raise errors.TrainError('The calibration tokens hold only padding.')
      save_arrays(final, {k: np.asarray(v) / count for k, v in sums.items()})
      partial.unlink(missing_ok=True)

    for i in self._bar(range(start, len(chosen)), start, len(chosen), 'fisher'):
      if self._stopped():
        if i:
          group.lead(functools.partial(keep, i))
        return False
      group.lead(functools.partial(window, i, int(chosen[i])))
    group.lead(finish)
    return True

  def _stopped(self) -> bool:
    return self.group.any(self.stop())[0]

  def _bar(self, steps: range, done: int, count: int, name: str) -> Any:
    return tqdm.tqdm(
      steps,
      initial=done,
      total=count,
      desc=name,
      unit='window',
      disable=not self.progress,
    )


@functools.partial(jax.jit, static_argnames=('model', 'names'))
def _window(params, tokens, *, model, names) -> dict[str, jax.Array]:
  out, taps = _capture.branches(
    model, params, tokens, return_hidden_states=True
  )
  found = {k: v['residual'] + v['branch'] for k, v in taps.items()}
  found['final'] = out.hidden_states
  return {k: found[k].astype(jnp.bfloat16) for k in names}


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


def _fingerprint(model, weights: str, tokens, *more: Any) -> str:
  digest = hashlib.sha256(weights.encode())
  digest.update(f'{_VERSION} {model!r} {tokens.shape} {more}'.encode())
  digest.update(np.ascontiguousarray(tokens))
  return digest.hexdigest()[:24]


def _open(
  path: pathlib.Path, shape: Sequence[int], *, mode: Literal['r', 'r+']
) -> np.memmap:
  size = int(np.prod(shape)) * 2
  if mode == 'r+':
    with writing(path), open(path, 'ab') as file:
      file.truncate(size)
      # On a full disk a write through the mapping would end the process.
      if hasattr(os, 'posix_fallocate'):
        os.posix_fallocate(file.fileno(), 0, size)
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


def load_arrays(
  path: pathlib.Path, names: Sequence[str]
) -> dict[str, np.ndarray] | None:
  """Arrays of a file that `save_arrays` wrote; `None` if it is not whole."""
  try:
    with open(path, 'rb') as raw, np.load(raw, allow_pickle=False) as file:
      return {name: file[name] for name in names}
  except FileNotFoundError:
    return None
  except Exception as e:  # zipfile, zlib and numpy raise of every kind
    logging.warning('%s is damaged (%s) and is made again.', path, e)
    return None


def save_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  temporary = path.with_name(f'.{path.name}')
  with writing(path):
    with open(temporary, 'wb') as file:
      host = {k: np.asarray(v) for k, v in arrays.items()}
      np.savez(file, allow_pickle=False, **host)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as e:
    folder = next(p for p in (path, *path.parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    raise errors.StateError(
      f'Cannot write the calibration to {path}: {e.strerror}.'
      f' {free / 1e6:,.0f} MB are free. What is there is intact; free some'
      ' space and start the same command again.'
    ) from e
