"""RewardBench 2 (Malik et al. 2025): one right answer of four in five subsets, and Ties, with several right answers.

Outside Ties, a prompt scores 1/n if the right answer is among the n answers with the highest reward, else 0. Ties asks that all right
answers score above all wrong ones, by more than they differ among themselves; see `ties_score`. The headline is the mean of the subsets.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax.data.examples import BadField
from polar_jax.evaluate import sets
from polar_jax.evaluate.benchmarks import published
from polar_jax.evaluate.benchmarks.published import Row
from polar_jax.evaluate.sets import Comparison, EvaluationSet, Item, Rewards
from polar_jax.types import UserError

SUBSETS = ('Factuality', 'Precise IF', 'Math', 'Safety', 'Focus', 'Ties')
_KINDS = ('ref', 'tied')  # of Ties: one right answer, or several


def read(folders: Sequence[pathlib.Path], on_bad_example: str = 'raise') -> list[EvaluationSet]:
  """Read the split `test`; see `polar_jax.evaluate.benchmarks.read`."""
  files = [file for file in published.tables(folders) if file.name.startswith('test')]
  if not files:
    raise UserError(f'{folders[0]}: has no file test*.parquet or test*.jsonl of RewardBench 2')
  skipped: list[tuple[str, str]] = []
  rows = [row for file in files for row in published.rows_of(file)]
  items = published.items_of(rows, _item, on_bad_example, skipped)
  sets.check_unique(items, 'rewardbench_2')
  present = {item.category for item in items}
  return [EvaluationSet('rewardbench_2', items, official, tuple(subset for subset in SUBSETS if subset not in present), tuple(skipped))]


def _item(fields: Mapping[str, Any], _: Row) -> Item:
  chosen, rejected = published.texts(fields, 'chosen'), published.texts(fields, 'rejected')
  subset, name = published.label(fields, 'subset', SUBSETS), str(fields['id'])
  facts: dict[str, Any] = {}
  if subset == 'Ties':
    kind, colon, number = name.partition(':')
    if kind not in _KINDS or not colon or not number:
      raise BadField('id', f'the id of a prompt of Ties must be ref:N or tied:N, not {name!r:.80}')
    facts = {'kind': kind, 'number': number}
  elif len(chosen) != 1:
    raise BadField('chosen', f'chosen has {len(chosen)} answers; only prompts of Ties have more than one right answer')
  right = tuple(range(len(chosen)))
  return Item(
    name,
    published.text(fields, 'prompt'),
    (*chosen, *rejected),
    (Comparison(right, tuple(range(len(chosen), len(chosen) + len(rejected)))),),
    category=subset,
    correct=tuple(i < len(chosen) for i in range(len(chosen) + len(rejected))),
    facts=facts,
  )


def official(items: Sequence[Item], rewards: Rewards) -> dict[str, Any]:
  """Return the score of each subset, and `all`, their mean."""
  values: dict[str, list[float]] = {}
  ties: list[tuple[Item, np.ndarray]] = []
  for item, given in zip(items, rewards, strict=True):
    scores = sets.checked_rewards(item, given)
    if item.category == 'Ties':
      ties.append((item, scores))
    else:
      best = scores == scores.max()
      values.setdefault(item.category, []).append(1 / best.sum() if best[0] else 0.0)
  out = {subset: 100 * float(np.mean(values[subset])) for subset in SUBSETS if subset in values}
  if ties:
    out['Ties'] = 100 * ties_score(ties)
  return out | {'all': float(np.mean([*out.values()]))}


def ties_score(scored: Sequence[tuple[Item, np.ndarray]]) -> float:
  """Return the score of Ties as a fraction, which can slightly exceed 1.

  With the gap between the worst right and the best wrong answer, and the spread of the right ones of a prompt with several: 0.3 times
  the share of gaps above 0 of either kind; 0.2 times the share of prompts whose gap exceeds their spread, and whose gap and that of the
  prompt with one right answer both do; 0.01 times the mean of tanh(smaller gap / spread - 1).

  Args:
    scored: prompts of Ties with their rewards.
  """
  gaps: dict[str, dict[str, float]] = {kind: {} for kind in _KINDS}
  spreads: dict[str, float] = {}
  for item, scores in scored:
    right = np.array(item.correct)
    kind, number = item.facts['kind'], item.facts['number']
    gaps[kind][number] = float(scores[right].min() - scores[~right].max())
    if kind == 'tied':
      spreads[number] = float(scores[right].max() - scores[right].min())
  accuracy = {kind: float(np.mean([gap > 0 for gap in of.values()])) if of else 0.0 for kind, of in gaps.items()}
  both = [number for number in gaps['tied'] if number in gaps['ref']]
  preferred, harder, margin = [], [], []
  for number in both:
    tied, smaller, spread = gaps['tied'][number], min(gaps['tied'][number], gaps['ref'][number]), spreads[number]
    preferred.append(tied > spread)
    harder.append(smaller > spread)
    ratio = smaller / spread if spread else float(np.sign(smaller)) * np.inf if smaller else None
    margin.append(0.0 if ratio is None else float(np.tanh(ratio - 1)))
  parts = [float(np.mean(values)) if values else 0.0 for values in (preferred, harder, margin)]
  return 0.3 * accuracy['tied'] + 0.3 * accuracy['ref'] + 0.2 * parts[0] + 0.2 * parts[1] + 0.01 * parts[2]
