# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The main job from end to end on the real Gemma 3 270M, in minutes on a CPU.

  python -m tools.demo [--output=build/demo] [--max_tokens=8176]

Loads the checkpoint, compresses it by four recipes, saves each, measures the
saved directories on text that calibration never saw, and lets each write. One
of them makes experts of all feed-forward neurons, of which every token gets
three quarters, those that its gates choose.
"""

from collections.abc import Sequence
import gc
import pathlib
import sys
import time
from typing import Any

from absl import flags

from gemma_ext import _cli
from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import data
from gemma_ext import evals
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib
from gemma_ext import text as gx_text

_WINDOW = 512
_RECIPES = {
  'int8': 'every weight in 8 bits',
  'tssn-layer-8': 'FFN of layer 8 ternary, the rest in 8 bits',
  'tssn': 'all FFNs ternary, the rest in 8 bits',
  'moe': 'a token gets 3/4 of the FFN neurons, all in 8 bits',
}
_ACTIVE = 0.75
# Beyond this, what is left of a model is no language model.
_BROKEN = 10.0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the demo; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  string = lambda name, default, text: flags.DEFINE_string(
    name, default, text, flag_values=values
  )
  integer = lambda name, default, text: flags.DEFINE_integer(
    name, default, text, lower_bound=1, flag_values=values
  )
  string('checkpoint', 'gemma3-270m', 'Checkpoint to compress.')
  string('output', 'build/demo', 'Directory for results; replaced.')
  string('prompt', 'The largest city of France is', 'What to continue.')
  integer('max_tokens', 16 * (_WINDOW - 1), 'Tokens to measure on.')
  integer('calibration_tokens', 4 * (_WINDOW - 1), 'Tokens to calibrate on.')
  integer('max_new_tokens', 20, 'Tokens to write.')


def _run(args: Any) -> None:
  start = time.monotonic()
  output = pathlib.Path(args.output)
  output.mkdir(parents=True, exist_ok=True)

  _step(start, f'loading {args.checkpoint}')
  model, params, tokenizer = ckpts.load(args.checkpoint)
  dense_bytes = gx_compress.plan(model, {}).nbytes
  splits = data.split(data.load_documents('sample'))
  test = data.windows(
    tokenizer,
    splits.test.documents,
    length=_WINDOW,
    max_tokens=args.max_tokens,
  )
  calibration = data.windows(
    tokenizer,
    splits.calibration.documents,
    length=_WINDOW,
    max_tokens=args.calibration_tokens,
  )

  _step(start, 'dense: measuring and writing')
  dense = evals.perplexity(model, params, test, progress=True)
  rows = [_row('dense bf16', dense_bytes, dense_bytes, dense, None)]
  texts = {'dense bf16': _write(model, params, tokenizer, args)}
  results = [{'recipe': None, 'bytes': dense_bytes, **dense.to_json()}]

  for name, meaning in _RECIPES.items():
    recipe = _recipe(name, model)
    _step(start, f'{name} ({meaning}): compressing')
    if name == 'tssn':
      print(gx_compress.plan(model, recipe))
    packed = gx_compress.compress(
      model,
      params,
      recipe,
      calibration=None if name == 'int8' else calibration.tokens,
      progress=True,
    )
    if name == 'moe':
      packed = gx_compress.with_experts(
        gx_nn.Compressed(model=model, recipe=recipe), packed, _ACTIVE
      )
    path = ckpts.save(
      output / name,
      model=model,
      params=packed,
      tokenizer=tokenizer,
      recipe=recipe,
      source=args.checkpoint,
      overwrite=True,
    )
    del packed
    gc.collect()
    # What is measured is what a user would load.
    loaded = ckpts.load(path)
    assert isinstance(loaded.model, gx_nn.Compressed)
    _step(start, f'{name}: measuring and writing')
    result = evals.perplexity(loaded.model, loaded.params, test, progress=True)
    texts[name] = _write(loaded.model, loaded.params, tokenizer, args)
    sizes = ckpts.directory_bytes(path)
    ratio = evals.paired_ratio(result, dense)
    rows.append(_row(name, sizes['total'], dense_bytes, result, ratio))
    results.append(
      {
        'recipe': name,
        'bytes': sizes['total'],
        **result.to_json(),
        'paired_delta': evals.paired_json(ratio),
      }
    )
    del loaded
    gc.collect()

  _cli.print_table(
    f'{test.num_scored:,} tokens of {len(test.ids)} documents that calibration'
    ' never saw',
    (
      '',
      'on disk',
      'of bf16',
      'perplexity',
      '95% interval',
      'ratio',
      'verdict',
    ),
    rows,
  )
  for name, text in texts.items():
    print(f'{name}: {args.prompt} |{text}')
  _cli.write_json(str(output / 'demo.json'), {'results': results})
  seconds = time.monotonic() - start
  print(f'Done in {seconds / 60:.1f} minutes. Results: {output}/')


def _recipe(name: str, model: Any) -> recipe_lib.Recipe:
  config = model.config
  if name != 'moe':
    return recipe_lib.Recipe.of(name, num_layers=config.num_layers)
  int8 = recipe_lib.Int(bits=8, group=128)
  neurons = recipe_lib.MoE(
    num_experts=config.hidden_dim,
    top_k=config.hidden_dim,
    router='gate',
    weights=int8,
  )
  return recipe_lib.Recipe.of({r'layer_\d+/mlp2?': neurons, '.*': int8})


def _write(model: Any, params: Any, tokenizer: Any, args: Any) -> str:
  return ''.join(
    gx_text.stream(
      (model, params, tokenizer),
      args.prompt,
      max_new_tokens=args.max_new_tokens,
    )
  )


def _row(
  name: str,
  nbytes: int,
  dense_bytes: int,
  result: evals.PerplexityResult,
  ratio: evals.Interval | None,
) -> tuple[str, ...]:
  cells = (
    name,
    _cli.human_bytes(nbytes),
    f'{nbytes / dense_bytes:.1%}',
    f'{result.perplexity:,.2f}',
    _cli.human_interval(result.ci95, 2),
  )
  if ratio is None:
    return (*cells, '1', 'the baseline')
  ends = _cli.human_interval((ratio.low, ratio.high), 4)
  if ratio.value > _BROKEN:
    verdict = 'BROKEN until it is healed'
  elif ratio.low <= 1 <= ratio.high:
    verdict = 'no worse, as far as this text tells'
  else:
    verdict = 'worse' if ratio.value > 1 else 'better'
  return (*cells, f'{ratio.value:,.4f} {ends}', verdict)


def _step(start: float, text: str) -> None:
  _cli.note(f'[{time.monotonic() - start:4.0f} s] {text} ...')


if __name__ == '__main__':
  sys.exit(main())
