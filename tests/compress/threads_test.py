# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of fits beside one another."""

import threading

import pytest

from gemma_ext.compress import _threads


def _each(fit, items):
  return _threads.each(fit, items, desc='x', progress=False)


def test_all_are_made_once_whatever_their_order():
  calls = []
  lock = threading.Lock()

  def fit(x):
    with lock:
      calls.append(x)
    return x * x

  items = {str(i): i for i in range(40)}
  assert dict(_each(fit, items)) == {str(i): i * i for i in range(40)}
  assert sorted(calls) == list(range(40))
  assert not dict(_each(fit, {}))


def test_an_error_comes_out_and_stops_what_has_not_begun():
  seen = []

  def fit(x):
    seen.append(x)
    if x == 3:
      raise ValueError('three')
    return x

  with pytest.raises(ValueError, match='three'):
    dict(_each(fit, {str(i): i for i in range(1000)}))
  assert len(seen) < 20


def test_who_stops_asking_gets_no_more():
  seen = []

  def fit(x):
    seen.append(x)
    return x

  made = _each(fit, {str(i): i for i in range(1000)})
  next(made)
  made.close()
  assert len(seen) < 20


def test_several_at_a_time_where_there_are_cores(monkeypatch):
  monkeypatch.setattr(_threads.os, 'sched_getaffinity', lambda _: range(2))
  # Each waits for the other.
  both = threading.Barrier(2, timeout=20)
  assert dict(_each(lambda x: both.wait() < 2, {'a': 0, 'b': 1})) == {
    'a': True,
    'b': True,
  }
