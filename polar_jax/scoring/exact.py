"""Rewards that depend on the row alone, to the last bit: not on the batch size, the order, or what else is scored.

Every candidate is a row of its own, of shape (1, T), where T is a function of its own length. What does not give that:

  a batch of rows  how a matmul rounds depends on its shape, so a row's reward would change with the number of its neighbours
  jax.lax.map      XLA unrolls a loop of one iteration and fuses it with what is around it: one row is then another program than two
  packing          a sequence is cut into other tiles of attention wherever in the row it begins

The price is padding, a third of a long row at worst, and small matmuls for short ones. What remains: another device, number of
devices along `tensor`, version of XLA or number of CPU threads may round differently.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.config import ModelConfig
from polar_jax.data.layout import sequence_batch
from polar_jax.data.template import Template
from polar_jax.model.reward_model import sequence_rewards
from polar_jax.scoring.scorer import jit_rewards, ladder_length
from polar_jax.types import Group, UserError

# Computations that the host may be ahead of the device. Their inputs are all that they hold there: a few integers for each token.
_IN_FLIGHT = 32


class RowError(UserError):
  """A row that cannot be scored.

  Attributes:
    index: of the row in the call.
    reason: without the row.
  """

  def __init__(self, index: int, reason: str):
    super().__init__(f'example {index}: {reason}')
    self.index, self.reason = index, reason

  def __reduce__(self) -> tuple:
    return type(self), (self.index, self.reason)


class ExactScorer:
  """A reward model with its template. One compilation for each row length of the ladder that occurs.

  On a mesh with S shards of the batch, S rows of one length go together, one to a device (padding rows where there are fewer).
  Parameters that are divided over `fsdp` are brought together for each call, which costs more than it does in training, where a
  call is a whole batch: better `data`, where the model fits a device.

  Args:
    params: of a RewardModel, as `step.TrainState.params`, `load_params` or `Pretrained.params` give them.
  """

  def __init__(self, params: dict[str, Any], model: ModelConfig, template: Template, mesh: Mesh):
    self.params, self.model = params, model
    self._template, self._mesh, self._vocab_size = template, mesh, model.known_vocab_size
    # XLA times matmul kernels of a GPU whenever it compiles, and takes the fastest: another process may end up with another one.
    on_gpu = mesh.devices.flat[0].platform in ('gpu', 'cuda', 'rocm')
    options = {'xla_gpu_deterministic_ops': True} if on_gpu else None
    self._forward = jit_rewards(sequence_rewards, model, mesh, options)

  def score(self, rows: Sequence[Group]) -> np.ndarray:
    """Rewards (rows,) of groups of one candidate each, float32, in order.

    Raises:
      RowError: naming the row: a text is no text, it has not one candidate, a token is none of the model's, its reward is not finite.
    """
    return self.score_sequences(self.encode(rows))

  def encode(self, rows: Sequence[Group]) -> list[list[int]]:
    """Token ids of each row. Raises RowError."""
    sequences = []
    for index, row in enumerate(rows):
      if len(row.candidates) != 1:
        raise RowError(index, f'has {len(row.candidates)} candidates; here every candidate is a row of its own')
      try:
        sequences += self._template.encode_candidates(row.prompt, row.reference, row.candidates, row.wrapper)
      except UserError as error:
        raise RowError(index, str(error)) from error
    return sequences

  def score_sequences(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Rewards (sequences,) of token ids that end in the reward token, float32, in order. Raises RowError."""
    for index, sequence in enumerate(sequences):
      if not sequence or not 0 <= min(sequence) <= max(sequence) < self._vocab_size:
        wrong = 'no tokens' if not sequence else f'the token {max(sequence) if min(sequence) >= 0 else min(sequence)}'
        raise RowError(index, f"has {wrong}, and the model's go from 0 to {self._vocab_size - 1}; is this its tokenizer?")
    rewards = np.full(len(sequences), np.nan, np.float32)
    in_flight: collections.deque[tuple[list[int], jax.Array]] = collections.deque()
    for members, reward_B in self._dispatch(sequences):
      in_flight.append((members, reward_B))
      if len(in_flight) > _IN_FLIGHT:
        _fetch(in_flight, rewards)
    while in_flight:
      _fetch(in_flight, rewards)
    bad = np.flatnonzero(~np.isfinite(rewards))
    if bad.size:
      raise RowError(int(bad[0]), f'its reward is {rewards[bad[0]]}: a parameter is not finite, or the compute type overflows')
    return rewards

  def _dispatch(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], jax.Array]]:
    """(which sequences, their rewards, on the device) of every call; those of one row length one after another."""
    shards = sharding.batch_shards(self._mesh)
    by_length: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
      by_length.setdefault(ladder_length(len(sequence)), []).append(index)
    for length, indices in sorted(by_length.items()):
      for low in range(0, len(indices), shards):
        members = indices[low : low + shards]
        batch = sequence_batch([sequences[i] for i in members], length, shards)
        with jax.set_mesh(self._mesh):
          reward_B = self._forward(self.params, sharding.put_global(batch, self._mesh))
        yield members, reward_B


def _fetch(in_flight: collections.deque[tuple[list[int], jax.Array]], rewards: np.ndarray) -> None:
  members, reward_B = in_flight.popleft()
  rewards[members] = jax.device_get(reward_B)[: len(members)]
