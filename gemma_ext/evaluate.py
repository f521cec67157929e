# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a checkpoint with its 95% interval, beside a baseline's.

  python -m gemma_ext.evaluate --checkpoint=DIR --baseline=gemma3-270m \
      --text=sample --max_tokens=8192 --json=result.json

The interval is a bootstrap over documents, so many short documents say more
than a long one. --divergence adds KL(baseline || checkpoint), which tells apart
what perplexities on so much text cannot. --baseline=result.json compares with
what was measured then, and runs no baseline.
"""

from collections.abc import Mapping, Sequence
import gc
import math
import sys
from typing import Any

from absl import flags
import jax.numpy as jnp
import numpy as np

from gemma_ext import _cli
from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import data
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext import nn as gx_nn
from gemma_ext import recipe as recipe_lib

_MAX_JSON_BYTES = 64 << 20
# What --json says of a checkpoint, beside what was measured.
_OF_CHECKPOINT = (
  'checkpoint',
  'source',
  'recipe',
  'dtype',
  'weight_bytes',
  'dense_bf16_bytes',
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  _cli.define_checkpoint(values)
  string = lambda name, default, text: flags.DEFINE_string(
    name, default, text, flag_values=values
  )
  integer = lambda name, default, text, low: flags.DEFINE_integer(
    name, default, text, lower_bound=low, flag_values=values
  )
  string(
    'baseline',
    '',
    'Checkpoint to compare with, on the same tokens, or a .json of --json.',
  )
  flags.DEFINE_boolean(
    'divergence',
    False,
    'Also the divergence from the baseline, nats a token, in float32.',
    flag_values=values,
  )
  string(
    'text',
    'sample',
    "'sample' (Wikipedia), a .txt or .jsonl file, a folder, a pattern, or"
    " 'tfds:NAME[:SPLIT]'.",
  )
  string('text_field', 'text', 'Field of .jsonl lines and TFDS examples.')
  flags.DEFINE_enum(
    'split',
    'auto',
    ('auto', 'all', *data.SPLIT_NAMES),
    "Documents to measure on. 'auto' is 'test' for the sample, whose other"
    " documents calibrate and choose, and 'all' for a text of your own.",
    flag_values=values,
  )
  integer('max_tokens', None, 'Stop after that many tokens.', 1)
  integer('window', 512, 'Tokens of a window.', 2)
  integer('stride', None, 'New tokens a window; the others are context.', 1)
  integer('batch_size', 1, 'Windows at once.', 1)
  integer('seed', 0, 'Seed of the split and of the bootstrap.', 0)
  flags.DEFINE_enum(
    'x_bits',
    None,
    ['8', '16'],
    'Bits that kernels on CPUs round the activations of --checkpoint to; by'
    ' default what its recipe says.',
    flag_values=values,
  )
  string('json', '', 'File to write the result to.')


def _run(args: Any) -> None:
  _cli.check_output(args.json)
  if args.divergence and not args.baseline:
    raise errors.ConfigError('--divergence: from what? Give --baseline.')
  # A name that does not exist must not cost a measurement first.
  known = _read(args) if args.baseline.endswith('.json') else None
  for name in filter(None, (args.checkpoint, known is None and args.baseline)):
    ckpts.locate(name)
  documents, split = _documents(args)
  # First: it is what two checkpoints may be too different for.
  divergence = _divergence(args, documents) if args.divergence else None
  found, result, tokenizer = _measure(
    args.checkpoint,
    args,
    documents,
    None,
    x_bits=args.x_bits,
    like=None if known is None else known[1],
  )
  baseline: dict[str, Any] | None = None
  paired: dict[str, Any] | None = None
  if args.baseline:
    if known is None:
      baseline, other, _ = _measure(args.baseline, args, documents, tokenizer)
    else:
      baseline, other = known
    paired = evals.paired_json(
      evals.paired_ratio(result, other, seed=args.seed)
    )
  out = {
    **found,
    'text': args.text,
    'split': split,
    'baseline': baseline,
    'paired_delta': paired,
    'divergence': divergence,
  }
  _report(out)
  if args.json:
    _cli.write_json(args.json, out)


def _read(args: Any) -> tuple[dict[str, Any], evals.PerplexityResult]:
  """Reads a baseline that was measured before.

  Returns:
    JSON values, and the result.
  """
  path = args.baseline
  if args.divergence:
    raise errors.ConfigError(
      f'--divergence: {path!r} holds no distributions. Give --baseline as a'
      ' checkpoint.'
    )
  try:
    found = recipe_lib.read_json(path, _MAX_JSON_BYTES)
    result = evals.PerplexityResult.from_json(found)
  except errors.GemmaExtError as e:
    raise errors.DataError(f'--baseline: {e}') from e
  missing = [name for name in _OF_CHECKPOINT if name not in found]
  sizes = [found.get(name) for name in _OF_CHECKPOINT[-2:]]
  if missing or not all(isinstance(x, int) and x > 0 for x in sizes):
    raise errors.DataError(
      f'--baseline: {path!r} is no result of --json: {missing or sizes}.'
    )
  known = {name: found[name] for name in _OF_CHECKPOINT}
  return {**known, **result.to_json()}, result


def _documents(args: Any) -> tuple[tuple[data.Document, ...], str]:
  """Returns the documents to measure on, and of which split they are."""
  documents = data.load_documents(args.text, text_field=args.text_field)
  split = args.split
  if split == 'auto':
    split = 'test' if args.text == 'sample' else 'all'
  if split == 'all':
    return tuple(documents), split
  splits = data.split(documents, seed=args.seed)
  return getattr(splits, split).documents, split


def _tokenizer(name: str, found: Any) -> Any:
  if found is None:
    raise errors.TokenizerError(
      f'{name!r} has no tokenizer, so the text cannot be turned into tokens.'
      ' Put its tokenizer.model beside the checkpoint.'
    )
  return found


def _measure(
  name: str,
  args: Any,
  documents: Sequence[data.Document],
  tokenizer: Any,
  *,
  x_bits: str | None = None,
  like: evals.PerplexityResult | None = None,
) -> tuple[dict[str, Any], evals.PerplexityResult, Any]:
  """Loads one checkpoint, measures it, and lets go of it.

  Args:
    name: The checkpoint.
    args: The flags.
    documents: The text.
    tokenizer: One for a checkpoint without.
    x_bits: As for `Recipe.with_x_bits`.
    like: What it will be compared with, which must be of the same tokens.

  Returns:
    JSON values, the result, and the tokenizer that was used.
  """
  _cli.note(f'Loading {name} ...')
  checkpoint = ckpts.load(
    name, dtype=jnp.dtype(args.dtype), progress=sys.stderr.isatty()
  )
  tokenizer = _tokenizer(name, checkpoint.tokenizer or tokenizer)
  model, recipe = checkpoint.model, checkpoint.recipe
  if x_bits is not None:
    if recipe is None:
      raise errors.RecipeError(
        f'--x_bits: {name!r} is dense; only packed weights have kernels.'
      )
    recipe = recipe.with_x_bits(int(x_bits))
    model = gx_nn.Compressed(model=model.model, recipe=recipe)
  sizes = evals.weight_sizes(model, checkpoint.params)
  windows = data.windows(
    tokenizer,
    documents,
    length=args.window,
    stride=args.stride,
    max_tokens=args.max_tokens,
  )
  if like is not None:
    evals.check_same_tokens(windows, like)
  _cli.note(
    f'Measuring on {windows.num_scored:,} tokens of {len(windows.ids)}'
    ' documents ...'
  )
  result = evals.perplexity(
    model,
    checkpoint.params,
    windows,
    batch_size=args.batch_size,
    seed=args.seed,
    progress=True,
  )
  found = {
    'checkpoint': name,
    'source': checkpoint.source,
    'recipe': None if recipe is None else recipe.to_json(),
    'dtype': args.dtype,
    **result.to_json(),
    'scores': result.scores_json(),
    'weight_bytes': sizes.weight_bytes,
    'dense_bf16_bytes': sizes.dense_bf16_bytes,
  }
  # The next checkpoint must not have to share the memory with this one.
  del checkpoint, model
  gc.collect()
  return found, result, tokenizer


def _divergence(
  args: Any, documents: Sequence[data.Document]
) -> dict[str, Any]:
  """KL(baseline || checkpoint) with its interval over documents, as JSON."""
  dense, other = (
    ckpts.load(name, dtype=jnp.dtype(args.dtype), progress=False)
    for name in (args.baseline, args.checkpoint)
  )
  sizes = [found.model.config.num_embed for found in (dense, other)]
  if sizes[0] != sizes[1]:
    raise errors.ConfigError(
      f'--divergence: {args.baseline!r} has {sizes[0]:,} tokens and'
      f' {args.checkpoint!r} {sizes[1]:,}; expected the same vocabulary.'
    )
  windows = data.windows(
    _tokenizer(args.checkpoint, other.tokenizer or dense.tokenizer),
    documents,
    length=args.window,
    stride=args.stride,
    max_tokens=args.max_tokens,
  )
  nats, counts = gx_compress.divergences(
    dense.model,
    dense.params,
    other.model,
    other.params,
    windows.tokens,
    targets=windows.score_mask,
    progress=True,
  )
  # A single document: over its windows.
  groups = windows.document if len(windows.ids) > 1 else np.arange(len(nats))
  by = lambda x: np.bincount(groups, weights=x)
  counted = by(counts) > 0
  found = evals.bootstrap_ci(
    by(nats)[counted], by(counts)[counted], seed=args.seed
  )
  nats_of = lambda x: math.log(x) if x > 0 else None
  return {
    'nats': nats_of(found.value),
    'ci95': [nats_of(found.low), nats_of(found.high)],
  }


def _report(out: Mapping[str, Any]) -> None:
  models = [out] + ([out['baseline']] if out['baseline'] else [])
  _cli.print_table(
    f'{out["tokens"]:,} tokens of {out["documents"]} documents, windows of'
    f' {out["window"]}, {out["split"]} of {out["text"]}',
    ('checkpoint', 'perplexity', '95% interval', 'weights', 'of bf16'),
    [_row(m) for m in models],
  )
  console = _cli.console()
  if paired := out['paired_delta']:
    ratio = paired['ratio']
    console.print(
      f'perplexity ratio {"-" if ratio is None else f"{ratio:,.4f}"}, 95%'
      f' interval {_cli.human_interval(paired["ci95"], 4)}, paired by'
      f' {out["ci_unit"]}'
    )
  if divergence := out['divergence']:
    console.print(
      f'divergence {divergence["nats"]:.5f} nats a token, 95% interval'
      f' {_cli.human_interval(divergence["ci95"], 5)}'
    )
  if out['ci_unit'] == 'window':
    console.print(
      'A single document: the interval is over its windows, taken as'
      ' independent, and says nothing about other documents.'
    )


def _row(model: Mapping[str, Any]) -> tuple[str, ...]:
  value = model['perplexity']
  share = model['weight_bytes'] / model['dense_bf16_bytes']
  return (
    model['checkpoint'],
    'overflow' if value is None else f'{value:,.3f}',
    _cli.human_interval(model['ci95'], 3),
    _cli.human_bytes(model['weight_bytes']),
    f'{share:.1%}',
  )


if __name__ == '__main__':
  sys.exit(main())
