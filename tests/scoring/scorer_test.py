from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, TemplateConfig, TokenizerConfig
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import load_tokenizer
from polar_jax.model.heads import abstract_model
from polar_jax.scoring import scorer as scorer_lib
from polar_jax.scoring.scorer import Scorer
from polar_jax.train import step as step_lib
from polar_jax.train.objectives import RANKING
from polar_jax.types import Group, Triplet, UserError


@pytest.fixture(scope='module')
def make_scorer():
  """Return a function that makes a scorer with random parameters on a number of devices."""
  template = Template(TemplateConfig(), load_tokenizer(TokenizerConfig(kind='byte')))
  sizes = {'num_layers': 2, 'd_model': 16, 'd_ff': 32, 'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 8}
  model = ModelConfig(vocab_size=template.tokenizer.vocab_size, init_std=0.3, v_head_init='normal', **sizes)

  def mesh(devices):
    return sharding.make_mesh(MeshConfig(), jax.devices()[:devices])

  with jax.set_mesh(mesh(1)):
    params = step_lib.build(RANKING, model, optax.identity(), mesh(1)).init(jax.random.key(0), None).params
  abstract = abstract_model(model, 'reward')

  def make(devices=1, **shape):
    shardings = jax.tree.map(lambda a: a.sharding, sharding.abstract_params(abstract, mesh(devices)))
    return Scorer(jax.device_put(params, shardings), model, template, mesh(devices), **shape)

  return make


def _word(rng):
  return 'abcdefgh'[: rng.integers(0, 9)] * int(rng.integers(1, 4))


@pytest.fixture(scope='module')
def groups():
  """Groups of 0 to 7 candidates."""
  rng = np.random.default_rng(0)
  return [Group(_word(rng), _word(rng), [_word(rng) for _ in range(k)]) for k in (3, 1, 0, 7, 2, 2, 5, 1)]


@pytest.fixture(scope='module')
def alone(make_scorer, groups):
  """Return the reward of every candidate of the groups, each scored in a call of its own."""
  scorer = make_scorer(rows=1, row_length=256, candidates=1)
  return [[float(scorer.score([Group(g.prompt, g.reference, [c])])[0][0]) for c in g.candidates] for g in groups]


@pytest.mark.long
@pytest.mark.parametrize(
  ('devices', 'shape'),
  [
    (1, {}),
    (1, {'rows': 2, 'row_length': 128}),  # several batches
    (1, {'rows': 1, 'row_length': 96, 'candidates': 3}),  # groups divided over several rows
    (8, {'rows': 3, 'row_length': 256}),
    (1, {'rows': 2, 'row_length': 32, 'grow': True}),  # candidates of up to 90 tokens
  ],
)
def test_each_candidate_gets_the_reward_it_gets_alone(make_scorer, groups, alone, devices, shape):
  rewards = make_scorer(devices, **shape).score(groups)
  assert [len(r) for r in rewards] == [3, 1, 0, 7, 2, 2, 5, 1]
  for got, expected in zip(rewards, alone, strict=True):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)
  assert len(np.unique(np.concatenate(rewards).round(4))) > 15  # distinct, so that swapped rewards would be noticed


def test_calls_of_any_size_share_one_compilation(make_scorer, groups):
  scorer_lib._jit_group_rewards.cache_clear()
  scorer = make_scorer(rows=2, row_length=128)
  for some in (groups, groups[:1], groups[3:5]):
    scorer.score(some)
  assert scorer._forward._cache_size() == 1


def test_models_of_one_shape_share_their_programs(make_scorer, groups):
  one, other = make_scorer(rows=2, row_length=128), make_scorer(rows=2, row_length=128)
  other.params = jax.tree.map(lambda x: 2 * x, one.params)
  assert one._forward is other._forward
  first, second = (np.concatenate(scorer.score(groups)) for scorer in (one, other))
  assert np.abs(first - second).max() > 1e-3
  np.testing.assert_array_equal(np.concatenate(one.score(groups)), first)


def test_pairs_are_groups_of_two(make_scorer):
  rng = np.random.default_rng(1)
  triplets = [Triplet(*(_word(rng) for _ in range(4))) for _ in range(9)]
  scorer = make_scorer()
  rewards = scorer.score_pairs(triplets)
  assert rewards.shape == (9, 2)
  swapped = scorer.score_pairs([Triplet(t.prompt, t.reference, t.rejected, t.chosen) for t in triplets])
  np.testing.assert_allclose(rewards, swapped[:, ::-1], atol=1e-5)
  assert np.abs(rewards[:, 0] - rewards[:, 1]).max() > 1e-3


def test_nothing_to_score(make_scorer):
  assert make_scorer().score([]) == []
  assert make_scorer().score_pairs([]).shape == (0, 2)
  assert make_scorer().score([Group('p', 'r', [])])[0].shape == (0,)


def test_a_candidate_longer_than_a_row_is_named(make_scorer, groups):
  with pytest.raises(UserError, match=r'group 1: candidate 2 has \d+ tokens.*64'):
    make_scorer(row_length=64).score([groups[0], Group('p', 'r', ['a', 'b', 'c' * 80])])


def test_bad_groups_are_named(make_scorer):
  with pytest.raises(UserError, match=r'group 0: .*wrapper'):
    make_scorer().score([Group('p', 'r', ['a'], wrapper='other')])


@pytest.mark.long
def test_ladder_gives_the_same_rewards_in_few_shapes(make_scorer, groups):
  fixed = make_scorer(row_length=128)
  scorer_lib._jit_group_rewards.cache_clear()
  ladder = make_scorer(ladder=True)
  for few in (groups[:1], groups[:2], groups):
    for a, b in zip(fixed.score(few), ladder.score(few), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
  assert ladder._forward._cache_size() <= 3  # one, two and more rows of one length


@pytest.mark.long
@pytest.mark.parametrize('shape', [{}, {'rows': 2, 'row_length': 128, 'candidates': 3}, {'ladder': True}])
def test_equal_sequences_tie_wherever_they_are(make_scorer, shape):
  """The last bits of a reward depend on its place in a batch, which must not decide between equal candidates."""
  rng = np.random.default_rng(3)
  words = [_word(rng) for _ in range(60)]
  triplets = [Triplet(f'p{i % 7}', 'r', word, word) for i, word in enumerate(words)]
  rewards_NC = make_scorer(**shape).score_pairs(triplets)
  np.testing.assert_array_equal(rewards_NC[:, 0], rewards_NC[:, 1])
  groups = [
    Group('p', 'r', ['one', 'two', 'one']),
    *(Group(f'q{i}', 'r', [word]) for i, word in enumerate(words)),
    Group('p', 'r', ['two']),
  ]
  first, *_, last = make_scorer(**shape).score(groups, alone=True)
  assert first[0] == first[2] and first[1] == last[0] != first[0]


def test_a_repeated_candidate_does_not_change_the_number_of_the_one_at_fault(make_scorer):
  with pytest.raises(UserError, match='group 0: candidate 3 has'):
    make_scorer(row_length=64).score([Group('p', 'r', ['a', 'a', 'a', 'c' * 80])])
