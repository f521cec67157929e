# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Some of the kernel tests under AddressSanitizer and UBSan."""

import platform
import shutil
import subprocess
import sys

import pytest


@pytest.mark.skipif(
  platform.system() != 'Linux'
  or not all(shutil.which(name) for name in ('cmake', 'c++')),
  reason='needs cmake, a C++ compiler and LD_PRELOAD',
)
def test_no_memory_error():
  # The intrinsics by hand with one format of each layout: of the layouts that
  # several formats share, those with groups of 128 and 1024 are left out. Of
  # what the compiler vectorises, which is slow here, a few formats.
  # `python -m tools.sanitize_kernels` runs all.
  some = (
    'avx512 and (5trit or 3of4 or Int or attend or gemma3)'
    ' or portable and cpu_test and (e4m3 or 3of4)'
  )
  gates = 'neurons_test and not e4m3'
  chosen = (
    f'(sizes or finite or fit or (float64 and ({some})))'
    f' and not xla and not 1024 and not 128 and not (float64 and {gates})'
  )
  run = subprocess.run(
    [
      *(sys.executable, '-m', 'tools.sanitize_kernels', '-q', '-s'),
      *(
        f'tests/kernels/{n}_test.py'
        for n in ('cpu', 'gated', 'experts', 'neurons', 'attend', 'block')
      ),
      *('-k', chosen),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
  assert ' passed' in run.stdout
