"""Best-of-n: how often the best-scored of n answers is right, against other ways to choose among the same answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from polar_jax.evaluate import sets
from polar_jax.evaluate.sets import Item, Rewards

# Subsets of an item's answers of each size that the majority votes in: its expectation over all of them has no closed form.
_VOTES = 200


def curve(items: Sequence[Item], rewards: Rewards, resamples: int = 2_000, seed: int = 0) -> dict[str, Any] | None:
  """Return the share of right answers for every n up to the smallest number of candidates, averaged over items.

  Each but `majority` is the expectation over all subsets of n candidates, not over samples of them. Among equal rewards each is as likely
  to be taken.

  Args:
    items: those without `correct` are left out.
    rewards: of each item's candidates.
    resamples: of the interval, which resamples items.
    seed: of the resampling and of the votes.

  Returns:
    Lists by n: `n`; `reward`, the best-scored, with its 95% interval `low` and `high`; `oracle`, any right one; `random`, one drawn; and
    `majority`, the most frequent of the final answers, if all items have `answers`. `items` is their number. None if no item has
    `correct`.
  """
  known = [(item, sets.checked_rewards(item, scores)) for item, scores in zip(items, rewards, strict=True) if item.correct is not None]
  if not known:
    return None
  sizes = range(1, min(len(item.candidates) for item, _ in known) + 1)
  correct = [np.array(item.correct, np.float64) for item, _ in known]
  reward = np.array([[expected_best(scores, c, n) for n in sizes] for (_, scores), c in zip(known, correct, strict=True)])
  low, high = _interval(reward, resamples, seed)
  out = {
    'n': list(sizes),
    'reward': reward.mean(axis=0).tolist(),
    'low': low.tolist(),
    'high': high.tolist(),
    'oracle': [float(np.mean([_oracle(c, n) for c in correct])) for n in sizes],
    'random': [float(np.mean([c.mean() for c in correct]))] * len(sizes),
    'items': len(known),
  }
  if all(item.answers is not None for item, _ in known):
    rng = np.random.default_rng(seed)
    votes = [[majority(item.answers or (), c, n, rng) for n in sizes] for (item, _), c in zip(known, correct, strict=True)]
    out['majority'] = np.mean(votes, axis=0).tolist()
  return out


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


def majority(answers: Sequence[str | None], correct: np.ndarray, n: int, rng: np.random.Generator, draws: int = _VOTES) -> float:
  """Return how often the most frequent final answer of n candidates is right, over subsets that are drawn without replacement.

  Args:
    answers: of each candidate; None, for a candidate without one, gets no vote.
    correct: (candidates,) 1 or 0. Of equal answers that are not judged alike, the vote counts as the share that are right.
    n: size of the subsets.
    rng: draws them.
    draws: their number; all of size 1 and the whole are computed once.
  """
  names = sorted({answer for answer in answers if answer is not None})
  if not names:
    return 0.0
  one_hot = np.array([[answer == name for name in names] for answer in answers], np.float64)
  if n == len(answers):
    subsets = [np.arange(n)]
  elif n == 1:
    subsets = [np.array([i]) for i in range(len(answers))]
  else:
    subsets = list(np.argsort(rng.random((draws, len(answers))), axis=1)[:, :n])
  total = 0.0
  for subset in subsets:
    counts, right = one_hot[subset].sum(axis=0), one_hot[subset].T @ correct[subset]
    if counts.max() > 0:  # several answers with the most votes are taken alike
      top = counts == counts.max()
      total += float(np.mean(right[top] / counts[top]))
  return total / len(subsets)


def _oracle(correct: np.ndarray, n: int) -> float:
  wrong = int((correct == 0).sum())
  return 1 - math.comb(wrong, n) / math.comb(len(correct), n)


def _interval(values_IN: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Return the 95% percentile interval of means over items, for each column; 0 to 1 for a single item."""
  count = len(values_IN)
  if count == 1:
    return np.zeros(values_IN.shape[1]), np.ones(values_IN.shape[1])
  weights_RI = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
  low, high = np.quantile(weights_RI @ values_IN / count, (0.025, 0.975), axis=0)
  return low, high
