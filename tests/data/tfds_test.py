from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import pathlib
import struct
import weakref

import numpy as np
import pytest
import tensorflow_datasets
from array_record.python import array_record_data_source
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from polar_jax import types
from polar_jax.config import TemplateConfig
from polar_jax.data import pipeline, records, tfds
from polar_jax.data.examples import max_candidates
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer

ODD = [
  '',
  '\0',
  'a\0b\n',
  '\N{GRINNING FACE}',
  'e\u0301 \u4f60\u597d \u202e',
  '\ufeff',
  'x' * 127,
  'x' * 128,
  'y' * 20_000,
  '\u00e9' * 500_000,
]


def odd_examples():
  """Every odd text in every field, ids of every length of a varint, and metadata of every kind."""
  ids = [[], [0], [1, 127, 128, 16383, 16384, 2**21, 2**28, 2**31 - 1], [-1, -(2**31)], list(range(300))]
  more = [{}, {'a': None, 'b': [1, {'c': 0.1}], '\u00e9': '\N{GRINNING FACE}'}, {'n': 2**70, 'nested': {'b': 1, 'a': True}}]
  return [
    types.Triplet(
      *(ODD[(i + j) % len(ODD)] for j in range(6)),
      metadata={
        **more[i % len(more)],
        **{name: np.array(ids[(i + j) % len(ids)], np.int32) for j, name in enumerate(records.IDS) if i % 2},
      },
    )
    for i in range(len(ODD))
  ]


def same(a, b):
  """Return whether two triplets are equal; ids that are absent are empty ones."""
  ids = [[np.asarray(t.metadata.get(name, ()), np.int32).tolist() for name in records.IDS] for t in (a, b)]
  plain = [dataclasses.replace(t, metadata={k: v for k, v in t.metadata.items() if k not in records.IDS}) for t in (a, b)]
  return ids[0] == ids[1] and plain[0] == plain[1]


class Oracle(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set that TFDS itself encodes and writes."""

  name = 'oracle'
  code_path = None  # of files of checksums, which it has not
  VERSION = tensorflow_datasets.core.Version('1.0.0')

  def _info(self):
    features = tensorflow_datasets.features
    ids = features.Tensor(shape=(None,), dtype=np.int32)
    texts = {name: features.Text() for name in (*records.TEXTS, *records.LABELS, 'metadata')}
    return tensorflow_datasets.core.DatasetInfo(
      builder=self,
      description='Examples.',
      features=features.FeaturesDict(texts | dict.fromkeys(records.IDS, ids)),
      metadata=tensorflow_datasets.core.MetadataDict({'seed': 1}),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i, t in enumerate(odd_examples()):
      texts = {name: getattr(t, name) for name in (*records.TEXTS, *records.LABELS)}
      ids = {name: np.asarray(t.metadata.get(name, ()), np.int32) for name in records.IDS}
      yield i, {**texts, **ids, 'metadata': json.dumps({k: v for k, v in t.metadata.items() if k not in ids}, sort_keys=True)}


def example_of(triplet):
  """Return what protocol buffers make of a triplet."""
  feature = tf_feature_pb2.Feature
  texts = {name: getattr(triplet, name) for name in (*records.TEXTS, *records.LABELS)}
  texts['metadata'] = json.dumps({k: v for k, v in triplet.metadata.items() if k not in records.IDS}, sort_keys=True)
  out = {name: feature(bytes_list=tf_feature_pb2.BytesList(value=[text.encode()])) for name, text in texts.items()}
  for name in records.IDS:
    out[name] = feature(int64_list=tf_feature_pb2.Int64List(value=np.asarray(triplet.metadata.get(name, ()), np.int32).tolist()))
  return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=out))


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


@pytest.mark.parametrize('ids', [{}, {'chosen_ids': np.arange(3, dtype=np.int32)}])
def test_the_fingerprint_is_of_lengths_and_bytes(ids):
  """That of stored data sets must stay what it is."""
  example = dataclasses.replace(make_examples(1)[0], metadata={'kl': 0.0, 'who': 'p', **ids})
  metadata = json.dumps({'kl': 0.0, 'who': 'p'})
  expected = hashlib.sha256()
  for text in (example.prompt, example.reference, example.chosen, example.rejected, example.wrapper, example.category, metadata):
    expected.update(struct.pack('<Q', len(text.encode())) + text.encode())
  for name in ('prompt', 'reference', 'chosen', 'rejected'):
    values = np.asarray(ids.get(f'{name}_ids', ()), np.int32)
    expected.update(struct.pack('<Q', len(values)) + values.tobytes())
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


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
  folder = tmp_path_factory.mktemp('odd')
  return tfds.write_triplets(folder, 'oracle', {'train': iter(odd_examples())}, 'Examples.', {'seed': 1})


def test_odd_texts_are_read_as_they_were_written(odd):
  opened = tfds.open_triplets(odd)['train']
  assert len(opened) == len(ODD) and all(same(got, made) for got, made in zip(opened, odd_examples(), strict=True))


def test_a_record_is_what_protocol_buffers_make_of_a_triplet(odd):
  (shard,) = tfds.open_triplets(odd)['train'].shards
  stored = array_record_data_source.ArrayRecordDataSource(str(shard))
  for record, triplet in zip(stored, odd_examples(), strict=True):
    expected = example_of(triplet)
    assert tf_example_pb2.Example.FromString(record) == expected and len(record) == expected.ByteSize()
    # One feature at a time, as protocol buffers leave the order of a map open: sorted by name.
    parts = [tf_feature_pb2.Features(feature={k: v}).SerializeToString() for k, v in sorted(expected.features.feature.items())]
    assert record == b'\n' + varint(sum(map(len, parts))) + b''.join(parts)


def test_texts_of_every_length_have_the_header_of_protocol_buffers():
  lengths = [*range(300), 2**13 - 1, 2**13, 2**14 - 20, 2**14 - 1, 2**14, 2**21]
  for length in [*lengths, *lengths[::-1]]:  # headers are made, and then kept
    triplet = types.Triplet('', '', 'c' * length, '')
    record = records.record_of(records.fields_of(triplet))
    assert len(record) == example_of(triplet).ByteSize() and tf_example_pb2.Example.FromString(record) == example_of(triplet), length


def varint(value):
  return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint(value // 128)


def test_tfds_writes_the_same_data_set(odd, tmp_path):
  with contextlib.redirect_stdout(io.StringIO()):
    builder = Oracle(data_dir=str(tmp_path), file_format='array_record')
    config = tensorflow_datasets.download.DownloadConfig(try_download_gcs=False, register_checksums=False)
    builder.download_and_prepare(download_dir=str(tmp_path / 'downloads'), download_config=config)
  theirs, ours = (tensorflow_datasets.builder_from_directory(str(f)) for f in (tmp_path / 'oracle' / '1.0.0', odd))
  assert [sorted(x) for x in theirs.as_data_source('train')] == [sorted(x) for x in ours.as_data_source('train')]
  for a, b in zip(theirs.as_data_source('train'), ours.as_data_source('train'), strict=True):
    assert all(np.array_equal(a[name], b[name]) and type(a[name]) is type(b[name]) for name in a)
  for name in ('features.json', 'metadata.json', 'dataset_info.json'):
    a, b = (json.loads((pathlib.Path(x.data_dir) / name).read_text()) for x in (theirs, ours))
    assert {**a, 'moduleName': ''} == {**b, 'moduleName': ''}
  opened = tfds.open_triplets(tmp_path / 'oracle')['train']  # without checksums, as those of earlier versions
  assert tfds.fingerprint(opened) == tfds.fingerprint(odd_examples())


def files_of(folder):
  return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_shards_are_cut_by_size_and_the_same_triplets_give_the_same_bytes(tmp_path, monkeypatch):
  size = len(records.record_of(records.fields_of(make_examples(1)[0])))
  monkeypatch.setattr(tfds, '_SHARD_BYTES', 10 * size)
  splits = {'train': make_examples(30), 'other': make_examples(3)}
  a = tfds.write(tmp_path / 'a', 'some', splits, 'Examples.', {'seed': 1})
  b = tfds.write_triplets(tmp_path / 'b', 'some', {name: iter(rows) for name, rows in splits.items()}, 'Examples.', {'seed': 1})
  assert files_of(a.folder) == files_of(b)
  opened = tfds.open_triplets(b)
  n = len(opened['train'].shards)
  assert 2 < n < 10 and len(opened['other'].shards) == 1
  assert [file.name for file in opened['train'].shards] == [f'some-train.array_record-{i:05}-of-{n:05}' for i in range(n)]
  shards = {file.name for split in opened.values() for file in split.shards}
  assert files_of(b).keys() == {*shards, tfds.CHECKSUMS, 'dataset_info.json', 'features.json', 'metadata.json'}
  info = json.loads((b / 'dataset_info.json').read_text())['splits'][0]
  lengths = [int(count) for count in info['shardLengths']]
  sizes = [len(records.record_of(records.fields_of(t))) for t in make_examples(30)]
  assert sum(lengths) == 30 and int(info['numBytes']) == sum(sizes)
  ends = np.cumsum(lengths)
  for start, end in zip(ends - lengths, ends, strict=True):  # a file ends with the record that fills it
    assert sum(sizes[start : end - 1]) < 10 * size and (sum(sizes[start:end]) >= 10 * size or end == 30)
  assert [t.prompt for t in opened['train']] == [f'p{i}' for i in range(30)]


def test_records_can_be_read_one_by_one(tmp_path, caplog):
  """The reader logs an error about files whose records are in groups."""
  tfds.write(tmp_path, 'some', {'train': make_examples(30)}, '', {})
  opened = tfds.open_triplets(tmp_path)['train']
  assert opened[17].prompt == 'p17' and not caplog.records


def test_fingerprints_and_checksums_are_of_what_was_written(tmp_path):
  written = tfds.write(tmp_path, 'some', {'train': iter(make_examples(4)), 'other': iter(make_examples(2))}, '', {})
  assert written.folder == tmp_path / 'some' / tfds.VERSION and written.rows == {'train': 4, 'other': 2}
  digests = {'other': tfds.fingerprint(make_examples(2)), 'train': tfds.fingerprint(make_examples(4))}
  assert written.fingerprints == digests
  assert written.fingerprint == hashlib.sha256(json.dumps(digests).encode()).hexdigest()
  shards = sorted(written.folder.glob('*.array_record-*'))
  assert written.checksums == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in shards} == tfds.verify(tmp_path)
  stored = json.loads((written.folder / tfds.CHECKSUMS).read_text())
  assert stored == {'files': {file.name: {'bytes': file.stat().st_size, 'sha256': written.checksums[file.name]} for file in shards}}


def test_a_streaming_fingerprint_is_that_of_the_function():
  digest = records.Fingerprint()
  for i, triplet in enumerate(odd_examples()):
    digest.update(triplet)
    assert digest.rows == i + 1 and (i not in (0, 5) or digest.hexdigest() == tfds.fingerprint(odd_examples()[: i + 1]))
  with pytest.raises(ValueError, match=r'^example 10: field prompt must be text'):
    digest.update(types.Triplet([], '', '', ''))


def test_splits_are_read_lazily_one_after_another(tmp_path):
  events, alive = [], weakref.WeakSet()

  class Tracked(types.Triplet):
    __hash__ = object.__hash__

  def rows(split):
    for i in range(500):
      events.append(split)
      triplet = Tracked(f'{i}', '', '', '')
      alive.add(triplet)
      yield triplet
      if i % 100 == 0:
        gc.collect()
        assert len(alive) <= 3

  tfds.write_triplets(tmp_path, 'some', {'b': rows('b'), 'a': rows('a')}, '', {})
  assert events == ['b'] * 500 + ['a'] * 500


def test_an_interrupted_write_leaves_nothing(tmp_path):
  def rows():
    yield from make_examples(3)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    tfds.write_triplets(tmp_path, 'some', {'train': make_examples(3), 'other': rows()}, '', {})
  assert list((tmp_path / 'some').iterdir()) == []
  with pytest.raises(types.UserError, match='found: none'):
    tfds.open_triplets(tmp_path)


def test_what_a_killed_write_left_is_not_read_and_is_replaced(tmp_path):
  expected = tfds.write_triplets(tmp_path / 'a', 'some', {'train': make_examples(3)}, '', {})
  left = tmp_path / 'b' / 'some' / f'incomplete.{tfds.VERSION}'
  tfds.write_triplets(tmp_path / 'b', 'some', {'train': make_examples(5)}, '', {}).rename(left)  # killed before the last rename
  (left / 'other.0').write_text('')
  for folder in (tmp_path / 'b', left.parent, left):
    with pytest.raises(types.UserError, match='found: none'):
      tfds.open_triplets(folder)
  written = tfds.write_triplets(tmp_path / 'b', 'some', {'train': make_examples(3)}, '', {})
  assert files_of(written) == files_of(expected) and not left.exists()


@pytest.mark.parametrize('name', ['bad name', '', 'a/b', 'all', 'train[1]'])
def test_names_of_splits_that_tfds_cannot_read_are_refused(tmp_path, name):
  with pytest.raises(ValueError, match='TFDS cannot read a split of this name'):
    tfds.write_triplets(tmp_path, 'some', {'train': make_examples(1), name: make_examples(1)}, '', {})
  assert not (tmp_path / 'some').exists()


def test_a_split_without_examples_is_refused(tmp_path):
  with pytest.raises(ValueError, match="split 'validation' has no examples"):
    tfds.write_triplets(tmp_path, 'some', {'train': make_examples(1), 'validation': iter(())}, '', {})
  assert tfds.open_triplets(tfds.write_triplets(tmp_path, 'some', {}, '', {})) == {}


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    (types.Triplet('p', 'r', 'a\ud800', 'j'), 'field chosen is not valid Unicode .*surrogates.* at character 1'),
    (types.Triplet('p', 'r', 'c', b'j'), 'field rejected must be text .*, not bytes'),
    (types.Triplet('p', 'r', 'c', 'j', metadata={'x': object()}), 'metadata must be JSON .*object is not JSON serializable'),
    (types.Triplet('p', 'r', 'c', 'j', metadata={'chosen_ids': [2**31]}), 'metadata chosen_ids must be a list of int32'),
    (types.Triplet('p', 'r', 'c', 'j', metadata={'prompt_ids': [[1], [2]]}), 'metadata prompt_ids must be .* not an array of 2 dim'),
    (types.Triplet('p', 'r', 'c', 'j', metadata={'prompt_ids': None}), 'metadata prompt_ids must be a list of int32'),
  ],
)
def test_what_cannot_be_stored_is_named(tmp_path, bad, message):
  with pytest.raises(ValueError, match=f'^train example 2: {message}'):
    tfds.write_triplets(tmp_path, 'some', {'train': [*make_examples(2), bad]}, '', {})


def test_metadata_that_holds_itself_is_refused(tmp_path):
  metadata = {}
  metadata['x'] = metadata
  with pytest.raises(ValueError, match='train example 0: metadata must be JSON'):
    tfds.write_triplets(tmp_path, 'some', {'train': [types.Triplet('p', 'r', 'c', 'j', metadata=metadata)]}, '', {})


@pytest.fixture
def small(tmp_path, monkeypatch):
  """A data set of two files, and these files."""
  monkeypatch.setattr(tfds, '_SHARD_BYTES', 1)
  folder = tfds.write_triplets(tmp_path, 'some', {'train': make_examples(2)}, '', {})
  return folder, sorted(folder.glob('*.array_record-*'))


def test_a_flipped_bit_is_found_and_its_file_named(small):
  folder, (first, second) = small
  assert list(tfds.verify(folder)) == [first.name, second.name]
  content = bytearray(second.read_bytes())
  content[len(content) // 2] ^= 4
  second.write_bytes(content)
  tfds.open_triplets(folder)  # compares sizes
  with pytest.raises(types.UserError, match=rf'^{folder}: the bytes of {second.name} are not those that were written; copy or write'):
    tfds.verify(folder)


def test_a_file_of_another_size_is_found_at_once(small):
  folder, (first, second) = small
  content = second.read_bytes()
  second.write_bytes(content[:-1])
  for check in (tfds.open_triplets, tfds.verify):
    with pytest.raises(types.UserError, match=f'{second.name} has {len(content) - 1:,} bytes, and {len(content):,} were written'):
      check(folder)
  second.unlink()
  with pytest.raises(types.UserError, match=f'{second.name} is missing; copy or write'):
    tfds.open_triplets(folder)
  second.write_bytes(content)
  first.with_name('some-more.array_record-00000-of-00001').write_bytes(content)
  with pytest.raises(types.UserError, match=r'some-more\.array_record-00000-of-00001 is not among the files in checksums\.json'):
    tfds.open_triplets(folder)


@pytest.mark.parametrize(
  'content', ['', '[]', '{}', '{"files": 1}', '{"files": {"a": 1}}', '{"files": {"a": {"bytes": "x", "sha256": ""}}}']
)
def test_damaged_checksums_are_named(small, content):
  folder, _ = small
  (folder / tfds.CHECKSUMS).write_text(content)
  with pytest.raises(types.UserError, match=rf'^{folder / tfds.CHECKSUMS}: .*copy or write the data set again'):
    tfds.open_triplets(folder)


def test_without_checksums_a_data_set_is_read_but_not_verified(small):
  folder, _ = small
  (folder / tfds.CHECKSUMS).unlink()
  assert len(tfds.open_triplets(folder)['train']) == 2
  with pytest.raises(types.UserError, match=r'checksums\.json: .*No such file'):
    tfds.verify(folder)


def ranked(number):
  candidates = tuple(f'{number}: {name}' for name in ('best', '\u00e9', 'c', 'worst')[: 3 + number % 2] + ('x',) * (number % 3))
  ranks = (0,) + (1,) * (len(candidates) - 1) if number % 2 else tuple(range(len(candidates)))
  texts = (candidates[0], candidates[-1])
  return types.RankedList('p', 'r', *texts, 'pretrain', 'math', {'weight': 2.0}, candidates, ranks)


def test_ranked_lists_are_read_as_they_were_written_and_their_split_says_so(tmp_path):
  mixed = [ranked(0), types.Triplet('p', 'r', 'a', 'b'), *map(ranked, range(1, 6))]
  plain = [types.Triplet('p', 'r', 'a', 'b', metadata={'text': '"ranked_list"'})]
  written = tfds.write(tmp_path, 'lists', {'train': mixed, 'validation': plain}, 'Lists.', {'seed': 1})
  found = tfds.open_triplets(written.folder)
  assert [*found['train']] == mixed and [*found['validation']] == plain
  assert max_candidates(found['train']) == max(len(e.candidates) for e in mixed if isinstance(e, types.RankedList))
  assert max_candidates(found['validation']) == 2
  assert written.fingerprints['train'] == tfds.fingerprint(mixed) != tfds.fingerprint([*mixed[:-1], ranked(7)])


def test_training_reads_lists_of_a_tfds_data_set_as_those_of_a_program(tmp_path):
  mixed = [ranked(0), types.Triplet('p', 'r', 'a', 'b'), *map(ranked, range(1, 6))]
  source = tfds.open_triplets(tfds.write_triplets(tmp_path, 'lists', {'train': mixed}, 'Lists.', {}))['train']
  template = Template(TemplateConfig(), ByteTokenizer())
  ours, theirs = pipeline.open_segments(source, template), pipeline.open_segments(mixed, template)
  assert type(ours) is type(theirs) is pipeline.ListSegments and ours.max_candidates == theirs.max_candidates
  assert ours.head(3).max_candidates == ours.max_candidates
  assert [ours[i].tokens.tolist() for i in range(len(mixed))] == [theirs[i].tokens.tolist() for i in range(len(mixed))]


@pytest.mark.parametrize(
  ('example', 'message'),
  [
    (types.Triplet('p', 'r', 'a', 'b', metadata={'ranked_list': 1}), 'metadata ranked_list is a name of this format; rename the field'),
    (
      types.RankedList('p', 'r', 'a', 'c', candidates=('a', [{'role': 'user', 'content': 'b'}], 'c'), ranks=(0, 1, 2)),
      'candidates must be texts in a TFDS data set; join messages first',
    ),
  ],
)
def test_lists_that_cannot_be_stored(tmp_path, example, message):
  with pytest.raises(ValueError, match=f'train example 0: {message}'):
    tfds.write_triplets(tmp_path, 'lists', {'train': [example]}, 'Lists.', {})


def test_metadata_of_that_name_in_a_data_set_without_lists_are_what_they_are(tmp_path, monkeypatch):
  """An earlier version may have written them."""
  given = types.Triplet('p', 'r', 'a', 'b', metadata={'ranked_list': [1, 2]})
  with monkeypatch.context() as patch:
    patch.setattr(records, '_metadata', lambda triplet: triplet.metadata)
    patch.setattr(records, 'candidates_of', lambda fields: 2)
    folder = tfds.write_triplets(tmp_path, 'old', {'train': [given]}, 'Old.', {})
  assert list(tfds.open_triplets(folder)['train']) == [given]
