# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Error compensation: what a group loses is pushed to later groups."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from gemma_ext import errors
from gemma_ext import kernels
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _fit_int
from gemma_ext.compress import _fit_ternary
from gemma_ext.compress import _groups
from gemma_ext.compress import _planes
from gemma_ext.compress import _registry

# Numbers that a refit of scales holds at a time: 64 MiB of float32.
_REFIT = 1 << 24
# Times that whole numbers are rounded anew: three take nine tenths of what
# there is to be had.
_SWEEPS = 3
# Columns that are rounded before the others hear of it.
_BLOCK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factored:
  """A Hessian with its factor, for several fits.

  Attributes:
    hessian: Second moments of the inputs, `[I, I]`.
    upper: Upper Cholesky factor of its damped inverse.
    damping: Share of the mean diagonal that was added to it.
  """

  hessian: jax.Array
  upper: jax.Array
  damping: float

  @classmethod
  def of(cls, hessian: Any, damping: float = 0.01) -> Factored:
    """Factors a Hessian.

    Args:
      hessian: Second moments of the inputs, `[I, I]`.
      damping: Share of the mean diagonal that is added to it.

    Raises:
      NonFiniteError: If it is not finite.
    """
    hessian = jnp.asarray(hessian)
    if not bool(jnp.all(jnp.isfinite(hessian))):
      raise errors.NonFiniteError('The hessian holds NaN or infinity.')
    upper = jnp.asarray(_factor(hessian, damping))
    return cls(hessian=hessian, upper=upper, damping=damping)

  @functools.cached_property
  def order(self) -> jax.Array:
    """Columns, those with the largest second moments first, int32 `[I]`."""
    return jnp.argsort(-jnp.diagonal(self.hessian), stable=True)

  @functools.cached_property
  def upper_in_order(self) -> jax.Array:
    """As `upper`, of the columns in `order`; only integers ask for it."""
    hessian = self.hessian[self.order][:, self.order]
    return jnp.asarray(_factor(hessian, self.damping))


def compensate(
  w: jax.Array,
  *,
  method: recipe_lib.Ternary | recipe_lib.Int,
  fmt: Any,
  hessian: jax.Array | Factored,
  damping: float = 0.01,
  activation_order: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Fits `w` column by column; no row ends worse than its diagonal fit.

  Scales of a group are fitted to the weights as compensation has left them;
  its columns are then rounded one after the other, each one's error moved to
  the columns that are still to come. Integers are rounded with the same scales
  in activation order as well: columns with large inputs first, while there are
  many others to make up for them. Both are then rounded again, each number
  where it is best given all others, as columns that came first had not seen
  what became of the later ones; rows keep what is better.

  Args:
    w: Weights `[N, I]`.
    method: `Ternary` with a free density, or `Int`.
    fmt: Its packed format, with a group that divides I.
    hessian: Second moments of the inputs, `[I, I]`, factored or not.
    damping: Share of the mean diagonal that is added to it, if not.
    activation_order: Whether integers are tried in that order as well.

  Returns:
    Codes and scales as `fit_ternary` and `fit_int` return them.

  Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for
  Generative Pre-trained Transformers", arXiv 2210.17323; Behdin et al.,
  "QuantEase: Optimization-based Quantization for Language Models", arXiv
  2309.01885, for the coordinate descent.

  Raises:
    ShapeError: If `hessian` is not [I, I].
    NonFiniteError: If an input is not finite.
    RecipeError: If the method fixes a density or pattern.
  """
  cols = w.shape[-1]
  group = fmt.group or cols  # One scale a row is one group.
  given = hessian.hessian if isinstance(hessian, Factored) else hessian
  if given.shape != (cols, cols):
    raise errors.ShapeError(
      f'Got hessian {given.shape}; expected {(cols, cols)}.'
    )
  ternary = isinstance(method, recipe_lib.Ternary)
  if not is_free(method):
    raise errors.RecipeError(f'{method!r} fixes a density; expected free.')
  diag = jnp.diagonal(given)
  _groups.check(w, group, diag)
  factored = (
    hessian if isinstance(hessian, Factored) else Factored.of(hessian, damping)
  )
  hessian, upper = factored.hessian, factored.upper
  w = w.reshape(-1, cols).astype(jnp.float32)
  fit = _registry.fit_of(method)
  base_codes, base_scale = fit(w, method, fmt, diag)
  best: tuple[jax.Array, ...] = (
    base_codes if ternary else base_codes[None],
    base_scale if ternary else base_scale[None],
  )
  codes, scale = _compensated(w, upper, method=method, group=group)
  tries = [(codes, scale)]
  # Scales of one byte are too far from each other to be moved alone.
  if method.scale == 'bf16' and not getattr(method, 'tied', False):
    scale = _refit_rows(w, codes, scale, hessian)
    tries.append((codes, scale))
  if isinstance(method, recipe_lib.Int):
    starts = [codes[0]]
    if activation_order:
      starts.append(
        _in_order(
          w,
          scale[0],
          factored.upper_in_order,
          factored.order,
          bits=method.bits,
        )
      )
    for found in starts:
      for _ in range(_SWEEPS):
        found = _descend(w, found, scale[0], hessian, bits=method.bits)
      tries.append((found[None], scale))
  for found in tries:
    won = _error(w, *found, hessian) < _error(w, *best, hessian)
    won = won[:, None]
    best = tuple(jnp.where(won, n, o) for n, o in zip(found, best, strict=True))
  c, s = best
  return (c, s) if ternary else (c[0], s[0])


def is_free(method: recipe_lib.Method) -> bool:
  """Whether a method leaves its codes free, as `compensate` wants it."""
  if isinstance(method, recipe_lib.Ternary):
    return method.density is None and method.pattern is None
  return isinstance(method, recipe_lib.Int)


def _factor(hessian: jax.Array, damping: float) -> np.ndarray:
  """Upper Cholesky factor of the damped inverse, made in float64."""
  h = np.asarray(hessian, np.float64)
  h = (h + h.T) / 2
  # Inputs that never fired, and directions that none took, stay solvable.
  ridge = damping * np.mean(np.diag(h)) + 1e-12
  inverse = scipy.linalg.cho_solve(
    scipy.linalg.cho_factor(h + ridge * np.eye(len(h))), np.eye(len(h))
  )
  return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)


def _refit_rows(w, codes, scale, hessian):
  """`_refit`, some rows at a time, so that memory stays bounded."""
  planes, rows, cols = codes.shape
  step = max(1, _REFIT // (planes * scale.shape[-1] * cols))
  parts = [
    _refit(
      w[i : i + step], codes[:, i : i + step], scale[:, i : i + step], hessian
    )
    for i in range(0, rows, step)
  ]
  return jnp.concatenate(parts, axis=1)


@jax.jit
def _refit(w, codes, scale, hessian):
  """Scales of least squares under the whole Hessian, given codes: [P, N, G]."""
  planes, rows, cols = codes.shape
  groups = scale.shape[-1]
  size = cols // groups
  # One basis vector for each plane and group: its codes, zero elsewhere.
  split = codes.astype(jnp.float32).reshape(planes, rows, groups, size)
  split = jnp.moveaxis(split, 1, 0)  # [N, P, G, size]
  h = hessian.reshape(groups, size, cols)
  # Basis vector (p, g) times H: [N, P, G, cols]
  through = jnp.einsum('npgs,gsc->npgc', split, h)
  per_group = through.reshape(rows, planes, groups, groups, size)
  a = jnp.einsum('npgks,nqks->npgqk', per_group, split)
  count = planes * groups
  a = a.reshape(rows, count, count)
  d = w - jnp.einsum('npgs,png->ngs', split, scale.astype(jnp.float32)).reshape(
    rows, cols
  )
  b = jnp.einsum('npgc,nc->npg', through, d).reshape(rows, count)
  ridge = 1e-4 * jnp.trace(a, axis1=1, axis2=2) / count + 1e-20
  a = a + ridge[:, None, None] * jnp.eye(count)
  step = jnp.linalg.solve(a, b[..., None])[..., 0]
  step = step.reshape(rows, planes, groups)
  found = scale.astype(jnp.float32) + jnp.moveaxis(step, 0, 1)
  return kernels.round_scale(found, 'bf16').astype(scale.dtype)


@functools.partial(jax.jit, static_argnames='bits')
def _in_order(w, scale, upper, order, *, bits):
  """Columns in this order, whatever their group, with scales as they are."""
  rows, cols = w.shape
  wide = jnp.repeat(scale.astype(jnp.float32), cols // scale.shape[-1], axis=-1)
  size = math.gcd(cols, _BLOCK)
  w, wide = w[:, order], wide[:, order]

  def body(rest, a):
    part = jax.lax.dynamic_slice(rest, (0, a), (rows, size))
    s = jax.lax.dynamic_slice(wide, (0, a), (rows, size))
    beyond = jax.lax.dynamic_slice(upper, (a, 0), (size, cols))
    u = jax.lax.dynamic_slice(beyond, (0, a), (size, size))

    def column(part, i):
      q = _fit_int.round_codes(part[:, i][:, None], s[:, i], bits)[:, 0]
      err = (part[:, i] - q * s[:, i]) / u[i, i]
      return part - err[:, None] * u[i], (q.astype(jnp.int8), err)

    _, (q, err) = jax.lax.scan(column, part, jnp.arange(size))
    return rest - err.T @ beyond, q

  _, codes = jax.lax.scan(body, w, jnp.arange(0, cols, size))
  codes = codes.reshape(cols, rows).T
  return jnp.zeros_like(codes).at[:, order].set(codes)


@functools.partial(jax.jit, static_argnames='bits')
def _descend(w, codes, scale, hessian, *, bits):
  """Rounds every column anew, given all others: codes int8 [N, I]."""
  rows, cols = w.shape
  groups = scale.shape[-1]
  size = cols // groups
  ridge = 1e-4 * jnp.mean(jnp.diagonal(hessian)) + 1e-20
  hessian = hessian + ridge * jnp.eye(cols)
  scale, codes = scale.astype(jnp.float32), codes.astype(jnp.float32)
  pull = (w - codes * jnp.repeat(scale, size, axis=-1)) @ hessian
  half = float(1 << (bits - 1))

  def body(pull, k):
    a = k * size
    beyond = jax.lax.dynamic_slice(hessian, (a, 0), (size, cols))
    h = jax.lax.dynamic_slice(beyond, (0, a), (size, size))
    old = jax.lax.dynamic_slice(codes, (0, a), (rows, size))
    s = jax.lax.dynamic_slice(scale, (0, k), (rows, 1))[:, 0]
    inverse = jnp.where(s == 0, 0.0, 1 / jnp.where(s == 0, 1.0, s))

    def column(own, i):
      best = old[:, i] + own[:, i] / h[i, i] * inverse
      new = jnp.clip(jnp.round(best), -half, half - 1)
      moved = (old[:, i] - new) * s
      return own + moved[:, None] * h[i], (new, moved)

    own = jax.lax.dynamic_slice(pull, (0, a), (rows, size))
    _, (new, moved) = jax.lax.scan(column, own, jnp.arange(size))
    return pull + moved.T @ beyond, new.T.astype(jnp.int8)

  _, found = jax.lax.scan(body, pull, jnp.arange(groups))
  return jnp.moveaxis(found, 0, 1).reshape(rows, cols)


@functools.partial(jax.jit, static_argnames=('method', 'group'))
def _compensated(w, upper, *, method, group):
  """Codes [P, N, I] and scales [P, N, I / group], group after group."""
  rows, cols = w.shape
  bits = method.bits if isinstance(method, recipe_lib.Int) else None

  def body(rest, a):
    part = jax.lax.dynamic_slice(rest, (0, a), (rows, group))
    beyond = jax.lax.dynamic_slice(upper, (a, 0), (group, cols))
    u = jax.lax.dynamic_slice(beyond, (0, a), (group, group))
    h = jnp.broadcast_to(1 / jnp.diagonal(u) ** 2, part.shape)
    if bits is None:
      _, s = _fit_ternary.fit_chunk(
        part,
        h,
        planes=method.planes,
        keep=None,
        kind=method.scale,
        tied=method.tied,
        iterations=_fit_ternary.ITERATIONS,
      )
    else:
      s = _fit_int.fit_chunk(part, h, bits=bits, kind=method.scale)[1]
      s = s[None]
    c, err = _columns(part, s.astype(jnp.float32), u, bits)
    # Of the group and those before it nothing is read any more.
    return rest - err @ beyond, (c, s)

  _, (codes, scales) = jax.lax.scan(body, w, jnp.arange(0, cols, group))
  codes = jnp.moveaxis(codes, 0, 2).reshape(codes.shape[1], rows, cols)
  return codes, jnp.moveaxis(scales, 0, -1)


def _columns(w, scale, u, bits):
  """Codes [P, N, group] and scaled errors [N, group] of one group."""

  def body(w, i):
    x = w[:, i]
    if bits is None:
      q = _planes.nearest(x[:, None], scale)[..., 0]
    else:
      q = _fit_int.round_codes(x[:, None], scale[0], bits)[:, 0][None]
    err = (x - jnp.sum(q * scale, axis=0)) / u[i, i]
    return w - err[:, None] * u[i], (q.astype(jnp.int8), err)

  _, (q, err) = jax.lax.scan(body, w, jnp.arange(w.shape[1]))
  return jnp.moveaxis(q, 0, -1), err.T


@jax.jit
def _error(w, codes, scale, hessian):
  """Row by row (w - q) H (w - q)^T, [N]."""
  s = jnp.repeat(scale.astype(jnp.float32), w.shape[1] // scale.shape[-1], -1)
  d = w - jnp.sum(codes * s, axis=0)
  return jnp.sum((d @ hessian) * d, axis=-1)
