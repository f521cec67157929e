# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Perplexity of one GGUF file, loaded by us and run by llama.cpp.

    python -m tools.benchmarks.peers.llama_cpp_perplexity [--checkpoint=...]

The same token ids go through both: windows of 512 tokens, the begin token
first, of the Wikipedia extract inside gensim. Prints both perplexities and
their ratio, and exits with 1 if it is further than `--tolerance` from one.
"""

import functools
import json
import sys
import time
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import data
from gemma_ext import errors
from gemma_ext.ckpts import _gguf
from gemma_ext.ckpts import _sample
from tools.benchmarks.peers import _llama_cpp

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'A GGUF file; the sample checkpoint by default.'
)
_WINDOWS = flags.DEFINE_integer('windows', 16, 'Windows of 512 tokens.')
_DTYPES = flags.DEFINE_list(
  'dtypes', ['float32', 'bfloat16'], 'Dtypes in which we load and run.'
)
_TOLERANCE = flags.DEFINE_float(
  'tolerance', 0.01, 'Greatest distance of the ratio from one.'
)
_JSON = flags.DEFINE_string('json', None, 'Where to write the result.')


def token_windows(tokenizer: Any, count: int) -> np.ndarray:
  """Returns int32 [count, 512], each row beginning with the begin token."""
  body = _llama_cpp.WINDOW - 1
  ids: list[int] = []
  for document in data.load_documents('sample'):
    ids += tokenizer.encode(document.text)
    if len(ids) >= count * body:
      break
  if len(ids) < count * body:
    raise errors.DataError(
      f'The sample text has {len(ids)} tokens; {count} windows need'
      f' {count * body}.'
    )
  rows = np.asarray(ids[: count * body], np.int32).reshape(count, body)
  bos = np.full((count, 1), int(tokenizer.special_tokens.BOS), np.int32)
  return np.concatenate([bos, rows], axis=1)


def our_nll(model: Any, params: Any, windows: np.ndarray) -> np.ndarray:
  """Returns float64 [windows, 511]: negative log-likelihoods in nats."""

  @functools.partial(jax.jit)
  def nll(params: Any, row: jax.Array) -> jax.Array:
    logits = model.apply({'params': params}, row[None]).logits[0, :-1]
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, row[1:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen

  return np.stack([np.asarray(nll(params, row), np.float64) for row in windows])


def peer_nll(peer: _llama_cpp.LlamaCpp, windows: np.ndarray) -> np.ndarray:
  """The same from llama.cpp."""
  out = np.empty((len(windows), windows.shape[1] - 1))
  for i, row in enumerate(windows):
    logits = peer.logits(row)
    for j, target in enumerate(row[1:]):
      top = logits[j].max()
      total = np.exp(logits[j] - top).sum(dtype=np.float64)
      out[i, j] = np.log(total) + float(top) - float(logits[j, target])
  return out


def main(argv: list[str]) -> None:
  del argv
  path = _CHECKPOINT.value or _sample.sample_path()
  result: dict[str, Any] = {'file': str(path), 'ours': {}, 'ratio': {}}
  windows = None
  for dtype in _DTYPES.value:
    model, params, tokenizer = _gguf.load_gguf(path, dtype=dtype)
    if tokenizer is None:
      raise errors.TokenizerError(f'{path} holds no vocabulary.')
    if windows is None:
      windows = token_windows(tokenizer, _WINDOWS.value)
    start = time.perf_counter()
    result['ours'][dtype] = float(
      np.exp(our_nll(model, params, windows).mean())
    )
    seconds = time.perf_counter() - start
    print(
      f'gemma_ext {dtype:9} {result["ours"][dtype]:9.4f}  ({seconds:.0f} s)'
    )
    del params
  assert windows is not None
  start = time.perf_counter()
  with _llama_cpp.LlamaCpp(path) as peer:
    result['peer'] = float(np.exp(peer_nll(peer, windows).mean()))
  seconds = time.perf_counter() - start
  print(f'llama.cpp           {result["peer"]:9.4f}  ({seconds:.0f} s)')
  for dtype, value in result['ours'].items():
    result['ratio'][dtype] = value / result['peer']
    print(f'ratio {dtype:13} {result["ratio"][dtype]:9.4f}')
  result['windows'], result['window'] = windows.shape
  worst = max(abs(r - 1.0) for r in result['ratio'].values())
  result['passed'] = worst <= _TOLERANCE.value
  if _JSON.value:
    with open(_JSON.value, 'w', encoding='utf-8') as file:
      json.dump(result, file, indent=2)
  sys.exit(0 if result['passed'] else 1)


if __name__ == '__main__':
  app.run(main)
