# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What all fits share: checks, working group by group, the error measure."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import errors

# Weights in a chunk: 4 MiB of float32, so that the passes of a fit stay in
# cache and a table of any size takes bounded memory.
CHUNK = 1 << 20

# (w[N, group], h[N, group] or None) -> codes[*P, N, group], scale[*P, N]
FitChunk = Callable[[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]


def check(
  w: jax.Array, group: int, curvature: jax.Array | None
) -> jax.Array | None:
  """Checks a fit's inputs before any slow step.

  Args:
    w: Weights `[..., I]`.
    group: Weights that share one scale.
    curvature: `[I]`, or anything that broadcasts to `w`, or `None`.

  Returns:
    Curvature as float32, or `None`.

  Raises:
    ShapeError: If `w` is not floating, empty, or the curvature does not fit.
    GroupSizeError: If `group` does not divide I.
    NonFiniteError: If anything is NaN, infinite, or a curvature is negative.
  """
  if w.ndim < 1 or not w.size or not jnp.issubdtype(w.dtype, jnp.floating):
    raise errors.ShapeError(
      f'Got weights {w.dtype}{list(w.shape)}; expected floating [..., I],'
      ' not empty.'
    )
  if group < 1 or w.shape[-1] % group:
    raise errors.GroupSizeError(
      f'{group=} does not divide the input axis of {w.shape[-1]} weights;'
      ' `gemma_ext.kernels.choose_group` finds one that does.'
    )
  if not bool(_all_finite(w)):
    raise errors.NonFiniteError(
      f'Weights {list(w.shape)} hold NaN or infinity; nothing fits those.'
      ' Repair or re-download the checkpoint.'
    )
  if curvature is None:
    return None
  curvature = jnp.asarray(curvature, jnp.float32)
  if (
    curvature.ndim < 1
    or curvature.shape[-1] != w.shape[-1]
    or curvature.ndim > w.ndim
    or any(
      c not in (1, n)
      for c, n in zip(curvature.shape[::-1], w.shape[::-1], strict=False)
    )
  ):
    raise errors.ShapeError(
      f'Got curvature {list(curvature.shape)} for weights {list(w.shape)};'
      f' expected [{w.shape[-1]}] or a shape that broadcasts to the weights.'
    )
  if not bool(_all_finite(curvature)) or bool(jnp.any(curvature < 0)):
    raise errors.NonFiniteError(
      'The curvature holds NaN, infinity or negative values; expected'
      ' finite values >= 0, such as mean squares of a layer input.'
    )
  return curvature


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
  return jnp.all(jnp.isfinite(x))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _slice(w: jax.Array, start: jax.Array, size: int, group: int) -> jax.Array:
  """Groups `start` to `start + size` of w: float32 [size, group]."""
  out = jax.lax.dynamic_slice_in_dim(w.reshape(-1, group), start, size)
  return out.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _cycle(h: jax.Array, start: jax.Array, size: int, group: int) -> jax.Array:
  """The same of a curvature [I], which repeats for every row of w."""
  h = h.reshape(-1, group)
  return h[(start + jnp.arange(size)) % h.shape[0]]


def fit_chunks(
  fit: FitChunk,
  w: jax.Array,
  group: int,
  curvature: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Applies `fit` to all groups of `w`, a bounded number at a time.

  Args:
    fit: Fits a chunk of groups; jitted.
    w: Weights `[..., I]`, checked.
    group: Weights that share one scale.
    curvature: As `check` returned it.

  Returns:
    int8 codes `[*P, ..., I]` and scales `[*P, ..., I / group]`, as fitted.
  """
  w = jnp.asarray(w)
  count = w.size // group
  size = min(count, max(1, CHUNK // group))
  row = None
  if curvature is not None:
    if curvature.size == w.shape[-1]:
      row = curvature.reshape(-1)
    else:
      curvature = jnp.broadcast_to(curvature, w.shape)
  codes, scales = [], []
  for begin in range(0, count, size):
    # The last chunk overlaps the one before, so that one shape is compiled.
    start = min(begin, count - size)
    chunk = _slice(w, start, size, group)
    h = None
    if row is not None:
      h = _cycle(row, start, size, group)
    elif curvature is not None:
      h = _slice(curvature, start, size, group)
    c, s = fit(chunk, h)
    codes.append(c[..., begin - start :, :])
    scales.append(s[..., begin - start :])
  c = codes[0] if len(codes) == 1 else jnp.concatenate(codes, axis=-2)
  s = scales[0] if len(scales) == 1 else jnp.concatenate(scales, axis=-1)
  lead = c.shape[:-2]
  return (
    c.astype(jnp.int8).reshape(*lead, *w.shape),
    s.reshape(*lead, *w.shape[:-1], w.shape[-1] // group),
  )


def relative_error(
  w: jax.Array,
  codes: jax.Array,
  scale: jax.Array,
  curvature: jax.Array | None = None,
) -> float:
  """Returns the squared error of a fit over the squared norm of the weights.

  Args:
    w: Weights `[..., I]`.
    codes: What was fitted: `[..., I]`, or `[planes, ..., I]`.
    scale: `[..., groups]`, or `[planes, ..., groups]`.
    curvature: Weights of the squares, broadcasting to `w`; `None` for ones.

  Returns:
    `sum h (w - scale codes)^2 / sum h w^2`; 0 where both are 0.
  """
  w = jnp.asarray(w)
  planes = codes.ndim > w.ndim
  lead = (codes.shape[0],) if planes else (1,)
  cols = w.shape[-1]
  codes = codes.reshape(*lead, -1, cols)
  scale = scale.reshape(*lead, -1, scale.shape[-1])
  if curvature is None:
    h = jnp.ones((1, cols), jnp.float32)
  else:
    h = jnp.asarray(curvature, jnp.float32)
    if h.size != cols:
      h = jnp.broadcast_to(h, w.shape)
    h = h.reshape(-1, cols)
  w = w.reshape(-1, cols)
  step = max(1, 16 * CHUNK // cols)
  bad, norm = 0.0, 0.0
  for i in range(0, w.shape[0], step):
    part = slice(i, i + step)
    hs = h if h.shape[0] == 1 else h[part]
    a, b = _squares(w[part], codes[:, part], scale[:, part], hs)
    bad += float(np.sum(np.asarray(a, np.float64)))
    norm += float(np.sum(np.asarray(b, np.float64)))
  return bad / norm if norm else bad


@jax.jit
def _squares(w, codes, scale, h):
  """Per row: weighted squared error and squared norm."""
  groups = scale.shape[-1]
  fit = codes.reshape(*codes.shape[:2], groups, -1).astype(jnp.float32)
  fit = jnp.sum(fit * scale.astype(jnp.float32)[..., None], axis=0)
  w = w.astype(jnp.float32)
  diff = w - fit.reshape(w.shape)
  return jnp.sum(h * diff**2, axis=-1), jnp.sum(h * w**2, axis=-1)
