"""Scores candidates with a reward model, packing groups of them densely. Used by evaluation and PPO.

The last bits of a reward depend on what else is in its batch; `polar_jax.scoring.exact` avoids that at the cost of dense packing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polar_jax import sharding
from polar_jax.config import ModelConfig
from polar_jax.data import packing
from polar_jax.data.layout import Segment, check_candidates, group_batch, group_segments
from polar_jax.data.template import Template
from polar_jax.model import heads
from polar_jax.model.reward_model import RewardModel, group_rewards
from polar_jax.runtime import preemption
from polar_jax.types import Group, Triplet, UserError

# Without a given row length, rows are at least this many times the mean length of the segments of a call, so that they pack densely.
_MEAN_LENGTHS = 4
# With `ladder`, a large group is divided into segments of about this many tokens, each with the prefix.
_LADDER_ROW = 4_096
_IN_FLIGHT = 1  # batches that wait for the device while it computes another


class Scorer:
  """A reward model with its template. The candidates of a group share the computation of their prefix; a row holds several groups.

  Every batch of every call has the same shape (rows, row_length, candidates), so there is one compilation, unless the row length is
  chosen call by call.

  Args:
    params: of a RewardModel, as returned by `step.TrainState.params` or `load_params`.
    model: shape of the reward model and how it is computed.
    template: turns examples into token ids.
    mesh: devices of the parameters.
    row_length: tokens of a row; a group that does not fit into one is divided. None: chosen for each call.
    rows: rows of a batch, rounded up to a multiple of the batch shards of the mesh.
    candidates: most candidates of a row.
    grow: double the row length, which costs a compilation, whenever a single candidate does not fit; without it, that is an error.
    ladder: choose the row length of each call from a short ladder of lengths, and only as many rows as the call needs, so that calls
      of any size compile few programs and compute little padding.
  """

  def __init__(
    self,
    params: dict[str, Any],
    model: ModelConfig,
    template: Template,
    mesh: Mesh,
    *,
    row_length: int | None = None,
    rows: int = 16,
    candidates: int = 64,
    grow: bool = False,
    ladder: bool = False,
  ):
    self.params = params
    self._template, self._mesh, self._row_length, self._candidates, self._grow = template, mesh, row_length, candidates, grow
    self._ladder = ladder
    shards = sharding.batch_shards(mesh)
    self._rows = sharding.round_up(rows, shards)
    self._forward = _jit_group_rewards(model, mesh)

  @property
  def template(self) -> Template:
    """What turns examples into token ids."""
    return self._template

  def score(self, groups: Sequence[Group], alone: bool = False) -> list[np.ndarray]:
    """Return the rewards of each group's candidates, float32, in order. A group may have any number of candidates, including none.

    Sequences of equal tokens are computed once, wherever they are in the call, because the last bits of a reward depend on its place in
    a batch: equal candidates tie.

    Args:
      groups: candidates with their prompt and reference.
      alone: truncate a long prompt for each candidate as if it were the only one of its group, so that no reward depends on the others.

    Raises:
      UserError: an input is neither a string nor a list of messages, or a candidate is longer than a row; it names group and candidate.
    """
    segments: list[Segment] = []
    starts = np.concatenate([[0], np.cumsum([len(group.candidates) for group in groups], dtype=int)])
    first: dict[bytes, int] = {}  # token ids -> the first candidate that has them
    twin = np.arange(starts[-1])  # the candidate whose reward each one shares
    for g, group in enumerate(groups):
      try:
        sequences = self._template.encode_candidates(group.prompt, group.reference, group.candidates, group.wrapper, alone)
        while self._grow and self._row_length and max(map(len, sequences), default=0) > self._row_length:
          self._row_length *= 2
        if self._row_length:
          check_candidates(sequences, self._row_length)
        keys = [np.asarray(sequence, np.int32).tobytes() for sequence in sequences]
        twin[starts[g] : starts[g + 1]] = [first.setdefault(key, int(starts[g]) + c) for c, key in enumerate(keys)]
        new = [c for c in range(len(sequences)) if twin[starts[g] + c] == starts[g] + c]
        fresh = [sequences[c] for c in new]
        of_group = group_segments(fresh, self._row_length or self._max_segment(fresh), self._candidates)
      except UserError as error:
        raise UserError(f'group {g}: {error}') from error
      segments += [segment._replace(members=[int(starts[g]) + new[c] for c in segment.members]) for segment in of_group]
    rewards = np.full(starts[-1], np.nan, np.float32)
    for index_BQ, rewards_BQ in self._batches(segments):
      rewards[index_BQ[index_BQ >= 0]] = rewards_BQ[index_BQ >= 0]
    return np.split(rewards[twin], starts[1:-1]) if groups else []

  def score_pairs(self, triplets: Sequence[Triplet]) -> np.ndarray:
    """Return rewards (triplets, 2) of the chosen and the rejected candidates, float32."""
    groups = [Group(t.prompt, t.reference, (t.chosen, t.rejected), t.wrapper) for t in triplets]
    return np.array(self.score(groups), np.float32).reshape(-1, 2)

  def _max_segment(self, sequences: Sequence[Sequence[int]]) -> int:
    """Return the most tokens of a segment when no row length is given: those of the group, or with `ladder` few enough for short rows."""
    longest, total = max(map(len, sequences), default=1), sum(map(len, sequences))
    return max(longest, min(total, _LADDER_ROW)) if self._ladder else total

  def _batches(self, segments: Sequence[Segment]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (indices of the candidates, their rewards) of every batch. The host packs a batch while the device scores the previous one."""
    if not segments:
      return []
    lengths = [len(segment.tokens) for segment in segments]
    row_length = self._row_length or (ladder_length(max(lengths)) if self._ladder else _choose_row_length(lengths))
    packed = packing.first_fit(lengths, row_length, self._candidates, [len(segment.members) for segment in segments])
    rows = self._rows
    if self._ladder:
      rows = min(rows, sharding.round_up(1 << (len(packed) - 1).bit_length(), sharding.batch_shards(self._mesh)))
    packed += [[]] * (-len(packed) % rows)
    scored: list[tuple[np.ndarray, Any]] = []
    with jax.set_mesh(self._mesh):
      for low in range(0, len(packed), rows):
        preemption.check()
        batch = group_batch(segments, packed[low : low + rows], row_length, self._candidates)
        scored.append((batch.index_BQ, self._forward(self.params, sharding.put_global(batch, self._mesh))))
        if len(scored) > _IN_FLIGHT:  # further ahead the host would not notice SIGTERM, and batches would fill the memory
          scored[-1 - _IN_FLIGHT] = jax.device_get(scored[-1 - _IN_FLIGHT])
    return jax.device_get(scored)


def jit_rewards(
  read: Callable[[RewardModel, Any], jax.Array], model: ModelConfig, mesh: Mesh, compiler_options: dict[str, Any] | None = None
) -> Any:
  """Return a jitted (params, batch) -> `read(model with params, batch)`, with rows sharded over the batch axes.

  With compute_dtype='float32' matrices are multiplied in full float32; by default accelerators use TF32 or bfloat16.

  Args:
    read: computes the result from the model and a batch.
    model: shape of the reward model and how it is computed.
    mesh: devices of the parameters.
    compiler_options: of XLA.

  Returns:
    The jitted function. Its result is replicated on all devices.
  """
  abstract = heads.abstract_model(model, 'reward')
  graphdef, _ = nnx.split(abstract)

  def rewards(params: dict[str, Any], batch: Any) -> jax.Array:
    exact = jax.default_matmul_precision('highest') if model.compute_dtype == 'float32' else contextlib.nullcontext()
    with exact:
      return read(nnx.merge(graphdef, params), batch)

  return jax.jit(
    rewards,
    in_shardings=(jax.tree.map(lambda a: a.sharding, sharding.abstract_params(abstract, mesh)), sharding.batch_sharding(mesh)),
    out_shardings=NamedSharding(mesh, PartitionSpec()),
    compiler_options=compiler_options,
  )


@functools.lru_cache(maxsize=4)
def _jit_group_rewards(model: ModelConfig, mesh: Mesh) -> Any:
  """Return the jitted rewards of groups: models of one shape, such as the arms of a comparison, share their programs."""
  return jit_rewards(group_rewards, model, mesh)


def ladder_length(length: int) -> int:
  """Return the smallest of 128, 256, 384, 512, 768, 1024, 1536, ... that is at least `length`.

  These are the powers of two and one and a half times them, as far as they are multiples of 128: few programs to compile, little padding.
  """
  power = max(packing.LENGTH_MULTIPLE, 1 << (length - 1).bit_length())
  between = power // 4 * 3
  return between if length <= between and between % packing.LENGTH_MULTIPLE == 0 else power


def _choose_row_length(lengths: Sequence[int]) -> int:
  """Return a row length that holds the longest segment and packs all of them densely."""
  wanted = max(max(lengths), _MEAN_LENGTHS * sum(lengths) / len(lengths))
  return sharding.round_up(int(wanted), packing.LENGTH_MULTIPLE)
