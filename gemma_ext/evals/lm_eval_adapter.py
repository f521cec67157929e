# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Our models in lm-eval, whose whole catalogue of tasks then runs on them.

    import lm_eval
    from gemma_ext.evals import lm_eval_adapter

    model = lm_eval_adapter.Model('out/mine')
    task = lm_eval_adapter.local_task('arc_easy', 'arc.jsonl')
    lm_eval.simple_evaluate(model=model, tasks=[task])

Needs `pip install 'gemma_ext[lm-eval]'`; no PyTorch. This module alone imports
lm-eval, and nothing of the package imports this module.
"""

from __future__ import annotations

from collections.abc import Sequence
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_ext import ckpts
from gemma_ext import errors
from gemma_ext.evals import _generation
from gemma_ext.evals import _likelihoods

try:
  from lm_eval import tasks
  from lm_eval import utils as lm_utils
  from lm_eval.api import model as lm_model
  from lm_eval.tasks import _yaml_loader
except ImportError as e:
  raise errors.OptionalDependencyError(
    "This adapter needs lm-eval: pip install 'gemma_ext[lm-eval]'."
  ) from e

_MAX_NEW_TOKENS = 256


class Model(lm_model.LM):
  """A checkpoint, dense or compressed, as lm-eval wants a model.

  Attributes:
    max_length: Tokens of a window; contexts that are longer lose their begin.
  """

  def __init__(
    self,
    checkpoint: str | os.PathLike[str] | ckpts.Checkpoint,
    *,
    max_length: int = 2048,
  ):
    """Loads a checkpoint.

    Args:
      checkpoint: Anything that `gx.ckpts.load` takes, or what it returned.
      max_length: Tokens of a window, at least 3.

    Raises:
      TokenizerError: If it has no tokenizer.
      ConfigError: If `max_length` is below 3.
    """
    super().__init__()
    if max_length < 3:
      raise errors.ConfigError(f'{max_length=}; expected at least 3.')
    if not isinstance(checkpoint, ckpts.Checkpoint):
      checkpoint = ckpts.load(checkpoint, dtype=jnp.bfloat16)
    if checkpoint.tokenizer is None:
      raise errors.TokenizerError(
        f'{checkpoint.source!r} has no tokenizer, which lm-eval needs.'
      )
    self.max_length = max_length
    self._model, self._params = checkpoint.model, checkpoint.params
    self._tokenizer: Any = checkpoint.tokenizer

  def loglikelihood(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """Nats of continuations, and whether greedy decoding would write them.

    Args:
      requests: Instances whose `args` are context and continuation.
      disable_tqdm: Whether to show no bar.

    Raises:
      DataError: If a continuation adds no token, or has more than a window.
    """
    rows = []
    for request in requests:
      context, continuation = request.args
      ids, start = _likelihoods.encode(self._tokenizer, context, continuation)
      rows.append(self._fit(ids, start, continuation))
    return self._score(rows, disable_tqdm)

  def loglikelihood_rolling(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[float]:
    """Nats of whole texts, every token once, each window after a BOS.

    Args:
      requests: Instances whose `args` are a text.
      disable_tqdm: Whether to show no bar.
    """
    rows, of = [], []
    bos = int(self._tokenizer.special_tokens.BOS)
    for n, request in enumerate(requests):
      (text,) = request.args
      windows = lm_utils.get_rolling_token_windows(
        token_list=list(map(int, self._tokenizer.encode(text))),
        prefix_token=bos,
        # Later windows begin with BOS and one token of context.
        max_seq_len=self.max_length - 2,
        context_len=1,
      )
      for window in windows:
        context, ids = lm_utils.make_disjoint_window(window)
        before = [bos, *(t for t in context if t != bos)]
        rows.append(([*before, *ids], len(before)))
        of.append(n)
    found = self._score(rows, disable_tqdm)
    sums = np.zeros(len(requests))
    np.add.at(sums, of, [value for value, _ in found])
    return sums.tolist()

  def generate_until(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[str]:
    """Continuations up to a stop.

    Args:
      requests: Instances whose `args` are a context and keywords: `until`,
        `max_gen_toks`, `do_sample`, `temperature`.
      disable_tqdm: Whether to show no bar.
    """
    del disable_tqdm
    out = []
    for request in requests:
      context, options = request.args
      until = options.get('until') or ()
      sampled = options.get('do_sample', False)
      out += _generation.generate(
        (self._model, self._params, self._tokenizer),
        [context],
        max_new_tokens=int(options.get('max_gen_toks', _MAX_NEW_TOKENS)),
        temperature=float(options.get('temperature', 1.0)) if sampled else 0.0,
        stops=[until] if isinstance(until, str) else list(until),
      )
    return out

  def _fit(
    self, ids: list[int], start: int, continuation: str
  ) -> tuple[list[int], int]:
    """The end of the row that a window holds, BOS kept."""
    if start >= len(ids):
      raise errors.DataError(
        f'The continuation {continuation!r} adds no token to its context.'
      )
    surplus = len(ids) - self.max_length
    if surplus <= 0:
      return ids, start
    if start - surplus < 1:
      raise errors.DataError(
        f'A continuation of {len(ids) - start} tokens and BOS do not fit'
        f' max_length={self.max_length}.'
      )
    return [ids[0], *ids[1 + surplus :]], start - surplus

  def _score(
    self, rows: Sequence[Any], disable_tqdm: bool
  ) -> list[tuple[float, bool]]:
    sums, greedy = _likelihoods.score(
      self._model, self._params, rows, progress=not disable_tqdm
    )
    if not np.isfinite(sums).all():
      raise errors.NonFiniteError(
        f'{int((~np.isfinite(sums)).sum())} log-likelihoods are not finite.'
      )
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def local_task(name: str, path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns a task of lm-eval's catalogue that reads its data from a file.

  Args:
    name: The task's.
    path: JSON lines in the schema of the task's own data set.

  Raises:
    ConfigError: If the catalogue has no such single task.
  """
  manager = tasks.TaskManager()
  entry = manager.task_index.get(name)
  if entry is None or entry.yaml_path is None:
    raise errors.ConfigError(f'lm-eval has no task {name!r} in a file.')
  config = dict(_yaml_loader.load_yaml(entry.yaml_path))
  config.pop('dataset_name', None)
  config.pop('training_split', None)
  config.pop('validation_split', None)
  return config | {
    'task': name,
    'dataset_path': 'json',
    'dataset_kwargs': {'data_files': {'test': os.fspath(path)}},
    'test_split': 'test',
  }
