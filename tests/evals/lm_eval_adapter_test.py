# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of our models in lm-eval, where it is installed."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import ckpts
from gemma_ext import errors
from tests import tiny

lm_eval = pytest.importorskip('lm_eval')

# pylint: disable-next=g-import-not-at-top
from gemma_ext.evals import lm_eval_adapter  # noqa: E402

_TEXT = 'the capital of a group is one river that flows'


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  path = tiny.checkpoint(tmp_path_factory.mktemp('lm') / 'dense')
  return ckpts.load(path, dtype=jnp.float32)


def _requests(*args):
  return [types.SimpleNamespace(args=a) for a in args]


def _log_probs(found, ids):
  out = found.model.apply({'params': found.params}, jnp.asarray([ids]))
  return np.asarray(jax.nn.log_softmax(out.logits[0].astype(jnp.float32)))


def test_log_likelihoods(found):
  lm = lm_eval_adapter.Model(found)
  encode = found.tokenizer.encode
  ids = [2, *encode(_TEXT), *encode(' of')]
  logs = _log_probs(found, ids)
  likeliest = found.tokenizer.decode([int(logs[-2].argmax())])
  pairs = [(_TEXT, ' of'), ('', _TEXT)]
  (value, greedy), (whole, _) = lm.loglikelihood(
    _requests(*pairs), disable_tqdm=True
  )
  assert value == pytest.approx(logs[-2, ids[-1]], abs=1e-3)
  assert greedy == (likeliest == found.tokenizer.decode([ids[-1]]))
  expected = sum(logs[i, ids[i + 1]] for i in range(len(ids) - 2))
  assert whole == pytest.approx(expected, abs=0.05)
  # The same text in one window; in windows of 6 every token counts once.
  (rolling,) = lm.loglikelihood_rolling(_requests((_TEXT,)), disable_tqdm=True)
  assert rolling == pytest.approx(whole, abs=0.05)
  short = lm_eval_adapter.Model(found, max_length=6)
  (cut,) = short.loglikelihood_rolling(_requests((_TEXT,)), disable_tqdm=True)
  assert cut != pytest.approx(whole, abs=1e-3)
  count = len(encode(_TEXT))
  assert cut == pytest.approx(-count * math.log(512), rel=0.3)
  with pytest.raises(errors.DataError, match='do not fit max_length=6'):
    short.loglikelihood(_requests(('', _TEXT)), disable_tqdm=True)


def test_a_task_of_its_catalogue(found, tmp_path):
  """ARC, its prompt and its metrics, from lines in a file."""
  rows = [
    {
      'question': f'{_TEXT} {i}',
      'choices': {'text': ['river', 'capital'], 'label': ['A', 'B']},
      'answerKey': 'AB'[i % 2],
    }
    for i in range(6)
  ]
  path = tmp_path / 'arc.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  result = lm_eval.simple_evaluate(
    model=lm_eval_adapter.Model(found),
    tasks=[lm_eval_adapter.local_task('arc_easy', path)],
    bootstrap_iters=0,
  )
  assert result['results']['arc_easy']['acc,none'] in (0, 1 / 3, 0.5, 2 / 3, 1)
  assert len(result['samples']['arc_easy']) == 6


def test_texts_end_at_a_stop(found):
  lm = lm_eval_adapter.Model(found)
  options = {'until': ['zzz'], 'max_gen_toks': 4}
  (text,) = lm.generate_until(_requests((_TEXT, options)))
  assert text
  options = {'until': text[:2], 'max_gen_toks': 4}
  assert lm.generate_until(_requests((_TEXT, options))) == ['']
