"""Prompts that must not be used: near duplicates of earlier ones, and those that occur in files of evaluation.

Texts are compared as `polar_jax.evaluate.contamination` does it: lower-cased words without punctuation, 13-grams of words, and MinHash.
There, prompts of evaluation are looked for in large training files. Here, the files are the smaller side, so that they are the index.
In scripts that do not separate words, each letter counts as one.
"""

from __future__ import annotations

import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from polar_jax.evaluate import contamination
from polar_jax.evaluate.near import NearDuplicates
from polar_jax.evaluate.words import words_of

NEAR_DUPLICATES, NEAR_CONTAMINATION = 'synthesize.near_duplicates (0: only equal ones)', 'synthesize.exclude_near'  # names in messages
_AT_ONCE = 4_096  # texts
_BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial that combines the hashes of words


def near_duplicates(texts: Iterable[str], threshold: float | None) -> list[int]:
  """Return the indices of the texts to drop, in order: a text equal to an earlier one, or similar to one that is kept.

  Args:
    texts: in order of preference.
    threshold: the least similarity: the Jaccard index of the sets of 5-grams of words, in (0, 1]; None: only equal texts are dropped.

  Raises:
    UserError: a threshold is given and datasketch is not installed.
  """
  table = None if threshold is None else NearDuplicates(threshold, NEAR_DUPLICATES)
  seen, dropped = set[bytes](), []
  for index, text in enumerate(texts):
    words = words_of(text)
    digest = hashlib.blake2b((' '.join(words) or text).encode('utf-8', 'surrogatepass'), digest_size=16).digest()
    if digest in seen or not (table is None or table.add_if_new(index, words)):
      dropped.append(index)
    seen.add(digest)
  return dropped


def contaminated(prompts: Sequence[str], files: Sequence[pathlib.Path], near: float | None) -> dict[int, str]:
  """Return the index of every prompt that shares text with the files -> where it was found first, as `file, row`.

  A prompt shares text with a row if one of its 13-grams of words is in a text of the row, or if it is equal to a text of the row.

  The index of the files takes 16 bytes for each of their 13-grams, and four times as much while it is made; with `near`, some 13 KB for
  each of their texts. Grams are compared by 64-bit hashes: among 10^8 grams, a wrong match in 10^8 others has a probability of 1 in 2,000.

  Args:
    prompts: to be used for training.
    files: of evaluation: .jsonl, .jsonl.gz, .parquet, folders of `save_to_disk`, or .txt.
    near: also find prompts that are near duplicates of a text of a row, of at least this Jaccard similarity; None: no.

  Raises:
    UserError: a file cannot be read, or datasketch is not installed and `near` is given.
  """
  index = _Index(files, near)
  found: dict[int, str] = {}
  for start in range(0, len(prompts), _AT_ONCE):
    words = [words_of(prompt) for prompt in prompts[start : start + _AT_ONCE]]
    for i, text in sorted(index.first_texts(words).items()):
      found[start + i] = index.place(text)
  return found


class _Index:
  """The texts of files, numbered in order: their 13-grams, those that are shorter, and signatures of all for near duplicates."""

  def __init__(self, files: Sequence[pathlib.Path], near: float | None):
    self._files = files
    self._near = None if near is None else NearDuplicates(near, NEAR_CONTAMINATION)
    self._places: list[tuple[int, int]] = []  # of each text: its file and row
    self._short: dict[str, int] = {}
    grams, texts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    found = ((file, row, text) for file, path in enumerate(files) for row, text in contamination.texts_of(path))
    while part := list(itertools.islice(found, _AT_ONCE)):
      words, first = [words_of(text) for _, _, text in part], len(self._places)
      self._places += [(file, row) for file, row, _ in part]
      hashes, owners = _grams(words)
      hashes, where = np.unique(hashes, return_index=True)
      grams.append(hashes)
      texts.append(owners[where] + first)
      for i, of_text in enumerate(words, first):
        if 0 < len(of_text) < contamination.N:
          self._short.setdefault(' '.join(of_text), i)
        if self._near is not None:
          self._near.add(i, of_text)
    self._grams, where = np.unique(np.concatenate(grams), return_index=True)  # the first of equal ones
    self._text_of_gram = np.concatenate(texts)[where]

  def place(self, text: int) -> str:
    """Return where a text is, as `file, row`."""
    file, row = self._places[text]
    return f'{self._files[file].name}, row {row}'

  def first_texts(self, words: Sequence[list[str]]) -> dict[int, int]:
    """Return the first text that each prompt shares something with, for those that do.

    Args:
      words: of each prompt.
    """
    hashes, owners = _grams(words)
    at = np.searchsorted(self._grams, hashes)
    hit = at < len(self._grams)
    hit[hit] = self._grams[at[hit]] == hashes[hit]
    found = [(int(owner), int(text)) for owner, text in zip(owners[hit], self._text_of_gram[at[hit]], strict=True)]
    for i, of_prompt in enumerate(words):
      if len(of_prompt) < contamination.N and (text := self._short.get(' '.join(of_prompt))) is not None:
        found.append((i, text))
      if self._near is not None and (similar := self._near.find(of_prompt)):
        found.append((i, similar[0]))
    return dict(sorted(found, reverse=True))  # the first text comes last, and stays


def _grams(words: Sequence[list[str]]) -> tuple[np.ndarray, np.ndarray]:
  """Return hashes of all 13-grams, and which text each of them is from. Hashes are the same within a process only.

  Args:
    words: of each text.
  """
  lengths = np.array([len(of_text) for of_text in words], np.int64)
  owners = np.repeat(np.arange(len(words)), lengths)
  hashes = np.fromiter(map(hash, itertools.chain.from_iterable(words)), np.int64, len(owners)).view(np.uint64)
  count = max(len(owners) - contamination.N + 1, 0)
  out = np.zeros(count, np.uint64)
  for i in range(contamination.N):
    out = out * _BASE + hashes[i : i + count]
  whole = owners[:count] == owners[len(owners) - count :]  # grams within one text
  return out[whole], owners[:count][whole]
