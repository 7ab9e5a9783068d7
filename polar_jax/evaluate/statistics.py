"""Accuracies with 95% bootstrap intervals, and paired differences between two scorers of the same rows.

Rows that share a policy or a prompt are not independent, so an interval over rows would be too narrow. When `groups` is
given, whole groups are resampled (cluster bootstrap). Only the totals of a resample matter, never which row they came from:
groups with equal (sum, size) are pooled and a resample is one multinomial draw over the distinct pairs. For independent
rows with values in {0, .5, 1} that is a draw over three counts, whatever the number of rows.
"""

from __future__ import annotations

import dataclasses

import numpy as np

LEVEL = 0.95
_CHUNK = 2_000_000  # multinomial counts held at once


@dataclasses.dataclass(frozen=True)
class Interval:
  """Mean accuracy over `n` rows and its 95% interval, all as fractions."""

  accuracy: float
  low: float
  high: float
  n: int

  def asdict(self) -> dict[str, float | int]:
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Difference:
  """Mean difference in accuracy over the same `n` rows and its 95% interval, as fractions; positive favours the first."""

  difference: float
  low: float
  high: float
  n: int

  def asdict(self) -> dict[str, float | int]:
    return dataclasses.asdict(self)


def pair_correct(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
  """1 where `chosen` scores higher, .5 where the scores are equal, 0 elsewhere.

  Args:
    chosen: (rows,) scores; -inf is a score like any other.
    rejected: (rows,) scores.

  Returns:
    (rows,) float64.

  Raises:
    ValueError: on different shapes, or a NaN, which would otherwise pass for a wrong answer.
  """
  chosen, rejected = np.asarray(chosen), np.asarray(rejected)
  if chosen.shape != rejected.shape or chosen.ndim != 1:
    raise ValueError(f'scores of chosen {chosen.shape} and rejected {rejected.shape} must be two vectors of one length')
  bad = np.flatnonzero(np.isnan(chosen) | np.isnan(rejected))
  if bad.size:
    raise ValueError(f'row {bad[0]}: a score is NaN (chosen {chosen[bad[0]]}, rejected {rejected[bad[0]]}; {bad.size} such rows)')
  return np.where(chosen > rejected, 1.0, np.where(chosen == rejected, 0.5, 0.0))


def accuracy_interval(correct: np.ndarray, groups: np.ndarray | None = None, resamples: int = 2_000, seed: int = 0) -> Interval:
  """Mean of `correct` with a 95% percentile bootstrap interval.

  A single group (or row) says nothing about the spread, so its interval is [0, 1]. When every value is equal the bootstrap
  cannot see the spread either, and the interval has no width.

  Args:
    correct: (rows,) values in {0, .5, 1}; ties count half.
    groups: (rows,) integers, equal for rows that are not independent; None: every row is.
    resamples: bootstrap samples.
    seed: of the resampling.

  Raises:
    ValueError: on no rows, another value, or another shape.
  """
  correct = _checked(correct, 'correct')
  mean, low, high = _bootstrap(correct, groups, resamples, seed, (0.0, 1.0))
  return Interval(mean, low, high, correct.size)


def paired_difference(a: np.ndarray, b: np.ndarray, groups: np.ndarray | None = None, resamples: int = 2_000, seed: int = 0) -> Difference:
  """Mean of `a - b` with a 95% percentile bootstrap interval; rows are resampled together, so what they share cancels.

  Args:
    a: (rows,) values in {0, .5, 1}.
    b: (rows,) values in {0, .5, 1} for the same rows.
    groups: as in `accuracy_interval`.
    resamples: bootstrap samples.
    seed: of the resampling.

  Raises:
    ValueError: on no rows, another value, or different shapes.
  """
  a, b = _checked(a, 'a'), _checked(b, 'b')
  if a.shape != b.shape:
    raise ValueError(f'a has {a.size} rows and b {b.size}; a paired difference needs the same rows')
  mean, low, high = _bootstrap(a - b, groups, resamples, seed, (-1.0, 1.0))
  return Difference(mean, low, high, a.size)


def _checked(values: np.ndarray, name: str) -> np.ndarray:
  values = np.asarray(values, dtype=np.float64)
  if values.ndim != 1 or not values.size:
    raise ValueError(f'{name} has shape {values.shape}; it must be a vector of at least one row')
  bad = np.flatnonzero(~np.isin(values, (0.0, 0.5, 1.0)))
  if bad.size:
    raise ValueError(f'{name}, row {bad[0]}: {values[bad[0]]} is none of 0, 0.5 (tie), 1 ({bad.size} such rows)')
  return values


def _bootstrap(
  values: np.ndarray, groups: np.ndarray | None, resamples: int, seed: int, limits: tuple[float, float]
) -> tuple[float, float, float]:
  """(mean, low, high) of the ratio (sum of values) / (number of rows) over resampled groups."""
  if resamples < 1:
    raise ValueError(f'resamples is {resamples}; it must be >= 1')
  mean = float(values.mean())
  if groups is None:
    sums, sizes = values, np.ones_like(values)
  else:
    groups = np.asarray(groups)
    if groups.shape != values.shape:
      raise ValueError(f'groups has shape {groups.shape}; it must have one entry for each of the {values.size} rows')
    if not np.issubdtype(groups.dtype, np.integer):
      raise ValueError(f'groups must be integers, not {groups.dtype}')
    index = np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.bincount(index, weights=values), np.bincount(index).astype(np.float64)
  if sums.size == 1:
    return mean, *limits
  kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
  rng = np.random.default_rng(seed)
  chunk = max(1, _CHUNK // len(kinds))
  means = []
  for start in range(0, resamples, chunk):
    drawn = rng.multinomial(sums.size, counts / sums.size, size=min(chunk, resamples - start))
    totals = drawn @ kinds
    means.append(totals[:, 0] / totals[:, 1])
  low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return mean, float(low), float(high)
