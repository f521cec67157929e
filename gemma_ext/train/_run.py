# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Heal` and `Run`: what is asked for, and what it has come to so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import data
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.train import _branch
from gemma_ext.train import _calibration
from gemma_ext.train import _distill
from gemma_ext.train import _gradient
from gemma_ext.train import _stages
from gemma_ext.train import _store
from gemma_ext.train import _stream
from gemma_ext.train import _written

_PAD = 0
# Windows that the cost of leaving experts out is measured on.
_CURVE_WINDOWS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heal:
  """What to heal, on which text, how, and where the result goes.

  Attributes:
    checkpoint: The dense checkpoint, as `gx.ckpts.load` takes it.
    recipe: How it is compressed: a preset, a JSON path or a `Recipe`.
    compressed: The same checkpoint, compressed already: what `gx.ckpts.load`
      takes, such as a directory of `python -m gemma_ext.compress`. Healing
      starts from its weights and keeps its recipe, in place of `recipe` and a
      fit of its own.
    output: Directory of the result. The state of the run is kept beside it,
      in `OUTPUT.state`, until the result is saved.
    stages: What to do, in order.
    text: Source of the calibration text, as in `gemma_ext.evaluate`.
    tokens: Tokens to calibrate on.
    block_tokens: How many of them blocks are healed on; 0 for all. Blocks need
      fewer than distillation, and the activations of every layer take time.
    written_tokens: Tokens of text that the dense model writes itself, to learn
      from besides `tokens`; see `_written`. Blocks take them last.
    held_out: Windows at the end of the calibration text that no optimiser
      sees, for the held-out loss.
    fit_tokens: Tokens that weigh the one-shot fit that healing starts from, and
      that experts are carved on.
    active: Where the recipe makes mixtures of experts: share of the parameters
      of all experts that a token gets, chosen by layer so that it costs least
      (`gx.compress.choose_experts`); 0 leaves `top_k` in every layer.
    window: Tokens of a window.
    dtype: Of activations and of what is not packed.
    seed: Of the split, the order of batches and all noise.
    save_seconds: Time between two saved states within a unit.
    cache: Where calibrations are kept; `OUTPUT.calibration` by default.
    overwrite: Whether to replace an earlier result.
  """

  checkpoint: str = 'gemma3-270m'
  recipe: Any = 'tssn'
  compressed: str = ''
  output: str = 'out/healed'
  stages: tuple[Any, ...] = dataclasses.field(
    default_factory=lambda: (_stages.Block(optimizer=_gradient.Gradient()),)
  )
  text: str = 'sample'
  tokens: int = 32_768
  block_tokens: int = 0
  written_tokens: int = 0
  held_out: int = 4
  fit_tokens: int = 8192
  active: float = 0.0
  window: int = 512
  dtype: str = 'bfloat16'
  seed: int = 0
  save_seconds: float = 120.0
  cache: str = ''
  overwrite: bool = False

  def __post_init__(self):
    object.__setattr__(self, 'stages', tuple(self.stages))
    for stage in self.stages:
      if not isinstance(stage, (_stages.Block, _stages.Distill)):
        raise errors.ConfigError(
          f'Heal.stages must be Block or Distill, got {stage!r}.'
        )
    if not isinstance(self.active, (int, float)) or not 0 <= self.active <= 1:
      raise errors.ConfigError(
        f'Heal.active must be a number in [0, 1], got {self.active!r}.'
      )
    if self.dtype not in ('bfloat16', 'float32'):
      raise errors.ConfigError(
        f"Heal.dtype must be 'bfloat16' or 'float32', got {self.dtype!r}."
      )
    for name, least in (
      ('tokens', 2 * self.window),
      ('block_tokens', 0),
      ('written_tokens', 0),
      ('held_out', 1),
      ('fit_tokens', 1),
      ('window', 2),
      ('seed', 0),
    ):
      value = getattr(self, name)
      if type(value) is not int or value < least:
        raise errors.ConfigError(
          f'Heal.{name} must be an integer of at least {least}, got {value!r}.'
        )

  def to_json(self) -> dict[str, Any]:
    """Returns every field as JSON values."""
    out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    out['recipe'] = (
      self.recipe.to_json()
      if isinstance(self.recipe, recipe_lib.Recipe)
      else self.recipe
    )
    out['stages'] = [stage.to_json() for stage in self.stages]
    if not self.compressed:
      del out['compressed']  # As results of earlier versions have it.
    return out


@dataclasses.dataclass(kw_only=True)
class Run:
  """A run under way: the models, the data, and what has been done.

  Attributes:
    config: What was asked for.
    dense: The dense checkpoint.
    model: The compressed model.
    params: Its parameters, healed so far.
    calibration: Of the dense model.
    blocks: The same for blocks; the held-out windows are in both.
    log: A record for every unit that is done.
    dense_result: Perplexity of the dense model on the held-out windows.
  """

  config: Heal
  dense: ckpts.Checkpoint
  model: gx_nn.Compressed
  params: dict[str, Any]
  calibration: _calibration.Calibration
  log: list[dict[str, Any]]
  blocks: _calibration.Calibration | None = None
  dense_result: evals.PerplexityResult | None = None

  def __post_init__(self):
    if self.blocks is None:
      self.blocks = self.calibration

  @functools.cached_property
  def stream(self) -> _stream.Stream:
    """What the branches of the compressed model read, for blocks."""
    assert self.blocks is not None
    return _stream.Stream(self.model, self.blocks.tokens)

  def held_out(self, calibration: _calibration.Calibration) -> np.ndarray:
    """Indices of the windows that optimisers do not see: the last."""
    count = len(calibration.tokens)
    return np.arange(count - self.config.held_out, count)

  def seen(self, calibration: _calibration.Calibration) -> np.ndarray:
    """Indices of the others."""
    return np.arange(len(calibration.tokens) - self.config.held_out)


def start(
  config: Heal,
  output: pathlib.Path,
  saved: _store.Saved | None,
  stop: Callable[[], bool],
  progress: bool,
) -> Run | None:
  """Loads, calibrates and compresses, or takes the saved parameters."""
  recipe_lib.Recipe.of(config.recipe, num_layers=recipe_lib.ANY_LAYERS)
  dense = ckpts.load(
    config.checkpoint, dtype=jnp.dtype(config.dtype), progress=progress
  )
  if dense.recipe is not None:
    raise errors.TrainError(
      f'{config.checkpoint!r} is compressed already. Healing starts from the'
      ' dense checkpoint, whose outputs it aims at.'
    )
  if dense.tokenizer is None:
    raise errors.TokenizerError(
      f'{config.checkpoint!r} has no tokenizer, so no text can be read.'
    )
  made = _compressed(config, dense) if config.compressed else None
  model = gx_nn.Compressed(
    model=dense.model, recipe=made.recipe if made else config.recipe
  )
  _check_stages(config, model)
  tokens = tokens_of(config, dense.tokenizer)
  cache = config.cache or output.with_name(f'{output.name}.calibration')
  if count := config.written_tokens // config.window:
    seen, held_out = np.split(tokens, [-config.held_out])
    written = _written.attempt(
      dense.model,
      dense.params,
      seen,
      count,
      directory=cache,
      seed=config.seed,
      progress=progress,
      stop=stop,
    )
    if written is None:
      return None
    tokens = np.concatenate([seen, written, held_out])
  calibrations = []
  for part, layers in _parts(config, tokens):
    found = _calibration.attempt(
      dense.model,
      dense.params,
      part,
      directory=cache,
      layers=layers,
      seed=config.seed,
      progress=progress,
      stop=stop,
    )
    if found is None:
      return None
    calibrations.append(found)
  if saved is None:
    count = max(1, config.fit_tokens // config.window)
    params = (
      made.params
      if made
      else gx_compress.compress(
        dense.model,
        dense.params,
        model.recipe,
        calibration=tokens[: min(count, len(tokens) - config.held_out)],
        progress=progress,
      )
    )
    if config.active:
      curves = gx_compress.expert_curves(
        model, params, tokens[:_CURVE_WINDOWS], progress=progress
      )
      k = gx_compress.choose_experts(curves, config.active)
      params = gx_compress.with_experts(model, params, k)
  else:
    params = _restore(model, dense.params, saved)
  return Run(
    config=config,
    dense=dense,
    model=model,
    params=params,
    calibration=calibrations[0],
    blocks=calibrations[-1],
    log=list(saved.metadata['log']) if saved else [],
  )


def _compressed(config: Heal, dense: ckpts.Checkpoint) -> ckpts.Checkpoint:
  """Loads what healing starts from.

  Raises:
    TrainError: If it is not compressed, or of another model.
  """
  made = ckpts.load(config.compressed, dtype=jnp.dtype(config.dtype))
  if made.recipe is None:
    raise errors.TrainError(
      f'Heal.compressed={config.compressed!r} is a dense checkpoint. Give what'
      ' `python -m gemma_ext.compress` wrote, or leave it out.'
    )
  have, want = _architecture(made.model), _architecture(dense.model)
  if have != want:
    raise errors.TrainError(
      f'Heal.compressed={config.compressed!r} is a compressed {have}, but'
      f' {config.checkpoint!r} is a {want}.'
    )
  return made


def _architecture(model: Any) -> str:
  """Class and sizes of a model, as errors name it."""
  if isinstance(model, gx_nn.Compressed):
    model = model.model
  config = model.config
  return (
    f'{type(model).__name__} of {config.num_layers} layers,'
    f' {config.embed_dim} wide, hidden {config.hidden_dim}, with'
    f' {config.num_embed} tokens'
  )


def _check_stages(config: Heal, model: gx_nn.Compressed) -> None:
  for stage in config.stages:
    if not stage.units(model):
      raise errors.TrainError(
        f'{stage} has nothing to heal: the recipe compresses the feed-forward'
        f' weights of {list(_distill.compressed_layers(model)) or "no layer"}.'
      )


def _parts(config: Heal, tokens: np.ndarray) -> list[tuple[np.ndarray, bool]]:
  """What to calibrate on, each with whether it needs every layer."""
  if not any(isinstance(s, _stages.Block) for s in config.stages):
    return [(tokens, False)]
  count = config.block_tokens // config.window or len(tokens)
  if count + config.held_out >= len(tokens):
    return [(tokens, True)]
  few = np.concatenate([tokens[:count], tokens[-config.held_out :]])
  return [(tokens, False), (few, True)]


def tokens_of(config: Heal, tokenizer: Any) -> np.ndarray:
  """Windows of the calibration documents, mixed, the held-out ones last."""
  documents = tuple(data.load_documents(config.text))
  if config.text == 'sample':
    split = data.split(documents, seed=config.seed)
    documents = split.calibration.documents
  rows = data.windows(
    tokenizer, documents, length=config.window, max_tokens=config.tokens
  ).tokens
  full = rows[(rows != _PAD).sum(axis=1) > config.window // 2]
  rows = full if len(full) > config.held_out else rows
  if len(rows) <= config.held_out:
    raise errors.DataError(
      f'{config.text!r} gives {len(rows)} windows of {config.window} tokens;'
      f' {config.held_out} of them are held out, so at least'
      f' {config.held_out + 1} are needed. Give more text or less `window`.'
    )
  return np.random.default_rng(config.seed).permutation(rows)


def packed_leaves(run: Run) -> dict[str, Any]:
  """Leaves that healing may have changed, or that compression made."""
  dense = _branch.flatten(run.dense.params)
  return {
    path: leaf
    for path, leaf in _branch.flatten(run.params).items()
    if dense.get(path) is not leaf
  }


def _restore(
  model: gx_nn.Compressed, dense: Mapping[str, Any], saved: _store.Saved
) -> dict[str, Any]:
  flat = _branch.flatten(dense)
  for site, _ in gx_nn.methods_of(model.model, model.recipe).values():
    flat.pop(site.whole, None)
  for name, value in saved.arrays.items():
    if name.startswith('params/'):
      flat[name.removeprefix('params/')] = jnp.asarray(value)
  return _branch.unflatten(flat)


def ratio(run: Run) -> float:
  """Perplexity ratio to the dense model on the held-out windows."""
  held_out = run.held_out(run.calibration)
  tokens = run.calibration.tokens[held_out]
  mask = tokens != _PAD
  mask[:, 0] = False
  windows = data.Windows(
    tokens=tokens,
    score_mask=mask,
    document=np.arange(len(tokens), dtype=np.int32),
    ids=tuple(f'window_{i}' for i in held_out),
    stride=tokens.shape[1] - 1,
    data_sha256='',
  )
  if run.dense_result is None:
    run.dense_result = evals.perplexity(
      run.dense.model, run.dense.params, windows
    )
  found = evals.perplexity(run.model, run.params, windows)
  return evals.paired_ratio(found, run.dense_result, resamples=100).value
