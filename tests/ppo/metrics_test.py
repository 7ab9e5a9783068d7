"""Metrics of responses: every one against an independent oracle or by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from polar_jax.config import RewardConfig, RftConfig, RolloutConfig
from polar_jax.data.template import join_messages
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.ppo import metrics
from polar_jax.ppo.metrics import describe, evaluate, response_texts, score
from polar_jax.ppo.rewards.shaping import Normalizer
from polar_jax.ppo.rewards.sources import RewardSum
from polar_jax.types import Prompt, Rollouts


def slow_overlap(output, reference):
  left, shared = reference.split(), 0
  for word in output.split():
    if word in left:
      left.remove(word)
      shared += 1
  return shared / len(output.split()) if output else 0.0


def test_overlap_counts_each_word_of_the_reference_once():
  rng = np.random.default_rng(0)
  texts = [[' '.join(rng.choice(list('abcd'), rng.integers(0, 9))) for _ in range(2)] for _ in range(60)]
  responses, references = zip(*texts, strict=True)
  got = metrics.overlap(responses, references)
  assert got.dtype == np.float64 and got.tolist() == [slow_overlap(o, r) for o, r in texts]
  assert 0 < got.mean() < 1


def test_overlap_ignores_punctuation_and_case():
  messages = [{'role': 'assistant', 'content': 'The Cat'}, {'role': 'assistant', 'content': 'sat.'}]
  got = metrics.overlap(['the cat, the cat!', '', '...', '我喜欢猫'], [messages, 'a', '...', '猫喜欢我们'])
  assert got.tolist() == [0.5, 0.0, 0.0, 1.0]
  with pytest.raises(ValueError, match='zip'):
    metrics.overlap(['a'], [])


@pytest.mark.parametrize('n', [1, 2, 3])
def test_distinct_counts_over_all_responses(n):
  rng = np.random.default_rng(n)
  responses = [' '.join(rng.choice(list('abc'), size)) for size in (0, 1, 4, 9, 9)]
  grams = [tuple(o.split()[i : i + n]) for o in responses for i in range(len(o.split()) - n + 1)]
  assert metrics.distinct(responses, n) == len(set(grams)) / len(grams)


def test_distinct_without_words_and_with_repetition():
  assert metrics.distinct([], 1) == metrics.distinct(['', 'a'], 2) == 0.0
  assert metrics.distinct(['so good so good so good'], 2) == 2 / 5
  with pytest.raises(ValueError, match='n is 0'):
    metrics.distinct(['a'], 0)


def test_length_regression_is_the_least_squares_line():
  rng = np.random.default_rng(0)
  length = rng.integers(5, 60, 40)
  score = (0.03 * length + rng.normal(size=40)).astype(np.float32)
  slope, adjusted = metrics.length_regression(score, length, 20.0)
  design = np.stack([length, np.ones(40)], axis=1)
  (wanted, intercept), *_ = np.linalg.lstsq(design, score.astype(np.float64), rcond=None)
  assert slope == pytest.approx(wanted, rel=1e-9) and adjusted == pytest.approx(wanted * 20.0 + intercept, rel=1e-9)


def test_length_regression_removes_a_reward_that_is_length_alone():
  free = [metrics.length_regression(0.5 * length, length, 10.0)[1] for length in (np.array([8.0, 12.0]), np.array([50.0, 90.0]))]
  assert free == pytest.approx([5.0, 5.0])
  assert metrics.length_regression(np.array([1.0, 2.0, 6.0]), np.array([7, 7, 7]), 100.0) == (0.0, 3.0)


@pytest.mark.parametrize(('score', 'length'), [([], []), ([1.0], [1, 2]), ([[1.0]], [[1]])])
def test_length_regression_refuses_other_shapes(score, length):
  with pytest.raises(ValueError, match='one number per response'):
    metrics.length_regression(np.array(score), np.array(length), 1.0)


def test_explained_variance_ignores_masked_tokens():
  rng = np.random.default_rng(0)
  returns, values = rng.normal(size=(2, 6, 9)).astype(np.float32)
  values = values + 0.7 * returns + 3  # a constant offset does not matter
  mask = rng.random((6, 9)) < 0.6
  valid = [(float(r), float(v)) for r, v, m in zip(returns.flat, values.flat, mask.flat, strict=True) if m]
  mean_r, mean_e = (sum(xs) / len(valid) for xs in ([r for r, _ in valid], [r - v for r, v in valid]))
  wanted = 1 - sum((r - v - mean_e) ** 2 for r, v in valid) / sum((r - mean_r) ** 2 for r, _ in valid)
  returns[~mask], values[~mask] = np.nan, np.inf
  assert metrics.explained_variance(returns, values, mask.astype(np.float32)) == pytest.approx(wanted, rel=1e-6)


def test_explained_variance_of_perfect_constant_and_reversed_values():
  returns, mask = np.arange(6.0).reshape(2, 3), np.ones((2, 3))
  assert metrics.explained_variance(returns, returns, mask) == 1.0
  assert metrics.explained_variance(returns, np.zeros((2, 3)), mask) == 0.0
  assert metrics.explained_variance(returns, -returns, mask) == pytest.approx(-3.0)
  assert metrics.explained_variance(np.full((2, 3), 0.1), returns, mask) == 0.0
  assert metrics.explained_variance(returns, returns, 0 * mask) == 0.0


def make_prompts(counts, references=1):
  """Return a batch with `counts[i]` rollouts of prompt i, which cycle through `references` references of its own."""
  return [Prompt(f'p{i}', f'r{i}.{j % references}', f'a{i}.{j % references}', category='c') for i, n in enumerate(counts) for j in range(n)]


@pytest.mark.parametrize('counts', [(1, 1), (1, 9), (3, 1, 2), (4,) * 8, tuple(range(1, 7))])
@pytest.mark.parametrize('references', [1, 3])
@pytest.mark.parametrize('seed', range(4))
def test_shuffled_references_are_those_of_other_prompts(counts, references, seed):
  prompts = make_prompts(counts, references)
  order = np.random.default_rng(seed).permutation(len(prompts))
  prompts = [prompts[i] for i in order]
  got = metrics.shuffled_references(prompts, (seed, 7))
  assert [(p.prompt, p.category) for p in got] == [(p.prompt, p.category) for p in prompts]
  given = {(p.reference, p.answer) for p in prompts}
  for p in got:
    assert (p.reference, p.answer) in given and not p.reference.startswith(f'r{p.prompt[1:]}.')
  groups = {}
  for before, after in zip(prompts, got, strict=True):
    groups.setdefault((before.prompt, before.reference), set()).add((after.reference, after.answer))
  assert all(len(new) == 1 for new in groups.values())  # equal entries stay equal
  assert got == metrics.shuffled_references(prompts, (seed, 7))


def test_shuffled_references_differ_between_seeds_and_use_every_reference():
  prompts = make_prompts((2,) * 20)
  shuffles = [tuple(p.reference for p in metrics.shuffled_references(prompts, (0, step))) for step in range(5)]
  assert len(set(shuffles)) == 5 and all(len(set(s)) == 20 for s in shuffles)


def test_shuffled_references_need_two_prompts():
  assert metrics.shuffled_references(make_prompts((5,), references=5), 0) is None
  assert metrics.shuffled_references([], 0) is None


def test_references_by_other_policies_are_used_where_every_prompt_has_one():
  prompts = [Prompt(f'p{i}', f'own {i}', answer=f'{i}', other_reference=f'other {i}') for i in (0, 0, 1)]
  assert [p.reference for p in metrics.other_references(prompts, 0)] == ['other 0', 'other 0', 'other 1']
  assert [p.answer for p in metrics.other_references(prompts, 0)] == ['0', '0', '1']  # the rule's answer is the prompt's
  assert metrics.other_references(prompts[:1], 0)[0].reference == 'other 0'  # one prompt is enough
  partly = [*prompts, Prompt('p2', 'own 2', answer='2')]
  assert metrics.other_references(partly, 5) == metrics.shuffled_references(partly, 5)


def test_shuffled_references_may_be_messages():
  messages = [[{'role': 'assistant', 'content': f'r{i}'}] for i in range(2)]
  got = metrics.shuffled_references([Prompt([{'role': 'user', 'content': f'p{i}'}], messages[i]) for i in range(2)], 0)
  assert [join_messages(p.prompt, '') for p in got] == ['p0', 'p1'] and [p.reference for p in got] == messages[::-1]


def sample(n, **changes):
  prompts = [Prompt(f'p{i}', [{'role': 'assistant', 'content': f'r{i}'}]) for i in range(n)]
  scores = np.random.default_rng(1).normal(size=n).astype(np.float32)
  given = {'shuffled': scores - 1, 'lengths': np.arange(n, dtype=np.int32), 'seed': (0, 3), **changes}
  return scores, metrics.sample_records(3, prompts, [f'o{i}' for i in range(n)], scores, **given)


def test_samples_hold_the_extremes_and_random_others():
  scores, rows = sample(30)
  assert [row['pick'] for row in rows] == ['highest', 'random', 'random', 'lowest']
  assert [row['score'] for row in rows] == sorted((row['score'] for row in rows), reverse=True)
  assert rows[0]['score'] == scores.max() and rows[-1]['score'] == scores.min()
  for row in rows:
    i = int(row['output'][1:])
    wanted = {'step': 3, 'prompt': f'p{i}', 'reference': f'r{i}', 'score': float(scores[i]), 'shuffled': float(scores[i] - 1), 'length': i}
    assert row == {'pick': row['pick'], 'output': f'o{i}', **wanted} and json.loads(json.dumps(row)) == row
  assert rows == sample(30)[1] != sample(30, seed=(0, 4))[1]
  assert 'shuffled' not in sample(30, shuffled=None)[1][0]


@pytest.mark.parametrize(
  ('n', 'count_asked', 'count'), [(0, 4, 0), (1, 4, 1), (2, 4, 2), (3, 4, 3), (9, 0, 0), (9, 1, 1), (9, 2, 2), (9, 9, 9)]
)
def test_samples_of_few_responses_hold_each_once(n, count_asked, count):
  _, rows = sample(n, max_records=count_asked)
  assert len({row['output'] for row in rows}) == len(rows) == count


class ReferenceReward:
  """Rewards 3 for a response equal to its reference, else its length: a source that depends on the reference."""

  def score(self, prompts, responses):
    return np.array([3.0 if p.reference == r else len(r) / 4 for p, r in zip(prompts, responses, strict=True)], np.float32)


def make_rollouts(texts, max_new=8, stop=ByteTokenizer.eos_id, stopped=None) -> Rollouts:
  """Return rollouts of byte tokens, each with a stop token at its end unless `stopped` is false."""
  stopped = [True] * len(texts) if stopped is None else stopped
  ids = [[*ByteTokenizer().encode(text), *([stop] if ends else [])] for text, ends in zip(texts, stopped, strict=True)]
  tokens = np.array([[*i, *[0] * (max_new - len(i))] for i in ids], np.int32)
  return Rollouts(
    [[1]] * len(ids), tokens, np.array([len(i) for i in ids], np.int32), np.zeros(tokens.shape, np.float32), np.array(stopped)
  )


def test_response_texts_leave_out_the_stop_token_alone():
  """Also a stop token that is text, which skipping special tokens would keep."""
  tokenizer = ByteTokenizer()
  (period,) = tokenizer.encode('.')
  rollouts = make_rollouts(['a.b', 'cd', '.', ''], stop=period, stopped=[True, False, True, True])
  assert response_texts(rollouts, tokenizer, (period, tokenizer.eos_id)) == ['a.b', 'cd', '.', '']
  assert response_texts(make_rollouts(['ab', '']), tokenizer, (tokenizer.eos_id,)) == ['ab', '']


CONFIG = RftConfig(prompts_per_step=2, num_generations=2, rollout=RolloutConfig(max_new=8), reward=RewardConfig())


def score_four(config=CONFIG, shuffle=(0, 0), responses=('r0', 'abcd', 'r1', 'r0')):
  """Score two responses to each of two prompts, whose references are r0 and r1."""
  prompts = make_prompts((2, 2))
  prompts = [dataclasses.replace(p, reference=p.reference[:2]) for p in prompts]
  reward = RewardSum({'model': (2.0, ReferenceReward())}, strip_thinking=False)
  return score(reward, config, Normalizer(config.reward.normalize), prompts, list(responses), make_rollouts(responses), shuffle)


def test_score_measures_the_gap_to_shuffled_references():
  """The gap is the raw reward minus that under the other prompt's reference, so a reward that uses its reference has a positive gap."""
  scores = score_four()
  assert scores.raw_R.tolist() == [6.0, 2.0, 6.0, 1.0] and scores.shuffled_R.tolist() == [1.0, 2.0, 1.0, 6.0]
  assert scores.metrics['shuffled'] == 2.5 and scores.metrics['shuffled_gap'] == 1.25
  assert scores.metrics['raw'] == scores.metrics['reward'] == 3.75 and scores.metrics['model'] == 1.875
  assert scores.metrics['raw_std'] == pytest.approx(np.std([6, 2, 6, 1]))
  assert score_four(responses=('r1', 'r1', 'r0', 'r0')).metrics['shuffled_gap'] == -5.0


def test_score_without_a_control_or_with_one_prompt():
  scores = score_four(shuffle=None)
  assert scores.shuffled_R is None and not {'shuffled', 'shuffled_gap'} & set(scores.metrics)
  reward = RewardSum({'model': (1.0, ReferenceReward())}, strip_thinking=False)
  one = dataclasses.replace(CONFIG, prompts_per_step=1)
  scores = score(reward, one, Normalizer('none'), make_prompts((2,)), ['a', 'b'], make_rollouts(['a', 'b']), (0, 0))
  assert scores.shuffled_R is None and 'shuffled_gap' not in scores.metrics


def test_score_normalizes_by_group_and_by_reference():
  group = score_four(dataclasses.replace(CONFIG, reward=RewardConfig(normalize='group'))).shaped_R
  np.testing.assert_allclose(group, [1, -1, 1, -1], atol=1e-5)  # responses to one prompt are adjacent
  reference = score_four(dataclasses.replace(CONFIG, reward=RewardConfig(normalize='reference')))
  assert reference.shaped_R.tolist() == [0.0, -4.0, 0.0, -5.0] and reference.raw_R.tolist() == [6.0, 2.0, 6.0, 1.0]


def test_describe_measures_lengths_and_cuts():
  texts = ['a b', 'a b c', '', 'c']
  rollouts = make_rollouts(texts, stopped=[True, False, True, True])
  described = describe([Prompt('p', 'a b')] * 4, texts, rollouts)
  assert described == {
    'length': np.mean([4, 5, 1, 2]),
    'truncated': 0.25,
    'empty': 0.25,
    'overlap': pytest.approx((1 + 2 / 3) / 4),
    'distinct_1': 3 / 6,
    'distinct_2': 2 / 3,
  }


def test_evaluate_is_greedy_and_reads_the_first_held_out_prompts(monkeypatch):
  calls = []

  class Engine:
    def __init__(self, model, mesh, config, stop_ids, adapters):
      calls.append(config)
      assert adapters == FakeRun.config.lora

    def generate(self, params, prompts, seed):
      calls.append((params, prompts, seed))
      return make_rollouts(['r0', 'xy'], stopped=[True, False])

  class FakeRun:
    config = dataclasses.replace(CONFIG, evaluate_prompts=2, rollout=RolloutConfig(max_new=8, temperature=0.7, top_p=0.9))
    held_out = tuple((Prompt(f'p{i}', f'r{i}'), [i, i]) for i in range(3))
    model = mesh = None
    tokenizer, stop_ids = ByteTokenizer(), (ByteTokenizer.eos_id,)
    reward = RewardSum({'model': (2.0, ReferenceReward())}, strip_thinking=False)

  monkeypatch.setattr(metrics, 'RolloutEngine', Engine)
  result = evaluate(FakeRun, 'params')
  assert calls == [dataclasses.replace(FakeRun.config.rollout, temperature=0.0), ('params', [[0, 0], [1, 1]], (0,))]
  assert result == {'raw': 3.5, 'model': 1.75, 'length': 2.5, 'truncated': 0.5, 'overlap': 0.5}
