"""How token sequences become rows with intervals.

A triplet is laid out as one stretch of tokens, not two. Its two sequences (chosen, rejected) share everything up to their first
differing token, and that shared prefix stands there once:

    [ chosen tail, reversed | shared prefix | rejected tail ]

A token of the prefix or of the rejected tail at index j sees [prefix start, j]; a token of the chosen tail at index i, stored
right to left, sees [i, prefix end). So every query sees one contiguous interval of keys, and rewards equal those of the two
sequences read separately. Positions are those of the original sequences. A row of a batch holds several triplets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from polar_jax.types import PairBatch, TextBatch, UserError


class PairRow(NamedTuple):
  """One triplet laid out; arrays of length T' (its number of tokens), intervals and indices counted from its first token."""

  tokens: np.ndarray
  positions: np.ndarray
  start: np.ndarray
  end: np.ndarray
  reward_index: tuple[int, int]  # of the chosen and of the rejected candidate


def shared_prefix_length(chosen: np.ndarray, rejected: np.ndarray) -> int:
  """Tokens before the first difference. Counted on tokens: string boundaries are not token boundaries."""
  n = min(len(chosen), len(rejected))
  differs = np.flatnonzero(chosen[:n] != rejected[:n])
  return int(differs[0]) if differs.size else n


def pair_row(chosen_ids: Sequence[int], rejected_ids: Sequence[int]) -> PairRow:
  """Lays out two sequences, each ending in its reward token, as one row."""
  chosen, rejected = np.asarray(chosen_ids, np.int32), np.asarray(rejected_ids, np.int32)
  if not (len(chosen) and len(rejected)):
    raise UserError('a candidate sequence has no token: even an empty answer ends in the reward token')
  shared = shared_prefix_length(chosen, rejected)
  tail, total = len(chosen) - shared, len(chosen) + len(rejected) - shared
  index = np.arange(total, dtype=np.int32)
  in_tail = index < tail
  return PairRow(
    tokens=np.concatenate([chosen[shared:][::-1], chosen[:shared], rejected[shared:]]),
    positions=np.where(in_tail, shared + tail - 1 - index, index - tail),
    start=np.where(in_tail, index, np.int32(tail)),
    end=np.where(in_tail, np.int32(tail + shared), index + 1),
    # With an empty tail the candidate's reward token is the last token of the prefix.
    reward_index=(0 if tail else shared - 1, total - 1),
  )


def pair_batch(
  triplets: Sequence[PairRow], indices: Sequence[int], packed: Sequence[Sequence[int]], row_length: int, most_pairs: int
) -> PairBatch:
  """Lays triplets behind one another into rows, padded to `row_length` tokens and `most_pairs` pairs.

  Intervals move with the tokens they point at, so no token sees another triplet; positions are those of the sequences. Padding
  pairs read their rewards at token 0, and the mask leaves them out.

  Args:
    indices: which row of the data set each triplet is.
    packed: for each row which triplets it holds (see `packing.first_fit`); an empty row is all padding.
  """
  shape = (len(packed), row_length)
  tokens, positions, start, end = (np.zeros(shape, np.int32) for _ in range(4))
  reward_index = np.zeros((len(packed), most_pairs, 2), np.int32)
  mask, index = np.zeros((len(packed), most_pairs), np.float32), np.full((len(packed), most_pairs), -1, np.int32)
  for b, members in enumerate(packed):
    low = 0
    for p, member in enumerate(members):
      row = triplets[member]
      high = low + len(row.tokens)
      tokens[b, low:high], positions[b, low:high] = row.tokens, row.positions
      start[b, low:high], end[b, low:high] = row.start + low, row.end + low
      reward_index[b, p], mask[b, p], index[b, p] = np.add(row.reward_index, low), 1, indices[member]
      low = high
  return PairBatch(tokens, positions, start, end, reward_index, mask, index)


def text_batch(windows: Sequence[np.ndarray | None], indices: Sequence[int], length: int) -> TextBatch:
  """Stacks windows of `length + 1` tokens as inputs and next-token targets. None is a padding row."""
  shape = (len(windows), length)
  tokens, target, end = (np.zeros(shape, np.int32) for _ in range(3))
  mask, index = np.zeros(shape, np.float32), np.full(len(windows), -1, np.int32)
  position = np.arange(length, dtype=np.int32)
  for b, (window, i) in enumerate(zip(windows, indices, strict=True)):
    if window is None:
      continue
    tokens[b], target[b], end[b], mask[b], index[b] = window[:-1], window[1:], position + 1, 1, i
  return TextBatch(tokens, np.broadcast_to(position, shape).copy(), np.zeros(shape, np.int32), end, target, mask, index)
