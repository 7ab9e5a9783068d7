"""Batches in an order that is a pure function of (seed, epoch, global index).

Step s of a run reads the global positions [s * batch, (s + 1) * batch) of a shuffled, endlessly repeated stream, whatever the
number of hosts; each process builds only the rows that its devices hold. The state of an iterator is the step it stands at.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from polar_jax.data.rows import PairRow, pair_batch, pair_row, text_batch
from polar_jax.data.template import Template
from polar_jax.types import PairBatch, TextBatch, Triplet, UserError


class BatchPlan(NamedTuple):
  """The shape of a global batch, and which rows of it this process builds."""

  rows: int  # real rows
  padded: int  # rows after padding to a multiple of what divides the batch
  low: int  # this process builds rows [low, high) of the padded batch
  high: int


def plan_batch(rows: int, multiple: int, local: tuple[int, int] | None = None) -> BatchPlan:
  """Pads `rows` up to a multiple (batch shards x accumulation); `local` are this process's rows, by default all."""
  padded = math.ceil(rows / multiple) * multiple
  low, high = local or (0, padded)
  return BatchPlan(rows, padded, low, high)


class PairTokens:
  """Random access from a data set index to a laid-out triplet."""

  def __init__(self, source: Sequence[Triplet], template: Template):
    self.source, self.template = source, template

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> PairRow:
    return pair_row(*self.template.encode(self.source[index]))


class TextWindows:
  """Windows of `length + 1` tokens of a token stream. Each epoch starts at another offset, so windows differ between epochs."""

  def __init__(self, token_ids: np.ndarray, length: int, seed: int):
    if len(token_ids) < 2 * length + 1:
      raise UserError(f'the text has {len(token_ids)} tokens; windows of {length} need at least {2 * length + 1}')
    self.token_ids, self.length, self.seed = token_ids, length, seed

  def __len__(self) -> int:
    return (len(self.token_ids) - 1) // self.length - 1

  def window(self, index: int, epoch: int) -> np.ndarray:
    offset = np.random.default_rng((self.seed, epoch)).integers(self.length) if epoch else 0
    start = index * self.length + offset
    return self.token_ids[start : start + self.length + 1]


def global_order(size: int, seed: int | None) -> Callable[[int], tuple[int, int]]:
  """A function from global position to (index, epoch): reshuffled every epoch, or in file order when `seed` is None."""
  if seed is None:
    return lambda position: (position % size, position // size)
  stream = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
  return lambda position: (int(stream[position]), position // size)


def _positions(step: int, plan: BatchPlan, limit: int | None) -> list[int | None]:
  """Global positions of this process's rows at `step`; None for padding."""
  rows = (step * plan.rows + j if j < plan.rows else None for j in range(plan.low, plan.high))
  return [None if r is None or (limit is not None and r >= limit) else r for r in rows]


def _pair_step(step: int, tokens: PairTokens, order: Any, plan: BatchPlan, row_length: int, limit: int | None) -> PairBatch:
  indices = [-1 if p is None else order(p)[0] for p in _positions(step, plan, limit)]
  return pair_batch([None if i < 0 else tokens[i] for i in indices], indices, row_length)


def _text_step(step: int, windows: TextWindows, order: Any, plan: BatchPlan, limit: int | None) -> TextBatch:
  places = [None if p is None else order(p) for p in _positions(step, plan, limit)]
  rows = [None if place is None else windows.window(*place) for place in places]
  return text_batch(rows, [-1 if place is None else place[0] for place in places], windows.length)


def pair_batches(
  tokens: PairTokens, plan: BatchPlan, row_length: int, *, steps: int, seed: int | None, once: bool = False
) -> grain.MapDataset:
  """Random access from step to PairBatch. `once`: rows past the first epoch are padding (evaluation)."""
  limit = len(tokens) if once else None
  build = functools.partial(_pair_step, tokens=tokens, order=global_order(len(tokens), seed), plan=plan, row_length=row_length, limit=limit)
  return grain.MapDataset.range(steps).map(build)


def text_batches(windows: TextWindows, plan: BatchPlan, *, steps: int, seed: int | None, once: bool = False) -> grain.MapDataset:
  """Random access from step to TextBatch."""
  limit = len(windows) if once else None
  build = functools.partial(_text_step, windows=windows, order=global_order(len(windows), seed), plan=plan, limit=limit)
  return grain.MapDataset.range(steps).map(build)


def iterate(batches: grain.MapDataset, *, threads: int, prefetch: int) -> grain.DatasetIterator:
  """A checkpointable iterator that prepares `prefetch` batches ahead in threads."""
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
  return iter(batches.to_iter_dataset(options))


def longest_row(tokens: PairTokens, multiple: int = 8) -> int:
  """Tokens of the longest laid-out triplet, rounded up: reads and tokenises the whole data set once."""
  longest = max(len(tokens[i].tokens) for i in range(len(tokens)))
  return math.ceil(longest / multiple) * multiple
