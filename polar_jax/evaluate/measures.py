"""Accuracy of rewards on an evaluation set: with its interval, by category and length, under every rule for ties, and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from polar_jax.evaluate import sets, statistics
from polar_jax.evaluate.clusters import Clusters
from polar_jax.evaluate.sets import Item, Rewards

_BINS = 10
_TIE_RULES = {'wrong': 0.0, 'half': 0.5, 'right': 1.0}


def measure(items: Sequence[Item], rewards: Rewards, resamples: int = 2_000) -> dict[str, Any]:
  """Return what evaluation.json says of a set, apart from baselines, references and the official score.

  Accuracies are fractions of comparisons; a tie counts half. Intervals resample policies where they are known, else prompts.

  Args:
    items: of the set.
    rewards: of each item's candidates.
    resamples: of the bootstrap.

  Returns:
    `accuracy`, `low`, `high`, `n`, `clusters`, `clustered_by`; `items`; `ties`; `tie_rules` if there are ties; `category_mean`, the
    mean over categories; `by_category`, `by_length`, `calibration`.

  Raises:
    UserError: the rewards do not fit the items.
  """
  found = sets.margins(items, rewards)
  correct = correctness(found.margin)
  clusters = sets.clusters(items, found.item)
  ties = int((found.margin == 0).sum())
  categories = np.array([items[i].category or 'none' for i in found.item])
  by_category = {name: _interval(correct, clusters, categories == name, resamples) for name in sorted(set(categories.tolist()))}
  out: dict[str, Any] = {**statistics.accuracy_interval(correct, clusters, resamples).asdict(), 'items': len(items), 'ties': ties}
  if ties:
    out['tie_rules'] = {rule: float(np.mean(np.where(found.margin == 0, value, correct))) for rule, value in _TIE_RULES.items()}
  return out | {
    'category_mean': float(np.mean([interval['accuracy'] for interval in by_category.values()])),
    'by_category': by_category,
    'by_length': {
      name: _interval(correct, clusters, mask, resamples) for name, mask in _by_length(sets.length_differences(items)).items() if mask.any()
    },
    'calibration': calibration(found.margin),
  }


def compare(first: np.ndarray, second: np.ndarray, clusters: Clusters, resamples: int = 2_000) -> dict[str, Any]:
  """Compare two systems on the same comparisons.

  Args:
    first: (comparisons,) margins of the first system.
    second: (comparisons,) those of the second.
    clusters: of the comparisons.
    resamples: of the bootstrap.

  Returns:
    `difference` of accuracies with `low` and `high`, positive in favor of the first; `mcnemar`: how many comparisons hold for the first
    only and the second only, leaving out those that are a tie of either, and the exact two-sided p-value, which takes them as independent.
  """
  a, b = correctness(first), correctness(second)
  only_first, only_second = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
  p = float(stats.binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0
  return statistics.paired_difference(a, b, clusters, resamples).asdict() | {
    'mcnemar': {'only_first': only_first, 'only_second': only_second, 'p': p}
  }


def correctness(margin: np.ndarray) -> np.ndarray:
  """Return 1 for a positive margin, .5 for a tie and 0 for a negative one."""
  return statistics.pair_correct(margin, np.zeros_like(margin))


def _by_length(longer: np.ndarray) -> dict[str, np.ndarray]:
  """Return which comparisons have a better answer that is longer, as long or shorter."""
  return {'better_is_longer': longer > 0, 'as_long': longer == 0, 'better_is_shorter': longer < 0}


def _interval(correct: np.ndarray, clusters: Clusters, mask: np.ndarray, resamples: int) -> dict[str, Any]:
  return statistics.accuracy_interval(correct[mask], clusters.select(mask), resamples).asdict()


def calibration(margin: np.ndarray) -> dict[str, Any]:
  """Return how well margins predict which answer is better, read as log odds (Bradley-Terry, equations 7 and 8 of the paper).

  Args:
    margin: (comparisons,) reward of the better answer minus that of the worse one.

  Returns:
    `log_loss` in nats and `brier` of the probability given to the better answer; `ece`, the expected calibration error of the
    confidence in the preferred answer over bins of equal counts; `bins` with `confidence`, `accuracy` and `n`.
  """
  confidence = 1 / (1 + np.exp(-np.abs(margin)))
  correct = correctness(margin)
  better = 1 / (1 + np.exp(-np.clip(margin, -500, 500)))
  order = np.argsort(confidence, kind='stable')
  bins = [part for part in np.array_split(order, min(_BINS, len(order))) if part.size]
  rows = [{'confidence': float(confidence[part].mean()), 'accuracy': float(correct[part].mean()), 'n': len(part)} for part in bins]
  error = sum(row['n'] * abs(row['confidence'] - row['accuracy']) for row in rows) / max(len(margin), 1)
  return {
    'log_loss': float(np.mean(np.logaddexp(0, -margin))),
    'brier': float(np.mean((1 - better) ** 2)),
    'ece': float(error),
    'bins': rows,
  }
