# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`allocate`: a budget of bits, spent where it hurts least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from flax import linen as nn
import numpy as np
import scipy.optimize
import scipy.sparse

from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _calibrate
from gemma_ext.compress import _candidates
from gemma_ext.compress import _compress
from gemma_ext.compress import _divergence
from gemma_ext.compress import _fits
from gemma_ext.compress import _sensitivity
from gemma_ext.compress import _statistics

# Of the solver: how far from the optimum it may stop, and after how long.
_GAP = 1e-4
_SECONDS = 60.0
# Times that a choice is made again with the corrections of what it costs.
_ROUNDS = 5
# Rounds of measuring, and the logarithm of losses that are taken for the same.
CORRECTIONS = 2
_SAME = 0.05
_LEAST = 0.01
_SUFFIXES = {'KB': 1e3, 'MB': 1e6, 'GB': 1e9}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """What a compressed model may have; one of these.

  Attributes:
    bits: Bits a parameter, mean of the whole model.
    share: Share of the bytes of the dense model in bfloat16, in (0, 1].
    nbytes: Bytes of all parameters.
    ratio: Perplexity over that of the dense model, above 1.
  """

  bits: float | None = None
  share: float | None = None
  nbytes: int | None = None
  ratio: float | None = None

  def __post_init__(self):
    given = {
      f.name: getattr(self, f.name)
      for f in dataclasses.fields(self)
      if getattr(self, f.name) is not None
    }
    if len(given) != 1:
      raise errors.RecipeError(
        f'A budget is one of bits, share, nbytes and ratio; got {given}.'
      )
    ((name, value),) = given.items()
    least = 1 if name == 'ratio' else 0
    most = 1 if name == 'share' else math.inf
    if (
      isinstance(value, bool)
      or not isinstance(value, (int, float))
      or not least < value <= most
      or math.isinf(value)
    ):
      raise errors.RecipeError(
        f'Budget.{name}={value!r}; expected a number above {least}'
        + (f', at most {most}.' if name == 'share' else '.')
      )

  @classmethod
  def parse(cls, text: str) -> Budget:
    """Reads '28%', '4.5bits', '150MB' or 'ratio=1.02'.

    Args:
      text: The budget.

    Raises:
      RecipeError: If it is no budget.
    """
    number = r'(\d{1,12}(?:\.\d{1,9})?)'
    compact = text.replace(' ', '')
    if found := re.fullmatch(number + '%', compact):
      return cls(share=float(found[1]) / 100)
    if found := re.fullmatch(number + 'bits?', compact):
      return cls(bits=float(found[1]))
    if found := re.fullmatch(number + '([KMG]B)', compact):
      return cls(nbytes=int(float(found[1]) * _SUFFIXES[found[2]]))
    if found := re.fullmatch('ratio=' + number, compact):
      return cls(ratio=float(found[1]))
    raise errors.RecipeError(
      f"{text!r} is no budget; expected one like '28%' (of bfloat16),"
      " '4.5bits' (a parameter), '150MB' or 'ratio=1.02' (of perplexities)."
    )

  def most_bytes(self, found: _candidates.Sensitivities) -> float | None:
    """Returns the bytes of all parameters; `None` for a ratio."""
    if self.nbytes is not None:
      return self.nbytes
    if self.share is not None:
      return self.share * found.bfloat16_bytes
    if self.bits is not None:
      return self.bits * found.weights / 8
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
  """A choice of one candidate for every weight.

  Attributes:
    choice: Candidate by path.
    sensitivities: What it was chosen from.
  """

  choice: dict[str, _candidates.Candidate]
  sensitivities: _candidates.Sensitivities

  @property
  def recipe(self) -> recipe_lib.Recipe:
    """The recipe, one rule for each weight.

    Neighbouring bands of a table with the same method are one.
    """
    methods: dict[str, recipe_lib.Method] = {}
    bands: dict[str, list[tuple[int | None, recipe_lib.Method]]] = {}
    for path, candidate in self.choice.items():
      if path not in self.sensitivities.rows:
        methods[path] = candidate.method
        continue
      whole = path.rpartition('/')[0]
      found = bands.setdefault(whole, [])
      if found and found[-1][1] == candidate.method:
        found.pop()
      found.append((self.sensitivities.rows[path][1], candidate.method))
      methods[whole] = candidate.method
    methods |= {
      path: recipe_lib.Rows.of(found, ordered=True, centered=True)
      for path, found in bands.items()
    }
    rules = tuple((re.escape(path), m) for path, m in methods.items())
    return recipe_lib.Recipe(rules=rules)

  @property
  def nbytes(self) -> int:
    """Predicted bytes of all parameters."""
    chosen = sum(c.nbytes for c in self.choice.values())
    return self.sensitivities.other_bytes + chosen

  @property
  def loss(self) -> float:
    """Predicted increase of the loss, nats a token."""
    return sum(self.losses.values())

  @property
  def losses(self) -> dict[str, float]:
    """The same, by path."""
    return {p: self.sensitivities.loss(p, c) for p, c in self.choice.items()}

  @property
  def ratio(self) -> float:
    """Predicted perplexity over that of the dense model."""
    return math.exp(min(self.loss, 700.0))

  def plain_losses(self) -> dict[str, float]:
    """Returns the loss of each kind of weight before any correction."""
    found: dict[str, float] = {}
    for path, candidate in self.choice.items():
      kind = _candidates.kind_of(path)
      found[kind] = found.get(kind, 0.0) + candidate.loss
    return found

  def of_kind(self, kind: str) -> Allocation:
    """Returns the choice for weights of one kind, the others dense."""
    choice = {
      p: c for p, c in self.choice.items() if _candidates.kind_of(p) == kind
    }
    return dataclasses.replace(self, choice=choice)


def solve(
  found: _candidates.Sensitivities, budget: Budget, *, reserve: int = 0
) -> Allocation:
  """Chooses a candidate for every weight: least loss in a budget of bytes.

  A multiple-choice knapsack, solved by branch and bound to one part in 10,000.
  For a ratio: least bytes within its loss. Where corrections were measured at
  several losses, it is solved again with those of what was chosen.

  Args:
    found: What there is to choose from.
    budget: The budget.
    reserve: Bytes of it that are not for parameters, such as those that a
      directory needs to name them; see `gx.ckpts.overhead_bytes`.

  Returns:
    The choice.

  Raises:
    RecipeError: If even the smallest candidates are too large, or the best
      ones too coarse.
  """
  chosen = _solve(found, budget, reserve)
  for _ in range(_ROUNDS):
    factors = found.at(chosen.plain_losses())
    if factors == chosen.sensitivities.factors:
      break
    chosen = _solve(
      dataclasses.replace(found, factors=factors), budget, reserve
    )
  return chosen


def _solve(
  found: _candidates.Sensitivities, budget: Budget, reserve: int
) -> Allocation:
  paths = [*found.candidates]
  items = [(p, c) for p in paths for c in found.candidates[p]]
  nbytes = np.array([c.nbytes for _, c in items], np.float64)
  loss = np.array([found.loss(p, c) for p, c in items])
  groups = np.array([paths.index(p) for p, _ in items])
  one_each = scipy.sparse.csr_array(
    (np.ones(len(items)), (groups, np.arange(len(items)))),
    shape=(len(paths), len(items)),
  )
  most = budget.most_bytes(found)
  cost, limited, limit = loss, nbytes, 0.0
  if most is not None:
    limit = most - found.other_bytes - reserve
  else:
    assert budget.ratio is not None
    cost, limited, limit = nbytes, loss, math.log(budget.ratio)
  smallest = sum(limited[groups == i].min() for i in range(len(paths)))
  if smallest > limit:
    what = (
      f'{smallest + found.other_bytes + reserve:,.0f} bytes'
      if most is not None
      else f'a ratio of {math.exp(smallest):.4f}'
    )
    raise errors.RecipeError(
      f'{budget} cannot be had: the candidates take {what} at least. Add'
      ' smaller or finer ones, or raise the budget.'
    )
  # In units that the solver's tolerances are made for.
  result = scipy.optimize.milp(
    cost / max(cost.max(), 1e-30),
    integrality=np.ones(len(items)),
    bounds=scipy.optimize.Bounds(0, 1),
    constraints=[
      scipy.optimize.LinearConstraint(one_each, 1, 1),
      scipy.optimize.LinearConstraint(
        limited[None] / max(limit, 1e-30), -np.inf, 1
      ),
    ],
    options={'mip_rel_gap': _GAP, 'time_limit': _SECONDS},
  )
  if result.x is None:
    raise errors.RecipeError(f'{budget} was not solved: {result.message}.')
  chosen = result.x.reshape(-1) > 0.5
  return Allocation(
    choice=dict(item for item, yes in zip(items, chosen, strict=True) if yes),
    sensitivities=found,
  )


def held_out(tokens: Any) -> tuple[Any, Any]:
  """Splits a calibration text: what to fit on, and what to measure on.

  Rows of the table of embeddings whose tokens come in a text are stored better
  than others, so that on this text all looks better than it is.

  Args:
    tokens: Token ids `[batch, length]`.

  Returns:
    The first two thirds of the windows, and the others. Of one or two windows,
    both are all of them.
  """
  count = len(tokens)
  last = count - count // 3
  return (tokens[:last], tokens[last:]) if count > 2 else (tokens, tokens)


def corrected(
  allocation: Allocation,
  model: nn.Module,
  params: Mapping[str, Any],
  statistics: _statistics.Statistics,
  tokens: Any,
  *,
  keep: Callable[[_candidates.Sensitivities], None] = lambda found: None,
  fits: _fits.Fits | None = None,
  progress: bool = False,
) -> _candidates.Sensitivities:
  """Returns sensitivities whose losses were measured for one allocation more.

  Each kind of weight is compressed as allocated, all others dense, and what
  that costs is measured as the divergence from the dense model. What was
  measured before stays; for the same loss nothing is measured again.

  Args:
    allocation: The choice to measure at.
    model: The official model.
    params: Its dense parameters.
    statistics: What its weights are fitted with.
    tokens: Token ids `[batch, length]` to measure on, which the statistics have
      not seen.
    keep: Told the results so far after every kind, to be resumed from.
    fits: As for `compress`.
    progress: Whether to show progress bars.
  """
  found = allocation.sensitivities
  for kind, plain in sorted(allocation.plain_losses().items()):
    part = allocation.of_kind(kind)
    before = found.corrections.get(kind, ())
    if plain <= 0 or any(abs(math.log(x / plain)) <= _SAME for x, _ in before):
      continue
    measured = _divergence.divergence(
      model,
      params,
      gx_nn.Compressed(model=model, recipe=part.recipe),
      _compress.compress(
        model,
        params,
        part.recipe,
        calibration=statistics,
        fits=fits,
        progress=progress,
      ),
      tokens,
      progress=progress,
    )
    # What is too small to be measured may come out below nothing.
    pair = plain, max(measured, _LEAST * plain)
    corrections = {**found.corrections, kind: (*sorted([*before, pair]),)}
    found = dataclasses.replace(found, corrections=corrections)
    keep(found)
  return found


def refined(
  found: _candidates.Sensitivities,
  budgets: Sequence[Budget],
  model: nn.Module,
  params: Mapping[str, Any],
  statistics: _statistics.Statistics,
  tokens: Any,
  *,
  reserve: int = 0,
  keep: Callable[[_candidates.Sensitivities], None] = lambda found: None,
  fits: _fits.Fits | None = None,
  progress: bool = False,
) -> _candidates.Sensitivities:
  """Returns sensitivities corrected for one budget after the other.

  Every correction changes what the next budget is spent on, also the same
  budget given twice. Arguments are those of `solve` and `corrected`.
  """
  for budget in budgets:
    found = corrected(
      solve(found, budget, reserve=reserve),
      model,
      params,
      statistics,
      tokens,
      keep=keep,
      fits=fits,
      progress=progress,
    )
  return found


def allocate(
  model: nn.Module,
  params: Mapping[str, Any],
  budget: Budget | str,
  calibration: Any,
  *,
  counted: Any = None,
  reserve: int = 0,
  progress: bool = False,
) -> recipe_lib.Recipe:
  """Chooses the width of every weight under a budget.

  Sensitivities to second order, a knapsack, two rounds of measuring what each
  kind of weight really costs, each with the knapsack again. To keep the parts,
  or to fit the weights with the same statistics:

      budget = gx.Budget(share=0.28)
      tokens, unseen = gx.compress.held_out(tokens)
      statistics = gx.compress.statistics(model, params, tokens)
      found = gx.compress.sensitivities(model, params, statistics)
      fits = gx.compress.Fits()  # A weight that keeps its width is fitted once.
      found = gx.compress.refined(
        found, [budget] * 2, model, params, statistics, unseen, fits=fits
      )
      recipe = gx.compress.solve(found, budget).recipe
      params = gx.compress(
        model, params, recipe, calibration=statistics, fits=fits
      )

  Args:
    model: The official model.
    params: Its dense parameters.
    budget: A `Budget`, or what `Budget.parse` reads.
    calibration: Token ids `[batch, length]`, padded with 0.
    counted: More text of the kind, see `gx.compress.statistics`.
    reserve: Bytes of the budget that are not for parameters, as of `solve`.
    progress: Whether to show progress bars.

  Returns:
    The recipe.

  Raises:
    RecipeError: If the budget is none or cannot be met.
    ShapeError: If `calibration` holds no tokens.
    ParamsMismatchError: If the parameters do not belong to the model.
  """
  if isinstance(budget, str):
    budget = Budget.parse(budget)
  calibration, unseen = held_out(_calibrate.check_tokens(calibration))
  statistics = _statistics.statistics(
    model, params, calibration, counted=counted, progress=progress
  )
  found = _sensitivity.sensitivities(
    model, params, statistics, progress=progress
  )
  found = refined(
    found,
    [budget] * CORRECTIONS,
    model,
    params,
    statistics,
    unseen,
    reserve=reserve,
    fits=_fits.Fits(),
    progress=progress,
  )
  return solve(found, budget, reserve=reserve).recipe
