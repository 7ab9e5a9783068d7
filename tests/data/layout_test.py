from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_jax.data import layout
from polar_jax.data.layout import group_batch, group_segments
from polar_jax.types import Rollouts, UserError

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
  """The reward token of a candidate sees exactly the candidate's sequence, and every other token its own past."""
  chosen, rejected = CASES[name]
  row = layout.pair_segment(chosen, rejected)
  shared = 0
  while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
    shared += 1
  assert len(row.tokens) == len(chosen) + len(rejected) - shared
  visited = set()
  for sequence, reward_index in zip((chosen, rejected), row.last_index, strict=True):
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
    layout.pair_segment(*pair)


def test_pair_batch_places_triplets_one_after_another_and_masks_padding():
  names = ['ordinary', 'identical', 'empty chosen', 'longer rejected']
  triplets, indices = [layout.pair_segment(*CASES[name]) for name in names], [17, 4, 0, 9]
  packed = [[3, 0], [], [2], [1]]
  batch = layout.pair_batch(triplets, indices, packed, 18, 3)
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
      np.testing.assert_array_equal(batch.reward_index_BPC[b, p] - at, row.last_index)
      at = here.stop
    for padded in batch[:4]:
      np.testing.assert_array_equal(padded[b, at:], 0)  # start == end: padding sees nothing
    np.testing.assert_array_equal(batch.reward_index_BPC[b, len(members) :], 0)
  assert (batch.margin_BP, batch.weight_BP) == (None, None)
  assert {a.dtype for a in batch[:-2]} == {np.dtype(np.int32), np.dtype(np.float32)}
  with_numbers = layout.pair_batch(triplets, indices, packed, 18, 3, np.array([0.5, 1, 2, 4]), np.array([1, 2, 3, 0.25]))
  np.testing.assert_array_equal(with_numbers.margin_BP, [[4, 0.5, 0], [0, 0, 0], [2, 0, 0], [1, 0, 0]])
  np.testing.assert_array_equal(with_numbers.weight_BP, [[0.25, 1, 0], [0, 0, 0], [3, 0, 0], [2, 0, 0]])
  assert with_numbers.margin_BP.dtype == with_numbers.weight_BP.dtype == np.float32


def test_pair_batch_may_fill_a_row_completely():
  row = layout.pair_segment(*CASES['ordinary'])
  n = len(row.tokens)
  batch = layout.pair_batch([row, row], [3, 5], [[0, 1]], 2 * n, 2)
  assert (batch.end_BT > batch.start_BT).all() and batch.end_BT.max() == 2 * n


def test_text_batch_shifts_targets_by_one():
  window = np.arange(10, 17)
  batch = layout.text_batch([window, None], [5, -1], 6)
  np.testing.assert_array_equal(batch.tokens_BT, [[10, 11, 12, 13, 14, 15], [0] * 6])
  np.testing.assert_array_equal(batch.target_BT[0], [11, 12, 13, 14, 15, 16])
  np.testing.assert_array_equal(batch.end_BT, [[1, 2, 3, 4, 5, 6], [0] * 6])
  np.testing.assert_array_equal(batch.start_BT, np.zeros((2, 6)))
  np.testing.assert_array_equal(batch.positions_BT[0], range(6))
  np.testing.assert_array_equal(batch.target_mask_BT, [[1] * 6, [0] * 6])
  np.testing.assert_array_equal(batch.index_B, [5, -1])


def test_sequence_batch_holds_one_sequence_per_row():
  batch = layout.sequence_batch([[5, 6, REWARD], [REWARD]], 4, 3)
  np.testing.assert_array_equal(batch.tokens_BT, [[5, 6, REWARD, 0], [REWARD, 0, 0, 0], [0] * 4])
  np.testing.assert_array_equal(batch.positions_BT, [[0, 1, 2, 0], [0] * 4, [0] * 4])
  np.testing.assert_array_equal(batch.start_BT, np.zeros((3, 4)))
  np.testing.assert_array_equal(batch.end_BT, [[1, 2, 3, 0], [1, 0, 0, 0], [0] * 4])
  np.testing.assert_array_equal(batch.reward_index_B, [2, 0, 0])
  assert {a.dtype for a in batch} == {np.dtype(np.int32)}


SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=8).map(lambda ids: [*ids, REWARD]), min_size=1, max_size=6)


def _read(segment, candidate):
  """Return (token, position) of the keys that a candidate's reward token sees, in the order of positions."""
  at = segment.last_index[list(segment.members).index(candidate)]
  keys = [*range(segment.prefix_end[at]), *range(segment.start[at], segment.end[at])]
  return [(int(segment.tokens[i]), int(segment.positions[i])) for i in keys]


def _each_token_sees_its_past(segment):
  for i in range(len(segment.tokens)):
    seen = [*range(segment.prefix_end[i]), *range(segment.start[i], segment.end[i])]
    assert sorted(segment.positions[seen]) == list(range(segment.positions[i] + 1))


@given(SEQUENCES, st.integers(9, 40), st.integers(1, 6))
def test_every_candidate_reads_its_own_sequence(sequences, row_length, most):
  segments = group_segments(sequences, row_length, most)
  assert [c for segment in segments for c in segment.members] == list(range(len(sequences)))
  for segment in segments:
    assert len(segment.tokens) <= row_length and len(segment.members) <= most
    _each_token_sees_its_past(segment)
    for c in segment.members:
      assert _read(segment, c) == [(token, position) for position, token in enumerate(sequences[c])]


def test_group_segments_store_the_prefix_once():
  (segment,) = group_segments([[1, 2, 3, 4, REWARD], [1, 2, 3, REWARD], [1, 2, 3, 5, 6, REWARD]], 20, 8)
  assert segment.tokens.tolist() == [1, 2, 3, 4, REWARD, REWARD, 5, 6, REWARD]
  assert segment.positions.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 5]
  assert segment.last_index.tolist() == [4, 5, 8]


def test_identical_candidates_keep_a_tail_each():
  (segment,) = group_segments([[1, 2, REWARD]] * 3, 20, 8)
  assert segment.tokens.tolist() == [1, 2, REWARD, REWARD, REWARD]


def test_a_group_too_large_for_a_row_repeats_its_prefix():
  sequences = [[1, 2, 3, c, c, REWARD] for c in range(4, 8)]
  segments = group_segments(sequences, 9, 8)
  assert [list(segment.members) for segment in segments] == [[0, 1], [2, 3]]
  assert all(segment.tokens[:3].tolist() == [1, 2, 3] for segment in segments)


def test_no_candidates():
  assert group_segments([], 8, 4) == []


@pytest.mark.parametrize('sequences', [[[REWARD], [1] * 9], [[REWARD], []]])
def test_a_candidate_longer_than_a_row_is_named(sequences):
  with pytest.raises(UserError, match=f'candidate 1 has {len(sequences[1])} tokens.*8'):
    group_segments(sequences, 8, 4)


def test_group_batch_shifts_indices_and_intervals():
  one, two = (group_segments([[t, 1, REWARD], [t, 2, REWARD]], 20, 4)[0] for t in (5, 6))
  two = two._replace(members=[2, 3])
  batch = group_batch([one, two], [[1, 0], []], 12, 5)
  assert batch.tokens_BT[0].tolist() == [6, 1, REWARD, 2, REWARD, 5, 1, REWARD, 2, REWARD, 0, 0]
  assert batch.index_BQ.tolist() == [[2, 3, 0, 1, -1], [-1] * 5]
  assert batch.reward_index_BQ[0, :4].tolist() == [2, 4, 7, 9]
  assert batch.start_BT[0].tolist() == [0, 1, 1, 3, 3, 5, 6, 6, 8, 8, 0, 0]
  assert batch.end_BT[0].tolist() == [*range(1, 11), 0, 0]
  assert batch.prefix_start_BT[0].tolist() == [0] * 5 + [0, 5, 5, 5, 5, 0, 0]
  assert batch.prefix_end_BT[0].tolist() == [0, 1, 1, 1, 1, 0, 6, 6, 6, 6, 0, 0]
  assert not any(np.any(a[1]) for a in batch[:6])


def make_rollouts(shapes: list[tuple[int, int]], width: int = 6) -> Rollouts:
  """Make rollouts of (prompt tokens, response tokens). All tokens differ, but prompts of equal length are the same prompt."""
  count = iter(range(1, 10_000))
  kinds = {p: [next(count) for _ in range(p)] for p, _ in shapes}
  prompts = [kinds[p] for p, _ in shapes]
  tokens = np.zeros((len(shapes), width), np.int32)
  for r, (_, n) in enumerate(shapes):
    tokens[r, :n] = [next(count) for _ in range(n)]
  length = np.array([n for _, n in shapes], np.int32)
  return Rollouts(prompts, tokens, length, np.zeros(tokens.shape, np.float32), np.ones(len(shapes), bool))


SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=12)


@given(SHAPES, st.integers(10, 24), st.integers(1, 3))
def test_every_response_token_is_predicted_once_from_its_own_prefix(shapes, row_length, height):
  rollouts = make_rollouts(shapes)
  batches = layout.policy_batches(rollouts, range(len(shapes)), row_length, height)
  assert all(b.tokens_BT.shape == (height, row_length) for b in batches)
  seen = set()
  for batch in batches:
    for b, t in zip(*np.nonzero(batch.rollout_BT >= 0), strict=True):
      r, a = int(batch.rollout_BT[b, t]), int(batch.target_index_BT[b, t])
      assert batch.target_BT[b, t] == rollouts.tokens_RT[r, a]
      # It attends to exactly the tokens before its target.
      before = batch.tokens_BT[b, batch.prefix_start_BT[b, t] : batch.prefix_end_BT[b, t]].tolist()
      before += batch.tokens_BT[b, batch.start_BT[b, t] : batch.end_BT[b, t]].tolist()
      assert before == [*rollouts.prompts[r], *rollouts.tokens_RT[r, :a].tolist()]
      assert batch.positions_BT[b, t] == len(before) - 1
      seen.add((r, a))
  assert seen == {(r, a) for r, (_, n) in enumerate(shapes) for a in range(n)}


@given(SHAPES)
def test_scatter_and_gather_are_inverse(shapes):
  rollouts = make_rollouts(shapes)
  batches = layout.policy_batches(rollouts, range(len(shapes)), 16, 2)
  values = np.random.default_rng(0).normal(size=rollouts.tokens_RT.shape).astype(np.float32) * layout.response_mask(rollouts)
  out = np.zeros_like(values)
  for batch in batches:
    placed = layout.scatter_values(values, batch)
    assert not placed[batch.rollout_BT < 0].any() and placed.dtype == np.float32
    layout.gather_values(placed, batch, out)
  assert (out == values).all()


def test_policy_batches_of_some_rollouts():
  rollouts = make_rollouts([(2, 3), (1, 1), (3, 6)])
  (batch,) = layout.policy_batches(rollouts, [2, 0], 16, 1)
  assert set(batch.rollout_BT[batch.rollout_BT >= 0].tolist()) == {0, 2}


def test_responses_to_one_prompt_share_it():
  (batch,) = layout.policy_batches(make_rollouts([(5, 3), (5, 4), (5, 2)]), range(3), 16, 1)
  assert (batch.end_BT > batch.start_BT).sum() == 4 + 3 + 4 + 2  # each response repeats the last prompt token
  (batch,) = layout.policy_batches(make_rollouts([(5, 3)]), [0], 16, 1)
  assert not batch.prefix_end_BT.any()


def test_long_and_short_rows_are_dealt_to_micro_batches_alike():
  rollouts = make_rollouts([(6, 6), (7, 6), (9, 6), (8, 6), (10, 6)])  # a row each, the longest first
  batches = layout.policy_batches(rollouts, range(5), 16, 2)
  assert [batch.rollout_BT.max(axis=1).tolist() for batch in batches] == [[4, 1], [2, 0], [3, -1]]


def test_a_rollout_longer_than_a_row_is_refused():
  with pytest.raises(ValueError, match=r'8 tokens.* row length 7'):
    layout.policy_batches(make_rollouts([(4, 5)]), [0], 7, 1)


def test_response_mask():
  assert layout.response_mask(make_rollouts([(1, 2), (1, 6)])).tolist() == [[1, 1, 0, 0, 0, 0], [1] * 6]
