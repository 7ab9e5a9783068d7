"""Best-of-n: how often the best-scored of n answers is right, against other ways to choose among the same answers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from polar_jax.evaluate import sets
from polar_jax.evaluate.sets import Item, Rewards

# Orders of an item's answers, in whose first n the majority votes: the expectation over all subsets has no closed form.
_ORDERS = 200


def curve(items: Sequence[Item], rewards: Rewards, resamples: int = 2_000, seed: int = 0) -> dict[str, Any] | None:
  """Return the share of right answers for every n up to the smallest number of candidates, averaged over items.

  Each but `majority` is the expectation over all subsets of n candidates, not over samples of them. Among equal rewards each is as likely
  to be taken.

  Args:
    items: those without `correct` are left out.
    rewards: of each item's candidates.
    resamples: of the interval, which resamples items.
    seed: of the resampling and of the orders of the votes.

  Returns:
    Lists by n: `n`; `reward`, the best-scored, with its 95% interval `low` and `high`; `oracle`, any right one; `random`, one drawn; and
    `majority`, the most frequent of the final answers, if all items have `answers`. `items` is their number. None if no item has
    `correct`.
  """
  of_rewards = reward_curve(items, rewards, resamples, seed)
  if of_rewards is None:
    return None
  known = [item for item in items if item.correct is not None]
  most = len(of_rewards['reward'])
  correct = [np.array(item.correct, np.float64) for item in known]
  out: dict[str, Any] = {
    'n': list(range(1, most + 1)),
    **of_rewards,
    'oracle': np.mean([_oracle(c)[:most] for c in correct], axis=0).tolist(),
    'random': [float(np.mean([c.mean() for c in correct]))] * most,
    'items': len(known),
  }
  if all(item.answers is not None for item in known):
    rng = np.random.default_rng(seed)
    votes = [majority(item.answers or (), c, rng)[:most] for item, c in zip(known, correct, strict=True)]
    out['majority'] = np.mean(votes, axis=0).tolist()
  return out


def reward_curve(items: Sequence[Item], rewards: Rewards, resamples: int = 2_000, seed: int = 0) -> dict[str, list[float]] | None:
  """Return `reward`, `low` and `high` of `curve`, whose arguments these are: all of it that depends on the rewards."""
  known = [(item, sets.checked_rewards(item, scores)) for item, scores in zip(items, rewards, strict=True) if item.correct is not None]
  if not known:
    return None
  most = min(len(item.candidates) for item, _ in known)
  reward_IN = np.array([expected_best(scores, np.array(item.correct, np.float64))[:most] for item, scores in known])
  low_N, high_N = _interval(reward_IN, resamples, seed)
  return {'reward': reward_IN.mean(axis=0).tolist(), 'low': low_N.tolist(), 'high': high_N.tolist()}


def expected_best(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
  """Return the expected correctness of the best-scored of n candidates drawn without replacement, for n = 1 to all of them.

  Args:
    scores: (candidates,).
    correct: (candidates,) 1 or 0.
  """
  _, group = np.unique(scores, return_inverse=True)
  sizes = np.bincount(group)
  at_most = np.cumsum(sizes)  # candidates with this score or a lower one
  # The best of a subset has this score if the subset has no higher one, and not only lower ones.
  within = _within(len(scores))
  return (np.bincount(group, correct) / sizes) @ (within[at_most] - within[at_most - sizes])


def majority(answers: Sequence[str | None], correct: np.ndarray, rng: np.random.Generator, orders: int = _ORDERS) -> np.ndarray:
  """Return how often the most frequent final answer of n candidates is right, for n = 1 to all of them, over random orders.

  The first and the last are exact. Several answers with the most votes are taken alike.

  Args:
    answers: of each candidate; None, for a candidate without one, gets no vote.
    correct: (candidates,) 1 or 0. Of equal answers that are not judged alike, the vote counts as the share that are right.
    rng: draws the orders.
    orders: their number.
  """
  names = sorted({answer for answer in answers if answer is not None})
  if not names:
    return np.zeros(len(answers))
  one_hot_CA = np.array([[answer == name for name in names] for answer in answers], np.float64)
  order_OC = np.argsort(rng.random((orders, len(answers))), axis=1)
  votes_OCA = np.cumsum(one_hot_CA[order_OC], axis=1)
  right_OCA = np.cumsum((one_hot_CA * correct[:, None])[order_OC], axis=1)
  top_OCA = (votes_OCA == votes_OCA.max(axis=2, keepdims=True)) & (votes_OCA > 0)
  share_OCA = np.where(top_OCA, right_OCA / np.maximum(votes_OCA, 1), 0.0)
  out = (share_OCA.sum(axis=2) / np.maximum(top_OCA.sum(axis=2), 1)).mean(axis=0)
  out[0] = float((one_hot_CA.sum(axis=1) * correct).mean())
  return out


def _oracle(correct: np.ndarray) -> np.ndarray:
  return 1 - _within(len(correct))[int((correct == 0).sum())]


@functools.cache
def _within(count: int) -> np.ndarray:
  """Return [m, n - 1]: the probability that n of `count` candidates, drawn without replacement, are all among m given ones."""
  return np.array([[math.comb(m, n) / math.comb(count, n) for n in range(1, count + 1)] for m in range(count + 1)])


def _interval(values_IN: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Return the 95% percentile interval of means over items, for each column; 0 to 1 for a single item."""
  count = len(values_IN)
  if count == 1:
    return np.zeros(values_IN.shape[1]), np.ones(values_IN.shape[1])
  weights_RI = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
  low, high = np.quantile(weights_RI @ values_IN / count, (0.025, 0.975), axis=0)
  return low, high
