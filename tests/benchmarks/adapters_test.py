"""The comparison of adapters with full training, apart from the training itself."""

from __future__ import annotations

import types

import pytest


@pytest.fixture
def adapters(load_benchmark):
  return load_benchmark('adapters')


def test_pairs_come_from_as_many_prompts_as_possible(adapters):
  assert adapters.evenly(list(range(10)), 4) == [0, 3, 6, 9] and adapters.evenly([1, 2], 5) == [1, 2]


def test_only_short_pairs_are_kept(adapters):
  pair = lambda n: types.SimpleNamespace(prompt='p', reference='r', chosen='c' * n, rejected='d')
  assert adapters.short([pair(1), pair(2), pair(3)], list, 5) == [pair(1), pair(2)]


def test_arms_are_compared_on_the_same_pairs(adapters):
  known = {'seconds_per_step': 1.0, 'seconds': 9.0, 'tokens': 5, 'peak_bytes': 1, 'checkpoint_bytes': 1, 'trained_on': 3}
  outcome = lambda margins: {**known, 'margins': margins, 'prompts': ['a', 'a', 'b', 'c'], 'loss_by_step': [9.0] + [0.5] * 10}
  found = adapters.compare({'full': outcome([1, -1, 0, 1]), '8': outcome([1, 1, 1, -1])})
  assert (found['full']['accuracy']['accuracy'], found['8']['accuracy']['accuracy']) == (0.625, 0.75)
  assert found['full']['accuracy']['clusters'] == 3 and found['full']['last_losses'] == 0.5
  assert found['8']['minus_full']['difference'] == 0.125 and 'minus_full' not in found['full']
