# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""One model on one task: scores by item."""

from __future__ import annotations

from collections.abc import Callable
import ctypes
import dataclasses
import gc
import pathlib
import tempfile
import time
from typing import Any

from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import data
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext import nn as gx_nn
from gemma_ext.ckpts import _sample
from tools.benchmarks import _shapes
from tools.benchmarks import _speed
from tools.benchmarks import _suite
from tools.benchmarks.peers import _jax_peers
from tools.benchmarks.peers import _llama_cpp
from tools.benchmarks.peers import _requantize

_KINDS = {'choices': evals.Choice, 'code': evals.Program}


@dataclasses.dataclass(eq=False)
class Loaded:
  """A model in memory.

  Attributes:
    nbytes: Bytes of its weights.
    dense_bytes: Bytes of all its weights in bfloat16.
    model: The model; `None` of a peer.
    params: Its parameters.
    peer: llama.cpp's, or `None`.
    shape: The model of a shape, which has no weights; `None` of others.
  """

  nbytes: int
  dense_bytes: int
  model: Any = None
  params: Any = None
  peer: Any = None
  shape: Any = None


def load(spec: _suite.Model, tokenizer: Any) -> tuple[Loaded, Any]:
  """Loads a model of a suite.

  Args:
    spec: The model.
    tokenizer: The baseline's, for those without one; `None` for the baseline.

  Returns:
    The model, and its tokenizer.
  """
  if spec.kind == 'gguf':
    return _load_gguf(spec), tokenizer
  if spec.kind == 'shape':
    return _shape(spec), tokenizer
  if spec.peer:
    found, model, params, nbytes = _jax_peers.load(spec.source, spec.peer)
    sizes = evals.weight_sizes(found.model, found.params)
    return Loaded(
      nbytes=nbytes,
      dense_bytes=sizes.dense_bf16_bytes,
      model=model,
      params=params,
    ), found.tokenizer or tokenizer
  found = ckpts.load(spec.source, dtype=jnp.bfloat16)
  model, params = found.model, found.params
  if spec.recipe:
    if found.recipe is not None:
      raise errors.ConfigError(
        f'Model {spec.name!r}: {spec.source!r} is compressed already.'
      )
    compressed = gx_nn.Compressed(model=model, recipe=spec.recipe)
    params = gx_compress.compress(
      model, params, compressed.recipe, progress=True
    )
    model = compressed
  sizes = evals.weight_sizes(model, params)
  loaded = Loaded(
    nbytes=sizes.weight_bytes,
    dense_bytes=sizes.dense_bf16_bytes,
    model=model,
    params=params,
  )
  return loaded, found.tokenizer or tokenizer


def _shape(spec: _suite.Model) -> Loaded:
  cls = getattr(gm.nn, spec.source, None)
  if not isinstance(cls, type):
    raise errors.ConfigError(
      f'Model {spec.name!r}: the official library has no {spec.source!r}.'
    )
  model = _shapes.dense(cls)
  plan = gx_compress.plan(model, spec.recipe or {})
  if spec.recipe:
    model = gx_nn.Compressed(model=model, recipe=spec.recipe)
  return Loaded(
    nbytes=plan.nbytes, dense_bytes=2 * plan.num_weights, shape=model
  )


def _load_gguf(spec: _suite.Model) -> Loaded:
  source = spec.source
  path = pathlib.Path(
    _sample.sample_path() if source == 'gemma3-270m' else source
  )
  if not path.is_file():
    raise errors.ConfigError(f'Model {spec.name!r}: no file {source!r}.')
  folder = None
  if spec.quantize:
    folder = tempfile.TemporaryDirectory()
    made = pathlib.Path(folder.name) / 'quantized.gguf'
    _requantize.requantize(path, made, spec.quantize)
    path = made
  loaded = Loaded(
    # Without the vocabulary, which ours are counted without as well.
    nbytes=_requantize.tensor_bytes(path),
    dense_bytes=0,
    peer=_llama_cpp.LlamaCpp(path),
  )
  # Open files outlive their names.
  if folder is not None:
    folder.cleanup()
  return loaded


def data_of(task: _suite.Task, tokenizer: Any) -> tuple[Any, str]:
  """Returns the data of a task, and their hash.

  Args:
    task: The task.
    tokenizer: The baseline's.
  """
  options = task.options
  if task.kind == 'speed':
    return None, ''
  if task.kind == 'perplexity':
    documents = data.load_documents(
      options['text'], text_field=options['text_field']
    )
    split = options['split']
    if split == 'auto':
      split = 'test' if options['text'] == 'sample' else 'all'
    if split != 'all':
      documents = getattr(data.split(tuple(documents)), split).documents
    windows = data.windows(
      tokenizer,
      documents,
      length=options['window'],
      max_tokens=options['max_tokens'] or None,
    )
    return (windows, [len(d.text.encode()) for d in documents]), windows.sha256
  check = options.get('check', task.kind)
  if check == 'code':
    # Before the model has written anything, not after.
    evals.require_sandbox()
  kind = _KINDS.get(check, evals.Question)
  items = evals.load_items(
    options['items'],
    kind,
    max_items=options['max_items'] or None,
    format=options['format'],
    shots=options['shots'],
  )
  return items, evals.items_sha256(items)


def run(
  task: _suite.Task,
  loaded: Loaded,
  tokenizer: Any,
  found: Any,
  baseline: Callable[[], Loaded | None],
) -> dict[str, Any] | None:
  """Returns scores by item; `None` if the model cannot do such a task.

  Args:
    task: The task.
    loaded: The model.
    tokenizer: Its tokenizer.
    found: Data of `data_of`.
    baseline: The model to time it beside; `None` for the baseline itself.
  """
  begun = time.monotonic()
  if task.kind == 'speed':
    scores = _speed.measure(loaded, baseline(), task.options)
  elif task.kind == 'perplexity':
    scores = _perplexity(loaded, *found)
  elif loaded.model is None:
    return None
  elif task.kind == 'choices':
    result = evals.multiple_choice(
      loaded.model, loaded.params, tokenizer, found, progress=True
    )
    scores = {'scores': [result.correct.tolist()], **_names(found)}
  else:
    scores = {'scores': _generate(task, loaded, tokenizer, found)}
    scores |= _names(found)
  return (
    None
    if scores is None
    else {
      **scores,
      'seconds': time.monotonic() - begun,
    }
  )


def _names(items: Any) -> dict[str, Any]:
  return {
    'ids': [item.id for item in items],
    'clusters': [item.cluster for item in items],
  }


def _perplexity(
  loaded: Loaded, windows: data.Windows, text_bytes: list[int]
) -> dict[str, Any] | None:
  if loaded.model is not None:
    result = evals.perplexity(
      loaded.model, loaded.params, windows, progress=True
    )
    nll, tokens = result.nll, result.tokens
  elif loaded.peer is not None:
    nll = np.zeros(len(windows.ids))
    tokens = np.zeros(len(windows.ids), np.int64)
    for row, mask, document in zip(
      windows.tokens, windows.score_mask, windows.document, strict=True
    ):
      length = int(np.flatnonzero(mask)[-1]) + 1
      logits = loaded.peer.logits(row[:length])
      values = _nll(logits[:-1], row[1:length])
      nll[document] += values[mask[1:length]].sum()
      tokens[document] += int(mask.sum())
  else:
    return None
  return {
    'nll': nll.tolist(),
    'tokens': tokens.tolist(),
    'text_bytes': text_bytes[: len(windows.ids)],
    'ids': list(windows.ids),
  }


def _nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
  top = logits.max(axis=1)
  total = np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)
  return np.log(total) + top - logits[np.arange(len(targets)), targets]


def _generate(
  task: _suite.Task, loaded: Loaded, tokenizer: Any, items: Any
) -> list[list[float]]:
  """Scores by run and item."""
  options = task.options
  stops = tuple(options['stops'])
  if options['check'] == 'code' and not stops:
    stops = evals.CODE_STOPS
  runs = []
  for seed in options['seeds']:
    written = evals.generate(
      (loaded.model, loaded.params, tokenizer),
      [item.prompt for item in items],
      max_new_tokens=options['max_new_tokens'],
      temperature=options['temperature'],
      seed=int(seed) * len(items),
      stops=stops,
      progress=True,
    )
    runs.append(evals.score(items, written, options['check']).tolist())
  return runs


def free(loaded: Loaded) -> None:
  """Lets go of a model before the next one is loaded."""
  loaded.model = loaded.params = None
  if loaded.peer is not None:
    loaded.peer.__exit__()
    loaded.peer = None
  gc.collect()
  jax.clear_caches()
  try:
    ctypes.CDLL(None).malloc_trim(0)
  except AttributeError:
    pass  # Not glibc.
