from __future__ import annotations

import dataclasses
import hashlib
import json
import struct

import numpy as np
import pytest

from polar_jax import types
from polar_jax.data import tfds


def make_examples(n):
  return [
    types.Triplet(f'p{i}', 'ré\n', f'c{i}', '', 'pretrain', 'x', {'chosen_ids': np.arange(i + 1, dtype=np.int32), 'kl': i / 3, 'who': 'p'})
    for i in range(n)
  ]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('dataset')
  tfds.write_triplets(folder, 'my_examples', {'train': make_examples(30), 'other': iter(make_examples(3))}, 'Examples.', {'seed': 1})
  return folder


def test_round_trip_in_order(folder):
  opened = tfds.open_triplets(folder)
  assert {s: len(r) for s, r in opened.items()} == {'train': 30, 'other': 3}
  for got, made in zip(opened['train'], make_examples(30), strict=True):
    ids = got.metadata['chosen_ids']
    assert ids.dtype == np.int32 and np.array_equal(ids, made.metadata['chosen_ids']) and 'prompt_ids' not in got.metadata
    assert (got.metadata['kl'], got.metadata['who']) == (made.metadata['kl'], 'p')
    assert dataclasses.replace(got, metadata={}) == dataclasses.replace(made, metadata={})
  assert opened['train'][-1].prompt == 'p29'
  with pytest.raises(IndexError, match='example 30'):
    opened['train'][30]


def test_all_files_are_in_the_versioned_folder(folder):
  assert [p.name for p in folder.iterdir()] == ['my_examples']
  assert [p.name for p in (folder / 'my_examples').iterdir()] == [tfds.VERSION]
  assert len(tfds.open_triplets(folder / 'my_examples' / tfds.VERSION)['other']) == 3


def test_fingerprint_sees_order_text_ids_and_metadata(folder):
  examples = make_examples(5)
  digest = tfds.fingerprint(examples)
  assert digest == tfds.fingerprint(tfds.open_triplets(folder)['train'][i] for i in range(5))
  changed = [
    examples[::-1],
    examples[:4],
    [dataclasses.replace(examples[0], chosen='c'), *examples[1:]],
    [dataclasses.replace(examples[0], metadata={**examples[0].metadata, 'chosen_ids': np.array([1], np.int32)}), *examples[1:]],
    [dataclasses.replace(examples[0], metadata={**examples[0].metadata, 'kl': 9.0}), *examples[1:]],
  ]
  assert digest not in {tfds.fingerprint(r) for r in changed}


def test_messages_are_refused_by_example_and_field(tmp_path):
  bad = types.Triplet([{'role': 'user', 'content': 'x'}], 'r', 'c', 'j')
  with pytest.raises(ValueError, match='train example 1: field prompt must be text'):
    tfds.write_triplets(tmp_path, 'examples', {'train': [*make_examples(1), bad]}, '', {})


def test_missing_and_existing_folders_are_named(tmp_path, folder):
  with pytest.raises(types.UserError, match='found: none; name the folder'):
    tfds.open_triplets(tmp_path)
  with pytest.raises(ValueError, match='already contains'):
    tfds.write_triplets(folder, 'my_examples', {'train': make_examples(1)}, '', {})


def test_the_fingerprint_is_of_lengths_and_bytes():
  """That of stored data sets must stay what it is."""
  (example,) = make_examples(1)
  metadata = json.dumps({'kl': 0.0, 'who': 'p'})
  expected = hashlib.sha256()
  for text in (example.prompt, example.reference, example.chosen, example.rejected, example.wrapper, example.category, metadata):
    expected.update(struct.pack('<Q', len(text.encode())) + text.encode())
  for name in ('prompt', 'reference', 'chosen', 'rejected'):
    ids = np.asarray(example.metadata.get(f'{name}_ids', ()), np.int32)
    expected.update(struct.pack('<Q', len(ids)) + ids.tobytes())
  shuffled = dataclasses.replace(example, metadata=dict(reversed(example.metadata.items())))
  assert tfds.fingerprint([example]) == tfds.fingerprint([shuffled]) == expected.hexdigest()


def test_examples_are_read_from_both_ends_and_together(folder):
  train = tfds.open_triplets(folder)['train']
  assert [train[i].prompt for i in (0, -30, np.int64(29), -1)] == ['p0', 'p0', 'p29', 'p29']
  assert [t.prompt for t in train.__getitems__(np.array([3, 1]))] == ['p3', 'p1']
  for index in (30, -31):
    with pytest.raises(IndexError, match=f'example {index} of a split of 30 examples'):
      train[index]


def test_what_cannot_be_read_is_named_with_its_folder(tmp_path):
  class Damaged(list):
    def __getitem__(self, index):
      raise RuntimeError('crc\nmore')

    def __getitems__(self, indices):
      raise RuntimeError('crc')

  with pytest.raises(types.UserError, match=r'^example 1 cannot be read \(.*crc'):
    tfds.TripletSequence(Damaged([1, 2]))[1]
  damaged = tfds.TripletSequence(Damaged([1, 2]), [tmp_path / 'a.array_record', tmp_path / 'b'])
  assert damaged.shards == (tmp_path / 'a.array_record', tmp_path / 'b') and tfds.TripletSequence([]).shards == ()
  with pytest.raises(types.UserError, match=rf'^{tmp_path}: one of the examples \[0, 1, 0\] ... cannot be read .*write the data set again'):
    damaged.__getitems__([0, 1, 0, 1])


def test_prompts_are_stored_joined_and_their_messages_in_full():
  messages = [{'role': 'user', 'content': 'a'}, {'role': 'user', 'content': 'b'}]
  made = tfds._triplet_of(types.Prompt(messages, messages[:1], '', 'x', {'k': 1}))
  assert made == types.Triplet('a\nb', 'a', '', '', category='x', metadata={'policy_prompt': messages, 'k': 1})
  assert tfds._triplet_of(types.Prompt('p', 'r', '7')) == types.Triplet('p', 'r', '', '', metadata={'answer': '7'})


def test_a_damaged_data_set_is_named(tmp_path):
  (tmp_path / 'dataset_info.json').write_text('{}')
  with pytest.raises(types.UserError, match=rf'^{tmp_path}: not a readable TFDS data set \(\w+: .*; copy or write it again'):
    tfds.open_triplets(tmp_path)
