# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tokens a second: the official model, ours, and llama.cpp, in turn.

  python -m tools.benchmarks.decode [--json=FILE] [--recipes=int8,mix4] \
      [--checkpoint=gemma3-270m] [--peer=FILE.gguf] [--rounds=7]

Decoding is that of the official sampler (`gm.text.Sampler`, greedy), of ours
also that of `gx.text.stream`, called twice, for few and for many tokens: the
difference is the time of the tokens in between, prefill and everything else of
a call left out. llama.cpp is fed tokens one by one, its sampling left out.
Prefill computes the logits of the last of 512 tokens. Compilation and loading
come before; every round measures all contenders, and ratios are those of a
round.

`--recipes` takes presets, JSON files and directories of compressed
checkpoints; `mix8` is int8 with an int6 head, `mix4` ternary feed-forward
layers, the rest int4, compressed on the spot, without calibration: for speed,
not for quality. With ` x8` behind a name activations are rounded to 8 bits.
`--drafts` adds speculative decoding of each of them, on five prompts one after
another, as the acceptance of drafts depends on the text; it is judged beside
`stream`, which then decodes the same.
"""

from collections.abc import Callable, Sequence
import functools
import gc
import os
import pathlib
import sys
from typing import Any

from absl import flags
from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np

from gemma_ext import _cli
from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext import text
from gemma_ext.ckpts import _sample
from gemma_ext.kernels import _cpu
from tools.benchmarks import _timing

_PROMPT = 'The history of the city begins in the year'
_PROMPTS = (
  _PROMPT,
  'Dear Anna, I am writing to tell you that',
  'To make bread at home you need',
  'def quicksort(values):',
  'The experiment shows that the temperature of the sample',
)
_CACHE = 512
_PEERS = ('official bf16', 'llama.cpp')
_PREFILL = 512

RECIPES: dict[str, recipe_lib.Recipe] = {
  'mix8': recipe_lib.Recipe(
    rules=(
      ('embedder.*', recipe_lib.Int(bits=6, group=64)),
      ('.*', recipe_lib.Int(bits=8, group=128)),
    )
  ),
  'mix4': recipe_lib.Recipe(
    rules=(
      (r'layer_\d+/mlp2?', recipe_lib.Ternary(group=128)),
      ('.*', recipe_lib.Int(bits=4, group=32)),
    )
  ),
}
# Of a name: activations are rounded to 8 bits.
_X8 = ' x8'
RECIPES |= {n + _X8: recipe.with_x_bits(8) for n, recipe in RECIPES.items()}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  string = lambda name, default, text: flags.DEFINE_string(
    name, default, text, flag_values=values
  )
  integer = lambda name, default, text: flags.DEFINE_integer(
    name, default, text, lower_bound=1, flag_values=values
  )
  string('checkpoint', 'gemma3-270m', 'The dense checkpoint.')
  flags.DEFINE_list('recipes', ['mix8', 'mix4'], 'Ours.', flag_values=values)
  string('peer', '', "GGUF for llama.cpp; 'none' for none; the sample's.")
  flags.DEFINE_boolean(
    'official', True, 'Whether to run the dense model.', flag_values=values
  )
  integer('rounds', 7, 'Rounds.')
  integer('few', 8, 'Tokens of the short call.')
  integer('many', 40, 'Tokens of the long call.')
  string('json', None, 'File for the results.')
  flags.DEFINE_multi_string(
    'drafts',
    [],
    'Speculative decoding, as `generate --speculative` takes it; repeatable.',
    flag_values=values,
  )
  flags.DEFINE_float(
    'temperature', 0.0, 'Of stream and drafts.', 0.0, flag_values=values
  )


class _Ours:
  """A model in the official sampler and in a plain prefill."""

  def __init__(self, name: str, model: Any, params: Any, tokenizer: Any):
    self.name = name
    self._params = params
    special = tokenizer.special_tokens
    self._sampler = gm.text.Sampler(
      model=model,
      params=params,
      tokenizer=tokenizer,
      # No end, so that all calls are as long as they should be.
      forbidden_tokens=(special.EOS, special.END_OF_TURN),
      stop_tokens=(),
      cache_length=_CACHE,
      max_out_length=128,
      pad_length=64,
    )
    tokens = np.random.default_rng(0).integers(1000, 20_000, (1, _PREFILL))
    self._tokens = jnp.asarray(tokens, jnp.int32)
    self._prefill = jax.jit(
      lambda params, tokens: (
        model.apply({'params': params}, tokens, return_last_only=True).logits
      )
    )

  def sample(self, count: int) -> float:
    """Seconds of a call for so many tokens."""
    return _timing.seconds(
      lambda: self._sampler.sample(_PROMPT, max_new_tokens=count, rng=0)
    )

  def prefill(self) -> float:
    """Seconds of 512 tokens."""
    return _timing.seconds(
      lambda: self._prefill(self._params, self._tokens).block_until_ready()
    )

  def nbytes(self) -> int:
    """Bytes of all parameters."""
    return sum(x.nbytes for x in jax.tree.leaves(self._params))


class _Streamed:
  """The same model in `gx.text.stream`, with or without a draft."""

  def __init__(
    self,
    name: str,
    checkpoint: tuple[Any, Any, Any],
    temperature: float,
    prompts: Sequence[str],
    speculative: text.Speculative | None = None,
  ):
    self.name = name
    self._checkpoint = checkpoint
    self._prompts = prompts
    self._sampling: gm.text.SamplingMethod = gm.text.Greedy()
    if temperature:
      self._sampling = gm.text.RandomSampling(temperature=temperature)
    self._speculative = speculative
    self.acceptance: list[float] = []

  def sample(self, count: int) -> float:
    """Seconds of a text of so many tokens, mean of the prompts."""
    return _timing.seconds(lambda: self._texts(count)) / len(self._prompts)

  def _texts(self, count: int) -> None:
    for prompt in self._prompts:
      stream = text.stream(
        self._checkpoint,
        prompt,
        max_new_tokens=count,
        sampling=self._sampling,
        speculative=self._speculative,
      )
      for _ in stream:
        pass
      if len(stream.tokens) < count:
        raise errors.SamplingError(
          f'The text after {prompt!r} ended after {len(stream.tokens)} tokens;'
          f' expected {count}. Take fewer with --many.'
        )
      if stream.acceptance is not None:
        self.acceptance.append(stream.acceptance)

  def prefill(self) -> None:
    """That of the model itself is measured."""

  def nbytes(self) -> int:
    """Bytes of all parameters."""
    return sum(x.nbytes for x in jax.tree.leaves(self._checkpoint[1]))


class _LlamaCpp:
  """The peer."""

  def __init__(self, path: pathlib.Path):
    # pylint: disable-next=g-import-not-at-top
    from tools.benchmarks.peers import _llama_cpp

    self.name = 'llama.cpp'
    self._path = path
    self._llama = _llama_cpp.LlamaCpp(path)
    prompt = self._llama.tokenize(_PROMPT, parse_special=False)
    self._prompt = np.array([2, *prompt])
    tokens = np.random.default_rng(0).integers(1000, 20_000, _PREFILL)
    self._tokens = tokens

  def sample(self, count: int) -> float:
    """Seconds of so many tokens after the prompt."""

    def run():
      self._llama.clear()
      self._llama.extend(self._prompt, 0)
      for i in range(count):
        self._llama.extend(self._tokens[i : i + 1], len(self._prompt) + i)

    return _timing.seconds(run)

  def prefill(self) -> float:
    """Seconds of 512 tokens."""

    def run():
      self._llama.clear()
      self._llama.extend(self._tokens, 0)

    return _timing.seconds(run)

  def nbytes(self) -> int:
    """Bytes of the file."""
    return self._path.stat().st_size


def _compressed(name: str, dense: ckpts.Checkpoint) -> tuple[Any, Any]:
  bare = name.removesuffix(_X8)
  if os.path.isdir(bare):
    found = ckpts.load(bare, dtype=jnp.bfloat16)
    model, params = found.model, found.params
    if found.recipe is None:
      raise errors.UnsupportedTypeError(
        f'{bare} is dense; --recipes takes directories of compressed ones.'
      )
  else:
    model = gx_nn.Compressed(model=dense.model, recipe=RECIPES.get(bare, bare))
    params = gx_compress.compress(
      dense.model, dense.params, model.recipe, progress=True
    )
  if name != bare:
    recipe = model.recipe.with_x_bits(8)
    model = gx_nn.Compressed(model=dense.model, recipe=recipe)
  return model, params


def _run(args: Any) -> None:
  _cli.check_output(args.json)
  if args.many <= args.few:
    raise errors.ConfigError('--many must be more than --few.')
  drafts = {how: text.Speculative.parse(how) for how in args.drafts}
  dense = ckpts.load(args.checkpoint, dtype=jnp.bfloat16)
  assert dense.tokenizer is not None
  make = functools.partial(_Ours, tokenizer=dense.tokenizer)
  contenders: list[Any] = []
  if args.official:
    contenders.append(make('official bf16', dense.model, dense.params))
  prompts = _PROMPTS if drafts else (_PROMPT,)
  for name in args.recipes:
    model, params = _compressed(name, dense)
    contenders.append(make(name, model, params))
    contenders += [
      _Streamed(
        f'{name}, {how}',
        (model, params, dense.tokenizer),
        args.temperature,
        prompts,
        draft,
      )
      for how, draft in {'stream': None, **drafts}.items()
    ]
  if args.peer != 'none':
    path = args.peer or _sample.sample_path()
    contenders.append(_LlamaCpp(pathlib.Path(path)))
  gc.collect()
  _cli.note('compiling ...')
  for c in contenders:
    for count in (args.few, args.many):
      c.sample(count)
    c.prefill()

  def per_token(c: Any) -> Callable[[], float]:
    return lambda: (
      (c.sample(args.many) - c.sample(args.few)) / (args.many - args.few)
    )

  decode = _timing.rounds(
    {c.name: per_token(c) for c in contenders}, args.rounds, _cli.note
  )
  prefill = _timing.rounds(
    {c.name: c.prefill for c in contenders if not isinstance(c, _Streamed)},
    args.rounds,
    _cli.note,
  )
  machine = _timing.machine() | {
    'instructions': _cpu.instructions(),
    'versions': evals.package_versions(),
  }
  rows = []
  result: dict[str, Any] = {'machine': machine, 'contenders': []}
  times = {'decode': decode, 'prefill': prefill}
  for c in contenders:
    speed = [1 / t for t in decode[c.name]]
    fill = [_PREFILL / t for t in prefill.get(c.name, ())]
    found: dict[str, Any] = {
      'name': c.name,
      'bytes': c.nbytes(),
      'decode_tokens_per_second': _timing.summary(speed),
      'seconds_per_token': decode[c.name],
    }
    if fill:
      found |= {
        'prefill_tokens_per_second': _timing.summary(fill),
        'seconds_prefill': prefill[c.name],
      }
    row = [
      c.name,
      _cli.human_bytes(c.nbytes()),
      _timing.spread(speed),
      _timing.spread(fill) if fill else '',
    ]
    ratios: dict[str, Any] = {}
    for other in _PEERS:
      if other not in decode:
        continue
      ratios[other] = {
        what: _timing.ratio(taken[other], taken[c.name])
        for what, taken in times.items()
        if c.name in taken
      }
      row += [
        f'{ratios[other][what]["median"]:.2f}' if what in ratios[other] else ''
        for what in times
      ]
    found['times_as_fast_as'] = ratios
    if getattr(c, 'acceptance', None):
      found['acceptance'] = float(np.mean(c.acceptance))
    if args.drafts:
      row.append(f'{found["acceptance"]:.0%}' if 'acceptance' in found else '')
    rows.append(tuple(row))
    result['contenders'].append(found)
  print(machine['cpu'], f'{machine["cores"]} cores', machine['instructions'])
  columns: tuple[str, ...] = (
    '',
    'weights',
    'decode, tok/s',
    f'prefill {_PREFILL}, tok/s',
  )
  for other in _PEERS:
    if other in decode:
      columns += (f'decode: x {other}', f'prefill: x {other}')
  if args.drafts:
    columns += ('drafts taken',)
  _cli.print_table(f'{args.checkpoint}', columns, rows)
  if args.json:
    _cli.write_json(args.json, result)


if __name__ == '__main__':
  sys.exit(main())
