# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Compresses a checkpoint as a recipe says, or within a budget.

  python -m gemma_ext.compress --checkpoint=gemma3-270m --recipe=tssn \
      --output=DIR [--dry_run]
  python -m gemma_ext.compress --checkpoint=gemma3-270m --budget=28% \
      --sensitivities=FILE.json --output=DIR [--dry_run] [--plot=FILE.png]

A budget ('28%' of bfloat16, '4.5bits' a parameter, '150MB', or
'ratio=1.02' of perplexities) is spent where it hurts least, as measured on the
calibration text. --sensitivities keeps what was measured: the same command
goes on from there, and other budgets take one pass over the text to plan.
--dry_run stops after the prediction.

The output is a directory that `gx.ckpts.load`, `python -m gemma_ext.evaluate`
and `python -m gemma_ext.generate` take.
"""

from __future__ import annotations

from collections.abc import Sequence
import importlib.util
import sys
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp

from gemma_ext import _budgeted
from gemma_ext import _cli
from gemma_ext import ckpts
from gemma_ext import compress as gx_compress
from gemma_ext import data
from gemma_ext import errors
from gemma_ext import recipe as recipe_lib
from gemma_ext.compress import _heatmap

_WINDOW = 512


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  _cli.define_checkpoint(values)
  flags.DEFINE_string(
    'recipe',
    None,
    f'A preset ({recipe_lib.PRESETS}) or the path of a .json file.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'budget', None, 'Instead of --recipe, see above.', flag_values=values
  )
  flags.DEFINE_string(
    'sensitivities',
    '',
    'File of what each width of each weight costs; read if it is there, written'
    ' if not.',
    flag_values=values,
  )
  flags.DEFINE_enum(
    'candidates',
    'usual',
    ('usual', 'all'),
    "What a budget chooses among: 'all' adds sums of ternary planes, patterns"
    ' of N among M and corrections of low rank, which take two to three times'
    ' as long to fit.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'plot', '', 'PNG to write: bits of every weight.', flag_values=values
  )
  flags.DEFINE_string(
    'output',
    '',
    'Directory to write; needed unless --dry_run.',
    flag_values=values,
  )
  flags.DEFINE_boolean(
    'dry_run', False, 'Print the sizes and stop.', flag_values=values
  )
  flags.DEFINE_boolean(
    'overwrite',
    False,
    'Replace an output of this command.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'calibration',
    'auto',
    "Text whose activations weigh the errors: 'sample', a path or 'tfds:NAME'"
    " as in evaluate, or 'none'. 'auto' is 'sample' for recipes below 8 bits"
    " if the extra `samples` is installed, else 'none'.",
    flag_values=values,
  )
  flags.DEFINE_boolean(
    'compensate',
    False,
    'With --recipe: round column by column, the error of each moved to those'
    ' that follow. A budget always does.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'text_field',
    'text',
    'Field of .jsonl lines and TFDS examples.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'calibration_tokens',
    12_288,
    'Tokens to calibrate on.',
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_integer(
    'seed',
    0,
    'Seed of the split of the calibration text.',
    lower_bound=0,
    flag_values=values,
  )
  flags.DEFINE_string(
    'json', '', 'File to write the sizes to.', flag_values=values
  )


def _run(args: Any) -> None:
  if not args.output and not args.dry_run:
    raise errors.DataError(
      'Nowhere to write: give --output=DIR, or --dry_run for the sizes only.'
    )
  _cli.check_output(args.json)
  if args.output:
    ckpts.check_target(args.output, overwrite=args.overwrite)
  if (args.recipe is None) == (args.budget is None):
    raise errors.RecipeError('Give one of --recipe and --budget.')
  # What is not valid must not wait for the checkpoint.
  if args.recipe is not None:
    recipe_lib.Recipe.of(args.recipe, num_layers=recipe_lib.ANY_LAYERS)
  else:
    _budgeted.check(args)
  _cli.check_output(args.plot)
  ckpts.locate(args.checkpoint)

  _cli.note(f'Loading {args.checkpoint} ...')
  checkpoint = ckpts.load(
    args.checkpoint,
    dtype=jnp.dtype(args.dtype),
    progress=sys.stderr.isatty(),
  )
  model = checkpoint.model
  if checkpoint.recipe is not None:
    raise errors.ParamsMismatchError(
      f'{args.checkpoint!r} is compressed already, with {checkpoint.recipe}.'
      ' Compress the checkpoint that it was made from.'
    )
  budgeted: _budgeted.Budgeted | None = None
  if args.budget is not None:
    text, tokens = _calibration(args, checkpoint, required=True, whole=True)
    if text is None:
      raise _budgeted.no_text()
    parts = _budgeted.Text.of(tokens, text['windows'])
    budgeted = _budgeted.allocate(args, checkpoint, parts)
    recipe, fitted_on = budgeted.recipe, budgeted.statistics
  else:
    recipe = recipe_lib.Recipe.of(
      args.recipe, num_layers=model.config.num_layers
    )
  plan = gx_compress.plan(model, recipe)
  print(plan)
  if args.plot:
    _heatmap.plot(plan, args.plot)
  result: dict[str, Any] = {'plan': plan.to_json(), 'output': None}
  if budgeted is not None:
    result['allocation'] = budgeted.to_json()
  if not args.dry_run:
    if budgeted is None:
      below = any(map(_below_8_bits, recipe.rules))
      text, fitted_on = _calibration(
        args, checkpoint, required=below or args.compensate
      )
      if args.compensate:
        fitted_on = _budgeted.statistics(args, checkpoint, fitted_on)
    params, found = _compress(
      args,
      checkpoint,
      recipe,
      plan,
      text,
      fitted_on,
      None if budgeted is None else budgeted.fits,
    )
    result |= found
    if budgeted is not None:
      result['allocation'] |= budgeted.measure(params)
  if args.json:
    _cli.write_json(args.json, result)


def _compress(
  args, checkpoint, recipe, plan, text, fitted_on, fits
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Fits, saves, and compares what is on disk with the plan."""
  start = time.monotonic()
  params = gx_compress.compress(
    checkpoint.model,
    checkpoint.params,
    recipe,
    calibration=fitted_on,
    fits=fits,
    progress=True,
  )
  jax.block_until_ready(params)
  seconds = time.monotonic() - start
  path = ckpts.save(
    args.output,
    model=checkpoint.model,
    params=params,
    tokenizer=checkpoint.tokenizer,
    recipe=recipe,
    source=checkpoint.source,
    metadata={'calibration': text},
    overwrite=args.overwrite,
  )
  sizes = ckpts.directory_bytes(path)
  ratio = sizes['params'] / plan.nbytes
  print(
    f'Wrote {path}: weights {_cli.human_bytes(sizes["params"])}'
    f' ({ratio:.4f} of the plan), tokenizer'
    f' {_cli.human_bytes(sizes["tokenizer"])}, in all'
    f' {_cli.human_bytes(sizes["total"])}. Fitted in {seconds:.0f} s.'
  )
  return params, {
    'output': str(path),
    'bytes_on_disk': sizes,
    'on_disk_to_plan': ratio,
    'calibration': text,
    'fit_seconds': seconds,
  }


def _calibration(
  args, checkpoint, *, required: bool, whole: bool = False
) -> tuple[dict[str, Any] | None, Any]:
  """Returns what to record of the calibration text, and its tokens.

  Those to calibrate on, evenly from all of it, or all.
  """
  spec = args.calibration
  if spec == 'auto':
    spec = 'none'
    if required:
      if importlib.util.find_spec('gensim') and checkpoint.tokenizer:
        spec = 'sample'
      else:
        _cli.note(
          'Not calibrated: install gemma_ext[samples], or give --calibration,'
          ' for a better fit.'
        )
  if spec == 'none':
    return None, None
  if checkpoint.tokenizer is None:
    raise errors.TokenizerError(
      f'{args.checkpoint!r} has no tokenizer, so it cannot be calibrated on'
      ' text. Pass --calibration=none.'
    )
  documents = tuple(data.load_documents(spec, text_field=args.text_field))
  # Of the sample, the documents that evaluate measures on stay unseen.
  if spec == 'sample':
    documents = data.split(documents, seed=args.seed).calibration.documents
  windows = data.windows(
    checkpoint.tokenizer,
    documents,
    length=_WINDOW,
    max_tokens=max(args.calibration_tokens, _budgeted.COUNTED),
  )
  # Documents may be shorter than a window.
  count = round(
    len(windows.tokens) * args.calibration_tokens / windows.num_scored
  )
  chosen = _budgeted.spread(len(windows.tokens), max(1, count))
  record = {
    'text': spec,
    'tokens': int(windows.score_mask[chosen].sum()),
    'windows': len(chosen),
    'data_sha256': windows.data_sha256,
  }
  return record, windows.tokens if whole else windows.tokens[chosen]


def _below_8_bits(rule: recipe_lib.RuleLike) -> bool:
  method = rule[1]
  return not isinstance(method, recipe_lib.Keep) and (
    not isinstance(method, recipe_lib.Int) or method.bits < 8
  )


if __name__ == '__main__':
  sys.exit(main())
