# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Test set-up: CPU only, eight virtual devices, quick compiles."""

import atexit
import gc
import os
import pathlib
import shutil
import tempfile
import zlib

# JAX and TensorFlow read these once, at import.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
_DEVICES = '--xla_force_host_platform_device_count=8'
if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}'

# What one process has compiled, the other workers and the programs that tests
# start need not: a quarter of the time.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _CACHE = tempfile.mkdtemp(prefix='gemma_ext_tests_')
  atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

# The tests, and the programs that they start, compile thousands of tiny
# programs and run most of them once: that takes half the time without XLA's
# optimisations. To test with them: JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

# After the lines above, on purpose.
import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope='module')
def room_for_programs():
  """Frees compiled programs before the kernel's limit on mappings is near.

  Each holds a few, and a compiler that gets no more ends the process.
  """
  yield
  maps = pathlib.Path('/proc/self/maps')
  limit = pathlib.Path('/proc/sys/vm/max_map_count')
  if not maps.exists() or not limit.exists():
    return
  with maps.open('rb') as lines:
    used = sum(1 for _ in lines)
  if used > int(limit.read_text()) // 3:
    jax.clear_caches()
    gc.collect()


# The files that take longest. Begun last, one of them would keep a worker busy
# while the others have nothing left to do.
_FIRST = (
  'kernels/sanitize_test.py',
  'train/survival_test.py',
  'compress/main_test.py',
  'families_test.py',
  'compress/allocate_test.py',
  'benchmarks/programs_test.py',
  'train/sharded_test.py',
  'train/heal_test.py',
  'text/speculative_test.py',
  'nn/compressed_test.py',
)


def pytest_configure(config: pytest.Config) -> None:
  """Registers the mark of the tests of `slow.txt`."""
  config.addinivalue_line('markers', 'slow: listed in tests/slow.txt')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  """Marks slow tests, puts the longest files first for several workers."""
  here = pathlib.Path(__file__).parent
  place = lambda item: item.path.relative_to(here).as_posix()
  lines = (here / 'slow.txt').read_text().splitlines()
  slow = {}
  for line in lines:
    if not line.startswith('#'):
      test, _, kept = line.partition(' 1/')
      slow[test] = int(kept or 0)
  found = set()
  for item in items:
    for name in {item.name, item.name.partition('[')[0]}:
      test = f'{place(item)}::{name}'
      if test in slow:
        # The first case of a test, and those of which a hash says so.
        kept = slow[test] and (
          test not in found or zlib.crc32(item.name.encode()) % slow[test] == 0
        )
        found.add(test)
        if not kept:
          item.add_marker('slow')
  files = {place(item) for item in items}
  unknown = {s for s in set(slow) - found if s.partition('::')[0] in files}
  if unknown and not any('::' in arg for arg in config.args):
    raise pytest.UsageError(
      f'tests/slow.txt lists tests that are not: {sorted(unknown)}'
    )
  if hasattr(config, 'workerinput'):
    rank = {name: i for i, name in enumerate(_FIRST)}
    items.sort(key=lambda item: rank.get(place(item), len(rank)))


def pytest_collection_finish() -> None:
  """Spares the garbage collector what all tests have imported."""
  gc.collect()
  gc.freeze()
