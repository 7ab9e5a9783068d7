"""Best-of-n: how often the best-scored of n answers is right, against the best and the mean of the same answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from polar_jax.evaluate import sets
from polar_jax.evaluate.sets import Item, Rewards


def curve(items: Sequence[Item], rewards: Rewards) -> dict[str, Any] | None:
  """Return the share of right answers for every n up to the smallest number of candidates, averaged over items.

  Each is the expectation over all subsets of n candidates, not over samples of them. Among equal rewards each is as likely to be taken.

  Args:
    items: those without `correct` are left out.
    rewards: of each item's candidates.

  Returns:
    Lists by n: `n`, `reward` (the best-scored), `oracle` (any right one) and `random` (one drawn); None if no item has `correct`.
  """
  known = [(item, sets.checked_rewards(item, scores)) for item, scores in zip(items, rewards, strict=True) if item.correct is not None]
  if not known:
    return None
  sizes = range(1, min(len(item.candidates) for item, _ in known) + 1)
  best, oracle, drawn = ([0.0] * len(sizes) for _ in range(3))
  for item, scores in known:
    correct = np.array(item.correct, np.float64)
    for at, n in enumerate(sizes):
      best[at] += expected_best(scores, correct, n) / len(known)
      wrong = int((correct == 0).sum())
      oracle[at] += (1 - math.comb(wrong, n) / math.comb(len(correct), n)) / len(known)
      drawn[at] += float(correct.mean()) / len(known)
  return {'n': list(sizes), 'reward': best, 'oracle': oracle, 'random': drawn, 'items': len(known)}


def expected_best(scores: np.ndarray, correct: np.ndarray, n: int) -> float:
  """Return the expected correctness of the best-scored of n candidates drawn without replacement.

  Args:
    scores: (candidates,).
    correct: (candidates,) 1 or 0.
    n: at most the number of candidates.
  """
  total, value = math.comb(len(scores), n), 0.0
  for score in np.unique(scores):
    # The best of a subset has this score if the subset has no higher one, and not only lower ones.
    at_most, below = int((scores <= score).sum()), int((scores < score).sum())
    value += float(correct[scores == score].mean()) * (math.comb(at_most, n) - math.comb(below, n)) / total
  return value
