# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""One model on one task: scores by item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import _cli
from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import data
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext.ckpts import _sample
from gemma_ext.compress import __main__ as compress_main
from tools.benchmarks import _shapes
from tools.benchmarks import _speed
from tools.benchmarks import _suite
from tools.benchmarks.peers import _jax_peers
from tools.benchmarks.peers import _llama_cpp
from tools.benchmarks.peers import _requantize

_KINDS = {'choices': evals.Choice, 'code': evals.Program}
# Below so many clusters their intervals are wide and not to be relied on.
_FEW_CLUSTERS = 10
_MAX_ABOUT = 64 << 20


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
    calibration: What it was calibrated on on the way; `None` if it was not.
    stands_in: Whether it is the dense model with the weights of another one,
      so that its speed says nothing.
  """

  nbytes: int
  dense_bytes: int
  model: Any = None
  params: Any = None
  peer: Any = None
  shape: Any = None
  calibration: Any = None
  stands_in: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
  """The data of a task, before any tokenizer.

  Attributes:
    sha256: Hash of them; '' of tasks without.
    data: Documents or items.
  """

  sha256: str = ''
  data: Any = None


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
      stands_in=_jax_peers.stands_in(spec.peer),
    ), found.tokenizer or tokenizer
  with _compressed(spec) as (source, calibration):
    found = ckpts.load(source, dtype=jnp.bfloat16)
    if found.tokenizer is not None:
      found.tokenizer.encode('a')  # Reads its file, which may not stay.
  sizes = evals.weight_sizes(found.model, found.params)
  loaded = Loaded(
    nbytes=sizes.weight_bytes,
    dense_bytes=sizes.dense_bf16_bytes,
    model=found.model,
    params=found.params,
    calibration=calibration,
  )
  return loaded, found.tokenizer or tokenizer


@contextlib.contextmanager
def _compressed(spec: _suite.Model) -> Iterator[tuple[str, Any]]:
  """Where a checkpoint lies, compressed by the command if it is to be.

  And what it was calibrated on.
  """
  if not spec.is_compressed:
    yield spec.source, None
    return
  with tempfile.TemporaryDirectory() as folder:
    output, about = f'{folder}/compressed', f'{folder}/about.json'
    argv = [f'--checkpoint={spec.source}', f'--output={output}']
    argv.append(f'--json={about}')
    for name in ('recipe', 'budget', 'calibration'):
      if value := getattr(spec, name):
        argv.append(f'--{name}={value}')
    if spec.compensate:
      argv.append('--compensate')
    values = flags.FlagValues()
    # pylint: disable=protected-access
    compress_main._define_flags(values)
    values(['compress', *argv])
    with contextlib.redirect_stdout(sys.stderr):
      compress_main._run(values)
    # pylint: enable=protected-access
    found = recipe_lib.read_json(about, _MAX_ABOUT)
    yield output, found['calibration']


def _shape(spec: _suite.Model) -> Loaded:
  model = _shapes.dense(_suite.shape_class(spec))
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
  # Open files outlive their names.
  with tempfile.TemporaryDirectory() as folder:
    try:
      if spec.quantize:
        made = pathlib.Path(folder) / 'quantized.gguf'
        _requantize.requantize(path, made, spec.quantize)
        path = made
      # Without the vocabulary, which ours are counted without as well.
      nbytes = _requantize.tensor_bytes(path)
    except errors.GemmaExtError:
      raise
    except (ValueError, KeyError, IndexError, OSError) as e:  # Of `gguf`.
      raise errors.CheckpointError(
        f'Model {spec.name!r}: {source!r} cannot be read or quantised: {e}'
      ) from e
    peer = _llama_cpp.LlamaCpp(path)
  return Loaded(nbytes=nbytes, dense_bytes=0, peer=peer)


def source_of(task: _suite.Task) -> Source:
  """Reads the data of a task.

  Args:
    task: The task.

  Raises:
    DataError: If they cannot be read, or all items share one cluster.
  """
  options = task.options
  if task.kind == 'speed':
    return Source()
  if task.kind == 'perplexity':
    documents = data.load_documents(
      options['text'], text_field=options['text_field']
    )
    split = options['split']
    if split == 'auto':
      split = 'test' if options['text'] == 'sample' else 'all'
    if split != 'all':
      documents = getattr(data.split(tuple(documents)), split).documents
    # In their order, and as they stand.
    digest = hashlib.sha256(json.dumps([d.text for d in documents]).encode())
    return Source(sha256=digest.hexdigest(), data=documents)
  kind = _KINDS.get(options.get('check', task.kind), evals.Question)
  items = evals.load_items(
    options['items'],
    kind,
    max_items=options['max_items'] or None,
    format=options['format'],
    shots=options['shots'],
  )
  _check_clusters(task.name, [item.cluster for item in items])
  return Source(sha256=evals.items_sha256(items), data=items)


def _check_clusters(name: str, clusters: Sequence[str]) -> None:
  count = len(set(clusters))
  if count == 1 < len(clusters):
    raise errors.DataError(
      f'Task {name!r}: all {len(clusters)} items are of one cluster,'
      f' {clusters[0]!r}, from which no interval follows. Leave clusters out if'
      ' the items are drawn one by one.'
    )
  if count < min(_FEW_CLUSTERS, len(clusters)):
    _cli.note(
      f'{name}: {count} clusters are few; do not rely on its intervals.'
    )


def data_of(
  task: _suite.Task, source: Source, tokenizer: Any
) -> tuple[Any, str]:
  """Returns the data of a task as models take them, and their hash.

  Args:
    task: The task.
    source: Of `source_of`.
    tokenizer: The baseline's.
  """
  if task.kind != 'perplexity':
    return source.data, source.sha256
  windows = data.windows(
    tokenizer,
    source.data,
    length=task.options['window'],
    max_tokens=task.options['max_tokens'] or None,
  )
  return (windows, _scored_bytes(windows, tokenizer)), windows.sha256


def run(
  task: _suite.Task,
  loaded: Loaded,
  tokenizer: Any,
  found: Any,
  baseline: Callable[[], Loaded | None],
) -> dict[str, Any] | None:
  """Returns scores by item; `None` if the model cannot do such a task.

  Raises `NonFiniteError` if the model gives NaN or infinity.

  Args:
    task: The task.
    loaded: The model.
    tokenizer: Its tokenizer.
    found: Data of `data_of`.
    baseline: The model to time it beside; `None` for the baseline itself.
  """
  begun = time.monotonic()
  if task.kind == 'speed':
    if loaded.stands_in:
      _cli.note('  Its weights are run by the dense model: not timed.')
      return None
    # Another size is no comparison.
    beside = None if loaded.shape is not None else baseline()
    scores = _speed.measure(loaded, beside, task.options)
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


def _scored_bytes(windows: data.Windows, tokenizer: Any) -> list[int]:
  """Bytes in UTF-8 of the text of the tokens that are scored, by document."""
  found: list[list[int]] = [[] for _ in windows.ids]
  for row, mask, document in zip(
    windows.tokens, windows.score_mask, windows.document, strict=True
  ):
    found[document] += row[mask].tolist()
  # Of whole documents: a character may have several tokens.
  return [len(tokenizer.decode(tokens).encode()) for tokens in found]


def _perplexity(
  loaded: Loaded, windows: data.Windows, scored_bytes: list[int]
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
  if not np.isfinite(nll).all():
    name = windows.ids[int(np.argmin(np.isfinite(nll)))]
    raise errors.NonFiniteError(
      f'The model gives {nll[~np.isfinite(nll)][0]} nats for {name!r}.'
    )
  return {
    'nll': nll.tolist(),
    'tokens': tokens.tolist(),
    'scored_bytes': scored_bytes,
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
