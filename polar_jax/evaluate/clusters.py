"""Clusters of examples that are not independent, which a bootstrap must resample as a whole.

An example of a policy discriminator depends on three crossed factors: the policy that wrote reference and chosen, the policy that wrote
rejected, and the prompt. One of them is resampled, the policy of the reference: an accuracy is meant to hold for other policies, and
this factor is the one that an example is about. In the miniature hardly two of 2,000 prompts are the same, so clusters by prompt would
be single examples. The policy of rejected is not resampled as well, so intervals may still be a little too narrow where it matters.
Examples whose policies are not known (a user's own files) are clustered by prompt.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from polar_jax.types import Text, Triplet

FEW = 20  # with fewer clusters a percentile bootstrap interval is too narrow
_POLICY = 'reference_policy'  # of a triplet's metadata


@dataclasses.dataclass(frozen=True)
class Clusters:
  """Which cluster each example belongs to.

  Attributes:
    labels: (examples,) integers, equal for examples that are not independent.
    by: what examples of a cluster share: 'policy' (that of the reference) or 'prompt'; 'example' if each is a cluster of its own.
  """

  labels: np.ndarray
  by: str

  @property
  def count(self) -> int:
    """Number of distinct clusters."""
    return len(np.unique(self.labels))

  def select(self, index: np.ndarray) -> Clusters:
    """Return the clusters of the examples that a numpy index (integers or a mask) selects."""
    return Clusters(self.labels[index], self.by)


def cluster(triplets: Sequence[Triplet]) -> Clusters:
  """Cluster examples by the policy of their reference or, where not all policies are known, by prompt.

  The policy is read from `metadata['reference_policy']`. If no two examples share a prompt, each example is a cluster.
  """
  policies = [t.metadata.get(_POLICY) for t in triplets]
  if policies and all(isinstance(policy, str) and policy for policy in policies):
    return Clusters(_labels([str(policy) for policy in policies]), 'policy')
  labels = _labels([_key(t.prompt) for t in triplets])
  return Clusters(labels, 'prompt' if len(np.unique(labels)) < len(labels) else 'example')


def _key(prompt: Text) -> str:
  """Return a string that is equal for equal prompts; a string and messages are never equal."""
  return f'text {prompt}' if isinstance(prompt, str) else f'messages {json.dumps(prompt, sort_keys=True, default=str)}'


def _labels(keys: Sequence[str]) -> np.ndarray:
  """Return (examples,) integers in the order of first appearance."""
  numbers: dict[str, int] = {}
  return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
