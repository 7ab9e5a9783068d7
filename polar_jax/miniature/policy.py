"""What a policy of the pool can do, whatever stands behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Policy(Protocol):
  """A language model that continues prefixes of token ids."""

  name: str

  def sample(
    self,
    prefixes: Sequence[np.ndarray],
    n: int,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    max_tokens: int = 32,
  ) -> list[list[np.ndarray]]:
    """Draws `n` independent continuations of every prefix.

    Args:
      prefixes: int arrays of token ids, of any lengths.
      n: continuations per prefix.
      rng: source of randomness; the same state gives the same answer.
      temperature: multiplies the policy's own.
      top_p: the smaller of this and the policy's own applies.
      top_k: keep only the k likeliest tokens; None: all.
      max_tokens: of a continuation.

    Returns:
      For every prefix `n` int32 arrays of 1 to `max_tokens` ids.
    """
    ...


@runtime_checkable
class ExactPolicy(Policy, Protocol):
  """A policy whose untruncated law is known in closed form."""

  def logprob(self, prefixes: Sequence[np.ndarray], trajectories: Sequence[np.ndarray]) -> np.ndarray:
    """Natural-log probability of trajectory i after prefix i, summed over its tokens: float64 (rows,)."""
    ...
