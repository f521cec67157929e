# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of methods: bands of rows, bits of activations."""

import json

import pytest

import gemma_ext as gx
from gemma_ext import errors


def test_rows_round_trip_and_are_hashable():
  rows = gx.Rows(
    bands=[
      [100, gx.Int(bits=8)],
      [2000, gx.Ternary(planes=2)],
      [None, gx.Int(bits=3)],
    ]
  )
  recipe = gx.Recipe.of({'embedder': rows})
  again = gx.Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
  assert again == recipe and hash(again) == hash(recipe)
  assert again.rules[0][1].bands[1] == (2000, gx.Ternary(planes=2))


@pytest.mark.parametrize(
  'bands, message',
  [
    ((), '1 to 64 pairs'),
    (((5, gx.Int()), (9, gx.Int())), 'ascend from 1'),
    (((5, gx.Int()), (5, gx.Int()), (None, gx.Int())), 'ascend from 1'),
    (((0, gx.Int()), (None, gx.Int())), 'ascend from 1'),
    (((True, gx.Int()), (None, gx.Int())), 'ascend from 1'),
    (((None, gx.Int()), (None, gx.Int())), 'ascend from 1'),
    (((5, gx.Keep()), (None, gx.Int())), 'A band of Rows'),
    (((5,), (None, gx.Int())), '1 to 64 pairs'),
  ],
)
def test_rows_that_are_wrong(bands, message):
  with pytest.raises(errors.RecipeError, match=message):
    gx.Rows(bands=bands)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({}, "needs its 'bands'"),
    ({'bands': 3}, '1 to 64 pairs'),
    (
      {'bands': [{'method': 'int'}, {'end': None, 'method': 'int'}]},
      "key 'end'",
    ),
    ({'bands': [{'end': 3}, {'end': None, 'method': 'int'}]}, "key 'method'"),
    ({'bands': [{'end': 3, 'method': 'rows'}] * 2}, "needs its 'bands'"),
  ],
)
def test_rows_in_json_that_are_wrong(fields, message):
  rule = {'match': 'embedder', 'method': 'rows', **fields}
  with pytest.raises(errors.RecipeError, match=message):
    gx.Recipe.from_json({'version': 1, 'rules': [rule]})


def test_bits_of_activations():
  method = gx.Int(bits=4, group=32, x_bits=8)
  recipe = gx.Recipe.of({'.*': method})
  assert recipe.to_json()['rules'][0]['x_bits'] == 8
  assert gx.Recipe.from_json(recipe.to_json()) == recipe
  # Recipes of before say nothing of it, and none that does not use it does.
  assert 'x_bits' not in gx.Int(bits=4).to_json()
  rows = gx.Rows(bands=((9, gx.Int(bits=8)), (None, gx.Ternary())))
  several = gx.Recipe.of({'embedder': rows, 'a': gx.Keep(), '.*': gx.Int()})
  found = several.with_x_bits(8)
  assert found.rules[0][1].bands[1] == (None, gx.Ternary(x_bits=8))
  assert found.rules[1][1] == gx.Keep() and found.rules[2][1].x_bits == 8
  assert found.with_x_bits(16) == several
  for bad in (4, True, '8', 16.0):
    with pytest.raises(errors.RecipeError, match='x_bits must be 8 or 16'):
      gx.Ternary(x_bits=bad)


def test_corrections_round_trip():
  method = gx.LowRank(weights=gx.Int(bits=3, group=64), rank=16, bits=6)
  recipe = gx.Recipe.of({'mlp': method, '.*': gx.Int()})
  again = gx.Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
  assert again == recipe and hash(again) == hash(recipe)
  fewer = again.with_x_bits(8).rules[0][1]
  assert fewer.weights.x_bits == fewer.down.x_bits == fewer.up.x_bits == 8
  assert method.down == gx.Int(bits=6, group=128, scale='ue5m3', x_bits=16)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'rank': 0}, r'LowRank.rank must be an integer in \[1, 4096\], got 0'),
    ({'rank': 8.0}, 'LowRank.rank must be an integer'),
    ({'bits': 9}, r'LowRank.bits must be an integer in \[2, 8\]'),
    ({'weights': gx.Keep()}, 'LowRank.weights must be `Ternary` or `Int`'),
  ],
)
def test_corrections_that_are_wrong(fields, message):
  with pytest.raises(errors.RecipeError, match=message):
    gx.LowRank(**{'weights': gx.Int(), 'rank': 8} | fields)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'rank': 8}, "needs 'rank' and 'weights'"),
    ({'weights': {'method': 'int'}}, "needs 'rank' and 'weights'"),
    (
      {'rank': 8, 'weights': {'method': 'low_rank', 'rank': 8}},
      "LowRank.weights cannot be 'low_rank'",
    ),
    ({'rank': 8, 'weights': {'method': 'rows'}}, "cannot be 'rows'"),
    ({'rank': 8, 'weights': {'method': 'keep'}}, 'must be `Ternary` or `Int`'),
    ({'rank': 8, 'weights': 3}, "key 'method'"),
  ],
)
def test_corrections_in_json_that_are_wrong(fields, message):
  rule = {'match': 'mlp', 'method': 'low_rank', **fields}
  with pytest.raises(errors.RecipeError, match=message):
    gx.Recipe.from_json({'version': 1, 'rules': [rule]})
