# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Searches behind `fit_ternary`: arrays [N, group], or [P, N, group].

`h` is the curvature or `None` for ones; `kind` says how scales are stored, and
scales are float32 of such values. Every search returns codes (as float32 whole
numbers) and scales.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemma_ext import kernels

Fit = tuple[jax.Array, jax.Array]


def _sum(x: jax.Array, h: jax.Array | None) -> jax.Array:
  return jnp.sum(x if h is None else h * x, axis=-1)


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns a / b, 0 where b is 0."""
  return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)


def _sign(w: jax.Array) -> jax.Array:
  return jnp.where(w < 0, -1.0, 1.0)


def error(
  w: jax.Array, h: jax.Array | None, codes: jax.Array, scale: jax.Array
) -> jax.Array:
  """Weighted squared error per group, [N]."""
  return _sum((w - jnp.sum(codes * scale[..., None], axis=0)) ** 2, h)


# ------------------------------- free codes ----------------------------------


def one_plane(w: jax.Array, h: jax.Array | None, kind: str) -> Fit:
  """The exact minimum over codes and scales: [N, group], [N]."""
  magnitude = jnp.abs(w)
  if h is None:
    ranked = -jnp.sort(-magnitude, axis=-1)
    hw = jnp.cumsum(ranked, axis=-1)
    hh = jnp.arange(1, w.shape[-1] + 1, dtype=jnp.float32)
  else:
    key, weight = jax.lax.sort((-magnitude, h), dimension=-1, num_keys=1)
    hw = jnp.cumsum(-key * weight, axis=-1)
    hh = jnp.cumsum(weight, axis=-1)
  scales = kernels.round_scale(_divide(hw, hh), kind)
  # For each threshold the error falls by this; quadratic in the scale, so the
  # nearest one that can be stored is the best.
  gain = scales * (2.0 * hw - scales * hh)
  best = jnp.argmax(gain, axis=-1)
  scale = jnp.take_along_axis(scales, best[:, None], axis=-1)[:, 0]
  above = magnitude > 0.5 * scale[:, None]
  return jnp.where(above, _sign(w), 0.0), scale


def nearest(w: jax.Array, scale: jax.Array) -> jax.Array:
  """Best codes given scales [P, N], of all 3^P sums: [P, N, group]."""
  planes = scale.shape[0]
  magnitude = jnp.abs(w)
  distance, found = magnitude, jnp.zeros(w.shape, jnp.int32)
  # Sums come in pairs of opposite sign; one of each pair is enough if its
  # size is compared, and the sign of both is kept for the end.
  for code in range(1, (3**planes + 1) // 2):
    total, rest = jnp.zeros_like(scale[0]), code
    for p in range(planes):  # Balanced ternary, digits -1, 0, 1.
      digit = (rest + 1) % 3 - 1
      rest = (rest - digit) // 3
      total = total + digit * scale[p]
    away = jnp.abs(magnitude - jnp.abs(total)[:, None])
    label = jnp.where(total < 0, -code, code).astype(jnp.int32)[:, None]
    closer = away < distance
    distance = jnp.where(closer, away, distance)
    found = jnp.where(closer, label, found)
  found = jnp.where(w < 0, -found, found)
  out = []
  for _ in range(planes):
    digit = (found + 1 + 3**planes) % 3 - 1
    found = (found - digit) // 3
    out.append(digit.astype(jnp.float32))
  return jnp.stack(out)


def fit_free(
  w: jax.Array,
  h: jax.Array | None,
  planes: int,
  iterations: jax.Array | int,
  kind: str,
) -> Fit:
  """Fits `planes` planes: codes [P, N, group], scales [P, N]."""
  residual, codes, scales = w, [], []
  for _ in range(planes):
    code, scale = one_plane(residual, h, kind)
    residual = residual - code * scale[:, None]
    codes.append(code)
    scales.append(scale)
  greedy = jnp.stack(codes), jnp.stack(scales)
  if planes == 1:
    return greedy

  def update(codes, scale):
    scale = least_squares(w, h, codes, scale, kind)
    return nearest(w, scale), scale

  # Scales of ratio 3 span evenly spaced sums: the other basin that matters.
  step = jnp.max(jnp.abs(w), axis=-1) / (3**planes // 2)
  ladder = jnp.stack([step * 3.0**p for p in reversed(range(planes))])
  starts = jnp.stack(
    [
      greedy[1],
      *(kernels.round_scale(clip * ladder, kind) for clip in (0.75, 1.0)),
    ]
  )

  def attempt(i, best):
    # The nearest codes to the greedy scales are at least as good as its own.
    start = nearest(w, starts[i]), starts[i]
    return _better(w, h, best, alternate(w, h, start, update, iterations))

  return jax.lax.fori_loop(0, len(starts), attempt, greedy)


def fit_tied(w: jax.Array, h: jax.Array | None, planes: int, kind: str) -> Fit:
  """Fits planes whose scales are thirds of each other, as `fit_free`."""
  half = 3**planes // 2
  peak = jnp.max(jnp.abs(w), axis=-1)

  def codes_of(scale):
    inverse = _divide(jnp.ones_like(scale), scale)
    return jnp.clip(jnp.round(w * inverse[:, None]), -half, half)

  def better(best, scale):
    scale = kernels.round_scale(scale, kind)
    err = error(w, h, codes_of(scale)[None], scale[None])
    won = err < best[1]
    return jnp.where(won, scale, best[0]), jnp.where(won, err, best[1])

  # Finer than the scales of one byte are, in which an octave has eight.
  ratios = jnp.geomspace(0.4, 1.6, 32)
  best = jnp.zeros_like(peak), jnp.full_like(peak, jnp.inf)
  best = jax.lax.fori_loop(
    0, len(ratios), lambda i, b: better(b, peak / half * ratios[i]), best
  )

  def least_squares(_, best):
    q = codes_of(best[0])
    return better(best, _divide(_sum(q * w, h), _sum(q * q, h)))

  scale, _ = jax.lax.fori_loop(0, 3, least_squares, best)
  rest, codes = codes_of(scale), []
  for _ in range(planes):  # The finest first.
    above = jnp.round(rest / 3)
    codes.append(rest - 3 * above)
    rest = above
  ladder = [scale * 3.0**p for p in reversed(range(planes))]
  return jnp.stack(codes[::-1]), jnp.stack(ladder)


# ------------------------------ alternation ----------------------------------


def least_squares(
  w: jax.Array,
  h: jax.Array | None,
  codes: jax.Array,
  scale: jax.Array,
  kind: str,
) -> jax.Array:
  """Scales from the P x P normal equations of each group: [P, N].

  Gaussian elimination, unrolled over the planes; a plane whose pivot vanishes
  (its codes depend on the others') keeps its scale.
  """
  planes = codes.shape[0]
  # Solved for the change of the scales, so that a skipped pivot changes none.
  residual = w - jnp.sum(codes * scale[..., None], axis=0)
  a = [
    [_sum(codes[p] * codes[q], h) for q in range(planes)] for p in range(planes)
  ]
  b = [_sum(codes[p] * residual, h) for p in range(planes)]
  floor = [1e-4 * a[p][p] for p in range(planes)]
  for p in range(planes):
    for r in range(p + 1, planes):
      f = jnp.where(a[p][p] > floor[p], _divide(a[r][p], a[p][p]), 0.0)
      a[r] = [a[r][q] - f * a[p][q] for q in range(planes)]
      b[r] = b[r] - f * b[p]
  x = [jnp.zeros_like(b[0])] * planes
  for p in reversed(range(planes)):
    for q in range(p + 1, planes):
      b[p] = b[p] - a[p][q] * x[q]
    x[p] = jnp.where(a[p][p] > floor[p], _divide(b[p], a[p][p]), 0.0)
  return kernels.round_scale(scale + jnp.stack(x), kind)


def _better(w: jax.Array, h: jax.Array | None, a: Fit, b: Fit) -> Fit:
  won = error(w, h, *b) < error(w, h, *a)
  return (
    jnp.where(won[:, None], b[0], a[0]),
    jnp.where(won, b[1], a[1]),
  )


def alternate(
  w: jax.Array,
  h: jax.Array | None,
  start: Fit,
  update: Callable[[jax.Array, jax.Array], Fit],
  iterations: jax.Array | int,
) -> Fit:
  """Repeats `update`, keeping of each group the best that was seen."""

  def body(_, best):
    return _better(w, h, best, update(*best))

  return jax.lax.fori_loop(0, iterations, body, start)


# --------------------------- codes of fixed density ---------------------------


def top(gain: jax.Array, keep: tuple[int, int]) -> jax.Array:
  """Marks the n largest of every m neighbours, ties to the left: bool."""
  n, m = keep
  if n == m:
    return jnp.ones(gain.shape, bool)
  x = gain.reshape(-1, m)
  if m <= 8:
    order = jnp.arange(m)
    ahead = (x[:, None, :] > x[:, :, None]) | (
      (x[:, None, :] == x[:, :, None]) & (order[None, :] < order[:, None])
    )
    chosen = jnp.sum(ahead, axis=-1) < n
  else:
    key = _sortable(x)
    least = _nth_largest(key, n)
    more, tied = key > least, key == least
    room = n - jnp.sum(more, axis=-1, keepdims=True)
    chosen = more | (tied & (jnp.cumsum(tied, axis=-1) <= room))
  return chosen.reshape(gain.shape)


def _sortable(x: jax.Array) -> jax.Array:
  """uint32 that compare as the float32 do."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _nth_largest(key: jax.Array, n: int) -> jax.Array:
  """The n-th largest of each row, [rows, 1], bit by bit.

  Several times faster than XLA's sort on a CPU.
  """

  def body(i, least):
    trial = least | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    enough = jnp.sum(key >= trial, axis=-1, keepdims=True) >= n
    return jnp.where(enough, trial, least)

  return jax.lax.fori_loop(0, 32, body, jnp.zeros_like(key[:, :1]))


def _select(
  w: jax.Array, h: jax.Array | None, scale: jax.Array, keep: tuple[int, int]
) -> jax.Array:
  """Best codes of one plane at that density given its scale."""
  # Choosing a weight lowers the error by h s (2 |w| - s).
  s = jnp.abs(scale)[:, None]
  magnitude = jnp.abs(w)
  gain = magnitude if h is None else h * (2.0 * magnitude - s)
  return jnp.where(top(gain, keep), _sign(w), 0.0) * _sign(scale)[:, None]


def fit_kept(
  w: jax.Array,
  h: jax.Array | None,
  planes: int,
  keep: tuple[int, int],
  iterations: jax.Array | int,
  kind: str,
) -> Fit:
  """As `fit_free`, with n nonzeros in every m neighbours of every plane."""

  def update(w):
    def step(codes, scale):
      scale = least_squares(w, h, codes, scale, kind)
      fit = jnp.sum(codes * scale[..., None], axis=0)
      out = []
      for p in range(codes.shape[0]):
        others = fit - codes[p] * scale[p][:, None]
        out.append(_select(w - others, h, scale[p], keep))
        fit = others + out[p] * scale[p][:, None]
      return jnp.stack(out), scale

    return step

  residual, codes, scales = w, [], []
  for _ in range(planes):
    code, scale = _one_kept(residual, h, keep, update(residual), kind)
    residual = residual - code * scale[:, None]
    codes.append(code)
    scales.append(scale)
  greedy = jnp.stack(codes), jnp.stack(scales)
  if planes == 1:
    return greedy
  return alternate(w, h, greedy, update(w), iterations)


def _one_kept(
  w: jax.Array,
  h: jax.Array | None,
  keep: tuple[int, int],
  step: Callable[[jax.Array, jax.Array], Fit],
  kind: str,
) -> Fit:
  """One plane: exact without curvature, else the best of several starts."""

  def start(scale):
    codes = _select(w, h, scale, keep)[None]
    hh = _sum(codes[0] ** 2, h)
    scale = kernels.round_scale(_divide(_sum(codes[0] * w, h), hh), kind)
    return codes, scale[None]

  peak = jnp.max(jnp.abs(w), axis=-1)
  best = start(peak)
  if h is not None:
    # The order of gains goes from h |w| (small scales) to 1 / h (large ones).
    ratios = jnp.array([0.02, 0.2, 0.4, 0.6, 0.8], jnp.float32)

    def attempt(i, best):
      other = alternate(w, h, start(ratios[i] * peak), step, 3)
      return _better(w, h, best, other)

    best = jax.lax.fori_loop(0, len(ratios), attempt, best)
  return best[0][0], best[1][0]
