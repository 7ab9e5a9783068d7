"""The streams of tokens that the synthesize stage writes."""

from __future__ import annotations

import numpy as np
import pytest

from polar_jax.data import text
from polar_jax.types import UserError


def test_streams_by_split_and_source(tmp_path):
  arrays = {
    'train_wiki': np.arange(5, dtype=np.int32),
    'train_my_web': np.arange(3, dtype=np.int64),
    'validation_wiki': np.zeros(0, np.int32),
  }
  np.savez(tmp_path / text.STREAMS, **arrays)
  streams = text.load_streams(tmp_path / text.STREAMS)
  assert {split: list(sources) for split, sources in streams.items()} == {'train': ['wiki', 'my_web'], 'validation': ['wiki']}
  for split, sources in streams.items():
    for source, ids in sources.items():
      np.testing.assert_array_equal(ids, arrays[f'{split}_{source}'])
  np.savez(tmp_path / text.STREAMS)
  assert text.load_streams(tmp_path / text.STREAMS) == {'train': {}, 'validation': {}}


@pytest.mark.parametrize(
  'arrays',
  [
    {'train_a': np.zeros((2, 2), np.int32)},
    {'train_a': np.zeros(2, np.float32)},
    {'test_a': np.zeros(2, np.int32)},
    {'train': np.zeros(2, np.int32)},
  ],
)
def test_other_arrays_are_damage(tmp_path, arrays):
  np.savez(tmp_path / text.STREAMS, **arrays)
  with pytest.raises(UserError, match=r'text\.npz: damaged .*; delete .*synthesis\.json and run the synthesize stage again'):
    text.load_streams(tmp_path / text.STREAMS)


def test_a_file_that_is_no_archive_is_damaged(tmp_path):
  (tmp_path / text.STREAMS).write_bytes(b'PK nothing')
  with pytest.raises(UserError, match=r'text\.npz: damaged'):
    text.load_streams(tmp_path / text.STREAMS)
