from __future__ import annotations

import numpy as np
import pytest

from polar_jax.data import rows

REWARD = 99
CASES = {
  'ordinary': ([1, 5, 6, 7, 8, REWARD], [1, 5, 6, 9, REWARD]),
  'longer rejected': ([1, 5, 9, REWARD], [1, 5, 6, 7, 8, 6, REWARD]),
  'identical': ([1, 5, 6, REWARD], [1, 5, 6, REWARD]),
  'empty chosen': ([1, 5, 6, REWARD], [1, 5, 6, 7, REWARD]),
  'empty rejected': ([1, 5, 6, 7, 8, REWARD], [1, 5, 6, REWARD]),
  'chosen is the head of rejected': ([1, 5, REWARD], [1, 5, REWARD, 7, REWARD]),
  'rejected is the head of chosen': ([1, 5, REWARD, 7, REWARD], [1, 5, REWARD]),
  'only BOS shared': ([1, 5, 6, REWARD], [1, 7, 8, 9, REWARD]),
  'nothing shared': ([5, 6, REWARD], [1, 8, 9, REWARD]),
  'one token each': ([REWARD], [REWARD]),
  'last tokens equal again': ([1, 5, 6, 7, REWARD], [1, 5, 8, 7, REWARD]),
}


@pytest.mark.parametrize('name', CASES)
def test_reading_from_the_reward_token_gives_back_each_sequence(name):
  """What the reward token of a candidate sees is that candidate's sequence, and so on for every token of it."""
  chosen, rejected = CASES[name]
  row = rows.pair_row(chosen, rejected)
  shared = 0
  while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
    shared += 1
  assert len(row.tokens) == len(chosen) + len(rejected) - shared
  visited = set()
  for sequence, reward_index in zip((chosen, rejected), row.reward_index, strict=True):
    assert row.tokens[reward_index] == sequence[-1]
    seen = sorted(range(row.start[reward_index], row.end[reward_index]), key=lambda i: row.positions[i])
    assert [row.tokens[i] for i in seen] == list(sequence)
    assert [row.positions[i] for i in seen] == list(range(len(sequence)))
    # Token number n of the sequence sees exactly the tokens 0..n of it.
    for n, i in enumerate(seen):
      assert set(range(row.start[i], row.end[i])) == set(seen[: n + 1])
    visited |= set(seen)
  assert visited == set(range(len(row.tokens)))


def test_random_pairs_against_the_same_oracle():
  rng = np.random.default_rng(0)
  for _ in range(200):
    prefix = rng.integers(0, 3, rng.integers(0, 6)).tolist()
    pair = [prefix + rng.integers(0, 3, rng.integers(0, 6)).tolist() + [REWARD] for _ in range(2)]
    CASES['random'] = tuple(pair)
    try:
      test_reading_from_the_reward_token_gives_back_each_sequence('random')
    finally:
      del CASES['random']


@pytest.mark.parametrize('pair', [([], [REWARD]), ([REWARD], []), ([], [])])
def test_a_sequence_without_tokens_is_refused(pair):
  with pytest.raises(ValueError, match='reward token'):
    rows.pair_row(*pair)


def test_triplets_stand_behind_one_another_and_padding_is_masked():
  names = ['ordinary', 'identical', 'empty chosen', 'longer rejected']
  triplets, indices = [rows.pair_row(*CASES[name]) for name in names], [17, 4, 0, 9]
  packed = [[3, 0], [], [2], [1]]
  batch = rows.pair_batch(triplets, indices, packed, 18, 3)
  assert batch.tokens_BT.shape == (4, 18)
  np.testing.assert_array_equal(batch.pair_mask_BP, [[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]])
  np.testing.assert_array_equal(batch.index_BP, [[9, 17, -1], [-1, -1, -1], [0, -1, -1], [4, -1, -1]])
  for b, members in enumerate(packed):
    at = 0
    for p, member in enumerate(members):
      row, here = triplets[member], slice(at, at + len(triplets[member].tokens))
      np.testing.assert_array_equal(batch.tokens_BT[b, here], row.tokens)
      np.testing.assert_array_equal(batch.positions_BT[b, here], row.positions)
      np.testing.assert_array_equal(batch.start_BT[b, here] - at, row.start)
      np.testing.assert_array_equal(batch.end_BT[b, here] - at, row.end)
      assert [batch.tokens_BT[b, i] for i in batch.reward_index_BPC[b, p]] == [REWARD, REWARD]
      np.testing.assert_array_equal(batch.reward_index_BPC[b, p] - at, row.reward_index)
      at = here.stop
    for padded in batch[:4]:
      np.testing.assert_array_equal(padded[b, at:], 0)  # start == end: padding sees nothing
    np.testing.assert_array_equal(batch.reward_index_BPC[b, len(members) :], 0)
  assert {a.dtype for a in batch} == {np.dtype(np.int32), np.dtype(np.float32)}


def test_triplets_may_fill_a_row_to_the_last_token():
  row = rows.pair_row(*CASES['ordinary'])
  n = len(row.tokens)
  batch = rows.pair_batch([row, row], [3, 5], [[0, 1]], 2 * n, 2)
  assert (batch.end_BT > batch.start_BT).all() and batch.end_BT.max() == 2 * n


def test_text_batch_shifts_targets_by_one():
  window = np.arange(10, 17)
  batch = rows.text_batch([window, None], [5, -1], 6)
  np.testing.assert_array_equal(batch.tokens_BT, [[10, 11, 12, 13, 14, 15], [0] * 6])
  np.testing.assert_array_equal(batch.target_BT[0], [11, 12, 13, 14, 15, 16])
  np.testing.assert_array_equal(batch.end_BT, [[1, 2, 3, 4, 5, 6], [0] * 6])
  np.testing.assert_array_equal(batch.start_BT, np.zeros((2, 6)))
  np.testing.assert_array_equal(batch.positions_BT[0], range(6))
  np.testing.assert_array_equal(batch.target_mask_BT, [[1] * 6, [0] * 6])
  np.testing.assert_array_equal(batch.index_B, [5, -1])
