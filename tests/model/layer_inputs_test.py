"""Windows as intervals, and what else differs between layers."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from polar_jax.config import ModelConfig
from polar_jax.data import layout, packing
from polar_jax.model import layer_inputs
from polar_jax.model.layer_inputs import LayerInputs, LayerKind, layer_kinds, narrow
from polar_jax.model.reward_model import RewardModel, group_rewards, pair_rewards, sequence_rewards

# Local and global layers in turn, with rotary embeddings of their own, and one layer without; the last layer is local.
CONFIG = ModelConfig(
  vocab_size=23,
  num_layers=3,
  d_model=16,
  d_ff=24,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  init_std=0.4,
  v_head_init='normal',
  sliding_window=5,
  global_every=2,
  rope_local_theta=50.0,
  attention='reference',
)
REWARD, ROW = 22, 64


def _sequences(seed: int, prefix: int, tails: list[int]) -> list[list[int]]:
  rng = np.random.default_rng(seed)
  shared = rng.integers(2, REWARD, prefix).tolist()
  # The first tokens of tails differ, so that nothing else is shared.
  return [[*shared, i, *rng.integers(2, REWARD, n).tolist(), REWARD] if n >= 0 else [*shared, REWARD] for i, n in enumerate(tails)]


# (shared prefix, tails): -1 is a tail of the reward token alone.
LENGTHS = [(9, [12, 2]), (0, [7, 11]), (1, [6, 0]), (8, [-1, 9]), (10, [3, -1]), (2, [3, 3])]
PAIRS = [_sequences(i, *lengths) for i, lengths in enumerate(LENGTHS)]
GROUP = _sequences(9, 11, [2, 8, 0, 5])


def _pairs() -> layout.PairBatch:
  segments = [layout.pair_segment(*pair) for pair in PAIRS]
  packed = packing.first_fit([len(s.tokens) for s in segments], ROW, 4)
  return layout.pair_batch(segments, range(len(PAIRS)), packed, ROW, 4)


def _group() -> layout.GroupBatch:
  segments = [*layout.group_segments(PAIRS[0], ROW, 8), *layout.group_segments(GROUP, ROW, 8)]
  segments[1] = segments[1]._replace(members=[2, 3, 4, 5])
  return layout.group_batch(segments, [[0, 1]], ROW, 8)


@pytest.mark.parametrize('window', [1, 2, 5, 13, 40])
@pytest.mark.parametrize('batch', [_pairs(), _group(), layout.sequence_batch(GROUP, ROW, 4)], ids=['pairs', 'group', 'sequences'])
def test_narrow_keeps_the_keys_of_the_window(batch, window):
  """Key by key: those of the intervals whose positions are at most `window` - 1 before that of the query."""
  seen, expected = (np.zeros((*batch.tokens_BT.shape, ROW), int) for _ in range(2))
  for interval in batch.intervals:
    narrowed = [tuple(map(np.asarray, part)) for part in narrow(interval, batch.positions_BT, window)]
    for b, t in np.ndindex(batch.tokens_BT.shape):
      for s in range(interval[0][b, t], interval[1][b, t]):
        expected[b, t, s] += batch.positions_BT[b, t] - batch.positions_BT[b, s] < window
      for start, end in narrowed:
        seen[b, t, start[b, t] : max(end[b, t], start[b, t])] += 1
  assert expected.max() == 1  # intervals are disjoint
  np.testing.assert_array_equal(seen, expected)


@pytest.mark.long
def test_packed_and_shared_equal_alone_with_a_window():
  """The window counts positions, not tokens of the row."""
  graphdef, params = nnx.split(RewardModel(CONFIG, rngs=nnx.Rngs(3)))
  run = lambda function, batch: np.asarray(jax.jit(lambda p: function(nnx.merge(graphdef, p), batch))(params))
  sequences = [s for pair in PAIRS for s in pair] + GROUP
  alone = run(sequence_rewards, layout.sequence_batch(sequences, 32, len(sequences)))
  assert np.ptp(alone) > 1
  pairs = _pairs()
  real = pairs.pair_mask_BP > 0
  got = run(pair_rewards, pairs)[real][np.argsort(pairs.index_BP[real])]
  np.testing.assert_allclose(got.reshape(-1), alone[: 2 * len(PAIRS)], atol=1e-5)
  np.testing.assert_allclose(run(group_rewards, _group())[0, :6], alone[[0, 1, -4, -3, -2, -1]], atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize('attention', ['reference', 'chunked'])
def test_gradients_of_packed_pairs_with_a_window_are_those_of_each_sequence_alone(attention):
  graphdef, params = nnx.split(RewardModel(CONFIG, rngs=nnx.Rngs(3)))
  weights = np.random.default_rng(0).normal(size=2 * len(PAIRS))
  sequences = [s for pair in PAIRS for s in pair]

  def alone(params):
    rewards = sequence_rewards(nnx.merge(graphdef, params), layout.sequence_batch(sequences, 32, len(sequences)))
    return (rewards * weights).sum()

  packed, pairs = nnx.split(RewardModel(dataclasses.replace(CONFIG, attention=attention), rngs=nnx.Rngs(3)))[0], _pairs()
  weights_BPC = np.where(pairs.pair_mask_BP[..., None] > 0, weights.reshape(-1, 2)[pairs.index_BP], 0)
  together = lambda params: (pair_rewards(nnx.merge(packed, params), pairs) * weights_BPC).sum()
  expected, found = (jax.device_get(jax.jit(jax.grad(loss))(params)) for loss in (alone, together))
  assert max(np.abs(g).max() for g in jax.tree.leaves(expected)) > 0.1
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_kinds_of_layers():
  kinds = lambda **fields: layer_kinds(ModelConfig(num_layers=7, **fields))
  assert set(kinds()) == {LayerKind(False, True)}
  assert [k.has_window for k in kinds(sliding_window=3)] == [True] * 7
  assert [k.has_window for k in kinds(sliding_window=3, global_every=3)] == [True, True, False, True, True, False, True]
  assert [k.has_rope for k in kinds(nope_every=4)] == [True, True, True, False, True, True, True]


def test_layers_without_rotary_embeddings_have_tables_that_change_nothing():
  config = ModelConfig(num_layers=4, head_dim=4, nope_every=4, rope_theta=9.0)
  positions = np.array([[0, 3, 7]])
  inputs = LayerInputs(positions, (), config)
  last = inputs.of(inputs.kind_L[3])
  assert (last.cos_BTh == 1).all() and (last.sin_BTh == 0).all()
  np.testing.assert_allclose(inputs.of(inputs.kind_L[0]).cos_BTh[0], np.cos(np.outer([0, 3, 7], [1, 1 / 3])), atol=1e-6)
  for layer in (0, 3):  # the scan selects the same
    selected = jax.jit(lambda kind: LayerInputs(positions, (), config).of(kind))(inputs.kind_L[layer])
    np.testing.assert_array_equal(selected.cos_BTh, inputs.of(inputs.kind_L[layer]).cos_BTh)


def test_layers_with_a_window_have_their_own_rotary_embeddings():
  config = ModelConfig(
    num_layers=2, head_dim=4, sliding_window=8, global_every=2, rope_theta=9.0, rope_local_theta=4.0, rope_scaling='linear', rope_factor=2.0
  )
  inputs = LayerInputs(np.array([[0, 3, 7]]), (), config)
  np.testing.assert_allclose(inputs.of(inputs.kind_L[0]).sin_BTh[0], np.sin(np.outer([0, 3, 7], [1, 1 / 2])), atol=1e-6)
  np.testing.assert_allclose(inputs.of(inputs.kind_L[1]).sin_BTh[0], np.sin(np.outer([0, 3, 7], [1 / 2, 1 / 6])), atol=1e-6)


def test_a_row_no_longer_than_the_window_keeps_its_intervals():
  batch = layout.sequence_batch(GROUP, ROW, 4)
  inputs = LayerInputs(batch.positions_BT, batch.intervals, dataclasses.replace(CONFIG, sliding_window=ROW))
  assert all(len(inputs.of(kind).intervals) == 1 for kind in inputs.kind_L)
  inputs = LayerInputs(batch.positions_BT, batch.intervals, dataclasses.replace(CONFIG, sliding_window=ROW - 1))
  assert all(len(inputs.of(kind).intervals) == 2 for kind in inputs.kind_L)
  assert layer_inputs._NO_WINDOW > 2**20
