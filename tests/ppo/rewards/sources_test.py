from __future__ import annotations

import copy

import jax
import numpy as np
import pytest
from flax import nnx

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, RewardConfig, TemplateConfig, TokenizerConfig
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import load_tokenizer
from polar_jax.model.reward_model import RewardModel
from polar_jax.ppo.rewards.shaping import Normalizer, shape
from polar_jax.ppo.rewards.sources import ModelReward, RewardError, RewardSum, RuleReward
from polar_jax.scoring.scorer import Scorer
from polar_jax.types import Group, Prompt, UserError

_SIZES = {'num_layers': 1, 'd_model': 16, 'd_ff': 32, 'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 8}
MODEL = ModelConfig(vocab_size=261, init_std=0.3, v_head_init='normal', attention='reference', **_SIZES)


def byte_template(**settings):
  return Template(TemplateConfig(**settings), load_tokenizer(TokenizerConfig(kind='byte')))


@pytest.fixture(scope='module')
def scorer():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(RewardModel(MODEL, rngs=nnx.Rngs(params=0)), nnx.Param)))()
  return Scorer(params, MODEL, byte_template(), mesh, row_length=256, rows=2, candidates=8)


@pytest.fixture(scope='module')
def rollouts():
  """Prompts and responses in random order: several per prompt, one prompt with two references, equal responses, an empty one."""
  rng = np.random.default_rng(0)
  rows = [
    Prompt('add', 'one', '1'),
    Prompt('add', 'two'),
    Prompt([{'role': 'user', 'content': 'a'}, {'role': 'user', 'content': 'b'}], 'ref'),
    Prompt('a\nb', [{'role': 'assistant', 'content': 'ref'}], category='the same texts'),
    Prompt('other', 'ref'),
  ]
  prompts = [rows[i] for i in rng.integers(0, 5, 30)]
  words = ['', 'same', 'naïve', *('abcdefgh'[: rng.integers(1, 9)] * int(rng.integers(1, 5)) for _ in range(12))]
  return prompts, [words[i] for i in rng.integers(0, len(words), 30)]


def test_model_reward_equals_that_of_each_response_alone(scorer, rollouts):
  prompts, responses = rollouts
  source = ModelReward(scorer, RewardConfig())
  rewards = source.score(prompts, responses)
  assert rewards.dtype == np.float32 and rewards.shape == (30,)
  alone = [scorer.score([Group(p.prompt, p.reference, [o])])[0][0] for p, o in zip(prompts, responses, strict=True)]
  np.testing.assert_allclose(rewards, alone, atol=1e-5)
  assert len(np.unique(np.array(alone).round(4))) > 15  # so that a wrong order would be noticed
  assert scorer._forward._cache_size() == 1


def test_model_reward_of_equal_texts_is_computed_once(scorer, rollouts, monkeypatch):
  prompts, responses = rollouts
  seen = []
  monkeypatch.setattr(scorer, 'score', lambda groups, alone: seen.extend(groups) or Scorer.score(scorer, groups, alone))
  rewards = ModelReward(scorer, RewardConfig()).score(prompts, responses)
  assert sorted((g.prompt, g.reference) for g in seen) == [('a\nb', 'ref'), ('add', 'one'), ('add', 'two'), ('other', 'ref')]
  assert all(len(set(g.candidates)) == len(g.candidates) for g in seen)
  keys = [
    (p.category == 'the same texts' or isinstance(p.prompt, list) or p.prompt, str(p.reference)[-5:] == 'two', o)
    for p, o in zip(prompts, responses, strict=True)
  ]
  for i, key in enumerate(keys):
    assert rewards[i] == rewards[keys.index(key)]


def test_model_reward_cuts_the_prompt_for_each_response_alone(scorer):
  tight = copy.copy(scorer)
  tight._template = byte_template(max_length=64)
  prompts, responses = [Prompt('a prompt that is too long for it', 'ref')] * 3, ['x', 'y' * 20, 'z' * 30]
  rewards = ModelReward(tight, RewardConfig()).score(prompts, responses)
  alone = [tight.score([Group(p.prompt, p.reference, [o])])[0][0] for p, o in zip(prompts, responses, strict=True)]
  np.testing.assert_allclose(rewards, alone, atol=1e-5)
  together = tight.score([Group(prompts[0].prompt, 'ref', responses)])[0]
  assert abs(together[0] - alone[0]) > 1e-3  # training cuts them together


def test_model_reward_uses_the_wrapper_of_the_config(scorer):
  prompt = Prompt('p', 'r')
  got = [ModelReward(scorer, RewardConfig(wrapper=wrapper)).score([prompt], ['c'])[0] for wrapper in ('sft', 'pretrain')]
  expected = [scorer.score([Group('p', 'r', ['c'], wrapper)])[0][0] for wrapper in ('sft', 'pretrain')]
  np.testing.assert_array_equal(got, expected)
  assert got[0] != got[1]


def test_nothing_to_score(scorer):
  for source in (ModelReward(scorer, RewardConfig()), RuleReward('last_number')):
    assert source.score([], []).dtype == np.float32
    assert source.score([], []).shape == (0,)


def test_prompts_and_responses_must_have_equal_lengths(scorer):
  for source in (ModelReward(scorer, RewardConfig()), RuleReward('last_number')):
    with pytest.raises(ValueError, match='zip'):
      source.score([Prompt('p', '1')] * 2, ['a'])


def test_rule_compares_with_the_answer_or_else_the_reference():
  prompts = [Prompt('p', 'steps 1 2 3', '7'), Prompt('p', 'so it is 3.'), Prompt('p', [{'content': '#### 3'}])]
  rewards = RuleReward('last_number').score(prompts, ['= 7.0', 'three', '3'])
  assert rewards.dtype == np.float32
  assert rewards.tolist() == [1, 0, 1]
  with pytest.raises(
    RewardError, match=r"prompt 1 'how many\\n\?': its answer has no number .*; remove this example, or do not set rft.reward.rule"
  ):
    RuleReward('last_number').score([Prompt('p', '1'), Prompt('how many\n?', 'no')], ['1', '1'])


class Fixed:
  """A source that returns fixed rewards."""

  def __init__(self, rewards):
    self.rewards, self.responses = np.array(rewards, np.float32), None

  def score(self, prompts, responses):
    self.responses = list(responses)
    return self.rewards


def test_sum_weights_its_sources():
  model, rule = Fixed([-0.57, 2.75, 1e-3]), Fixed([1, 0, 1])
  reward = RewardSum({'model': (0.5, model), 'rule': (2.0, rule)}, strip_thinking=False)
  components = reward.components([Prompt('p', 'r')] * 3, ['a', 'b', '<think>x</think>c'])
  assert set(components) == {'model', 'rule'}
  np.testing.assert_array_equal(components['model'], model.rewards)
  total = reward.total(components)
  assert total.dtype == np.float32
  np.testing.assert_allclose(total, [2 - 0.285, 1.375, 2.0005], rtol=1e-6)
  assert model.responses == rule.responses == ['a', 'b', '<think>x</think>c']


def test_sum_strips_thinking_for_every_source():
  parts = {'model': (1.0, Fixed([0, 0])), 'rule': (1.0, Fixed([0, 0]))}
  RewardSum(parts, strip_thinking=True).components([Prompt('p', 'r')] * 2, ['<think>1</think> 2 ', 'a '])
  assert all(source.responses == ['2', 'a '] for _, source in parts.values())


def test_fractions_and_signs_survive_all_steps():
  """Scores between -1 and 1 would all be 0 in an array of integers."""
  raw = np.random.default_rng(1).uniform(-1, 1, 200).astype(np.float32)
  reward = RewardSum({'model': (1.0, Fixed(raw))}, strip_thinking=True)
  components = reward.components([Prompt('p', 'r')] * 200, ['o'] * 200)
  total = reward.total(components)
  for kind in ('none', 'running', 'group', 'reference'):
    shaped, _ = shape(
      total,
      normalizer=Normalizer(kind),
      group_R=np.arange(200) // 4,
      reference_score_R=np.full(200, 0.25, np.float32),
      length_R=np.ones(200, np.int32),
      stopped_R=np.ones(200, bool),
      max_new=8,
      config=RewardConfig(normalize=kind),
    )
    assert shaped.dtype == components['model'].dtype == total.dtype == np.float32
    assert len(np.unique(shaped)) > 190
    if kind == 'none':
      np.testing.assert_array_equal(shaped, raw)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_is_named(bad):
  reward = RewardSum({'model': (1.0, Fixed([0.5, bad, bad]))}, strip_thinking=False)
  prompts = [Prompt('p', 'r'), Prompt([{'content': 'a long question ' * 20}], 'r'), Prompt('q', 'r')]
  with pytest.raises(RewardError) as caught:
    reward.components(prompts, ['x', 'the\nresponse', 'z'])
  message = str(caught.value)
  assert f'model gave the reward {bad} (2 of 3 are not finite)' in message
  assert f'prompt 1 {("a long question " * 20)[:60]!r}...' in message and r"response 'the\nresponse'" in message
  assert '\n' not in message
  assert isinstance(caught.value, UserError)


def test_rewards_of_another_type_or_shape_are_refused():
  source = Fixed([1, 2])
  for wrong in (np.array([1, 2]), np.array([1.0, 2.0]), np.zeros(3, np.float32), np.zeros((2, 1), np.float32)):
    source.rewards = wrong
    with pytest.raises(TypeError, match='rewards must be float32'):
      RewardSum({'model': (1.0, source)}, strip_thinking=False).components([Prompt('p', 'r')] * 2, ['a', 'b'])
  with pytest.raises(ValueError, match='at least one source'):
    RewardSum({}, strip_thinking=False)


def test_prompts_that_no_response_can_answer_are_counted_before_sampling():
  good, bad = Prompt('add', 'one', '1'), Prompt('spell', 'two')
  RewardSum({'rule': (1.0, RuleReward('last_number'))}, False).check([good, Prompt('p', 'is 3')])
  with pytest.raises(
    RewardError, match=r"^prompt 1 'spell': .* no number .*\(2 of 3 such prompts\); remove them, give them an `answer`"
  ) as error:
    RewardSum({'rule': (1.0, RuleReward('last_number'))}, False).check([good, bad, bad])
  assert len(str(error.value)) <= 500
