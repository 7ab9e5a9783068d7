"""How any number of candidates for one prompt and reference become a stretch of tokens that holds their prefix once.

    [ shared prefix | tail of candidate 0 | tail of candidate 1 | ... ]

A token of the prefix sees the prefix up to itself. A token of a tail sees its own tail up to itself, and the whole prefix: two
intervals of keys. The keys and values of the prefix are so computed once for all candidates, and no cache of them has to be kept
or moved. Two candidates need only one interval (`polar_jax.data.rows`), which is what training uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from polar_jax.data.rows import shared_prefix_length
from polar_jax.types import GroupBatch, UserError


class GroupPart(NamedTuple):
  """Some candidates of a group, laid out; arrays of length T', intervals and indices counted from the first token."""

  tokens: np.ndarray
  positions: np.ndarray
  start: np.ndarray
  end: np.ndarray
  prefix_end: np.ndarray  # the prefix interval is [0, prefix_end): empty for the prefix's own tokens
  reward_index: np.ndarray  # (candidates,)
  candidates: Sequence[int]  # which of the group's


def lay_out(sequences: Sequence[Sequence[int]], row_length: int, most: int, shared: int | None = None) -> list[GroupPart]:
  """Token sequences of one group, each ending in its reward token -> parts of at most `row_length` tokens and `most` candidates.

  One part, unless the group is too large for a row: then each part repeats the prefix.

  Args:
    shared: tokens that the sequences share at most, as far as the layout goes; None: as many as they do.

  Raises:
    UserError: for a candidate that does not fit a row by itself, naming it.
  """
  ids = [np.asarray(sequence, np.int32) for sequence in sequences]
  for c, sequence in enumerate(ids):
    if not 0 < len(sequence) <= row_length:
      raise UserError(f'candidate {c} has {len(sequence)} tokens; it must have at least 1, and at most the row length {row_length}')
  if not ids:
    return []
  # Each tail keeps at least its reward token.
  prefix = min(min(len(s) - 1 for s in ids), *(shared_prefix_length(ids[0], s) for s in ids))
  prefix = prefix if shared is None else min(prefix, shared)
  parts: list[list[int]] = [[]]
  room = row_length - prefix
  for c, sequence in enumerate(ids):
    if len(parts[-1]) == most or len(sequence) - prefix > room:
      parts.append([])
      room = row_length - prefix
    parts[-1].append(c)
    room -= len(sequence) - prefix
  return [_part(ids, prefix, members) for members in parts]


def _part(ids: Sequence[np.ndarray], prefix: int, members: Sequence[int]) -> GroupPart:
  tails = [ids[c][prefix:] for c in members]
  ends = prefix + np.cumsum([len(t) for t in tails], dtype=np.int32)
  starts = np.concatenate([[prefix], ends[:-1]]).astype(np.int32)
  index = np.arange(ends[-1], dtype=np.int32)
  own_start = np.concatenate([np.zeros(prefix, np.int32), *(np.full(len(t), s, np.int32) for t, s in zip(tails, starts, strict=True))])
  in_tail = index >= prefix
  return GroupPart(
    tokens=np.concatenate([ids[members[0]][:prefix], *tails]),
    positions=np.where(in_tail, prefix + index - own_start, index),
    start=own_start,
    end=index + 1,
    prefix_end=np.where(in_tail, np.int32(prefix), np.int32(0)),
    reward_index=ends - 1,
    candidates=members,
  )


def group_batch(
  parts: Sequence[GroupPart], first: Sequence[int], packed: Sequence[Sequence[int]], row_length: int, most: int
) -> GroupBatch:
  """Lays parts behind one another into rows, padded to `row_length` tokens and `most` candidates.

  Args:
    first: for each part the number of its group's first candidate among all candidates of the call.
    packed: for each row which parts it holds (see `packing.first_fit`).
  """
  shape = (len(packed), row_length)
  tokens, positions, start, end, prefix_start, prefix_end = (np.zeros(shape, np.int32) for _ in range(6))
  reward_index, index = np.zeros((len(packed), most), np.int32), np.full((len(packed), most), -1, np.int32)
  for b, members in enumerate(packed):
    low, filled = 0, 0
    for member in members:
      part = parts[member]
      high, more = low + len(part.tokens), filled + len(part.candidates)
      tokens[b, low:high], positions[b, low:high] = part.tokens, part.positions
      start[b, low:high], end[b, low:high] = part.start + low, part.end + low
      in_tail = part.prefix_end > 0
      prefix_start[b, low:high][in_tail], prefix_end[b, low:high][in_tail] = low, part.prefix_end[in_tail] + low
      reward_index[b, filled:more] = part.reward_index + low
      index[b, filled:more] = first[member] + np.asarray(part.candidates)
      low, filled = high, more
  return GroupBatch(tokens, positions, start, end, prefix_start, prefix_end, reward_index, index)
