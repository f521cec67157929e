# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Where each canonical tensor lies inside the parameter tree of a model.

The mixture of experts of gemma 4.0.1 routes on the output of `pre_ffw_norm`;
Hugging Face and llama.cpp route on its input with the same weights. Tensors
go where their names say; what is computed from them is the official class's.
"""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any, Protocol

from flax import linen as nn
import jax
import numpy as np

from gemma_ext import errors
from gemma_ext.ckpts import _model_classes


class _Has(Protocol):
  def has(self, name: str) -> bool:
    """Whether the checkpoint holds the tensor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """One tensor of the checkpoint, and the views of a leaf that it fills.

  Attributes:
    name: Canonical name.
    shape: Shape that the model needs it to have.
    views: From the leaf's array to pairs of first row and the view that rows
      from there on fill, in order.
  """

  name: str
  shape: tuple[int, ...]
  views: Callable[[np.ndarray], Iterator[tuple[int, np.ndarray]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
  """One parameter of the model and the tensors that fill it.

  Attributes:
    path: Keys from the root of the tree.
    shape: Its shape.
    parts: The tensors, together covering it; none if it has a `fill`.
    is_norm: Whether it is an RMSNorm scale.
    fill: Value for a parameter that the model never uses.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  parts: tuple[Part, ...]
  is_norm: bool = False
  fill: float | None = None


_NORMS = {
  'pre_attention_norm': 'pre_attn_norm',
  'post_attention_norm': 'post_attn_norm',
  'pre_ffw_norm': 'pre_ffw_norm',
  'post_ffw_norm': 'post_ffw_norm',
  'pre_ffw2_norm': 'dense_pre_norm',
  'post_ffw2_norm': 'dense_post_norm',
  'post_ffw1_norm': 'moe_post_norm',
  'post_per_layer_input_norm': 'per_layer_norm',
  'attn/query_norm': 'q_norm',
  'attn/key_norm': 'k_norm',
  'attn/_query_norm': 'q_norm',
  'attn/_key_norm': 'k_norm',
}
_TRANSPOSED = {
  'per_layer_input_gate/w': 'per_layer_gate',
  'per_layer_projection/w': 'per_layer_out',
  'mlp/router_logits/w': 'router',
  'mlp/linear': 'down',
  'mlp2/linear': 'down',
}
_VECTORS = {
  'skip_scale': 'skip_scale',
  'mlp/per_expert_scale': 'expert_scale',
  'mlp/router_scale': 'router_scale',
}


def leaves_of(
  model: nn.Module, params: dict[str, Any], source: _Has
) -> list[Leaf]:
  """Returns a `Leaf` for every parameter of `model`.

  Args:
    model: A text-only model of Gemma 2, 3 or 4.
    params: Its parameter tree, of arrays or shapes.
    source: Asked only which of two possible layouts the checkpoint has.

  Raises:
    UnsupportedTypeError: If the model has parameters of another family.
  """
  family = _model_classes.family_of(model).name
  if family == 'gemma3n':
    raise errors.UnsupportedTypeError(
      'Gemma 3n is read from official checkpoints only; use'
      ' gm.ckpts.CheckpointPath.'
    )
  shared = _kv_shared_layers(model) if family == 'gemma4' else frozenset()
  leaves = []
  for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    path = tuple(k.key for k in keys)
    leaves.append(_leaf(model, path, tuple(leaf.shape), source, shared))
  return leaves


def _kv_shared_layers(model: nn.Module) -> frozenset[str]:
  """Layers that reuse the keys and values of an earlier layer."""
  config = model.config
  pattern = _model_classes.gemma4_config.create_kv_cache_sharing_patterns(
    config.kv_cache_sharing_config, config.num_layers, config.attention_types
  )
  return frozenset(f'layer_{i}' for i, p in enumerate(pattern) if p != i)


def _leaf(
  model: nn.Module,
  path: tuple[str, ...],
  shape: tuple[int, ...],
  source: _Has,
  shared: frozenset[str],
) -> Leaf:
  name = '/'.join(path)
  if name == 'final_norm/scale':
    part = _rows('final_norm', shape)
    return Leaf(path=path, shape=shape, parts=(part,), is_norm=True)
  if path[0] == 'embedder':
    return _embedder_leaf(path, shape)
  layer, rest = path[0], '/'.join(path[1:])
  if not layer.startswith('layer_'):
    raise _unknown(model, name)
  at = lambda n: f'{layer}/{n}'
  if path[-1] == 'scale' and rest.removesuffix('/scale') in _NORMS:
    canonical = at(_NORMS[rest.removesuffix('/scale')])
    if rest == 'attn/key_norm/scale' and layer in shared:
      if not source.has(canonical):
        return Leaf(path=path, shape=shape, parts=(), is_norm=True, fill=1.0)
    part = _rows(canonical, shape)
    return Leaf(path=path, shape=shape, parts=(part,), is_norm=True)
  if rest in _VECTORS:
    return Leaf(
      path=path, shape=shape, parts=(_rows(at(_VECTORS[rest]), shape),)
    )
  if rest in _TRANSPOSED:
    part = _transposed(at(_TRANSPOSED[rest]), shape)
    return Leaf(path=path, shape=shape, parts=(part,))
  if rest.startswith('attn/'):
    parts = _attention_parts(model, rest, shape, at)
    if layer in shared and rest == 'attn/kv_einsum/w':
      if not any(source.has(p.name) for p in parts):
        return Leaf(path=path, shape=shape, parts=(), fill=0.0)
    if layer in shared and rest == 'attn/k_einsum/w':
      if not source.has(parts[0].name):
        return Leaf(path=path, shape=shape, parts=(), fill=0.0)
    return Leaf(path=path, shape=shape, parts=parts)
  parts = _ffw_parts(model, rest, shape, at, source)
  return Leaf(path=path, shape=shape, parts=parts)


def _unknown(model: nn.Module, name: str) -> errors.UnsupportedTypeError:
  return errors.UnsupportedTypeError(
    f'{type(model).__name__} has a parameter {name} that is not known here;'
    ' expected a text-only Gemma 2, 3 or 4 of gemma 4.0.1.'
  )


def _embedder_leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> Leaf:
  rest = '/'.join(path[1:])
  if rest == 'input_embedding':
    part = _rows('embed', shape)
  elif rest == 'per_layer_embeddings':
    rows, layers, width = shape
    part = Part(
      name='per_layer_embed',
      shape=(rows, layers * width),
      views=lambda leaf: iter([(0, leaf)]),
    )
  elif rest == 'per_layer_model_projection/w':
    embed, layers, width = shape
    part = Part(
      name='per_layer_projection',
      shape=(layers * width, embed),
      views=lambda leaf: iter([(0, leaf.reshape(embed, -1).T)]),
    )
  elif rest == 'per_layer_projection_norm/scale':
    part = _rows('per_layer_projection_norm', shape)
    return Leaf(path=path, shape=shape, parts=(part,), is_norm=True)
  else:
    raise errors.UnsupportedTypeError(
      f'The model has a parameter embedder/{rest}, which belongs to a media'
      ' encoder; expected a text-only model (text_only=True).'
    )
  return Leaf(path=path, shape=shape, parts=(part,))


def _attention_parts(
  model: nn.Module,
  rest: str,
  shape: tuple[int, ...],
  at: Callable[[str], str],
) -> tuple[Part, ...]:
  match rest:
    case 'attn/attn_vec_einsum/w':
      heads, width, embed = shape
      return (
        Part(
          name=at('o'),
          shape=(embed, heads * width),
          views=lambda leaf: iter([(0, leaf.reshape(-1, embed).T)]),
        ),
      )
    case 'attn/q_einsum/w':
      return (_heads(at('q'), shape, lambda leaf: leaf),)
    case 'attn/k_einsum/w':
      return (_heads(at('k'), shape, lambda leaf: leaf),)
    case 'attn/kv_einsum/w':
      return tuple(
        _heads(at(n), shape[1:], _index(i)) for i, n in enumerate('kv')
      )
    case 'attn/qkv_einsum/w':
      return tuple(
        _heads(at(n), shape[1:], _index(i)) for i, n in enumerate('qkv')
      )
  raise _unknown(model, rest)


def _ffw_parts(
  model: nn.Module,
  rest: str,
  shape: tuple[int, ...],
  at: Callable[[str], str],
  source: _Has,
) -> tuple[Part, ...]:
  match rest:
    case 'mlp/gating_einsum' | 'mlp2/gating_einsum':
      if getattr(model.config, 'transpose_gating_einsum', True):
        return tuple(
          _rows(at(n), shape[1:], _index(i))
          for i, n in enumerate(('gate', 'up'))
        )
      return tuple(
        _transposed(at(n), shape[1:], _index(i))
        for i, n in enumerate(('gate', 'up'))
      )
    case 'mlp/gating_einsum/w':
      experts, _, hidden, embed = shape
      if source.has(at('experts_gate_up')):
        return (
          Part(
            name=at('experts_gate_up'),
            shape=(experts, 2 * hidden, embed),
            views=lambda leaf: iter([(0, leaf)]),
          ),
        )
      return tuple(
        Part(
          name=at(n),
          shape=(experts, hidden, embed),
          views=_expert_views(i),
        )
        for i, n in enumerate(('experts_gate', 'experts_up'))
      )
    case 'mlp/linear/w':
      experts, hidden, embed = shape
      return (
        Part(
          name=at('experts_down'),
          shape=(experts, embed, hidden),
          views=lambda leaf: iter([(0, leaf.transpose(0, 2, 1))]),
        ),
      )
  raise _unknown(model, rest)


def _index(i: int) -> Callable[[np.ndarray], np.ndarray]:
  return lambda leaf: leaf[i]


def _expert_views(
  i: int,
) -> Callable[[np.ndarray], Iterator[tuple[int, np.ndarray]]]:
  return lambda leaf: iter([(0, leaf[:, i])])


def _same(leaf: np.ndarray) -> np.ndarray:
  return leaf


def _rows(
  name: str,
  shape: tuple[int, ...],
  of: Callable[[np.ndarray], np.ndarray] = _same,
) -> Part:
  """A tensor stored as the model holds it."""
  return Part(name=name, shape=shape, views=lambda leaf: iter([(0, of(leaf))]))


def _transposed(
  name: str,
  shape: tuple[int, ...],
  of: Callable[[np.ndarray], np.ndarray] = _same,
) -> Part:
  """A tensor stored [out, in] that the model holds as [in, out]."""
  return Part(
    name=name,
    shape=shape[::-1],
    views=lambda leaf: iter([(0, of(leaf).T)]),
  )


def _heads(
  name: str,
  shape: tuple[int, ...],
  of: Callable[[np.ndarray], np.ndarray],
) -> Part:
  """A tensor [heads * width, embed], held as [heads, embed, width]."""
  heads, embed, width = shape

  def views(leaf: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for head in range(heads):
      yield head * width, of(leaf)[head].T

  return Part(name=name, shape=(heads * width, embed), views=views)
