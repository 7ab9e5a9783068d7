"""Words of a text, their n-grams, and the overlap of two sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Letters of scripts that do not separate words, for a class of characters: Thai, Lao, Tibetan, Myanmar, Khmer, Japanese, Chinese.
UNSPACED = '\u0e01-\u0e30\u0e40-\u0e46\u0e81-\u0eb0\u0ec0-\u0ec6\u0f40-\u0f6c\u1000-\u102a\u1780-\u17b3'
UNSPACED += '\u3005-\u3007\u3041-\u3096\u30a1-\u30fa\u30fc\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U000323af'
_WORD = re.compile(r'\w+')
_WORD_OR_LETTER = re.compile(rf'[{UNSPACED}]|[^\W{UNSPACED}]+')


def words_of(text: str) -> list[str]:
  """Return the lower-cased words of a text, without punctuation. In scripts that do not separate words, each letter counts as one."""
  return (_WORD if text.isascii() else _WORD_OR_LETTER).findall(text.lower())


def ngrams(sequence: Sequence[Any], n: int) -> set[tuple[Any, ...]]:
  """Return the runs of n elements of a sequence."""
  return set(zip(*(sequence[i:] for i in range(n)), strict=False))


def jaccard(a: set[Any], b: set[Any]) -> float:
  """Return the share of the elements of either set that are in both; 0 for two empty sets."""
  shared = len(a & b)
  return shared / (len(a) + len(b) - shared) if shared else 0.0
