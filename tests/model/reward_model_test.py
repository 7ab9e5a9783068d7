from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polar_jax.config import ModelConfig
from polar_jax.data.layout import pair_batch, pair_segment
from polar_jax.data.packing import first_fit
from polar_jax.model.reward_model import RewardModel, pair_rewards
from polar_jax.train.losses import pair_sums
from polar_jax.types import PairBatch

CONFIG = ModelConfig(
  vocab_size=23, num_layers=3, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.3, v_head_init='normal'
)
REWARD = 22
_RNG = np.random.default_rng(0)


def _draw(n):
  return _RNG.integers(2, REWARD, n).tolist()


_P, _A, _B = [1, *_draw(6)], _draw(5), _draw(3)
PAIRS = {
  'ordinary': ([*_P, 3, *_A, REWARD], [*_P, 4, *_B, REWARD]),
  'short and long': ([*_P, 3, REWARD], [*_P, 4, *_draw(9), REWARD]),
  'identical answers': ([*_P, *_A, REWARD], [*_P, *_A, REWARD]),
  'empty chosen': ([*_P, REWARD], [*_P, *_A, REWARD]),
  'empty rejected': ([*_P, *_A, REWARD], [*_P, REWARD]),
  'rejected continues chosen': ([*_P, *_B, REWARD], [*_P, *_B, *_A, REWARD]),
  'nothing shared but BOS': ([1, 5, *_draw(4), REWARD], [1, 6, *_draw(7), REWARD]),
  'nothing shared': ([3, *_draw(4), REWARD], [4, *_draw(2), REWARD]),
}
NAMES = list(PAIRS)
CASES = [PAIRS[name] for name in NAMES]
LENGTH = 24


@pytest.fixture(scope='module')
def model():
  return nnx.split(RewardModel(CONFIG, rngs=nnx.Rngs(7)))


def _plain_rows(sequences, length=LENGTH) -> PairBatch:
  """Return a batch with each sequence in a causal row of its own, padded on the right: (B, 1, 1) rewards."""
  tokens, positions, start, end = np.zeros((4, len(sequences), length), np.int32)
  for b, sequence in enumerate(sequences):
    n = len(sequence)
    tokens[b, :n], positions[b, :n], end[b, :n] = sequence, range(n), np.arange(n) + 1
  last = np.array([len(s) - 1 for s in sequences], np.int32)[:, None, None]
  ones = np.ones((len(sequences), 1))
  return PairBatch(tokens, positions, start, end, last, ones.astype(np.float32), ones.astype(np.int32))


def _loss(model, batch, weights, order=None):
  """Compute a sum of the losses of pairs with different weights, so that gradients cannot cancel. `order`: place of each pair if packed."""
  graphdef, params = model

  def loss(params):
    rewards = pair_rewards(nnx.merge(graphdef, params), batch)
    pairs = rewards.reshape(-1, 2)  # the two candidates of a shared row, or two consecutive plain rows
    pairs = pairs if order is None else pairs[order]
    return jnp.sum(jax.nn.softplus(pairs[:, 1] - pairs[:, 0]) * weights[: len(pairs)]), pairs

  (value, pairs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(nnx.to_pure_dict(params))
  return value, pairs, gradients


def _packed(cases, packed, length):
  return pair_batch([pair_segment(*case) for case in cases], range(len(cases)), packed, length, max(map(len, packed)))


def _shared_rows(cases, length=LENGTH):
  return _packed(cases, [[i] for i in range(len(cases))], length)


def _assert_same(one, other, atol=3e-6):
  np.testing.assert_allclose(one[0], other[0], atol=atol)
  np.testing.assert_allclose(one[1], other[1], atol=atol)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max())), one[2], other[2])


@pytest.mark.long
@pytest.mark.parametrize('flip', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['chosen first', 'rejected first'])
def test_a_shared_prefix_row_equals_two_separate_rows(model, flip):
  cases = [case[::-1] if flip else case for case in CASES]
  weights = np.linspace(0.5, 1.5, len(cases)).astype(np.float32)
  shared = _loss(model, _shared_rows(cases), weights)
  separate = _loss(model, _plain_rows([s for case in cases for s in case]), weights)
  assert np.abs(separate[1]).max() > 0.1
  _assert_same(shared, separate)
  identical = NAMES.index('identical answers')
  assert shared[1][identical, 0] == shared[1][identical, 1]


@pytest.mark.long
@pytest.mark.parametrize(
  'name', ['ordinary', *(pytest.param(n, marks=pytest.mark.slow) for n in ('empty chosen', 'nothing shared but BOS'))]
)
def test_gradients_of_one_pair_alone(model, name):
  """Pairs are compared one by one, so that errors cannot cancel between them."""
  weights = np.ones(1, np.float32)
  _assert_same(_loss(model, _shared_rows([PAIRS[name]]), weights), _loss(model, _plain_rows(PAIRS[name]), weights))


@pytest.mark.long
def test_padding_changes_nothing(model):
  weights = np.ones(len(CASES), np.float32)
  plain = _loss(model, _shared_rows(CASES), weights)
  longer = _loss(model, _shared_rows(CASES, LENGTH + 16), weights)
  _assert_same(plain, longer)
  batch = _packed(CASES, [*([i] for i in range(len(CASES))), [], []], LENGTH)
  graphdef, params = model

  def loss(params, batch):
    return pair_sums(pair_rewards(nnx.merge(graphdef, params), batch), batch.pair_mask_BP)

  padded = jax.jit(jax.value_and_grad(loss, has_aux=True))(nnx.to_pure_dict(params), batch)
  np.testing.assert_allclose(padded[0][0], plain[0], atol=3e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max())), padded[1], plain[2])


ROWS, PACKED_LENGTH = 6, 64


def _random_cases(seed):
  """Return the cases above and random ones, in random order, packed into rows of 64 tokens."""
  rng = np.random.default_rng(seed)
  draw = lambda least: rng.integers(2, REWARD, rng.integers(least, 8)).tolist()
  cases = [*CASES, *(tuple([*prefix, *draw(0), REWARD] for _ in range(2)) for prefix in (draw(1) for _ in range(8)))]
  cases = [cases[i] for i in rng.permutation(len(cases))]
  packed = first_fit([len(pair_segment(*case).tokens) for case in cases], PACKED_LENGTH, 8)
  return cases, [*packed, *[[]] * (ROWS - len(packed))]


def _wide(cases, packed):
  """Return a packed batch of one shape for all tests, so that it compiles once."""
  return pair_batch([pair_segment(*case) for case in cases], range(len(cases)), packed, PACKED_LENGTH, 8)


@pytest.mark.long
@pytest.mark.parametrize('seed', [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_packed_rows_equal_rows_of_one_triplet(model, seed):
  cases, packed = _random_cases(seed)
  batch = _wide(cases, packed)
  assert batch.pair_mask_BP.sum(axis=1).max() > 2 and (batch.pair_mask_BP == 0).any()
  order = [batch.index_BP.reshape(-1).tolist().index(i) for i in range(len(cases))]
  weights = np.linspace(0.5, 1.5, len(cases)).astype(np.float32)
  _assert_same(_loss(model, batch, weights, np.array(order)), _loss(model, _shared_rows(cases), weights))


def test_no_triplet_sees_another_of_its_row(model):
  """Changing tokens of one triplet changes no bit of other rewards, but would if an interval were one token too long."""
  graphdef, params = model
  cases, packed = _random_cases(3)
  batch = _wide(cases, packed)
  score = jax.jit(lambda batch: pair_rewards(nnx.merge(graphdef, params), batch))
  real = batch.end_BT > batch.start_BT
  too_long = batch._replace(end_BT=np.where(real, np.minimum(batch.end_BT + 1, PACKED_LENGTH), batch.end_BT))
  too_early = batch._replace(start_BT=np.where(real, np.maximum(batch.start_BT - 1, 0), batch.start_BT))
  before = {name: score(made) for name, made in {'right': batch, 'long': too_long, 'early': too_early}.items()}
  leaks = dict.fromkeys(before, 0)
  for b, members in enumerate(packed):
    low = 0
    for p, member in enumerate(members):
      high = low + len(pair_segment(*cases[member]).tokens)
      tokens = batch.tokens_BT.copy()
      tokens[b, low:high] = (tokens[b, low:high] + 7) % REWARD
      low = high
      for name, made in {'right': batch, 'long': too_long, 'early': too_early}.items():
        changed = np.asarray(score(made._replace(tokens_BT=tokens)) != before[name]).any(axis=-1) & (batch.pair_mask_BP > 0)
        assert changed[b, p]
        changed[b, p] = False
        leaks[name] += int(changed.sum())
  assert leaks['right'] == 0
  assert leaks['long'] > 3 and leaks['early'] > 3


def test_tokens_of_padding_do_not_matter(model):
  graphdef, params = model
  batch = _shared_rows(CASES)
  score = jax.jit(lambda batch: pair_rewards(nnx.merge(graphdef, params), batch))
  rubbish = np.where(batch.end_BT == batch.start_BT, 9, batch.tokens_BT).astype(np.int32)
  assert (rubbish != batch.tokens_BT).any()
  np.testing.assert_array_equal(score(batch._replace(tokens_BT=rubbish)), score(batch))


def test_a_zero_head_starts_at_ln_2_and_leaves_the_backbone_alone():
  model = RewardModel(dataclasses.replace(CONFIG, v_head_init='zero'), rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(model)
  batch = _shared_rows(CASES)

  def loss(params):
    total, sums = pair_sums(pair_rewards(nnx.merge(graphdef, params), batch), batch.pair_mask_BP)
    return total / len(CASES), sums

  (value, sums), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(nnx.to_pure_dict(params))
  assert value == np.float32(math.log(2))
  assert sums['accuracy'] == len(CASES) / 2  # all ties
  jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradients['decoder'])
  assert np.abs(gradients['v_head']).max() > 1e-3


@pytest.mark.long
def test_rewards_are_float32_and_read_before_nothing_else(model):
  """A reward is v_head applied to the decoder's normed hidden state at the reward token."""
  graphdef, params = model
  merged = nnx.merge(graphdef, params)
  batch = _shared_rows(CASES)
  hidden = np.asarray(merged.decoder(batch.tokens_BT, batch.positions_BT, [(batch.start_BT, batch.end_BT)]), np.float64)
  rewards = pair_rewards(merged, batch)
  assert (rewards.shape, rewards.dtype) == ((len(CASES), 1, 2), jnp.float32)
  for b, index in enumerate(batch.reward_index_BPC[:, 0]):
    np.testing.assert_allclose(rewards[b, 0], hidden[b, index] @ np.asarray(merged.v_head[...], np.float64), atol=3e-6)
