# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Eight devices, and two processes, end where one device does.

Losses of members are summed in another order where fewer of them run at once,
so that floating leaves agree to 1e-5 and not to the bit; codes agree exactly.
"""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext.train import _evolution
from gemma_ext.train import _mezo
from gemma_ext.train import _problem
from gemma_ext.train import _sharded

_ROOT = pathlib.Path(__file__).parents[2]
_PROGRAM = """
import dataclasses, functools, sys
import jax, jax.numpy as jnp, numpy as np

mode, out, port, rank = sys.argv[1:]
if mode == 'pair':
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'localhost:{port}', 2, int(rank))
want = {'one': 1, 'eight': 8, 'pair': 2}[mode]
assert jax.device_count() == want, jax.devices()
assert jax.local_device_count() == want // (2 if mode == 'pair' else 1)

from gemma_ext.train import _evolution, _noise, _problem, _sharded

k = jax.random.split(jax.random.key(0), 4)
host = lambda x: np.asarray(x)
codes = host(jax.random.randint(k[0], (1, 12, 16), -1, 2).astype(jnp.int8))
target = host(jax.random.randint(k[1], (12, 16), -1, 2))
# Small whole numbers: losses of codes are exact in any order.
x = host(jax.random.randint(k[2], (8, 16), -3, 4).astype(jnp.float32))
w = host(jax.random.normal(k[3], (12, 16)))

def unit_loss(p, batch):
  error = batch @ (p['lin/codes'][0].astype(jnp.float32) - target).T
  return {'lin': jnp.sum(jnp.square(error), axis=0)}

def loss(p, batch):
  y = jnp.tanh(_noise.matmul(batch * p['norm'], p['w']))
  total = jnp.mean(jnp.square(y - batch @ target.T / 9))
  return total + jnp.sum(unit_loss(p, batch)['lin'])

problem = _problem.Problem(loss, unit_loss)
params = {'lin/codes': codes, 'w': w, 'norm': np.ones(16, np.float32)}
base = _evolution.Evolution(steps=12, population=32, lazy='w', rank=2)
saved = {}
for name, config in {
  'float': base,
  'chunk': dataclasses.replace(base, chunk=2),
  'unit': dataclasses.replace(
    base, form='integer', discrete='select', fitness='unit'
  ),
}.items():
  now = params
  state = jax.tree.map(host, config.init(params, jax.random.key(1)))
  if mode == 'one':
    update = jax.jit(functools.partial(config.update, problem))
  else:
    mesh = jax.make_mesh((want,), ('members',))
    update = _sharded.sharded_update(config, problem, mesh)
  for i in range(6):
    now, state, metrics = update(now, state, x, jax.random.key(i))
  for path, leaf in now.items():
    saved[f'{name}:{path}'] = host(leaf)
  saved[f'{name}:loss'] = host(metrics['loss'])
np.savez(out, **saved)
"""


def _start(mode, out, *, port=0, rank=0, devices=1):
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(_ROOT),
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  return subprocess.Popen(
    [sys.executable, '-c', _PROGRAM, mode, str(out), str(port), str(rank)],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _finish(*processes):
  try:
    for process in processes:
      text, _ = process.communicate(timeout=300)
      assert process.returncode == 0, text[-4000:]
  finally:
    for process in processes:
      process.kill()
      process.wait()


@pytest.fixture(scope='module')
def one_device(tmp_path_factory):
  path = tmp_path_factory.mktemp('one') / 'one.npz'
  _finish(_start('one', path))
  return dict(np.load(path))


def _check(got, want):
  assert sorted(got) == sorted(want)
  for name, value in want.items():
    if name.endswith('codes'):
      np.testing.assert_array_equal(got[name], value, err_msg=name)
    else:
      np.testing.assert_allclose(got[name], value, 1e-5, 1e-5, err_msg=name)
  # Something has moved, so that the comparison means something.
  assert np.abs(want['float:norm'] - 1).max() > 1e-2
  assert np.any(want['unit:lin/codes'] != want['float:lin/codes'])


def test_eight_devices_end_where_one_does(one_device, tmp_path):
  path = tmp_path / 'eight.npz'
  _finish(_start('eight', path, devices=8))
  _check(dict(np.load(path)), one_device)


def test_two_processes_end_where_one_does(one_device, tmp_path):
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  paths = [tmp_path / f'{rank}.npz' for rank in range(2)]
  _finish(*(_start('pair', p, port=port, rank=i) for i, p in enumerate(paths)))
  first, second = (dict(np.load(p)) for p in paths)
  _check(first, one_device)
  for name, value in first.items():  # Between the two, to the bit.
    np.testing.assert_array_equal(second[name], value, err_msg=name)


@pytest.mark.parametrize(
  'optimizer',
  [
    _evolution.Evolution(steps=9, population=16, form='latent'),
    _mezo.Mezo(steps=9, pairs=16, form='latent'),
  ],
  ids=['evolution', 'mezo'],
)
def test_compiled_update_is_split_and_ends_where_one_device_does(optimizer):
  target = jnp.arange(12.0).reshape(3, 4)
  problem = _problem.Problem(lambda p, b: jnp.mean((p['a'] - b['t']) ** 2))
  updates = (
    jax.jit(functools.partial(optimizer.update, problem)),
    _sharded.compiled(optimizer, problem),
  )
  found = []
  for update in updates:
    params = {'a': jnp.ones((3, 4))}
    state = optimizer.init(params, jax.random.key(1))
    for i in range(3):
      params, state, metrics = update(
        params, state, {'t': target}, jax.random.key(i)
      )
    assert len(params['a'].devices()) == 1
    found.append((np.asarray(params['a']), float(metrics['loss'])))
  np.testing.assert_allclose(found[1][0], found[0][0], 1e-5, 1e-6)
  np.testing.assert_allclose(found[1][1], found[0][1], 1e-5)
  assert np.abs(found[0][0] - 1).max() > 1e-4
  text = (
    updates[1]
    ._update.lower(
      *jax.tree.map(updates[1]._spread, ({'a': target}, state, {'t': target})),
      updates[1]._spread(jax.random.key(0)),
    )
    .as_text()
  )
  assert 'all_gather' in text


def test_population_that_does_not_divide_runs_on_one_device(caplog):
  problem = _problem.Problem(lambda p, b: jnp.sum(p['a'] ** 2))
  optimizer = _mezo.Mezo(steps=9, pairs=3)
  update = _sharded.compiled(optimizer, problem)
  params = {'a': jnp.ones(4)}
  state = optimizer.init(params, jax.random.key(1))
  params, _, metrics = update(params, state, None, jax.random.key(0))
  assert np.isfinite(metrics['loss']) and float(metrics['loss']) != 4
  assert 'do not divide among 8 devices' in caplog.text


def test_mesh_of_two_axes():
  mesh = jax.make_mesh((1, 1), ('a', 'b'))
  problem = _problem.Problem(lambda p, b: p['a'])
  with pytest.raises(errors.ConfigError, match='one axis'):
    _sharded.sharded_update(_evolution.Evolution(), problem, mesh)
