"""Assignment of segments to rows, and the number of rows of a batch. Everything here is a pure function of lengths.

A batch holds the triplets of one step, whatever their lengths, so the number of rows that it needs varies. XLA compiles once for each
shape, so a run plans, from a sample of its steps, a number of rows that is enough for most steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from polar_jax.sharding import round_up

# Row lengths are multiples of the tiles of attention kernels.
LENGTH_MULTIPLE = 128
# Size of a sample: enough steps to see how much they vary, but few enough that large batches are tokenized quickly.
SAMPLE_STEPS, SAMPLE_TRIPLETS = 16, 2_048
# Number of row lengths to try, up to this many times the mean length of a triplet; packing hardly gets denser beyond it.
_CANDIDATES, _MEAN_LENGTHS = 16, 8
# Compiling a step takes about as long as running this many, unless `data.compilation_steps` says otherwise.
COMPILATION_STEPS = 50.0


class PackPlan(NamedTuple):
  """The shape of packed batches."""

  row_length: int
  rows: int  # number of rows of every step that does not need more
  max_pairs: int  # maximum number of triplets of a row
  multiple: int  # divides the number of rows: batch shards x gradient accumulation steps

  def rows_for(self, needed: int) -> int:
    """Return the number of rows of a step that needs `needed`. Larger ones than planned come in few sizes, since each is compiled anew."""
    if needed <= self.rows:
      return self.rows
    return round_up(needed, round_up(max(self.rows // 16, 1), self.multiple))


def first_fit(lengths: Sequence[int], capacity: int, max_per_row: int, counts: Sequence[int] | None = None) -> list[list[int]]:
  """Assign items to rows by first-fit decreasing: the longest item first (ties in order), each to the first row that has room.

  Args:
    lengths: length of each item.
    capacity: total length that a row has room for.
    max_per_row: maximum number of items of a row, or of the sum of their `counts`.
    counts: how much each item counts towards `max_per_row`; None: 1.

  Returns:
    The items of each row, as indices into `lengths`, in the order of their assignment. No row is empty.

  Raises:
    ValueError: an item does not fit an empty row.
  """
  sizes = np.asarray(lengths, np.int64)
  if sizes.size and sizes.max() > capacity:
    raise ValueError(f'an item of length {sizes.max()} does not fit a row of {capacity}')
  weights = np.ones(len(sizes), np.int64) if counts is None else np.asarray(counts, np.int64)
  if weights.size and weights.max() > max_per_row:
    raise ValueError(f'an item that counts as {weights.max()} does not fit a row of {max_per_row}')
  rows: list[list[int]] = []
  room, free = np.full(len(sizes), capacity, np.int64), np.full(len(sizes), max_per_row, np.int64)
  for item in np.argsort(-sizes, kind='stable').tolist():
    open_rows = slice(0, len(rows) + 1)  # the row after the last is empty and has room for any item
    row = int(np.argmax((room[open_rows] >= sizes[item]) & (free[open_rows] >= weights[item])))
    if row == len(rows):
      rows.append([])
    rows[row].append(item)
    room[row] -= sizes[item]
    free[row] -= weights[item]
  return rows


def interleave(rows: Sequence[list[int]], groups: int) -> list[list[int]]:
  """Reorder rows so that each of `groups` equal contiguous parts gets every `groups`-th row.

  First fit leaves the longest triplets in the first rows and padding in the last. Devices hold contiguous parts, so interleaving
  balances their work.
  """
  return [row for first in range(groups) for row in rows[first::groups]]


def plan(
  sample: Sequence[Sequence[int]], row_length: int, multiple: int, steps: int, compilation_steps: float = COMPILATION_STEPS
) -> PackPlan:
  """Plan the rows of a run, from the lengths of the triplets of each step of a sample.

  The largest number of triplets in any row of the sample becomes a dimension of the batch, and a limit for all other rows.

  Args:
    sample: for each sampled step, the length of each of its triplets.
    row_length: tokens of a row.
    multiple: divides the number of rows.
    steps: number of steps of the run.
    compilation_steps: what compiling another number of rows costs, in steps.
  """
  return _cheapest(sample, row_length, multiple, steps, compilation_steps)[1]


def choose_plan(
  sample: Sequence[Sequence[int]], longest: int, multiple: int, steps: int, compilation_steps: float = COMPILATION_STEPS
) -> PackPlan:
  """Choose the cheapest plan over row lengths from the longest triplet up; the shorter row wins a tie.

  A batch of few rows packs well or badly by chance, and a slightly longer row can save a whole one.

  Args:
    sample: for each sampled step, the length of each of its triplets.
    longest: length of the longest triplet of the data set.
    multiple: divides the number of rows.
    steps: number of steps of the run.
    compilation_steps: what compiling another number of rows costs, in steps.
  """
  low = math.ceil(longest / LENGTH_MULTIPLE)
  mean = float(np.mean(np.concatenate([np.asarray(lengths) for lengths in sample])))
  high = max(low, math.ceil(_MEAN_LENGTHS * mean / LENGTH_MULTIPLE))
  lengths = sorted({int(n) * LENGTH_MULTIPLE for n in np.linspace(low, high, _CANDIDATES).round()})
  plans = (_cheapest(sample, row_length, multiple, steps, compilation_steps) for row_length in lengths)
  return min(plans, key=lambda cost_and_plan: cost_and_plan[0])[1]


def _cheapest(
  sample: Sequence[Sequence[int]], row_length: int, multiple: int, steps: int, compilation_steps: float
) -> tuple[float, PackPlan]:
  """Return (token positions that a run of `steps` and its compilations cost, the plan) with the number of rows that costs least."""
  packed = [first_fit(lengths, row_length, len(lengths)) for lengths in sample]
  max_pairs = max(len(row) for rows in packed for row in rows)
  plans = [PackPlan(row_length, rows, max_pairs, multiple) for rows in {round_up(max(len(rows), 1), multiple) for rows in packed}]

  def cost(candidate: PackPlan) -> float:
    rows = [candidate.rows_for(len(rows)) for rows in packed]
    return row_length * (steps * float(np.mean(rows)) + compilation_steps * sum(set(rows)))

  return min((cost(candidate), candidate) for candidate in plans)
