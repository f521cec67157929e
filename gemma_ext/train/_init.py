# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`FromCheckpoint`: a `kd.train.Trainer` starts from any checkpoint of ours."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from kauldron import kd

from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import errors
from gemma_ext import recipe as recipe_lib
from gemma_ext.train import _branch
from gemma_ext.train import _sources

# Tokens of a window to calibrate on, as in `gemma_ext.compress`.
_WINDOW = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromCheckpoint(kd.ckpts.InitTransform):
  """Takes the parameters of a checkpoint, compressing them if they are dense.

  For adapters, `gm.ckpts.SkipLoRA(wrapped=gx.train.FromCheckpoint(...))`.

  Attributes:
    checkpoint: As `gx.ckpts.load` takes it.
    recipe: What the trainer's model is compressed with; `None` if it is dense.
      A checkpoint that is compressed must be so with the same recipe.
    text: Calibrates the compression; '' does without.
    tokens: Tokens to calibrate on.
    seed: Of the split of the text 'sample'.
  """

  checkpoint: str
  recipe: Any = None
  text: str = 'sample'
  tokens: int = 8192
  seed: int = 0

  def transform(self, state: Any) -> Any:
    """Returns the state with these parameters.

    Raises:
      CheckpointError: If it cannot be read.
      ParamsMismatchError: If it is of another model or recipe than the
        trainer's.
    """
    found = ckpts.load(self.checkpoint)
    layers = found.model.config.num_layers
    recipe = None
    if self.recipe is not None:
      recipe = recipe_lib.Recipe.of(self.recipe, num_layers=layers)
    params = found.params
    if found.recipe is None and recipe is not None:
      params = gx_compress.compress(
        found.model, params, recipe, calibration=self._calibration(found)
      )
    elif found.recipe != recipe:
      raise errors.ParamsMismatchError(
        f'{self.checkpoint!r} is compressed with {found.recipe}, but'
        f' FromCheckpoint.recipe is {recipe}.'
      )
    return state.replace(params=self._like(state.params, params))

  def _calibration(self, found: ckpts.Checkpoint) -> Any:
    if not self.text:
      return None
    if found.tokenizer is None:
      raise errors.TokenizerError(
        f'{self.checkpoint!r} has no tokenizer to calibrate on text with. Set'
        " FromCheckpoint.text to ''."
      )
    return _sources.windows(
      found.tokenizer,
      text=self.text,
      tokens=self.tokens,
      length=_WINDOW,
      seed=self.seed,
    )

  def _like(
    self, wanted: Mapping[str, Any], params: Mapping[str, Any]
  ) -> dict[str, Any]:
    """The parameters in the types and on the devices of the trainer's."""
    old, new = _branch.flatten(wanted), _branch.flatten(params)
    shapes = lambda tree: {k: v.shape for k, v in tree.items()}
    if shapes(old) != shapes(new):
      differ = sorted(
        set(shapes(old).items()) ^ set(shapes(new).items()),
        key=lambda item: item[0],
      )
      raise errors.ParamsMismatchError(
        f'{self.checkpoint!r} is not of the model and recipe of the trainer:'
        f' {[k for k, _ in differ][:5]} differ.'
      )
    out = {}
    for path, leaf in old.items():
      # A copy: the step donates its state.
      value = jnp.array(new[path], leaf.dtype, copy=True)
      out[path] = jax.device_put(value, leaf.sharding)
    return _branch.unflatten(out)
