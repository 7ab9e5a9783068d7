from __future__ import annotations

import inspect

import numpy as np
import pytest

from polar_jax.evaluate import baselines, best_of_n, measures, references, statistics, text_baselines
from polar_jax.evaluate.benchmarks import polar_paper
from polar_jax.evaluate.clusters import Clusters


def slow_bootstrap(values, labels, resamples, seed):
  """Redraw whole clusters one by one, without pooling equal clusters or counting."""
  rng = np.random.default_rng(seed)
  members = [np.flatnonzero(labels == label) for label in sorted(set(labels.tolist()))]
  means = []
  for _ in range(resamples):
    drawn = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
    means.append(values[drawn].mean())
  return np.percentile(means, [2.5, 97.5])


def clustered(rng, clusters, size, spread):
  """Return (correct, labels) of clusters that each have their own success rate around .7."""
  rates = np.clip(0.7 + spread * rng.standard_normal(clusters), 0, 1)
  labels = np.repeat(np.arange(clusters), size)
  return (rng.random(clusters * size) < rates[labels]).astype(float), labels


def policies(labels):
  return Clusters(np.asarray(labels), 'policy')


def test_interval_of_independent_examples_matches_the_slow_bootstrap():
  rng = np.random.default_rng(1)
  correct = rng.choice([0.0, 0.5, 1.0], size=300, p=[0.25, 0.1, 0.65])
  got = statistics.accuracy_interval(correct, resamples=20_000)
  low, high = slow_bootstrap(correct, np.arange(300), 4_000, seed=5)
  assert got.accuracy == pytest.approx(correct.mean()) and got.n == 300
  assert got.low == pytest.approx(low, abs=0.006) and got.high == pytest.approx(high, abs=0.006)


def test_cluster_interval_matches_the_slow_bootstrap_with_unequal_clusters():
  rng = np.random.default_rng(2)
  labels = rng.integers(40, size=500) ** 2 - 7  # gaps and negative labels
  rates = rng.random(2_000)
  correct = (rng.random(500) < rates[labels]).astype(float)
  got = statistics.accuracy_interval(correct, policies(labels), resamples=20_000)
  low, high = slow_bootstrap(correct, labels, 4_000, seed=5)
  assert got.low == pytest.approx(low, abs=0.012) and got.high == pytest.approx(high, abs=0.012)


def test_a_resample_is_a_mean_over_its_examples_when_large_clusters_are_the_accurate_ones():
  sizes = np.array([1] * 20 + [30] * 5)
  labels = np.repeat(np.arange(25), sizes)
  correct = (np.random.default_rng(9).random(labels.size) < np.where(sizes > 1, 0.9, 0.3)[labels]).astype(float)
  got = statistics.accuracy_interval(correct, policies(labels), resamples=20_000)
  low, high = slow_bootstrap(correct, labels, 4_000, seed=5)
  assert got.low == pytest.approx(low, abs=0.015) and got.high == pytest.approx(high, abs=0.015)
  assert got.high <= 1


def test_clusters_of_one_example_are_independent_examples():
  correct = np.random.default_rng(3).choice([0.0, 0.5, 1.0], size=200)
  a = statistics.accuracy_interval(correct, resamples=20_000)
  b = statistics.accuracy_interval(correct, policies(np.arange(200)[::-1]), resamples=20_000, seed=1)
  assert a.low == pytest.approx(b.low, abs=0.005) and a.high == pytest.approx(b.high, abs=0.005)


def test_coverage_of_independent_examples_is_near_95_percent():
  rng = np.random.default_rng(4)
  intervals = [statistics.accuracy_interval((rng.random(200) < 0.7).astype(float), resamples=500, seed=i) for i in range(400)]
  covered = np.mean([i.low <= 0.7 <= i.high for i in intervals])
  assert 0.91 <= covered <= 0.98


def test_only_the_cluster_bootstrap_covers_clustered_examples():
  rng = np.random.default_rng(5)
  with_clusters, without = [], []
  truth = np.clip(0.7 + 0.2 * rng.standard_normal(1_000_000), 0, 1).mean()
  for i in range(300):
    correct, labels = clustered(rng, clusters=50, size=20, spread=0.2)
    a = statistics.accuracy_interval(correct, policies(labels), resamples=500, seed=i)
    b = statistics.accuracy_interval(correct, resamples=500, seed=i)
    with_clusters.append(a.low <= truth <= a.high)
    without.append(b.low <= truth <= b.high)
  assert 0.90 <= np.mean(with_clusters) <= 0.99
  assert np.mean(without) < 0.80


def test_pairing_narrows_the_interval_of_a_difference_and_keeps_its_mean():
  rng = np.random.default_rng(6)
  b = (rng.random(1_000) < 0.6).astype(float)
  a = np.where(rng.random(1_000) < 0.05, 1.0, b)  # nearly always both right or both wrong
  got = statistics.paired_difference(a, b)
  assert got.difference == pytest.approx((a - b).mean()) and got.n == 1_000
  low, high = slow_bootstrap(a - b, np.arange(1_000), 2_000, seed=1)
  assert got.low == pytest.approx(low, abs=0.004) and got.high == pytest.approx(high, abs=0.004)
  assert got.low > 0
  separate = statistics.accuracy_interval(a)
  assert got.high - got.low < 0.5 * (separate.high - separate.low)


def test_difference_uses_clusters_and_is_antisymmetric():
  rng = np.random.default_rng(7)
  a, labels = clustered(rng, clusters=30, size=20, spread=0.25)
  b = np.full_like(a, 0.5)
  wide, narrow = statistics.paired_difference(a, b, policies(labels)), statistics.paired_difference(a, b)
  assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
  back = statistics.paired_difference(b, a, policies(labels))
  assert back.difference == pytest.approx(-wide.difference)


def test_same_seed_same_interval_and_resamples_are_chunked_alike(monkeypatch):
  correct, labels = clustered(np.random.default_rng(8), clusters=60, size=10, spread=0.2)
  first = statistics.accuracy_interval(correct, policies(labels), seed=3)
  assert first == statistics.accuracy_interval(correct, policies(labels), seed=3)
  assert first != statistics.accuracy_interval(correct, policies(labels), seed=4)
  monkeypatch.setattr(statistics, '_CHUNK', 100)
  assert first == statistics.accuracy_interval(correct, policies(labels), seed=3)


def test_one_cluster_carries_no_information_about_the_spread():
  correct = np.array([1.0, 0.0, 1.0])
  assert statistics.accuracy_interval(correct, policies(np.zeros(3, int))).asdict() == {
    'accuracy': pytest.approx(2 / 3),
    'low': 0.0,
    'high': 1.0,
    'n': 3,
    'clusters': 1,
    'clustered_by': 'policy',
  }
  one = statistics.paired_difference(correct, correct, policies(np.zeros(3, int))).asdict()
  assert one == {'difference': 0.0, 'low': -1.0, 'high': 1.0, 'n': 3, 'clusters': 1, 'clustered_by': 'policy'}


def test_an_interval_states_what_was_resampled_and_its_mean_does_not_depend_on_it():
  correct = np.random.default_rng(10).choice([0.0, 0.5, 1.0], size=300)
  labels = np.arange(300) // 7
  plain, grouped = statistics.accuracy_interval(correct), statistics.accuracy_interval(correct, Clusters(labels, 'prompt'))
  assert (plain.clusters, plain.clustered_by) == (300, 'example')
  assert (grouped.clusters, grouped.clustered_by) == (43, 'prompt')
  assert plain.accuracy == grouped.accuracy == float(correct.mean())  # bit for bit
  difference = statistics.paired_difference(correct, 1 - correct, Clusters(labels, 'prompt'))
  assert (difference.clusters, difference.clustered_by) == (43, 'prompt')
  assert difference.difference == statistics.paired_difference(correct, 1 - correct).difference


@pytest.mark.parametrize('value', [0.0, 0.5, 1.0])
def test_equal_values_are_no_certainty(value):
  few, many = (statistics.accuracy_interval(np.full(n, value)) for n in (8, 800))
  assert few.accuracy == many.accuracy == value
  assert few.low <= many.low <= value <= many.high <= few.high and few.high - few.low > 0.3 > 0.01 > many.high - many.low > 0
  q = 1 - 0.025 ** (1 / 8)  # Clopper and Pearson for none of 8
  expected = {0.0: (0, q), 0.5: (0.5 - q / 2, 0.5 + q / 2), 1.0: (1 - q, 1)}[value]
  assert (few.low, few.high) == pytest.approx(expected)


def test_the_exact_interval_counts_clusters_and_covers():
  labels = np.arange(800) // 100
  assert statistics.accuracy_interval(np.ones(800), policies(labels)).low == pytest.approx(0.025 ** (1 / 8))
  same = statistics.paired_difference(np.ones(50), np.ones(50))
  assert same.low == pytest.approx(-same.high) and 0.05 < same.high < 0.1
  # A true accuracy of 0.7 gives 8 right of 8 with a probability of 5.8%; the interval must hold it then.
  assert statistics.accuracy_interval(np.ones(8)).low < 0.7


def test_asdict_holds_plain_python_numbers():
  values = statistics.accuracy_interval(np.array([1, 0, 1, 1], dtype=np.float32)).asdict()
  assert [type(values[k]) for k in ('accuracy', 'low', 'high', 'n', 'clusters', 'clustered_by')] == [float, float, float, int, int, str]


def test_pair_correct_counts_ties_half():
  got = statistics.pair_correct(np.array([2.0, 1.0, 0.0, -np.inf, 0.0]), np.array([1.0, 1.0, 3.0, -np.inf, -np.inf]))
  np.testing.assert_array_equal(got, [1.0, 0.5, 0.0, 0.5, 1.0])


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: statistics.accuracy_interval(np.array([])), 'at least one example'),
    (lambda: statistics.accuracy_interval(np.array([1.0, 1.3])), r'example 1: 1\.3'),
    (lambda: statistics.accuracy_interval(np.array([1.0, np.nan])), 'example 1: nan'),
    (lambda: statistics.accuracy_interval(np.ones(3), policies(np.zeros(2, int))), '3 examples'),
    (lambda: statistics.accuracy_interval(np.ones(2), policies([0.5, 1.0])), 'integers'),
    (lambda: statistics.accuracy_interval(np.ones(2), resamples=0), 'resamples'),
    (lambda: statistics.paired_difference(np.ones(3), np.ones(2)), 'same examples'),
    (lambda: statistics.pair_correct(np.array([0.0, np.nan]), np.zeros(2)), 'example 1: a score is NaN'),
    (lambda: statistics.pair_correct(np.zeros(3), np.zeros(2)), 'same length'),
  ],
)
def test_bad_input_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize(
  'function',
  [
    *(measures.measure, measures.compare, statistics.accuracy_interval, statistics.paired_difference, polar_paper.table),
    *(best_of_n.curve, best_of_n.reward_curve, baselines.margin_over_best_baseline, baselines.heuristic_correct),
    *(text_baselines.scores, references.views, references.hold_out),
  ],
)
def test_two_thousand_resamples_are_drawn_with_seed_zero_by_default(function):
  defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
  drawn = {name: default for name, default in defaults.items() if name in ('resamples', 'seed')}
  assert drawn and drawn.items() <= {'resamples': 2_000, 'seed': 0}.items()
