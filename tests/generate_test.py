# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of `python -m gemma_ext.generate` on tiny models."""

import types

from gemma import gm
import pytest

from gemma_ext import ckpts
from gemma_ext import generate
from tests import tiny


@pytest.fixture(name='loaded', autouse=True)
def _loaded(monkeypatch):
  def load(name, *, dtype, progress):
    del progress
    family, _, bare = name.partition('-')
    model = tiny.model(family, dtype=dtype)
    version = model.INFO.tokenizer_version
    return ckpts.Checkpoint(
      model=model,
      params=tiny.params(model),
      tokenizer=None if bare else tiny.tokenizer(version),
      source=name,
    )

  monkeypatch.setattr(ckpts, 'load', load)


def _generate(family, prompt='The capital', **kwargs):
  model = tiny.model(family)
  return list(
    generate.generate(
      model,
      tiny.params(model),
      tiny.tokenizer(model.INFO.tokenizer_version),
      prompt,
      **kwargs,
    )
  )


@pytest.mark.parametrize('family', ['gemma2', 'gemma3n', 'gemma4_moe'])
def test_families(family):
  pieces = _generate(family, max_new_tokens=3, temperature=1.0)
  assert 1 <= pieces[-1][0] <= 3
  assert ''.join(text for _, text in pieces)


@pytest.mark.parametrize('chat', [False, True])
def test_same_text_as_the_official_sampler(chat):
  model = tiny.model('gemma3')
  params = tiny.params(model)
  tokenizer = tiny.tokenizer(3)
  kwargs = dict(
    model=model,
    params=params,
    tokenizer=tokenizer,
    sampling=gm.text.RandomSampling(temperature=1.0),
    cache_length=300,
    max_out_length=8,
  )
  if chat:
    expected = gm.text.ChatSampler(**kwargs).chat('The river', rng=3)
  else:
    expected = gm.text.Sampler(**kwargs, pad_length=64).sample(
      'The river', rng=3
    )
  pieces = _generate(
    'gemma3',
    'The river',
    max_new_tokens=8,
    temperature=1.0,
    seed=3,
    chat=chat,
  )
  found = ''.join(text for _, text in pieces)
  # The official output ends with the end token, if there is one.
  ends = ('<end_of_turn>', '<pad>')
  for end in ends:
    expected = expected.split(end)[0]
  assert found == expected


def test_bytes_of_a_character_wait_for_the_last_one():
  tokenizer = tiny.tokenizer(3)
  ids = tokenizer.encode('a日b')
  assert len(ids) == 5  # Three of them are bytes of one character.
  states = [
    types.SimpleNamespace(state=types.SimpleNamespace(last_token=[i]))
    for i in [*ids, tokenizer.special_tokens.END_OF_TURN]
  ]
  pieces = list(generate._stream(tokenizer, iter(states)))
  assert [text for _, text in pieces] == ['a', '', '', '日', 'b', '']
  # A character that is cut off is shown as far as it came.
  pieces = list(generate._stream(tokenizer, iter(states[:3])))
  assert ''.join(text for _, text in pieces).startswith('a\ufffd')


def test_an_official_gemma2_tokenizer_is_made_fit_for_the_sampler():
  model = tiny.model('gemma2')
  params = tiny.params(model)
  ours = tiny.tokenizer(2)
  official = gm.text.Gemma2Tokenizer(path=ours.path)
  texts = []
  for tokenizer in (ours, official):
    pieces = generate.generate(
      model, params, tokenizer, 'A river', max_new_tokens=2
    )
    texts.append(''.join(text for _, text in pieces))
  assert texts[0] == texts[1] != ''


def test_command(capsys):
  code = generate.main(
    [
      '--checkpoint=gemma3',
      '--prompt=A river',
      '--max_new_tokens=4',
      '--dtype=float32',
    ]
  )
  captured = capsys.readouterr()
  assert code == 0
  expected = ''.join(
    t for _, t in _generate('gemma3', 'A river', max_new_tokens=4)
  )
  assert captured.out == expected + '\n'
  assert 'tokens in' in captured.err


@pytest.mark.parametrize(
  'argv, message',
  [
    (['--checkpoint=gemma3', '--prompt='], '--prompt is empty'),
    (['--checkpoint=gemma3-bare', '--prompt=x'], 'has no tokenizer'),
    (['--checkpoint=gemma3'], 'prompt'),
  ],
)
def test_errors_are_one_line(capsys, argv, message):
  assert generate.main(argv) == 2
  last = capsys.readouterr().err.splitlines()[-1]
  assert last.startswith('error: ')
  assert message in last
