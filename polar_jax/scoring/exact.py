"""Scores each example so that its reward depends, to the last bit, on nothing but the example.

Batch size, order and the other examples make no difference, because every candidate is a row of its own, of shape (1, T), where T is a
function of its own length. What would break this:

  a batch of rows  the rounding of a matmul depends on its shape, so a reward would change with the number of rows in the batch
  jax.lax.map      XLA unrolls a loop of one iteration and fuses it with the surrounding code, so one row compiles to a different
                   program than two
  packing          attention divides a sequence into different tiles depending on where in the row it starts

The cost is padding, at worst a third of a long row, and small matmuls for short ones. Rounding may still differ between devices,
numbers of devices along `tensor`, versions of XLA and numbers of CPU threads.
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
from polar_jax.runtime import preemption
from polar_jax.scoring.scorer import jit_rewards, ladder_length
from polar_jax.types import Group, UserError

# Calls that the host may dispatch ahead of the device. Each holds only its inputs there: a few integers per token.
_IN_FLIGHT = 32


class ExampleError(UserError):
  """An example that cannot be scored.

  Attributes:
    index: of the example in the call, from 0.
    reason: the message without the example.
  """

  def __init__(self, index: int, reason: str):
    super().__init__(f'example {index}: {reason}')
    self.index, self.reason = index, reason

  def __reduce__(self) -> tuple:
    return type(self), (self.index, self.reason)


class ExactScorer:
  """A reward model with its template. It compiles once for each row length of the ladder that occurs.

  On a mesh with S batch shards, S rows of one length are computed together, one on each shard (with padding rows if there are fewer).
  Parameters sharded over `fsdp` are all-gathered on every call, which costs more than in training, where a call is a whole batch;
  prefer the `data` axis where the model fits one device.

  Args:
    params: of a RewardModel, as returned by `step.TrainState.params`, `load_params` or `Pretrained.params`.
    model: shape of the reward model and how it is computed.
    template: turns examples into token ids.
    mesh: devices of the parameters.
  """

  def __init__(self, params: dict[str, Any], model: ModelConfig, template: Template, mesh: Mesh):
    self.params, self.model = params, model
    self._template, self._mesh, self._vocab_size = template, mesh, model.known_vocab_size
    # XLA autotunes GPU matmuls at every compilation, so two processes may choose different kernels.
    on_gpu = mesh.devices.flat[0].platform in ('gpu', 'cuda', 'rocm')
    options = {'xla_gpu_deterministic_ops': True} if on_gpu else None
    self._forward = jit_rewards(sequence_rewards, model, mesh, options)

  @property
  def rows_per_call(self) -> int:
    """Sequences that one call computes: one on each batch shard of the mesh."""
    return sharding.batch_shards(self._mesh)

  def dispatch(self, sequences: Sequence[Sequence[int]], length: int) -> jax.Array:
    """Start the computation of at most `rows_per_call` sequences.

    Args:
      sequences: token ids that end in the reward token; they are not checked.
      length: `ladder_length` of each of them.

    Returns:
      Their rewards, then those of padding rows, float32 (rows_per_call,). The call does not wait for them.
    """
    batch = sequence_batch(sequences, length, self.rows_per_call)
    with jax.set_mesh(self._mesh):
      return self._forward(self.params, sharding.put_global(batch, self._mesh))

  def score(self, examples: Sequence[Group]) -> np.ndarray:
    """Return the rewards (examples,) of groups of one candidate each, float32, in order.

    Raises:
      ExampleError: an input is neither a string nor a list of messages, a group does not have exactly one candidate, a token is outside
        the model's vocabulary, or a reward is not finite; it names the example.
    """
    return self.score_sequences(self.encode(examples))

  def encode(self, examples: Sequence[Group]) -> list[list[int]]:
    """Return the token ids of each example.

    Raises:
      ExampleError: an example cannot be encoded.
    """
    sequences = []
    for index, example in enumerate(examples):
      if len(example.candidates) != 1:
        raise ExampleError(index, f'has {len(example.candidates)} candidates; exact scoring takes one candidate per example')
      try:
        sequences += self._template.encode_candidates(example.prompt, example.reference, example.candidates, example.wrapper)
      except UserError as error:
        raise ExampleError(index, str(error)) from error
    return sequences

  def score_sequences(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the rewards (sequences,) of token ids that end in the reward token, float32, in order.

    Raises:
      ExampleError: a sequence is empty or has a token outside the vocabulary, or a reward is not finite.
    """
    for index, sequence in enumerate(sequences):
      if not sequence or not 0 <= min(sequence) <= max(sequence) < self._vocab_size:
        wrong = 'no tokens' if not sequence else f'the token {max(sequence) if min(sequence) >= 0 else min(sequence)}'
        raise ExampleError(index, f"has {wrong}; the model's tokens are 0 to {self._vocab_size - 1}: use the model's own tokenizer")
    rewards = np.full(len(sequences), np.nan, np.float32)
    in_flight: collections.deque[tuple[list[int], jax.Array]] = collections.deque()
    for members, reward_B in self._dispatch(sequences):
      preemption.check()
      in_flight.append((members, reward_B))
      if len(in_flight) > _IN_FLIGHT:
        _fetch(in_flight, rewards)
    while in_flight:
      _fetch(in_flight, rewards)
    bad = np.flatnonzero(~np.isfinite(rewards))
    if bad.size:
      raise ExampleError(int(bad[0]), f'its reward is {rewards[bad[0]]}: a parameter is not finite, or the compute dtype overflows')
    return rewards

  def _dispatch(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], jax.Array]]:
    """Yield (indices of the sequences, their rewards on the device) for each call, in order of row length."""
    shards = self.rows_per_call
    by_length: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
      by_length.setdefault(ladder_length(len(sequence)), []).append(index)
    for length, indices in sorted(by_length.items()):
      for low in range(0, len(indices), shards):
        members = indices[low : low + shards]
        yield members, self.dispatch([sequences[i] for i in members], length)


def _fetch(in_flight: collections.deque[tuple[list[int], jax.Array]], rewards: np.ndarray) -> None:
  """Copy the rewards of the oldest call in flight to the host."""
  members, reward_B = in_flight.popleft()
  rewards[members] = jax.device_get(reward_B)[: len(members)]
