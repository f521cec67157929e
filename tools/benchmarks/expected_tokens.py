# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Do tokens of other texts come as often as `gx.compress.statistics` expects?

  python -m tools.benchmarks.expected_tokens [--others=FILE.jsonl] [--json=FILE]

Counts the tokens of the calibration split of `--text`. Then, for the test split
of it and for every other text, how many tokens were never counted, how likely
the text is if tokens come as expected, and what an ideal table would lose whose
rows have bits for that: errors of b bits are 4^-b, between 1.6 and 8 bits, 3.5
in the mean. Beside it the same for counts alone with a tenth or three tenths of
all tokens spread over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import sys
from typing import Any

from absl import flags
import numpy as np

from gemma_ext import _budgeted
from gemma_ext import _cli
from gemma_ext import ckpts
from gemma_ext import data
from gemma_ext.compress import _expected
from tools.benchmarks import _texts
from tools.benchmarks import _timing

_BITS, _LEAST, _MOST = 3.5, 1.6, 8.0
_SPREAD = (0.1, 0.3)
_SPECIAL = 4  # Padding, ends, and what is unknown.


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  _texts.define_flags(values)
  flags.DEFINE_list('others', [], 'Other texts, whole.', flag_values=values)
  flags.DEFINE_string('json', None, 'File for the results.', flag_values=values)


def _run(args: Any) -> None:
  _cli.check_output(args.json)
  others = {name: data.load_documents(name) for name in args.others}
  checkpoint = ckpts.load(args.checkpoint)
  table = np.asarray(checkpoint.params['embedder']['input_embedding'])
  texts = _texts.Texts.of(checkpoint, args.text, tokens=_budgeted.COUNTED)
  calibration = texts.calibration
  count = functools.partial(_counts, size=len(table))
  counted = count(calibration.fitted) + count(calibration.counted)
  uniform = np.full(len(table), 1 / len(table))
  frequency = counted / counted.sum()
  guesses = {'expected': _expected.expected(counted, table)} | {
    f'counts, {share:.0%} spread': (1 - share) * frequency + share * uniform
    for share in _SPREAD
  }
  bits = {name: _bits(guess) for name, guess in guesses.items()}
  found = {f'{args.text}, test split': count(texts.test.tokens)} | {
    name: count(checkpoint.tokenizer.encode(' '.join(d.text for d in some)))
    for name, some in others.items()
  }
  out, rows = [], []
  for text, seen in found.items():
    share = seen / seen.sum()
    for name, guess in guesses.items():
      row = {
        'text': text,
        'tokens': int(seen.sum()),
        'never_counted': float(share[counted == 0].sum()),
        'guess': name,
        'nats': float(-share @ np.log(guess)),
        'loss': float(share @ 4.0 ** -bits[name]),
      }
      out.append(row)
      rows.append(
        (
          text,
          f'{row["tokens"]:,}',
          f'{row["never_counted"]:.1%}',
          name,
          f'{row["nats"]:.3f}',
          f'{row["loss"]:.2e}',
        )
      )
  _cli.print_table(
    f'{int(counted.sum()):,} tokens counted',
    ('text', 'tokens', 'never counted', 'taken', 'nats a token', 'ideal loss'),
    rows,
  )
  if args.json:
    _cli.write_json(args.json, {'machine': _timing.machine(), 'rows': out})


def _counts(tokens: Any, size: int) -> np.ndarray:
  """How often each token comes; those that every text has do not count."""
  found = np.bincount(np.ravel(np.asarray(tokens)), minlength=size)
  found = found.astype(np.float64)
  found[:_SPECIAL] = 0
  return found


def _bits(guess: np.ndarray) -> np.ndarray:
  """Bits of each row that lose least, by reverse water-filling."""
  low, high = np.log(1e-16), 0.0
  for _ in range(60):
    level = (low + high) / 2
    found = 0.5 * (np.log(guess) - level) / np.log(2)
    found = np.clip(found, _LEAST, _MOST)
    low, high = (level, high) if found.mean() > _BITS else (low, level)
  return found


if __name__ == '__main__':
  sys.exit(main())
