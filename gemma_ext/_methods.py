# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The methods of recipes: how a weight can be stored."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any, ClassVar

from gemma_ext import _patterns
from gemma_ext import errors

_MAX_GROUP = 1 << 20
_MAX_PLANES = 4
_MAX_BANDS = 64
_MAX_EXPERTS = 1 << 17
_MAX_RANK = 1 << 12
_ROUTERS = ('norm', 'gate', 'softmax', 'sigmoid', 'expert_choice')
_PACKINGS = ('2bit', '5trit', '3of4')
_SCALES = ('bf16', 'ue5m3', 'e4m3')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """Base of the compression methods. Subclasses are in `METHODS` by name."""

  NAME: ClassVar[str] = ''

  def to_json(self) -> dict[str, Any]:
    """Returns the method's name and every field as plain JSON values."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    fields = {
      k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()
    }
    # As recipes were written before there was a choice.
    if fields.get('x_bits') == 16:
      del fields['x_bits']
    if isinstance(self, Int) and self.scale == 'bf16':
      del fields['scale']
    return {'method': self.NAME, **fields}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep(Method):
  """Leaves the weights dense. Shields them from later rules."""

  NAME: ClassVar[str] = 'keep'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary(Method):
  """Weights in {-1, 0, 1} with one scale per group, as a sum of planes.

  Attributes:
    planes: Ternary matrices that are added up, 1 to 4; each has its own scales.
    group: Input weights that share one scale. Where it does not divide the
      input axis of a weight, the largest divisor below it is used instead.
    density: Fraction of nonzero weights in every group, in (0, 1]. `None` lets
      the fit choose what minimises the error.
    pattern: `(n, m)`: exactly n nonzeros among every m consecutive inputs.
      Excludes `density`.
    packing: '2bit' stores 4 weights a byte, '5trit' stores 5, '3of4' stores 32
      in 5 bytes, of `pattern=(3, 4)`, which it implies.
    scale: 'bf16' stores a scale in two bytes, 'ue5m3' in one, see
      `docs/formats.md`. Groups of half the size are then the better bargain.
    tied: Whether planes share their scales, each a third of the one before.
    x_bits: What kernels may round the activations to that meet the weight: 16,
      or 8, which is faster and coarser.
  """

  NAME: ClassVar[str] = 'ternary'

  planes: int = 1
  group: int = 128
  density: float | None = None
  pattern: tuple[int, int] | None = None
  packing: str = '2bit'
  scale: str = 'bf16'
  tied: bool = False
  x_bits: int = 16

  def __post_init__(self):
    _check_x_bits('Ternary', self.x_bits)
    _check_int('Ternary.planes', self.planes, 1, _MAX_PLANES)
    _check_int('Ternary.group', self.group, 1, _MAX_GROUP)
    if self.density is not None and not (
      isinstance(self.density, (int, float))
      and not isinstance(self.density, bool)
      and 0 < self.density <= 1
    ):
      raise errors.RecipeError(
        'Ternary.density must be None or a number in (0, 1], got'
        f' {self.density!r}.'
      )
    if self.pattern is not None:
      pattern = (
        tuple(self.pattern) if isinstance(self.pattern, (list, tuple)) else ()
      )
      if (
        len(pattern) != 2
        or not all(type(v) is int for v in pattern)
        or not 1 <= pattern[0] <= pattern[1] <= 64
      ):
        raise errors.RecipeError(
          'Ternary.pattern must be None or (n, m) with 1 <= n <= m <= 64,'
          f' got {self.pattern!r}.'
        )
      if self.density is not None:
        raise errors.RecipeError(
          'Ternary takes `density` or `pattern`, not both; got'
          f' density={self.density!r}, pattern={self.pattern!r}.'
        )
      object.__setattr__(self, 'pattern', pattern)
    if self.packing not in _PACKINGS:
      raise errors.RecipeError(
        f'Ternary.packing must be one of {_PACKINGS}, got {self.packing!r}.'
      )
    if self.packing == '3of4':
      if self.density is None and self.pattern is None and not self.tied:
        object.__setattr__(self, 'pattern', (3, 4))
      if self.pattern != (3, 4) or self.tied:
        raise errors.RecipeError(
          "Ternary.packing='3of4' stores the pattern (3, 4) and no tied planes;"
          f' got density={self.density!r}, pattern={self.pattern!r},'
          f' tied={self.tied!r}.'
        )
    _check_scale('Ternary', self.scale, _SCALES[:2])
    if not isinstance(self.tied, bool):
      raise errors.RecipeError(
        f'Ternary.tied must be a bool, got {self.tied!r}.'
      )
    if self.tied and (self.density is not None or self.pattern is not None):
      raise errors.RecipeError(
        'Ternary.tied leaves no choice of density or pattern; got'
        f' density={self.density!r}, pattern={self.pattern!r}.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int(Method):
  """Symmetric integers with one scale per group or per output channel.

  Attributes:
    bits: Bits a weight, 2 to 8.
    group: Input weights that share one scale; `None` for one scale per output
      channel. Where it does not divide the input axis of a weight, the largest
      divisor below it is used instead.
    scale: As for `Ternary`; or 'e4m3', one byte with a sign: the code that has
      no twin is then on the side of the largest weight, as in 'bf16'.
    x_bits: As for `Ternary`.
  """

  NAME: ClassVar[str] = 'int'

  bits: int = 8
  group: int | None = None
  scale: str = 'bf16'
  x_bits: int = 16

  def __post_init__(self):
    _check_x_bits('Int', self.x_bits)
    _check_int('Int.bits', self.bits, 2, 8)
    _check_scale('Int', self.scale)
    if self.group is not None:
      _check_int('Int.group', self.group, 1, _MAX_GROUP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows(Method):
  """Bands of rows of a table of embeddings, each with a method of its own.

  Rare tokens can do with fewer bits. Tokenizers number frequent tokens first,
  so that bands of rows are bands of frequency, about.

  Attributes:
    bands: `(end, method)` pairs, 1 to 64: a band goes from the end of the one
      before up to `end`; the last one has `None` and takes the rest.
    ordered: Whether rows are in the order of what an error in them costs, the
      dearest first, in place of that of the vocabulary. The place of every row
      is a parameter then, int32, and `gx.compress` needs text to find it.
    centered: Whether the mean of all rows is stored beside them, and the rows
      without it. What all rows have in common takes the range of their codes:
      a few columns of Gemma's tables are large in every row.
  """

  NAME: ClassVar[str] = 'rows'

  bands: tuple[tuple[int | None, Method], ...]
  ordered: bool = False
  centered: bool = False

  def __post_init__(self):
    bands = self.bands
    for name in ('ordered', 'centered'):
      value = getattr(self, name)
      if not isinstance(value, bool):
        raise errors.RecipeError(
          f'Rows.{name} must be true or false, got {_patterns.brief(value)}.'
        )
    if (
      not isinstance(bands, (list, tuple))
      or not 1 <= len(bands) <= _MAX_BANDS
      or not all(isinstance(b, (list, tuple)) and len(b) == 2 for b in bands)
    ):
      raise errors.RecipeError(
        f'Rows.bands must be 1 to {_MAX_BANDS} pairs (end, method), got'
        f' {_patterns.brief(bands)}.'
      )
    ends = [end for end, _ in bands]
    numbers = [end for end in ends[:-1] if type(end) is int]
    if (
      ends[-1] is not None
      or len(numbers) < len(ends) - 1
      or any(a >= b for a, b in zip([0, *numbers], numbers, strict=False))
    ):
      raise errors.RecipeError(
        'The ends of Rows.bands must ascend from 1, the last one be None; got'
        f' {ends}.'
      )
    for _, method in bands:
      if type(method) not in (Ternary, Int):
        raise errors.RecipeError(
          f'A band of Rows is `Ternary` or `Int`, got {method!r}.'
        )
    object.__setattr__(self, 'bands', tuple((e, m) for e, m in bands))

  @classmethod
  def of(
    cls,
    bands: Sequence[tuple[int | None, Method]],
    *,
    ordered: bool = False,
    centered: bool = False,
  ) -> Method:
    """Returns the method of bands up to the end of the table.

    Args:
      bands: As the attribute, the last end being that of the table.
      ordered: As the attribute.
      centered: As the attribute.

    Returns:
      `Rows`, or the method itself of a single band that is not centered.
    """
    last = bands[-1][1]
    if len(bands) == 1 and not centered:
      return last
    bands = (*bands[:-1], (None, last))
    return cls(bands=bands, ordered=ordered, centered=centered)

  def to_json(self) -> dict[str, Any]:
    """Returns the method's name and its bands as plain JSON values."""
    bands = [{'end': end, **method.to_json()} for end, method in self.bands]
    return {
      'method': self.NAME,
      'bands': bands,
      'ordered': self.ordered,
      'centered': self.centered,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE(Method):
  """A feed-forward layer as a sparse mixture of experts.

  The hidden neurons of the layer are cut into `shared + num_experts` slices of
  the same size, each an expert of its own; the shared ones come first and run
  for every token. Both weights of the layer keep their shapes, and with every
  expert running the layer is the dense one, if the router is 'norm' or 'gate':
  `gx.compress` carves these out of a dense layer, `gx.compress.upcycle` makes
  mixtures for the others, whose weights add up to one at most.

  Attributes:
    num_experts: Experts that a router chooses from.
    top_k: The most of them that a token gets. Fewer at run time: `k` and
      `threshold` among the router's parameters.
    shared: Experts that every token gets.
    router: What a logit is, and so the weight of a chosen expert: 'norm', the
      logarithm of the squared norm of the expert's output, as it is estimated,
      the weight is one; 'gate', the same, estimated from the gate of every
      neuron, which is computed for all of them: a third of the layer's weights
      is always read, and experts may be as small as one neuron; 'softmax', the
      weights are the softmax of the chosen logits; 'sigmoid', they are the
      sigmoids, normalised, and a bias takes part in the choice alone
      (DeepSeek-V3, arXiv 2412.19437, section 2.1.2);
      'expert_choice', the weight is the softmax over all experts, and each
      expert takes its best tokens of a sequence, `top_k / num_experts` of them
      (arXiv 2202.09368), which is not causal: for training alone.
    weights: How the weights of the experts are stored: `Keep`, `Ternary` or
      `Int`.
  """

  NAME: ClassVar[str] = 'moe'

  num_experts: int
  top_k: int
  shared: int = 0
  router: str = 'norm'
  weights: Method = Keep()

  def __post_init__(self):
    _check_int('MoE.num_experts', self.num_experts, 1, _MAX_EXPERTS)
    _check_int('MoE.top_k', self.top_k, 1, self.num_experts)
    _check_int('MoE.shared', self.shared, 0, _MAX_EXPERTS)
    if self.router not in _ROUTERS:
      raise errors.RecipeError(
        f'MoE.router must be one of {_ROUTERS}, got'
        f' {_patterns.brief(self.router)}.'
      )
    if type(self.weights) not in (Keep, Ternary, Int):
      raise errors.RecipeError(
        'MoE.weights must be `Keep`, `Ternary` or `Int`, got'
        f' {_patterns.brief(self.weights)}.'
      )

  @property
  def slices(self) -> int:
    """Experts of both kinds."""
    return self.shared + self.num_experts

  def to_json(self) -> dict[str, Any]:
    """Returns the method's name and every field as plain JSON values."""
    return {**super().to_json(), 'weights': self.weights.to_json()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Method):
  """A weight in few bits, and a product of two thin matrices that corrects it.

  `w = weights + up @ down`, where `down` takes the inputs to `rank` numbers and
  `up` takes these to the outputs, as in LQER (arXiv 2402.02446) and EoRA (arXiv
  2410.21271). With statistics the product is the one that loses least under the
  curvature of the weight. For the weights of einsums, not for tables of
  embeddings and not for experts.

  Attributes:
    weights: How the weight is stored that is corrected: `Ternary` or `Int`.
    rank: Numbers in between, at least 1.
    bits: Bits a number of both factors, 2 to 8. Rows of `up` are as short as
      the rank, and 2 and 4 bits are stored in blocks of 32 bytes: with ranks
      below 64 other widths take less.
  """

  NAME: ClassVar[str] = 'low_rank'

  weights: Ternary | Int
  rank: int
  bits: int = 8

  def __post_init__(self):
    if type(self.weights) not in (Ternary, Int):
      raise errors.RecipeError(
        'LowRank.weights must be `Ternary` or `Int`, got'
        f' {_patterns.brief(self.weights)}.'
      )
    _check_int('LowRank.rank', self.rank, 1, _MAX_RANK)
    _check_int('LowRank.bits', self.bits, 2, 8)

  @property
  def down(self) -> Int:
    """How the factor is stored that reads the inputs."""
    return Int(
      bits=self.bits, group=128, scale='ue5m3', x_bits=self.weights.x_bits
    )

  @property
  def up(self) -> Int:
    """How the other one is stored, one scale a row."""
    return dataclasses.replace(self.down, group=None)

  def to_json(self) -> dict[str, Any]:
    """Returns the method's name and every field as plain JSON values."""
    return {**super().to_json(), 'weights': self.weights.to_json()}


METHODS: dict[str, type[Method]] = {
  cls.NAME: cls for cls in (Keep, Ternary, Int, Rows, MoE, LowRank)
}
# Methods that have another for what they store, and the fields they need.
_OUTER = {
  MoE.NAME: {'num_experts', 'top_k'},
  LowRank.NAME: {'rank', 'weights'},
}


def method_from_json(fields: Any) -> Method:
  """Inverse of `Method.to_json`.

  Args:
    fields: Parsed JSON.

  Raises:
    RecipeError: If it is no method, naming the field.
  """
  if not isinstance(fields, dict) or 'method' not in fields:
    raise errors.RecipeError(
      f"A method in JSON has the key 'method', got {_patterns.brief(fields)}."
    )
  fields = dict(fields)
  name = fields.pop('method')
  if not isinstance(name, str) or name not in METHODS:
    raise errors.RecipeError(
      f'Unknown method {_patterns.brief(name)}, expected one of'
      f' {sorted(METHODS)}.'
    )
  known = {f.name for f in dataclasses.fields(METHODS[name])}
  if not set(fields) <= known:
    raise errors.RecipeError(
      f'Method {name!r} has no fields {sorted(set(fields) - known)}, expected'
      f' some of {sorted(known)}.'
    )
  if name == Rows.NAME and 'bands' not in fields:
    raise errors.RecipeError("Method 'rows' needs its 'bands'.")
  if name == Rows.NAME and isinstance(fields.get('bands'), list):
    fields['bands'] = tuple(map(_band_from_json, fields['bands']))
  if name in _OUTER:
    if not _OUTER[name] <= set(fields):
      needed = ' and '.join(map(repr, sorted(_OUTER[name])))
      raise errors.RecipeError(f'Method {name!r} needs {needed}.')
    if 'weights' in fields:
      inner = fields['weights']
      if isinstance(inner, dict) and inner.get('method') in (
        *_OUTER,
        Rows.NAME,
      ):
        raise errors.RecipeError(
          f'{METHODS[name].__name__}.weights cannot be {inner["method"]!r}.'
        )
      fields['weights'] = method_from_json(inner)
  return METHODS[name](**fields)


def _band_from_json(band: Any) -> tuple[Any, Method]:
  if not isinstance(band, dict) or 'end' not in band:
    raise errors.RecipeError(
      f"A band in JSON has the key 'end', got {_patterns.brief(band)}."
    )
  rest = {k: v for k, v in band.items() if k != 'end'}
  return band['end'], method_from_json(rest)


def _check_int(name: str, value: Any, low: int, high: int) -> None:
  if type(value) is not int or not low <= value <= high:
    raise errors.RecipeError(
      f'{name} must be an integer in [{low}, {high}], got'
      f' {_patterns.brief(value)}.'
    )


def _check_scale(
  name: str, scale: Any, known: tuple[str, ...] = _SCALES
) -> None:
  if scale not in known:
    raise errors.RecipeError(
      f'{name}.scale must be one of {known}, got {_patterns.brief(scale)}.'
    )


def _check_x_bits(name: str, value: Any) -> None:
  if type(value) is not int or value not in (8, 16):
    raise errors.RecipeError(
      f'{name}.x_bits must be 8 or 16, got {_patterns.brief(value)}.'
    )
