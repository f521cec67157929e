# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The harness: models times tasks, with intervals against a baseline.

  python -m tools.benchmarks.run --suite=FILE.json --output=DIR \
      [--gate='wiki_ratio<=1.02'] [--models=A,B] [--tasks=T] [--device=cpu] \
      [--code=any] [--report_only]

A suite names models (checkpoints, recipes, GGUF files for llama.cpp, shapes
without weights) and tasks; see `tools/benchmarks/_suite.py`, and an example in
`tools/benchmarks/suites`. Every pair is a line of DIR/results.jsonl, with
scores by item, the hash of its data, versions and machine. What is there is not
measured again, unless its data, its files, the versions of its packages, the
code or, of speed, the machine changed. The headline is the paired change
against the baseline with its 95% interval, a verdict, and the smallest change
that would have shown.

Writes report.md, report.html (needs nothing else), junit.xml, and
benchmark.json for CI actions, after every model. A pair that fails is named
with its reason, and the others go on. The exit status is 3 if a pair failed,
else 1 if with --gate, repeatable, a whole interval is beyond a bound, or there
is none; `perplexity_ratio<=1.02` is of all tasks of perplexity.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
import pathlib
import sys
from typing import Any

from absl import flags
import jax

from gemma_ext import _cli
from gemma_ext import errors
from gemma_ext.train import _store
from tools.benchmarks import _checks
from tools.benchmarks import _measure
from tools.benchmarks import _records
from tools.benchmarks import _reports
from tools.benchmarks import _suite
from tools.benchmarks import _summary

EXIT_UNMEASURED = 3
# What a pair may fail of while the others go on; memory that is short among it.
_FAILURES = (errors.GemmaExtError, MemoryError, jax.errors.JaxRuntimeError)
_MAX_REASON = 300


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark; returns its exit status."""
  failed: dict[tuple[str, str], str] = {}
  status = _cli.run(
    __doc__, _define_flags, lambda args: _run(args, failed), argv
  )
  done = status in (0, _cli.EXIT_FAILED)
  return EXIT_UNMEASURED if failed and done else status


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
  for name in ('models', 'tasks'):
    flags.DEFINE_list(
      name,
      [],
      f'Only these {name} are measured; reports have all that is there. All, if'
      ' not given.',
      flag_values=values,
    )
  flags.DEFINE_string(
    'device',
    '',
    "Where JAX runs: 'cpu', 'gpu', 'gpu:1', 'tpu'; else as the suite says.",
    flag_values=values,
  )
  flags.DEFINE_enum(
    'code',
    'same',
    ('same', 'any'),
    "Whether results of other code count as well ('any').",
    flag_values=values,
  )
  flags.DEFINE_boolean(
    'report_only',
    False,
    'Measure nothing; write the reports of what is there.',
    flag_values=values,
  )


def _run(args: Any, failed: dict[tuple[str, str], str]) -> list[str]:
  suite = _suite.read(args.suite)
  gates = [_summary.Gate.parse(text, suite) for text in args.gate]
  models = _chosen(args.models, suite.models, '--models')
  tasks = _chosen(args.tasks, suite.tasks, '--tasks')
  device = _suite.device(args.device or suite.device, '--device')
  _reports.check_plots()
  _checks.use(device)
  output = pathlib.Path(args.output)
  with _store.Store(output, fingerprint='').lock():
    bench = _Bench(suite, output, gates, failed, _records.about(device), args)
    if not args.report_only:
      bench.measure(models, tasks)
    return bench.close()


def _chosen(
  names: Sequence[str], known: Collection[str], flag: str
) -> list[str]:
  if unknown := [name for name in names if name not in known]:
    raise errors.ConfigError(
      f'{flag}: {unknown} are none of the suite, which has {[*known]}.'
    )
  return [name for name in known if name in names or not names]


class _Baseline:
  """The baseline, loaded once and only if it is needed."""

  def __init__(self, spec: _suite.Model):
    self._spec = spec
    self._loaded: _measure.Loaded | None = None
    self._tokenizer: Any = None
    self._error: Exception | None = None

  def get(self) -> _measure.Loaded:
    if self._error is not None:  # It would fail again.
      raise self._error
    if self._loaded is None:
      _cli.note(f'{self._spec.name}: loading ...')
      try:
        self._loaded, self._tokenizer = _measure.load(self._spec, None)
        if self._tokenizer is None:
          raise errors.TokenizerError(
            f'The baseline {self._spec.name!r} has no tokenizer.'
          )
      except _FAILURES as e:
        self._error = e.with_traceback(None)
        raise
    return self._loaded

  def tokenizer(self) -> Any:
    """The baseline's own, which may outlive it."""
    if self._tokenizer is None:
      self.get()
    return self._tokenizer

  def free(self) -> None:
    if self._loaded is not None:
      _measure.free(self._loaded)
    self._loaded = None


class _Bench:
  """A suite under way."""

  def __init__(
    self,
    suite: _suite.Suite,
    output: pathlib.Path,
    gates: Sequence[_summary.Gate],
    failed: dict[tuple[str, str], str],
    about: dict[str, Any],
    args: Any,
  ):
    self._suite, self._output, self._gates = suite, output, gates
    self._failed, self._about = failed, about
    self._name = pathlib.Path(args.suite).stem
    self._results = _records.Results(
      output / 'results.jsonl',
      about['code_sha256'],
      others=args.code == 'any',
    )
    self._sources = {
      name: _measure.source_of(task) for name, task in suite.tasks.items()
    }
    self._keys = {
      (m, t): _records.key(suite, model, task, self._sources[t].sha256, about)
      for m, model in suite.models.items()
      for t, task in suite.tasks.items()
    }
    self._baseline = _Baseline(suite.models[suite.baseline])
    self._data: dict[str, tuple[Any, str]] = {}
    for names in _records.same(self._keys):
      _cli.note(f'{", ".join(names)}: one and the same model, measured once.')

  def _missing(self, model: str, tasks: Iterable[str]) -> list[str]:
    return [
      t for t in tasks if self._results.find(self._keys[model, t]) is None
    ]

  def measure(self, models: Sequence[str], tasks: Sequence[str]) -> None:
    """Measures what is missing; reports after every model."""
    missing = {m: self._missing(m, tasks) for m in models}
    _checks.check(self._suite, missing)
    # A model is timed beside the baseline, which then stays.
    timed = lambda m: any(
      self._suite.tasks[t].kind == 'speed' for t in self._missing(m, tasks)
    )
    for i, name in enumerate(models):
      if todo := self._missing(name, tasks):
        self._measure_model(name, todo)
        if not any(map(timed, models[i + 1 :])):
          self._baseline.free()
        try:
          self.report()
        except errors.GemmaExtError as e:  # The last one raises it.
          _cli.note(f'No report yet: {e}')

  def _measure_model(self, name: str, tasks: Sequence[str]) -> None:
    own = name == self._suite.baseline
    try:
      tokenizer = self._baseline.tokenizer()
      if own:
        loaded = self._baseline.get()
      else:
        _cli.note(f'{name}: loading ...')
        model = self._suite.models[name]
        loaded, tokenizer = _measure.load(model, tokenizer)
    except _FAILURES as e:
      for task in tasks:
        self._fail(name, task, e)
      return
    for task in tasks:
      if not self._missing(name, [task]):
        continue  # It was measured just now, as another task.
      _cli.note(f'{name}: {task} ...')
      try:
        self._measure_pair(name, task, loaded, tokenizer)
      except _FAILURES as e:
        self._fail(name, task, e)
    if not own:
      _measure.free(loaded)

  def _measure_pair(
    self, name: str, task: str, loaded: _measure.Loaded, tokenizer: Any
  ) -> None:
    own, spec = name == self._suite.baseline, self._suite.tasks[task]
    if task not in self._data:
      self._data[task] = _measure.data_of(
        spec, self._sources[task], self._baseline.tokenizer()
      )
    data, data_sha256 = self._data[task]
    beside = (lambda: None) if own else self._baseline.get
    found = _measure.run(spec, loaded, tokenizer, data, beside)
    self._results.append(
      {
        'key': self._keys[name, task],
        'model': name,
        'task': task,
        'spec': [self._suite.models[name].to_json(), spec.to_json()],
        'calibration': loaded.calibration,
        'bytes': loaded.nbytes,
        'dense_bytes': loaded.dense_bytes,
        'data_sha256': data_sha256,
        'skipped': found is None,
        **(found or {}),
        **self._about,
      }
    )

  def _fail(self, name: str, task: str, error: Exception) -> None:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[0][:_MAX_REASON]
    _cli.note(f'{name}: {task} failed: {reason}')
    self._failed[name, task] = reason

  def _found(self) -> list[dict[str, Any]]:
    """The records of the suite that are there."""
    found = []
    for (model, task), key in self._keys.items():
      if (record := self._results.find(key)) is not None:
        found.append(record | {'model': model, 'task': task})
    return found

  def report(self, last: bool = False) -> list[_summary.Line]:
    """Writes the reports of what is there; prints the last of them."""
    found = self._found()
    sizes = {
      r['model']: {k: r[k] for k in ('bytes', 'dense_bytes')} for r in found
    }
    dense = sizes.get(self._suite.baseline, {}).get('dense_bytes', 0)
    for size in sizes.values():
      # Of a file of another program: the same model, dense.
      size['dense_bytes'] = size['dense_bytes'] or dense
    lines = _summary.summarise(found, self._suite.baseline)
    title = f'{self._name}, against {self._suite.baseline}'
    if left := len(self._keys) - len(found):
      title += f'; {left} of {len(self._keys)} pairs are missing'
    challengers = [name for name in self._suite.challengers if name in sizes]
    fights = _summary.duels(found, sizes, challengers, self._suite.baseline)
    about = _records.provenance(found or [self._about])
    _reports.write_all(
      self._output, title, lines, sizes, self._gates, about, fights
    )
    if last:
      _reports.show(title, _reports.tables(lines, sizes, fights))
      if len({r.get('code_sha256') for r in found}) > 1:
        _cli.note(
          f'Results of different code are compared: {about["code"]}. Without'
          ' --code=any they are measured again.'
        )
    return lines

  def close(self) -> list[str]:
    """Prints what was found and what failed; returns gates that are not met."""
    lines = self.report(last=True)
    if self._failed:
      _cli.print_table(
        'Failed',
        ('model', 'task', 'reason'),
        [(*pair, f'failed: {why}') for pair, why in self._failed.items()],
      )
    beyond = [text for gate in self._gates for text in gate.failures(lines)]
    for text in beyond:
      _cli.note(f'gate: {text}')
    return beyond


if __name__ == '__main__':
  sys.exit(main())
