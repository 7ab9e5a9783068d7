"""The official rules of RewardBench 1 and 2 against the package `rewardbench`, on the same rewards of the same rows."""

from __future__ import annotations

import itertools
import json
import logging

import numpy as np
import pytest

from polar_jax.evaluate import benchmarks
from polar_jax.evaluate.benchmarks import rewardbench, rewardbench_2

pytestmark = [pytest.mark.needs('rewardbench'), pytest.mark.slow]


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(map(json.dumps, rows)))


@pytest.mark.parametrize('seed', range(5))
def test_rewardbench(tmp_path, seed):
  """Every subset, with two to twenty pairs; one seed leaves out a whole section, another one some subsets."""
  from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
  from rewardbench.utils import calculate_scores_per_section

  rng = np.random.default_rng(seed)
  subsets = {0: [*EXAMPLE_COUNTS], 1: [s for s in EXAMPLE_COUNTS if s not in SUBSET_MAPPING['Safety']]}.get(seed)
  subsets = subsets or rng.permutation([*EXAMPLE_COUNTS])[: 23 - 3 * seed].tolist()
  rows = [{'prompt': 'p', 'chosen': 'c', 'rejected': 'r', 'subset': str(s)} for s in subsets for _ in range(rng.integers(2, 21))]
  rows = [{**row, 'id': i} for i, row in enumerate(rows)]
  write(tmp_path / 'rewardbench/filtered.jsonl', rows)
  (one,) = benchmarks.read('rewardbench', tmp_path)
  rewards = [rng.integers(0, 4, 2).astype(float) for _ in one.items]
  # As its command computes the accuracy of a subset.
  right = {s: [int(a > b) for (a, b), row in zip(rewards, rows, strict=True) if row['subset'] == s] for s in subsets}
  accuracies = {s: sum(values) / len(values) for s, values in right.items()}
  sections = calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, accuracies)
  found = one.official(one.items, rewards)
  assert found['by_subset'] == pytest.approx({s: 100 * value for s, value in accuracies.items()}, abs=1e-9)
  for name, expected in sections.items():  # of a section without pairs the package says 0
    assert found.get(name.lower().replace(' ', '_'), 0) == pytest.approx(100 * expected, abs=1e-9)
  assert {name: {s: EXAMPLE_COUNTS[s] for s in of} for name, of in SUBSET_MAPPING.items()} == dict(
    zip(SUBSET_MAPPING, rewardbench.SECTIONS.values(), strict=True)
  )


def choice(subset, name, right, wrong):
  counts = {'num_correct': right, 'num_incorrect': wrong, 'total_completions': right + wrong}
  return {
    'id': name,
    'prompt': 'p',
    'chosen': [f'c{i}' for i in range(right)],
    'rejected': [f'r{i}' for i in range(wrong)],
    'subset': subset,
    **counts,
  }


def of_package(folder, rewards):
  """Return the scores by subset, through the package's own reading, regrouping and scoring."""
  import rewardbench as package
  from datasets import Dataset

  rows, subsets, total, num_correct = package.load_bon_dataset_v2(
    str(folder / 'rewardbench_2/test.jsonl'), custom_dialogue_formatting=True, logger=logging.getLogger('rewardbench')
  )
  columns = {'text': [json.dumps(text) for text in rows['text']], 'id': rows['id'], 'subset': list(subsets)}
  scored = Dataset.from_dict({**columns, 'scores': np.concatenate(rewards).tolist()})
  scored = package.reroll_and_score_dataset(scored, list(total)).add_column('num_correct', list(num_correct))
  out = {}
  for subset in sorted(set(subsets)):
    own = scored.filter(lambda row, subset=subset: row['subset'] == subset)
    out[subset] = package.process_single_model(own)[1] if subset == 'Ties' else float(np.mean(own['results']))
  return out


@pytest.mark.parametrize('seed', range(4))
def test_rewardbench_2(tmp_path, seed):
  """Every subset; rewards are small integers, so that there are ties of any number of answers, outside Ties too."""
  rng = np.random.default_rng(seed)
  rows = [choice(s, f'{s}{i}', 1, 3) for s in rewardbench_2.SUBSETS if s != 'Ties' for i in range(12)]
  for i, kind in itertools.product(range(15), ('ref', 'tied')):
    if (i, kind) != (7, 'ref'):  # counts for the accuracy alone
      rows.append(choice('Ties', f'{kind}:{i}', 1 if kind == 'ref' else 2 + i % 4, 2 + i % 5))
  write(tmp_path / 'rewardbench_2/test.jsonl', rows)
  (one,) = benchmarks.read('rewardbench_2', tmp_path)
  rewards = [rng.integers(0, 4, len(item.candidates)).astype(float) for item in one.items]
  for item, values in zip(one.items, rewards, strict=True):
    if item.category == 'Ties':
      values += 3 * np.array(item.correct) * rng.integers(0, 2)
      if item.facts['kind'] == 'tied':  # see the test below
        values[0] = values[1] + 0.5
  found = one.official(one.items, rewards)
  expected = of_package(tmp_path, rewards)
  assert {s: found[s] for s in rewardbench_2.SUBSETS} == pytest.approx({s: 100 * expected[s] for s in rewardbench_2.SUBSETS}, abs=1e-9)
  assert found['all'] == pytest.approx(100 * np.mean([*expected.values()]))


def test_right_answers_of_equal_reward(tmp_path):
  """Version 0.1.4 leaves such prompts out of the margin, the last part of the score of Ties; its repository, as we do, takes its limit."""
  rows = [choice('Ties', f'{kind}:{i}', 1 if kind == 'ref' else 2, 2) for i in range(3) for kind in ('ref', 'tied')]
  write(tmp_path / 'rewardbench_2/test.jsonl', rows)
  (one,) = benchmarks.read('rewardbench_2', tmp_path)
  # Margins of 1 and 2 over a spread of 1, and of 1 over none.
  rewards = [[2, 1, 0], [3, 2, 1, 0], [3, 1, 0], [4, 3, 1, 0], [2, 1, 0], [2, 2, 1, 0]]
  rewards = [np.array(values, float) for values in rewards]
  found, expected = one.official(one.items, rewards)['Ties'], 100 * of_package(tmp_path, rewards)['Ties']
  margins = [np.tanh(1 / 1 - 1), np.tanh(2 / 1 - 1), 1.0]
  assert found - expected == pytest.approx(np.mean(margins) - np.mean(margins[:2]))
