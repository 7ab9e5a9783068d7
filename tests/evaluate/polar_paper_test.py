"""The paper's categories next to its numbers, in evaluation.json and in the report."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import optimize

from polar_jax.evaluate import measures, sets
from polar_jax.evaluate.benchmarks import polar_paper
from polar_jax.evaluate.sets import Item
from polar_jax.report import evaluation

RNG = np.random.default_rng(0)
GROUPS = ('Chat', 'Closed QA', 'Open QA', 'Generation', 'Translation')


@pytest.fixture(scope='module')
def scored():
  items = [Item(str(i), f'p{i}', ('a', 'b'), sets.pair(), category=GROUPS[i % 5]) for i in range(50)]
  return items, [RNG.integers(0, 3, 2).astype(float) for _ in items]


def test_categories_take_the_groups_of_their_name_or_of_their_meaning(scored):
  items, rewards = scored
  rows = {row['category']: row for row in polar_paper.table(items, rewards, resamples=100)}
  right = {g: [(a > b) + (a == b) / 2 for (a, b), item in zip(rewards, items, strict=True) if item.category in g] for g in GROUPS}
  qa = right['Closed QA'] + right['Open QA']
  assert [rows[name]['accuracy'] for name in ('Chat', 'Closed & open QA', 'Multilingual', 'Average')] == pytest.approx(
    [np.mean(right['Chat']), np.mean(qa), np.mean(right['Translation']), np.mean([*itertools.chain(*right.values())])]
  )
  assert (rows['Closed & open QA']['n'], rows['Average']['n']) == (20, 50)
  assert [rows[name]['mapping'] for name in ('Chat', 'Closed & open QA', 'STEM', 'Average')] == ['same', 'inferred', None, 'same']
  # Without a group, and with a group that has no comparison here.
  assert [(rows[name]['rmb_groups'], rows[name]['accuracy'], rows[name]['n']) for name in ('STEM', 'Harmlessness')] == [
    ([], None, 0),
    (['Harmlessness'], None, 0),
  ]
  assert rows['Average']['rmb_groups'] == sorted(GROUPS) and len(rows) == 12 + 1


def test_the_published_averages_are_those_of_the_paper():
  average = dict(zip(polar_paper.SYSTEMS, polar_paper.PUBLISHED[polar_paper.AVERAGE], strict=True))
  assert (average['POLAR-1.8B'], average['POLAR-7B'], average['Skywork-27B']) == (74.0, 76.3, 72.4)
  groups = [*itertools.chain(*polar_paper._SAME.values(), *polar_paper._INFERRED.values())]
  assert len(groups) == len(set(groups))  # no group is in two categories
  assert {*polar_paper._SAME, *polar_paper._INFERRED} < {*polar_paper.PUBLISHED}


def test_the_report_shows_them(scored):
  items, rewards = scored
  found = measures.measure(items, rewards, 100) | {
    'paper': polar_paper.table(items, rewards, 100),
    'baselines': {'random': {'accuracy': 0.5, 'low': 0.4, 'high': 0.6}},
    'margin_over_best_baseline': {'baseline': 'random', 'difference': 0.1, 'low': 0.0, 'high': 0.2},
    'references': {},
  }
  text = '\n'.join(evaluation.section({'sets': {'polar_rmb': found}}, {}))
  assert 'Closed QA, Open QA (inferred) |' in text and '| STEM | - | - | 79.8 | 81.0 |' in text
  average = next(line for line in text.splitlines() if line.startswith('| Average |'))
  assert average.split(' | ')[1:4] == [f'{100 * found["accuracy"]:.1f} [{100 * found["low"]:.1f}, {100 * found["high"]:.1f}]', '50', '74.0']
  assert average.endswith('| all |') and 'the categories of the paper' in text
  del found['paper']
  assert 'the categories of the paper' not in '\n'.join(evaluation.section({'sets': {'polar_rmb': found}}, {}))


def test_the_published_accuracies_are_plausible():
  """Near a coin at worst, and never near certainty; the average of a system is between its categories and weights them by prompts."""
  categories = {name: values for name, values in polar_paper.PUBLISHED.items() if name != polar_paper.AVERAGE}
  assert len(categories) == 12 and all(len(values) == len(polar_paper.SYSTEMS) == 8 for values in polar_paper.PUBLISHED.values())
  assert all(45 < value < 90 for values in polar_paper.PUBLISHED.values() for value in values)
  table = np.array([*categories.values()]).T
  weights, residual = optimize.nnls(table, np.array(polar_paper.PUBLISHED[polar_paper.AVERAGE]))
  assert residual < 0.5 and weights.sum() == pytest.approx(1, abs=0.02)
