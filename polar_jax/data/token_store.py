"""Triplets that were tokenised once, for the many runs of a sweep that read the same ones.

Reading and tokenising a triplet costs a small model more time than learning from it.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from polar_jax.data.pipeline import PairTokens, rows_at
from polar_jax.data.rows import PairRow, pair_row
from polar_jax.data.template import Template
from polar_jax.types import Triplet

_INFO, _TOKENS, _LENGTHS = 'info.json', 'tokens.npy', 'lengths.npz'
_AT_ONCE = 1_024  # triplets that a thread tokenises before it is given more


class StoredPairTokens(PairTokens):
  """As `PairTokens`, with what `store` has written read from there. Rows that it has not are tokenised as they are asked for."""

  def __init__(self, source: Sequence[Triplet], template: Template, folder: pathlib.Path):
    super().__init__(source, template)
    with np.load(folder / _LENGTHS) as lengths:
      indices, self._chosen, self._total = lengths['indices'], lengths['chosen'], lengths['total']
    self._slot = np.full(len(source), -1, np.int32)
    self._slot[indices] = np.arange(len(indices), dtype=np.int32)
    self._offset = np.concatenate([[0], np.cumsum(self._total, dtype=np.int64)])
    self._tokens = np.load(folder / _TOKENS, mmap_mode='r')

  def __getitem__(self, index: int) -> PairRow:
    slot = self._slot[index]
    if slot < 0:
      return super().__getitem__(index)
    ids = self._tokens[self._offset[slot] : self._offset[slot + 1]]
    return pair_row(ids[: self._chosen[slot]], ids[self._chosen[slot] :])

  def many(self, indices: Sequence[int]) -> list[PairRow]:
    return [self[index] for index in indices]


def open_store(source: Sequence[Triplet], template: Template, folder: pathlib.Path, key: str) -> PairTokens:
  """The triplets of `source`, from the store in `folder` if there is one of the same `key`."""
  info = folder / _INFO
  if info.exists() and json.loads(info.read_text())['key'] == key:
    return StoredPairTokens(source, template, folder)
  return PairTokens(source, template)


def store(tokens: PairTokens, indices: np.ndarray, folder: pathlib.Path, key: str, threads: int) -> None:
  """Tokenises rows `indices` into `folder`, in place of what was there.

  Args:
    key: of rows, tokenizer and template, by which a reader knows that they are its own.
  """
  folder.mkdir(parents=True, exist_ok=True)
  info = folder / _INFO
  info.unlink(missing_ok=True)  # what is half replaced is nobody's

  def read(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs = [tokens.template.encode(row) for row in rows_at(tokens.source, part.tolist())]
    ids = np.fromiter((i for pair in pairs for sequence in pair for i in sequence), np.int32)
    return ids, np.array([[len(chosen), len(chosen) + len(rejected)] for chosen, rejected in pairs], np.int32)

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    ids, lengths = zip(*pool.map(read, [indices[i : i + _AT_ONCE] for i in range(0, len(indices), _AT_ONCE)]), strict=True)
  np.save(folder / _TOKENS, np.concatenate(ids))
  chosen, total = np.concatenate(lengths).T
  np.savez(folder / _LENGTHS, indices=indices.astype(np.int32), chosen=chosen, total=total)
  temporary = folder / (_INFO + '.tmp')
  temporary.write_text(json.dumps({'key': key}) + '\n')
  os.replace(temporary, info)


def is_stored(folder: pathlib.Path, key: str, indices: np.ndarray) -> bool:
  """Whether `folder` holds these rows of that key."""
  info = folder / _INFO
  if not info.exists() or json.loads(info.read_text())['key'] != key:
    return False
  with np.load(folder / _LENGTHS) as lengths:
    return bool(np.isin(indices, lengths['indices']).all())
