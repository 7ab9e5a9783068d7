"""Batches in an order that is a pure function of (seed, epoch, global index).

Step s of a run reads the global positions [s * batch, (s + 1) * batch) of a shuffled, endlessly repeated stream, and packs the triplets
at these positions into rows. Every process packs the whole step, so that all agree, and builds only the rows of its own devices. The
state of an iterator is its step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from polar_jax.data import columns, packing
from polar_jax.data.examples import examples_at, max_candidates
from polar_jax.data.layout import Segment, list_segment, pair_batch, pair_segment, ranked_batch, text_batch
from polar_jax.data.packing import PackPlan
from polar_jax.data.template import Template
from polar_jax.sharding import Share
from polar_jax.types import PairBatch, RankedBatch, RankedList, Text, TextBatch, Triplet, UserError

_READ_TOGETHER = 1_024  # examples


class BatchPlan(NamedTuple):
  """The batch of a step, and how its rows are divided among processes."""

  size: int  # number of triplets or windows of a step
  multiple: int = 1  # the number of rows is padded up to a multiple of it: batch shards x gradient accumulation steps
  share: Share = Share(0, 1, 1)  # this process's part of the rows


class TripletSegments:
  """Random access from the index of an example to its segment.

  Attributes:
    source: the examples.
    template: tokenizes them.
    columns: names of the columns of numbers that a batch holds too (see `polar_jax.data.columns`).
  """

  def __init__(self, source: Sequence[Triplet], template: Template, columns: Sequence[str] = ()):
    self.source, self.template, self.columns = source, template, tuple(columns)

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Segment:
    return pair_segment(*self.template.encode(self.source[index]))

  def take(self, indices: Sequence[int]) -> list[Segment]:
    """Return the segments of several examples, read together where the data set can (see `examples_at`)."""
    return [pair_segment(*self.template.encode(triplet)) for triplet in examples_at(self.source, indices)]

  def head(self, size: int) -> TripletSegments:
    """Return the first `size` examples, read and tokenized only on access."""
    return type(self)(_Head(self.source, min(size, len(self))), self.template, self.columns)

  def batch(
    self, segments: Sequence[Segment], indices: Sequence[int], packed: Sequence[Sequence[int]], pack: PackPlan
  ) -> PairBatch | RankedBatch:
    """Build a batch of segments; see `layout.pair_batch`."""
    numbers = columns.read(self.source, indices, self.columns)
    return pair_batch(segments, indices, packed, pack.row_length, pack.max_pairs, numbers.get('margin'), numbers.get('weight'))

  def most_tokens(self, indices: Sequence[int], enough: int) -> list[int]:
    """Return a number of tokens for each example that it does not exceed: a bound if that is at most `enough`, else its exact length."""
    bounds = [self.template.most_tokens(triplet) for triplet in examples_at(self.source, indices)]
    long = [i for i, bound in zip(indices, bounds, strict=True) if bound is None or bound > enough]
    lengths = {i: len(segment.tokens) for i, segment in zip(long, self.take(long), strict=True)}
    return [lengths.get(i, bound or 0) for i, bound in zip(indices, bounds, strict=True)]


class ListSegments(TripletSegments):
  """Random access from the index of a ranked list, or of a triplet among them, to its segment.

  Attributes:
    max_candidates: of any example.
  """

  def __init__(self, source: Sequence[Triplet], template: Template, columns: Sequence[str] = ()):
    super().__init__(source, template, columns)
    if 'margin' in self.columns:
      raise UserError('loss.margin is set, but the examples are ranked lists, and a margin is that of a pair; set loss.margin to False')
    self.max_candidates = max_candidates(source)

  def __getitem__(self, index: int) -> Segment:
    return self.take([index])[0]

  def take(self, indices: Sequence[int]) -> list[Segment]:
    """Return the segments of several examples."""
    return [self._segment(example) for example in examples_at(self.source, indices)]

  def most_tokens(self, indices: Sequence[int], enough: int) -> list[int]:
    """Return the number of tokens of each example."""
    return [len(segment.tokens) for segment in self.take(indices)]

  def batch(self, segments: Sequence[Segment], indices: Sequence[int], packed: Sequence[Sequence[int]], pack: PackPlan) -> RankedBatch:
    """Build a batch of segments; see `layout.ranked_batch`."""
    ranks = [_ranking(example)[1] for example in examples_at(self.source, indices)]
    weights = columns.read(self.source, indices, self.columns).get('weight')
    return ranked_batch(segments, ranks, indices, packed, pack.row_length, (pack.max_pairs, self.max_candidates), weights)

  def _segment(self, example: Triplet) -> Segment:
    return list_segment(self.template.encode_candidates(example.prompt, example.reference, _ranking(example)[0], example.wrapper))


def _ranking(example: Triplet) -> tuple[Sequence[Text], Sequence[int]]:
  """Return the candidates of an example, best first, and their ranks."""
  return (example.candidates, example.ranks) if isinstance(example, RankedList) else ((example.chosen, example.rejected), (0, 1))


def open_segments(source: Sequence[Triplet], template: Template, columns: Sequence[str] = ()) -> TripletSegments:
  """Return the segments of examples: those of triplets, or if some example is a ranked list, those of lists.

  Args:
    source: the examples.
    template: tokenizes them.
    columns: names of the columns of numbers that a batch holds too.

  Raises:
    UserError: the columns are not those of lists.
  """
  return (ListSegments if max_candidates(source) > 2 else TripletSegments)(source, template, columns)


class _Head(Sequence[Triplet]):
  """The first `size` examples of a sequence, read only on access."""

  def __init__(self, examples: Sequence[Triplet], size: int):
    self._examples, self._size = examples, size
    self.path, self.numbers = getattr(examples, 'path', None), getattr(examples, 'numbers', None)
    self.max_candidates = max_candidates(examples)

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index):
    return self._examples[index]


class TextWindows:
  """Windows of `length + 1` tokens of a token stream. Each epoch starts at a different offset, so windows differ between epochs."""

  def __init__(self, token_ids: np.ndarray, length: int, seed: int):
    if len(token_ids) < 2 * length + 1:
      raise UserError(f'the text has {len(token_ids)} tokens; windows of {length} tokens need at least {2 * length + 1}')
    self.token_ids, self.length, self.seed = token_ids, length, seed

  def __len__(self) -> int:
    return (len(self.token_ids) - 1) // self.length - 1

  def window(self, index: int, epoch: int) -> np.ndarray:
    """Return the token ids of one window."""
    offset = np.random.default_rng((self.seed, epoch)).integers(self.length) if epoch else 0
    start = index * self.length + offset
    return self.token_ids[start : start + self.length + 1]


def global_order(size: int, seed: int | None) -> Callable[[int], tuple[int, int]]:
  """Return a function from global position to (index, epoch): reshuffled every epoch, or in file order if `seed` is None."""
  if seed is None:
    return lambda position: (position % size, position // size)
  stream = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
  return lambda position: (int(stream[position]), position // size)


def _indices(step: int, order: Any, size: int, limit: int | None) -> list[tuple[int, int]]:
  """Return (index, epoch) of each example or window that `step` reads."""
  positions = range(step * size, (step + 1) * size if limit is None else min((step + 1) * size, limit))
  return [order(position) for position in positions]


def _pair_step(
  step: int, source: TripletSegments, order: Any, plan: BatchPlan, pack: PackPlan, limit: int | None
) -> PairBatch | RankedBatch:
  indices = [index for index, _ in _indices(step, order, plan.size, limit)]
  chosen = source.take(indices)
  lengths = [_checked_length(i, t, pack.row_length) for i, t in zip(indices, chosen, strict=True)]
  packed = packing.first_fit(lengths, pack.row_length, pack.max_pairs)
  packed += [[]] * (pack.rows_for(len(packed)) - len(packed))
  packed = packing.interleave(packed, plan.multiple)
  return source.batch(chosen, indices, packed[plan.share.rows(len(packed))], pack)


def _checked_length(index: int, segment: Segment, row_length: int) -> int:
  n = len(segment.tokens)
  if n > row_length:
    raise UserError(f'example {index} has {n} tokens, more than data.row_length={row_length}; raise it, or lower template.max_length')
  return n


def _text_step(step: int, windows: TextWindows, order: Any, plan: BatchPlan, limit: int | None) -> TextBatch:
  rows: list[Any] = [*_indices(step, order, plan.size, limit)]  # (index, epoch), or None for padding
  rows += [None] * (text_rows(plan) - len(rows))
  local = rows[plan.share.rows(len(rows))]
  texts = [None if row is None else windows.window(*row) for row in local]
  return text_batch(texts, [-1 if row is None else row[0] for row in local], windows.length)


def examples_of_run(plan: BatchPlan, size: int, *, steps: int, seed: int | None) -> list[int]:
  """Return the indices of the examples that `pair_batches` reads for the same arguments.

  Args:
    plan: the batch of a step.
    size: number of examples of the data set.
    steps: number of steps of the run.
    seed: of the shuffle; None: file order.
  """
  if steps * plan.size >= size:
    return list(range(size))
  order = global_order(size, seed)
  return sorted(order(position)[0] for position in range(steps * plan.size))


def text_rows(plan: BatchPlan) -> int:
  """Return the number of rows of a batch of text: one for each window, then padding."""
  return math.ceil(plan.size / plan.multiple) * plan.multiple


def plan_packing(
  source: TripletSegments,
  plan: BatchPlan,
  row_length: int | None,
  *,
  steps: int,
  seed: int | None,
  once: bool = False,
  compilation_steps: float = packing.COMPILATION_STEPS,
) -> PackPlan:
  """Plan the shape of packed batches from the first steps that `pair_batches` will produce for the same arguments.

  Args:
    source: the segments of the data set.
    plan: the batch of a step.
    row_length: tokens of a row; None: read and tokenize all that the run reads to find its longest example, and choose a dense length.
    steps: number of steps of the run.
    seed: of the shuffle; None: file order.
    once: stop after the first epoch.
    compilation_steps: what compiling another number of rows costs, in steps.

  Raises:
    UserError: a triplet of the sampled steps is longer than `row_length`.
  """
  order, limit = global_order(len(source), seed), len(source) if once else None
  sampled = max(min(steps, packing.SAMPLE_STEPS, packing.SAMPLE_TRIPLETS // plan.size), 1)
  limit_length = row_length or _longest(source, examples_of_run(plan, len(source), steps=steps, seed=seed))
  indices = [[index for index, _ in _indices(step, order, plan.size, limit)] for step in range(sampled)]
  lengths = [[_checked_length(i, t, limit_length) for i, t in zip(step, source.take(step), strict=True)] for step in indices]
  if row_length is None:
    return packing.choose_plan(lengths, limit_length, plan.multiple, steps, compilation_steps)
  return packing.plan(lengths, row_length, plan.multiple, steps, compilation_steps)


def _longest(source: TripletSegments, indices: Sequence[int]) -> int:
  parts = (indices[start : start + _READ_TOGETHER] for start in range(0, len(indices), _READ_TOGETHER))
  return max(len(segment.tokens) for part in parts for segment in source.take(part))


def pair_batches(
  source: TripletSegments, plan: BatchPlan, pack: PackPlan, *, steps: int, seed: int | None, once: bool = False
) -> grain.MapDataset:
  """Return random access from step to PairBatch, or to RankedBatch for ranked lists.

  Args:
    source: the segments of the data set.
    plan: the batch of a step.
    pack: the shape of packed batches.
    steps: number of steps.
    seed: of the shuffle; None: file order.
    once: stop after the first epoch, for evaluation.
  """
  limit = len(source) if once else None
  build = functools.partial(_pair_step, source=source, order=global_order(len(source), seed), plan=plan, pack=pack, limit=limit)
  return grain.MapDataset.range(steps).map(build)


def text_batches(windows: TextWindows, plan: BatchPlan, *, steps: int, seed: int | None, once: bool = False) -> grain.MapDataset:
  """Return random access from step to TextBatch.

  Args:
    windows: the windows of the text.
    plan: the batch of a step.
    steps: number of steps.
    seed: of the shuffle; None: file order.
    once: stop after the first epoch, for evaluation.
  """
  limit = len(windows) if once else None
  build = functools.partial(_text_step, windows=windows, order=global_order(len(windows), seed), plan=plan, limit=limit)
  return grain.MapDataset.range(steps).map(build)


def iterate(batches: grain.MapDataset, *, threads: int, prefetch: int) -> grain.DatasetIterator:
  """Return a checkpointable iterator that prepares `prefetch` batches ahead in `threads` threads."""
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
  return iter(batches.to_iter_dataset(options))
