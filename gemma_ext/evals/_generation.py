# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Answers that a model writes, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import re
from typing import Any

from gemma import gm
import numpy as np

from gemma_ext import errors
from gemma_ext import text
from gemma_ext.evals import _formats
from gemma_ext.evals import _items
from gemma_ext.evals import _progress
from gemma_ext.evals import _sandbox

# Where a function of HumanEval ends.
CODE_STOPS = ('\nclass ', '\ndef ', '\n#', '\nif __name__', '\nprint(', '\n@')
_NUMBER = re.compile(r'-?\d[\d,]*(?:\.\d+)?')


def generate(
  checkpoint: Iterable[Any],
  prompts: Sequence[str],
  *,
  max_new_tokens: int,
  temperature: float = 0.0,
  seed: int = 0,
  stops: Sequence[str] = (),
  progress: bool = False,
) -> list[str]:
  """Lets a model go on from every prompt.

  Args:
    checkpoint: Model, parameters and tokenizer.
    prompts: What it goes on from.
    max_new_tokens: Of each text.
    temperature: 0 for the likeliest tokens.
    seed: Of the sampling; each prompt adds its number.
    stops: Texts that end it, and are not part of it.
    progress: Whether to show a bar.

  Returns:
    The continuations.
  """
  model, params, tokenizer = checkpoint
  sampling: gm.text.SamplingMethod = gm.text.Greedy()
  if temperature:
    sampling = gm.text.RandomSampling(temperature=temperature)
  out = []
  for i, prompt in enumerate(
    _progress.track(prompts, 'generate', enabled=progress)
  ):
    written = ''
    for piece in text.stream(
      (model, params, tokenizer),
      prompt,
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      seed=seed + i,
    ):
      written += piece
      if any(stop in written for stop in stops):
        break
    for stop in stops:
      written = written.split(stop, 1)[0]
    out.append(written)
  return out


def exact_match(answer: str, written: str) -> float:
  """1 if what was written is the answer, all of it.

  Case, punctuation and white space do not count.

  Args:
    answer: The right answer.
    written: What the model wrote.
  """
  want = _plain(answer)
  if not want:  # Of signs alone.
    return float(answer.strip() == written.strip())
  return float(want == _plain(written))


def last_number(answer: str, written: str) -> float:
  """1 if the last number that was written is that of the answer (GSM8K).

  Args:
    answer: A text whose last number is right.
    written: What the model wrote.

  Raises:
    DataError: If the answer has no number.
  """
  want = _last_number(answer)
  if want is None:
    raise errors.DataError(f'The answer {answer!r} has no number.')
  got = _last_number(written)
  return float(got is not None and got == want)


def passes(
  item: _items.Program, written: str, *, seconds: float = 10.0
) -> float:
  """1 if the program that was written passes its test, confined.

  To pass is to reach the end of the test: a program that ends early does not,
  whatever its exit status.

  Args:
    item: The program's beginning and its test.
    written: What the model wrote after it.
    seconds: How long it may take.

  Raises:
    BackendError: If this system cannot confine a program.
  """
  program = '\n'.join(
    [item.prompt + written, item.test, f'check({item.entry_point})', '']
  )
  return float(_sandbox.run(program, seconds=seconds).ok)


CHECKS: dict[str, Callable[[str, str], float]] = {
  'boxed': _formats.same_math,
  'exact_match': exact_match,
  'last_number': last_number,
}


def score(
  items: Sequence[Any], written: Sequence[str], check: str
) -> np.ndarray:
  """Scores what was written, item by item.

  Args:
    items: `Question`s, or `Program`s for the check 'code'.
    written: The continuations.
    check: 'exact_match', 'last_number', 'boxed' or 'code'.

  Returns:
    float64 [N].

  Raises:
    DataError: If there is no such check.
  """
  if check == 'code':
    found = [passes(i, w) for i, w in zip(items, written, strict=True)]
  elif check in CHECKS:
    found = [
      CHECKS[check](i.answer, w) for i, w in zip(items, written, strict=True)
    ]
  else:
    raise errors.DataError(f'{check=}; expected one of {["code", *CHECKS]}.')
  return np.array(found, np.float64)


def _plain(value: str) -> str:
  words = re.sub(r'[^\w\s.-]', ' ', value.lower()).split()
  # A minus before a number counts.
  words = [re.sub(r'^[.-]+(?!\d)|^[.-]*(?=-\d)|[.-]+$', '', w) for w in words]
  return ' '.join(filter(None, words))


def _last_number(value: str) -> float | None:
  found = _NUMBER.findall(value)
  return float(found[-1].replace(',', '')) if found else None
