# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""States are whole or not there: torn files, full disks, kills."""

from collections.abc import Iterator
import contextlib
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemma_ext import errors
from gemma_ext.train import _store


def _arrays(number: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(number)
  return {
    'a': rng.standard_normal((64, 33)).astype(np.float32),
    'codes': rng.integers(0, 255, 100).astype(np.uint8),
    'scale': rng.standard_normal(7).astype(ml_dtypes.bfloat16),
  }


def _check(saved: _store.Saved) -> None:
  want = _arrays(saved.number)
  assert saved.metadata == {'n': saved.number}
  assert saved.arrays.keys() == want.keys()
  for name, value in want.items():
    assert saved.arrays[name].dtype == value.dtype
    np.testing.assert_array_equal(
      saved.arrays[name].view(np.uint8), value.view(np.uint8)
    )


def _filled(path: pathlib.Path, numbers=(1, 2, 3)) -> _store.Store:
  store = _store.Store(path, fingerprint='f')
  for n in numbers:
    store.save(n, _arrays(n), {'n': n})
  return store


def test_latest_is_the_last_and_two_are_kept(tmp_path):
  store = _filled(tmp_path)
  saved = store.latest()
  assert saved is not None and saved.number == 3
  _check(saved)
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'step_0000000002',
    'step_0000000003',
  ]


def test_no_state(tmp_path):
  assert _store.Store(tmp_path / 'new', fingerprint='f').latest() is None


def _flip(file: pathlib.Path) -> None:
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


@pytest.mark.parametrize('name', ['arrays.safetensors', 'manifest.json'])
@pytest.mark.parametrize(
  'damage',
  [
    lambda f: f.unlink(),
    lambda f: f.write_bytes(f.read_bytes()[:-9]),
    lambda f: f.write_bytes(b''),
  ],
  ids=['deleted', 'truncated', 'empty'],
)
def test_torn_state_falls_back(tmp_path, name, damage):
  store = _filled(tmp_path)
  damage(tmp_path / 'step_0000000003' / name)
  saved = store.latest()
  assert saved is not None and saved.number == 2
  _check(saved)


def test_flipped_bit_falls_back(tmp_path):
  store = _filled(tmp_path)
  _flip(tmp_path / 'step_0000000003' / 'arrays.safetensors')
  saved = store.latest()
  assert saved is not None and saved.number == 2


def test_any_flipped_bit_of_the_manifest_is_harmless_or_falls_back(tmp_path):
  store = _filled(tmp_path)
  file = tmp_path / 'step_0000000003' / 'manifest.json'
  good = file.read_bytes()
  numbers = []
  for i in range(8 * len(good)):
    data = bytearray(good)
    data[i // 8] ^= 1 << i % 8
    file.write_bytes(data)
    saved = store.latest()
    assert saved is not None
    assert saved.metadata == {'n': saved.number}
    numbers.append(saved.number)
  assert set(numbers) <= {2, 3}
  assert numbers.count(2) > 0.9 * len(numbers)


def test_manifest_of_another_step_falls_back(tmp_path):
  store = _filled(tmp_path)
  old, new = (tmp_path / f'step_000000000{n}' for n in (2, 3))
  for name in ('manifest.json', 'arrays.safetensors'):
    (new / name).write_bytes((old / name).read_bytes())
  saved = store.latest()
  assert saved is not None and saved.number == 2


def test_new_steps_outlive_later_ones_that_are_torn(tmp_path):
  store = _filled(tmp_path, (4, 5))
  for n in (4, 5):
    _flip(tmp_path / f'step_000000000{n}' / 'arrays.safetensors')
  assert store.latest() is None
  store.save(1, _arrays(1), {'n': 1})
  saved = store.latest()
  assert saved is not None and saved.number == 1
  _check(saved)
  assert [p.name for p in tmp_path.iterdir()] == ['step_0000000001']


def test_leftovers_of_a_kill_go_when_the_next_step_is_written(tmp_path):
  store = _filled(tmp_path)
  left = tmp_path / '.step_0000000009.partial'
  left.mkdir()
  assert store.latest() is not None
  assert left.exists()
  store.save(4, _arrays(4), {'n': 4})
  assert not left.exists()
  left.mkdir()
  store.clear()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('metadata', 'message'),
  [
    ({'ratio': float('nan')}, 'JSON'),
    ({'x': object()}, 'JSON'),
    ({'x': 'y' * (16 << 20)}, 'metadata takes'),
  ],
  ids=['nan', 'object', 'large'],
)
def test_metadata_that_could_not_be_read_again(tmp_path, metadata, message):
  store = _filled(tmp_path)
  with pytest.raises(errors.StateError, match=message):
    store.save(4, _arrays(4), metadata)
  saved = store.latest()
  assert saved is not None and saved.number == 3
  assert len(list(tmp_path.iterdir())) == 2


def test_other_fingerprint(tmp_path):
  _filled(tmp_path)
  with pytest.raises(errors.StateError, match='another config'):
    _store.Store(tmp_path, fingerprint='g').latest()


def test_refusal_names_what_differs(tmp_path):
  old = {'seed': 0, 'stages': [{'steps': 60, 'rate': 0.1}], 'text': 'sample'}
  new = {'seed': 0, 'stages': [{'steps': 90, 'rate': 0.1}], 'text': 'other'}
  _store.Store(tmp_path, fingerprint='f', config=old).save(1, {}, {})
  with pytest.raises(errors.StateError) as e:
    _store.Store(tmp_path, fingerprint='g', config=new).latest()
  assert 'stages[0].steps was 60, is 90' in str(e.value)
  assert "text was 'sample', is 'other'" in str(e.value)
  assert 'seed' not in str(e.value)


def test_disk_full(tmp_path):
  script = textwrap.dedent(f"""
    import resource, signal
    import numpy as np
    from gemma_ext import errors
    from gemma_ext.train import _store
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = _store.Store({str(tmp_path)!r}, fingerprint='f')
    store.save(1, {{'a': np.zeros(10, np.float32)}}, {{}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
      store.save(2, {{'a': np.zeros(10**6, np.float32)}}, {{}})
    except errors.StateError as e:
      assert 'MB are free' in str(e), e
      print('refused', store.latest().number)
  """)
  out = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=False
  )
  assert out.stdout.strip() == 'refused 1', out.stderr[-2000:]
  assert [p.name for p in tmp_path.iterdir()] == ['step_0000000001']
  assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


@contextlib.contextmanager
def _tiny_disk(path: pathlib.Path) -> Iterator[bool]:
  """Mounts 1 MB at a path; whether that was allowed."""
  path.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(path)]
  allowed = (
    shutil.which('mount') is not None
    and subprocess.run(mount, capture_output=True).returncode == 0
  )
  try:
    yield allowed
  finally:
    if allowed:
      subprocess.run(['umount', str(path)], check=True)


def test_disk_really_full(tmp_path):
  disk = tmp_path / 'disk'
  with _tiny_disk(disk) as allowed:
    if not allowed:  # Then a limit on the size of files stands in for it.
      test_disk_full(disk)
      return
    store = _filled(disk, (1,))
    with pytest.raises(errors.StateError, match='MB are free') as e:
      store.save(2, {'a': np.zeros(10**6, np.float32)}, {})
    assert str(disk) in str(e.value)
    assert [p.name for p in disk.iterdir()] == ['step_0000000001']
    saved = store.latest()
    assert saved is not None
    _check(saved)
    store.save(2, _arrays(2), {'n': 2})


def test_killed_at_random_moments(tmp_path):
  script = textwrap.dedent(f"""
    import os, sys
    sys.path.insert(0, {str(pathlib.Path(__file__).parents[2])!r})
    from tests.train import store_test as t
    from gemma_ext.train import _store
    store = _store.Store({str(tmp_path)!r}, fingerprint='f')
    for kill in range(20):
      pid = os.fork()
      if pid == 0:
        saved = store.latest()
        n = saved.number + 1 if saved else 1
        while True:
          store.save(n, t._arrays(n), {{'n': n}})
          n += 1
      print(pid, flush=True)
      os.waitpid(pid, 0)
  """)
  rng = np.random.default_rng(0)
  numbers = []
  with subprocess.Popen(
    [sys.executable, '-c', script], stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout is not None
    for line in process.stdout:
      time.sleep(float(rng.uniform(0.005, 0.1)))
      subprocess.run(['kill', f'-{signal.SIGKILL.value}', line.strip()])
      saved = _store.Store(tmp_path, fingerprint='f').latest()
      if saved is not None:
        _check(saved)
        numbers.append(saved.number)
  assert process.returncode == 0
  assert len(numbers) >= 15
  assert numbers == sorted(numbers) and numbers[-1] > numbers[0]


def test_lock_keeps_others_out_until_its_process_is_gone(tmp_path):
  store = _store.Store(tmp_path, fingerprint='f')
  script = textwrap.dedent(f"""
    from gemma_ext.train import _store
    with _store.Store({str(tmp_path)!r}, fingerprint='f').lock():
      print('locked', flush=True)
      input()
  """)
  with subprocess.Popen(
    [sys.executable, '-c', script],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout is not None
    assert process.stdout.readline() == 'locked\n'
    for _ in range(2):
      with pytest.raises(errors.StateError, match=f'pid {process.pid} on'):
        with store.lock():
          raise AssertionError
    process.kill()
    process.wait()
  with store.lock(), pytest.raises(errors.StateError, match='Another run'):
    with _store.Store(tmp_path, fingerprint='g').lock():
      raise AssertionError
  with store.lock():
    assert store.latest() is None


def test_tree_round_trip_and_wrong_shape():
  tree = {'a': jnp.arange(3.0), 'b': (jnp.zeros((2, 2), jnp.bfloat16),)}
  arrays = _store.flatten(tree)
  out = _store.unflatten(tree, arrays)
  np.testing.assert_array_equal(out['a'], tree['a'])
  assert out['b'][0].dtype == jnp.bfloat16
  with pytest.raises(errors.StateError, match='another version'):
    _store.unflatten({'a': jnp.arange(4.0), 'b': tree['b']}, arrays)
