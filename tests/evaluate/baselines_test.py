from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from polar_jax.evaluate import baselines, statistics
from polar_jax.evaluate.clusters import Clusters
from polar_jax.types import Triplet


def slow_jaccard(a, b, n):
  grams = [[tuple(s[i : i + n]) for i in range(len(s) - n + 1)] for s in (a, b)]
  union = []
  for gram in grams[0] + grams[1]:
    if gram not in union:
      union.append(gram)
  return sum(g in grams[0] and g in grams[1] for g in union) / len(union) if union else 0.0


def slow_correct(chosen, rejected):
  return 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0


def with_ids(reference, chosen, rejected):
  ids = {'reference_ids': reference, 'chosen_ids': chosen, 'rejected_ids': rejected}
  return Triplet('p', ' '.join(map(str, reference)), ' '.join(map(str, chosen)), ' '.join(map(str, rejected)), metadata=ids)


def test_overlaps_match_a_slow_count_over_ids():
  rng = np.random.default_rng(0)
  examples = [[rng.integers(6, size=rng.integers(1, 14)).tolist() for _ in range(3)] for _ in range(200)]
  got = baselines.heuristic_correct([with_ids(*example) for example in examples])
  for n in (1, 2, 3):
    expected = [slow_correct(slow_jaccard(r, c, n), slow_jaccard(r, x, n)) for r, c, x in examples]
    np.testing.assert_array_equal(got[f'overlap_{n}'], expected)
  assert {0.0, 0.5, 1.0} == set(got['overlap_2'])


def test_ids_take_precedence_and_words_replace_missing_ids():
  text = {'prompt': 'p', 'reference': 'The cat sat', 'chosen': 'the CAT, sat!', 'rejected': 'a dog ran'}
  ids = {'reference_ids': np.array([1, 2, 3]), 'chosen_ids': [7, 8, 9], 'rejected_ids': [1, 2, 3]}
  got = baselines.heuristic_correct([Triplet(**text), Triplet(**text, metadata=ids)])
  assert got['overlap_1'].tolist() == got['overlap_3'].tolist() == [1.0, 0.0]
  assert got['words'].tolist() == [1.0, 1.0]


def test_length_counts_characters_of_joined_messages():
  messages = [{'role': 'user', 'content': 'ab'}, {'role': 'assistant', 'content': 'cd'}]  # 'ab\ncd': 5
  examples = [Triplet('p', messages, 'x' * 5, 'x' * 4), Triplet('p', messages, 'x' * 6, 'x' * 4), Triplet('p', messages, 'x' * 9, 'x' * 2)]
  assert baselines.heuristic_correct(examples)['length'].tolist() == [1.0, 0.5, 0.0]


def test_random_is_seeded_and_fair():
  examples = [Triplet('p', 'a', 'b', 'c')] * 4_000
  first = baselines.heuristic_correct(examples, seed=1)['random']
  np.testing.assert_array_equal(first, baselines.heuristic_correct(examples, seed=1)['random'])
  assert (first != baselines.heuristic_correct(examples, seed=2)['random']).any()
  assert abs(first.mean() - 0.5) < 0.03


def test_every_heuristic_is_present_even_without_examples():
  got = baselines.heuristic_correct([])
  assert set(got) == {'length', 'overlap_1', 'overlap_2', 'overlap_3', 'words', 'random'}
  assert all(v.shape == (0,) for v in got.values())


@pytest.mark.parametrize(
  ('example', 'message'),
  [
    (Triplet('p', 'a', 'b', 'c', metadata={'reference_ids': [1], 'rejected_ids': [2]}), 'example 1: .*no chosen_ids'),
    (Triplet('p', 'a', [{'content': None}], 'c'), 'example 1: chosen has a message'),
  ],
)
def test_bad_examples_are_named(example, message):
  with pytest.raises(ValueError, match=message):
    baselines.heuristic_correct([Triplet('p', 'a', 'b', 'c'), example])


def test_margin_is_against_the_best_heuristic_and_never_against_bayes_or_the_coin():
  correct = np.array([1.0, 1.0, 1.0, 0.0] * 50)
  heuristics = {'length': np.full(200, 0.5), 'words': np.array([1.0, 1.0, 0.0, 0.0] * 50), 'overlap_1': np.array([1.0, 0.0, 0.0, 0.0] * 50)}
  heuristics['words'][0], heuristics['length'][0] = 1.0, 0.0
  got = baselines.margin_over_best_baseline(correct, {**heuristics, 'bayes': np.ones(200), 'random': np.ones(200)}, seed=3)
  assert got['baseline'] == 'words'
  expected = statistics.paired_difference(correct, heuristics['words'], seed=3)
  assert (got['difference'], got['low'], got['high']) == (expected.difference, expected.low, expected.high)
  assert (got['clusters'], got['clustered_by']) == (200, 'example')
  clusters = Clusters(np.arange(200) // 40, 'policy')
  got = baselines.margin_over_best_baseline(correct, heuristics, clusters, seed=3)
  expected = statistics.paired_difference(correct, heuristics['words'], clusters, seed=3)
  assert got == {'baseline': 'words', **{k: v for k, v in expected.asdict().items() if k != 'n'}} and got['clusters'] == 5
  with pytest.raises(ValueError, match='no heuristic'):
    baselines.margin_over_best_baseline(correct, {'bayes': np.ones(200)})


def posterior_oracle(reference, chosen, rejected, prior):
  """Return P(chosen shares the policy of the reference), summed over all ordered pairs of policies in plain probabilities."""
  policies = len(prior)
  yes = no = 0.0
  for k, j in itertools.permutations(range(policies), 2):
    weight = prior[k] * prior[j] / (1 - prior[k]) * math.exp(reference[k])
    yes += weight * math.exp(chosen[k]) * math.exp(rejected[j])
    no += weight * math.exp(rejected[k]) * math.exp(chosen[j])
  return yes / (yes + no)


@pytest.mark.parametrize('uniform', [True, False])
def test_bayes_agrees_with_the_posterior_over_all_pairs_of_policies(uniform):
  rng = np.random.default_rng(1)
  policies, examples = 5, 400
  logp = rng.normal(-3, 2, size=(3, policies, examples))
  prior = None if uniform else rng.dirichlet(np.ones(policies))
  p = np.full(policies, 1 / policies) if uniform else prior
  got = baselines.bayes_correct(*logp, prior=prior)
  posterior = [posterior_oracle(*logp[:, :, i], p) for i in range(examples)]
  np.testing.assert_array_equal(got, [slow_correct(x, 0.5) for x in posterior])
  np.testing.assert_allclose(baselines.bayes_loss(*logp, prior=prior), -np.log(posterior), rtol=1e-9)


def test_bayes_is_optimal_where_the_joint_likelihood_alone_is_not():
  """All policies favor the same texts, which the joint likelihood mistakes for evidence."""
  rng = np.random.default_rng(2)
  policies, texts, examples = 6, 12, 20_000
  distribution = np.exp(rng.normal(size=(policies, texts)) + 2 * rng.normal(size=texts))
  distribution /= distribution.sum(axis=1, keepdims=True)
  k = rng.integers(policies, size=examples)
  j = (k + rng.integers(1, policies, size=examples)) % policies

  def draw(who):
    return (distribution.cumsum(axis=1)[who] < rng.random((examples, 1))).sum(axis=1).clip(max=texts - 1)

  r, x, y = draw(k), draw(k), draw(j)
  logp = np.log(distribution)
  bayes = baselines.bayes_correct(logp[:, r], logp[:, x], logp[:, y])
  joint = statistics.pair_correct(*(np.log((distribution[:, r] * distribution[:, c]).sum(axis=0)) for c in (x, y)))
  prior = np.full(policies, 1 / policies)
  posterior = np.array([posterior_oracle(*(logp[:, text] for text in row), prior) for row in zip(r[:999], x[:999], y[:999], strict=True)])
  expected = np.maximum(posterior, 1 - posterior).mean()
  margin = statistics.paired_difference(bayes, joint)
  assert margin.low > 0
  assert bayes.mean() == pytest.approx(expected, abs=0.02)


def test_bayes_is_stable_far_from_zero_and_ties_equal_texts():
  logp = np.array([[-2_000.0, -2_001.0], [-2_005.0, -2_003.0]])
  assert baselines.bayes_correct(logp, logp, logp).tolist() == [0.5, 0.5]
  scores = baselines.bayes_scores(logp, logp)
  np.testing.assert_allclose(baselines.bayes_scores(logp + 1_990, logp) - 1_990, scores, rtol=0, atol=1e-9)


def test_impossible_texts_decide_or_are_rejected():
  inf = np.inf
  reference, chosen, rejected = np.array([[-1.0], [-inf]]), np.array([[-3.0], [-9.0]]), np.array([[-inf], [-0.1]])
  assert baselines.bayes_correct(reference, chosen, rejected).tolist() == [1.0]
  assert baselines.bayes_loss(reference, chosen, rejected).tolist() == [0.0]
  assert baselines.bayes_loss(reference, rejected, rejected).tolist() == [pytest.approx(np.log(2))]  # neither can be by its policy
  for function in (baselines.bayes_correct, baselines.bayes_loss):
    with pytest.raises(ValueError, match=r'example 0: no policy .* the reference'):
      function(np.full((2, 1), -inf), chosen, rejected)
    with pytest.raises(ValueError, match=r'example 0: no policy .* the candidate'):
      function(reference, chosen, np.full((2, 1), -inf))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((np.zeros((2, 3)), np.zeros((2, 4))), 'same shape'),
    ((np.zeros(3), np.zeros(3)), 'policies, examples'),
    ((np.zeros((1, 3)), np.zeros((1, 3))), 'at least two policies'),
    ((np.zeros((2, 3)), np.array([[0, 0, 0], [0, np.nan, 0]])), 'example 1: .*candidate under policy 1 is nan'),
    ((np.zeros((2, 3)), np.zeros((2, 3)), np.array([0.7, 0.7])), 'prior'),
    ((np.zeros((2, 3)), np.zeros((2, 3)), np.array([1.0, 0.0])), 'prior'),
  ],
)
def test_bad_likelihoods_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    baselines.bayes_scores(*arguments)


def test_a_policy_of_probability_zero_changes_nothing():
  rng = np.random.default_rng(3)
  reference, candidate = -5 * rng.random((3, 7)), -5 * rng.random((3, 7))
  expected = baselines.bayes_scores(reference[1:], candidate[1:], np.array([0.4, 0.6]))
  np.testing.assert_allclose(baselines.bayes_scores(reference, candidate, np.array([0.0, 0.4, 0.6])), expected)


def test_of_equally_good_baselines_the_first_name_is_compared_with():
  equal = dict.fromkeys(('words', 'overlap_1', 'length'), np.ones(3))
  assert baselines.margin_over_best_baseline(np.ones(3), equal, resamples=10)['baseline'] == 'length'
