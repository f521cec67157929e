# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of `python -m gemma_ext.compress`, and of evaluate on what it wrote."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_ext as gx
from gemma_ext import ckpts
from gemma_ext import evaluate
from gemma_ext.compress import __main__ as command
from tests import tiny

_RECIPE = {
  'version': 1,
  'rules': [
    {'match': 'layer_0/mlp/linear', 'method': 'ternary', 'group': 64},
    {'match': 'embedder', 'method': 'int', 'bits': 8},
  ],
}
_WORDS = 'the capital of a group is one river that flows'.split()


@pytest.fixture(name='dense', scope='module')
def _dense(tmp_path_factory):
  """The directory of a tiny dense checkpoint."""
  return tiny.checkpoint(tmp_path_factory.mktemp('dense') / 'c')


@pytest.fixture(name='recipe', scope='module')
def _recipe(tmp_path_factory):
  path = tmp_path_factory.mktemp('recipe') / 'mine.json'
  path.write_text(json.dumps(_RECIPE))
  return path


@pytest.fixture(name='texts', scope='module')
def _texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  rng = np.random.default_rng(0)
  for i in range(4):
    words = rng.choice(_WORDS, 40)
    (folder / f'{i}.txt').write_text(' '.join(words))
  return folder


@pytest.fixture(name='compressed', scope='module')
def _compressed(dense, recipe, texts, tmp_path_factory):
  """The directory and the JSON of a full run."""
  folder = tmp_path_factory.mktemp('compressed')
  code = command.main(
    [
      f'--checkpoint={dense}',
      f'--recipe={recipe}',
      f'--output={folder / "c"}',
      f'--calibration={texts}',
      '--calibration_tokens=100',
      '--dtype=float32',
      f'--json={folder / "out.json"}',
    ]
  )
  assert code == 0
  return folder / 'c', json.loads((folder / 'out.json').read_text())


def _fails(capsys, *argv):
  """Runs into an error of one line, and returns it."""
  assert command.main(argv) == 2
  err = capsys.readouterr().err
  lines = [line for line in err.splitlines() if line.startswith('error: ')]
  assert len(lines) == 1
  assert 'Traceback' not in err
  return err


def _forbid_loading(monkeypatch):
  def load(*args, **kwargs):
    raise AssertionError('Loaded before the input was checked.')

  monkeypatch.setattr(ckpts, 'load', load)


# -------------------------------- right values -------------------------------


def test_dry_run(dense, tmp_path, capsys):
  out = tmp_path / 'out.json'
  argv = [f'--checkpoint={dense}', '--recipe=tssn', '--dry_run']
  assert command.main([*argv, f'--json={out}']) == 0
  plan = gx.plan(tiny.model('gemma3', dtype=jnp.bfloat16), 'tssn')
  assert str(plan) in capsys.readouterr().out
  found = json.loads(out.read_text())
  assert found == {'plan': plan.to_json(), 'output': None}
  # Nothing but the file that was asked for.
  assert [p.name for p in tmp_path.iterdir()] == ['out.json']


def test_dry_run_writes_no_output(dense, tmp_path):
  argv = [f'--checkpoint={dense}', '--recipe=int8', '--dry_run']
  assert command.main([*argv, f'--output={tmp_path / "c"}']) == 0
  assert not list(tmp_path.iterdir())


def test_json_of_a_full_run(compressed):
  path, found = compressed
  plan = gx.plan(tiny.model('gemma3'), gx.Recipe.from_json(_RECIPE))
  assert found['plan'] == plan.to_json()
  assert found['output'] == str(path)
  sizes = ckpts.directory_bytes(path)
  assert found['bytes_on_disk'] == sizes
  assert found['on_disk_to_plan'] == sizes['params'] / plan.nbytes
  assert found['on_disk_to_plan'] > 1
  assert found['fit_seconds'] > 0
  calibration = found['calibration']
  assert 50 <= calibration['tokens'] <= 200
  assert len(calibration['data_sha256']) == 64


def test_checkpoint_of_a_full_run(compressed, dense):
  path, found = compressed
  got = ckpts.load(path, dtype=jnp.float32)
  assert got.recipe == gx.Recipe.from_json(_RECIPE)
  assert got.source == str(path)
  manifest = json.loads((path / 'recipe.json').read_text())
  assert manifest['source'] == str(dense)
  assert got.metadata['calibration'] == found['calibration']
  params = tiny.params(tiny.model('gemma3'))
  linear = got.params['layer_0']['mlp']['linear']
  assert linear['codes'].dtype == jnp.uint8
  np.testing.assert_array_equal(
    got.params['layer_0']['mlp']['gating_einsum'],
    params['layer_0']['mlp']['gating_einsum'],
  )
  tokens = jnp.array([[2, 5, 6, 7]])
  logits = got.model.apply({'params': got.params}, tokens).logits
  want = tiny.model('gemma3').apply({'params': params}, tokens).logits
  error = np.linalg.norm(logits - want) / np.linalg.norm(want)
  assert 0.001 < error < 0.5
  assert got.tokenizer.encode('a river') == tiny.tokenizer(3).encode('a river')


def test_evaluate_what_was_written(compressed, dense, texts, tmp_path):
  path, _ = compressed
  out = tmp_path / 'out.json'
  code = evaluate.main(
    [
      f'--checkpoint={path}',
      f'--baseline={dense}',
      f'--text={texts}',
      '--window=64',
      '--batch_size=4',
      '--dtype=float32',
      f'--json={out}',
    ]
  )
  assert code == 0
  found = json.loads(out.read_text())
  assert {
    'perplexity',
    'ci95',
    'tokens',
    'documents',
    'weight_bytes',
    'dense_bf16_bytes',
    'baseline',
    'paired_delta',
  } <= found.keys()
  baseline = found['baseline']
  assert found['documents'] == baseline['documents'] == 4
  assert found['recipe'] == gx.Recipe.from_json(_RECIPE).to_json()
  assert baseline['recipe'] is None
  plan = gx.plan(tiny.model('gemma3'), gx.Recipe.from_json(_RECIPE))
  assert found['weight_bytes'] == plan.nbytes
  assert baseline['weight_bytes'] == plan.dense_bytes
  assert found['dense_bf16_bytes'] == plan.dense_bytes // 2
  ratio = found['perplexity'] / baseline['perplexity']
  assert found['paired_delta']['ratio'] == pytest.approx(ratio)
  low, high = found['paired_delta']['ci95']
  assert low <= ratio <= high


def test_overwrite(dense, recipe, tmp_path, capsys):
  path = tmp_path / 'c'
  argv = [f'--checkpoint={dense}', f'--output={path}', '--calibration=none']
  first = tmp_path / 'first.json'
  first.write_text(json.dumps({'version': 1, 'rules': [_RECIPE['rules'][1]]}))
  assert command.main([*argv, f'--recipe={first}']) == 0
  err = _fails(capsys, *argv, f'--recipe={recipe}')
  assert 'exists' in err
  assert len(ckpts.load(path).recipe.rules) == 1
  assert command.main([*argv, f'--recipe={recipe}', '--overwrite']) == 0
  assert len(ckpts.load(path).recipe.rules) == 2


# --------------------------------- bad input ---------------------------------


def test_existing_output_is_seen_before_loading(
  compressed, dense, capsys, monkeypatch
):
  _forbid_loading(monkeypatch)
  err = _fails(
    capsys,
    f'--checkpoint={dense}',
    '--recipe=int8',
    f'--output={compressed[0]}',
  )
  assert 'exists' in err


def test_output_of_another_kind_is_never_replaced(
  dense, tmp_path, capsys, monkeypatch
):
  _forbid_loading(monkeypatch)
  (tmp_path / 'mine.txt').write_text('x')
  err = _fails(
    capsys,
    f'--checkpoint={dense}',
    '--recipe=int8',
    f'--output={tmp_path}',
    '--overwrite',
  )
  assert 'is left alone' in err
  assert (tmp_path / 'mine.txt').read_text() == 'x'


@pytest.mark.parametrize(
  'recipe,message',
  [
    ('tsn', 'No recipe preset'),
    ('missing.json', 'Cannot read'),
    ('int9', 'No recipe preset'),
  ],
)
def test_bad_recipe_is_seen_before_loading(
  dense, recipe, message, capsys, monkeypatch
):
  _forbid_loading(monkeypatch)
  err = _fails(
    capsys, f'--checkpoint={dense}', f'--recipe={recipe}', '--dry_run'
  )
  assert message in err


def test_recipe_that_does_not_fit(dense, tmp_path, capsys):
  path = tmp_path / 'r.json'
  path.write_text(
    json.dumps({'version': 1, 'rules': [{'match': 'layer_7', 'method': 'int'}]})
  )
  err = _fails(capsys, f'--checkpoint={dense}', f'--recipe={path}', '--dry_run')
  assert "'layer_7' matches no weight" in err
  err = _fails(
    capsys, f'--checkpoint={dense}', '--recipe=tssn-last-4', '--dry_run'
  )
  assert 'a model of 3 layers' in err


def test_nowhere_to_write(dense, capsys, monkeypatch):
  _forbid_loading(monkeypatch)
  err = _fails(capsys, f'--checkpoint={dense}', '--recipe=int8')
  assert 'give --output=DIR' in err


def test_json_in_a_missing_folder(dense, tmp_path, capsys, monkeypatch):
  _forbid_loading(monkeypatch)
  err = _fails(
    capsys,
    f'--checkpoint={dense}',
    '--recipe=int8',
    '--dry_run',
    f'--json={tmp_path / "missing" / "out.json"}',
  )
  assert 'Create it first' in err


def test_missing_checkpoint(tmp_path, capsys):
  err = _fails(
    capsys, f'--checkpoint={tmp_path / "no"}', '--recipe=int8', '--dry_run'
  )
  assert str(tmp_path / 'no') in err


def test_compressed_already(compressed, capsys):
  err = _fails(
    capsys, f'--checkpoint={compressed[0]}', '--recipe=int8', '--dry_run'
  )
  assert 'is compressed already' in err


def test_calibration_text_missing(dense, tmp_path, capsys):
  err = _fails(
    capsys,
    f'--checkpoint={dense}',
    '--recipe=int4',
    f'--output={tmp_path / "c"}',
    f'--calibration={tmp_path / "no.txt"}',
  )
  assert 'no.txt' in err
  assert not list(tmp_path.iterdir())


def test_wrong_flags(dense, capsys):
  assert 'recipe' in _fails(capsys, f'--checkpoint={dense}', '--dry_run')
  argv = (f'--checkpoint={dense}', '--recipe=int8', '--dry_run')
  assert 'recipes' in _fails(capsys, *argv, '--recipes=int8')
  assert 'calibration_tokens' in _fails(capsys, *argv, '--calibration_tokens=0')


@pytest.fixture(name='budgeted', scope='module')
def _budgeted(dense, texts, tmp_path_factory, request):
  """Arguments of a run within a budget, and its JSON."""
  few = gx.Int(bits=4, group=64), gx.Int(bits=8, group=64)
  patch = pytest.MonkeyPatch()
  request.addfinalizer(patch.undo)
  patch.setattr('gemma_ext.compress._sensitivity.CANDIDATES', few)
  patch.setattr('gemma_ext.compress._sensitivity.BANDS', 2)
  folder = tmp_path_factory.mktemp('budgeted')
  args = [
    f'--checkpoint={dense}',
    '--budget=40%',
    f'--calibration={texts}',
    '--calibration_tokens=100',
    '--dtype=float32',
    f'--sensitivities={folder / "s.json"}',
  ]
  code = command.main(
    [
      *args,
      f'--output={folder / "c"}',
      f'--json={folder / "out.json"}',
      f'--plot={folder / "bits.png"}',
    ]
  )
  assert code == 0
  return args, json.loads((folder / 'out.json').read_text()), folder


def test_a_budget_is_kept_on_disk(budgeted, texts):
  _, out, folder = budgeted
  found = out['allocation']
  dense = 2 * out['plan']['weights']
  # Names and shapes on disk are a tenth of so small a model.
  assert 0.3 < found['predicted_bytes'] / dense <= 0.4
  on_disk = ckpts.directory_bytes(folder / 'c')['params']
  assert found['predicted_bytes'] < on_disk <= 0.41 * dense
  assert out['plan']['bytes'] == found['predicted_bytes']
  assert found['predicted_ratio'] > 1 and found['measured_loss'] > 0
  assert set(found['corrections']) == {'attn', 'mlp', 'embedder'}
  assert (folder / 'bits.png').read_bytes().startswith(b'\x89PNG')
  loaded = ckpts.load(folder / 'c')
  logits = loaded.model.apply({'params': loaded.params}, jnp.ones((1, 4), int))
  assert np.isfinite(logits.logits).all()
  argv = [f'--checkpoint={folder / "c"}', f'--text={texts}', '--window=32']
  assert evaluate.main(argv) == 0


def test_another_budget_is_planned_from_the_file(budgeted, monkeypatch, capsys):
  args, out, folder = budgeted
  before = (folder / 's.json').read_text()
  refuse = lambda *args, **kwargs: pytest.fail('fits again')
  monkeypatch.setattr('gemma_ext.compress._weight.compress_weight', refuse)
  monkeypatch.setattr('gemma_ext.compress._taps.window', refuse)
  argv = [a if '--budget' not in a else '--budget=ratio=1.5' for a in args]
  assert command.main([*argv, '--dry_run']) == 0
  text = capsys.readouterr().out
  assert 'Predicted: ' in text and 'perplexity x 1.' in text
  # A loss far from the one that was measured at is no more than an estimate.
  assert 'has not been measured' in text
  assert (folder / 's.json').read_text() == before
  assert set(json.loads(before)['corrections']) == {'attn', 'mlp', 'embedder'}


def test_a_file_of_another_text_is_kept(budgeted, capsys):
  args, _, folder = budgeted
  before = (folder / 's.json').read_text()
  err = _fails(capsys, *args, '--dry_run', '--seed=1')
  assert 'measured with other calibration text' in err
  assert (folder / 's.json').read_text() == before


def test_all_candidates_have_a_file_of_their_own(budgeted, capsys, monkeypatch):
  args, _, folder = budgeted
  err = _fails(capsys, *args, '--dry_run', '--candidates=all')
  assert 'measured with other candidates' in err

  class Seen(Exception):
    pass

  def seen(*unused, candidates, **kwargs):
    raise Seen(candidates)

  monkeypatch.setattr(gx.compress, 'sensitivities', seen)
  monkeypatch.setattr(gx.compress, 'statistics', lambda *args, **kwargs: None)
  argv = [a for a in args if '--sensitivities' not in a]
  with pytest.raises(Seen) as caught:
    command.main([*argv, '--dry_run', '--candidates=all'])
  (found,) = caught.value.args
  assert len({*found}) == len(found)
  assert {*gx.compress.CANDIDATES, *gx.compress.MORE_CANDIDATES} == {*found}


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--budget=lots'], 'is no budget'),
    (['--budget=30%', '--recipe=int8'], 'one of --recipe and --budget'),
    ([], 'one of --recipe and --budget'),
    (['--budget=30%', '--calibration=none'], 'needs a text'),
    (['--budget=1%'], 'cannot be had'),
  ],
)
def test_budgets_that_are_wrong(budgeted, capsys, flags, message):
  args = [a for a in budgeted[0] if not a.startswith('--budget')]
  given = {f.partition('=')[0] for f in flags}
  args = [a for a in args if a.partition('=')[0] not in given]
  assert message in _fails(capsys, *args, *flags, '--dry_run')


def test_sensitivities_that_are_none(budgeted, capsys, tmp_path):
  path = tmp_path / 's.json'
  path.write_text('[1]')
  args = [*budgeted[0], f'--sensitivities={path}', '--dry_run']
  assert 'Sensitivities in JSON' in _fails(capsys, *args)
