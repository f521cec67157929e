# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Traps in gemma 4.0.1 and jax 0.12, and our way out of each.

1. A jitted `Transformer` answers from the trace of an equal model.
2. The official wrappers match nothing on Gemma 3n and 4, and say nothing.
3. Inside a `Transformer` every parameter is initialised as bfloat16.
4. `load_params` wants an absolute path; RMSNorm adds one in Gemma 2 and 3 only.
5. Pallas cannot run on a CPU.
6. Work on XLA's thread pool must not wait for more work there.
"""

import ast
import functools
import pathlib
import re

from flax import traverse_util
from gemma import gm
from gemma import peft
from gemma.gm.nn import _layers as gemma3_layers
from gemma.gm.nn.gemma4 import _layers as gemma4_layers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import errors
from tests import tiny

_TOKENS = jnp.array([[2, 5, 6, 7, 8, 9]])
_PACKAGE = pathlib.Path(gx.__file__).parent


def _quantized(model, recipe):
  """Compressed parameters with plain rounding, and what they stand for."""
  packed = traverse_util.flatten_dict(tiny.params(model), sep='/')
  dense = dict(packed)
  for path, (site, method) in gx.nn.methods_of(model, recipe).items():
    rows = np.asarray(site.layout.to_rows(packed.pop(path)), np.float32)
    half = 1 << (method.bits - 1)
    scale = np.abs(rows).max(-1, keepdims=True) / (half - 1)
    scale = np.asarray(jnp.asarray(scale, jnp.bfloat16))
    codes = np.round(rows / scale.astype(np.float32))
    codes = np.clip(codes, -half, half - 1).astype(np.int8)
    fmt = gx.nn.format_of(method, site.layout.cols)
    packed[f'{path}/codes'] = jax.jit(fmt.pack)(codes)
    packed[f'{path}/scale'] = jnp.asarray(scale)
    w = codes * scale.astype(np.float32)
    dense[path] = jnp.asarray(site.layout.from_rows(w))
  return [
    traverse_util.unflatten_dict(flat, sep='/') for flat in (packed, dense)
  ]


@functools.cache
def _lowered(family):
  """A forward pass of a compressed model as XLA gets it, for CPU and TPU."""
  recipe = {
    'layer_0/mlp2?': gx.Ternary(group=64, packing='5trit', planes=2),
    r'layer_\d+/mlp2?': gx.Ternary(group=64),
    'embedder': gx.Int(bits=8),
    '.*': gx.Int(bits=4, group=32),
  }
  model = gx.nn.Compressed(model=tiny.model(family), recipe=recipe)
  shapes = jax.eval_shape(model.init, jax.random.key(0), _TOKENS)['params']
  forward = jax.jit(lambda p, t: model.apply({'params': p}, t).logits)
  traced = forward.trace(shapes, jax.ShapeDtypeStruct((1, 6), jnp.int32))
  return {
    platform: traced.lower(lowering_platforms=(platform,)).as_text()
    for platform in ('cpu', 'tpu')
  }


def test_trap_1_no_trace_answers_for_another_recipe():
  model = tiny.model('gemma3')
  params = tiny.params(model)
  logits = lambda m, p: np.asarray(m.apply({'params': p}, _TOKENS).logits)
  first = logits(model, params)
  answers = []
  for bits in (8, 4):
    recipe = gx.Recipe.of({r'layer_\d+/mlp': gx.Int(bits=bits)})
    packed, dense = _quantized(model, recipe)
    compressed = gx.nn.Compressed(model=model, recipe=recipe)
    answers.append(logits(compressed, packed))
    np.testing.assert_allclose(answers[-1], logits(model, dense), atol=2e-5)
  np.testing.assert_array_equal(logits(model, params), first)
  errors_ = [np.linalg.norm(a - first) / np.linalg.norm(first) for a in answers]
  assert 1e-4 < errors_[0] < 0.02 < errors_[1] < 0.5


@pytest.mark.parametrize('family', ['gemma3n', 'gemma4', 'gemma4_moe'])
def test_trap_2_nothing_silently_matches_nothing(family):
  model = tiny.model(family)
  compressed = gx.nn.Compressed(model=model, recipe='int8')
  count = lambda m: len(
    jax.tree.leaves(
      peft.split_params(
        jax.eval_shape(m.init, jax.random.key(0), _TOKENS)['params']
      ).lora
    )
  )
  einsums = [s for s in gx.nn.sites(model) if s.kind == gx.nn.Kind.EINSUM]
  # The official wrapper adds nothing; ours an a and a b to every einsum.
  assert count(gm.nn.LoRA(rank=2, model=model)) == 0
  assert count(gx.nn.LoRA(rank=2, model=compressed)) == 2 * len(einsums)
  with pytest.raises(errors.UnmatchedRuleError, match='layer_0/mpl'):
    gx.plan(model, {'layer_0/mpl': gx.Int()})
  with pytest.raises(errors.UnmatchedRuleError, match='mpl'):
    count(gx.nn.LoRA(rank=2, model=compressed, target='mpl'))


def test_trap_3_packed_leaves_keep_their_types():
  model = tiny.model('gemma3', dtype=jnp.bfloat16)
  compressed = gx.nn.Compressed(
    model=model,
    recipe={'layer_0': gx.Int(bits=8), '.*': gx.Ternary(packing='5trit')},
  )
  shapes = jax.eval_shape(compressed.init, jax.random.key(0), _TOKENS)
  types = {}
  for path, leaf in traverse_util.flatten_dict(shapes['params']).items():
    if path[-1] == 'codes':
      types.setdefault(path[0], set()).add(str(leaf.dtype))
    else:
      assert leaf.dtype == jnp.bfloat16, path
  assert types == {
    'embedder': {'uint8'},
    'layer_0': {'int8'},
    'layer_1': {'uint8'},
    'layer_2': {'uint8'},
  }


def test_trap_4_norms_add_one_in_gemma_2_and_3_only():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8)), jnp.float32)
  scale = {'params': {'scale': jnp.full(8, 0.5)}}
  unit = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
  for layers, factor in ((gemma3_layers, 1.5), (gemma4_layers, 0.5)):
    got = layers.RMSNorm().apply(scale, x)
    np.testing.assert_allclose(got, factor * unit, rtol=1e-5)
  # So that the norms do next to nothing, whatever the family.
  for family, neutral in (('gemma2', 0), ('gemma3', 0), ('gemma4', 1)):
    params = tiny.params(tiny.model(family))
    assert abs(params['final_norm']['scale'].mean() - neutral) < 0.05


def test_trap_4_relative_paths(tmp_path, monkeypatch):
  model = tiny.model('gemma3')
  params = tiny.params(model)
  gm.ckpts.save_params(params, tmp_path / 'c', wait_until_finished=True)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match='No item metadata'):
    gm.ckpts.load_params('c')
  found = gx.ckpts.load('c', model=model, dtype=jnp.float32)
  jax.tree.map(np.testing.assert_array_equal, found.params, params)
  gx.ckpts.save('d', model=model, params=params)
  found = gx.ckpts.load('./d', dtype=jnp.float32)
  jax.tree.map(np.testing.assert_array_equal, found.params, params)


@pytest.mark.parametrize('family', ['gemma3', 'gemma4_moe'])
def test_trap_5_lowers_for_cpu_and_tpu_without_pallas(family):
  for platform, text in _lowered(family).items():
    assert 'stablehlo.dot_general' in text, platform
    assert 'ui8>' in text  # The weights arrive packed.
    for word in ('tpu_custom_call', 'mosaic', 'triton', 'pallas'):
      assert word not in text.lower(), (platform, word)


def test_trap_5_pallas_only_for_what_mosaic_knows():
  for path in _PACKAGE.rglob('*.py'):
    allowed = path.parent.name in ('mosaic_gpu', 'tpu')
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [a.name for a in node.names] + [getattr(node, 'module', '')]
        found = [name for name in names if 'pallas' in (name or '')]
        assert not found or allowed, path
        assert not any('triton' in name for name in found), path


@pytest.mark.parametrize('family', ['gemma3', 'gemma4_moe'])
def test_trap_6_no_callbacks_into_the_host(family):
  for text in _lowered(family).values():
    assert 'callback' not in text.lower()
    targets = set(re.findall(r'custom_call @(\w+)', text))
    # What the official router picks experts with; XLA expands it.
    assert targets <= {'ApproxTopK'}, targets
