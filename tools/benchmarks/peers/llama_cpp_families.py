# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Logits of tiny random models of every family, through us and llama.cpp.

    python -m tools.benchmarks.peers.llama_cpp_families

Writes each tiny model as GGUF, loads it with both, and exits with 1 if any
logit differs by more than `--tolerance`; llama.cpp keeps keys and values in
float16, which is what is left of a difference.

The mixture of experts runs with `pre_ffw_norm` of ones: the official class
(gemma 4.0.1) routes on the output of that norm, llama.cpp and Hugging Face on
its input, and only then are the two the same.
"""

import pathlib
import sys
import tempfile
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext.ckpts import _gguf
from tests import tiny
from tests.ckpts import gguf_fixtures
from tools.benchmarks.peers import _llama_cpp

_TOLERANCE = flags.DEFINE_float(
  'tolerance', 0.05, 'Greatest difference of a logit; they go up to 7.'
)
_FAMILIES = ('gemma2', 'gemma3', 'gemma4', 'gemma4_e2b', 'gemma4_moe')


def difference(family: str, folder: pathlib.Path) -> float:
  """Returns the greatest difference of a logit over 61 positions."""
  model = tiny.model(family)
  params = jax.tree.map(np.asarray, tiny.params(model, seed=1))
  params = gguf_fixtures.exact(params)
  if family == 'gemma4_moe':
    for name, layer in params.items():
      if name.startswith('layer_'):
        norm = layer['pre_ffw_norm']
        norm['scale'] = np.ones_like(norm['scale'])
  path = folder / f'{family}.gguf'
  gguf_fixtures.write(path, model, params, change=_needed_by_llama_cpp(model))
  tokens = np.array([2, *range(300, 360)], np.int32)
  loaded, ours, _ = _gguf.load_gguf(path, dtype=jnp.float32)
  logits = loaded.apply({'params': ours}, tokens[None]).logits[0]
  with _llama_cpp.LlamaCpp(path) as peer:
    theirs = np.array(peer.logits(tokens))
  return float(np.abs(np.asarray(logits) - theirs).max())


def _needed_by_llama_cpp(model: Any) -> dict[str, Any]:
  """Metadata without which llama.cpp does not load a file."""
  arch = gguf_fixtures.family_of(model)
  width = gguf_fixtures.metadata(model)[f'{arch}.attention.key_length']
  out: dict[str, Any] = {
    f'{arch}.attention.layer_norm_rms_epsilon': 1e-6,
    f'{arch}.attention.value_length': width,
    f'{arch}.context_length': 1024,
    'tokenizer.ggml.eos_token_id': 1,
    'tokenizer.ggml.unknown_token_id': 3,
    'tokenizer.ggml.padding_token_id': 0,
  }
  if arch == 'gemma4':
    out[f'{arch}.attention.value_length_swa'] = model.config.head_dim
    out[f'{arch}.rope.dimension_count'] = width
  return out


def main(argv: list[str]) -> None:
  del argv
  worst = 0.0
  with tempfile.TemporaryDirectory() as folder:
    for family in _FAMILIES:
      value = difference(family, pathlib.Path(folder))
      print(f'{family:12} greatest difference of a logit {value:.4f}')
      worst = max(worst, value)
  sys.exit(0 if worst <= _TOLERANCE.value else 1)


if __name__ == '__main__':
  app.run(main)
