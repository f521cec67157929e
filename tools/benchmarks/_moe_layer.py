# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""MoE layers of the shape of Gemma 4 26B-A4B with random weights."""

from typing import Any

from gemma import gm
from gemma.gm.nn.gemma4 import _moe
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemma_ext import kernels
from tools.benchmarks import _weights

_CONFIG = gm.nn.Gemma4_26B_A4B.config
_OPTIONS: dict[str, Any] = {
  'features': _CONFIG.embed_dim,
  'hidden_dim': _CONFIG.expert_dim,
  'num_experts': _CONFIG.num_experts,
  'num_experts_per_datapoint': _CONFIG.top_k_experts,
}
FORMATS = {
  'ours, int4 group 64': kernels.IntFormat(bits=4, group=64),
  'ours, ternary 2bit group 64': kernels.TernaryFormat(group=64),
}


class _Dense(_moe.MoERagged):
  """The official layer with the experts computed by us."""

  def _run_ffw_and_routing(self, x, expert_choices, expert_weights):
    weight = _weight(self, expert_choices, expert_weights)
    return kernels.experts_dense(
      x, self.gating_einsum(), self.linear(), expert_choices, weight
    )


class _Packed(_moe.MoERagged):
  """The same with packed weights."""

  fmt: Any = None
  backend: str | None = None

  def _run_ffw_and_routing(self, x, expert_choices, expert_weights):
    weight = _weight(self, expert_choices, expert_weights)
    gate, down = (self.get_variable('packed', k) for k in ('gate', 'down'))
    return kernels.experts_ffn(
      *(x, gate, self.fmt, down, self.fmt, expert_choices, weight),
      backend=self.backend,
    )


def _weight(module, choices, weights):
  weight = jnp.take_along_axis(weights, choices, axis=-1)
  return weight * module.per_expert_scale[choices]


def _random(rng: np.random.Generator, shape: tuple[int, ...], size: float):
  """Normal numbers in bfloat16, the same ones again and again."""
  pool = rng.standard_normal(1 << 22, np.float32) * size
  pool = pool.astype(ml_dtypes.bfloat16)
  count = int(np.prod(shape))
  out = np.empty(count, pool.dtype)
  for at in range(0, count, len(pool) - 7):
    # Shifted a little each time, so that no two experts are alike.
    some = np.roll(pool, at // len(pool) * 1009)[
      : min(len(pool) - 7, count - at)
    ]
    out[at : at + len(some)] = some
  return jnp.asarray(out.reshape(shape))


def _tiled(
  fmt: kernels.Format, experts: int, rows: tuple[int, ...], cols: int, seed: int
) -> dict[str, jax.Array]:
  """Experts of which every eighth is the same: unpacked codes take memory."""
  some = _weights.packed(fmt, (8, *rows), cols, seed)
  axis = int(isinstance(fmt, kernels.TernaryFormat))
  repeat = lambda v: np.concatenate([np.asarray(v)] * (experts // 8), axis)
  return {name: jnp.asarray(repeat(v)) for name, v in some.items()}


def contender(name: str) -> tuple[Any, dict[str, Any]]:
  """Returns `run(variables, x)` of a contender, and its variables.

  Args:
    name: 'official MoE', 'official MoERagged', 'ours, bfloat16', or one of
      `FORMATS`.
  """
  width, size = _CONFIG.embed_dim, _CONFIG.expert_dim
  experts = _CONFIG.num_experts
  rng = np.random.default_rng(0)
  params: dict[str, Any] = {
    'router_logits': {'w': _random(rng, (width, experts), 1)},
    'per_expert_scale': jnp.asarray(rng.uniform(0.5, 2, experts), jnp.bfloat16),
    'router_scale': jnp.ones((width,), jnp.bfloat16),
  }
  variables: dict[str, Any] = {'params': params}
  fmt = FORMATS.get(name)
  if fmt is not None:
    module = _Packed(**_OPTIONS, fmt=fmt)
    variables['packed'] = {
      'gate': _tiled(fmt, experts, (2, size), width, 1),
      'down': _tiled(fmt, experts, (width,), size, 2),
    }
  else:
    classes = {
      'official MoE': _moe.MoE,
      'official MoERagged': _moe.MoERagged,
      'ours, bfloat16': _Dense,
    }
    module = classes[name](**_OPTIONS)
    for key, shape, fan in (
      ('gating_einsum', (experts, 2, size, width), width),
      ('linear', (experts, size, width), size),
    ):
      params[key] = {'w': _random(rng, shape, fan**-0.5)}
  return module.apply, variables


def reference(name: str, variables: dict[str, Any], x: jax.Array) -> np.ndarray:
  """What XLA makes of the packed weights of a contender."""
  module = _Packed(**_OPTIONS, fmt=FORMATS[name], backend='xla')
  return np.asarray(jax.jit(module.apply)(variables, x), np.float32)


def tokens(count: int) -> jax.Array:
  """Activations `[1, count, D]`."""
  rng = np.random.default_rng(1)
  shape = (1, count, _CONFIG.embed_dim)
  return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
