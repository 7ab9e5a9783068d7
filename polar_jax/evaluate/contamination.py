"""Evaluation prompts that occur in training files: by normalized text, by 13-grams of words, and as near duplicates by MinHash.

Normalized text is lower-cased words without punctuation. A prompt of at least 13 words is found if one of its 13-grams occurs in any text
of a training row (the length of Brown et al. 2020); a shorter one if it is the whole of a text there. A near duplicate shares a given part
of its 5-grams of words with a text of a training row: the Jaccard similarity of the two sets, which MinHash estimates to some .05.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from polar_jax.data import readers
from polar_jax.data.template import join_messages
from polar_jax.evaluate.near import NearDuplicates
from polar_jax.evaluate.sets import Item
from polar_jax.evaluate.words import ngrams, words_of
from polar_jax.runtime import json_files, text_files
from polar_jax.types import UserError

N = 13
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
    for number, text in texts_of(file):
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
  prompts = NearDuplicates(threshold, 'evaluate.near_duplicates')
  for index, item in enumerate(items):
    prompts.add(index, words_of(join_messages(item.prompt, 'prompt')))
  return prompts.find


def texts_of(file: pathlib.Path) -> Iterator[tuple[int, str]]:
  """Yield (number of the row from 1, text) of every text in a file, at any depth of its rows.

  Args:
    file: .jsonl, .jsonl.gz, .parquet, a folder of `save_to_disk`, or .txt, which is one row.

  Raises:
    UserError: the file or a line cannot be read.
  """
  for number, row in _rows(file):
    for text in _texts(row):
      yield number, text


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
