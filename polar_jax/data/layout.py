"""Layout of token sequences as segments, and of segments as rows of a batch.

A segment holds the sequences of one triplet, or of candidates for one prompt and reference, with their shared prefix stored once.
Each token sees the keys of one or two intervals of its segment, and positions are those of the original sequences, so rewards equal
those of the sequences read separately. A row holds several segments; intervals move with the tokens they point at, so no token sees
another segment.

The two sequences (chosen, rejected) of a triplet need one interval per token, which is what training uses:

    [ chosen tail, reversed | shared prefix | rejected tail ]

A token of the prefix or of the rejected tail at index j sees [prefix start, j]; a token of the chosen tail at index i, stored right
to left, sees [i, prefix end).

Any number of candidates need two: a token of the prefix sees the prefix up to itself, and a token of a tail sees its own tail up to
itself and the whole prefix. The keys and values of the prefix are thus computed once for all candidates, without a cache:

    [ shared prefix | tail of candidate 0 | tail of candidate 1 | ... ]

Rollouts are laid out like candidates, without reward tokens. On the host, their values per token are arrays (R, T): rollout by token
of the response. On the device, the value of a token is stored at the token before it, which predicts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from polar_jax.data import packing
from polar_jax.types import GroupBatch, PairBatch, PolicyBatch, RankedBatch, Rollouts, SequenceBatch, TextBatch, UserError


class Segment(NamedTuple):
  """Sequences laid out together. Arrays have one entry per token of the segment; indices and intervals count from its first token."""

  tokens: np.ndarray
  positions: np.ndarray
  start: np.ndarray
  end: np.ndarray
  prefix_end: np.ndarray  # the second interval of a token is [0, prefix_end); empty for tokens that need only one
  last_index: np.ndarray  # (sequences,), index of each sequence's last token, such as its reward token
  members: Sequence[int]  # the caller's number of each sequence


def shared_prefix_length(chosen: np.ndarray, rejected: np.ndarray) -> int:
  """Return the number of tokens before the first difference, counted on tokens because string boundaries are not token boundaries."""
  n = min(len(chosen), len(rejected))
  differs = np.flatnonzero(chosen[:n] != rejected[:n])
  return int(differs[0]) if differs.size else n


def pair_segment(chosen_ids: Sequence[int], rejected_ids: Sequence[int]) -> Segment:
  """Lay out the two sequences of a triplet, each ending in its reward token, with one interval per token.

  Raises:
    UserError: a sequence has no tokens.
  """
  chosen, rejected = np.asarray(chosen_ids, np.int32), np.asarray(rejected_ids, np.int32)
  if not (len(chosen) and len(rejected)):
    raise UserError('a candidate sequence has no tokens; even an empty candidate must end in the reward token')
  shared = shared_prefix_length(chosen, rejected)
  tail, total = len(chosen) - shared, len(chosen) + len(rejected) - shared
  index = np.arange(total, dtype=np.int32)
  in_tail = index < tail
  return Segment(
    tokens=np.concatenate([chosen[shared:][::-1], chosen[:shared], rejected[shared:]]),
    positions=np.where(in_tail, shared + tail - 1 - index, index - tail),
    start=np.where(in_tail, index, np.int32(tail)),
    end=np.where(in_tail, np.int32(tail + shared), index + 1),
    prefix_end=np.zeros(total, np.int32),
    # With an empty tail, the candidate's reward token is the last token of the prefix.
    last_index=np.array([0 if tail else shared - 1, total - 1], np.int32),
    members=(0, 1),
  )


def check_candidates(sequences: Sequence[Sequence[int]], row_length: int) -> None:
  """Check the numbers of tokens of candidates.

  Raises:
    UserError: a sequence is empty or longer than a row; the message names the candidate.
  """
  for c, sequence in enumerate(sequences):
    if not 0 < len(sequence) <= row_length:
      raise UserError(f'candidate {c} has {len(sequence)} tokens; it must have at least 1, and at most the row length {row_length}')


def group_segments(sequences: Sequence[Sequence[int]], row_length: int, max_members: int, max_shared: int | None = None) -> list[Segment]:
  """Lay out the sequences of one group: as one segment, or as several that each repeat the prefix if the group is too large for a row.

  Args:
    sequences: token ids; each sequence ends in its reward token.
    row_length: maximum number of tokens of a segment.
    max_members: maximum number of sequences of a segment.
    max_shared: maximum number of prefix tokens to share; None: as many as the sequences have in common.

  Returns:
    Segments whose `members` are indices into `sequences`.

  Raises:
    UserError: a sequence is empty or longer than a row; the message names the candidate.
  """
  check_candidates(sequences, row_length)
  ids = [np.asarray(sequence, np.int32) for sequence in sequences]
  if not ids:
    return []
  # Each tail keeps at least its reward token.
  prefix = min(min(len(s) - 1 for s in ids), *(shared_prefix_length(ids[0], s) for s in ids))
  prefix = prefix if max_shared is None else min(prefix, max_shared)
  parts: list[list[int]] = [[]]
  room = row_length - prefix
  for c, sequence in enumerate(ids):
    if len(parts[-1]) == max_members or len(sequence) - prefix > room:
      parts.append([])
      room = row_length - prefix
    parts[-1].append(c)
    room -= len(sequence) - prefix
  return [_group_segment(ids, prefix, members) for members in parts]


def _group_segment(ids: Sequence[np.ndarray], prefix: int, members: Sequence[int]) -> Segment:
  tails = [ids[c][prefix:] for c in members]
  ends = prefix + np.cumsum([len(t) for t in tails], dtype=np.int32)
  starts = np.concatenate([[prefix], ends[:-1]]).astype(np.int32)
  index = np.arange(ends[-1], dtype=np.int32)
  own_start = np.concatenate([np.zeros(prefix, np.int32), *(np.full(len(t), s, np.int32) for t, s in zip(tails, starts, strict=True))])
  in_tail = index >= prefix
  return Segment(
    tokens=np.concatenate([ids[members[0]][:prefix], *tails]),
    positions=np.where(in_tail, prefix + index - own_start, index),
    start=own_start,
    end=index + 1,
    prefix_end=np.where(in_tail, np.int32(prefix), np.int32(0)),
    last_index=ends - 1,
    members=members,
  )


class _Rows(NamedTuple):
  """Rows of segments: six int32 arrays (B, T), and the offset of every segment in its row."""

  tokens: np.ndarray
  positions: np.ndarray
  start: np.ndarray
  end: np.ndarray
  prefix_start: np.ndarray
  prefix_end: np.ndarray
  offsets: list[list[int]]  # for each row, in the order of its segments


def _place(segments: Sequence[Segment], packed: Sequence[Sequence[int]], row_length: int) -> _Rows:
  """Place segments one after another in rows of `row_length` tokens. Padding is token 0 with empty intervals.

  Args:
    segments: the segments of a batch.
    packed: for each row, the indices of its segments (see `packing.first_fit`); an empty row is all padding.
    row_length: tokens of a row.
  """
  tokens, positions, start, end, prefix_start, prefix_end = (np.zeros((len(packed), row_length), np.int32) for _ in range(6))
  offsets: list[list[int]] = []
  for b, row in enumerate(packed):
    offsets.append([])
    low = 0
    for item in row:
      segment = segments[item]
      high = low + len(segment.tokens)
      tokens[b, low:high], positions[b, low:high] = segment.tokens, segment.positions
      start[b, low:high], end[b, low:high] = segment.start + low, segment.end + low
      has_prefix = segment.prefix_end > 0
      prefix_start[b, low:high][has_prefix], prefix_end[b, low:high][has_prefix] = low, segment.prefix_end[has_prefix] + low
      offsets[-1].append(low)
      low = high
  return _Rows(tokens, positions, start, end, prefix_start, prefix_end, offsets)


def pair_batch(
  segments: Sequence[Segment],
  indices: Sequence[int],
  packed: Sequence[Sequence[int]],
  row_length: int,
  max_pairs: int,
  margins: np.ndarray | None = None,
  weights: np.ndarray | None = None,
) -> PairBatch:
  """Build a batch of triplets. Padding pairs read their rewards at token 0, and the mask leaves them out.

  Args:
    segments: one `pair_segment` for each triplet.
    indices: which example of the data set each triplet is.
    packed: for each row, the indices of its segments; an empty row is all padding.
    row_length: tokens of a row.
    max_pairs: pairs that a row has room for.
    margins: of each triplet; None: the batch has none.
    weights: of each triplet; None: the batch has none.
  """
  rows = _place(segments, packed, row_length)
  reward_index = np.zeros((len(packed), max_pairs, 2), np.int32)
  mask, index = np.zeros((len(packed), max_pairs), np.float32), np.full((len(packed), max_pairs), -1, np.int32)
  for b, (row, offsets) in enumerate(zip(packed, rows.offsets, strict=True)):
    for p, (item, offset) in enumerate(zip(row, offsets, strict=True)):
      reward_index[b, p], mask[b, p], index[b, p] = segments[item].last_index + offset, 1, indices[item]
  of_pairs = lambda values: None if values is None else _of_places(values, packed, max_pairs)
  batch = PairBatch(rows.tokens, rows.positions, rows.start, rows.end, reward_index, mask, index)
  return batch._replace(margin_BP=of_pairs(margins), weight_BP=of_pairs(weights))


def _of_places(values: np.ndarray, packed: Sequence[Sequence[int]], places: int) -> np.ndarray:
  """Return numbers of segments by row and place in the row, as float32 (B, places); 0 for padding."""
  out = np.zeros((len(packed), places), np.float32)
  for b, row in enumerate(packed):
    out[b, : len(row)] = values[row]
  return out


def list_segment(sequences: Sequence[Sequence[int]]) -> Segment:
  """Lay out the candidates of a ranked list, each ending in its reward token, as one segment with their shared prefix."""
  (segment,) = group_segments(sequences, sum(map(len, sequences)), len(sequences))
  return segment


def ranked_batch(
  segments: Sequence[Segment],
  ranks: Sequence[Sequence[int]],
  indices: Sequence[int],
  packed: Sequence[Sequence[int]],
  row_length: int,
  shape: tuple[int, int],
  weights: np.ndarray | None = None,
) -> RankedBatch:
  """Build a batch of ranked lists. Padding candidates read their rewards at token 0, and have no rank.

  Args:
    segments: one `list_segment` for each list.
    ranks: of the candidates of each list, best first.
    indices: which example of the data set each list is.
    packed: for each row, the indices of its segments; an empty row is all padding.
    row_length: tokens of a row.
    shape: lists that a row has room for, and candidates that a list has room for.
    weights: of each list; None: the batch has none.
  """
  rows = _place(segments, packed, row_length)
  reward_index, rank = np.zeros((len(packed), *shape), np.int32), np.full((len(packed), *shape), -1, np.int32)
  mask, index = np.zeros((len(packed), shape[0]), np.float32), np.full((len(packed), shape[0]), -1, np.int32)
  for b, (row, offsets) in enumerate(zip(packed, rows.offsets, strict=True)):
    for p, (item, offset) in enumerate(zip(row, offsets, strict=True)):
      size = len(ranks[item])
      reward_index[b, p, :size], rank[b, p, :size] = segments[item].last_index + offset, ranks[item]
      mask[b, p], index[b, p] = 1, indices[item]
  of_lists = None if weights is None else _of_places(weights, packed, shape[0])
  return RankedBatch(
    rows.tokens, rows.positions, rows.start, rows.end, rows.prefix_start, rows.prefix_end, reward_index, rank, mask, index, of_lists
  )


def group_batch(segments: Sequence[Segment], packed: Sequence[Sequence[int]], row_length: int, max_candidates: int) -> GroupBatch:
  """Build a batch of groups.

  Args:
    segments: of `group_segments`, with `members` that number all candidates of the call.
    packed: for each row, the indices of its segments; an empty row is all padding.
    row_length: tokens of a row.
    max_candidates: candidates that a row has room for.
  """
  rows = _place(segments, packed, row_length)
  reward_index, index = np.zeros((len(packed), max_candidates), np.int32), np.full((len(packed), max_candidates), -1, np.int32)
  for b, (row, offsets) in enumerate(zip(packed, rows.offsets, strict=True)):
    low = 0
    for item, offset in zip(row, offsets, strict=True):
      high = low + len(segments[item].members)
      reward_index[b, low:high], index[b, low:high] = segments[item].last_index + offset, segments[item].members
      low = high
  return GroupBatch(rows.tokens, rows.positions, rows.start, rows.end, rows.prefix_start, rows.prefix_end, reward_index, index)


def sequence_batch(sequences: Sequence[Sequence[int]], row_length: int, num_rows: int) -> SequenceBatch:
  """Build a batch with one sequence per row, from its first token on, and rows of padding up to `num_rows`."""
  segments = [segment for ids in sequences for segment in group_segments([ids], row_length, 1, max_shared=0)]
  packed = [[i] if i < len(segments) else [] for i in range(num_rows)]
  rows = _place(segments, packed, row_length)
  last_index = np.array([int(segments[i].last_index[0]) if i < len(segments) else 0 for i in range(num_rows)], np.int32)
  return SequenceBatch(rows.tokens, rows.positions, rows.start, rows.end, last_index)


def text_batch(windows: Sequence[np.ndarray | None], indices: Sequence[int], length: int) -> TextBatch:
  """Stack windows of `length + 1` tokens as inputs and next-token targets. None is a padding row."""
  shape = (len(windows), length)
  tokens, target, end = (np.zeros(shape, np.int32) for _ in range(3))
  mask, index = np.zeros(shape, np.float32), np.full(len(windows), -1, np.int32)
  position = np.arange(length, dtype=np.int32)
  for b, (window, i) in enumerate(zip(windows, indices, strict=True)):
    if window is None:
      continue
    tokens[b], target[b], end[b], mask[b], index[b] = window[:-1], window[1:], position + 1, 1, i
  return TextBatch(tokens, np.broadcast_to(position, shape).copy(), np.zeros(shape, np.int32), end, target, mask, index)


def policy_batches(rollouts: Rollouts, which: Sequence[int], row_length: int, num_rows: int) -> list[PolicyBatch]:
  """Pack rollouts into as many micro-batches of one shape (num_rows, row_length) as they need, so that nothing is compiled anew.

  Args:
    rollouts: all rollouts of a step.
    which: the indices of those to pack, each once. Responses to one prompt share its computation.
    row_length: tokens of a row.
    num_rows: rows of a micro-batch.

  Raises:
    UserError: a prompt with its response is longer than a row.
  """
  segments: list[Segment] = []
  for members in _by_prompt(rollouts, which):
    # The last token is only ever a target. The prompt's last token predicts the first token of each response, so it belongs to the tails.
    sequences = [[*rollouts.prompts[r], *rollouts.tokens_RT[r, : rollouts.length_R[r] - 1].tolist()] for r in members]
    shared = len(rollouts.prompts[members[0]]) - 1 if len(members) > 1 else 0
    for segment in group_segments(sequences, row_length, len(members), shared):
      segments.append(segment._replace(members=[members[c] for c in segment.members]))
  lengths = [len(segment.tokens) for segment in segments]
  packed = packing.first_fit(lengths, row_length, max(len(lengths), 1))
  packed += [[]] * (-len(packed) % num_rows)
  # Interleaved, so that every micro-batch, and every device of it, gets long and short rows alike.
  packed = packing.interleave(packed, len(packed) // num_rows)
  return [_policy_batch(rollouts, segments, packed[b : b + num_rows], row_length) for b in range(0, len(packed), num_rows)]


def _by_prompt(rollouts: Rollouts, which: Sequence[int]) -> list[list[int]]:
  """Return the rollouts `which`, grouped by equal prompts."""
  groups: dict[tuple[int, ...], list[int]] = {}
  for r in which:
    groups.setdefault(tuple(rollouts.prompts[r]), []).append(r)
  return list(groups.values())


def _policy_batch(rollouts: Rollouts, segments: Sequence[Segment], packed: Sequence[Sequence[int]], row_length: int) -> PolicyBatch:
  rows = _place(segments, packed, row_length)
  target, target_index = (np.zeros(rows.tokens.shape, np.int32) for _ in range(2))
  rollout = np.full(rows.tokens.shape, -1, np.int32)
  for b, (row, offsets) in enumerate(zip(packed, rows.offsets, strict=True)):
    for item, offset in zip(row, offsets, strict=True):
      for r, last in zip(segments[item].members, segments[item].last_index, strict=True):
        size = int(rollouts.length_R[r])
        at = np.s_[b, offset + last + 1 - size : offset + last + 1]
        target[at], rollout[at], target_index[at] = rollouts.tokens_RT[r, :size], r, np.arange(size)
  return PolicyBatch(rows.tokens, rows.positions, rows.start, rows.end, rows.prefix_start, rows.prefix_end, target, rollout, target_index)


def scatter_values(values_RT: np.ndarray, batch: PolicyBatch) -> np.ndarray:
  """Return the values (B, T) of response tokens at the positions of the batch that predict them, and 0 elsewhere."""
  return np.where(batch.rollout_BT >= 0, values_RT[batch.rollout_BT, batch.target_index_BT], np.zeros((), values_RT.dtype))


def gather_values(values_BT: Any, batch: PolicyBatch, out_RT: np.ndarray) -> None:
  """Write the values of the batch's response tokens into `out_RT`: the inverse of `scatter_values`."""
  is_target_BT = batch.rollout_BT >= 0
  out_RT[batch.rollout_BT[is_target_BT], batch.target_index_BT[is_target_BT]] = values_BT[is_target_BT]


def response_mask(rollouts: Rollouts) -> np.ndarray:
  """Return a mask (R, T) float32 that is 1 on the tokens of each response."""
  return (np.arange(rollouts.tokens_RT.shape[1])[None] < rollouts.length_R[:, None]).astype(np.float32)
