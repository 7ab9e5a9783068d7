"""How rollouts become rows of tokens for the learner, and how what is known of each token gets there and back.

On the host everything of an answer is an array (R, T): rollout by token of the answer. On the device answers lie packed, several to a
row, and those to one prompt behind a single copy of it; a token's log-probability, value and advantage stand at the token before it,
which predicts it. Micro-batches all have one shape, and a step has as many as it needs: nothing is ever compiled for another number
of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polar_jax.data import groups, packing
from polar_jax.data.groups import GroupPart
from polar_jax.types import PolicyBatch, Rollouts


def pack(rollouts: Rollouts, which: Sequence[int], row_length: int, rows: int) -> list[PolicyBatch]:
  """Micro-batches (rows, row_length) that hold the rollouts `which`, each once. Answers to one prompt share its computation.

  Raises:
    UserError: a prompt with its answer is longer than a row.
  """
  parts: list[tuple[GroupPart, list[int]]] = []  # what is laid out together, and the rollouts in it
  for members in _by_prompt(rollouts, which):
    # The last token is only ever a target. The prompt's last token predicts each answer's first, so it belongs to the answers.
    sequences = [[*rollouts.prompts[r], *rollouts.tokens_RT[r, : rollouts.length_R[r] - 1].tolist()] for r in members]
    shared = len(rollouts.prompts[members[0]]) - 1 if len(members) > 1 else 0
    laid = groups.lay_out(sequences, row_length, len(members), shared)
    parts += [(part, [members[c] for c in part.candidates]) for part in laid]
  lengths = [len(part.tokens) for part, _ in parts]
  packed = packing.first_fit(lengths, row_length, max(len(lengths), 1))
  packed += [[]] * (-len(packed) % rows)
  batches = len(packed) // rows
  # Dealt out, so that every micro-batch and every device of it gets long and short rows alike.
  dealt = packing.deal(packed, batches)
  return [_batch(rollouts, [[parts[i] for i in row] for row in dealt[b * rows : (b + 1) * rows]], row_length) for b in range(batches)]


def _by_prompt(rollouts: Rollouts, which: Sequence[int]) -> list[list[int]]:
  """The rollouts `which`, those of equal prompts together."""
  found: dict[tuple[int, ...], list[int]] = {}
  for r in which:
    found.setdefault(tuple(rollouts.prompts[r]), []).append(r)
  return list(found.values())


def _batch(rollouts: Rollouts, packed: Sequence[Sequence[tuple[GroupPart, list[int]]]], row_length: int) -> PolicyBatch:
  shape = (len(packed), row_length)
  tokens, positions, start, end, prefix_start, prefix_end, target, answer = (np.zeros(shape, np.int32) for _ in range(8))
  rollout = np.full(shape, -1, np.int32)
  for b, row in enumerate(packed):
    low = 0
    for part, members in row:
      high = low + len(part.tokens)
      tokens[b, low:high], positions[b, low:high] = part.tokens, part.positions
      start[b, low:high], end[b, low:high] = part.start + low, part.end + low
      shares = part.prefix_end > 0
      prefix_start[b, low:high][shares], prefix_end[b, low:high][shares] = low, part.prefix_end[shares] + low
      for r, last in zip(members, part.reward_index, strict=True):
        size = int(rollouts.length_R[r])
        mine = np.s_[b, low + last + 1 - size : low + last + 1]
        target[mine], rollout[mine], answer[mine] = rollouts.tokens_RT[r, :size], r, np.arange(size)
      low = high
  return PolicyBatch(tokens, positions, start, end, prefix_start, prefix_end, target, rollout, answer)


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
