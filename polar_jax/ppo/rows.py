"""How rollouts become rows of tokens for the learner, and how what is known of each token gets there and back.

On the host everything of an answer is an array (R, T): rollout by token of the answer. On the device answers lie packed, prompt in
front, several to a row; a token's log-probability, value and advantage stand at the token before it, which predicts it.
Micro-batches all have one shape, and a step has as many as it needs: nothing is ever compiled for another number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polar_jax.data import packing
from polar_jax.types import PolicyBatch, Rollouts


def pack(rollouts: Rollouts, which: Sequence[int], row_length: int, rows: int) -> list[PolicyBatch]:
  """Micro-batches (rows, row_length) that hold the rollouts `which`, each once.

  Raises:
    ValueError: a prompt with its answer is longer than a row.
  """
  lengths = [len(rollouts.prompts[r]) + int(rollouts.length_R[r]) - 1 for r in which]  # the last token is only ever a target
  packed = packing.first_fit(lengths, row_length, max(len(lengths), 1))
  packed += [[]] * (-len(packed) % rows)
  batches = len(packed) // rows
  # Dealt out, so that every micro-batch and every device of it gets long and short rows alike.
  dealt = packing.deal(packed, batches)
  return [
    _batch(rollouts, [[which[i] for i in members] for members in dealt[b * rows : (b + 1) * rows]], row_length) for b in range(batches)
  ]


def _batch(rollouts: Rollouts, packed: Sequence[Sequence[int]], row_length: int) -> PolicyBatch:
  shape = (len(packed), row_length)
  tokens, positions, start, end, target, answer = (np.zeros(shape, np.int32) for _ in range(6))
  rollout = np.full(shape, -1, np.int32)
  for b, members in enumerate(packed):
    low = 0
    for r in members:
      prompt, size = rollouts.prompts[r], int(rollouts.length_R[r])
      sequence = np.concatenate([np.asarray(prompt, np.int32), rollouts.tokens_RT[r, :size]])
      high, first = low + len(sequence) - 1, low + len(prompt) - 1
      tokens[b, low:high], target[b, low:high] = sequence[:-1], sequence[1:]
      positions[b, low:high], start[b, low:high] = np.arange(high - low), low
      end[b, low:high] = np.arange(low + 1, high + 1)
      rollout[b, first:high], answer[b, first:high] = r, np.arange(size)
      low = high
  return PolicyBatch(tokens, positions, start, end, target, rollout, answer)


def place(values_RT: np.ndarray, batch: PolicyBatch) -> np.ndarray:
  """(B, T): what is known of each answer's tokens, where the batch predicts them; 0 elsewhere."""
  return np.where(batch.rollout_BT >= 0, values_RT[batch.rollout_BT, batch.answer_BT], np.zeros((), values_RT.dtype))


def collect(values_BT: np.ndarray, batch: PolicyBatch, out_RT: np.ndarray) -> None:
  """The way back: writes what the device found for the batch's answers into `out_RT`."""
  real_BT = batch.rollout_BT >= 0
  out_RT[batch.rollout_BT[real_BT], batch.answer_BT[real_BT]] = values_BT[real_BT]


def token_mask(rollouts: Rollouts) -> np.ndarray:
  """(R, T) float32: 1 on the tokens of each answer."""
  return (np.arange(rollouts.tokens_RT.shape[1])[None] < rollouts.length_R[:, None]).astype(np.float32)
