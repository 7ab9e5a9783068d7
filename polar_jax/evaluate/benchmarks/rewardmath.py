"""RewardMATH (Kim et al. 2024): a right and nine wrong solutions of each of 483 problems of MATH-500, one row for each solution.

`accuracy` is the share of problems whose right solution scores above all wrong ones, `accuracy_with_ties` of those where none of these
scores above it. `mrr` is the mean of 1 / rank of the right solution, which ranks behind the wrong ones with the same reward. The steps of a
solution are joined by newlines, as published classifiers read them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polar_jax.data import readers
from polar_jax.data.examples import BadField
from polar_jax.evaluate import sets
from polar_jax.evaluate.benchmarks import published
from polar_jax.evaluate.benchmarks.published import Row
from polar_jax.evaluate.sets import Comparison, EvaluationSet, Item, Rewards
from polar_jax.types import UserError

_WRONG = 9
# The hub's split, and the file of the repository that shows some problems. The other files there are pairs, and RewardBench's problems.
_NAMES = ('test', 'RewardMATH_direct')


class _Solution(NamedTuple):
  """A row of the published file."""

  problem_id: str
  problem: str
  text: str
  right: bool
  subject: str
  row: Row


def read(folders: Sequence[pathlib.Path], on_bad_example: str = 'raise') -> list[EvaluationSet]:
  """Read the problems; see `polar_jax.evaluate.benchmarks.read`."""
  files = [file for file in published.tables(folders, (*readers.SUFFIXES, '.json')) if file.name.startswith(_NAMES)]
  if not files:
    raise UserError(f'{folders[0]}: has no file test*.parquet, test*.jsonl or RewardMATH_direct.json of RewardMATH')
  skipped: list[tuple[str, str]] = []
  rows = [row for file in files for row in published.rows_of(file)]
  by_problem: dict[str, list[_Solution]] = {}
  for solution in published.items_of(rows, _solution, on_bad_example, skipped):
    by_problem.setdefault(solution.problem_id, []).append(solution)
  first = [solutions[0].row for solutions in by_problem.values()]
  items = published.items_of(first, lambda fields, _: _item(by_problem[str(fields['problem_id'])]), on_bad_example, skipped)
  return [EvaluationSet('rewardmath', items, official, skipped=tuple(skipped))]


def _solution(fields: Mapping[str, Any], row: Row) -> _Solution:
  name = fields['problem_id']
  if isinstance(name, bool) or not isinstance(name, (str, int)):
    raise BadField('problem_id', f'problem_id must be an integer or a string, not {type(name).__name__}')
  return _Solution(
    str(name),
    published.text(fields, 'problem'),
    '\n'.join(published.texts(fields, 'eval_solution')),
    published.label(fields, 'solution_type', ('chosen', 'rejected')) == 'chosen',
    str(fields.get('subject') or ''),
    row,
  )


def _item(solutions: Sequence[_Solution]) -> Item:
  """Return a problem with its solutions, in the order of the rows, which is that of published scores."""
  right, wrong = (tuple(i for i, solution in enumerate(solutions) if solution.right is side) for side in (True, False))
  name, problem = solutions[0].problem_id, solutions[0].problem
  if len(right) != 1 or len(wrong) != _WRONG:
    counts = f'{len(right)} chosen and {len(wrong)} rejected solutions that can be used'
    raise BadField('solution_type', f'problem {name!r:.80} has {counts}, not 1 and {_WRONG}')
  if any(solution.problem != problem for solution in solutions):
    raise BadField('problem', f'problem {name!r:.80} has several texts')
  return Item(
    name,
    problem,
    tuple(solution.text for solution in solutions),
    (Comparison(right, wrong),),
    category=solutions[0].subject,
    correct=tuple(solution.right for solution in solutions),
    facts={'bare_id': problem},  # published scores name a problem by its text
  )


def official(items: Sequence[Item], rewards: Rewards) -> dict[str, float]:
  """Return `accuracy`, `accuracy_with_ties` and `mrr`."""
  ranks = []
  for item, given in zip(items, rewards, strict=True):
    scores, ((right,), wrong) = sets.checked_rewards(item, given), item.comparisons[0]
    ranks.append((1 + (scores[list(wrong)] >= scores[right]).sum(), 1 + (scores[list(wrong)] > scores[right]).sum()))
  rank, with_ties = np.array(ranks).T
  return {
    'accuracy': 100 * float((rank == 1).mean()),
    'accuracy_with_ties': 100 * float((with_ties == 1).mean()),
    'mrr': 100 * float((1 / rank).mean()),
  }
