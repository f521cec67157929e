# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of streaming on tiny models, against the official samplers."""

import dialog
from gemma import gm
import jax
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext.text import _loop
from tests import tiny

_PROMPT = 'The river is'
_RANDOM = gm.text.RandomSampling(temperature=0.7)
_RECIPE = gx.Recipe.of(
  {
    r'layer_\d+/mlp2?': gx.Ternary(group=64),
    'embedder/input_embedding': gx.Int(bits=8),
  }
)


def _checkpoint(family='gemma3'):
  model = tiny.model(family)
  tokenizer = tiny.tokenizer(model.INFO.tokenizer_version)
  return model, tiny.params(model), tokenizer


def _compressed(family='gemma3'):
  model, params, tokenizer = _checkpoint(family)
  params = gx.compress(model, params, _RECIPE)
  return gx.nn.Compressed(model=model, recipe=_RECIPE), params, tokenizer


def _official(checkpoint, prompt=_PROMPT, *, count, sampling, seed=0):
  """Tokens of the official sampler, its padding left out."""
  model, params, tokenizer = checkpoint
  is4 = model.INFO.tokenizer_version == 4
  sampler = (gm.text.Gemma4Sampler if is4 else gm.text.Sampler)(
    model=model,
    params=params,
    tokenizer=tokenizer,
    sampling=sampling,
    cache_length=256,
    max_out_length=count,
    pad_length=32,
  )
  out = sampler.sample(prompt, rng=seed, return_state=True)
  return [int(i) for i in out.tokens[: int(out.state.step)]]


@pytest.mark.parametrize('family', tiny.FAMILIES)
def test_tokens_of_the_official_sampler(family):
  checkpoint = _checkpoint(family)
  stream = gx.text.stream(
    checkpoint, _PROMPT, max_new_tokens=18, sampling=_RANDOM, seed=3
  )
  pieces = list(stream)
  expected = _official(checkpoint, count=18, sampling=_RANDOM, seed=3)
  assert stream.tokens == expected
  assert ''.join(pieces) == checkpoint[2].decode(expected)
  assert len(pieces) >= 3
  assert not stream.ended


def test_compressed_and_loaded_from_disk(tmp_path):
  model, params, tokenizer = _compressed()
  gx.ckpts.save(tmp_path / 'c', model=model, params=params, tokenizer=tokenizer)
  loaded = gx.ckpts.load(tmp_path / 'c', dtype='float32')
  stream = gx.text.stream(loaded, _PROMPT, max_new_tokens=12)
  list(stream)
  assert stream.tokens == _official(
    (model, params, tokenizer), count=12, sampling=gm.text.Greedy()
  )


def test_a_conversation_as_the_official_chat():
  model, params, tokenizer = _checkpoint()
  chat = gm.text.ChatSampler(
    model=model,
    params=params,
    tokenizer=tokenizer,
    sampling=_RANDOM,
    cache_length=256,
    max_out_length=8,
  )
  expected = chat.chat('The river', rng=3)
  stream = gx.text.stream(
    (model, params, tokenizer),
    dialog.Conversation(dialog.User('The river')),
    max_new_tokens=8,
    sampling=_RANDOM,
    seed=3,
  )
  # Its text ends with the end token, if there is one.
  assert ''.join(stream) == expected.removesuffix('<end_of_turn>')


def test_pieces_do_not_change_the_text_or_compile_again():
  checkpoint = _checkpoint()
  found = []
  before = None
  for chunk in (1, 3, 100):
    stream = gx.text.stream(
      checkpoint, _PROMPT, max_new_tokens=17, sampling=_RANDOM, chunk=chunk
    )
    pieces = list(stream)
    assert len(pieces) <= -(-17 // chunk)
    found.append((stream.tokens, ''.join(pieces)))
    compiled = _loop.advance._cache_size()
    assert before in (None, compiled)
    before = compiled
  assert found[0] == found[1] == found[2]
  assert len(found[0][0]) == 17


def test_ends_at_a_stop_token_and_does_not_show_it():
  checkpoint = _checkpoint()
  whole = gx.text.stream(
    checkpoint, _PROMPT, max_new_tokens=16, sampling=_RANDOM, seed=3
  )
  list(whole)
  # The first token that did not come before, past the first piece.
  stop = next(
    n for n, i in enumerate(whole.tokens) if n > 4 and i not in whole.tokens[:n]
  )
  stream = gx.text.stream(
    checkpoint,
    _PROMPT,
    max_new_tokens=16,
    sampling=_RANDOM,
    seed=3,
    stop_tokens=(whole.tokens[stop],),
  )
  text = ''.join(stream)
  assert stream.ended
  assert stream.tokens == whole.tokens[: stop + 1]
  assert text == checkpoint[2].decode(whole.tokens[:stop])
  assert list(stream) == []


def test_an_official_gemma2_tokenizer_is_made_fit_for_the_sampler():
  model, params, tokenizer = _checkpoint('gemma2')
  official = gm.text.Gemma2Tokenizer(path=tokenizer.path)
  texts = [
    ''.join(gx.text.stream((model, params, t), 'A river', max_new_tokens=2))
    for t in (tokenizer, official)
  ]
  assert texts[0] == texts[1] != ''


def test_the_cache_is_updated_in_place(monkeypatch):
  caught = []
  advance = _loop.advance

  def catch(stepper, run, *args):
    if not caught:
      caught.append((advance.lower(stepper, run, *args), run.state.cache))
    return advance(stepper, run, *args)

  monkeypatch.setattr(_loop, 'advance', catch)
  # Its cache outweighs all else, though only one layer of three has them all.
  list(gx.text.stream(_checkpoint(), _PROMPT, max_new_tokens=5000, chunk=9999))
  ((lowered, cache),) = caught
  nbytes = sum(x.nbytes for x in jax.tree.leaves(cache))
  memory = lowered.compile().memory_analysis()
  assert memory.alias_size_in_bytes > nbytes > 1.5e6
  # What was given away is gone.
  assert all(x.is_deleted() for x in jax.tree.leaves(cache))


@pytest.mark.parametrize(
  'kwargs, error, message',
  [
    ({'max_new_tokens': 0}, errors.SamplingError, 'max_new_tokens=0'),
    ({'chunk': True}, errors.SamplingError, 'chunk=True'),
    ({'stop_tokens': ['A river']}, errors.SamplingError, "'A river' is"),
  ],
)
def test_arguments_out_of_range(kwargs, error, message):
  with pytest.raises(error, match=message):
    gx.text.stream(_checkpoint(), _PROMPT, **kwargs)


def test_a_tokenizer_that_is_missing_or_does_not_fit():
  model, params, _ = _checkpoint()
  for tokenizer, message in (
    (None, 'has no tokenizer'),
    (tiny.tokenizer(4), 'Incompatible model and tokenizer'),
  ):
    with pytest.raises(errors.TokenizerError, match=message):
      gx.text.stream((model, params, tokenizer), _PROMPT)
