"""Accuracies with 95% bootstrap intervals, and paired differences between two scorers of the same examples.

Examples that share a policy or a prompt are not independent, so an interval that resamples examples would be too narrow. Given
`clusters`, whole clusters are resampled instead (cluster bootstrap). Only the totals of a resample matter, not which examples they
came from: clusters with equal (sum, size) are pooled, and a resample is one multinomial draw over the distinct pairs. For independent
examples with values in {0, .5, 1} that is a draw over three counts, however many examples there are.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from polar_jax.evaluate.clusters import Clusters

LEVEL = 0.95
_CHUNK = 2_000_000  # largest number of multinomial counts in memory at once


@dataclasses.dataclass(frozen=True)
class Interval:
  """Mean accuracy over `n` examples and its 95% interval, all as fractions.

  Attributes:
    accuracy: the mean.
    low: lower end of the interval.
    high: upper end of the interval.
    n: number of examples.
    clusters: number of clusters that were resampled.
    clustered_by: 'policy', 'prompt' or 'example'; see `polar_jax.evaluate.clusters.Clusters`.
  """

  accuracy: float
  low: float
  high: float
  n: int
  clusters: int
  clustered_by: str

  def asdict(self) -> dict[str, float | int | str]:
    """Return the fields as plain Python values."""
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Difference:
  """Mean difference in accuracy over the same `n` examples and its 95% interval, as fractions; positive favors the first scorer.

  The other fields are those of `Interval`.
  """

  difference: float
  low: float
  high: float
  n: int
  clusters: int
  clustered_by: str

  def asdict(self) -> dict[str, float | int | str]:
    """Return the fields as plain Python values."""
    return dataclasses.asdict(self)


def pair_correct(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
  """Return 1 where `chosen` scores higher, .5 where the scores are equal and 0 elsewhere.

  Args:
    chosen: (examples,) scores; -inf is a score like any other.
    rejected: (examples,) scores.

  Returns:
    (examples,) float64.

  Raises:
    ValueError: if the shapes differ, or a score is NaN, which would otherwise count as a wrong answer.
  """
  chosen, rejected = np.asarray(chosen), np.asarray(rejected)
  if chosen.shape != rejected.shape or chosen.ndim != 1:
    raise ValueError(f'scores of chosen {chosen.shape} and rejected {rejected.shape} must be two vectors of the same length')
  bad = np.flatnonzero(np.isnan(chosen) | np.isnan(rejected))
  if bad.size:
    i = bad[0]
    raise ValueError(f'example {i}: a score is NaN (chosen {chosen[i]}, rejected {rejected[i]}; {bad.size} such examples)')
  return np.where(chosen > rejected, 1.0, np.where(chosen == rejected, 0.5, 0.0))


def accuracy_interval(correct: np.ndarray, clusters: Clusters | None = None, resamples: int = 2_000, seed: int = 0) -> Interval:
  """Return the mean of `correct` with a 95% percentile bootstrap interval.

  A single cluster (or example) carries no information about the spread, so its interval is [0, 1]. If the bootstrap sees no spread
  because all values are equal, the interval is that of `_without_spread`, which is never of zero width.

  Args:
    correct: (examples,) values in [0, 1]; ties count half, and of several seeds it is the mean.
    clusters: of the examples; None treats them as independent.
    resamples: number of bootstrap samples.
    seed: seed of the resampling.

  Raises:
    ValueError: if there are no examples, or a value or a shape is invalid.
  """
  correct = _checked(correct, 'correct')
  mean, low, high = _bootstrap(correct, clusters, resamples, seed, (0.0, 1.0))
  return Interval(mean, low, high, correct.size, *_described(clusters, correct.size))


def paired_difference(a: np.ndarray, b: np.ndarray, clusters: Clusters | None = None, resamples: int = 2_000, seed: int = 0) -> Difference:
  """Return the mean of `a - b` with a 95% percentile bootstrap interval; examples are resampled together, so shared noise cancels.

  Args:
    a: (examples,) values in [0, 1].
    b: (examples,) values in [0, 1] for the same examples.
    clusters: as in `accuracy_interval`.
    resamples: number of bootstrap samples.
    seed: seed of the resampling.

  Raises:
    ValueError: if there are no examples, a value is invalid, or the shapes differ.
  """
  a, b = _checked(a, 'a'), _checked(b, 'b')
  if a.shape != b.shape:
    raise ValueError(f'a has {a.size} examples and b {b.size}; a paired difference needs the same examples')
  mean, low, high = _bootstrap(a - b, clusters, resamples, seed, (-1.0, 1.0))
  return Difference(mean, low, high, a.size, *_described(clusters, a.size))


def _described(clusters: Clusters | None, n: int) -> tuple[int, str]:
  return (n, 'example') if clusters is None else (clusters.count, clusters.by)


def _checked(values: np.ndarray, name: str) -> np.ndarray:
  values = np.asarray(values, dtype=np.float64)
  if values.ndim != 1 or not values.size:
    raise ValueError(f'{name} has shape {values.shape}; it must be a vector of at least one example')
  bad = np.flatnonzero(~((values >= 0) & (values <= 1)))
  if bad.size:
    raise ValueError(f'{name}, example {bad[0]}: {values[bad[0]]} is not in [0, 1] ({bad.size} such examples)')
  return values


def _bootstrap(
  values: np.ndarray, clusters: Clusters | None, resamples: int, seed: int, limits: tuple[float, float]
) -> tuple[float, float, float]:
  """Return (mean, low, high) of the ratio (sum of values) / (number of examples) over resampled clusters.

  Args:
    values: (examples,).
    clusters: of the examples; None treats them as independent.
    resamples: number of bootstrap samples.
    seed: seed of the resampling.
    limits: (low, high) of a single cluster.
  """
  if resamples < 1:
    raise ValueError(f'resamples is {resamples}; it must be >= 1')
  mean = float(values.mean())
  if clusters is None:
    sums, sizes = values, np.ones_like(values)
  else:
    labels = np.asarray(clusters.labels)
    if labels.shape != values.shape:
      raise ValueError(f'cluster labels have shape {labels.shape}; there must be one for each of the {values.size} examples')
    if not np.issubdtype(labels.dtype, np.integer):
      raise ValueError(f'cluster labels must be integers, not {labels.dtype}')
    index = np.unique(labels, return_inverse=True)[1]
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
  return (mean, float(low), float(high)) if low < high else (mean, *_without_spread(mean, sums.size, limits))


def _without_spread(mean: float, clusters: int, limits: tuple[float, float]) -> tuple[float, float]:
  """Return (low, high) for clusters that all have the same mean.

  If a share q of all clusters had other means, a sample would miss every one of them with probability (1 - q)^clusters. The largest q
  for which that is at least (1 - LEVEL) / 2 might lie at either limit. For a mean at a limit this is the exact interval of Clopper and
  Pearson: 8 of 8 right is [0.63, 1].

  Args:
    mean: of every cluster.
    clusters: their number.
    limits: smallest and largest possible value.
  """
  q = 1 - ((1 - LEVEL) / 2) ** (1 / clusters)
  low, high = limits
  return mean - q * (mean - low), mean + q * (high - mean)
