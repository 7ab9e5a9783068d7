"""RewardMATH: made rows of its columns, its official rule against loops, and recorded rewards that name problems by their text."""

from __future__ import annotations

import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from polar_jax.evaluate import benchmarks
from polar_jax.evaluate.recorded import Recorded
from polar_jax.types import UserError

RNG = np.random.default_rng(0)


def rows_of(number, right=0, **changes):
  """The ten rows of a problem, of which row `right` is the right solution."""
  row = {'problem': f'p{number}', 'answer': '1', 'subject': ('Algebra', 'Geometry')[number % 2], 'level': 1, 'problem_id': number}
  return [
    row
    | {'eval_solution': [f's{k}', 'end'], 'solution_reference': f'm{k}', 'solution_type': 'chosen' if k == right else 'rejected', 'id': k}
    | changes
    for k in range(10)
  ]


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == '.parquet':
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  else:
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize('file', ['data/test-00000-of-00001.parquet', 'dataset/benchmark/RewardMATH_direct.json'])
def test_rewardmath(tmp_path, file):
  rows = [row for i in range(30) for row in rows_of(i, right=3 if i == 1 else 0)]
  write(tmp_path / 'rewardmath' / file, rows)
  write(tmp_path / 'rewardmath/RewardMATH_pairwise.json', [{'problem': 'p'}])  # is not read
  (one,) = benchmarks.read('rewardmath', tmp_path)
  assert [item.id for item in one.items] == [str(i) for i in range(30)] and one.items[0].candidates[:2] == ('s0\nend', 's1\nend')
  assert one.items[1].comparisons == (((3,), (0, 1, 2, 4, 5, 6, 7, 8, 9)),) and one.items[1].category == 'Geometry'
  assert one.items[1].correct == tuple(k == 3 for k in range(10))
  rewards = [RNG.integers(0, 12, 10).astype(float) for _ in one.items]
  rewards[0], rewards[1] = np.full(10, 2.0), np.eye(10)[3]  # all tied, and right alone
  strict, with_ties, reciprocal = [], [], []
  for i, scores in enumerate(rewards):
    right = scores[3 if i == 1 else 0]
    wrong = [score for k, score in enumerate(scores) if k != (3 if i == 1 else 0)]
    strict.append(all(right > w for w in wrong))
    with_ties.append(all(right >= w for w in wrong))
    ordered = sorted([*((w, 'rejected') for w in wrong), (right, 'chosen')], reverse=True)  # of equal rewards the wrong ones first
    reciprocal.append(1 / (1 + [kind for _, kind in ordered].index('chosen')))
  assert 0 < sum(strict) < sum(with_ties) < 30
  expected = {'accuracy': strict, 'accuracy_with_ties': with_ties, 'mrr': reciprocal}
  assert one.official(one.items, rewards) == pytest.approx({name: 100 * np.mean(values) for name, values in expected.items()})


def test_published_scores_name_a_problem_by_its_text(tmp_path):
  write(tmp_path / 'rewardmath/test.parquet', [row for i in range(3) for row in rows_of(i)])
  (one,) = benchmarks.read('rewardmath', tmp_path)
  scores = RNG.normal(size=(3, 10)).tolist()
  lines = [json.dumps({'id': f'p{i}', 'rewards': scores[i]}) for i in (2, 0, 1)]
  (tmp_path / 'scores.jsonl').write_text('\n'.join(lines))
  ((_, rewards),) = Recorded(tmp_path / 'scores.jsonl').of([one]).values()
  np.testing.assert_array_equal(rewards, scores)


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    (rows_of(7)[:-1], 'example 11: problem .7. has 1 chosen and 8 rejected solutions that can be used, not 1 and 9'),
    ([*rows_of(7)[1:], rows_of(7)[1]], 'example 11: problem .7. has 0 chosen and 10 rejected'),
    ([*rows_of(7)[:-1], rows_of(7, problem='other')[-1]], 'example 11: problem .7. has several texts'),
    (rows_of(7, solution_type='good'), "example 11: solution_type is 'good'; the benchmark has: chosen, rejected"),
    (rows_of(7, eval_solution=[]), 'example 11: eval_solution must be a list of texts that is not empty'),
    (rows_of(7, problem_id=None), 'example 11: problem_id must be an integer or a string, not NoneType'),
    ([{'problem': 'p'}], "example 11: field 'problem_id' is missing"),
  ],
)
def test_bad_problems_are_named_and_can_be_left_out(tmp_path, rows, message):
  write(tmp_path / 'rewardmath/RewardMATH_direct.json', [*rows_of(0), *rows])
  with pytest.raises(UserError, match=rf'RewardMATH_direct\.json, {message}'):
    benchmarks.read('rewardmath', tmp_path)
  (one,) = benchmarks.read('rewardmath', tmp_path, 'skip')
  assert [item.id for item in one.items] == ['0'] and one.skipped[0][0] == 'RewardMATH_direct.json, row 11'


def test_a_folder_without_its_files_is_named(tmp_path):
  write(tmp_path / 'rewardmath/RewardMATH_pairwise.json', rows_of(0))
  with pytest.raises(UserError, match='rewardmath: has no file test'):
    benchmarks.read('rewardmath', tmp_path)
