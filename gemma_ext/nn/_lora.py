# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`LoRA` for every family, dense or compressed.

`gm.nn.LoRA` knows the Einsum class of Gemma 2 and 3 only: on Gemma 3n and 4 it
adds nothing and says nothing. This one adapts all of them, under the name and
parameter paths of the official one, so that `select('lora')`,
`gm.ckpts.SkipLoRA` and `peft.split_params` go on working.
"""

from __future__ import annotations

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
from gemma_ext.nn import _scopes
from gemma_ext.nn import _sites


class LoRA(nn.Module):
  """Wrapper around a Gemma model that adds low-rank adapters.

  Attributes:
    rank: Rank of the adapters.
    model: The model to adapt: an official one, or `gx.nn.Compressed`.
    dtype: Type of the adapters.
    target: Regular expression on module paths (whole segments, as in
      `Recipe`), e.g. `attn`. All einsums of the text model by default.

  Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
  arXiv 2106.09685.
  """

  _: dataclasses.KW_ONLY

  rank: int
  model: nn.Module
  dtype: Any = jnp.bfloat16
  target: str = '.*'

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
      if not isinstance(module, _sites.EINSUMS):
        return module
      path = '/'.join(module.path[depth:] + (module.weight_name,))
      if path not in targets:
        return module
      # The two einsums of a feed-forward layer share a scope, so their
      # adapters need names of their own; the official wrapper gives the same.
      name = None
      if module.weight_name != 'w':
        name = f'_LoRAEinsum_{module.weight_name}'
      return _LoRAEinsum(
        name=name, rank=self.rank, dtype=self.dtype, wrapped=module
      )

    with peft.ModuleInterceptor(replace):
      return self.model(*args, **kwargs)

  def _targets(self) -> frozenset[str]:
    """Paths of the weights to adapt, from the model and not from a trace."""
    model = self.model
    if isinstance(model, _compressed.Compressed):
      model = model.model
    pattern = _patterns.compiled(self.target)
    targets = frozenset(
      site.path
      for site in _sites.sites(model)
      if site.kind is _sites.Kind.EINSUM and pattern.fullmatch(site.path)
    )
    if not targets:
      raise errors.UnmatchedRuleError(
        f'LoRA target {self.target!r} matches no einsum of'
        f' {type(model).__name__}.'
      )
    return targets

  def _stamped(self) -> nn.Module:
    """The model, told apart from the same one with other adapters."""
    text = f' LoRA({self.rank}, {jnp.dtype(self.dtype)}, {self.target!r})'
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
