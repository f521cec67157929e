# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The command's way to a recipe within a budget."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
import math
import os
from typing import Any

import jax
import numpy as np

from gemma_ext import _cli
from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib

# Tokens of a text that are counted, and the part of it to measure on.
COUNTED = 1_000_000
_UNSEEN = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgeted:
  """An allocation, and what it was made with.

  Attributes:
    allocation: The choice.
    statistics: What weights are to be fitted with; none of a dry run that
      needed none.
    checkpoint: The dense checkpoint.
    unseen: The part of the calibration text that the statistics did not see.
    fits: Weights that were fitted on the way.
  """

  allocation: gx_compress.Allocation
  statistics: gx_compress.Statistics | None
  checkpoint: ckpts.Checkpoint
  unseen: Any
  fits: gx_compress.Fits

  @property
  def recipe(self) -> recipe_lib.Recipe:
    """The recipe."""
    return self.allocation.recipe

  def to_json(self) -> dict[str, Any]:
    """Returns what is predicted, as plain JSON values."""
    return {
      'predicted_bytes': self.allocation.nbytes,
      'predicted_ratio': self.allocation.ratio,
      'predicted_loss_by_weight': self.allocation.losses,
      'corrections': self.allocation.sensitivities.factors,
    }

  def measure(self, params: Mapping[str, Any]) -> dict[str, Any]:
    """Measures and prints the divergence beside the predicted one."""
    measured = gx_compress.divergence(
      self.checkpoint.model,
      self.checkpoint.params,
      gx_nn.Compressed(model=self.checkpoint.model, recipe=self.recipe),
      params,
      self.unseen,
      progress=True,
    )
    print(
      f'Divergence from the dense model on calibration text: {measured:.4f}'
      f' nats a token (x {math.exp(measured):.4f} in perplexity), predicted'
      f' {self.allocation.loss:.4f}. Held-out text: `python -m'
      ' gemma_ext.evaluate`.'
    )
    return {'measured_loss': measured}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """A calibration text in windows `[batch, length]`.

  Attributes:
    fitted: To compute statistics of.
    unseen: To measure on.
    counted: The others that come before the first of `unseen`.
  """

  fitted: np.ndarray
  unseen: np.ndarray
  counted: np.ndarray

  @classmethod
  def of(cls, windows: np.ndarray, count: int) -> Text:
    """Takes windows evenly from all of the text, from its end to measure on.

    Args:
      windows: All of it.
      count: Windows to compute with: two thirds of them to fit on, and as many
        to measure on.
    """
    first = len(windows) - round(_UNSEEN * len(windows))
    kept = count - count // 3
    if first >= len(windows) or kept == count:
      return cls(fitted=windows, unseen=windows, counted=windows[:0])
    fitted = spread(first, kept)
    return cls(
      fitted=windows[fitted],
      unseen=windows[first:][spread(len(windows) - first, kept)],
      counted=np.delete(windows[:first], fitted, axis=0),
    )


def spread(size: int, count: int) -> np.ndarray:
  """At most `count` of so many numbers from 0 on, evenly."""
  return np.unique(np.linspace(0, size - 1, min(count, size)).astype(int))


def reserve(found: gx_compress.Sensitivities, params: Mapping[str, Any]) -> int:
  """Bytes of a budget that the names of what it may hold take on disk.

  Args:
    found: What the budget chooses from.
    params: The dense parameters.
  """
  wholes = {
    path.rpartition('/')[0] if path in found.rows else path
    for path in found.candidates
  }
  others = len(jax.tree.leaves(params)) - len(wholes)
  # A weight with a correction has three times as many arrays as another.
  corrected = sum(
    any(isinstance(c.method, recipe_lib.LowRank) for c in each)
    for each in found.candidates.values()
  )
  packed = 2 * (len(found.candidates) + 2 * corrected)
  return ckpts.overhead_bytes(others + packed + 2)


def check(args: Any) -> None:
  """Raises `RecipeError` if flags of a budget are not valid."""
  gx_compress.Budget.parse(args.budget)
  if args.calibration == 'none':
    raise errors.RecipeError(
      '--budget measures what each weight costs and needs a text:'
      ' --calibration=none will not do.'
    )
  if args.sensitivities:
    _cli.check_output(args.sensitivities)
    if os.path.exists(args.sensitivities):
      gx_compress.read_sensitivities(args.sensitivities)


def no_text() -> errors.RecipeError:
  """The error of a command that has no text to calibrate on."""
  return errors.RecipeError(
    'This needs a text: install gemma_ext[samples], or give --calibration=PATH.'
  )


def statistics(
  args: Any,
  checkpoint: ckpts.Checkpoint,
  tokens: Any,
  counted: Any = None,
) -> gx_compress.Statistics:
  """Collects the statistics of a calibration text.

  Args:
    args: Flags of the command.
    checkpoint: The dense checkpoint.
    tokens: The text `[batch, length]`; `None` if there is none.
    counted: More of it, which is only counted.

  Raises:
    RecipeError: If there is none.
  """
  if tokens is None:
    raise no_text()
  return gx_compress.statistics(
    checkpoint.model,
    checkpoint.params,
    tokens,
    counted=counted,
    seed=args.seed,
    progress=True,
  )


def allocate(args: Any, checkpoint: ckpts.Checkpoint, text: Text) -> Budgeted:
  """Measures and chooses.

  Args:
    args: Flags of the command.
    checkpoint: The dense checkpoint.
    text: The calibration text.

  Raises:
    RecipeError: If the budget cannot be met.
  """
  budget = gx_compress.Budget.parse(args.budget)
  model, params = checkpoint.model, checkpoint.params
  candidates = None
  if args.candidates == 'all':
    candidates = (*gx_compress.CANDIDATES, *gx_compress.MORE_CANDIDATES)
  known = None
  if args.sensitivities and os.path.exists(args.sensitivities):
    known = gx_compress.read_sensitivities(args.sensitivities)
    mark = gx_compress.text_fingerprint(
      text.fitted, text.counted, seed=args.seed
    )
    gx_compress.check_known(known, model, params, mark, candidates=candidates)

  def keep(found: gx_compress.Sensitivities) -> None:
    if args.sensitivities:
      _cli.write_json(args.sensitivities, found.to_json())

  if args.dry_run and known is not None and known.complete:
    found, found_on = known, None
  else:
    if args.dry_run:
      _cli.note(
        'Measures first what each width of each weight costs; --sensitivities'
        ' keeps that, and other dry runs take seconds.'
      )
    found_on = statistics(args, checkpoint, text.fitted, text.counted)
    found = gx_compress.sensitivities(
      model,
      params,
      found_on,
      candidates=candidates,
      known=known,
      keep=keep,
      progress=True,
    )
  names = reserve(found, params)
  allocation = gx_compress.solve(found, budget, reserve=names)
  fits = gx_compress.Fits()
  # The first correction changes what is chosen. Those of other budgets hold
  # for this one if they were measured near or around it.
  least = 0 if found.corrections else gx_compress.CORRECTIONS
  for i in range(gx_compress.CORRECTIONS):
    covered = found.covers(allocation.plain_losses())
    if found_on is None or args.dry_run or (i >= least and covered):
      break
    found = gx_compress.corrected(
      allocation,
      model,
      params,
      found_on,
      text.unseen,
      keep=keep,
      fits=fits,
      progress=True,
    )
    allocation = gx_compress.solve(found, budget, reserve=names)
  print(_table(allocation))
  if not found.covers(allocation.plain_losses()):
    print(
      'The loss is that of the second order: at one like this, what weights'
      ' cost together has not been measured.'
    )
  return Budgeted(
    allocation=allocation,
    statistics=found_on,
    fits=fits,
    checkpoint=checkpoint,
    unseen=text.unseen,
  )


def _table(allocation: gx_compress.Allocation) -> str:
  found = allocation.sensitivities
  kinds = json.dumps({k: round(v, 3) for k, v in found.factors.items()})
  return (
    f'Predicted: {_cli.human_bytes(allocation.nbytes)},'
    f' {allocation.nbytes / found.bfloat16_bytes:.1%} of bfloat16,'
    f' {8 * allocation.nbytes / found.weights:.2f} bits a parameter;'
    f' perplexity x {allocation.ratio:.4f}. Measured over predicted: {kinds}.'
  )
