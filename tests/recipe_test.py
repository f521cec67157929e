# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of `Recipe`: rules, presets, JSON, and recipes that are not valid."""

import dataclasses
import json
import time

import hypothesis
from hypothesis import strategies as st
import pytest

import gemma_ext as gx
from gemma_ext import errors
from gemma_ext import recipe as recipe_lib

# The longest paths of the official models are about this long.
_LONG = 'layer_10/attn/per_layer_model_projection/gating_einsum/linear/w'


def _paths(layers):
  """Paths like those of a Gemma 3 of that many layers."""
  names = ('attn/q_einsum/w', 'attn/kv_einsum/w', 'attn/attn_vec_einsum/w')
  names += ('mlp/gating_einsum', 'mlp/linear')
  return ['embedder/input_embedding'] + [
    f'layer_{i}/{name}' for i in range(layers) for name in names
  ]


def _ternary_layers(recipe, layers):
  """Layers whose FFN the recipe makes ternary; all else must be int8."""
  methods = recipe.resolve(_paths(layers))
  found = []
  for path, method in methods.items():
    if method == gx.Int(bits=8, group=128):
      continue
    assert '/mlp/' in path and isinstance(method, gx.Ternary)
    found.append(int(path.split('/')[0].removeprefix('layer_')))
  assert all(found.count(i) == 2 for i in found)
  return sorted(set(found))


def test_first_match_wins():
  recipe = gx.Recipe.of(
    {
      'layer_0/mlp/linear': gx.Int(bits=3),
      'layer_0/mlp': gx.Keep(),
      'mlp': gx.Int(bits=4),
    }
  )
  methods = recipe.resolve(_paths(2))
  assert methods['layer_0/mlp/linear'] == gx.Int(bits=3)
  assert methods['layer_0/mlp/gating_einsum'] == gx.Keep()
  assert methods['layer_1/mlp/linear'] == gx.Int(bits=4)
  assert methods['layer_1/attn/q_einsum/w'] == gx.Keep()
  assert list(methods) == _paths(2)
  for path, method in methods.items():
    assert recipe.method_of(path) == method


@pytest.mark.parametrize(
  'pattern,path,matches',
  [
    ('layer_1', 'layer_1/mlp/linear', True),
    ('layer_1', 'layer_10/mlp/linear', False),
    ('mlp', 'layer_3/mlp/linear', True),
    ('mlp', 'layer_3/mlp2/linear', False),
    ('mlp2?', 'layer_3/mlp2/linear', True),
    ('linear', 'layer_3/mlp/linear', True),
    ('lin', 'layer_3/mlp/linear', False),
    ('near', 'layer_3/mlp/linear', False),
    (r'layer_\d/mlp', 'layer_12/mlp/linear', False),
    (r'layer_\d+/mlp', 'layer_12/mlp/linear', True),
    ('layer_1|layer_2', 'layer_2/mlp/linear', True),
    ('layer_1|layer_2', 'layer_22/mlp/linear', False),
    ('layer_3/mlp/linear', 'layer_3/mlp/linear', True),
    ('.*', 'embedder/input_embedding', True),
    ('Embedder', 'embedder/input_embedding', False),
  ],
)
def test_patterns_cover_whole_segments(pattern, path, matches):
  recipe = gx.Recipe.of({pattern: gx.Int(bits=8)})
  assert (recipe.method_of(path) != gx.Keep()) == matches


def test_routers_only_when_named():
  routers = ['layer_0/mlp/router_logits/w', 'layer_0/altup/modality_router/w']
  for pattern in ('.*', 'layer_0', r'layer_\d+/mlp', '.*/w'):
    recipe = gx.Recipe.of({pattern: gx.Int(bits=8)})
    assert recipe.method_of('layer_0/mlp/linear/w') == gx.Int(bits=8)
    for path in routers:
      assert recipe.method_of(path) == gx.Keep(), (pattern, path)
  recipe = gx.Recipe.of({'.*router.*': gx.Int(bits=8)})
  assert [recipe.method_of(p) for p in routers] == [gx.Int(bits=8)] * 2


def test_unmatched_rule_lists_near_misses():
  recipe = gx.Recipe.of({'layer_0/mpl': gx.Keep(), '.*': gx.Int()})
  with pytest.raises(errors.UnmatchedRuleError) as e:
    recipe.resolve(_paths(2))
  assert "Rule 0 'layer_0/mpl' matches no weight" in str(e.value)
  assert "'layer_0/mlp/linear'" in str(e.value)
  assert str(e.value).count('layer_') >= 5


def test_unmatched_rule_without_any_weights():
  with pytest.raises(errors.UnmatchedRuleError, match='no weights'):
    gx.Recipe.of('int8').resolve([])


def test_shadowed_rule():
  recipe = gx.Recipe.of({'.*': gx.Int(), 'mlp': gx.Ternary()})
  with pytest.raises(errors.UnmatchedRuleError) as e:
    recipe.resolve(_paths(2))
  assert "Rule 1 'mlp' never applies" in str(e.value)
  # Where it wins a single weight it does apply.
  recipe = gx.Recipe.of({'layer_0': gx.Int(), 'mlp': gx.Ternary()})
  methods = recipe.resolve(_paths(2))
  assert sum(m == gx.Ternary() for m in methods.values()) == 2


def test_no_rules_leave_all_dense():
  assert set(gx.Recipe().resolve(_paths(1)).values()) == {gx.Keep()}


@pytest.mark.parametrize('layers', [18, 26, 34, 48, 62])
def test_tssn_presets(layers):
  every = list(range(layers))
  of = lambda name: gx.Recipe.of(name, num_layers=layers)
  assert _ternary_layers(of('tssn'), layers) == every
  assert _ternary_layers(of('tssn-last-6'), layers) == every[-6:]
  assert _ternary_layers(of('tssn-first-6'), layers) == every[:6]
  assert _ternary_layers(of('tssn-layer-8'), layers) == [8]
  assert _ternary_layers(of('tssn-layer-0'), layers) == [0]
  assert _ternary_layers(of(f'tssn-layer-{layers - 1}'), layers) == every[-1:]
  assert _ternary_layers(of(f'tssn-last-{layers}'), layers) == every
  assert _ternary_layers(of('tssn2-last-2'), layers) == every[-2:]


@pytest.mark.parametrize('name,planes', [('tssn', 1), ('tssn2', 2)])
def test_tssn_planes(name, planes):
  methods = gx.Recipe.of(name).resolve(_paths(1))
  assert methods['layer_0/mlp/linear'] == gx.Ternary(planes=planes, group=128)
  assert methods['embedder/input_embedding'] == gx.Int(bits=8, group=128)


def test_int_presets():
  methods = gx.Recipe.of('int8').resolve(_paths(3))
  assert set(methods.values()) == {gx.Int(bits=8, group=128)}
  methods = gx.Recipe.of('int4').resolve(_paths(3))
  assert set(methods.values()) == {gx.Int(bits=4, group=32)}


@pytest.mark.parametrize(
  'name,layers',
  [
    ('tssn-last-19', 18),
    ('tssn-first-19', 18),
    ('tssn-first-0', 18),
    ('tssn-last-0', 18),
    ('tssn-layer-18', 18),
    ('tssn-last-6', None),
    ('tssn5', 18),
    ('tssn1', 18),
    ('tssn-last', 18),
    ('tssn-last--1', 18),
    ('tssn-last-6 ', 18),
    ('tssn-middle-3', 18),
    ('int9', 18),
    ('', 18),
  ],
)
def test_no_such_preset(name, layers):
  with pytest.raises(errors.RecipeError, match='[Pp]reset'):
    gx.Recipe.of(name, num_layers=layers)


_TERNARIES = st.builds(
  gx.Ternary,
  planes=st.integers(1, 4),
  group=st.integers(1, 1 << 20),
  density=st.none() | st.floats(0, 1, exclude_min=True),
  packing=st.sampled_from(['2bit', '5trit']),
)
_TIED = st.builds(
  gx.Ternary, scale=st.sampled_from(['bf16', 'ue5m3']), tied=st.booleans()
)
_PATTERNED = st.builds(
  lambda n, more: gx.Ternary(pattern=(n, n + more)),
  st.integers(1, 32),
  st.integers(0, 32),
)
_INTS = st.builds(
  gx.Int,
  bits=st.integers(2, 8),
  group=st.none() | st.integers(1, 1 << 20),
  scale=st.sampled_from(['bf16', 'ue5m3', 'e4m3']),
)
_METHODS = st.just(gx.Keep()) | _TERNARIES | _TIED | _PATTERNED | _INTS
_METHODS |= _INTS.map(lambda m: gx.LowRank(weights=m, rank=m.bits))
_PATTERNS = st.from_regex(r'\A[a-z_]{1,9}(/[a-z_]{1,9})?\Z') | st.sampled_from(
  ['.*', r'layer_\d+/mlp2?', 'a|b', r'layer_(1|2)', '[ab]+']
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.lists(st.tuples(_PATTERNS, _METHODS), max_size=9))
def test_json_round_trip(rules):
  recipe = gx.Recipe(rules=tuple(rules))
  text = json.dumps(recipe.to_json(), allow_nan=False)
  back = gx.Recipe.from_json(json.loads(text))
  assert back == recipe
  assert hash(back) == hash(recipe)
  assert json.dumps(back.to_json()) == text


_VALUES = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.sampled_from(['2bit', '5trit', 'int', 'ternary', 'keep', '', '(', '.*']),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(['match', 'method', 'x']), inner)
  ),
  max_leaves=6,
)
_RULES = st.dictionaries(
  st.sampled_from(
    ['match', 'method', 'bits', 'group', 'planes', 'density', 'pattern', 'x']
  ),
  _VALUES,
)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
  st.fixed_dictionaries({'version': st.just(1), 'rules': st.lists(_RULES)})
  | _VALUES
)
def test_any_json_is_a_recipe_or_a_recipe_error(data):
  try:
    recipe = gx.Recipe.from_json(data)
  except errors.RecipeError as e:
    assert 10 < len(str(e)) < 2000
  else:
    assert gx.Recipe.from_json(recipe.to_json()) == recipe


def test_json_file(tmp_path, monkeypatch):
  recipe = gx.Recipe.of({'mlp': gx.Ternary(pattern=(2, 4)), '.*': gx.Int()})
  path = tmp_path / 'mine.json'
  path.write_text(json.dumps(recipe.to_json()))
  assert gx.Recipe.of(path) == recipe
  assert gx.Recipe.of(str(path)) == recipe
  monkeypatch.chdir(tmp_path)
  assert gx.Recipe.of('mine.json') == recipe
  monkeypatch.setenv('HOME', str(tmp_path))
  assert gx.Recipe.of('~/mine.json') == recipe


def test_json_by_hand():
  data = {
    'version': 1,
    'rules': [
      {'match': 'mlp', 'method': 'ternary', 'pattern': [2, 4]},
      {'match': '.*', 'method': 'int', 'bits': 4, 'group': 32},
    ],
  }
  assert gx.Recipe.from_json(data).rules == (
    ('mlp', gx.Ternary(pattern=(2, 4))),
    ('.*', gx.Int(bits=4, group=32)),
  )


def test_of_takes_mappings_lists_and_recipes():
  rules = [('mlp', gx.Ternary()), ('.*', gx.Int())]
  recipe = gx.Recipe.of(rules)
  assert gx.Recipe.of(dict(rules)) == recipe == gx.Recipe(rules=tuple(rules))
  assert gx.Recipe.of(recipe) is recipe


def test_order_counts():
  a = gx.Recipe.of({'mlp': gx.Ternary(), '.*': gx.Int()})
  b = gx.Recipe.of({'.*': gx.Int(), 'mlp': gx.Ternary()})
  assert a != b
  assert len({a, b, gx.Recipe.of({'mlp': gx.Ternary(), '.*': gx.Int()})}) == 2


def test_frozen_and_hashable():
  recipe = gx.Recipe.of('tssn')
  for value in (recipe, *(method for _, method in recipe.rules)):
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
      setattr(value, field, 3)
  assert {recipe: 5}[gx.Recipe.of('tssn')] == 5
  # JSON lists become tuples, so that the method stays hashable.
  assert hash(gx.Ternary(pattern=[2, 4])) == hash(gx.Ternary(pattern=(2, 4)))


def test_str_names_rules_and_methods():
  text = str(gx.Recipe.of('int4'))
  assert text.startswith("Recipe(\n  '.*': Int(bits=4, group=32,")


def _json(*rules, version=1):
  return lambda: gx.Recipe.from_json({'version': version, 'rules': rules[0]})


def _rule(**fields):
  return _json([{'match': 'mlp', **fields}])


def _pattern(pattern):
  return lambda: gx.Recipe.of([(pattern, gx.Keep())])


_BAD = {
  'bits_1': lambda: gx.Int(bits=1),
  'bits_9': lambda: gx.Int(bits=9),
  'bits_true': lambda: gx.Int(bits=True),
  'bits_text': lambda: gx.Int(bits='8'),
  'bits_float': lambda: gx.Int(bits=8.0),
  'bits_none': lambda: gx.Int(bits=None),
  'int_group_0': lambda: gx.Int(group=0),
  'int_group_huge': lambda: gx.Int(group=1 << 40),
  'group_0': lambda: gx.Ternary(group=0),
  'group_negative': lambda: gx.Ternary(group=-128),
  'group_none': lambda: gx.Ternary(group=None),
  'planes_0': lambda: gx.Ternary(planes=0),
  'planes_5': lambda: gx.Ternary(planes=5),
  'density_0': lambda: gx.Ternary(density=0),
  'density_2': lambda: gx.Ternary(density=2),
  'density_nan': lambda: gx.Ternary(density=float('nan')),
  'density_true': lambda: gx.Ternary(density=True),
  'density_text': lambda: gx.Ternary(density='0.5'),
  'pattern_5_4': lambda: gx.Ternary(pattern=(5, 4)),
  'pattern_0_4': lambda: gx.Ternary(pattern=(0, 4)),
  'pattern_1_65': lambda: gx.Ternary(pattern=(1, 65)),
  'pattern_one_number': lambda: gx.Ternary(pattern=(2,)),
  'pattern_number': lambda: gx.Ternary(pattern=2),
  'pattern_floats': lambda: gx.Ternary(pattern=(2.0, 4.0)),
  'pattern_text': lambda: gx.Ternary(pattern='2:4'),
  'density_and_pattern': lambda: gx.Ternary(density=0.5, pattern=(2, 4)),
  'packing': lambda: gx.Ternary(packing='3bit'),
  'packing_list': lambda: gx.Ternary(packing=['2bit']),
  'scale': lambda: gx.Ternary(scale='fp8'),
  'tied_and_density': lambda: gx.Ternary(tied=True, density=0.5),
  'rule_not_a_pair': lambda: gx.Recipe(rules=(('mlp',),)),
  'rule_a_text': lambda: gx.Recipe(rules=('ab',)),
  'method_a_class': lambda: gx.Recipe.of({'mlp': gx.Int}),
  'method_a_name': lambda: gx.Recipe.of({'mlp': 'int8'}),
  'method_the_base': lambda: gx.Recipe.of({'mlp': recipe_lib.Method()}),
  'spec_none': lambda: gx.Recipe.of(None),
  'spec_number': lambda: gx.Recipe.of(8),
  'spec_numbers': lambda: gx.Recipe.of([8]),
  'pattern_empty': _pattern(''),
  'pattern_none': _pattern(None),
  'pattern_unhashable': _pattern(['mlp']),
  'pattern_bytes': _pattern(b'mlp'),
  'pattern_not_a_regex': _pattern('layer_('),
  'pattern_leaves_its_group': _pattern('a)(b'),
  'pattern_late_flag': _pattern('(?i)mlp'),
  'pattern_huge': _pattern('a' * 513),
  'pattern_huge_repeat': _pattern('a{99999999999999}'),
  'too_many_rules': lambda: gx.Recipe(rules=(('a', gx.Keep()),) * 4097),
  'json_none': lambda: gx.Recipe.from_json(None),
  'json_list': lambda: gx.Recipe.from_json([]),
  'json_no_version': lambda: gx.Recipe.from_json({'rules': []}),
  'json_no_rules': lambda: gx.Recipe.from_json({'version': 1}),
  'json_more_keys': lambda: gx.Recipe.from_json(dict(version=1, rules=[], x=1)),
  'version_2': _json([], version=2),
  'version_true': _json([], version=True),
  'version_text': _json([], version='1'),
  'version_list': _json([], version=[1]),
  'rules_a_dict': _json({'mlp': 'int'}),
  'rules_a_text': _json('tssn'),
  'json_rule_a_list': _json([['mlp', 'int']]),
  'json_rule_none': _json([None]),
  'json_no_match': _json([{'method': 'int'}]),
  'json_no_method': _rule(),
  'json_match_list': _json([{'match': ['mlp'], 'method': 'int'}]),
  'json_match_number': _json([{'match': 3, 'method': 'int'}]),
  'unknown_method': _rule(method='float'),
  'method_a_list': _rule(method=['int']),
  'method_none': _rule(method=None),
  'unknown_field': _rule(method='int', bit=4),
  'field_of_another_method': _rule(method='int', planes=2),
  'json_bits': _rule(method='int', bits='8'),
  'json_bits_list': _rule(method='int', bits=[8] * 100_000),
  'json_pattern': _rule(method='ternary', pattern=[5, 4]),
  'json_pattern_dict': _rule(method='ternary', pattern={'n': 2, 'm': 4}),
}


@pytest.mark.parametrize('case', _BAD)
def test_bad_recipe(case):
  with pytest.raises(errors.RecipeError) as e:
    _BAD[case]()
  assert 20 < len(str(e.value)) < 1000


_BAD_FILES = {
  'empty': b'',
  'not_json': b'version: 1',
  'not_text': b'\xff\xfe\x00\x81',
  'cut': b'{"version": 1, "rules": [',
  'nested': b'[' * 100_000,
  'long_number': b'{"version": ' + b'1' * 10_000 + b', "rules": []}',
  'nan_density': b'{"version": 1, "rules": [{"match": "a", "method":'
  b' "ternary", "density": NaN}]}',
}


@pytest.mark.parametrize('case', _BAD_FILES)
def test_bad_file(tmp_path, case):
  path = tmp_path / 'recipe.json'
  path.write_bytes(_BAD_FILES[case])
  with pytest.raises(errors.RecipeError):
    gx.Recipe.of(path)


def test_oversized_file(tmp_path):
  path = tmp_path / 'recipe.json'
  path.write_bytes(b' ' * (1 << 20) + b'[]')
  with pytest.raises(errors.RecipeError, match='larger than 1048576 bytes'):
    gx.Recipe.of(path)


def test_missing_file(tmp_path):
  with pytest.raises(errors.RecipeError, match='Cannot read'):
    gx.Recipe.of(tmp_path / 'missing.json')
  with pytest.raises(errors.RecipeError, match='ends in .json'):
    gx.Recipe.of(tmp_path / 'missing')
  (tmp_path / 'folder.json').mkdir()
  with pytest.raises(errors.RecipeError, match='Cannot read'):
    gx.Recipe.of(tmp_path / 'folder.json')


# Each takes seconds to forever on a path of 60 characters.
_SLOW = {
  'repeat_of_a_repeat': r'(a+)+$',
  'repeat_of_anything': r'(.*)*z',
  'many_of_anything': r'(.*a){20}',
  'repeat_of_a_choice': r'(\w|\w)*Z',
  'repeat_of_an_option': r'(\w?){30}Z',
  'optional_characters': r'\w?' * 30 + 'Z',
  'anything_in_a_row': r'.*' * 60 + 'Z',
  'in_a_look_ahead': r'(?=(\w+)*Z)',
  'segments': r'(\w+/?)+z',
  'possessive': r'(?:\w+)++Z',
  'nothing_counted': r'(?:(?:){6000}){6000}',
  'options_counted': r'(?:(?:a|){6000}){60}',
  'choices_counted': r'(?:\w|\w\w){40}Z',
}


@pytest.mark.parametrize('case', _SLOW)
def test_slow_pattern_is_refused(case):
  start = time.process_time()
  data = {'version': 1, 'rules': [{'match': _SLOW[case], 'method': 'keep'}]}
  with pytest.raises(errors.RecipeError, match='could take hours'):
    gx.Recipe.from_json(data)
  assert time.process_time() - start < 0.5


def test_many_slowish_patterns_are_refused_together():
  rules = [(rf'.*{i}.*{i}.*Z', gx.Keep()) for i in range(8)]
  assert len(gx.Recipe(rules=tuple(rules[:3])).rules) == 3
  with pytest.raises(errors.RecipeError, match='could take hours'):
    gx.Recipe(rules=tuple(rules))


@pytest.mark.parametrize(
  'pattern',
  [
    '.*',
    r'layer_\d+/mlp2?',
    r'layer_\d+/(attn|mlp)/.*',
    r'layer_(?:\d|1\d|2[0-5])/.*/w',
    '.*attn.*einsum.*',
    r'(embedder|altup_\w+|laurel)',
    f'layer_({"|".join(map(str, range(62)))})/mlp2?',
    r'(?:layer_1\d/)?attn',
    r'[^/]+/mlp',
  ],
)
def test_useful_patterns_are_allowed(pattern):
  assert gx.Recipe.of({pattern: gx.Keep()}).rules[0][0] == pattern


@pytest.mark.parametrize(
  'pattern', [r'\w?' * 18 + 'Z', r'(?:\w?){15}Z', '.*.*.*Z', r'(.*)(.*)\2\1Z']
)
def test_slowest_patterns_that_are_allowed(pattern):
  recipe = gx.Recipe.of({pattern: gx.Int()})
  start = time.process_time()
  assert recipe.method_of(_LONG) == gx.Keep()
  assert time.process_time() - start < 0.5
