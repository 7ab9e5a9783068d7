"""A store of tokenized triplets, for the runs of a sweep, which all read the same ones.

Reading and tokenizing a triplet takes longer than a training step of a small model on it.
"""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from polar_jax.data.examples import examples_at
from polar_jax.data.layout import Segment, pair_segment
from polar_jax.data.pipeline import TripletSegments
from polar_jax.data.template import Template
from polar_jax.runtime import json_files
from polar_jax.runtime.paths import write_atomically
from polar_jax.types import Triplet

_INFO, _TOKENS, _LENGTHS = 'info.json', 'tokens.npy', 'lengths.npz'
_AT_ONCE = 1_024  # triplets of one task of a thread


class StoredSegments(TripletSegments):
  """Segments of triplets that `store` has written, read from there. Other triplets are tokenized on access."""

  def __init__(self, source: Sequence[Triplet], template: Template, folder: pathlib.Path, columns: Sequence[str] = ()):
    super().__init__(source, template, columns)
    with np.load(folder / _LENGTHS) as lengths:
      indices, self._chosen, self._total = lengths['indices'], lengths['chosen'], lengths['total']
    self._slot = np.full(len(source), -1, np.int32)
    self._slot[indices] = np.arange(len(indices), dtype=np.int32)
    self._offset = np.concatenate([[0], np.cumsum(self._total, dtype=np.int64)])
    self._tokens = np.load(folder / _TOKENS, mmap_mode='r')

  def __getitem__(self, index: int) -> Segment:
    slot = self._slot[index]
    if slot < 0:
      return super().__getitem__(index)
    ids = self._tokens[self._offset[slot] : self._offset[slot + 1]]
    return pair_segment(ids[: self._chosen[slot]], ids[self._chosen[slot] :])

  def head(self, size: int) -> TripletSegments:
    """Return the first `size` examples, tokenized on access."""
    return TripletSegments(self.source, self.template, self.columns).head(size)

  def take(self, indices: Sequence[int]) -> list[Segment]:
    """Return the segments of several examples."""
    return [self[index] for index in indices]

  def most_tokens(self, indices: Sequence[int], enough: int) -> list[int]:
    """Return a number of tokens for each example that it does not exceed; see `TripletSegments`. Stored triplets are not tokenized."""
    totals = [int(self._total[slot]) if (slot := self._slot[index]) >= 0 else enough + 1 for index in indices]
    return [total if total <= enough else len(self[index].tokens) for index, total in zip(indices, totals, strict=True)]


def open_store(
  source: Sequence[Triplet], template: Template, folder: pathlib.Path, key: str, columns: Sequence[str] = ()
) -> TripletSegments:
  """Open the segments of `source`, read from the store in `folder` if it was written with the same `key`.

  Args:
    source: the examples.
    template: tokenizes examples that are not in the store.
    folder: of the store.
    key: identifies examples, template and tokenizer.
    columns: columns of numbers that batches hold too, read from the examples.
  """
  if _key(folder) == key:
    try:
      return StoredSegments(source, template, folder, columns)
    except Exception:  # damaged: numpy, zipfile, zlib and even tokenize raise their own
      pass
  return TripletSegments(source, template, columns)


def store(tokens: TripletSegments, indices: np.ndarray, folder: pathlib.Path, key: str, threads: int) -> None:
  """Tokenize the examples `indices` into `folder`, replacing an older store.

  Args:
    tokens: the segments to store.
    indices: which examples.
    folder: the folder of the store.
    key: identifies examples, tokenizer and template; a reader uses a store only if it has the reader's key.
    threads: number of threads that tokenize.
  """
  folder.mkdir(parents=True, exist_ok=True)
  info = folder / _INFO
  info.unlink(missing_ok=True)  # invalidate first: a partly written store must not be read

  def read(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs = [tokens.template.encode(triplet) for triplet in examples_at(tokens.source, part.tolist())]
    ids = np.fromiter((i for pair in pairs for sequence in pair for i in sequence), np.int32)
    return ids, np.array([[len(chosen), len(chosen) + len(rejected)] for chosen, rejected in pairs], np.int32)

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    ids, lengths = zip(*pool.map(read, [indices[i : i + _AT_ONCE] for i in range(0, len(indices), _AT_ONCE)]), strict=True)
  np.save(folder / _TOKENS, np.concatenate(ids))
  chosen, total = np.concatenate(lengths).T
  np.savez(folder / _LENGTHS, indices=indices.astype(np.int32), chosen=chosen, total=total)
  write_atomically(info, json.dumps({'key': key}) + '\n')


def is_stored(folder: pathlib.Path, key: str, indices: np.ndarray) -> bool:
  """Return whether `folder` holds a store with this key that contains these examples."""
  if _key(folder) != key:
    return False
  try:
    with np.load(folder / _LENGTHS) as lengths:
      return bool(np.isin(indices, lengths['indices']).all())
  except Exception:  # damaged, as above
    return False


def _key(folder: pathlib.Path) -> str | None:
  """Return the key of the store in `folder`; None if there is none, or it is damaged and has to be written again."""
  try:
    return json_files.read(folder / _INFO, '').get('key')
  except json_files.JsonError:
    return None
