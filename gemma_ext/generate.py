# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Text from a checkpoint, printed as it comes.

python -m gemma_ext.generate --checkpoint=DIR --prompt='The capital of France'
python -m gemma_ext.generate --checkpoint=DIR --chat --prompt='Hello!'
"""

from collections.abc import Sequence
import dataclasses
import sys
import time
from typing import Any

from absl import flags
import dialog
from gemma import gm
import jax.numpy as jnp

from gemma_ext import _cli
from gemma_ext import ckpts
from gemma_ext import errors
from gemma_ext import text


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  _cli.define_checkpoint(values)
  flags.DEFINE_string(
    'prompt', None, 'Text to go on from.', required=True, flag_values=values
  )
  flags.DEFINE_integer(
    'max_new_tokens', 64, 'At most that many.', 1, flag_values=values
  )
  flags.DEFINE_float(
    'temperature',
    0.0,
    '0 takes the likeliest token, 1 samples as the model predicts.',
    0.0,
    flag_values=values,
  )
  flags.DEFINE_integer('seed', 0, 'Seed of the sampling.', flag_values=values)
  flags.DEFINE_boolean(
    'chat',
    False,
    'Format the prompt as a turn of a chat (instruction-tuned checkpoints).',
    flag_values=values,
  )
  flags.DEFINE_string(
    'speculative',
    None,
    'Parts of the model that draft, verified in one pass: some of planes=N,'
    ' layers=N or start:stop:step, head_rows=N, and tokens=N a round. The text'
    " is the same. Example: 'layers=::2,head_rows=32768,tokens=3'.",
    flag_values=values,
  )
  flags.DEFINE_string(
    'budget',
    None,
    "Of a model with sparse experts: what a token may cost, '50%' of the"
    " experts' parameters, '20mJ' or '15ms' by the cost model.",
    flag_values=values,
  )


def _run(args: Any) -> None:
  if not args.prompt:
    raise errors.DataError('--prompt is empty. Give a text to go on from.')
  budget = args.budget and text.Budget.parse(args.budget)
  speculative = None
  if args.speculative is not None:
    speculative = text.Speculative.parse(args.speculative)
  _cli.note(f'Loading {args.checkpoint} ...')
  checkpoint = ckpts.load(
    args.checkpoint,
    dtype=jnp.dtype(args.dtype),
    progress=sys.stderr.isatty(),
  )
  if budget:
    params = text.with_budget(checkpoint.model, checkpoint.params, budget)
    checkpoint = dataclasses.replace(checkpoint, params=params)
  prompt = args.prompt
  if args.chat:
    prompt = dialog.Conversation(dialog.User(prompt))
  sampling: gm.text.SamplingMethod = gm.text.Greedy()
  if args.temperature:
    sampling = gm.text.RandomSampling(temperature=args.temperature)
  start = time.monotonic()
  stream = text.stream(
    checkpoint,
    prompt,
    max_new_tokens=args.max_new_tokens,
    sampling=sampling,
    seed=args.seed,
    speculative=speculative,
  )
  for piece in stream:
    print(piece, end='', flush=True)
  print(flush=True)
  seconds = time.monotonic() - start
  _cli.note(
    f'{len(stream.tokens)} tokens in {seconds:.1f} s, compilation included'
  )
  if speculative is not None:
    _cli.note(
      f'{stream.acceptance or 0:.0%} of the drafts taken,'
      f' {stream.tokens_per_round or 0:.2f} tokens a pass of the model'
    )


if __name__ == '__main__':
  sys.exit(main())
