"""Near duplicates of texts: those that share a given part of their 5-grams of words, by MinHash."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from polar_jax.evaluate.words import ngrams
from polar_jax.types import UserError

SHINGLE, _PERMUTATIONS = 5, 256  # words of an n-gram; hashes of a signature


class NearDuplicates:
  """A growing set of texts, in which those similar to another text are found. Texts of fewer words than an n-gram have no duplicates.

  The similarity is the Jaccard index of the sets of n-grams, estimated with a standard error of some .03.

  Args:
    threshold: the least similarity.
    setting: the option that asks for near duplicates, for messages.

  Raises:
    UserError: datasketch is not installed.
  """

  def __init__(self, threshold: float, setting: str):
    if importlib.util.find_spec('datasketch') is None:
      raise UserError(f"{setting} needs datasketch; install it with: pip install 'polar_jax[contamination]'")
    import datasketch

    self._threshold = threshold
    self._empty = datasketch.MinHash(num_perm=_PERMUTATIONS, seed=1)
    # The table proposes candidates, with a lower threshold because it may miss some; the estimate of the similarity decides.
    self._table = datasketch.MinHashLSH(threshold=0.8 * threshold, num_perm=_PERMUTATIONS)
    self._signatures: dict[int, Any] = {}

  def find(self, words: Sequence[str]) -> list[int]:
    """Return the indices of the texts of the set that are similar to a text, in order."""
    return [] if len(words) < SHINGLE else self._similar(self._signature(words))

  def add(self, index: int, words: Sequence[str]) -> None:
    """Add a text to the set, under an index that the set does not have."""
    if len(words) >= SHINGLE:
      self._insert(index, self._signature(words))

  def add_if_new(self, index: int, words: Sequence[str]) -> bool:
    """Add a text if no text of the set is similar to it. Returns whether none is."""
    if len(words) < SHINGLE:
      return True
    signature = self._signature(words)
    if self._similar(signature):
      return False
    self._insert(index, signature)
    return True

  def _similar(self, signature: Any) -> list[int]:
    return sorted(index for index in self._table.query(signature) if self._signatures[index].jaccard(signature) >= self._threshold)

  def _insert(self, index: int, signature: Any) -> None:
    self._signatures[index] = signature
    self._table.insert(index, signature)

  def _signature(self, words: Sequence[str]) -> Any:
    out = self._empty.copy()  # which is cheaper than to make the permutations again
    out.update_batch([' '.join(gram).encode() for gram in ngrams(words, SHINGLE)])
    return out
