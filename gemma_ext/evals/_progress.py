# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""A progress bar on stderr, with the time left."""

from collections.abc import Iterator, Sequence
import sys

import tqdm


def track[T](
  items: Sequence[T], description: str, *, enabled: bool = True
) -> Iterator[T]:
  """Yields the items; a bar shows how many are done and the time left."""
  yield from tqdm.tqdm(
    items,
    desc=description,
    disable=not enabled,
    file=sys.stderr,
    # A log file keeps every state of the bar.
    mininterval=0.1 if sys.stderr.isatty() else 10,
    dynamic_ncols=True,
    leave=False,
  )
