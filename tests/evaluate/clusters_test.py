from __future__ import annotations

import numpy as np
import pytest

from polar_jax.evaluate import statistics
from polar_jax.evaluate.clusters import cluster
from polar_jax.types import Triplet


def triplet(prompt, policy=None):
  return Triplet(prompt, 'r', 'c', 'x', metadata={} if policy is None else {'reference_policy': policy, 'rejected_policy': 'other'})


def test_known_policies_of_references_are_the_clusters():
  clusters = cluster([triplet('a', 'p1'), triplet('b', 'p2'), triplet('b', 'p1'), triplet('c', 'p3')])
  assert clusters.labels.tolist() == [0, 1, 0, 2] and (clusters.by, clusters.count) == ('policy', 3)


@pytest.mark.parametrize('unknown', [None, '', 7])
def test_examples_are_clustered_by_prompt_where_a_policy_is_unknown(unknown):
  clusters = cluster([triplet('a', 'p1'), triplet('b', 'p1'), triplet('a', unknown)])
  assert clusters.labels.tolist() == [0, 1, 0] and (clusters.by, clusters.count) == ('prompt', 2)


def test_examples_that_share_nothing_are_independent():
  clusters = cluster([triplet('a'), triplet('b'), triplet('c')])
  assert (clusters.by, clusters.count) == ('example', 3)
  assert (cluster([]).by, cluster([]).count) == ('example', 0)


def test_prompts_of_messages_are_compared_by_content():
  user = lambda text: [{'role': 'user', 'content': text}]
  clusters = cluster([triplet(user('a')), triplet([{'content': 'a', 'role': 'user'}]), triplet(user('b')), triplet('a')])
  assert clusters.labels.tolist() == [0, 0, 1, 2] and clusters.by == 'prompt'


def test_select_keeps_the_clusters_of_a_category():
  clusters = cluster([triplet('a', p) for p in ('p1', 'p2', 'p1', 'p3')])
  selected = clusters.select(np.array([True, False, True, False]))
  assert selected.labels.tolist() == [0, 0] and (selected.by, selected.count) == ('policy', 1)


def simulated(rng, policies=50, size=20):
  """Return (triplets, correct, baseline) in which each policy shifts the success rate of the model and of the baseline."""
  examples = [triplet(f'prompt {i}', f'policy {i % policies}') for i in range(policies * size)]
  policy = np.arange(len(examples)) % policies
  rates = [np.clip(mean + 0.3 * rng.standard_normal(policies), 0, 1)[policy] for mean in (0.7, 0.6)]
  correct, baseline = ((rng.random(len(examples)) < rate).astype(float) for rate in rates)
  return examples, correct, baseline


def test_clustered_intervals_cover_and_plain_ones_do_not():
  """The success rate differs widely between policies, and an interval must hold for other policies."""
  rng = np.random.default_rng(0)
  rate = lambda mean: np.clip(mean + 0.3 * rng.standard_normal(2_000_000), 0, 1).mean()
  truth, truth_baseline = rate(0.7), rate(0.6)
  covered = {'clustered': [], 'plain': [], 'clustered difference': [], 'plain difference': []}
  for i in range(300):
    examples, correct, baseline = simulated(rng)
    for name, clusters in (('clustered', cluster(examples)), ('plain', None)):
      interval = statistics.accuracy_interval(correct, clusters, resamples=500, seed=i)
      covered[name].append(interval.low <= truth <= interval.high)
      difference = statistics.paired_difference(correct, baseline, clusters, resamples=500, seed=i)
      covered[f'{name} difference'].append(difference.low <= truth - truth_baseline <= difference.high)
  share = {name: np.mean(values) for name, values in covered.items()}
  assert 0.91 <= share['clustered'] <= 0.98 and 0.91 <= share['clustered difference'] <= 0.98, share
  assert share['plain'] < 0.7 and share['plain difference'] < 0.7, share
