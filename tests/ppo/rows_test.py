"""Packing of rollouts: every answer token once, at the token that predicts it."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from polar_jax.ppo import rows
from polar_jax.types import Rollouts


def make(shapes: list[tuple[int, int]], width: int = 6) -> Rollouts:
  """Rollouts of (prompt tokens, answer tokens) whose tokens are all different; prompts of one length are the same prompt."""
  count = iter(range(1, 10_000))
  kinds = {p: [next(count) for _ in range(p)] for p, _ in shapes}
  prompts = [kinds[p] for p, _ in shapes]
  tokens = np.zeros((len(shapes), width), np.int32)
  for r, (_, n) in enumerate(shapes):
    tokens[r, :n] = [next(count) for _ in range(n)]
  length = np.array([n for _, n in shapes], np.int32)
  return Rollouts(prompts, tokens, length, np.zeros(tokens.shape, np.float32), np.ones(len(shapes), bool))


SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=12)


@hypothesis.given(SHAPES, st.integers(10, 24), st.integers(1, 3))
def test_every_answer_token_is_predicted_once_from_its_own_prefix(shapes, row_length, height):
  rollouts = make(shapes)
  batches = rows.pack(rollouts, range(len(shapes)), row_length, height)
  assert all(b.tokens_BT.shape == (height, row_length) for b in batches)
  seen = set()
  for batch in batches:
    for b, t in zip(*np.nonzero(batch.rollout_BT >= 0), strict=True):
      r, a = int(batch.rollout_BT[b, t]), int(batch.answer_BT[b, t])
      assert batch.target_BT[b, t] == rollouts.tokens_RT[r, a]
      # What it attends to is exactly what came before it.
      before = batch.tokens_BT[b, batch.prefix_start_BT[b, t] : batch.prefix_end_BT[b, t]].tolist()
      before += batch.tokens_BT[b, batch.start_BT[b, t] : batch.end_BT[b, t]].tolist()
      assert before == [*rollouts.prompts[r], *rollouts.tokens_RT[r, :a].tolist()]
      assert batch.positions_BT[b, t] == len(before) - 1
      seen.add((r, a))
  assert seen == {(r, a) for r, (_, n) in enumerate(shapes) for a in range(n)}


@hypothesis.given(SHAPES)
def test_place_and_collect_are_inverse(shapes):
  rollouts = make(shapes)
  batches = rows.pack(rollouts, range(len(shapes)), 16, 2)
  values = np.random.default_rng(0).normal(size=rollouts.tokens_RT.shape).astype(np.float32) * rows.token_mask(rollouts)
  out = np.zeros_like(values)
  for batch in batches:
    placed = rows.place(values, batch)
    assert not placed[batch.rollout_BT < 0].any() and placed.dtype == np.float32
    rows.collect(placed, batch, out)
  assert (out == values).all()


def test_a_part_of_the_rollouts():
  rollouts = make([(2, 3), (1, 1), (3, 6)])
  (batch,) = rows.pack(rollouts, [2, 0], 16, 1)
  assert set(batch.rollout_BT[batch.rollout_BT >= 0].tolist()) == {0, 2}


def test_answers_to_one_prompt_share_it():
  (batch,) = rows.pack(make([(5, 3), (5, 4), (5, 2)]), range(3), 16, 1)
  assert (batch.end_BT > batch.start_BT).sum() == 4 + 3 + 4 + 2  # the prompt once but for its last token, which each answer has
  (batch,) = rows.pack(make([(5, 3)]), [0], 16, 1)
  assert not batch.prefix_end_BT.any()


def test_too_long_for_a_row():
  with pytest.raises(ValueError, match=r'8 tokens.* row length 7'):
    rows.pack(make([(4, 5)]), [0], 7, 1)


def test_mask():
  assert rows.token_mask(make([(1, 2), (1, 6)])).tolist() == [[1, 1, 0, 0, 0, 0], [1] * 6]
