"""Words of a text, their n-grams, and the overlap of two sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_WORD = re.compile(r'\w+')


def words_of(text: str) -> list[str]:
  """Return the lower-cased words of a text, without punctuation."""
  return _WORD.findall(text.lower())


def ngrams(sequence: Sequence[Any], n: int) -> set[tuple[Any, ...]]:
  """Return the runs of n elements of a sequence."""
  return set(zip(*(sequence[i:] for i in range(n)), strict=False))


def jaccard(a: set[Any], b: set[Any]) -> float:
  """Return the share of the elements of either set that are in both; 0 for two empty sets."""
  shared = len(a & b)
  return shared / (len(a) + len(b) - shared) if shared else 0.0
