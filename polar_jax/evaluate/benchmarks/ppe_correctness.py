"""The correctness half of PPE (Frick et al. 2024): 32 answers of one model to a prompt, each known to be right or wrong.

`accuracy` is over the listed pairs of a right and a wrong answer; a tie is wrong. `auc` is the area under the ROC curve of rewards against
correctness, averaged over prompts that have both. `best_of_k` is the share of right answers among the best-scored of K, for K up to 32, in
expectation over all subsets; of it the maximum and the end are reported.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from polar_jax.data.examples import BadField
from polar_jax.evaluate import best_of_n, sets
from polar_jax.evaluate.benchmarks import published
from polar_jax.evaluate.benchmarks.published import Row
from polar_jax.evaluate.sets import Comparison, EvaluationSet, Item, Rewards
from polar_jax.types import UserError

# Name in the path of a file -> category.
SOURCES = {'mmlu-pro': 'MMLU-Pro', 'math': 'MATH', 'gpqa': 'GPQA', 'ifeval': 'IFEval', 'mbpp-plus': 'MBPP-Plus'}
_REPOSITORY = re.compile(r'PPE-([\w-]+)-Best-of-K')
_ANSWERS = 32


def read(folders: Sequence[pathlib.Path], on_bad_example: str = 'raise') -> list[EvaluationSet]:
  """Read the five sources from files whose path below `folder` names them; see `polar_jax.evaluate.benchmarks.read`."""
  found = {file: source for folder in folders for file in published.tables([folder]) if (source := _source(file, folder))}
  if not found:
    raise UserError(f'{folders[0]}: has no .parquet or .jsonl file with {", ".join(SOURCES.values())} in its path')
  skipped: list[tuple[str, str]] = []
  rows = [row for file in found for row in published.rows_of(file)]
  items = published.items_of(rows, lambda fields, row: _item(fields, row, found[row.file]), on_bad_example, skipped)
  sets.check_unique(items, 'ppe_correctness')
  missing = tuple(source for source in SOURCES.values() if source not in found.values())
  return [EvaluationSet('ppe_correctness', items, official, missing, tuple(skipped))]


def _source(file: pathlib.Path, folder: pathlib.Path) -> str | None:
  """Return the source that the path of a file below `folder` names, or the hub's repository that the folder is a copy of."""
  repository = _REPOSITORY.search(str(folder))
  for path in (str(file.relative_to(folder)), repository.group(1) if repository else ''):
    if source := next((source for name, source in SOURCES.items() if name in path.lower()), None):
      return source
  return None


def _item(fields: Mapping[str, Any], row: Row, source: str) -> Item:
  answers = [fields[f'response_{i}'] for i in range(1, _ANSWERS + 1)]
  if not all(isinstance(answer, str) for answer in answers):
    raise BadField('response_1', f'response_1 to response_{_ANSWERS} must be texts')
  correct = fields['scores']
  if not isinstance(correct, list) or len(correct) != _ANSWERS or not all(value in (0, 1) for value in correct):
    raise BadField('scores', f'scores must be a list of {_ANSWERS} true or false')
  comparisons = []
  for pair in fields['sampled_conflict_pairs']:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(i, int) and 0 <= i < _ANSWERS for i in pair):
      raise BadField(
        'sampled_conflict_pairs', f'sampled_conflict_pairs must be pairs of numbers from 0 to {_ANSWERS - 1}, not {pair!r:.80}'
      )
    first, second = pair if correct[pair[0]] else pair[::-1]
    if not correct[first] or correct[second]:
      raise BadField('sampled_conflict_pairs', f'sampled_conflict_pairs: {pair!r:.80} are not a right and a wrong answer')
    comparisons.append(Comparison((first,), (second,)))
  if not comparisons:
    raise BadField('sampled_conflict_pairs', 'sampled_conflict_pairs is empty')
  name = str(fields.get('question_id', row.number))
  return Item(
    f'{source}/{name}',
    published.text(fields, 'prompt'),
    tuple(answers),
    tuple(comparisons),
    category=source,
    correct=tuple(map(bool, correct)),
    facts={'bare_id': name, 'model': str(fields.get('model_name', ''))},
  )


def official(items: Sequence[Item], rewards: Rewards) -> dict[str, Any]:
  """Return `accuracy`, `auc` and `best_of_k` (its maximum and end) by source, and their means over sources."""
  by_source: dict[str, dict[str, float]] = {}
  for source in SOURCES.values():
    own = [(item, sets.checked_rewards(item, given)) for item, given in zip(items, rewards, strict=True) if item.category == source]
    if own:
      chosen, scores = [item for item, _ in own], [values for _, values in own]
      curve = best_of_n.curve(chosen, scores)
      areas = [_auc(values, np.array(item.correct)) for item, values in own if 0 < sum(item.correct or ()) < len(item.candidates)]
      by_source[source] = {
        'accuracy': 100 * float((sets.margins(chosen, scores).margin > 0).mean()),
        'auc': 100 * float(np.mean(areas)) if areas else 0.0,
        'best_of_k_max': 100 * max(curve['reward']) if curve else 0.0,
        'best_of_k_end': 100 * curve['reward'][-1] if curve else 0.0,
      }
  means = {key: float(np.mean([of[key] for of in by_source.values()])) for key in next(iter(by_source.values()))} if by_source else {}
  return means | {'by_source': by_source}


def _auc(scores: np.ndarray, correct: np.ndarray) -> float:
  """Return the probability that a right answer scores above a wrong one, a tie counting half."""
  ranks = stats.rankdata(scores)
  right, wrong = int(correct.sum()), int((~correct).sum())
  return float((ranks[correct].sum() - right * (right + 1) / 2) / (right * wrong))
