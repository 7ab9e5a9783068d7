"""How far rewards of the same candidates are from each other. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Comparison(NamedTuple):
  """Rewards of one way against those of the reference.

  Attributes:
    compared: number of rewards.
    max_difference: largest absolute difference.
    mean_difference: mean absolute difference.
    same_bits: all rewards are equal as float32.
    flips: pairs of candidates of a group that the two rank in opposite orders, ties aside.
    pairs: pairs of candidates of a group.
    squashed: the rewards are those of the reference after a sigmoid.
  """

  compared: int
  max_difference: float
  mean_difference: float
  same_bits: bool
  flips: int
  pairs: int
  squashed: bool


def compare(reference: Sequence[np.ndarray], rewards: Sequence[np.ndarray], tolerance: float) -> Comparison:
  """Compare rewards, group by group.

  Args:
    reference: float32 (candidates,) for each group; at least one reward in all.
    rewards: the same groups, computed in another way.
    tolerance: of the test for a sigmoid.
  """
  a, b = (np.concatenate([np.asarray(group, np.float32) for group in groups]) for groups in (reference, rewards))
  difference = np.abs(a.astype(np.float64) - b)
  flips = pairs = 0
  for first, second in zip(reference, rewards, strict=True):
    upper = np.triu_indices(len(first), 1)
    orders = [np.sign(np.subtract.outer(np.asarray(group, np.float64), group))[upper] for group in (first, second)]
    flips += int((orders[0] * orders[1] < 0).sum())
    pairs += len(upper[0])
  squashed = np.abs(1 / (1 + np.exp(-a.astype(np.float64))) - b).max() <= tolerance < difference.max()
  return Comparison(len(a), float(difference.max()), float(difference.mean()), bool((a == b).all()), flips, pairs, bool(squashed))


def as_json(comparison: Comparison) -> dict[str, Any]:
  """Return a comparison as a JSON object."""
  return comparison._asdict()
