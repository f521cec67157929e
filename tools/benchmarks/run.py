# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The harness: models times tasks, with intervals against a baseline.

  python -m tools.benchmarks.run --suite=FILE.json --output=DIR \
      [--gate='wiki_ratio<=1.02']

A suite names models (checkpoints, recipes, GGUF files for llama.cpp, shapes
without weights) and tasks; see `tools/benchmarks/_suite.py`, and an example in
`tools/benchmarks/suites`. Every pair is a line of DIR/results.jsonl, with
scores by item, the hash of its data, versions and machine; what is there is not
measured again. The headline is the paired change against the baseline with its
95% interval, a verdict, and the smallest change that would have shown.

Writes report.md, report.html (needs nothing else), junit.xml, and
benchmark.json for CI actions. With --gate, repeatable, the exit status is 1 if
a whole interval is beyond a bound, or there is none; `perplexity_ratio<=1.02`
is of all tasks of perplexity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from absl import flags
import jax

from gemma_ext import _cli
from gemma_ext import errors
from gemma_ext import evals
from tools.benchmarks import _measure
from tools.benchmarks import _reports
from tools.benchmarks import _suite
from tools.benchmarks import _summary
from tools.benchmarks import _timing

_MAX_RESULTS = 1 << 30


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  return _cli.run(__doc__, _define_flags, _run, argv)


def _define_flags(values: flags.FlagValues) -> None:
  for name, text in (
    ('suite', 'The suite, a .json file.'),
    ('output', 'Directory for results and reports.'),
  ):
    flags.DEFINE_string(name, None, text, required=True, flag_values=values)
  flags.DEFINE_multi_string(
    'gate',
    [],
    "A bound such as 'wiki_ratio<=1.02' or 'mine:quiz_difference>=-0.01'.",
    flag_values=values,
  )


def _run(args: Any) -> list[str]:
  suite = _suite.read(args.suite)
  gates = [_summary.Gate.parse(text, suite) for text in args.gate]
  _reports.check_plots()
  output = pathlib.Path(args.output)
  output.mkdir(parents=True, exist_ok=True)
  results = output / 'results.jsonl'
  known = _read(results)
  about = {
    'code': _code(),
    'machine': _timing.machine(),
    'device': jax.devices()[0].device_kind,
    'versions': evals.package_versions(),
  }
  records: list[dict[str, Any]] = []
  sizes: dict[str, dict[str, int]] = {}
  tokenizer: Any = None
  data: dict[str, tuple[Any, str]] = {}
  # What others are timed beside; in memory from the first of them on.
  baseline = functools.cache(
    lambda: _measure.load(suite.models[suite.baseline], None)[0]
  )
  for name, model in suite.models.items():
    wanted = {
      task: _key(model, suite.tasks[task], about) for task in suite.tasks
    }
    missing = [t for t, key in wanted.items() if key not in known]
    if missing or tokenizer is None:
      _cli.note(f'{name}: loading ...')
      loaded, tokenizer = _measure.load(model, tokenizer)
      for task in missing:
        if task not in data:
          data[task] = _measure.data_of(suite.tasks[task], tokenizer)
        _cli.note(f'{name}: {task} ...')
        found = _measure.run(
          suite.tasks[task],
          loaded,
          tokenizer,
          data[task][0],
          (lambda: None) if name == suite.baseline else baseline,
        )
        known[wanted[task]] = _append(
          results,
          {
            'key': wanted[task],
            'model': name,
            'task': task,
            'spec': [model.to_json(), suite.tasks[task].to_json()],
            'bytes': loaded.nbytes,
            'dense_bytes': loaded.dense_bytes,
            'data_sha256': data[task][1],
            'whole': not suite.tasks[task].options.get('max_tokens'),
            'skipped': found is None,
            **(found or {}),
            **about,
          },
        )
      _measure.free(loaded)
    for key in wanted.values():
      record = known[key] | {'model': name}
      sizes[name] = {k: record[k] for k in ('bytes', 'dense_bytes')}
      records.append(record)
  dense = sizes[suite.baseline]['dense_bytes']
  for size in sizes.values():
    # Of a file of another program: the same model, dense.
    size['dense_bytes'] = size['dense_bytes'] or dense
  lines = _summary.summarise(records, suite.baseline)
  title = f'{pathlib.Path(args.suite).stem}, against {suite.baseline}'
  fights = _summary.duels(records, sizes, suite.challengers, suite.baseline)
  _reports.show(title, _reports.tables(lines, sizes, fights))
  _reports.write_all(output, title, lines, sizes, gates, about, fights)
  failed = [text for gate in gates for text in gate.failures(lines)]
  for text in failed:
    _cli.note(f'gate: {text}')
  return failed


def _key(
  model: _suite.Model, task: _suite.Task, about: Mapping[str, Any]
) -> str:
  """What a result depends on, hashed."""
  spec = [
    model.to_json(),
    task.to_json(),
    about['versions'],
    about['device'],
    _stamp(model),
  ]
  return hashlib.sha256(json.dumps(spec).encode()).hexdigest()


def _stamp(model: _suite.Model) -> list[Any]:
  """Sizes and times of a model's files, so that another one is not taken."""
  path = pathlib.Path(model.source)
  if model.kind == 'shape' or not path.exists():
    return []
  files = sorted(path.rglob('*')) if path.is_dir() else [path]
  return [
    [f.name, f.stat().st_size, f.stat().st_mtime_ns]
    for f in files
    if f.is_file()
  ]


def _read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Records by key. A torn last line is what a kill left: passed over."""
  if not path.exists():
    return {}
  if path.stat().st_size > _MAX_RESULTS:
    raise errors.DataError(f'{path} is larger than {_MAX_RESULTS} bytes.')
  found = {}
  lines = path.read_text(encoding='utf-8').splitlines()
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      found[record['key']] = record
    except (ValueError, KeyError, TypeError) as e:
      if number < len(lines):
        raise errors.DataError(f'{path}, line {number} is no result.') from e
      _cli.note(f'{path}: the last line is torn; measured again.')
  return found


def _append(path: pathlib.Path, record: dict[str, Any]) -> dict[str, Any]:
  """Adds a line, whole or not at all, and returns it."""
  line = json.dumps(record).encode() + b'\n'
  old = path.read_bytes() if path.exists() else b''
  if old and not old.endswith(b'\n'):
    old = old[: old.rfind(b'\n') + 1]
  made = path.with_name(f'.{path.name}')
  with open(made, 'wb') as f:
    f.write(old + line)
    f.flush()
    os.fsync(f.fileno())
  os.replace(made, path)
  return record


def _code() -> str:
  """The commit that is checked out, and whether files differ from it."""
  git = lambda *argv: subprocess.run(
    ['git', *argv],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parent,
  )
  commit = git('rev-parse', 'HEAD')
  if commit.returncode:
    return 'unknown'
  changed = bool(git('status', '--porcelain').stdout.strip())
  return commit.stdout.strip() + (' and changes' if changed else '')


if __name__ == '__main__':
  sys.exit(main())
