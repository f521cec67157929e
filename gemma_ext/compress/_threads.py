# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights one beside the other: a fit goes column by column, on one core."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import concurrent.futures
import os
from typing import Any

import jax
import tqdm

_MOST = 4


def each(
  fit: Callable[[Any], Any],
  items: Mapping[str, Any],
  *,
  desc: str,
  progress: bool,
) -> Iterator[tuple[str, Any]]:
  """Yields the names of items and what `fit` makes of them, as they are done.

  On accelerators one after the other, in their order.

  Args:
    fit: What to do with an item.
    items: Items by name.
    desc: What the progress bar says.
    progress: Whether to show one.
  """
  bar = tqdm.tqdm(
    total=len(items), desc=desc, unit='weight', disable=not progress
  )
  cores = (
    len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1
  )
  count = min(_MOST, cores) if jax.default_backend() == 'cpu' else 1
  with bar, concurrent.futures.ThreadPoolExecutor(count) as pool:
    waiting: dict[concurrent.futures.Future, str] = {}
    rest = iter(items.items())
    try:
      while True:
        # No more than are being worked on: what is done is to be taken first.
        while len(waiting) < count and (item := next(rest, None)) is not None:
          waiting[pool.submit(fit, item[1])] = item[0]
        if not waiting:
          return
        done, _ = concurrent.futures.wait(
          waiting, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for future in done:
          name = waiting.pop(future)
          bar.update()
          yield name, future.result()
    finally:
      for future in waiting:
        future.cancel()
