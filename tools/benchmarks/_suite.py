# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Suites: which models do which tasks. A small file of JSON, checked whole.

    {
      "baseline": "dense",
      "challengers": ["int8", "mine"],
      "models": {
        "dense": {"checkpoint": "gemma3-270m"},
        "int8": {"checkpoint": "gemma3-270m", "recipe": "int8"},
        "28%": {"checkpoint": "gemma3-270m", "budget": "28%"},
        "mine": {"checkpoint": "out/mine"},
        "qwix": {"checkpoint": "gemma3-270m", "peer": "qwix int4 g32"},
        "llama.cpp Q4_0": {"gguf": "model.gguf", "quantize": "Q4_0 pure"},
        "27b": {"shape": "Gemma3_27B", "recipe": "tssn"}
      },
      "tasks": {
        "wiki": {"kind": "perplexity", "text": "sample", "max_tokens": 20440},
        "quiz": {"kind": "choices", "items": "quiz.jsonl"},
        "sums": {"kind": "generate", "items": "sums.jsonl",
                 "check": "last_number", "max_new_tokens": 64},
        "gsm8k": {"kind": "generate", "items": "tfds:gsm8k:test",
                  "format": "gsm8k", "shots": 4, "max_new_tokens": 256},
        "speed": {"kind": "speed", "rounds": 15}
      }
    }

Paths are relative to the file. Challengers, which may be left out, are compared
with every other model but the baseline, too: of them the largest one that takes
no more bytes. A model with a recipe or budget is what
`python -m gemma_ext.compress` makes, calibrated as it calibrates, unless
"calibration" says otherwise ('none', or a text). A model of a `shape` has no
weights: its size is what is said of it, and its speed with random ones where
these fit. "device" is where JAX runs: 'cpu', 'gpu', 'gpu:1', 'tpu'.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
import math
import pathlib
import re
from typing import Any

from gemma import gm

from gemma_ext import compress as gx_compress
from gemma_ext import data as gx_data
from gemma_ext import errors
from gemma_ext import evals
from gemma_ext import recipe as recipe_lib
from gemma_ext.evals import _generation
from tools.benchmarks.peers import _jax_peers
from tools.benchmarks.peers import _requantize

_MAX_BYTES = 1 << 20
_MODEL_KINDS = ('checkpoint', 'gguf', 'shape')
_TEXTS = ('recipe', 'budget', 'calibration', 'quantize', 'peer')
_DEVICE = re.compile(r'cpu|gpu(?::\d+)?|tpu')
_SPLITS = ('auto', 'all', *gx_data.SPLIT_NAMES)
_CHECKS = ('code', *_generation.CHECKS)
# Fields that must be larger than 0, or hold something.
_LEAST = {
  'window': 2,
  'max_new_tokens': 1,
  'rounds': 1,
  'tokens': 1,
  'prompt_tokens': 1,
}
_TASKS: dict[str, dict[str, tuple[type, Any]]] = {
  'perplexity': {
    'text': (str, None),
    'text_field': (str, 'text'),
    'split': (str, 'auto'),
    'max_tokens': (int, 0),
    'window': (int, 512),
  },
  'choices': {
    'items': (str, None),
    'max_items': (int, 0),
    'format': (str, ''),
    'shots': (int, 0),
  },
  'generate': {
    'items': (str, None),
    'max_items': (int, 0),
    'format': (str, ''),
    'shots': (int, 0),
    'check': (str, None),
    'max_new_tokens': (int, 128),
    'temperature': (float, 0.0),
    'seeds': (list, [0]),
    'stops': (list, []),
  },
  'speed': {
    'rounds': (int, 11),
    'tokens': (int, 16),
    'prompt_tokens': (int, 128),
  },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A model of a suite.

  Attributes:
    name: Its name there.
    kind: 'checkpoint', 'gguf' or 'shape'.
    source: Name or path of it.
    recipe: How it is compressed on the way; '' if it is not.
    budget: Instead of a recipe; '' for none.
    calibration: The text to calibrate on, or 'none'; '' as the command does.
    compensate: Whether errors are moved to the columns that follow.
    quantize: Of a GGUF, the type it is quantised to first; '' for none.
    peer: Of a checkpoint, who else quantises it; '' for nobody.
  """

  name: str
  kind: str
  source: str
  recipe: str = ''
  budget: str = ''
  calibration: str = ''
  compensate: bool = False
  quantize: str = ''
  peer: str = ''

  @property
  def is_compressed(self) -> bool:
    """Whether weights are compressed on the way."""
    return self.kind != 'shape' and bool(self.recipe or self.budget)

  def to_json(self) -> dict[str, Any]:
    """Returns what makes the model, without its name."""
    fields: dict[str, Any] = {self.kind: self.source}
    for key in (*_TEXTS, 'compensate'):
      if value := getattr(self, key):
        fields[key] = value
    return fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A task of a suite.

  Attributes:
    name: Its name there.
    kind: 'perplexity', 'choices', 'generate' or 'speed'.
    options: All fields, defaults among them.
  """

  name: str
  kind: str
  options: Mapping[str, Any]

  def to_json(self) -> dict[str, Any]:
    """Returns what makes the task, without its name."""
    return {'kind': self.kind, **self.options}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
  """Models and tasks.

  Attributes:
    baseline: Name of the model that the others are compared with.
    models: By name, the baseline first.
    tasks: By name.
    challengers: Names of models that the others are compared with as well.
    device: Where JAX runs; '' for its default.
  """

  baseline: str
  models: dict[str, Model]
  tasks: dict[str, Task]
  challengers: tuple[str, ...] = ()
  device: str = ''


def read(path: str | pathlib.Path) -> Suite:
  """Reads a suite.

  Args:
    path: The file.

  Raises:
    ConfigError: If it is none; says which field.
  """
  path = pathlib.Path(path)
  data = recipe_lib.read_json(str(path), _MAX_BYTES)
  wanted = {'baseline', 'models', 'tasks'}
  more = {'challengers', 'device'}
  if not isinstance(data, dict) or {*data} - more != wanted:
    raise errors.ConfigError(
      f"{path}: a suite has the keys 'baseline', 'models' and 'tasks', and may"
      " have 'challengers' and 'device'."
    )
  for key in ('models', 'tasks'):
    if not isinstance(data[key], dict) or not data[key]:
      raise errors.ConfigError(f'{path}: {key!r} must be objects by name.')
  if data['baseline'] not in data['models']:
    raise errors.ConfigError(
      f'{path}: the baseline {data["baseline"]!r} is none of the models'
      f' {sorted(data["models"])}.'
    )
  challengers = data.get('challengers', [])
  others = {*data['models']} - {data['baseline']}
  if not isinstance(challengers, list) or not others.issuperset(
    str(name) for name in challengers
  ):
    raise errors.ConfigError(
      f'{path}: challengers are some of {sorted(others)}, got'
      f' {json.dumps(challengers)}.'
    )
  models = {
    name: _model(name, spec, path) for name, spec in data['models'].items()
  }
  baseline = models.pop(data['baseline'])
  if baseline.kind != 'checkpoint':
    raise errors.ConfigError(
      f'{path}: a {baseline.kind} cannot be the baseline, whose tokenizer the'
      ' others may need; expected a checkpoint.'
    )
  return Suite(
    baseline=baseline.name,
    models={baseline.name: baseline, **models},
    tasks={
      name: _task(name, spec, path) for name, spec in data['tasks'].items()
    },
    challengers=tuple(challengers),
    device=device(data.get('device', ''), f'{path}: device'),
  )


def device(value: Any, where: str) -> str:
  """Returns the name of a device, checked; '' is JAX's default.

  Args:
    value: 'cpu', 'gpu', 'gpu:1', 'tpu'.
    where: Where it was given, for errors.

  Raises:
    ConfigError: If it is no such name.
  """
  if value and not (isinstance(value, str) and _DEVICE.fullmatch(value)):
    raise errors.ConfigError(
      f"{where}: {value!r}; expected 'cpu', 'gpu', 'gpu:1' or 'tpu'."
    )
  return value or ''


def shape_class(model: Model) -> type[Any]:
  """The class of the official library that a shape names.

  Args:
    model: The model.

  Raises:
    ConfigError: If there is no such class.
  """
  cls = getattr(gm.nn, model.source, None)
  if not isinstance(cls, type):
    raise errors.ConfigError(
      f'Model {model.name!r}: the official library has no {model.source!r}.'
    )
  return cls


def _model(name: str, spec: Any, path: pathlib.Path) -> Model:
  where = f'{path}: model {name!r}'
  known = {*_MODEL_KINDS, *_TEXTS, 'compensate'}
  if not isinstance(spec, dict) or not set(spec) <= known:
    raise errors.ConfigError(f'{where}: expected some of {sorted(known)}.')
  kinds = [kind for kind in _MODEL_KINDS if kind in spec]
  texts = [v for k, v in spec.items() if k != 'compensate']
  if len(kinds) != 1 or not all(v and isinstance(v, str) for v in texts):
    raise errors.ConfigError(
      f'{where}: expected one of {_MODEL_KINDS}, all values texts.'
    )
  (kind,) = kinds
  _check_compression(spec, kind, where)
  if 'quantize' in spec and kind != 'gguf':
    raise errors.ConfigError(f"{where}: 'quantize' is for a 'gguf'.")
  if 'quantize' in spec:
    _requantize.parse(spec['quantize'])
  if 'peer' in spec:
    if kind != 'checkpoint' or {'recipe', 'budget'} & {*spec}:
      raise errors.ConfigError(
        f"{where}: 'peer' is for a 'checkpoint' without a recipe."
      )
    _jax_peers.check(spec['peer'])
  source = spec[kind]
  if kind != 'shape' and (path.parent / source).exists():
    source = str((path.parent / source).resolve())
  recipe, calibration = spec.get('recipe', ''), spec.get('calibration', '')
  if recipe and (path.parent / recipe).is_file():
    recipe = str(path.parent / recipe)
  if calibration and (path.parent / calibration).exists():
    calibration = str(path.parent / calibration)
  if recipe:
    recipe_lib.Recipe.of(recipe, num_layers=recipe_lib.ANY_LAYERS)
  return Model(
    name=name,
    kind=kind,
    source=source,
    recipe=recipe,
    budget=spec.get('budget', ''),
    calibration=calibration,
    compensate=spec.get('compensate', False),
    quantize=spec.get('quantize', ''),
    peer=spec.get('peer', ''),
  )


def _check_compression(spec: Mapping[str, Any], kind: str, where: str) -> None:
  """Of 'recipe' and 'budget', and what goes with them."""
  given = [k for k in ('recipe', 'budget') if k in spec]
  more = [k for k in ('calibration', 'compensate') if k in spec]
  if 'recipe' in given and kind == 'gguf':
    raise errors.ConfigError(f"{where}: 'recipe' is not for a 'gguf'.")
  if ('budget' in given or more) and (kind != 'checkpoint' or len(given) != 1):
    raise errors.ConfigError(
      f"{where}: 'budget' is for a 'checkpoint' without a recipe,"
      " 'calibration' and 'compensate' for one with either."
    )
  if type(spec.get('compensate', False)) is not bool:
    raise errors.ConfigError(
      f"{where}: 'compensate' must be true or false, got"
      f' {json.dumps(spec["compensate"])}.'
    )
  if 'budget' in given:
    gx_compress.Budget.parse(spec['budget'])
    if more and (spec.get('calibration') == 'none' or 'compensate' in more):
      raise errors.ConfigError(
        f'{where}: a budget needs a text to calibrate on, and compensates'
        " without 'compensate'."
      )


def _task(name: str, spec: Any, path: pathlib.Path) -> Task:
  where = f'{path}: task {name!r}'
  kind = spec.get('kind') if isinstance(spec, dict) else None
  if kind not in _TASKS:
    raise errors.ConfigError(f"{where}: 'kind' must be one of {[*_TASKS]}.")
  fields = _TASKS[kind]
  given = {k: v for k, v in spec.items() if k != 'kind'}
  if unknown := set(given) - set(fields):
    raise errors.ConfigError(
      f'{where}: no fields {sorted(unknown)}, expected some of'
      f' {sorted(fields)}.'
    )
  options = {}
  known = _format(given.get('format', ''), kind, where)
  for key, (of, default) in fields.items():
    value = given.get(key, known.get(key, default))
    if value is None:
      raise errors.ConfigError(f'{where}: {key!r} is missing.')
    if of is float and type(value) is int:
      value = float(value)
    if type(value) is not of:
      raise errors.ConfigError(
        f'{where}: {key!r} must be a {of.__name__}, got {json.dumps(value)}.'
      )
    options[key] = value
    least = _LEAST.get(key, 0)
    if of in (int, float) and not (least <= value and math.isfinite(value)):
      raise errors.ConfigError(
        f'{where}: {key!r} must be {least} or more, got {value}.'
      )
  _check_values(options, where)
  for key in ('items', 'text'):
    if key in options and (path.parent / options[key]).exists():
      options[key] = str(path.parent / options[key])
  return Task(name=name, kind=kind, options=options)


def _check_values(options: Mapping[str, Any], where: str) -> None:
  """Of fields that take some values only."""
  for key, known in (('check', _CHECKS), ('split', _SPLITS)):
    if key in options and options[key] not in known:
      raise errors.ConfigError(
        f'{where}: {key!r} must be one of {[*known]}, got {options[key]!r}.'
      )
  if 'seeds' not in options:
    return
  seeds, stops = options['seeds'], options['stops']
  whole = all(type(seed) is int and seed >= 0 for seed in seeds)
  if not seeds or not whole or len({*seeds}) < len(seeds):
    raise errors.ConfigError(
      f"{where}: 'seeds' must be different numbers from 0 on, one or more, got"
      f' {json.dumps(seeds)}.'
    )
  if not all(stop and isinstance(stop, str) for stop in stops):
    raise errors.ConfigError(
      f"{where}: 'stops' must be texts, got {json.dumps(stops)}."
    )


def _format(name: Any, kind: str, where: str) -> dict[str, Any]:
  """What a known set says of its own task: how it is judged, where it ends."""
  if name == '':
    return {}
  wanted = 'choices' if kind == 'choices' else 'generate'
  names = [
    key
    for key, value in evals.FORMATS.items()
    if ('generate' if value.check else 'choices') == wanted
  ]
  if name not in names:
    raise errors.ConfigError(
      f"{where}: 'format' of {kind!r} must be one of {names}, got {name!r}."
    )
  found = evals.FORMATS[name]
  if not found.check:
    return {}
  return {'check': found.check, 'stops': [*found.stops]}
