# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Logit distillation: the whole model against the dense one's distribution.

Instead of the teacher's logits its final hidden states are kept, a hundredth
of their size, and both models' logits are computed on a shortlist of the
vocabulary: the tokens that hold most of the teacher's probability on the
calibration text. The output head, half of the work of a small Gemma, then
costs a fraction of it.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import re
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import _patterns
from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.nn import _config
from gemma_ext.train import _branch
from gemma_ext.train import _calibration
from gemma_ext.train import _generate
from gemma_ext.train import _latents
from gemma_ext.train import _problem
from gemma_ext.train import _remat
from gemma_ext.train import _shared

# Positions whose distribution over the whole vocabulary is made at a time.
_POSITIONS = 256


def shortlist(
  table: jax.Array,
  calibration: _calibration.Calibration,
  *,
  size: int,
  windows: int = 16,
) -> tuple[np.ndarray, float]:
  """Chooses the tokens with most of the teacher's probability.

  Args:
    table: Output embeddings `[V, D]`.
    calibration: Holds the final hidden states.
    size: Number of tokens to choose.
    windows: Windows to look at.

  Returns:
    Token ids int32 `[size]`, in order, and their share of the probability.

  Raises:
    ConfigError: If `size` is below 2.
  """
  if size < 2:
    raise errors.ConfigError(f'A shortlist has at least 2 tokens, got {size}.')
  size = min(size, table.shape[0])
  final, mask = calibration.final, calibration.mask
  chosen = np.unique(np.linspace(0, len(final) - 1, windows).astype(int))
  hidden = np.asarray(final[chosen])[mask[chosen]]
  total = jnp.zeros(table.shape[0], jnp.float32)
  for i in range(0, len(hidden) - _POSITIONS + 1, _POSITIONS):
    total = total + _mass(table, jnp.asarray(hidden[i : i + _POSITIONS]))
  mass = np.asarray(total, np.float64)
  ids = np.sort(np.argsort(-mass, kind='stable')[:size]).astype(np.int32)
  return ids, float(mass[ids].sum() / max(mass.sum(), 1e-30))


@jax.jit
def _mass(table: jax.Array, hidden: jax.Array) -> jax.Array:
  logits = jnp.einsum('nd,vd->nv', hidden.astype(table.dtype), table)
  return jnp.sum(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), axis=0)


def kl(
  student: jax.Array,
  teacher: jax.Array,
  table: jax.Array,
  rest: jax.Array,
  weight: jax.Array | float,
  cap: float | None,
  own: jax.Array | None = None,
) -> jax.Array:
  """KL(teacher || student) over a shortlist and one bucket for the rest.

  The mass of the bucket is estimated from a sample of its tokens, so that a
  model which moves probability off the shortlist pays for it. Merging tokens
  never raises the divergence: but for the sample, this is a lower bound of the
  one over the whole vocabulary, and with nothing left out it is that.

  Args:
    student: Final hidden states `[N, D]`.
    teacher: The same of the dense model.
    table: Output embeddings of the shortlist, `[S, D]`.
    rest: Those of a uniform sample of the other tokens, `[R, D]`; R may be 0.
    weight: Tokens off the shortlist over R.
    cap: Soft cap of the final logits, if the model has one.
    own: The student's embeddings of both, `[S + R, D]`, where its table is
      compressed; those of the dense model by default.

  Returns:
    Nats, float32 `[N]`.
  """
  both = jnp.concatenate([table, rest])

  def log_p(hidden, both):
    logits = _generate.logits(hidden, both, cap)
    if len(rest):
      head, tail = logits[:, : len(table)], logits[:, len(table) :]
      bucket = jax.nn.logsumexp(tail, axis=-1) + jnp.log(weight)
      logits = jnp.concatenate([head, bucket[:, None]], axis=-1)
    return jax.nn.log_softmax(logits, axis=-1)

  p = log_p(teacher, both)
  q = log_p(student, both if own is None else own)
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def open_model(
  model: gx_nn.Compressed,
  params: Mapping[str, Any],
  *,
  form: str,
  dense: Mapping[str, Any] | None,
  integers: str = '',
  margin: float = _shared.MARGIN,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Splits a model's parameters into what moves and what does not.

  What moves: the codes and scales of all compressed feed-forward weights and of
  those that `integers` matches, and every norm. See `_latents.open_params`.
  """
  flat = _branch.flatten(params)
  moving: dict[str, jax.Array] = {}
  for layer in compressed_layers(model):
    branch = _branch.of_layer(model, layer)
    move, _ = _latents.open_params(
      branch,
      _branch.params_of(params, layer),
      form=form,
      dense=None if dense is None else _branch.params_of(dense, layer),
      margin=margin,
    )
    moving |= {f'{layer}/{path}': leaf for path, leaf in move.items()}
  flat_dense = None if dense is None else _branch.flatten(dense)
  for path, (site, method) in _integers(model, integers).items():
    cols = site.layout.cols
    fmt = gx_nn.format_of(method, cols)
    codes, scale = (flat[f'{path}/{name}'] for name in ('codes', 'scale'))
    w = None
    if flat_dense is not None and not site.role:
      w = site.layout.to_rows(flat_dense[path])
    moving[f'{path}/scale'] = jnp.array(fmt.open_scale(scale))
    moving[f'{path}/codes'] = _latents.latent(
      fmt.unpack(codes, cols), fmt.unpack_scale(scale), w, fmt
    )
  for path, leaf in flat.items():
    if path.split('/')[-2].endswith('norm'):
      moving[path] = jnp.array(leaf, jnp.float32)
  return moving, {k: v for k, v in flat.items() if k not in moving}


def close_model(
  model: gx_nn.Compressed,
  moving: Mapping[str, jax.Array],
  fixed: Mapping[str, jax.Array],
) -> dict[str, Any]:
  """Inverse of `open_model`: packed parameters as a checkpoint has them."""
  dtype = model.model.dtype
  flat = {
    k: v.astype(dtype) for k, v in moving.items() if not _is_packed(k)
  } | dict(fixed)
  for layer in compressed_layers(model):
    prefix = f'{layer}/'
    closed = _latents.close_params(
      _branch.of_layer(model, layer),
      _part(moving, prefix),
      _part(fixed, prefix),
      dtype=dtype,
    )
    flat |= {prefix + k: v for k, v in _branch.flatten(closed).items()}
  for path, (site, method) in _integers(model, '.*').items():
    if f'{path}/codes' in moving:
      fmt = gx_nn.format_of(method, site.layout.cols)
      flat[f'{path}/codes'] = _latents.pack(moving[f'{path}/codes'], fmt)
      flat[f'{path}/scale'] = fmt.pack_scale(moving[f'{path}/scale'])
  return _branch.unflatten(flat)


def _integers(
  model: gx_nn.Compressed, pattern: str
) -> dict[str, tuple[gx_nn.Site, recipe_lib.Int]]:
  """Weights outside of branches that are whole numbers and match."""
  methods = gx_nn.methods_of(model.model, model.recipe)

  def base_of(site, method):
    base = gx_nn.role_path(site.whole, gx_nn.BASE)
    return methods[base][1] if site.role else method

  return {
    path: (site, method)
    for path, (site, method) in methods.items()
    if pattern
    and '/mlp/' not in path
    and isinstance(method, recipe_lib.Int)
    and isinstance(base_of(site, method), recipe_lib.Int)
    # All parts of a weight, or none.
    and _patterns.matches(pattern, site.whole if site.role else path)
  }


def _part(tree: Mapping[str, jax.Array], prefix: str) -> dict[str, jax.Array]:
  """Leaves of the branch below a prefix, by what comes after it."""
  return {
    k.removeprefix(prefix): v
    for k, v in tree.items()
    if k.startswith(prefix)
    and k.removeprefix(prefix).split('/')[0] in _branch.PARTS
  }


@functools.partial(jax.jit, static_argnames='model')
def unpack(
  flat: Mapping[str, jax.Array], *, model: gx_nn.Compressed
) -> dict[str, jax.Array]:
  """Replaces packed and latent weights by dense ones; differentiable.

  Args:
    flat: Leaves by path; weights without codes, or whose scales are elsewhere,
      stay as they are.
    model: The compressed model.
  """
  out = dict(flat)
  methods = gx_nn.methods_of(model.model, model.recipe)
  bands: dict[str, list[jax.Array]] = {}
  corrected: dict[str, list[tuple[gx_nn.Site, jax.Array]]] = {}
  for path, (site, method) in methods.items():
    if f'{path}/codes' not in out or f'{path}/scale' not in out:
      continue
    codes, scale = out.pop(f'{path}/codes'), out.pop(f'{path}/scale')
    if codes.dtype == jnp.int8 and '/mlp/' in path:
      codes = codes.astype(jnp.float32)
    fmt = gx_nn.format_of(method, site.layout.cols)
    rows = kernels.dequantize(
      {'codes': _latents.codes_of(codes, scale, fmt), 'scale': scale},
      fmt,
      site.layout.cols,
      dtype=model.model.dtype,
    )
    dense = site.layout.from_rows(rows)
    if site.role:
      corrected.setdefault(site.whole, []).append((site, dense))
    elif site.rows is None:
      out[path] = dense
    else:
      bands.setdefault(site.whole, []).append(dense)
  for path, each in corrected.items():
    sum_of = gx_nn.add_low_rank(each[0][0].layout, *(x for _, x in each))
    out[path] = sum_of.astype(model.model.dtype)
  for path, parts in bands.items():
    table = jnp.concatenate(parts)
    rank = out.pop(gx_nn.rank_path(path), None)
    table = table if rank is None else table[rank]
    mean = out.pop(gx_nn.mean_path(path), None)
    if mean is not None:
      table = (table.astype(jnp.float32) + mean).astype(table.dtype)
    out[path] = table
  return out


def problem(
  model: gx_nn.Compressed, *, remat: bool = False
) -> _problem.Problem:
  """Makes the problem of the whole model.

  Batches are dicts of 'tokens' `[B, L]`, 'teacher' `[B, L, D]`, the 'table',
  'rest' and 'weight' of `kl`, its 'own' if the table is compressed, and
  'fixed': the leaves that do not move, by path, unpacked. The dense model is
  what runs, on weights that are unpacked once a step, in place of the packed
  one that unpacks them again for the backward pass.

  Args:
    model: The compressed model.
    remat: Whether blocks are computed again in the backward pass.
  """
  dense = _config.strip(model.model)
  scope: Any = contextlib.nullcontext
  routed = _routed(model)
  if remat:
    dense, scope = _remat.stamped(dense), _remat.rematerialized
  if routed is not None:
    # The recipe goes into the config, too: the stamp has to come after it.
    dense = gx_nn.Compressed(model=dense, recipe=routed)
    if remat:
      dense = dense.clone(model=_remat.stamped(dense.model))
  cap = model.model.config.final_logit_softcap
  dtype = model.model.dtype

  def loss(moving: _problem.Params, batch: Any) -> jax.Array:
    flat = {
      path: leaf if _is_packed(path) else leaf.astype(dtype)
      for path, leaf in moving.items()
    }
    flat = unpack(dict(batch['fixed']) | flat, model=model)
    with scope():
      out = dense.apply(
        {'params': _branch.unflatten(flat)},
        batch['tokens'],
        return_hidden_states=True,
      )
    width = out.hidden_states.shape[-1]
    mask = (batch['tokens'] != 0).reshape(-1)
    nats = kl(
      out.hidden_states.reshape(-1, width),
      batch['teacher'].reshape(-1, width),
      batch['table'],
      batch['rest'],
      batch['weight'],
      cap,
      batch.get('own'),
    )
    return jnp.sum(jnp.where(mask, nats, 0)) / jnp.maximum(jnp.sum(mask), 1)

  return _problem.Problem(loss=loss)


def _routed(model: gx_nn.Compressed) -> recipe_lib.Recipe | None:
  """The recipe of the model's mixtures alone, their weights dense."""
  mixtures = gx_nn.mixtures_of(model.model, model.recipe)
  if not mixtures:
    return None
  return recipe_lib.Recipe(
    rules=tuple(
      (
        re.escape(path),
        dataclasses.replace(mixture.method, weights=recipe_lib.Keep()),
      )
      for path, mixture in mixtures.items()
    )
  )


@functools.lru_cache(maxsize=8)
def compressed_layers(model: nn.Module) -> tuple[str, ...]:
  """Names of the layers whose feed-forward part is compressed, in order.

  Their weights are, or they are mixtures of experts.
  """
  found = {
    path.split('/')[0]
    for path in gx_nn.methods_of(model.model, model.recipe)
    if '/mlp/' in path
  } | {
    path.split('/')[0]
    for path in gx_nn.mixtures_of(model.model, model.recipe)
    if path.endswith('/mlp')
  }
  return tuple(sorted(found, key=lambda name: int(name.split('_')[1])))


def _is_packed(path: str) -> bool:
  """Whether a moving leaf belongs to a packed weight."""
  parts = path.split('/')
  return parts[-1] == 'codes' or (
    parts[-1] == 'scale' and not parts[-2].endswith('norm')
  )
