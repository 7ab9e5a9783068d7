"""Calls of a few fixed shapes for sequences of any lengths, so that a server compiles everything before its first request.

In exact mode a call is one row of the ladder of `scoring.exact`, so rewards have the bits of the score stage. In packed mode a row
holds several groups, whose shared beginning is computed once. Sequences of equal tokens are computed once in both modes.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from polar_jax import sharding
from polar_jax.api import RewardModel
from polar_jax.data import packing
from polar_jax.data.layout import GroupBatch, Segment, group_batch, group_segments
from polar_jax.model.reward_model import group_rewards
from polar_jax.scoring.scorer import jit_rewards, ladder_length

# Packed mode: total tokens from which a batch has more than one row per shard. Below, one row holds everything.
_LONG_ROW = 1_024
# Packed mode: tokens of a row per candidate that it has room for.
_TOKENS_PER_CANDIDATE = 8
# Packed mode: groups of at most this many tokens are not divided, which would compute their shared beginning several times.
_WHOLE_GROUP = 8_192
# Packed mode: rows of padding that a call may have, as a share of its rows in use.
_SPARE = 0.34


class Call(NamedTuple):
  """A call in flight.

  Attributes:
    members: the sequence of each entry of `rewards`, negative for padding.
    rewards: on the device.
    tokens: token positions that the call computes, padding included.
  """

  members: np.ndarray
  rewards: jax.Array
  tokens: int


class Batches(abc.ABC):
  """Computes sequences in fixed shapes. Its methods belong to one thread.

  Attributes:
    in_flight: calls that the device has at a time before the host waits for one: the device must never wait for the host.
  """

  in_flight: int

  @abc.abstractmethod
  def warm_up(self) -> Iterator[str]:
    """Compile every shape, and yield a description of each when it has run once."""

  @abc.abstractmethod
  def dispatch(self, groups: Sequence[Sequence[np.ndarray]]) -> Iterator[Call]:
    """Start to compute sequences, and yield each call as soon as it is dispatched.

    Args:
      groups: token ids of the sequences of each group, which begin alike. `Call.members` counts through all groups in order.
    """


class ExactBatches(Batches):
  """One sequence per row and shard.

  Args:
    model: the reward model.
    max_length: tokens of the longest sequence.
  """

  in_flight = 64  # calls are small

  def __init__(self, model: RewardModel, max_length: int):
    self._scorer = model.exact_scorer
    self._lengths = ladder(max_length)

  def warm_up(self) -> Iterator[str]:
    for length in self._lengths:
      jax.block_until_ready(self._scorer.dispatch([[0] * length], length))
      yield f'rows of {length} tokens'

  def dispatch(self, groups: Sequence[Sequence[np.ndarray]]) -> Iterator[Call]:
    sequences = [sequence for group in groups for sequence in group]
    by_length: dict[int, list[int]] = {}
    for i, sequence in enumerate(sequences):
      by_length.setdefault(ladder_length(len(sequence)), []).append(i)
    rows = self._scorer.rows_per_call
    for length, members in by_length.items():
      for low in range(0, len(members), rows):
        part = members[low : low + rows]
        index = np.full(rows, -1)
        index[: len(part)] = part
        yield Call(index, self._scorer.dispatch([sequences[i].tolist() for i in part], length), rows * length)


class PackedBatches(Batches):
  """Groups packed densely into rows; a power of two of tokens per row, and of four of rows, bounded by `batch_tokens`.

  Args:
    model: the reward model.
    max_length: tokens of the longest sequence.
    batch_tokens: token positions of the largest call, if it has several rows per shard.
  """

  in_flight = 2  # one computes and one waits, while requests gather in the queue for the next

  def __init__(self, model: RewardModel, max_length: int, batch_tokens: int):
    self._params, self._mesh = model.params, model.mesh
    self._forward = jit_rewards(group_rewards, model.config, model.mesh)
    shards = sharding.batch_shards(model.mesh)
    self._rows: dict[int, list[int]] = {}  # row length -> numbers of rows, rising
    length = packing.LENGTH_MULTIPLE
    # A group is longer than its sequences, and short sequences fill long rows densely.
    longest_row = max(max_length, min(batch_tokens, _WHOLE_GROUP))
    while True:
      most = max(1, batch_tokens // length // shards) if length >= _LONG_ROW else 1
      counts = {4**k for k in range(16) if 4**k <= most} | {most}
      self._rows[length] = sorted(shards * count for count in counts)
      if length >= longest_row:
        break
      length *= 2

  def warm_up(self) -> Iterator[str]:
    for length, counts in self._rows.items():
      for rows in counts:
        jax.block_until_ready(self._call([], [[]] * rows, length).rewards)
        yield f'{rows} rows of {length} tokens'

  def dispatch(self, groups: Sequence[Sequence[np.ndarray]]) -> Iterator[Call]:
    longest = max(len(sequence) for group in groups for sequence in group)
    tokens = [_distinct_tokens(group) for group in groups]
    length = self._row_length(max(longest, min(sum(tokens), _LONG_ROW), min(max(tokens), _WHOLE_GROUP)))
    segments: list[Segment] = []
    first = 0
    for group in groups:
      for segment in group_segments([sequence.tolist() for sequence in group], length, length // _TOKENS_PER_CANDIDATE):
        segments.append(segment._replace(members=[first + member for member in segment.members]))
      first += len(group)
    counts = [len(segment.members) for segment in segments]
    packed = packing.first_fit([len(segment.tokens) for segment in segments], length, length // _TOKENS_PER_CANDIDATE, counts)
    low = 0
    for rows in self._divide(len(packed), length):
      part = packed[low : low + rows]
      yield self._call(segments, part + [[]] * (rows - len(part)), length)
      low += rows

  def _row_length(self, tokens: int) -> int:
    """Return the shortest row for so many tokens, or the longest there is."""
    return next((length for length in self._rows if length >= tokens), max(self._rows))

  def _divide(self, needed: int, length: int) -> Iterator[int]:
    """Yield the rows of each call for a number of rows: large calls, and little padding."""
    counts = self._rows[length]
    while needed > 0:
      fitting = [count for count in counts if count <= needed * (1 + _SPARE)]
      rows = fitting[-1] if fitting else counts[0]
      yield rows
      needed -= rows

  def _call(self, segments: Sequence[Segment], packed: Sequence[Sequence[int]], length: int) -> Call:
    batch: GroupBatch = group_batch(segments, packed, length, length // _TOKENS_PER_CANDIDATE)
    with jax.set_mesh(self._mesh):
      rewards = self._forward(self._params, sharding.put_global(batch, self._mesh))
    return Call(batch.index_BQ, rewards, batch.tokens_BT.size)


def _distinct_tokens(group: Sequence[np.ndarray]) -> int:
  """Return an upper bound of the tokens of a group when its shared beginning is counted once."""
  shared = 0
  if len(group) > 1:
    shortest = min(map(len, group))
    heads = np.stack([sequence[:shortest] for sequence in group])
    differs = np.flatnonzero((heads != heads[0]).any(axis=0))
    shared = int(differs[0]) if differs.size else shortest - 1
  return sum(map(len, group)) - shared * (len(group) - 1)


def ladder(max_length: int) -> list[int]:
  """Return the row lengths of `ladder_length` for sequences of up to `max_length` tokens."""
  lengths = [ladder_length(1)]
  while lengths[-1] < max_length:
    lengths.append(ladder_length(lengths[-1] + 1))
  return lengths
