"""Evaluation prompts that occur in training files: by normalized text, by 13-grams of words, and as near duplicates by MinHash.

Normalized text is lower-cased words without punctuation. A prompt of at least 13 words is found if one of its 13-grams occurs in any text
of a training row (the length of Brown et al. 2020); a shorter one if it is the whole of a text there. A near duplicate shares a given part
of its 5-grams of words with a text of a training row: the Jaccard similarity of the two sets, which MinHash estimates to some .05.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from polar_jax.data import readers
from polar_jax.data.template import join_messages
from polar_jax.evaluate.sets import Item
from polar_jax.evaluate.words import ngrams, words_of
from polar_jax.runtime import json_files, text_files
from polar_jax.types import UserError

N = 13
_SHINGLE, _PERMUTATIONS = 5, 256  # words of an n-gram of a near duplicate; hashes of a signature
Matcher = Callable[[Sequence[str]], list[int]]  # words of a training text -> indices of items


def find(items: Sequence[Item], files: Sequence[pathlib.Path], near: float | None = None) -> dict[int, str]:
  """Return the index of every item whose prompt occurs in the files -> where it was found first, as `file, row`.

  Args:
    items: of a set.
    files: .jsonl, .jsonl.gz, .parquet, folders of `save_to_disk`, or .txt.
    near: also find near duplicates, of at least this Jaccard similarity; None: no.

  Raises:
    UserError: a file cannot be read, or datasketch is not installed and `near` is given.
  """
  matchers = [_exact(items), *([] if near is None else [_near(items, near)])]
  found: dict[int, str] = {}
  for file in files:
    for number, row in _rows(file):
      for text in _texts(row):
        words = words_of(text)
        for index in (index for match in matchers for index in match(words)):
          found.setdefault(index, f'{file.name}, row {number}')
  return dict(sorted(found.items()))


def _exact(items: Sequence[Item]) -> Matcher:
  long, short = dict[tuple[str, ...], list[int]](), dict[tuple[str, ...], list[int]]()
  for index, item in enumerate(items):
    words = words_of(join_messages(item.prompt, 'prompt'))
    table = long if len(words) >= N else short
    for gram in ngrams(words, N) if len(words) >= N else [tuple(words)] if words else []:
      table.setdefault(gram, []).append(index)
  return lambda words: [
    *(index for gram in ngrams(words, N) for index in long.get(gram, ())),
    *short.get(tuple(words), ()),
  ]


def _near(items: Sequence[Item], threshold: float) -> Matcher:
  """Return a matcher of near duplicates. Prompts of fewer words than an n-gram have none."""
  if importlib.util.find_spec('datasketch') is None:
    raise UserError("evaluate.near_duplicates needs datasketch; install it with: pip install 'polar_jax[contamination]'")
  import datasketch

  def signature(words: Sequence[str]) -> Any:
    out = datasketch.MinHash(num_perm=_PERMUTATIONS, seed=1)
    out.update_batch([' '.join(gram).encode() for gram in ngrams(words, _SHINGLE)])
    return out

  prompts = [words_of(join_messages(item.prompt, 'prompt')) for item in items]
  signatures = {index: signature(words) for index, words in enumerate(prompts) if len(words) >= _SHINGLE}
  # The table proposes candidates, with a lower threshold because it may miss some; the estimate of the similarity decides.
  table = datasketch.MinHashLSH(threshold=0.8 * threshold, num_perm=_PERMUTATIONS)
  for index, of_prompt in signatures.items():
    table.insert(index, of_prompt)

  def match(words: Sequence[str]) -> list[int]:
    if len(words) < _SHINGLE:
      return []
    of_text = signature(words)
    return sorted(index for index in table.query(of_text) if signatures[index].jaccard(of_text) >= threshold)

  return match


def _rows(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """Yield (number from 1, row) of a file; a .txt file is one row.

  Raises:
    UserError: a file or a line cannot be read.
  """
  if file.suffix == '.txt':
    yield 1, text_files.read_text(file)
    return
  for number, line in readers.reader_of(file)(file):
    try:
      yield number, json_files.parse(line) if isinstance(line, bytes) else line
    except json_files.JsonError as error:
      raise UserError(f'{file}, row {number}: {error}; fix it') from error


def _texts(value: Any) -> Iterator[str]:
  """Yield every string in a row, at any depth."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, dict):
    for item in value.values():
      yield from _texts(item)
  elif isinstance(value, list):
    for item in value:
      yield from _texts(item)
