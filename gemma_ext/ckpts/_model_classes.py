# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""The model classes that a checkpoint may name, official and generic."""

import dataclasses
from typing import Any

from flax import linen as nn
from gemma import gm
from gemma.gm.nn import _config as dense_config
from gemma.gm.nn import _transformer as dense_transformer
from gemma.gm.nn.gemma3n import _config as gemma3n_config
from gemma.gm.nn.gemma3n import _transformer as gemma3n_transformer
from gemma.gm.nn.gemma4 import _config as gemma4_config
from gemma.gm.nn.gemma4 import _transformer as gemma4_transformer

from gemma_ext import errors
from gemma_ext.ckpts import _gemma2_tokenizer


class Gemma2(dense_transformer.Transformer):
  """A Gemma 2 of any size."""

  INFO = dense_transformer.ModelInfo(tokenizer_version=2)


class Gemma3(dense_transformer.Transformer):
  """A Gemma 3 text model of any size."""

  INFO = dense_transformer.ModelInfo(tokenizer_version=3)


class Gemma3n(gemma3n_transformer.Gemma3nTransformer):
  """A Gemma 3n text model of any size."""

  INFO = gemma3n_transformer.ModelInfo(tokenizer_version='3n')


class Gemma4(gemma4_transformer.Transformer):
  """A Gemma 4 text model of any size, dense or mixture of experts."""

  INFO = gemma4_transformer.ModelInfo(tokenizer_version=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What the models of one family have in common.

  Attributes:
    name: 'gemma2', 'gemma3', 'gemma3n' or 'gemma4'.
    generic: The class for sizes that no official class has.
    official: The official classes.
    config: Module of the official configuration.
    base: The official class that all of them derive from.
    tokenizer: The official tokenizer class, or what stands in for it.
  """

  name: str
  generic: type[nn.Module]
  official: tuple[type[nn.Module], ...]
  config: Any
  base: type[nn.Module]
  tokenizer: type[gm.text.Tokenizer]


FAMILIES = {
  'gemma2': Family(
    name='gemma2',
    generic=Gemma2,
    official=(gm.nn.Gemma2_2B, gm.nn.Gemma2_9B, gm.nn.Gemma2_27B),
    config=dense_config,
    base=dense_transformer.Transformer,
    tokenizer=_gemma2_tokenizer.Gemma2Tokenizer,
  ),
  'gemma3': Family(
    name='gemma3',
    generic=Gemma3,
    official=(
      gm.nn.Gemma3_270M,
      gm.nn.Gemma3_1B,
      gm.nn.Gemma3_4B,
      gm.nn.Gemma3_12B,
      gm.nn.Gemma3_27B,
    ),
    config=dense_config,
    base=dense_transformer.Transformer,
    tokenizer=gm.text.Gemma3Tokenizer,
  ),
  'gemma3n': Family(
    name='gemma3n',
    generic=Gemma3n,
    official=(gm.nn.Gemma3n_E2B, gm.nn.Gemma3n_E4B),
    config=gemma3n_config,
    base=gemma3n_transformer.Gemma3nTransformer,
    tokenizer=gm.text.Gemma3nTokenizer,
  ),
  'gemma4': Family(
    name='gemma4',
    generic=Gemma4,
    official=(
      gm.nn.Gemma4_E2B,
      gm.nn.Gemma4_E4B,
      gm.nn.Gemma4_31B,
      gm.nn.Gemma4_26B_A4B,
    ),
    config=gemma4_config,
    base=gemma4_transformer.Transformer,
    tokenizer=gm.text.Gemma4Tokenizer,
  ),
}

CLASSES = {
  cls.__name__: (cls, family)
  for family in FAMILIES.values()
  for cls in (family.generic, *family.official)
}

_FAMILY_OF_VERSION = {
  2: 'gemma2',
  3: 'gemma3',
  '3n': 'gemma3n',
  4: 'gemma4',
}


def family_of(model: nn.Module) -> Family:
  """Returns the family of a Transformer, wrapped or subclassed by the user.

  Raises:
    UnsupportedTypeError: If the model derives from no Gemma Transformer.
  """
  info = getattr(model, 'INFO', None)
  name = _FAMILY_OF_VERSION.get(getattr(info, 'tokenizer_version', None))
  if name is not None and isinstance(model, FAMILIES[name].base):
    return FAMILIES[name]
  for family in (FAMILIES['gemma4'], FAMILIES['gemma3n']):
    if isinstance(model, family.base):
      return family
  if isinstance(model, dense_transformer.Transformer):
    # Gemma 3 is what normalises queries and keys; Gemma 2 does not.
    is_gemma3 = model.config.use_qk_norm
    return FAMILIES['gemma3' if is_gemma3 else 'gemma2']
  raise errors.UnsupportedTypeError(
    f'{type(model).__name__} is no Gemma model; expected a subclass of'
    ' gm.nn.Transformer or of the Gemma 3n or Gemma 4 Transformer.'
  )


def text_config(cls: type[nn.Module]) -> Any:
  """Returns the default configuration of `cls` without media encoders."""
  return without_encoders(cls.config)


def without_encoders(config: Any) -> Any:
  """Returns `config` without vision and audio encoders."""
  encoders = {
    name: None
    for name in ('vision_encoder', 'audio_encoder')
    if getattr(config, name, None) is not None
  }
  return dataclasses.replace(config, **encoders) if encoders else config


def build(cls: type[nn.Module], config: Any, dtype: Any) -> nn.Module:
  """Returns a text-only model of class `cls`.

  Args:
    cls: One of `CLASSES`.
    config: Its configuration; left out where it is the default of `cls`, so
      that the model equals what a user would write by hand.
    dtype: Parameter dtype.
  """
  kwargs: dict[str, Any] = {'dtype': dtype}
  if hasattr(cls, 'text_only'):
    kwargs['text_only'] = True
  if getattr(cls, 'config', None) is None or text_config(cls) != config:
    kwargs['config'] = config
  return cls(**kwargs)
