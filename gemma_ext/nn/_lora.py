# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`LoRA` for every family, dense or compressed.

`gm.nn.LoRA` knows the Einsum class of Gemma 2 and 3 only: on Gemma 3n and 4 it
adds nothing and says nothing. This one adapts all of them, under the name and
parameter paths of the official one, so that `select('lora')`,
`gm.ckpts.SkipLoRA` and `peft.split_params` go on working.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import linen as nn
from gemma import peft
import jax
import jax.numpy as jnp
from kauldron import kontext

from gemma_ext import _patterns
from gemma_ext import errors
from gemma_ext.nn import _compressed
from gemma_ext.nn import _config
from gemma_ext.nn import _native
from gemma_ext.nn import _offload
from gemma_ext.nn import _scopes
from gemma_ext.nn import _sharded
from gemma_ext.nn import _sites


class LoRA(nn.Module):
  """Wrapper around a Gemma model that adds low-rank adapters.

  Attributes:
    rank: Rank of the adapters.
    model: The model to adapt: an official one, or `gx.nn.Compressed`.
    dtype: Type of the adapters.
    target: Regular expression on module paths (whole segments, as in
      `Recipe`), e.g. `attn`. All einsums of the text model by default.
    experts: Whether to adapt the experts that Gemma 4 has of its own, too,
      each with an adapter of its own, where `target` matches their weights.

  Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
  arXiv 2106.09685.
  """

  _: dataclasses.KW_ONLY

  rank: int
  model: nn.Module
  dtype: Any = jnp.bfloat16
  target: str = '.*'
  experts: bool = False

  def __post_init__(self):
    if type(self.rank) is not int or self.rank < 1:
      raise errors.RecipeError(
        f'LoRA.rank must be a positive integer, got {self.rank!r}.'
      )
    if self.model.scope is None:
      object.__setattr__(self, 'model', self._stamped())
    super().__post_init__()
    _scopes.share(self)

  @nn.compact
  def __call__(self, *args, **kwargs):
    """Calls the model. Arguments and outputs are those of the model."""
    _scopes.share(self)
    targets = self._targets()
    depth = len(self.path)

    def replace(module: nn.Module) -> nn.Module:
      if not isinstance(module, (*_sites.EINSUMS, _sites.RAGGED_WEIGHT)):
        return module
      path = '/'.join(module.path[depth:] + (module.weight_name,))
      if path not in targets:
        return module
      if isinstance(module, _sites.RAGGED_WEIGHT):
        return _LoRAExperts(
          name=_native.ADAPTER, rank=self.rank, dtype=self.dtype, wrapped=module
        )
      # The two einsums of a feed-forward layer share a scope, so their
      # adapters need names of their own; the official wrapper gives the same.
      name = None
      if module.weight_name != 'w':
        name = f'_LoRAEinsum_{module.weight_name}'
      return _LoRAEinsum(
        name=name, rank=self.rank, dtype=self.dtype, wrapped=module
      )

    with nn.intercept_methods(_Replacing(replace)):
      return self.model(*args, **kwargs)

  def _targets(self) -> frozenset[str]:
    """Paths of the weights to adapt, from the model and not from a trace."""
    model = self.model
    if isinstance(model, _compressed.Compressed):
      model = model.model
    pattern = _patterns.compiled(self.target)
    matched = [s for s in _sites.sites(model) if pattern.fullmatch(s.path)]
    kinds = {_sites.Kind.EINSUM}
    if self.experts:
      kinds.add(_sites.Kind.EXPERTS)
    targets = frozenset(site.path for site in matched if site.kind in kinds)
    if not targets:
      hint = ''
      if any(site.kind is _sites.Kind.EXPERTS for site in matched):
        hint = ' It does match experts: `LoRA(experts=True)` adapts them.'
      raise errors.UnmatchedRuleError(
        f'LoRA target {self.target!r} matches no einsum of'
        f' {type(model).__name__}.{hint}'
      )
    self._check_read(targets)
    return targets

  def _check_read(self, targets: frozenset[str]) -> None:
    """Raises RecipeError if the model computes targets elsewhere."""
    model = self.model
    away: set[str] = set()
    if isinstance(model, (_offload.Offloaded, _sharded.Sharded)):
      away |= set(_compressed.mixtures_of(model.model, model.recipe))
    if isinstance(model, _offload.Offloaded):
      away |= set(_native.mixtures(model.model))
    lost = sorted(
      t for t in targets if any(t.startswith(p + '/') for p in away)
    )
    if lost:
      raise errors.RecipeError(
        f'{lost[0]!r} and {len(lost) - 1} more targets of LoRA are weights of'
        ' experts that are outside of the device or divided over several, where'
        " no adapter reaches them. Choose others, e.g. target='attn', or adapt"
        ' the model as it was before.'
      )

  def _stamped(self) -> nn.Module:
    """The model, told apart from the same one with other adapters."""
    text = f' LoRA({self.rank}, {jnp.dtype(self.dtype)}, {self.target!r},'
    text += f' {self.experts})'
    if isinstance(self.model, _compressed.Compressed):
      inner = _config.stamp(self.model.model, text)
      if inner is self.model.model:
        return self.model
      return self.model.clone(model=inner)
    _config.check(self.model)
    return _config.stamp(self.model, text)

  def __kontext_keys__(self) -> dict[str, str]:
    """Keys of the wrapped model, for kauldron configs."""
    return kontext.get_keypaths(self.model)

  def __getattr__(self, name: str) -> Any:
    if name.startswith('__'):
      raise AttributeError(name)
    return getattr(self.model, name)


class _Replacing:
  """The official interceptor, which says what it is after.

  What adapts experts is read from their parameters where they are computed.
  """

  sees = _sites.EINSUMS

  def __init__(self, replace: Callable[[nn.Module], nn.Module]):
    self._run = peft.ModuleInterceptor(replace).interceptor

  def __call__(self, next_fun, args, kwargs, context):
    return self._run(next_fun, args, kwargs, context)


class _LoRAEinsum(nn.Module):
  """An Einsum of any family plus its adapter.

  The class name is part of the parameter path, and the official one's.
  """

  _: dataclasses.KW_ONLY

  rank: int
  dtype: Any
  wrapped: nn.Module

  @nn.compact
  def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
    adapter = peft.LoRAEinsumAdapter(
      name='lora',
      rank=self.rank,
      dtype=self.dtype,
      einsum_str=eqn,
      shape=self.wrapped.shape,
    )
    return self.wrapped(eqn, x) + adapter(x)


class _LoRAExperts(nn.Module):
  """The weights of experts plus an adapter for each."""

  _: dataclasses.KW_ONLY

  rank: int
  dtype: Any
  wrapped: nn.Module

  @nn.compact
  def __call__(self) -> jax.Array:
    weight = self.wrapped()
    # [E, 2, f, D] reads D; [E, f, D] reads f.
    count, *outs, ins = weight.shape
    gate = weight.ndim == 4
    if not gate:
      outs, ins = [ins], outs[0]
    adapter = _ExpertsAdapter(name='lora', rank=self.rank, dtype=self.dtype)
    a, b = (each.astype(weight.dtype) for each in adapter(count, ins, outs))
    return weight + jnp.einsum(
      'eir,er...->e...i' if gate else 'efr,ero->efo', a, b
    )


class _ExpertsAdapter(nn.Module):
  """As `peft.LoRAEinsumAdapter`, of many weights."""

  _: dataclasses.KW_ONLY

  rank: int
  dtype: Any

  @nn.compact
  def __call__(
    self, count: int, ins: int, outs: Sequence[int]
  ) -> tuple[jax.Array, jax.Array]:
    init = nn.initializers.kaiming_uniform(batch_axis=(0,))
    a = self.param('a', init, (count, ins, self.rank), self.dtype)
    b = self.param(
      'b', nn.initializers.zeros_init(), (count, self.rank, *outs), self.dtype
    )
    return a, b
