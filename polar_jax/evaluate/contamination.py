"""Evaluation prompts that occur in training files: by normalized text, and by 13-grams of words.

Normalized text is lower-cased words without punctuation. A prompt of at least 13 words is found if one of its 13-grams occurs in any text
of a training row (the length of Brown et al. 2020); a shorter one if it is the whole of a text there.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from polar_jax.data import readers
from polar_jax.data.template import join_messages
from polar_jax.evaluate.sets import Item
from polar_jax.evaluate.words import ngrams, words_of
from polar_jax.runtime import json_files, text_files
from polar_jax.types import UserError

N = 13


def find(items: Sequence[Item], files: Sequence[pathlib.Path]) -> dict[int, str]:
  """Return the index of every item whose prompt occurs in the files -> where it was found first, as `file, row`.

  Args:
    items: of a set.
    files: .jsonl, .jsonl.gz, .parquet, folders of `save_to_disk`, or .txt.

  Raises:
    UserError: a file cannot be read.
  """
  long, short = dict[tuple[str, ...], list[int]](), dict[tuple[str, ...], list[int]]()
  for index, item in enumerate(items):
    words = words_of(join_messages(item.prompt, 'prompt'))
    table = long if len(words) >= N else short
    for gram in ngrams(words, N) if len(words) >= N else [tuple(words)] if words else []:
      table.setdefault(gram, []).append(index)
  found: dict[int, str] = {}
  for file in files:
    for number, row in _rows(file):
      for text in _texts(row):
        words = words_of(text)
        hits = [index for gram in ngrams(words, N) for index in long.get(gram, ())]
        for index in (*hits, *short.get(tuple(words), ())):
          found.setdefault(index, f'{file.name}, row {number}')
  return dict(sorted(found.items()))


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
