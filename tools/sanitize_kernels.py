# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of the CPU kernels under AddressSanitizer and UBSan.

  python -m tools.sanitize_kernels [arguments for pytest]

Builds the library anew in build/sanitize. Reads and writes out of bounds,
overflow of signed integers and shifts that are too far end the run. Leaks are
not looked for: the interpreter has many.
"""

import os
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parent.parent
_BUILD = _ROOT / 'build' / 'sanitize'


def main(argv: list[str] | None = None) -> int:
  """Builds, runs, and returns the exit status of pytest."""
  arguments = sys.argv[1:] if argv is None else argv
  configure = [
    'cmake',
    *('-S', str(_ROOT / 'gemma_ext' / 'kernels' / 'cpu')),
    *('-B', str(_BUILD)),
    '-DCMAKE_BUILD_TYPE=Debug',
    '-DGEMMA_EXT_SANITIZE=ON',
    f'-DPython_EXECUTABLE={sys.executable}',
  ]
  for command in (configure, ['cmake', '--build', str(_BUILD), '-j2']):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  compiler = os.environ.get('CXX', 'c++')
  preload = ' '.join(
    subprocess.run(
      [compiler, f'-print-file-name={name}'],
      check=True,
      capture_output=True,
      text=True,
    ).stdout.strip()
    # Exceptions are only seen by a runtime that finds the C++ library.
    for name in ('libasan.so', 'libstdc++.so')
  )
  environment = os.environ | {
    'LD_PRELOAD': preload,
    # XLA and Python do things of their own at exit and with signals.
    'ASAN_OPTIONS': 'detect_leaks=0:handle_segv=0',
    'UBSAN_OPTIONS': 'print_stacktrace=1',
    'GEMMA_EXT_CPU_LIBRARY': str(_BUILD / 'libgemma_ext_cpu.so'),
  }
  tests = arguments or ['-q', str(_ROOT / 'tests' / 'kernels' / 'cpu_test.py')]
  return subprocess.run(
    [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', *tests],
    env=environment,
    cwd=_ROOT,
    check=False,
  ).returncode


if __name__ == '__main__':
  sys.exit(main())
