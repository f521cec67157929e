# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Text from a checkpoint, through the official samplers of `gm`.

python -m gemma_ext.generate --checkpoint=DIR --prompt='The capital of France'
python -m gemma_ext.generate --checkpoint=DIR --chat --prompt='Hello!'
"""

from collections.abc import Iterator, Sequence
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

# Prompts are padded to one of these lengths, and compiled for it once.
_BUCKETS = (64, 256, 1024, 4096)


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


def _run(args: Any) -> None:
  if not args.prompt:
    raise errors.DataError('--prompt is empty. Give a text to go on from.')
  _cli.note(f'Loading {args.checkpoint} ...')
  checkpoint = ckpts.load(
    args.checkpoint,
    dtype=jnp.dtype(args.dtype),
    progress=sys.stderr.isatty(),
  )
  if checkpoint.tokenizer is None:
    raise errors.TokenizerError(
      f'{args.checkpoint!r} has no tokenizer, so the prompt cannot be turned'
      ' into tokens. Put its tokenizer.model beside the checkpoint.'
    )
  start = time.monotonic()
  count = 0
  for done, piece in generate(
    checkpoint.model,
    checkpoint.params,
    checkpoint.tokenizer,
    args.prompt,
    max_new_tokens=args.max_new_tokens,
    temperature=args.temperature,
    seed=args.seed,
    chat=args.chat,
  ):
    print(piece, end='', flush=True)
    count = done
  print(flush=True)
  seconds = time.monotonic() - start
  _cli.note(f'{count} tokens in {seconds:.1f} s, compilation included')


def generate(
  model: Any,
  params: Any,
  tokenizer: gm.text.Tokenizer,
  prompt: str,
  *,
  max_new_tokens: int = 64,
  temperature: float = 0.0,
  seed: int = 0,
  chat: bool = False,
) -> Iterator[tuple[int, str]]:
  """Yields the text that follows a prompt, as it is sampled.

  Gemma 4 has a sampler of its own, which does not stream: there everything
  comes at once.

  Args:
    model: The model.
    params: Its parameters.
    tokenizer: Its tokenizer.
    prompt: Text to go on from, or what the user says in a chat.
    max_new_tokens: At most that many tokens.
    temperature: 0 takes the likeliest token.
    seed: Seed of the sampling.
    chat: Whether to format the prompt as a turn of a chat.

  Yields:
    How many tokens there are so far, and the text that is new.
  """
  if chat:
    turn = dialog.Conversation(dialog.User(prompt))
    prompt = turn.as_text(format=tokenizer.FORMAT)
  length = 1 + len(tokenizer.encode(prompt))
  bucket = next((b for b in _BUCKETS if b >= length), length)
  sampling: gm.text.SamplingMethod = gm.text.Greedy()
  if temperature:
    sampling = gm.text.RandomSampling(temperature=temperature)
  if type(tokenizer) is gm.text.Gemma2Tokenizer:
    tokenizer = ckpts.Gemma2Tokenizer.of(tokenizer)
  gemma4 = model.INFO.tokenizer_version == 4
  sampler = (gm.text.Gemma4Sampler if gemma4 else gm.text.Sampler)(
    model=model,
    params=params,
    tokenizer=tokenizer,
    sampling=sampling,
    cache_length=bucket + max_new_tokens,
    max_out_length=max_new_tokens,
    pad_length=_BUCKETS,
  )
  kwargs = dict(max_new_tokens=max_new_tokens, rng=seed, return_state=True)
  if gemma4:
    out = sampler.sample(prompt, **kwargs)
    ids = [int(i) for i in out.tokens if i]
    yield len(ids), tokenizer.decode(_until_end(tokenizer, ids))
    return
  yield from _stream(tokenizer, sampler.sample(prompt, stream=True, **kwargs))


def _stream(
  tokenizer: gm.text.Tokenizer, states: Iterator[Any]
) -> Iterator[tuple[int, str]]:
  """Yields the new text of each state, whole characters only.

  A character of several byte tokens is no text before its last byte, so all
  tokens are decoded anew each time rather than one by one.
  """
  ids: list[int] = []
  shown = ''
  text = ''
  for out in states:
    ids.append(int(out.state.last_token[0]))
    text = tokenizer.decode(_until_end(tokenizer, ids))
    whole = text.rstrip('\N{REPLACEMENT CHARACTER}')
    if whole.startswith(shown):
      yield len(ids), whole[len(shown) :]
      shown = whole
  if len(text) > len(shown):
    yield len(ids), text[len(shown) :]


def _until_end(tokenizer: gm.text.Tokenizer, ids: list[int]) -> list[int]:
  special = tokenizer.special_tokens
  ends = (special.EOS, special.END_OF_TURN)
  stop = next((n for n, i in enumerate(ids) if i in ends), len(ids))
  return ids[:stop]


if __name__ == '__main__':
  sys.exit(main())
