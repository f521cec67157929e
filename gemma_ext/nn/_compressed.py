# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Compressed`: any Gemma model, its weights read packed.

The only place in the package that intercepts the code of the official modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from kauldron import kontext

from gemma_ext import errors
from gemma_ext import recipe as recipe_lib
from gemma_ext.nn import _config
from gemma_ext.nn import _fused
from gemma_ext.nn import _low_rank
from gemma_ext.nn import _moe
from gemma_ext.nn import _native
from gemma_ext.nn import _packed
from gemma_ext.nn import _rolling
from gemma_ext.nn import _scopes
from gemma_ext.nn import _sites
from gemma_ext.nn import _stacked


class Compressed(nn.Module):
  """A Gemma model whose weights are stored as a recipe says.

  Takes the place of the model everywhere: in the samplers, under `jax.jit`,
  `jax.grad` and `nn.remat`, in kauldron configs, inside `gm.nn.LoRA`. The
  parameter tree is that of the model, with `{'codes', 'scale'}` in place of
  every weight that the recipe compresses, or a dict of several of these.

  Attributes:
    model: The official model, of any family.
    recipe: A `Recipe`, or what `Recipe.of` takes.
  """

  _: dataclasses.KW_ONLY

  model: nn.Module
  recipe: recipe_lib.Recipe

  def __post_init__(self):
    _config.check(self.model)
    # Clones, which flax makes inside every transform, arrive here resolved.
    if not isinstance(self.recipe, recipe_lib.Recipe):
      recipe = recipe_lib.Recipe.of(
        self.recipe, num_layers=self.model.config.num_layers
      )
      object.__setattr__(self, 'recipe', recipe)
    if getattr(self.model.config, 'recipe', None) != self.recipe:
      if self.model.scope is None:
        object.__setattr__(
          self, 'model', _config.attach(self.model, self.recipe)
        )
    super().__post_init__()
    _scopes.share(self)

  @nn.compact
  def __call__(self, *args, **kwargs):
    """Calls the model. Arguments and outputs are those of the model."""
    _scopes.share(self)
    with self._intercept():
      return self.model(*args, **kwargs)

  def init_cache(self, *, dtype: Any, **kwargs: Any) -> Any:
    """Initialises the cache as the model does, in a floating type.

    The official samplers ask for the type of the first parameter, which may be
    integer codes here, or the mean of a table in float32; then it is the
    model's own type, in which packed weights are read.
    """
    packed = methods_of(self.model, self.recipe).values()
    if not jnp.issubdtype(dtype, jnp.floating) or any(
      site.whole == _sites.TABLE for site, _ in packed
    ):
      dtype = self.model.dtype
    return self.model.init_cache(dtype=dtype, **kwargs)

  def __kontext_keys__(self) -> dict[str, str]:
    """Keys of the wrapped model, for kauldron configs."""
    return kontext.get_keypaths(self.model)

  def __getattr__(self, name: str) -> Any:
    # Everything else (config, INFO, init_cache, ...) is the model's.
    if name.startswith('__'):
      raise AttributeError(name)
    return getattr(self.model, name)

  def _intercept(self):
    return packed_weights(
      methods_of(self.model, self.recipe),
      mixtures=mixtures_of(self.model, self.recipe),
      dtype=self.model.dtype,
      depth=len(self.path),
    )


def packed_weights(
  methods: Mapping[str, tuple[_sites.Site, recipe_lib.Method]],
  *,
  dtype: Any,
  depth: int = 0,
  head_rows: int | None = None,
  mixtures: Mapping[str, _moe.Mixture] | None = None,
  offload: Callable[..., jax.Array] | None = None,
  send: Callable[..., jax.Array] | None = None,
) -> contextlib.AbstractContextManager[None]:
  """Context in which the official modules read these weights packed.

  Args:
    methods: Site and method by path, as `methods_of` returns them.
    dtype: Type of the dense weights that they stand for.
    depth: Length of the path of the module that the paths start from.
    head_rows: Rows of the vocabulary that get logits; all by default.
    mixtures: Layers that are mixtures, by path, as `mixtures_of` returns them.
    offload: Runs mixtures whose experts are elsewhere, see `_offload`; those
      of Gemma 4 too, unless there is `send`.
    send: Runs the experts of Gemma 4's own mixtures elsewhere, see `_native`.
  """
  return nn.intercept_methods(
    _Interceptor(
      methods=dict(methods),
      mixtures=dict(mixtures or {}),
      offload=offload,
      send=send,
      depth=depth,
      dtype=dtype,
      head_rows=head_rows,
    )
  )


def methods_of(
  model: nn.Module, recipe: recipe_lib.Recipe
) -> dict[str, tuple[_sites.Site, recipe_lib.Method]]:
  """Resolves a recipe for a model.

  Args:
    model: The model.
    recipe: The recipe.

  Returns:
    For the path of every weight that is compressed, its site and method; of a
    weight in parts, see `split`, one entry for each part, in order.

  Raises:
    UnmatchedRuleError: If a rule matches nothing.
    GroupSizeError: If a group size cannot be had.
  """
  sites = {site.path: site for site in _sites.sites(model)}
  methods = recipe.resolve(sites)
  resolved = {}
  for mixture in _moe.mixtures(methods, sites).values():
    for name in (_moe.GATE, _moe.DOWN):
      path = f'{mixture.path}/{name}'
      methods[path] = _moe.stored(mixture, name)
      sites[path] = _moe.place(mixture, name, sites[path])
  for path, method in methods.items():
    if isinstance(method, recipe_lib.Keep):
      continue
    for site, each in _sites.split(sites[path], method):
      try:
        _packed.format_of(each, site.layout.cols)
      except errors.GroupSizeError as e:
        raise errors.GroupSizeError(f'{path!r}: {e}') from e
      resolved[site.path] = (site, each)
  return resolved


def mixtures_of(
  model: nn.Module, recipe: recipe_lib.Recipe
) -> dict[str, _moe.Mixture]:
  """Returns the feed-forward layers that a recipe makes mixtures, by path.

  Args:
    model: The model.
    recipe: The recipe.

  Raises:
    RecipeError: If `MoE` is to hold for anything else.
  """
  if not any(isinstance(m, recipe_lib.MoE) for _, m in recipe.rules):
    return {}
  sites = {site.path: site for site in _sites.sites(model)}
  return _moe.mixtures(recipe.resolve(sites), sites)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Interceptor:
  """Gives the official modules their weights packed.

  Attributes:
    methods: Site and method by path.
    depth: Length of the path of `Compressed` itself inside a larger model.
    dtype: Parameter type of the model.
    head_rows: Rows of the vocabulary that get logits; all by default. Of a
      packed table the parameters then have them as `head`, too.
    mixtures: Layers that are mixtures, by path.
    offload: Runs mixtures whose experts are elsewhere.
    send: Runs the experts of Gemma 4's own mixtures elsewhere.
    masks: Of the mixtures under way, see `_mixture`; `None` within an einsum
      whose mask is applied.
  """

  methods: dict[str, tuple[_sites.Site, recipe_lib.Method]]
  depth: int
  dtype: Any
  head_rows: int | None = None
  mixtures: dict[str, _moe.Mixture] = dataclasses.field(default_factory=dict)
  offload: Callable[..., jax.Array] | None = None
  send: Callable[..., jax.Array] | None = None
  masks: list[_moe.Mask | None] = dataclasses.field(default_factory=list)

  # See `_fused.may_fuse`.
  fuses = True

  def __call__(self, next_fun, args, kwargs, context):
    module, method = context.module, context.method_name
    if method == '__call__' and isinstance(module, _fused.BLOCK):
      run = self._block(module, _rolling.Call.of(args, kwargs))
      return next_fun(*args, **kwargs) if run is None else run()
    if method == '__call__' and isinstance(module, _rolling.ATTENTIONS):
      call = _rolling.Call.of(args, kwargs)
      if call.rolls and module.attn_type.name == _rolling.SLIDING:
        return _rolling.attend(
          functools.partial(self._attention, next_fun, module), module, call
        )
      return self._attention(next_fun, module, **call.kwargs)
    if method == '__call__' and self.mixtures:
      mixture = self._mixture_of(module)
      # The einsums of a feed-forward layer share its path.
      if mixture is not None and _sites.einsum_of(module) is None:
        return self._mixture(next_fun, module, mixture, *args, **kwargs)
    if method == '__call__' and isinstance(module, _fused.FEED_FORWARDS):
      return self._feed_forward(next_fun, module, *args, **kwargs)
    if isinstance(module, _native.MIXTURE) and method in _native.METHODS:
      return self._native(next_fun, module, method, *args, **kwargs)
    mask = self.masks[-1] if self.masks else None
    if method == '__call__' and mask is not None:
      einsum = _sites.einsum_of(module)
      if einsum is not None and einsum.path == mask.module.path:
        run = lambda *args: self(next_fun, args, {}, context)
        return self._masked(mask, einsum.weight_name, run, *args, **kwargs)
    if isinstance(module, _sites.EINSUMS) and method == '__call__':
      weight = self._weight(module, module.weight_name)
      if weight is not None:
        return _einsum(module, weight, *args, **kwargs)
    elif isinstance(module, _sites.RAGGED_WEIGHT) and method == '__call__':
      weight = self._weight(module, module.weight_name)
      if weight is not None:
        return weight.dequantize()
    elif isinstance(module, _sites.EMBEDDERS):
      if method == 'setup':
        hook = lambda name, shape: self._weight(module, name)
        with _sites.param_hook(module, hook):
          return next_fun(*args, **kwargs)
      if method == 'decode':
        table = module.input_embedding_table
        if isinstance(table, _packed.PackedWeight | _packed.PackedRows):
          if self.head_rows is not None:
            head = module.get_variable('params', 'head')
            table = table.part(head, self.head_rows)
          return table.einsum('...d,vd->...v', *args, **kwargs)
        if self.head_rows is not None:
          # As `decode` of the official embedders.
          (x,) = args
          return jnp.dot(x, table[: self.head_rows].T)
    return next_fun(*args, **kwargs)

  def _block(self, module, call):
    """A whole block as one operation; `None` where it is not one."""
    if (
      module.is_initializing()
      or not _fused.may_fuse()
      or not _fused.block_fits(module, call.x, call.cache)
      # A router has to be asked, between the norm and the layer.
      or self._mixture_of(module.mlp) is not None
    ):
      return None
    attn, mlp = module.attn, module.mlp
    weights = [
      self._weight(owner, name)
      for owner, name in (
        (attn.q_einsum, 'w'),
        (attn.kv_einsum, 'w'),
        (attn.attn_vec_einsum, 'w'),
        (mlp, 'gating_einsum'),
        (mlp, 'linear'),
      )
    ]
    run = _fused.block(module, weights, call.x, call.cache)
    if run is not None and call.rolls:
      if attn.attn_type.name == _rolling.SLIDING:
        return functools.partial(_rolling.attend, run, attn, call)
    return run and functools.partial(run, **call.kwargs)

  def _attention(self, official, module, **kwargs):
    """Attention as one operation, or as the official code has it."""
    if (
      isinstance(module, _fused.ATTENTION)
      and not module.is_initializing()
      and _fused.may_fuse()
      and _fused.attention_fits(module, kwargs['x'], kwargs['cache'])
    ):
      return _fused.attention(module, **kwargs)
    return official(**kwargs)

  def _mixture_of(self, module):
    """What a module is to be, if it is a mixture."""
    return self.mixtures.get('/'.join(module.path[self.depth :]))

  def _mixture(self, official, module, mixture, x):
    """A feed-forward layer that is a mixture."""
    router = _moe.router_param(module, mixture)
    mask = _moe.Mask(module=module, mixture=mixture, router=router)
    self.masks.append(mask)
    try:
      if mixture.method.router == 'gate':
        weights = self._neurons_alone(module, x)
        if weights is not None:
          return _fused.neurons(mixture, x, router, *weights)
      else:
        if self.offload is not None:
          path = '/'.join(module.path[self.depth :])
          choice = mask.experts(x)
          return self.offload(module, path, x, choice.chosen, choice.weight)
        weights = self._experts_alone(module, mixture, x)
        if weights is not None:
          return _fused.experts(mixture, x, mask.experts(x), *weights)
        weights = self._experts_sorted(module, mixture, x)
        if weights is not None:
          return _stacked.wide(mixture, x, mask.experts(x), *weights)
        mask.choose(x, x.dtype)
      return official(x)
    finally:
      self.masks.pop()

  def _native(self, official, module, method, *args, **kwargs):
    """A mixture that the model has of its own."""
    if module.is_initializing():
      return official(*args, **kwargs)
    if method == _native.ROUTE:
      return _native.route(module, *args, *official(*args, **kwargs))
    if not _fused.unseen(_sites.RAGGED_WEIGHT):
      return official(*args, **kwargs)
    x, chosen, weight = args
    if self.offload is not None and self.send is None:
      chosen, weight = _native.taken(module, chosen, weight)
      path = '/'.join(module.path[self.depth :])
      return self.offload(module, path, x, chosen, weight)
    children = [getattr(module, name) for name in _native.WEIGHTS]
    both = [self._weight(each, each.weight_name) for each in children]
    return _native.run(module, both, x, chosen, weight, self.send)

  def _masked(self, mask: _moe.Mask, name, run, eqn, x):
    """An einsum of the mixture under way, with what is wrapped around it.

    An adapter reads what the einsum reads, and is part of what it returns.
    """
    self.masks.append(None)  # Once, not again within.
    try:
      y = run(eqn, x * mask.values if name == _moe.DOWN else x)
    finally:
      self.masks.pop()
    if mask.values is None:
      mask.choose(y[..., 0, :], y.dtype)
    return y

  def _experts_alone(self, module, mixture, x):
    """Packed weights of which only the chosen experts' are to be read."""
    weights = self._both(module)
    if weights is None or not _fused.experts_fit(mixture, x, *weights):
      return None
    return weights

  def _experts_sorted(self, module, mixture, x):
    """Dense weights of which every token needs less than half.

    Cutting them into experts takes as long as reading them a few times, so that
    many rows of x have to share it.
    """
    method = mixture.method
    if (
      method.router == 'expert_choice'
      or 2 * (method.top_k + method.shared) > method.slices
      or _fused.is_step(x)
      or module.is_initializing()
      or not isinstance(module, _fused.FEED_FORWARDS)
      or not _fused.unseen()
    ):
      return None
    names = _moe.GATE, _moe.DOWN
    if any(self._weight(module, name) is not None for name in names):
      return None
    return [module.get_variable('params', name) for name in names]

  def _neurons_alone(self, module, x):
    """The same where the gates choose; what is sown needs all logits."""
    if module.is_mutable_collection('intermediates'):
      return None
    weights = self._both(module)
    if weights is None or not _fused.neurons_fit(x, *weights):
      return None
    return weights

  def _both(self, module):
    """The weights of a feed-forward layer, if they are packed and may fuse."""
    if module.is_initializing() or not _fused.may_fuse():
      return None
    # Others, those of Gemma 3n, may do more than the kernels do.
    if not isinstance(module, _fused.FEED_FORWARDS):
      return None
    weights = [self._weight(module, name) for name in (_moe.GATE, _moe.DOWN)]
    return weights if _fused.are_packed(*weights) else None

  def _feed_forward(self, official, module, x):
    """A feed-forward layer, likewise."""
    weights = self._both(module)
    if weights is not None and _fused.feed_forward_fits(x, *weights):
      return _fused.feed_forward(x, *weights)
    return official(x)

  def _weight(self, module: nn.Module, name: str) -> Any:
    """The packed weight, or its parts; `None` if it is dense."""
    path = '/'.join(module.path[self.depth :] + (name,))
    if path not in self.methods:
      parts = [
        self.methods[place]
        for role in _sites.ROLES
        if (place := _sites.role_path(path, role)) in self.methods
      ]
      if parts:
        return _low_rank.param(module, name, parts=parts, dtype=self.dtype)
      bands: list[tuple[_sites.Layout, recipe_lib.Method]] = []
      while (band := _sites.band_path(path, len(bands))) in self.methods:
        site, method = self.methods[band]
        bands.append((site.layout, method))
      if not bands:
        return None
      return _packed.rows_param(
        module,
        name,
        bands=bands,
        ordered=site.ordered,
        centered=site.centered,
        dtype=self.dtype,
      )
    site, method = self.methods[path]
    return _packed.param(
      module, name, layout=site.layout, method=method, dtype=self.dtype
    )


def _einsum(
  module: nn.Module,
  weight: _packed.PackedWeight | _low_rank.PackedLowRank,
  eqn: str,
  x: jax.Array,
) -> jax.Array:
  """`__call__` of the official `Einsum` classes with a packed weight."""
  layout = _sites.einsum_layout(eqn, module.shape)
  if layout.shape != weight.layout.shape:
    raise errors.ShapeError(
      f'{"/".join(module.path)!r} was packed for {weight.layout}, but'
      f' {eqn!r} needs {layout}.'
    )
  y = weight.einsum(eqn, x)
  scale = getattr(module, 'w_scale', None)
  if scale is not None:
    y = y * jnp.asarray(scale, y.dtype)
  return y
