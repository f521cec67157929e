# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding at the shapes of larger models, random weights, beside llama.cpp.

  python -m tools.benchmarks.shapes [--shapes=1b,4b] [--json=FILE]

Ours: recipes as in `tools.benchmarks.decode`, decoding after a few tokens of
context in one compiled loop. llama.cpp: a file of the same shape as its own
quantiser types it under Q4_0, fed tokens one by one, its sampling left out.
In turn, medians and ratios of a round.
"""

from collections.abc import Sequence
import gc
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags
import jax.numpy as jnp

from gemma_ext import _cli
from gemma_ext import errors
from gemma_ext.ckpts import _sample
from gemma_ext.kernels import _cpu
from tools.benchmarks import _shapes
from tools.benchmarks import _speed
from tools.benchmarks import _timing
from tools.benchmarks import decode
from tools.benchmarks.peers import _llama_cpp
from tools.benchmarks.peers import _random_gguf

_CONTEXT = 16
_CACHE = 512


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_list('shapes', ['1b', '4b'], 'Models.', flag_values=values)
  flags.DEFINE_list('recipes', ['mix4'], 'Ours.', flag_values=values)
  flags.DEFINE_integer(
    'rounds', 9, 'Rounds.', lower_bound=1, flag_values=values
  )
  flags.DEFINE_integer(
    'tokens', 8, 'Tokens of a round.', lower_bound=1, flag_values=values
  )
  flags.DEFINE_string('json', None, 'File for the results.', flag_values=values)


def _shape(name: str, args: Any) -> dict[str, Any]:
  config = _shapes.dense(name).config
  if args.tokens * (args.rounds + 1) + _CONTEXT > _CACHE:
    raise errors.ConfigError(
      f'--rounds and --tokens decode more than {_CACHE - _CONTEXT} tokens.'
    )
  contenders: dict[str, Any] = {}
  sizes: dict[str, int] = {}
  for recipe in args.recipes:
    model, params = _shapes.compressed(name, decode.RECIPES[recipe])
    cache = model.init_cache(
      batch_size=1, dtype=jnp.bfloat16, cache_length=_CACHE
    )
    contenders[recipe] = _shapes.Decoding(
      model, params, cache, context=_CONTEXT
    )
    sizes[recipe] = _shapes.nbytes(params)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / f'{name}.gguf'
    _cli.note(f'writing {path} ...')
    _random_gguf.write(path, config, _sample.sample_path())
    contenders['llama.cpp Q4_0'] = _speed.Peer(
      _llama_cpp.LlamaCpp(path), _CONTEXT
    )
    sizes['llama.cpp Q4_0'] = path.stat().st_size
    gc.collect()
    _cli.note(f'{name}: compiling ...')
    for contender in contenders.values():
      contender.seconds(args.tokens)
    times = _timing.rounds(
      {
        key: lambda c=c: c.seconds(args.tokens) for key, c in contenders.items()
      },
      args.rounds,
      _cli.note,
    )
  return {
    key: {
      'bytes': sizes[key],
      'seconds_per_token': _timing.summary(taken),
      'times_as_fast_as_llama_cpp': _timing.ratio(
        times['llama.cpp Q4_0'], taken
      ),
    }
    for key, taken in times.items()
  }


def _run(args: Any) -> None:
  _cli.check_output(args.json)
  for what, names, known in (
    ('shapes', args.shapes, _shapes.MODELS),
    ('recipes', args.recipes, decode.RECIPES),
  ):
    for name in names:
      if name not in known:
        raise errors.ConfigError(f'--{what}: {name!r} is none of {[*known]}.')
  result: dict[str, Any] = {
    'machine': _timing.machine() | {'instructions': _cpu.instructions()},
    'shapes': {},
  }
  rows = []
  for name in args.shapes:
    found = result['shapes'][name] = _shape(name, args)
    for key, cell in found.items():
      seconds = cell['seconds_per_token']['median']
      ratio = cell['times_as_fast_as_llama_cpp']
      low, high = ratio['ci95']
      ends = '' if low is None else f' [{low:.2f}, {high:.2f}]'
      rows.append(
        (
          name,
          key,
          _cli.human_bytes(cell['bytes']),
          f'{1e3 * seconds:.1f}',
          f'{1 / seconds:.1f}',
          f'{ratio["median"]:.2f}{ends}',
        )
      )
  _cli.print_table(
    'decoding, one sequence',
    ('shape', '', 'weights', 'ms a token', 'tok/s', 'x llama.cpp'),
    rows,
  )
  if args.json:
    _cli.write_json(args.json, result)


if __name__ == '__main__':
  sys.exit(main())
