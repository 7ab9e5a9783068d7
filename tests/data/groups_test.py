from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_jax.data import groups
from polar_jax.types import UserError

REWARD = 9
SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=8).map(lambda ids: [*ids, REWARD]), min_size=1, max_size=6)


def _read(part, candidate):
  """The sequence that a candidate's reward token sees, in the order of positions, as (token, position) of its keys."""
  at = part.reward_index[list(part.candidates).index(candidate)]
  keys = [*range(part.prefix_end[at]), *range(part.start[at], part.end[at])]
  return [(int(part.tokens[i]), int(part.positions[i])) for i in keys]


def _each_token_sees_its_past(part):
  for i in range(len(part.tokens)):
    seen = [*range(part.prefix_end[i]), *range(part.start[i], part.end[i])]
    assert sorted(part.positions[seen]) == list(range(part.positions[i] + 1))


@given(SEQUENCES, st.integers(9, 40), st.integers(1, 6))
def test_every_candidate_reads_its_own_sequence(sequences, row_length, most):
  parts = groups.lay_out(sequences, row_length, most)
  assert [c for part in parts for c in part.candidates] == list(range(len(sequences)))
  for part in parts:
    assert len(part.tokens) <= row_length and len(part.candidates) <= most
    _each_token_sees_its_past(part)
    for c in part.candidates:
      assert _read(part, c) == [(token, position) for position, token in enumerate(sequences[c])]


def test_the_prefix_stands_there_once():
  (part,) = groups.lay_out([[1, 2, 3, 4, REWARD], [1, 2, 3, REWARD], [1, 2, 3, 5, 6, REWARD]], 20, 8)
  assert part.tokens.tolist() == [1, 2, 3, 4, REWARD, REWARD, 5, 6, REWARD]
  assert part.positions.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 5]
  assert part.reward_index.tolist() == [4, 5, 8]


def test_identical_candidates_keep_a_tail_each():
  (part,) = groups.lay_out([[1, 2, REWARD]] * 3, 20, 8)
  assert part.tokens.tolist() == [1, 2, REWARD, REWARD, REWARD]


def test_a_group_too_large_for_a_row_repeats_its_prefix():
  sequences = [[1, 2, 3, c, c, REWARD] for c in range(4, 8)]
  parts = groups.lay_out(sequences, 9, 8)
  assert [list(part.candidates) for part in parts] == [[0, 1], [2, 3]]
  assert all(part.tokens[:3].tolist() == [1, 2, 3] for part in parts)


def test_no_candidates():
  assert groups.lay_out([], 8, 4) == []


@pytest.mark.parametrize('sequences', [[[REWARD], [1] * 9], [[REWARD], []]])
def test_a_candidate_that_fits_no_row_is_named(sequences):
  with pytest.raises(UserError, match=f'candidate 1 has {len(sequences[1])} tokens.*8'):
    groups.lay_out(sequences, 8, 4)


def test_batch_shifts_what_points_into_the_row():
  one, two = (groups.lay_out([[t, 1, REWARD], [t, 2, REWARD]], 20, 4)[0] for t in (5, 6))
  batch = groups.group_batch([one, two], [0, 2], [[1, 0], []], 12, 5)
  assert batch.tokens_BT[0].tolist() == [6, 1, REWARD, 2, REWARD, 5, 1, REWARD, 2, REWARD, 0, 0]
  assert batch.index_BQ.tolist() == [[2, 3, 0, 1, -1], [-1] * 5]
  assert batch.reward_index_BQ[0, :4].tolist() == [2, 4, 7, 9]
  assert batch.start_BT[0].tolist() == [0, 1, 1, 3, 3, 5, 6, 6, 8, 8, 0, 0]
  assert batch.end_BT[0].tolist() == [*range(1, 11), 0, 0]
  assert batch.prefix_start_BT[0].tolist() == [0] * 5 + [0, 5, 5, 5, 5, 0, 0]
  assert batch.prefix_end_BT[0].tolist() == [0, 1, 1, 1, 1, 0, 6, 6, 6, 6, 0, 0]
  assert not any(np.any(a[1]) for a in batch[:6])
