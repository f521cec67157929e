# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of Gemma 2's tokenizer under the plain official samplers."""

from gemma import gm
import pytest

from gemma_ext import ckpts
from tests import tiny

_OFFICIAL = gm.text.Gemma2Tokenizer.special_tokens


def test_special_tokens_are_the_official_ones_and_one_alias():
  ours = ckpts.Gemma2Tokenizer.special_tokens.__members__
  extra = {'BEGIN_OF_TOOL_RESPONSE': _OFFICIAL.END_OF_TURN}
  assert dict(ours) == {**_OFFICIAL.__members__, **extra}


def test_of_keeps_path_and_custom_tokens():
  path = tiny.tokenizer(2).path
  official = gm.text.Gemma2Tokenizer(path=path, custom_tokens={5: '<mine>'})
  ours = ckpts.Gemma2Tokenizer.of(official)
  assert type(ours) is ckpts.Gemma2Tokenizer
  assert ours.path == path
  assert ours.custom_tokens == {5: '<mine>'}


def test_the_plain_sampler_takes_it():
  model = tiny.model('gemma2')
  kwargs = dict(
    model=model,
    params=tiny.params(model),
    cache_length=32,
    max_out_length=4,
    pad_length=16,
  )
  tokenizer = tiny.tokenizer(2)
  official = gm.text.Gemma2Tokenizer(path=tokenizer.path)
  # Why the class exists: drop it once the official one passes here.
  with pytest.raises(AttributeError, match='BEGIN_OF_TOOL_RESPONSE'):
    gm.text.Sampler(tokenizer=official, **kwargs).sample('A river')
  out = gm.text.Sampler(tokenizer=tokenizer, **kwargs).sample(
    'A river', return_state=True
  )
  assert out.tokens.shape == (4,)
  assert out.text == tokenizer.decode(out.tokens)
