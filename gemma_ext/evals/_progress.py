# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""A progress bar on stderr, with the time left."""

from collections.abc import Iterator
from collections.abc import Sequence
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
    dynamic_ncols=True,
    leave=False,
  )
