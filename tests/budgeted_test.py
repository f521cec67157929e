# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the parts of a calibration text."""

import numpy as np
import pytest

from gemma_ext import _budgeted


def _windows(count):
  return np.arange(count)[:, None].repeat(3, axis=1)


@pytest.mark.parametrize(('size', 'count'), [(100, 25), (671, 25), (20, 25)])
def test_parts_of_a_text_are_apart_and_spread(size, count):
  first = size - round(size / 4)
  text = _budgeted.Text.of(_windows(size), count)
  fitted, unseen, counted = (
    part[:, 0] for part in (text.fitted, text.unseen, text.counted)
  )
  assert len(fitted) == min(count - count // 3, first)
  assert len(unseen) == min(count - count // 3, size - first)
  # What is measured on comes after all that was seen.
  assert max(fitted.max(), counted.max(initial=0)) < unseen.min()
  seen = np.concatenate([fitted, counted])
  np.testing.assert_array_equal(np.sort(seen), np.arange(first))
  # From the first to the last, and no large step.
  assert fitted[0] == 0 and fitted[-1] == first - 1
  assert unseen[-1] == size - 1
  steps = np.diff(fitted)
  assert steps.max() - steps.min() <= 1


def test_of_hardly_any_text_all_is_used_for_both():
  for size, count in ((1, 25), (2, 2), (50, 1)):
    text = _budgeted.Text.of(_windows(size), count)
    assert len(text.fitted) == len(text.unseen)
    assert not len(text.counted)
