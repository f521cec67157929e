# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Times of several contenders, taken in turn, and their ratios.

Machines are shared and drift: one round takes every contender once, A B A B,
and a ratio is that of two times of the same round.
"""

from collections.abc import Callable, Mapping, Sequence
import os
import pathlib
import platform
import time
from typing import Any

import numpy as np
import scipy.stats


def rounds(
  contenders: Mapping[str, Callable[[], float]],
  count: int,
  note: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
  """Measures every contender once a round, in turn.

  Args:
    contenders: Functions that run once and return what is measured. What must
      not be timed (compilation, loading) has been done before.
    count: Rounds.
    note: Told about every round.

  Returns:
    By name, one number a round.
  """
  found: dict[str, list[float]] = {name: [] for name in contenders}
  for i in range(count):
    for name, run in contenders.items():
      found[name].append(run())
    last = ', '.join(f'{k} {v[-1]:.4g}' for k, v in found.items())
    note(f'round {i + 1} of {count}: {last}')
  return found


def seconds(run: Callable[[], Any], repeats: int = 1) -> float:
  """Seconds of one call, over `repeats` of them; `run` waits for its result."""
  begun = time.perf_counter()
  for _ in range(repeats):
    run()
  return (time.perf_counter() - begun) / repeats


def summary(values: Sequence[float], level: float = 0.95) -> dict[str, Any]:
  """The median and an interval for it from order statistics.

  The interval between the k-th smallest and the k-th largest of n independent
  values holds the median with a probability of the binomial distribution; k is
  the largest for which this is at least `level`. With fewer than 6 values there
  is none at 95%.
  """
  x = np.sort(np.asarray(values, np.float64))
  n = len(x)
  low = high = None
  k = int(scipy.stats.binom.ppf((1 - level) / 2, n, 0.5))
  if k and 1 - 2 * scipy.stats.binom.cdf(k - 1, n, 0.5) >= level:
    low, high = float(x[k - 1]), float(x[n - k])
  return {'median': float(np.median(x)), 'ci95': [low, high], 'n': n}


def ratio(
  over: Sequence[float], under: Sequence[float], level: float = 0.95
) -> dict[str, Any]:
  """Median and interval of the ratios of two contenders, round by round."""
  return summary([a / b for a, b in zip(over, under, strict=True)], level)


def machine() -> dict[str, Any]:
  """What the numbers were measured on."""
  cpu = platform.processor() or platform.machine()
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith('model name'):
        cpu = line.split(':', 1)[1].strip()
        break
  return {
    'cpu': cpu,
    'cores': len(os.sched_getaffinity(0))
    if hasattr(os, 'sched_getaffinity')
    else os.cpu_count(),
    'python': platform.python_version(),
  }


def spread(values: Sequence[float]) -> str:
  """'1.23 [1.20, 1.30]' of `summary`."""
  found = summary(values)
  low, high = found['ci95']
  ends = '' if low is None else f' [{low:.3g}, {high:.3g}]'
  return f'{found["median"]:.3g}{ends}'
