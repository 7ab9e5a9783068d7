"""Comparisons of any shape, and what is measured of their margins, against loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from polar_jax.evaluate import measures, sets, text_baselines
from polar_jax.evaluate.sets import Comparison, Item
from polar_jax.types import UserError

RNG = np.random.default_rng(0)


def item(i: int, candidates=('a', 'bb'), comparisons=None, **fields) -> Item:
  return Item(str(i), fields.pop('prompt', f'p{i}'), tuple(candidates), comparisons or sets.pair(), **fields)


def test_comparisons_of_lists():
  assert sets.pair(1) == (Comparison((1,), (0,)),)
  assert sets.all_pairs([False, True, True]) == (Comparison((1,), (0,)), Comparison((2,), (0,)))
  assert sets.ranked_pairs([2, 1, 2, 3]) == tuple(Comparison((i,), (j,)) for i, j in ((0, 3), (1, 0), (1, 2), (1, 3), (2, 3)))


def test_a_comparison_holds_if_the_worst_of_the_better_beats_the_best_of_the_worse():
  one = item(0, 'abcd', (Comparison((0, 1), (2, 3)), Comparison((0,), (1, 2, 3))))
  found = sets.margins([one], [np.array([3.0, 1.0, 2.0, 0.0])])
  np.testing.assert_array_equal(found.margin, [-1.0, 1.0])
  np.testing.assert_array_equal(found.item, [0, 0])
  lengths = sets.length_differences([item(0, ('aaaa', 'b', 'cc'), (Comparison((0,), (1, 2)),))])
  np.testing.assert_array_equal(lengths, [2.5])


@pytest.mark.parametrize('rewards', [[1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [math.inf, 0.0]])
def test_rewards_must_fit(rewards):
  with pytest.raises(UserError, match="item '7'"):
    sets.margins([item(7)], [np.array(rewards)])


def test_measures_against_loops():
  items = [item(i, ('a' * int(RNG.integers(1, 9)), 'b' * int(RNG.integers(1, 9))), category='xyz'[i % 3]) for i in range(60)]
  rewards = [RNG.integers(0, 3, 2).astype(float) for _ in items]
  found = measures.measure(items, rewards, resamples=200)
  values = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in rewards]
  assert found['accuracy'] == pytest.approx(np.mean(values)) and found['n'] == found['items'] == 60
  assert found['ties'] == values.count(0.5) > 0
  assert found['tie_rules'] == pytest.approx(
    {'wrong': values.count(1.0) / 60, 'half': np.mean(values), 'right': 1 - values.count(0.0) / 60}
  )
  by_category = {c: np.mean([v for v, i in zip(values, items, strict=True) if i.category == c]) for c in 'xyz'}
  assert {c: v['accuracy'] for c, v in found['by_category'].items()} == pytest.approx(by_category)
  assert list(found['by_category']) == ['x', 'y', 'z'] and found['category_mean'] == pytest.approx(np.mean([*by_category.values()]))
  longer = [v for v, i in zip(values, items, strict=True) if len(i.candidates[0]) > len(i.candidates[1])]
  assert found['by_length']['better_is_longer']['accuracy'] == pytest.approx(np.mean(longer))
  assert sum(part['n'] for part in found['by_length'].values()) == 60
  assert 'tie_rules' not in measures.measure(items, [np.array([1.0, 0.0])] * 60, resamples=200)


def test_duplicates_within_and_across_sets():
  first = sets.EvaluationSet('a', [item(0), item(1), item(2, prompt='p0')])
  second = sets.EvaluationSet('b', [item(0, ('bb', 'a')), item(1, ('a', 'c')), item(9, prompt=[{'role': 'user', 'content': 'p1'}])])
  assert sets.duplicates([first, second]) == {'a': {'2': 'a, 0'}, 'b': {'0': 'a, 0'}}


def test_calibration_against_loops():
  margin = RNG.normal(size=57) * 2
  found = measures.calibration(margin)
  p = [1 / (1 + math.exp(-m)) for m in margin]
  assert found['log_loss'] == pytest.approx(-np.mean(np.log(p))) and found['brier'] == pytest.approx(np.mean([(1 - x) ** 2 for x in p]))
  rows = sorted((max(x, 1 - x), float(m > 0)) for x, m in zip(p, margin, strict=True))
  parts = [rows[a:b] for a, b in itertools.pairwise(np.cumsum([0, *([6] * 7), *([5] * 3)]).tolist())]
  error = sum(len(part) * abs(np.mean([c for c, _ in part]) - np.mean([r for _, r in part])) for part in parts) / 57
  assert found['ece'] == pytest.approx(error) and [row['n'] for row in found['bins']] == [6] * 7 + [5] * 3
  assert np.isfinite(measures.calibration(np.array([-1e6, 1e6]))['brier'])
  assert measures.calibration(np.array([2.0]))['ece'] == pytest.approx(1 - 1 / (1 + math.exp(-2)))


def test_two_systems_are_compared_on_the_same_comparisons():
  first, second = (np.array(margins, float) for margins in ([1, 1, 1, 1, -1, 0, 2], [-1, -1, -1, 1, 1, -1, 0]))
  items = [item(i) for i in range(7)]
  found = measures.compare(first, second, sets.clusters(items, np.arange(7)))
  assert found['mcnemar'] == {'only_first': 3, 'only_second': 1, 'p': pytest.approx(2 * (math.comb(4, 3) + 1) / 16)}
  assert found['difference'] == pytest.approx((5.5 - 2.5) / 7) and found['low'] < found['difference'] < found['high']
  assert measures.compare(first, first, sets.clusters(items, np.arange(7)))['mcnemar']['p'] == 1.0


def test_intervals_resample_prompts():
  """Copies of an item add no information: the interval of twenty prompts asked fifty times is that of twenty."""
  once = [item(i) for i in range(20)]
  rewards = [np.array([float(i % 2), 0.5]) for i in range(20)]
  many = [item(i, prompt=f'p{i % 20}') for i in range(1_000)]
  narrow, wide = measures.measure(many, rewards * 50), measures.measure(once, rewards)
  assert narrow['clusters'] == 20 and narrow['clustered_by'] == 'prompt' and wide['clustered_by'] == 'example'
  assert narrow['high'] - narrow['low'] == pytest.approx(wide['high'] - wide['low'], abs=0.03)
  grid = item(0, 'abcd', tuple(Comparison((i,), (j,)) for i in (0, 1) for j in (2, 3)))
  assert sets.clusters([grid], np.zeros(4, int)).by == 'prompt'
  written = [item(i, facts={'reference_policy': f'm{i % 3}'}) for i in range(9)]
  assert sets.clusters(written, np.arange(9)).by == 'policy' and sets.clusters(written, np.arange(9)).count == 3


def test_text_baselines_against_loops():
  items = [
    item(0, ('the cat sat', 'a dog ran far'), reference='the cat sat down'),
    item(1, ('blue sky', 'the sky is blue today'), reference='the sky is blue'),
  ]
  found = text_baselines.scores(items)
  assert set(found) == {'longest', 'random', 'length', 'overlap_1', 'overlap_2', 'overlap_3', 'tfidf', 'bm25'}
  np.testing.assert_array_equal(found['length'][0], [-5.0, -3.0])
  np.testing.assert_allclose(found['overlap_1'][0], [3 / 4, 0.0])
  np.testing.assert_allclose(found['overlap_2'][1], [0.0, 3 / 4])
  documents = [c.split() for i in items for c in i.candidates]
  idf = lambda w: math.log(1 + (4 - sum(w in d for d in documents) + 0.5) / (sum(w in d for d in documents) + 0.5))
  mean = np.mean([len(d) for d in documents])
  query, text = (text.split() for text in (items[1].reference, items[1].candidates[1]))
  expected = sum(idf(w) * 2.2 / (1 + 1.2 * (0.25 + 0.75 * len(text) / mean)) for w in query)
  assert found['bm25'][1][1] == pytest.approx(expected)
  a, b = ({w: idf(w) for w in words} for words in (query, text))
  cosine = sum(a[w] * b[w] for w in a) / math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
  assert found['tfidf'][1][1] == pytest.approx(cosine)
  assert set(text_baselines.scores([item(0)])) == set(text_baselines.scores([*items, item(2)])) == {'longest', 'random'}
  assert found['longest'][0].tolist() == [len('the cat sat'), len('a dog ran far')]
  coins = np.random.default_rng(3).random(4).reshape(2, 2)
  np.testing.assert_array_equal(text_baselines.scores(items, seed=3)['random'], coins)
  assert all(np.isfinite(v).all() for of in text_baselines.scores([item(0, ('', '!'), reference='')]).values() for v in of)


def test_embedding_similarity_against_a_cosine():
  vectors = {'r': [3.0, 4.0], 'a': [4.0, 3.0], 'bb': [-3.0, -4.0], '': [0.0, 0.0]}
  calls = []

  def encode(texts):
    calls.append(list(texts))
    return np.array([vectors[text] for text in texts])

  found = text_baselines.embedding_similarity([item(0, reference='r'), item(1, ('a', 'a'), reference='')], encode)
  assert found[0] == pytest.approx([24 / 25, -1.0]) and found[1].tolist() == [0.0, 0.0]
  assert sorted(calls[0]) == ['', 'a', 'bb', 'r']
