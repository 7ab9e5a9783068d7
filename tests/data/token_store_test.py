"""Triplets read from a token store equal freshly tokenized ones."""

from __future__ import annotations

import numpy as np
import pytest

from polar_jax.data import tfds, token_store
from polar_jax.data.examples import examples_at
from polar_jax.data.pipeline import TripletSegments
from polar_jax.types import Triplet


class Letters:
  """A template whose sequences spell prompt and candidate, and that counts its calls."""

  calls = 0

  def encode(self, triplet):
    self.calls += 1
    return tuple([ord(c) for c in triplet.prompt + answer] + [2] for answer in (triplet.chosen, triplet.rejected))


def _triplets(size):
  words = ('', 'a', 'ab', 'xyz', 'a' * 40)
  return [Triplet(f'p{i}', 'r', words[i % 5], words[(i * 3 + 1) % 5]) for i in range(size)]


def _equal(got, wanted):
  for a, b in zip(got, wanted, strict=True):
    np.testing.assert_array_equal(a, b)
    assert np.asarray(a).dtype == np.asarray(b).dtype


@pytest.mark.parametrize('threads', [1, 3])
def test_same_triplets_as_without(tmp_path, threads, monkeypatch):
  monkeypatch.setattr(token_store, '_AT_ONCE', 7)
  rows, stored = _triplets(50), np.random.default_rng(0).permutation(50)[:41]
  token_store.store(TripletSegments(rows, Letters()), stored, tmp_path, 'key', threads)
  template = Letters()
  tokens, plain = token_store.open_store(rows, template, tmp_path, 'key'), TripletSegments(rows, Letters())
  assert len(tokens) == 50
  for got, wanted in zip(tokens.take([*range(50)]), plain.take([*range(50)]), strict=True):
    _equal(got, wanted)
  assert template.calls == 9  # only the triplets that were not stored


def test_another_key_is_not_read(tmp_path):
  rows = _triplets(5)
  token_store.store(TripletSegments(rows, Letters()), np.arange(5), tmp_path, 'key', 1)
  assert token_store.is_stored(tmp_path, 'key', np.arange(5))
  assert not token_store.is_stored(tmp_path, 'key', np.arange(6)) and not token_store.is_stored(tmp_path, 'other', np.arange(5))
  assert type(token_store.open_store(rows, Letters(), tmp_path, 'other')) is TripletSegments
  assert not token_store.is_stored(tmp_path / 'nowhere', 'key', np.arange(1))


def test_store_that_was_not_finished_is_not_read(tmp_path, monkeypatch):
  rows = _triplets(5)
  token_store.store(TripletSegments(rows, Letters()), np.arange(5), tmp_path, 'key', 1)
  with monkeypatch.context() as patch:
    patch.setattr(token_store.np, 'savez', lambda *_, **__: (_ for _ in ()).throw(OSError('full')))
    with pytest.raises(OSError, match='full'):
      token_store.store(TripletSegments(rows[:3], Letters()), np.arange(3), tmp_path, 'key', 1)
  assert type(token_store.open_store(rows, Letters(), tmp_path, 'key')) is TripletSegments


def test_examples_of_a_data_set_are_read_in_one_call(tmp_path):
  rows = _triplets(20)
  folder = tfds.write_triplets(tmp_path, 'some', {'train': rows}, 'test', {})
  source = tfds.open_triplets(folder)['train']
  indices = [19, 0, 7, 7]
  assert examples_at(source, indices) == [source[i] for i in indices] == [rows[i] for i in indices] == examples_at(rows, indices)


def test_bounds_of_stored_triplets_need_no_tokenizing():
  """Chosen and rejected together bound a pair, whose prefix is stored once; a pair that is not stored, or beyond `enough`, is counted."""
  rows = [Triplet('pp', 'r', 'abc', 'abd'), Triplet('pp', 'r', 'abc', 'abd'), Triplet('q', 'r', 'a', 'b')]
  template = Letters()
  tokens = object.__new__(token_store.StoredSegments)
  TripletSegments.__init__(tokens, rows, template)
  tokens._total, tokens._slot, tokens._chosen = np.array([12, 6], np.int32), np.array([0, -1, 1], np.int32), np.array([6, 3], np.int32)
  whole = [[ord(c) for c in text] + [2] for text in ('ppabc', 'ppabd', 'qa', 'qb')]
  tokens._tokens, tokens._offset = np.concatenate(whole).astype(np.int32), np.array([0, 12, 18])
  assert tokens.most_tokens([0, 2], 12) == [12, 6] and template.calls == 0
  shared = 2 + 2  # `pp` and `ab`
  assert tokens.most_tokens([0, 2], 11) == [12 - shared, 6] and template.calls == 0
  assert tokens.most_tokens([1], 99) == [12 - shared] and template.calls == 1


def test_a_store_is_written_into_a_new_folder_and_a_damaged_one_is_written_again(tmp_path):
  rows, folder = _triplets(5), tmp_path / 'new' / 'store'
  source = TripletSegments(rows, Letters())
  token_store.store(source, np.array([3, 0]), folder, 'key', 1)
  token_store.store(source, np.array([3, 0, 4]), folder, 'key', 2)
  assert token_store.is_stored(folder, 'key', np.array([4, 3])) and not token_store.is_stored(folder, 'key', np.array([1]))
  for name in ('lengths.npz', 'info.json'):
    (folder / name).write_bytes(b'damaged')
    assert not token_store.is_stored(folder, 'key', np.array([3]))
    assert type(token_store.open_store(rows, Letters(), folder, 'key')) is TripletSegments
    token_store.store(source, np.array([3]), folder, 'key', 1)
  assert type(token_store.open_store(rows, Letters(), folder, 'key')) is token_store.StoredSegments
