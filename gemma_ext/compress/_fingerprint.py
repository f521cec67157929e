# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""What sensitivities were measured of: told from inputs, before any pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import recipe as recipe_lib

# What a part of a fingerprint is of, for people.
_NAMES = {
  'parameters': 'parameters',
  'text': 'calibration text, or its tokens, seed or share of random tokens',
  'candidates': 'candidates, or number of bands',
}


def of_text(
  tokens: np.ndarray, counted: Any, *, random_share: float, seed: int
) -> str:
  """Returns a hash of what `gx.compress.statistics` is computed of.

  Args:
    tokens: Token ids `[batch, length]`.
    counted: More of them, which are only counted, or `None`.
    random_share: Share of random tokens.
    seed: Seed of labels and random tokens.
  """
  digest = hashlib.sha256()
  for array in (tokens, () if counted is None else counted):
    array = np.ascontiguousarray(array, '<i4')
    digest.update(f'{array.shape};'.encode())
    digest.update(array.tobytes())
  digest.update(f'{random_share!r} {seed};'.encode())
  return digest.hexdigest()


def of(
  flat: Mapping[str, jax.Array],
  text: str,
  candidates: Sequence[recipe_lib.Method],
  bands: int,
) -> dict[str, str]:
  """Returns the fingerprint of sensitivities, by what it is of.

  Whole numbers only are added up: every machine finds the same.

  Args:
    flat: The dense parameters, by path.
    text: Hash of `of_text`.
    candidates: The methods that weights are fitted with.
    bands: Bands of the table of embeddings.
  """
  digest = hashlib.sha256()
  for path in sorted(flat):
    leaf = flat[path]
    digest.update(f'{path} {leaf.shape} {leaf.dtype} {_sum(leaf)};'.encode())
  methods = json.dumps([m.to_json() for m in candidates], sort_keys=True)
  return {
    'parameters': digest.hexdigest(),
    'text': text,
    'candidates': hashlib.sha256(f'{methods} {bands}'.encode()).hexdigest(),
  }


def differences(got: Mapping[str, str], expected: Mapping[str, str]) -> str:
  """Returns what two fingerprints differ in, in words; empty if nothing.

  Args:
    got: One.
    expected: The other.
  """
  return '; '.join(
    name for part, name in _NAMES.items() if got.get(part) != expected[part]
  )


def _sum(leaf: jax.Array) -> int:
  """The bits of a leaf, as whole numbers, their places in it mixed in."""
  return int(_mixed(jnp.asarray(leaf)))


@jax.jit
def _mixed(leaf: jax.Array) -> jax.Array:
  kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
  for axis in range(bits.ndim):
    # Odd, so that every place multiplies without loss.
    odd = 2 * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) + 1
    bits = bits * odd
  return jnp.sum(bits, dtype=jnp.uint32)
