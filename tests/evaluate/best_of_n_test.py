"""Best-of-n curves against loops over all subsets."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest

from polar_jax.evaluate import best_of_n, sets
from polar_jax.evaluate.sets import Item


def item(i: int, candidates, comparisons=None, **fields) -> Item:
  return Item(str(i), f'p{i}', tuple(candidates), comparisons or sets.pair(), **fields)


def test_best_of_n_against_all_subsets():
  scores, correct = np.array([1.0, 3.0, 3.0, 0.0, 2.0]), np.array([1.0, 0.0, 1.0, 1.0, 0.0])
  for n in range(1, 6):
    expected = []
    for subset in itertools.combinations(range(5), n):
      best = max(scores[list(subset)])
      expected.append(np.mean([correct[i] for i in subset if scores[i] == best]))
    assert best_of_n.expected_best(scores, correct)[n - 1] == pytest.approx(np.mean(expected))
  flags = tuple(bool(c) for c in correct)
  items = [
    item(0, 'abcde', sets.all_pairs(flags), correct=flags),
    item(1, 'abc', sets.all_pairs((True, False, False)), correct=(True, False, False)),
  ]
  found = best_of_n.curve(items, [scores, np.array([0.0, 1.0, 2.0])])
  assert found['n'] == [1, 2, 3] and found['items'] == 2
  assert found['random'] == pytest.approx([(3 / 5 + 1 / 3) / 2] * 3) and found['reward'][0] == pytest.approx(found['random'][0])
  assert found['oracle'][2] == pytest.approx(1.0) and found['reward'][2] < found['oracle'][2]
  assert 'majority' not in found
  assert best_of_n.curve([item(0, 'ab')], [np.zeros(2)]) is None


def test_majority_against_all_subsets():
  answers, correct = ('7', None, '7', '8', '8', '9'), np.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
  found = best_of_n.majority(answers, correct, np.random.default_rng(0), orders=10_000)
  for n in range(1, 7):
    expected = []
    for subset in itertools.combinations(range(6), n):
      votes = collections.Counter(answers[i] for i in subset if answers[i] is not None)
      top = [answer for answer, count in votes.items() if count == max(votes.values())]
      expected.append(np.mean([answer == '7' for answer in top]) if top else 0.0)
    assert found[n - 1] == pytest.approx(np.mean(expected), abs=1e-12 if n in (1, 6) else 0.015)
  rng, correct_of_two = np.random.default_rng(0), np.array([1.0, 0.0])
  assert best_of_n.majority((None, None), correct_of_two, rng).tolist() == [0.0, 0.0]
  assert best_of_n.majority(('7', '7'), correct_of_two, rng)[1] == 0.5  # not judged alike
  flags = tuple(bool(c) for c in correct)
  known = item(0, 'abcdef', sets.all_pairs(flags), correct=flags, answers=answers)
  assert best_of_n.curve([known], [np.arange(6.0)])['majority'][5] == 0.5


def test_intervals_resample_items():
  rng = np.random.default_rng(1)
  flags = [bool(rng.random() < 0.6) for _ in range(200)]
  items = [item(i, 'ab', sets.all_pairs((ok, not ok)), correct=(ok, not ok)) for i, ok in enumerate(flags)]
  found = best_of_n.curve(items, [np.array([1.0, 0.0])] * 200)
  share = np.mean(flags)
  half = 1.96 * np.sqrt(share * (1 - share) / 200)
  assert found['reward'][1] == pytest.approx(share)
  assert found['low'][1] == pytest.approx(share - half, abs=0.007) and found['high'][1] == pytest.approx(share + half, abs=0.007)
  assert found['low'][0] == found['high'][0] == 0.5  # one of two is right everywhere
  alone = best_of_n.curve(items[:1], [np.array([1.0, 0.0])])
  assert alone['low'] == [0.0, 0.0] and alone['high'] == [1.0, 1.0]


def test_two_hundred_orders_vote():
  answers, correct = ('7', '8', '7', '9', '8'), np.array([1.0, 0.0, 1.0, 0.0, 0.0])
  votes = lambda **settings: best_of_n.majority(answers, correct, np.random.default_rng(0), **settings).tolist()
  assert votes() == votes(orders=200) != votes(orders=201)


def test_there_is_a_majority_only_where_all_answers_are_known():
  flags = (True, False)
  known, unknown = (item(i, 'ab', sets.all_pairs(flags), correct=flags, answers=answers) for i, answers in enumerate((('1', '2'), None)))
  rewards = [np.array([1.0, 0.0])] * 2
  assert 'majority' in best_of_n.curve([known, known], rewards) and 'majority' not in best_of_n.curve([known, unknown], rewards)
