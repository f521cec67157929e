# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The stages of healing: `Block`, layer by layer, and `Distill`, end to end.

A stage names its units; for each of them it makes a `Task`, which is all that
the loop needs: what moves, batches, a compiled step, the held-out loss, and
how to put the result back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import _patterns
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.train import _block
from gemma_ext.train import _branch
from gemma_ext.train import _capture
from gemma_ext.train import _closed_form
from gemma_ext.train import _distill
from gemma_ext.train import _gradient
from gemma_ext.train import _latents
from gemma_ext.train import _rewrite
from gemma_ext.train import _rows
from gemma_ext.train import _sharded
from gemma_ext.train import _shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """One unit of work.

  Attributes:
    moving: What the optimiser changes, by path.
    batch: `(step, seed)` to a batch.
    step: `(moving, state, batch, key)` to the next and metrics; compiled.
    held_out: Loss on windows that the optimiser does not see.
    close: `moving` to the whole model's parameters.
  """

  moving: dict[str, jax.Array]
  batch: Callable[[int, tuple[int, ...]], dict[str, Any]]
  step: Callable[..., Any]
  held_out: Callable[[dict[str, jax.Array]], float]
  close: Callable[[dict[str, jax.Array]], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stage:
  optimizer: Any
  latents: str = 'dense'

  def __post_init__(self):
    if self.latents not in ('dense', 'codes'):
      name = type(self).__name__
      raise errors.ConfigError(
        f"{name}.latents must be 'dense' or 'codes', got {self.latents!r}."
      )

  def start(self, run: Any) -> dict[str, Any] | None:
    """Dense parameters that latent codes begin at; `None` for the codes."""
    return run.dense.params if self.latents == 'dense' else None

  def to_json(self) -> dict[str, Any]:
    """Returns every field as JSON values."""
    out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    optimizer = {
      'name': type(self.optimizer).__name__,
      **dataclasses.asdict(self.optimizer),
    }
    return {'name': type(self).__name__, **out, 'optimizer': optimizer}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(_Stage):
  """Block reconstruction, one layer after the other.

  Attributes:
    optimizer: What minimises the error.
    layers: Regular expression on names such as 'layer_8'.
    weighting: How errors are weighted: 'fisher', 'fisher_full', 'norm', 'mse'.
    batch_tokens: Tokens of a step.
    weights: Regular expression on the weights that move: 'gating_einsum',
      'linear' or both.
    latents: Where latent codes begin: 'dense', at the dense weights, of which
      many are a step away from the next code; or 'codes', in the middle, for
      codes that make up for each other's errors as compensated ones do.
  """

  layers: str = '.*'
  weighting: str = 'fisher'
  batch_tokens: int = 2048
  weights: str = '.*'

  def __post_init__(self):
    super().__post_init__()
    if self.weighting not in _block.WEIGHTINGS:
      raise errors.ConfigError(
        f'Block.weighting must be one of {_block.WEIGHTINGS}, got'
        f' {self.weighting!r}.'
      )
    _check_positive('Block.batch_tokens', self.batch_tokens)
    _patterns.check(self.layers)
    _patterns.check(self.weights)

  def units(self, model: gx_nn.Compressed) -> tuple[str, ...]:
    """Names of the layers to heal, in order."""
    _capture.check(model)
    _check_corrections(model, self.layers, self.optimizer)
    return tuple(
      layer
      for layer in _distill.compressed_layers(model)
      if _patterns.matches(self.layers, layer)
    )

  def task(self, run: Any, unit: str) -> Task:
    """Makes the task of one layer."""
    calibration, model = run.blocks, run.model
    dtype = model.model.dtype
    branch = _branch.of_layer(model, unit)
    if branch.mixture and not isinstance(self.optimizer, _gradient.Gradient):
      raise errors.TrainError(
        f'{unit} is a mixture of experts, which `Gradient` heals; got'
        f' {self.optimizer!r}.'
      )
    residual = run.stream.residual(run.params, unit)
    target = calibration.target(unit)
    fisher = calibration.fisher[unit]
    root = _block.metric(self.weighting, fisher)
    weight = _block.token_weights(self.weighting, target, calibration.mask)
    seen, held_out = run.seen(calibration), run.held_out(calibration)
    scale = _block.scale_of(residual[seen], target[seen], weight[seen], root)
    start = self.start(run)
    moving, fixed = _latents.open_params(
      branch,
      _branch.params_of(run.params, unit),
      form=self.optimizer.codes,
      dense=None if start is None else _branch.params_of(start, unit),
      weights=self.weights,
      margin=getattr(self.optimizer, 'margin', _shared.MARGIN),
    )
    if branch.methods and not any(
      f'mlp/{path}/scale' in moving for path, _ in branch.methods
    ):
      raise errors.TrainError(
        f'Block.weights={self.weights!r} matches none of the compressed weights'
        f' {[path for path, _ in branch.methods]} of {unit}.'
      )
    dense = None
    by_rows = isinstance(self.optimizer, _rows.EvolveRows)
    if by_rows or getattr(self.optimizer, 'fitness', '') == 'unit':
      dense = functools.partial(
        _dense_hidden(_branch.of_layer(run.dense.model, unit)),
        _branch.params_of(run.dense.params, unit),
      )
    # Whole windows would repeat the same documents in a batch.
    tokens = _Tokens(residual, target, weight, calibration.mask)
    common = {
      'scale': jnp.float32(scale),
      'root': jnp.asarray(root),
      'fixed': fixed,
    }

    def batch(step: int, seed: tuple[int, ...]) -> dict[str, Any]:
      rows = tokens.rows(seen)
      chosen = rows[iterate(seed, step, len(rows), self.batch_tokens)]
      found = tokens.take(np.sort(chosen)) | common
      if dense is not None:
        found['hidden'] = dense(found['residual'])
      return found

    held_rows = tokens.rows(held_out)[: 4 * self.batch_tokens]
    held = tokens.take(held_rows) | common
    loss = _compiled_loss(branch, dtype)

    def close(moving: dict[str, jax.Array]) -> dict[str, Any]:
      closed = _latents.close_params(branch, moving, fixed, dtype=dtype)
      return _branch.with_params(run.params, unit, closed)

    step = _compiled_step(branch, dtype, self.optimizer)
    if isinstance(self.optimizer, _closed_form.ClosedForm):

      def every() -> Iterator[dict[str, Any]]:
        rows = tokens.rows(seen)
        for i in range(0, len(rows), self.batch_tokens):
          yield tokens.take(rows[i : i + self.batch_tokens])

      def fit(moving, state, batch, key):
        del key
        fitted = self.optimizer.fit(
          branch,
          _branch.of_layer(run.dense.model, unit),
          _branch.params_of(run.dense.params, unit),
          moving,
          fixed,
          every,
          dtype,
        )
        return fitted, state, {'loss': loss(fitted, batch)}

      step = fit

    if by_rows:
      _rows.check(branch, moving, fixed, jnp.asarray(residual[seen[0]]), dtype)
      evolve = self.optimizer.compile(branch, dtype)

      def generations(moving, state, batch, key):
        moving, state, metrics = evolve(moving, state, batch, key)
        return moving, state, metrics | {'loss': loss(moving, batch)}

      step = generations

    return Task(
      moving=moving,
      batch=batch,
      step=step,
      held_out=lambda moving: float(loss(moving, held)),
      close=close,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(_Stage):
  """Logit distillation of the whole model.

  Attributes:
    optimizer: What minimises the divergence.
    batch_windows: Windows of a step.
    vocabulary: Tokens of the shortlist on which distributions are compared.
    rest: Tokens off the shortlist that a step draws to estimate the others.
    rewrite: Share of the tokens that the teacher draws anew in windows that
      were seen before, from the second epoch on, so that no text is learned by
      heart. Each such step costs a forward pass of the teacher.
    integers: Regular expression on weights in whole numbers, outside of the
      feed-forward layers, that move as well, such as 'attn'; none if empty.
    latents: As of `Block`.
  """

  batch_windows: int = 2
  vocabulary: int = 16_384
  rest: int = 2048
  rewrite: float = 0.0
  integers: str = ''

  def __post_init__(self):
    super().__post_init__()
    if isinstance(self.optimizer, _closed_form.ClosedForm):
      raise errors.ConfigError(
        'ClosedForm fits branches one by one; use it in a Block.'
      )
    _check_positive('Distill.batch_windows', self.batch_windows)
    _check_positive('Distill.vocabulary', self.vocabulary)
    _check_positive('Distill.rest', self.rest)
    if not isinstance(self.rewrite, (int, float)) or not 0 <= self.rewrite <= 1:
      raise errors.ConfigError(
        f'Distill.rewrite must be a number in [0, 1], got {self.rewrite!r}.'
      )
    if self.integers:
      _patterns.check(self.integers)
    if self.integers and self.optimizer.codes != 'latent':
      raise errors.ConfigError(
        'Distill.integers needs an optimizer of latent codes, such as Gradient;'
        f' got {self.optimizer!r}.'
      )

  def units(self, model: gx_nn.Compressed) -> tuple[str, ...]:
    """The whole model is one unit."""
    _check_corrections(model, '.*', self.optimizer)
    return ('model',) if _distill.compressed_layers(model) else ()

  def task(self, run: Any, unit: str) -> Task:
    """Makes the task of the whole model."""
    del unit
    calibration, model = run.calibration, run.model
    full = jnp.asarray(run.dense.params['embedder']['input_embedding'])
    ids, _ = _distill.shortlist(full, calibration, size=self.vocabulary)
    moving, fixed = _distill.open_model(
      model,
      run.params,
      form=self.optimizer.codes,
      dense=self.start(run),
      integers=self.integers,
      margin=getattr(self.optimizer, 'margin', _shared.MARGIN),
    )
    unpacked = _distill.unpack(fixed, model=model)
    student = unpacked['embedder/input_embedding']
    table, own = full[ids], student[ids]
    final, tokens = calibration.final, calibration.tokens
    seen, last = run.seen(calibration), run.held_out(calibration)

    others = np.setdiff1d(np.arange(len(full)), ids)
    size = min(self.rest, len(others))

    def take(windows: np.ndarray, seed: tuple[int, ...]) -> dict[str, Any]:
      drawn = np.random.default_rng(seed).choice(others, size, replace=False)
      drawn = np.sort(drawn)
      return {
        'tokens': jnp.asarray(tokens[windows]),
        'teacher': jnp.asarray(final[windows]),
        'table': table,
        'rest': full[drawn],
        'own': jnp.concatenate([own, student[drawn]]),
        'weight': jnp.float32(len(others) / max(size, 1)),
        'fixed': unpacked,
      }

    def batch(step: int, seed: tuple[int, ...]) -> dict[str, Any]:
      windows = seen[iterate(seed, step, len(seen), self.batch_windows)]
      out = take(windows, (*seed, step))
      if self.rewrite and step >= max(1, len(seen) // self.batch_windows):
        source = np.random.SeedSequence((*seed, step)).generate_state(1)[0]
        out['tokens'], out['teacher'] = _rewrite.rewrite(
          run.dense.params,
          out['tokens'],
          out['teacher'],
          table,
          jnp.asarray(ids),
          jax.random.key(int(source)),
          model=run.dense.model,
          share=self.rewrite,
        )
      return out

    loss = _compiled_model_loss(model)

    def held_out(moving: dict[str, jax.Array]) -> float:
      values = [
        float(loss(moving, take(last[i : i + 1], (i,))))
        for i in range(len(last))
      ]
      return float(np.mean(values))

    return Task(
      moving=moving,
      batch=batch,
      step=_compiled_model_step(model, self.optimizer),
      held_out=held_out,
      close=lambda moving: _distill.close_model(model, moving, fixed),
    )


@functools.lru_cache(maxsize=8)
def _compiled_step(branch: _branch.Branch, dtype: Any, optimizer: Any):
  if not hasattr(optimizer, 'update'):
    return None
  return _sharded.compiled(optimizer, _block.problem(branch, dtype=dtype))


@functools.lru_cache(maxsize=8)
def _dense_hidden(branch: _branch.Branch):
  return jax.jit(lambda params, x: branch.apply(params, x)['hidden'])


@functools.lru_cache(maxsize=8)
def _compiled_loss(branch: _branch.Branch, dtype: Any):
  return jax.jit(_block.problem(branch, dtype=dtype).loss)


@functools.lru_cache(maxsize=4)
def _compiled_model_step(model: gx_nn.Compressed, optimizer: Any):
  remat = getattr(optimizer, 'remat', False)
  return _sharded.compiled(optimizer, _distill.problem(model, remat=remat))


@functools.lru_cache(maxsize=4)
def _compiled_model_loss(model: gx_nn.Compressed):
  return jax.jit(_distill.problem(model).loss)


@dataclasses.dataclass(frozen=True)
class _Tokens:
  """Inputs and targets of a branch, addressed by token."""

  residual: np.ndarray  # [W, L, D]
  target: np.ndarray  # [W, L, D]
  weight: np.ndarray  # [W, L]
  mask: np.ndarray  # [W, L]

  def rows(self, windows: np.ndarray) -> np.ndarray:
    """Flat indices of the real tokens of some windows."""
    length = self.mask.shape[1]
    w, i = np.nonzero(self.mask[windows])
    return windows[w] * length + i

  def take(self, rows: np.ndarray) -> dict[str, Any]:
    """A batch of these tokens."""
    width = self.residual.shape[-1]
    return {
      'residual': jnp.asarray(self.residual.reshape(-1, width)[rows]),
      'target': jnp.asarray(self.target.reshape(-1, width)[rows]),
      'weight': jnp.asarray(self.weight.reshape(-1)[rows]),
    }


def iterate(
  seed: tuple[int, ...], step: int, count: int, size: int
) -> np.ndarray:
  """Indices of the batch of a step: `[min(size, count)]`.

  Epochs are permutations, so that a run that is resumed sees what one that
  was not would have seen.
  """
  epoch, place = divmod(step, max(1, count // size))
  order = np.random.default_rng((*seed, epoch)).permutation(count)
  return order[place * size : (place + 1) * size]


def _check_corrections(
  model: gx_nn.Compressed, layers: str, optimizer: Any
) -> None:
  """Raises TrainError where only `Gradient` knows of corrections."""
  if isinstance(optimizer, _gradient.Gradient):
    return
  for site, _ in gx_nn.methods_of(model.model, model.recipe).values():
    moves = site.role and '/mlp/' in site.path
    if moves and _patterns.matches(layers, site.path.split('/')[0]):
      raise errors.TrainError(
        f'{site.whole!r} has a correction of low rank, which `Gradient` heals;'
        f' got {optimizer!r}.'
      )


def changes(
  model: gx_nn.Compressed,
  old: dict[str, Any],
  new: dict[str, Any],
  unit: str,
) -> dict[str, Any]:
  """What happened to the ternary codes of a unit, by layer.

  Returns:
    {'layers': [{'layer', 'density_before', 'density_after', 'sign_flips',
    'zero_to_nonzero', 'nonzero_to_zero'}, ...]}, fractions of all codes.
  """
  before, after = _branch.flatten(old), _branch.flatten(new)
  sums: dict[str, np.ndarray] = {}
  for path, (site, method) in gx_nn.methods_of(
    model.model, model.recipe
  ).items():
    layer = path.split('/')[0]
    here = '/mlp/' in path and unit in (layer, 'model')
    if not here or site.is_factor:
      continue
    fmt = gx_nn.format_of(method, site.layout.cols)
    a, b = (
      fmt.unpack(tree[f'{path}/codes'], site.layout.cols)
      for tree in (before, after)
    )
    counts = np.asarray(_count_changes(a, b), np.float64)
    sums[layer] = sums.get(layer, 0) + counts
  names = (
    'density_before',
    'density_after',
    'sign_flips',
    'zero_to_nonzero',
    'nonzero_to_zero',
  )
  return {
    'layers': [
      {
        'layer': int(layer.split('_')[1]),
        **{k: float(v / s[0]) for k, v in zip(names, s[1:])},
      }
      for layer, s in sums.items()
    ]
  }


@jax.jit
def _count_changes(a: jax.Array, b: jax.Array) -> jax.Array:
  was, now = a != 0, b != 0
  values = (was | True, was, now, was & now & (a != b), ~was & now, was & ~now)
  return jnp.stack([jnp.sum(v, dtype=jnp.int32) for v in values])


def _check_positive(name: str, value: Any) -> None:
  if type(value) is not int or value < 1:
    raise errors.ConfigError(
      f'{name} must be a positive integer, got {value!r}.'
    )
