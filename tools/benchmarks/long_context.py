# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Long contexts: caches with a slot a token against caches that roll.

  python -m tools.benchmarks.long_context [--shape=1b] [--context=32768] \
      [--json=FILE]

Real shapes, random weights (`--recipe` as in `tools.benchmarks.decode`). Bytes
of the cache, seconds a token behind such a context, in turn, and what a prefill
takes: bytes that its compiled program needs beside weights and cache, and
seconds, of a length at which both ways fit (`--both`) and of the whole context
in pieces.
"""

from collections.abc import Sequence
import sys
from typing import Any

from absl import flags
from gemma.gm.utils import _types
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import _cli
from gemma_ext import errors
from gemma_ext import nn as gx_nn
from gemma_ext.text import _prompt
from tools.benchmarks import _shapes
from tools.benchmarks import _timing
from tools.benchmarks import decode


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  def integer(name: str, default: int, text: str, least: int = 1) -> None:
    flags.DEFINE_integer(
      name, default, text, lower_bound=least, flag_values=values
    )

  flags.DEFINE_enum(
    'shape', '1b', [*_shapes.MODELS], 'The model.', flag_values=values
  )
  flags.DEFINE_enum(
    'recipe', 'mix4', [*decode.RECIPES], 'Of its weights.', flag_values=values
  )
  integer('context', 32_768, 'Tokens.', 64)
  integer('both', 4096, 'Tokens of the prefill of both ways; 0 for none.', 0)
  integer('rounds', 7, 'Rounds of decoding.')
  integer('prefill_rounds', 3, 'Rounds of the prefill of both ways.')
  integer('tokens', 8, 'Tokens decoded in a round.')
  flags.DEFINE_boolean(
    'whole', True, 'Whether to prefill all of it.', flag_values=values
  )
  flags.DEFINE_boolean(
    'official', True, 'Whether to run the dense model.', flag_values=values
  )
  flags.DEFINE_string('json', None, 'File for the results.', flag_values=values)


def _full(model: Any, length: int) -> Any:
  return model.init_cache(batch_size=1, dtype=jnp.bfloat16, cache_length=length)


def _rolling(model: Any, length: int) -> Any:
  return gx_nn.rolling_cache(
    model, cache_length=length, step=_prompt.PIECE, dtype=jnp.bfloat16
  )


def _decoding(args: Any, model: Any, params: Any) -> dict[str, Any]:
  """Seconds a token, and bytes of the caches."""
  length = args.context + 512
  caches = {'full': _full(model, length), 'rolling': _rolling(model, length)}
  sizes = {name: _shapes.nbytes(cache) for name, cache in caches.items()}
  contenders = {
    name: _shapes.Decoding(
      model, params, _shapes.random_cache(cache), context=args.context
    )
    for name, cache in caches.items()
  }
  if args.official:
    dense = _shapes.dense(args.shape)
    contenders['official'] = _shapes.Decoding(
      dense,
      _shapes.random_params(dense),
      _shapes.random_cache(_full(dense, length)),
      context=args.context,
      official=True,
    )
    sizes['official'] = sizes['full']
  del caches
  for contender in contenders.values():
    contender.seconds(args.tokens)
  times = _timing.rounds(
    {
      name: lambda c=c: c.seconds(args.tokens) for name, c in contenders.items()
    },
    args.rounds,
    _cli.note,
  )
  return {
    name: {
      'cache_bytes': sizes[name],
      'seconds_per_token': _timing.summary(taken),
      'times_as_fast_as_full': _timing.ratio(times['full'], taken),
    }
    for name, taken in times.items()
  }


def _inputs(model: Any, tokens: np.ndarray) -> _types.Input:
  return _types.Input(
    text=jnp.asarray(tokens[None], jnp.int32),
    images=None,
    config=model.config.input_config,
  )


def _temporary(args: Any, model: Any, params: Any) -> dict[str, int]:
  """Bytes that the programs of a prefill need beside weights and cache."""
  whole = args.context
  piece = min(_prompt.PIECE, whole)

  def program(cache: Any, tokens: int) -> int:
    total = max(x['k'].shape[1] for x in cache.values())
    shaped = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    # pylint: disable-next=protected-access
    lowered = _prompt._fill.lower(
      model, params, cache, shaped(1, tokens), shaped(), total=total
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes

  at_once = jax.eval_shape(lambda: _full(model, whole))
  in_pieces = jax.eval_shape(lambda: _rolling(model, whole + 512))
  return {
    'at once': program(at_once, whole),
    'in pieces': program(in_pieces, piece),
  }


def _prefills(args: Any, model: Any, params: Any) -> dict[str, Any]:
  """Seconds of prefills."""
  rng = np.random.default_rng(0)
  kwargs = {'max_out_length': 64, 'rng': jax.random.key(0)}

  def run(how: str, count: int, most: int = 0) -> float:
    room = max(count, most) + 64
    inputs = _inputs(model, rng.integers(*_shapes.TOKENS, count))

    def call() -> None:
      if how == 'at once':
        state = _prompt.at_once(model, params, inputs, room=room, **kwargs)
      else:
        state = _prompt.in_pieces(
          model, params, inputs, room=room, step=_prompt.PIECE, **kwargs
        )
      jax.block_until_ready(state.cache)

    return _timing.seconds(call)

  found: dict[str, Any] = {}
  if args.both:
    names = ('at once', 'in pieces')
    for how in names:
      run(how, args.both)
    times = _timing.rounds(
      {how: lambda how=how: run(how, args.both) for how in names},
      args.prefill_rounds,
      _cli.note,
    )
    found = {
      how: {'tokens': args.both, 'seconds': _timing.summary(taken)}
      for how, taken in times.items()
    }
    found['in pieces']['times_as_fast_as_at_once'] = _timing.ratio(
      times['at once'], times['in pieces']
    )
  if args.whole:
    # Compiles all that the whole one needs.
    run('in pieces', args.context % _prompt.PIECE + _prompt.PIECE, args.context)
    found['whole'] = {
      'tokens': args.context,
      'seconds': run('in pieces', args.context),
    }
  return found


def _run(args: Any) -> None:
  _cli.check_output(args.json)
  if args.both > args.context:
    raise errors.ConfigError('--both must be at most --context.')
  model, params = _shapes.compressed(args.shape, decode.RECIPES[args.recipe])
  result: dict[str, Any] = {
    'machine': _timing.machine(),
    'shape': args.shape,
    'recipe': args.recipe,
    'context': args.context,
    'weight_bytes': _shapes.nbytes(params),
  }
  result['decoding'] = _decoding(args, model, params)
  rows = [
    (
      name,
      _cli.human_bytes(found['cache_bytes']),
      f'{found["seconds_per_token"]["median"] * 1e3:.1f}',
      f'{found["times_as_fast_as_full"]["median"]:.2f}',
    )
    for name, found in result['decoding'].items()
  ]
  _cli.print_table(
    f'{args.shape} {args.recipe}, behind {args.context} tokens',
    ('cache', 'its bytes', 'ms a token', 'x full'),
    rows,
  )
  result['temporary_bytes'] = _temporary(args, model, params)
  result['prefill'] = _prefills(args, model, params)
  rows = [
    (how, _cli.human_bytes(size), '', '')
    for how, size in result['temporary_bytes'].items()
  ]
  for how, found in result['prefill'].items():
    seconds = found['seconds']
    if isinstance(seconds, dict):
      seconds = seconds['median']
    rows.append((how, '', f'{found["tokens"]}', f'{seconds:.1f}'))
  _cli.print_table(
    f'prefill of {args.shape}',
    ('', f'temporary bytes, {args.context} tokens', 'tokens', 's'),
    rows,
  )
  if args.json:
    _cli.write_json(args.json, result)


if __name__ == '__main__':
  sys.exit(main())
