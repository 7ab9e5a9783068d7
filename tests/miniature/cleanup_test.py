from __future__ import annotations

import numpy as np

from polar_jax.miniature import cleanup

PIECES = np.array(['', 'a', 'b', ' c', '.', '\n', ' d', 'e'], dtype=object)
BOUNDS = cleanup.boundaries(PIECES)


def slow_loop_length(row):
  """Return the length of the shortest prefix that is followed by a token of a fourth copy of some passage of up to eight tokens."""
  for end in range(1, len(row) + 1):
    for period in range(1, cleanup.MAX_PERIOD + 1):
      span = cleanup.LOOP_PERIODS * period + 1
      tail = row[max(0, end - span) : end]
      if len(tail) == span and all(tail[i] == tail[i - period] for i in range(period, span)):
        return max(end - 1, min(len(row), cleanup.MIN_TOKENS))
  return len(row)


def test_cut_loops_against_slow_rule():
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 3, (300, 20))
  lengths = rng.integers(4, 21, 300)
  ids[np.arange(20)[None, :] >= lengths[:, None]] = 0
  expected = [slow_loop_length(list(row[:n])) for row, n in zip(ids, lengths, strict=True)]
  got = cleanup.cut_loops(ids, lengths)
  assert got.tolist() == expected
  assert (got < lengths).mean() > 0.3


def test_cut_loops_ignores_padding():
  ids = np.array([[1, 2, 3, 7, 4, 0, 0, 0, 0, 0, 0, 0]])
  assert cleanup.cut_loops(ids, np.array([5])).tolist() == [5]


def check_trim(row, expected):
  assert cleanup.trim_endings(np.array([row]), np.array([len(row)]), BOUNDS).tolist() == [expected]


def test_trim_endings_prefers_sentence():
  check_trim([1, 2, 2, 1, 4, 3, 5, 6, 7], 5)


def test_trim_endings_line_then_word():
  check_trim([1, 2, 2, 1, 3, 5, 6, 7], 5)
  check_trim([1, 2, 2, 1, 3, 7, 7], 4)


def test_trim_endings_keeps_at_least_half():
  check_trim([1, 4, 3, 1, 1, 1, 1, 1, 1, 1], 10)


def test_clean_keeps_the_end_of_a_finished_trajectory():
  ids = np.array([[1, 2, 1, 7, 4, 3, 7], [1, 2, 1, 7, 4, 3, 7]])
  ended = np.array([True, False])
  assert cleanup.clean(ids, np.array([7, 7]), ended, BOUNDS).tolist() == [7, 5]
