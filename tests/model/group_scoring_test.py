"""Candidates that share their prefix have the rewards and gradients of sequences read separately."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polar_jax.config import ModelConfig
from polar_jax.data.layout import group_batch, group_segments
from polar_jax.model.reward_model import RewardModel, group_rewards
from polar_jax.types import GroupBatch

CONFIG = ModelConfig(
  vocab_size=23, num_layers=3, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.3, v_head_init='normal'
)
REWARD = 22
LENGTH = 48


def _draw(rng, n):
  return rng.integers(2, REWARD, n).tolist()


def _groups():
  rng = np.random.default_rng(0)
  prefix = [1, *_draw(rng, 9)]
  ordinary = [[*prefix, *_draw(rng, n), REWARD] for n in (4, 0, 7, 1)]
  return [ordinary, [[*prefix, 3, REWARD]] * 2, [[1, *_draw(rng, 6), REWARD]], [[4, REWARD], [5, *_draw(rng, 3), REWARD], [REWARD]]]


def _packed(rows):
  """Return a batch of the groups, and the number of candidates; `rows` lists the groups of each row."""
  segments, total = [], 0
  for sequences in _groups():
    (segment,) = group_segments(sequences, LENGTH, 8)
    segments.append(segment._replace(members=[total + c for c in segment.members]))
    total += len(sequences)
  return group_batch(segments, rows, LENGTH, 8), total


def _separate() -> GroupBatch:
  """Return a batch with each sequence in a causal row of its own."""
  sequences = [s for group in _groups() for s in group]
  shape = (len(sequences), LENGTH)
  tokens, positions, end = np.zeros((3, *shape), np.int32)
  for b, s in enumerate(sequences):
    tokens[b, : len(s)], positions[b, : len(s)], end[b, : len(s)] = s, range(len(s)), np.arange(len(s)) + 1
  nothing = np.zeros(shape, np.int32)
  last, index = np.array([[len(s) - 1] for s in sequences], np.int32), np.arange(len(sequences), dtype=np.int32)[:, None]
  return GroupBatch(tokens, positions, nothing, end, nothing, nothing, last, index)


@pytest.fixture(scope='module')
def score():
  """Return a function that computes rewards in the order of candidates, and the gradient of their weighted sum."""
  graphdef, params = nnx.split(RewardModel(CONFIG, rngs=nnx.Rngs(7)))

  def run(batch, total):
    def weighted(params):
      rewards_BQ = group_rewards(nnx.merge(graphdef, params), batch)
      index = jnp.where(batch.index_BQ >= 0, batch.index_BQ, total).reshape(-1)
      rewards = jnp.zeros(total + 1).at[index].set(rewards_BQ.reshape(-1))[:total]
      return rewards @ jnp.linspace(0.5, 1.5, total), rewards

    (_, rewards), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))(nnx.to_pure_dict(params))
    return np.asarray(rewards), gradients

  return run


@pytest.mark.long
@pytest.mark.parametrize('rows', [[[0], [1], [2], [3]], [[2, 0], [3, 1]], [[3, 2, 1], [0], []]], ids=['alone', 'packed', 'with padding'])
def test_shared_prefixes_change_nothing(score, rows):
  batch, total = _packed(rows)
  rewards, gradients = score(batch, total)
  expected, expected_gradients = score(_separate(), total)
  assert np.abs(expected).max() > 0.1 and len(np.unique(expected.round(4))) > total / 2
  np.testing.assert_allclose(rewards, expected, atol=3e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max())), gradients, expected_gradients)


def test_no_candidate_sees_another(score):
  """Changing tokens of one candidate changes no bit of any other reward."""
  batch, total = _packed([[2, 0], [3, 1]])
  rewards, _ = score(batch, total)
  tokens = batch.tokens_BT.copy()
  changed = batch.index_BQ[0].tolist().index(2)  # the candidate with a tail of eight tokens
  last = batch.reward_index_BQ[0, changed]
  tokens[0, batch.start_BT[0, last] : last] += 1
  other, _ = score(batch._replace(tokens_BT=tokens), total)
  assert np.flatnonzero(other != rewards).tolist() == [2]
