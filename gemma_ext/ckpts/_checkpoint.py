# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""`Checkpoint`: what `load` returns."""

from collections.abc import Iterator
import dataclasses
from typing import Any

from flax import linen as nn
from gemma import gm

from gemma_ext import recipe as recipe_lib
from gemma_ext.ckpts import _families

# Every official vocabulary has at least so many pieces.
_OFFICIAL_VOCAB = 256_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """A model, its parameters and its tokenizer.

  Unpacks as the three: `model, params, tokenizer = gx.ckpts.load(path)`.

  Attributes:
    model: The flax model; `gx.nn.Compressed` if the parameters are packed.
    params: Nested dict of arrays, as `model.init()['params']` gives it.
    tokenizer: The tokenizer, if there is one.
    source: Where it came from.
    recipe: What the parameters are packed with; `None` if they are dense.
    metadata: What the writer of one of our own directories noted in it.
  """

  model: nn.Module
  params: dict[str, Any]
  tokenizer: gm.text.Tokenizer | None
  source: str
  recipe: recipe_lib.Recipe | None = None
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __iter__(self) -> Iterator[Any]:
    return iter((self.model, self.params, self.tokenizer))


def default_tokenizer(model: nn.Module) -> gm.text.Tokenizer | None:
  """The official tokenizer of the model's family, if it can be its own.

  It is not read before its first use, when `gm` fetches it.
  """
  if model.config.num_embed < _OFFICIAL_VOCAB:
    return None
  return _families.tokenizer_class(model)()
