# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Energy budgets: how many experts run, chosen at run time, nothing recompiled.

Decoding a token reads every weight that it needs once, so that what it costs
follows from bytes and operations. A budget, in joules, in seconds or as a share
of the experts' parameters, is turned into a number of experts for each layer,
which is one of the model's parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
import re
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from gemma_ext import compress as gx_compress
from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import nn as gx_nn
from gemma_ext.compress import _experts

_UNITS = {'%': 0.01, 'J': 1.0, 'mJ': 1e-3, 's': 1.0, 'ms': 1e-3}
# Positions whose probabilities are in float32 at a time.
_CHUNK = 64
# Weights of experts, beside a router.
_EXPERTS = re.compile(r'(.*)/(gating_einsum|linear|experts)(?:/|$)')
# Tables of which a token reads one row.
_LOOKED_UP = ('per_layer_embeddings', 'per_layer_input_embedding')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """What a token costs to decode, the attention to its context aside.

  Attributes:
    nbytes: Bytes of weights that are read.
    operations: Multiplications and additions.
    parameters: Weights that take part; those that are read, and multiplied by
      zero, do not.
  """

  nbytes: float
  operations: float
  parameters: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
  """What bytes and operations cost on a machine.

  The defaults are orders of magnitude, for comparisons and not for bills:
  160 pJ for a byte from DRAM and 1 pJ for an operation on small numbers (M.
  Horowitz, "Computing's energy problem", ISSCC 2014), 20 GB/s, no limit on
  operations. `Machine.of` fits the times of a real one.

  Attributes:
    joules_per_byte: Energy.
    joules_per_operation: Energy.
    seconds_per_byte: Time.
    seconds_per_operation: Time beside that of the bytes.
    seconds: Time that every token takes.
  """

  joules_per_byte: float = 160e-12
  joules_per_operation: float = 1e-12
  seconds_per_byte: float = 1 / 20e9
  seconds_per_operation: float = 0.0
  seconds: float = 0.0

  @classmethod
  def of(
    cls, costs: Sequence[Cost], seconds: Sequence[float], **energy: float
  ) -> Machine:
    """Fits a machine to measured times.

    Where costs differ only in how many experts run, bytes and operations go
    together, and time is put down to bytes.

    Args:
      costs: What tokens cost, two or more.
      seconds: How long they took.
      **energy: Joules, as the attributes.

    Raises:
      ShapeError: If there are fewer than two, or not as many of both.
    """
    if len(costs) != len(seconds) or len(costs) < 2:
      raise errors.ShapeError(
        f'Got {len(costs)} costs and {len(seconds)} times; expected as many of'
        ' both, and at least two.'
      )
    nbytes = np.array([cost.nbytes for cost in costs], np.float64)
    scale = nbytes.max()
    terms = np.stack([nbytes / scale, np.ones_like(nbytes)], axis=1)
    (slope, fixed), _ = optimize.nnls(terms, np.asarray(seconds, np.float64))
    return cls(seconds_per_byte=slope / scale, seconds=fixed, **energy)

  def joules_of(self, cost: Cost) -> float:
    """Returns the energy of a token."""
    return (
      self.joules_per_byte * cost.nbytes
      + self.joules_per_operation * cost.operations
    )

  def seconds_of(self, cost: Cost) -> float:
    """Returns the time of a token."""
    return (
      self.seconds_per_byte * cost.nbytes
      + self.seconds_per_operation * cost.operations
      + self.seconds
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """What a token may cost; one of these.

  Attributes:
    active: Share of the parameters of all experts, in (0, 1].
    joules: Energy.
    seconds: Time.
  """

  active: float | None = None
  joules: float | None = None
  seconds: float | None = None

  def __post_init__(self):
    given = [v for v in dataclasses.astuple(self) if v is not None]
    if len(given) != 1 or not 0 < given[0] < math.inf:
      raise errors.RecipeError(
        f'A budget has one of active, joules and seconds, above 0; got {self}.'
      )
    if self.active is not None and self.active > 1:
      raise errors.RecipeError(f'active={self.active}; expected at most 1.')

  @classmethod
  def parse(cls, text: str) -> Budget:
    """Reads '50%', '0.2J', '200mJ', '0.015s' or '15ms'.

    Raises:
      RecipeError: If it is none of these.
    """
    match = re.fullmatch(r'\s*([0-9.eE+-]{1,20})\s*(%|mJ|J|ms|s)\s*', text)
    try:
      value = float(match[1]) * _UNITS[match[2]] if match else math.nan
    except ValueError:
      value = math.nan
    if math.isnan(value) or match is None:
      raise errors.RecipeError(
        "A budget of a token looks like '50%', '0.2J', '200mJ', '0.015s' or"
        f" '15ms', got {text!r:.80}."
      )
    if match[2] == '%':
      return cls(active=value)
    return cls(joules=value) if 'J' in match[2] else cls(seconds=value)


def cost(
  model: nn.Module,
  params: Mapping[str, Any],
  k: Mapping[str, int] | None = None,
) -> Cost:
  """Counts what decoding a token takes, with the kernels of the CPU.

  They leave out what is not chosen where it is packed: experts that are whole
  blocks of codes and whole groups, and single neurons that gates choose, of
  which all gates are read; of Gemma 4's own mixtures, dense ones too. Of others
  everything is read and multiplied, by zero, whatever is chosen: dense ones
  (`Keep`), experts that are smaller than a block, 'expert_choice'. Where XLA
  runs packed layers, as on accelerators, all mixtures are of that kind, which
  is not counted.

  Args:
    model: The model.
    params: Its parameters.
    k: Experts of layers that are mixtures, by path; as many as the parameters
      say by default.
  """
  methods: dict[str, Any] = {}
  mixtures = _experts.routed(model)
  if isinstance(model, gx_nn.Compressed):
    methods = gx_nn.methods_of(model.model, model.recipe)
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  if k is None:
    k = {
      path: int(flat.get(f'{path}/router/k', mixture.method.top_k))
      for path, mixture in mixtures.items()
    }
  share = {
    path: (mixture.method.shared + k[path]) / mixture.method.slices
    for path, mixture in mixtures.items()
  }
  alone = _read_alone(model, mixtures, methods)
  planes = {path: getattr(m, 'planes', 1) for path, (_, m) in methods.items()}
  packed = {path: site.layout.size for path, (site, _) in methods.items()}
  nbytes = operations = parameters = 0.0
  for path, leaf in flat.items():
    place, _, name = path.rpartition('/')
    if any(table in path for table in _LOOKED_UP):
      continue
    active = read = 1.0
    match = _EXPERTS.match(path)
    layer, part = match.groups() if match else ('', '')
    if layer in share:
      active = share[layer]
      if mixtures[layer].by_neuron and part == 'gating_einsum':
        # The gates choose: all of them are read.
        active = (1 + active) / 2
      # Those of `shard_experts` are arrays of their own.
      if alone[layer] or part == 'experts':
        read = active
    nbytes += read * leaf.nbytes
    if place in packed:
      if name == 'codes':
        if not methods[place][0].is_factor:
          parameters += active * packed[place]
        operations += 2 * read * packed[place] * planes[place]
    else:
      parameters += active * leaf.size
      operations += 2 * read * leaf.size
  return Cost(nbytes=nbytes, operations=operations, parameters=parameters)


def _read_alone(
  model: nn.Module,
  mixtures: Mapping[str, gx_nn.Mixture],
  methods: Mapping[str, tuple[gx_nn.Site, Any]],
) -> dict[str, bool]:
  """Whether weights that are not chosen are left out, by path; see `cost`."""
  own = gx_nn.native_mixtures(model.model) if mixtures else {}
  found = dict.fromkeys(own, True)
  for path, mixture in mixtures.items():
    if path in own:
      continue
    down = f'{path}/linear'
    found[path] = mixture.by_neuron and down in methods
    if mixture.method.router != 'expert_choice' and down in methods:
      site, method = methods[down]
      cols = site.layout.cols
      fmt = gx_nn.format_of(method, cols)
      found[path] |= kernels.cuts(fmt, cols, mixture.size)
  return found


def experts_within(
  model: gx_nn.Compressed,
  params: Mapping[str, Any],
  budget: Budget,
  *,
  curves: gx_compress.Curves | None = None,
  machine: Machine = Machine(),
) -> dict[str, int]:
  """Returns how many experts each layer gets within a budget.

  Args:
    model: A model with mixtures.
    params: Its parameters.
    budget: The budget of a token.
    curves: What leaving experts out costs, see `gx.compress.expert_curves`; by
      default every layer gets the same share.
    machine: What bytes and operations cost.

  Returns:
    Experts by layer, at least one in each.

  Raises:
    RecipeError: If the model has no mixtures, or one expert a layer is beyond
      the budget, or a router is 'expert_choice'.
  """
  mixtures, methods = _experts.routed(model), {}
  if isinstance(model, gx_nn.Compressed):
    methods = gx_nn.methods_of(model.model, model.recipe)
  if not mixtures:
    raise errors.RecipeError('The model has no mixtures of experts to choose.')
  _experts.check_number(mixtures, mixtures)

  def choice(share: float) -> dict[str, int]:
    """Of the routed experts, this share of all."""
    if curves is None:
      return {
        path: max(1, int(share * m.method.top_k + 1e-9))
        for path, m in mixtures.items()
      }
    least = curves.active(dict.fromkeys(curves.lost, 1))
    return gx_compress.choose_experts(curves, max(share, least))

  def fits(k: Mapping[str, int]) -> bool:
    if budget.active is not None:
      sizes = {p: m.size * m.features for p, m in mixtures.items()}
      some = sum(
        (m.method.shared + k[p]) * sizes[p] for p, m in mixtures.items()
      )
      every = sum(m.method.slices * sizes[p] for p, m in mixtures.items())
      return some <= budget.active * every * (1 + 1e-9)
    found = cost(model, params, k)
    if budget.joules is not None:
      return machine.joules_of(found) <= budget.joules
    assert budget.seconds is not None
    return machine.seconds_of(found) <= budget.seconds

  low, high = 0.0, 1.0
  if fits(choice(high)):
    return choice(high)
  if not fits(choice(low)):
    one = cost(model, params, choice(low))
    why = ''
    if not any(_read_alone(model, mixtures, methods).values()):
      why = (
        ' All experts are read whatever is chosen: pack their weights, in'
        ' experts of whole blocks of codes, see `gx.text.cost`.'
      )
    raise errors.RecipeError(
      f'{budget} cannot be kept: with one expert a layer a token costs'
      f' {machine.joules_of(one):.3g} J and {machine.seconds_of(one):.3g} s.'
      + why
    )
  for _ in range(20):
    middle = (low + high) / 2
    low, high = (middle, high) if fits(choice(middle)) else (low, middle)
  return choice(low)


def with_budget(
  model: gx_nn.Compressed,
  params: Mapping[str, Any],
  budget: Budget | str,
  **kwargs: Any,
) -> dict[str, Any]:
  """Returns parameters with which tokens keep a budget.

  They are those of the model but for one integer a layer: what was compiled
  for them stays.

  Args:
    model: A model with mixtures.
    params: Its parameters.
    budget: The budget of a token, or its text, see `Budget.parse`.
    **kwargs: As for `experts_within`.

  Raises:
    RecipeError: If it cannot be kept.
  """
  if isinstance(budget, str):
    budget = Budget.parse(budget)
  k = experts_within(model, params, budget, **kwargs)
  return gx_compress.with_experts(model, params, k)


def complexity(
  model: nn.Module, params: Mapping[str, Any], tokens: Any
) -> float:
  """Estimates how hard a text is: the mean entropy of its next tokens, in bits.

  Few experts do for an estimate: pass parameters of a small budget.

  Args:
    model: The model.
    params: Its parameters.
    tokens: Token ids of a prompt, `[L]`.

  Raises:
    ShapeError: If there are none.
  """
  tokens = jnp.asarray(tokens)
  if tokens.ndim != 1 or not tokens.size:
    raise errors.ShapeError(
      f'Got tokens of shape {tokens.shape}; expected some, [L].'
    )
  return float(_entropy(params, tokens, model=model)) / math.log(2)


@functools.partial(jax.jit, static_argnames='model')
def _entropy(params, tokens, *, model):
  return _mean_entropy(model.apply({'params': params}, tokens[None]).logits[0])


def _mean_entropy(logits: jax.Array) -> jax.Array:
  """Mean over the rows of `[L, V]`, in nats, some rows at a time."""
  length, vocab = logits.shape
  pad = -length % _CHUNK
  real = jnp.pad(jnp.ones(length, bool), (0, pad)).reshape(-1, _CHUNK)
  rows = jnp.pad(logits, ((0, pad), (0, 0))).reshape(-1, _CHUNK, vocab)

  def body(total, part):
    some, real = part
    log_p = jax.nn.log_softmax(some.astype(jnp.float32))
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return total + jnp.sum(jnp.where(real, entropy, 0)), None

  return jax.lax.scan(body, jnp.float32(0), (rows, real))[0] / length


def active_for(
  bits: float,
  *,
  least: float = 0.25,
  most: float = 1.0,
  easy: float = 2.0,
  hard: float = 6.0,
) -> Budget:
  """Returns the budget of a prompt of some complexity.

  Args:
    bits: As `complexity` returns it.
    least: Share of active parameters of easy prompts.
    most: Of hard ones.
    easy: Bits up to which a prompt is easy.
    hard: Bits from which on it is hard; in between the share grows evenly.

  Raises:
    RecipeError: If the shares or bits are out of order.
  """
  if not (0 < least <= most <= 1 and easy < hard):
    raise errors.RecipeError(
      f'Expected 0 < least <= most <= 1 and easy < hard, got {least=}, {most=},'
      f' {easy=}, {hard=}.'
    )
  place = min(max((bits - easy) / (hard - easy), 0.0), 1.0)
  return Budget(active=least + place * (most - least))
