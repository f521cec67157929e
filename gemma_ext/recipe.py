# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Recipe`: which method compresses which weights.

A recipe is an ordered list of rules, each a regular expression on parameter
paths and the method for what it matches. The first rule that matches wins, and
weights that no rule matches stay dense. Recipes are frozen and hashable, so
that a model that carries one is a valid static argument of `jax.jit`, and they
travel inside checkpoints as JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import json
import os
import re
from typing import Any, TypeAlias

from gemma_ext import _patterns
from gemma_ext import errors
from gemma_ext._methods import Int as Int
from gemma_ext._methods import Keep as Keep
from gemma_ext._methods import LowRank as LowRank
from gemma_ext._methods import Method as Method
from gemma_ext._methods import method_from_json as method_from_json
from gemma_ext._methods import METHODS as METHODS
from gemma_ext._methods import MoE as MoE
from gemma_ext._methods import Rows as Rows
from gemma_ext._methods import Ternary as Ternary

_JSON_VERSION = 1
_MAX_JSON_BYTES = 1 << 20
_MAX_RULES = 4096
# For checking a preset's name before its model is there.
ANY_LAYERS = 10_000


RuleLike: TypeAlias = tuple[str, Method]


# ---------------------------------- recipe -----------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  r"""Ordered rules from parameter paths to methods.

  A pattern is a regular expression that must cover whole segments of a path:
  `mlp` matches `layer_3/mlp/linear` but not `layer_3/mlp2/linear`, and
  `layer_1` does not match `layer_10/...`.

  Attributes:
    rules: `(pattern, method)` pairs; the first pattern that matches wins.
  """

  rules: tuple[RuleLike, ...] = ()

  def __post_init__(self):
    rules = tuple(self.rules)
    if len(rules) > _MAX_RULES:
      raise errors.RecipeError(
        f'A recipe has at most {_MAX_RULES} rules, got {len(rules)}.'
      )
    for rule in rules:
      if not isinstance(rule, tuple) or len(rule) != 2:
        raise errors.RecipeError(
          f'A rule is a (pattern, method) pair, got {rule!r}.'
        )
      pattern, method = rule
      _patterns.check(pattern)
      if type(method) not in METHODS.values():
        raise errors.RecipeError(
          f'The method of rule {pattern!r} must be one of'
          f' {sorted(c.__name__ for c in METHODS.values())}, got {method!r}.'
        )
    if (
      sum(_patterns.ways(pattern) for pattern, _ in rules) > _patterns.MAX_WAYS
    ):
      worst = max(rules, key=lambda rule: _patterns.ways(rule[0]))[0]
      raise errors.RecipeError(
        f'Matching these patterns could take hours, most of all {worst!r}.'
        " Repeat nothing that holds a repeat, and use '.*' once or twice."
      )
    object.__setattr__(self, 'rules', rules)

  @classmethod
  def of(
    cls,
    spec: Recipe | str | os.PathLike[str] | Mapping[str, Method] | Iterable,
    *,
    num_layers: int | None = None,
  ) -> Recipe:
    """Makes a recipe of what users have at hand.

    Args:
      spec: A recipe, a mapping or list of `pattern -> method`, the name of a
        preset (see `Recipe.preset`), or the path of a JSON file.
      num_layers: Number of layers of the model, for presets that count layers
        from the end.

    Returns:
      The recipe.

    Raises:
      RecipeError: If the recipe is not valid, or there is no such preset or
        file.
    """
    if isinstance(spec, Recipe):
      return spec
    if isinstance(spec, (str, os.PathLike)):
      name = os.fspath(spec)
      if name.endswith('.json') or os.path.isfile(name):
        return cls.from_json(read_json(name))
      return cls.preset(name, num_layers=num_layers)
    if isinstance(spec, Mapping):
      return cls(rules=tuple(spec.items()))
    try:
      return cls(rules=tuple(tuple(rule) for rule in spec))
    except TypeError as e:
      raise errors.RecipeError(
        'A recipe is made of a mapping from pattern to method, a preset name'
        f' or a JSON path, got {spec!r}.'
      ) from e

  @classmethod
  def preset(cls, name: str, *, num_layers: int | None = None) -> Recipe:
    """Returns the recipe of that name.

    * `int8`: every weight in 8 bits, groups of 128.
    * `int4`: every weight in 4 bits, groups of 32.
    * `tssn`: feed-forward layers in one ternary plane, groups of 128; the
      rest as in `int8`. `tssn-first-N`, `tssn-last-N` and `tssn-layer-N` make
      only those feed-forward layers ternary.
    * `tssn2`, `tssn3` (and `tssn2-last-N`, ...): two or three planes.

    Args:
      name: Name of the preset.
      num_layers: Number of layers of the model; needed by `-last-N`.

    Raises:
      RecipeError: If there is no such preset, or the number of layers is
        missing or too small.
    """
    # One scale per output channel would save 1.5% and cost several times the
    # error: perplexity of the 270M rises by 0.4% instead of 0.1%.
    int8 = Int(bits=8, group=128)
    if name == 'int8':
      return cls(rules=(('.*', int8),))
    if name == 'int4':
      return cls(rules=(('.*', Int(bits=4, group=32)),))
    match = re.fullmatch(
      r'tssn([2-4]?)(?:-(first|last|layer)-(\d{1,4}))?', name
    )
    if not match:
      raise errors.RecipeError(
        f'No recipe preset or file {name!r}. Presets: {PRESETS}. A file is'
        ' given by a path that ends in .json.'
      )
    planes, which, number = match.groups()
    layers = _layer_pattern(which, int(number or 0), num_layers, name)
    return cls(
      rules=(
        (rf'{layers}/mlp2?', Ternary(planes=int(planes or 1))),
        ('.*', int8),
      )
    )

  def to_json(self) -> dict[str, Any]:
    """Returns the recipe as plain JSON values."""
    return {
      'version': _JSON_VERSION,
      'rules': [
        {'match': pattern, **method.to_json()} for pattern, method in self.rules
      ],
    }

  @classmethod
  def from_json(cls, data: Any) -> Recipe:
    """Inverse of `to_json`.

    Args:
      data: Parsed JSON.

    Raises:
      RecipeError: If it is not a recipe, naming the field.
    """
    if not isinstance(data, dict) or set(data) != {'version', 'rules'}:
      raise errors.RecipeError(
        "A recipe in JSON has the keys 'version' and 'rules', got"
        f' {_patterns.brief(data)}.'
      )
    if data['version'] != _JSON_VERSION or isinstance(data['version'], bool):
      raise errors.RecipeError(
        f'Recipe version {_patterns.brief(data["version"])} is not supported,'
        f' expected {_JSON_VERSION}. A newer gemma_ext may read it.'
      )
    if not isinstance(data['rules'], list):
      raise errors.RecipeError(
        f"'rules' must be a list, got {_patterns.brief(data['rules'])}."
      )
    return cls(rules=tuple(_rule_from_json(rule) for rule in data['rules']))

  def with_x_bits(self, x_bits: int) -> Recipe:
    """Returns the recipe with activations rounded to as many bits everywhere.

    Args:
      x_bits: 16 or 8, see `Int`.
    """

    def of(method: Method) -> Method:
      if isinstance(method, Rows):
        bands = tuple((end, of(each)) for end, each in method.bands)
        return dataclasses.replace(method, bands=bands)
      if isinstance(method, (MoE, LowRank)):
        inner: Any = of(method.weights)
        return dataclasses.replace(method, weights=inner)
      if isinstance(method, (Ternary, Int)):
        return dataclasses.replace(method, x_bits=x_bits)
      return method

    return Recipe(rules=tuple((p, of(method)) for p, method in self.rules))

  def method_of(self, path: str) -> Method:
    """Returns the method for one parameter path; `Keep()` if none matches."""
    for pattern, method in self.rules:
      if _patterns.matches(pattern, path):
        return method
    return Keep()

  def resolve(self, paths: Iterable[str]) -> dict[str, Method]:
    """Returns the method for every path.

    Args:
      paths: Paths of all the weights that could be compressed.

    Returns:
      Path to method, in the order of `paths`. Routers stay dense unless a
      pattern names them.

    Raises:
      UnmatchedRuleError: If a rule matched nothing.
    """
    paths = list(paths)
    methods: dict[str, Method] = {}
    used: set[int] = set()
    shadowed: set[int] = set()
    for path in paths:
      hits = [
        i for i, (p, _) in enumerate(self.rules) if _patterns.matches(p, path)
      ]
      methods[path] = self.rules[hits[0]][1] if hits else Keep()
      used.update(hits[:1])
      shadowed.update(hits[1:])
    for i, (pattern, _) in enumerate(self.rules):
      if i in used:
        continue
      if i in shadowed:
        raise errors.UnmatchedRuleError(
          f'Rule {i} {pattern!r} never applies: earlier rules match all that'
          ' it matches. Put it before them.'
        )
      raise errors.UnmatchedRuleError(
        f'Rule {i} {pattern!r} matches no weight of the model. Near misses:'
        f' {_patterns.near_misses(pattern, paths)}. Patterns cover whole path'
        ' segments.'
      )
    return methods

  def __str__(self) -> str:
    lines = [f'  {pattern!r}: {method}' for pattern, method in self.rules]
    return '\n'.join(['Recipe(', *lines, ')'])


PRESETS = (
  'int8, int4, tssn, tssn2, tssn3, tssn-first-N, tssn-last-N, tssn-layer-N'
)


# ---------------------------------- helpers ----------------------------------


def _layer_pattern(
  which: str | None, number: int, num_layers: int | None, name: str
) -> str:
  """Returns a regular expression for the layers that a preset means."""
  if which is None:
    return r'layer_\d+'
  if num_layers is None and which == 'last':
    raise errors.RecipeError(
      f'Preset {name!r} counts layers from the end: pass `num_layers=`.'
    )
  if which == 'layer':
    layers = range(number, number + 1)
  elif which == 'first':
    layers = range(number)
  else:
    assert num_layers is not None
    layers = range(num_layers - number, num_layers)
  if (
    not layers
    or layers[0] < 0
    or (num_layers is not None and layers[-1] >= num_layers)
  ):
    raise errors.RecipeError(
      f'Preset {name!r} names layers that a model of {num_layers} layers does'
      ' not have.'
    )
  return f'layer_({"|".join(map(str, layers))})'


def _rule_from_json(rule: Any) -> RuleLike:
  if not isinstance(rule, dict) or not {'match', 'method'} <= set(rule):
    raise errors.RecipeError(
      "A rule in JSON has the keys 'match' and 'method', got"
      f' {_patterns.brief(rule)}.'
    )
  fields = dict(rule)
  pattern = fields.pop('match')
  return (pattern, method_from_json(fields))


def read_json(path: str, most: int = _MAX_JSON_BYTES) -> Any:
  """Reads JSON of at most so many bytes.

  Args:
    path: The file.
    most: Bytes.

  Raises:
    RecipeError: If there is no such file, it is larger, or no JSON.
  """
  try:
    with open(os.path.expanduser(path), 'rb') as f:
      data = f.read(most + 1)
  except OSError as e:
    raise errors.RecipeError(f'Cannot read {path!r}: {e}.') from e
  if len(data) > most:
    raise errors.RecipeError(f'{path!r} is larger than {most} bytes.')
  try:
    return json.loads(data)
  except (ValueError, RecursionError) as e:
    raise errors.RecipeError(f'{path!r} is not JSON: {e}.') from e
