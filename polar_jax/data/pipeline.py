"""Batches in an order that is a pure function of (seed, epoch, global index).

Step s of a run reads the global positions [s * batch, (s + 1) * batch) of a shuffled, endlessly repeated stream, and packs the
triplets it finds there into rows. Every process packs the whole step, so that all agree, and builds only the rows that its
devices hold. The state of an iterator is the step it stands at.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from polar_jax.data import packing
from polar_jax.data.packing import PackPlan
from polar_jax.data.rows import PairRow, pair_batch, pair_row, text_batch
from polar_jax.data.template import Template
from polar_jax.sharding import Share
from polar_jax.types import PairBatch, TextBatch, Triplet, UserError

_READ_TOGETHER = 1_024  # rows


class BatchPlan(NamedTuple):
  """What a step reads, and how its rows are divided."""

  size: int  # triplets or windows of a step
  multiple: int = 1  # rows are padded up to a multiple of it: batch shards x accumulation
  share: Share = Share(0, 1, 1)


def rows_at(source: Sequence[Triplet], indices: Sequence[int]) -> Sequence[Triplet]:
  """Rows of a data set, read together where it can: a TFDS one takes a quarter of the time."""
  together = getattr(source, '__getitems__', None)
  return together(indices) if together else [source[i] for i in indices]


class PairTokens:
  """Random access from a data set index to a laid-out triplet."""

  def __init__(self, source: Sequence[Triplet], template: Template):
    self.source, self.template = source, template

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> PairRow:
    return pair_row(*self.template.encode(self.source[index]))

  def many(self, indices: Sequence[int]) -> list[PairRow]:
    """Several at once, see `rows_at`."""
    return [pair_row(*self.template.encode(row)) for row in rows_at(self.source, indices)]


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


def _places(step: int, order: Any, size: int, limit: int | None) -> list[tuple[int, int]]:
  """(index, epoch) of what `step` reads."""
  positions = range(step * size, (step + 1) * size if limit is None else min((step + 1) * size, limit))
  return [order(position) for position in positions]


def _pair_step(step: int, tokens: PairTokens, order: Any, plan: BatchPlan, pack: PackPlan, limit: int | None) -> PairBatch:
  indices = [index for index, _ in _places(step, order, plan.size, limit)]
  triplets = tokens.many(indices)
  lengths = [_checked_length(i, t, pack.row_length) for i, t in zip(indices, triplets, strict=True)]
  packed = packing.first_fit(lengths, pack.row_length, pack.pairs)
  packed += [[]] * (pack.rows_for(len(packed)) - len(packed))
  packed = packing.deal(packed, plan.multiple)
  return pair_batch(triplets, indices, packed[plan.share.rows(len(packed))], pack.row_length, pack.pairs)


def _checked_length(index: int, triplet: PairRow, row_length: int) -> int:
  n = len(triplet.tokens)
  if n > row_length:
    raise UserError(f'row {index} has {n} tokens, more than data.row_length ({row_length}); raise it, or lower template.max_length')
  return n


def _text_step(step: int, windows: TextWindows, order: Any, plan: BatchPlan, limit: int | None) -> TextBatch:
  places: list[Any] = [*_places(step, order, plan.size, limit)]
  places += [None] * (text_rows(plan) - len(places))
  mine = places[plan.share.rows(len(places))]
  rows = [None if place is None else windows.window(*place) for place in mine]
  return text_batch(rows, [-1 if place is None else place[0] for place in mine], windows.length)


def text_rows(plan: BatchPlan) -> int:
  """Rows of a batch of text, one for each window."""
  return math.ceil(plan.size / plan.multiple) * plan.multiple


def plan_packing(
  tokens: PairTokens, plan: BatchPlan, row_length: int | None, *, steps: int, seed: int | None, once: bool = False
) -> PackPlan:
  """Plans the shape of packed batches from the first of the steps that `pair_batches` will make of the same arguments.

  Without a row length it reads and tokenises the whole data set for its longest triplet, and chooses one that packs densely.

  Raises:
    UserError: a triplet of those steps is longer than `row_length`.
  """
  order, limit = global_order(len(tokens), seed), len(tokens) if once else None
  sampled = max(min(steps, packing.SAMPLE_STEPS, packing.SAMPLE_TRIPLETS // plan.size), 1)
  limit_length = row_length or _longest(tokens)
  indices = [[index for index, _ in _places(step, order, plan.size, limit)] for step in range(sampled)]
  lengths = [[_checked_length(i, t, limit_length) for i, t in zip(step, tokens.many(step), strict=True)] for step in indices]
  if row_length is None:
    return packing.choose_plan(lengths, limit_length, plan.multiple, steps)
  return packing.plan(lengths, row_length, plan.multiple, steps)


def _longest(tokens: PairTokens) -> int:
  parts = (range(start, min(start + _READ_TOGETHER, len(tokens))) for start in range(0, len(tokens), _READ_TOGETHER))
  return max(len(triplet.tokens) for part in parts for triplet in tokens.many(list(part)))


def pair_batches(
  tokens: PairTokens, plan: BatchPlan, pack: PackPlan, *, steps: int, seed: int | None, once: bool = False
) -> grain.MapDataset:
  """Random access from step to PairBatch. `once`: nothing is read past the first epoch (evaluation)."""
  limit = len(tokens) if once else None
  build = functools.partial(_pair_step, tokens=tokens, order=global_order(len(tokens), seed), plan=plan, pack=pack, limit=limit)
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
