"""Which triplets share a row, and how many rows a batch has. Everything here is a pure function of lengths.

A batch holds the triplets of one step, whatever their lengths, so the number of rows that it needs varies. XLA compiles once for
each shape: a run therefore plans, from a sample of its steps, a number of rows that most steps get along with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Rows of a length that the tiles of attention kernels divide.
LENGTH_MULTIPLE = 128
# What makes up a sample: enough steps to see how much they vary, and not so many that a large batch takes long to tokenise.
SAMPLE_STEPS, SAMPLE_TRIPLETS = 16, 2_048
# Row lengths that are tried, up to this many times the mean length of a triplet: beyond it packing hardly gets denser.
_CANDIDATES, _MEAN_LENGTHS = 16, 8
# Steps that would take about as long as compiling one.
_COMPILATION_STEPS = 50


class PackPlan(NamedTuple):
  """The shape of packed batches."""

  row_length: int
  rows: int  # of every step that does not need more
  pairs: int  # triplets of a row, at most
  multiple: int  # what the number of rows must divide by: batch shards x accumulation

  def rows_for(self, needed: int) -> int:
    """Rows of a step that needs `needed`. Those that exceed the plan come in few sizes, because each is compiled anew."""
    if needed <= self.rows:
      return self.rows
    return _round_up(needed, _round_up(max(self.rows // 16, 1), self.multiple))


def first_fit(lengths: Sequence[int], capacity: int, most_per_row: int, counts: Sequence[int] | None = None) -> list[list[int]]:
  """First-fit decreasing: the longest item first (ties in their order), each into the first row that has room.

  Args:
    most_per_row: items of a row, or the sum of their `counts`, at most.

  Returns:
    The items of each row, as indices into `lengths`, in the order in which they went in. No row is empty.

  Raises:
    ValueError: an item is longer than a row.
  """
  sizes = np.asarray(lengths, np.int64)
  if sizes.size and sizes.max() > capacity:
    raise ValueError(f'an item of {sizes.max()} does not fit a row of {capacity}')
  weights = np.ones(len(sizes), np.int64) if counts is None else np.asarray(counts, np.int64)
  if weights.size and weights.max() > most_per_row:
    raise ValueError(f'an item that counts {weights.max()} does not fit a row of {most_per_row}')
  rows: list[list[int]] = []
  room, places = np.full(len(sizes), capacity, np.int64), np.full(len(sizes), most_per_row, np.int64)
  for item in np.argsort(-sizes, kind='stable').tolist():
    open_rows = slice(0, len(rows) + 1)  # the row after the last is empty and takes any
    row = int(np.argmax((room[open_rows] >= sizes[item]) & (places[open_rows] >= weights[item])))
    if row == len(rows):
      rows.append([])
    rows[row].append(item)
    room[row] -= sizes[item]
    places[row] -= weights[item]
  return rows


def deal(rows: Sequence[list[int]], groups: int) -> list[list[int]]:
  """Reorders rows so that each of `groups` equal stretches gets one row in every `groups`.

  First fit leaves the longest triplets in the first rows and padding in the last; devices, which hold stretches, get alike work.
  """
  return [row for first in range(groups) for row in rows[first::groups]]


def plan(sample: Sequence[Sequence[int]], row_length: int, multiple: int, steps: int) -> PackPlan:
  """Plans for a run of `steps`, given the lengths of the triplets of each step of a sample.

  The most triplets that any row of the sample holds is a dimension of the batch; later rows keep to it.
  """
  return _cheapest(sample, row_length, multiple, steps)[1]


def choose_plan(sample: Sequence[Sequence[int]], longest: int, multiple: int, steps: int) -> PackPlan:
  """The cheapest plan over row lengths from the longest triplet up; the shorter row wins a tie.

  Where few rows make up a batch, how many fit is a matter of luck: a row a little longer can save a whole one.
  """
  low = math.ceil(longest / LENGTH_MULTIPLE)
  mean = float(np.mean(np.concatenate([np.asarray(lengths) for lengths in sample])))
  high = max(low, math.ceil(_MEAN_LENGTHS * mean / LENGTH_MULTIPLE))
  lengths = sorted({int(n) * LENGTH_MULTIPLE for n in np.linspace(low, high, _CANDIDATES).round()})
  return min((_cheapest(sample, row_length, multiple, steps) for row_length in lengths), key=lambda found: found[0])[1]


def _cheapest(sample: Sequence[Sequence[int]], row_length: int, multiple: int, steps: int) -> tuple[float, PackPlan]:
  """(token slots that a run of `steps` and its compilations cost, the plan): fewer rows, unless too many steps exceed them."""
  packed = [first_fit(lengths, row_length, len(lengths)) for lengths in sample]
  most_pairs = max(len(row) for rows in packed for row in rows)
  plans = [PackPlan(row_length, rows, most_pairs, multiple) for rows in {_round_up(max(len(rows), 1), multiple) for rows in packed}]

  def slots(made: PackPlan) -> float:
    rows = [made.rows_for(len(rows)) for rows in packed]
    return row_length * (steps * float(np.mean(rows)) + _COMPILATION_STEPS * sum(set(rows)))

  return min((slots(made), made) for made in plans)


def _round_up(value: int, multiple: int) -> int:
  return math.ceil(value / multiple) * multiple
