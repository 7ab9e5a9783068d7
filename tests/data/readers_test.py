"""Raw examples: columns that nobody reads, names given twice, saved data sets, encodings, damaged files."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polar_jax.data import examples, readers
from polar_jax.data.examples import DataError, NoSplitError, open_triplets, read_triplets
from polar_jax.scoring import files
from polar_jax.types import UserError

GOOD = {'prompt': 'p', 'reference': 'r', 'chosen': 'c', 'rejected': 'd', 'output': 'o'}
COUNT = 3
LATE = 1_700_000_000_123_456_789  # nanoseconds, as no datetime of Python can hold


class _Money(pa.ExtensionType):
  def __init__(self):
    super().__init__(pa.int64(), 'tests.money')

  def __arrow_ext_serialize__(self):
    return b''

  @classmethod
  def __arrow_ext_deserialize__(cls, storage_type, serialized):
    return cls()


def column(kind, *values):
  return pa.array(values, pa.int64()).cast(kind) if values and isinstance(values[0], int) else pa.array(values, kind)


# Column -> what is read, and what the score stage writes for it.
COLUMNS = {
  'timestamp_ns': (column(pa.timestamp('ns'), LATE), '2023-11-14T22:13:20.123456789', '"2023-11-14T22:13:20.123456789"'),
  'timestamp_us_zone': (column(pa.timestamp('us', 'Mars/Olympus'), 1_700_000_000_000_001), '2023-11-14T22:13:20.000001Z', None),
  'timestamp_ms_late': (column(pa.timestamp('ms'), 10**15), '33658-09-27T01:46:40.000', None),
  'timestamp_ms_offset': (column(pa.timestamp('ms', '+07:30'), 0), '1970-01-01T00:00:00.000Z', None),
  'date32': (pa.array([20_000], pa.int32()).cast(pa.date32()), '2024-10-04', None),
  'date32_late': (pa.array([10**7], pa.int32()).cast(pa.date32()), '29349-01-26', None),
  'date64': (column(pa.date64(), 86_400_000), '1970-01-02', None),
  'time32': (pa.array([3_661_000], pa.int32()).cast(pa.time32('ms')), '01:01:01.000', None),
  'time64_ns': (column(pa.time64('ns'), 1_234_567), '00:00:00.001234567', None),
  'duration_ns': (column(pa.duration('ns'), 1_234_567), decimal.Decimal('0.001234567'), '0.001234567'),
  'duration_s': (column(pa.duration('s'), -(10**15)), decimal.Decimal(-(10**15)), '-1000000000000000'),
  'decimal128': (pa.array([decimal.Decimal('12.3400')], pa.decimal128(20, 4)), decimal.Decimal('12.3400'), '12.3400'),
  'decimal256': (pa.array([decimal.Decimal(10**60)], pa.decimal256(70, 0)), decimal.Decimal(10**60), f'1{"0" * 60}'),
  'binary': (pa.array([b'\xff\x00'], pa.binary()), b'\xff\x00', '"/wA="'),
  'fixed_binary': (pa.array([b'ab'], pa.binary(2)), b'ab', '"YWI="'),
  'float16': (pa.array([np.float16(1.5)], pa.float16()), 1.5, '1.5'),
  'nan': (pa.array([float('nan')], pa.float64()), None, 'null'),  # NaN is not equal to itself, so only what is written is compared
  'infinity': (pa.array([float('-inf')], pa.float32()), float('-inf'), 'null'),
  'interval': (pa.array([pa.MonthDayNano([1, 2, 3])], pa.month_day_nano_interval()), [1, 2, 3], '[1, 2, 3]'),
  'map': (pa.array([[('a', LATE)]], pa.map_(pa.string(), pa.timestamp('ns'))), [['a', '2023-11-14T22:13:20.123456789']], None),
  'struct': (pa.array([{'t': LATE, 'n': None}], pa.struct({'t': pa.timestamp('ns'), 'n': pa.int8()})),
             {'t': '2023-11-14T22:13:20.123456789', 'n': None}, None),
  'list': (pa.array([[LATE, None]], pa.list_(pa.timestamp('ns'))), ['2023-11-14T22:13:20.123456789', None], None),
  'fixed_list': (pa.array([[1, 2]], pa.list_(pa.duration('s'), 2)), [decimal.Decimal(1), decimal.Decimal(2)], '[1, 2]'),
  'dictionary': (pa.array(['x']).dictionary_encode(), 'x', '"x"'),
  'dictionary_of_times': (pa.array([LATE], pa.timestamp('ns')).dictionary_encode(), '2023-11-14T22:13:20.123456789', None),
  'extension': (pa.ExtensionArray.from_storage(_Money(), pa.array([7])), 7, '7'),
  'null': (pa.nulls(1), None, 'null'),
  'bad_utf8': (pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32).tobytes()), pa.py_buffer(b'\xff\xfe')]),
               b'\xff\xfe', '"//4="'),
}  # fmt: skip
NOT_IN_PARQUET = ('interval',)  # but in the files of `save_to_disk`


def write(path, **columns):
  pq.write_table(pa.table({**{name: [value] * COUNT for name, value in GOOD.items()}, **columns}), path)
  return path


def repeated(array):
  """A column of COUNT rows: the value, null, the value."""
  return pa.concat_arrays([array, pa.nulls(1, array.type), array])


@pytest.mark.parametrize('name', [name for name in COLUMNS if name not in NOT_IN_PARQUET])
def test_columns_next_to_the_texts_are_read_and_scored(tmp_path, name):
  array, expected, written = COLUMNS[name]
  path = write(tmp_path / 'a.parquet', extra=repeated(array))
  triplets = read_triplets(path)
  assert len(triplets) == COUNT and triplets[1].metadata['extra'] is None
  read = triplets[0].metadata['extra']
  assert name == 'nan' or read == expected
  (first, second, _) = [example.content for example in files.read_examples(path, 'raise', [])]
  text = files.json_text(first)
  assert json.loads(text)['extra'] == (json.loads(written) if written else expected)
  assert written is None or text.endswith(f'"extra": {written}}}')
  assert json.loads(files.json_text(second))['extra'] is None


@pytest.mark.parametrize('name', COLUMNS)
def test_the_same_columns_in_a_saved_data_set(tmp_path, name):
  array, expected, _ = COLUMNS[name]
  table = pa.table({**{field: [value] * COUNT for field, value in GOOD.items()}, 'extra': repeated(array)})
  rows = list(read_triplets(save(tmp_path, table)))
  assert len(rows) == COUNT and rows[1].metadata['extra'] is None
  assert name == 'nan' or rows[2].metadata['extra'] == expected


def save(folder, table, parts=1):
  """Write a table as `Dataset.save_to_disk` of Hugging Face does."""
  folder.mkdir(exist_ok=True, parents=True)
  names = [f'data-{i:05}-of-{parts:05}.arrow' for i in range(parts)]
  size = -(-table.num_rows // parts)
  for i, name in enumerate(names):
    with pa.OSFile(str(folder / name), 'wb') as file, pa.ipc.new_stream(file, table.schema) as writer:
      writer.write_table(table.slice(i * size, size), max_chunksize=2)
  (folder / 'dataset_info.json').write_text('{"features": {}}')
  (folder / 'state.json').write_text(json.dumps({'_data_files': [{'filename': name} for name in names], '_split': None}))
  return folder


def table_of(prompts):
  return pa.table({**{name: [value] * len(prompts) for name, value in GOOD.items()}, 'prompt': prompts})


def test_a_saved_data_set_is_one_split(tmp_path):
  folder = save(tmp_path / 'data', table_of(['a', 'b', 'c', 'd', 'e']), parts=2)
  for split in ('train', 'validation'):
    assert [t.prompt for t in open_triplets(folder, split)] == ['a', 'b', 'c', 'd', 'e']
  assert readers.is_one_split(folder) and not readers.is_one_split(tmp_path)
  assert [example.content['prompt'] for example in files.read_examples(folder, 'raise', [])] == ['a', 'b', 'c', 'd', 'e']


@pytest.mark.parametrize('listed', [True, False])
def test_saved_splits(tmp_path, listed):
  save(tmp_path / 'train', table_of(['a', 'b']))
  save(tmp_path / 'test', table_of(['c']))
  if listed:
    (tmp_path / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  assert [[t.prompt for t in open_triplets(tmp_path, split)] for split in ('train', 'test')] == [['a', 'b'], ['c']]
  with pytest.raises(NoSplitError, match="no split 'validation'; its splits are: test, train"):
    open_triplets(tmp_path, 'validation')
  with pytest.raises(DataError, match='is a folder'):
    list(files.read_examples(tmp_path, 'raise', []))


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda folder: (folder / 'state.json').write_text('{'), 'not JSON'),
    (lambda folder: (folder / 'state.json').write_text('[]'), 'must contain a JSON object, not list'),
    (lambda folder: (folder / 'state.json').write_text('{"_data_files": 3}'), 'files that are not there'),
    (lambda folder: (folder / 'data-00000-of-00001.arrow').unlink(), 'files that are not there'),
    (lambda folder: (folder / 'data-00000-of-00001.arrow').write_bytes(b'x' * 100), 'not a readable folder'),
    (lambda folder: (folder / 'state.json').write_text('{"_data_files": [], "_indices_data_files": [{"filename": "i"}]}'), 'save it again'),
    (lambda folder: (folder / 'state.json').write_text('{"_data_files": []}'), 'no valid examples'),
  ],
)
def test_damaged_saved_data_sets(tmp_path, damage, message):
  folder = save(tmp_path / 'data', table_of(['a', 'b']))
  damage(folder)
  with pytest.raises(UserError, match=message) as caught:
    open_triplets(folder, 'train')
  assert str(folder) in str(caught.value) and '\n' not in str(caught.value) and len(str(caught.value)) <= 500


def test_columns_with_one_name(tmp_path):
  names = ['prompt', 'reference', 'chosen', 'rejected', 'rejected']
  table = pa.Table.from_arrays([pa.array(['x'])] * 5, names=names)
  pq.write_table(table, tmp_path / 'a.parquet')
  for path in (tmp_path / 'a.parquet', save(tmp_path / 'saved', table)):
    with pytest.raises(DataError, match="2 columns are called 'rejected'; rename or remove all but one"):
      read_triplets(path)
  renamed = table.rename_columns([*names[:4], 'other'])  # the advice
  pq.write_table(renamed, tmp_path / 'a.parquet')
  assert len(read_triplets(tmp_path / 'a.parquet')) == 1


def test_fields_of_a_column_with_one_name(tmp_path):
  pairs = pa.StructArray.from_arrays([pa.array(['x']), pa.array(['y'])], names=['a', 'a'])
  nested = pa.ListArray.from_arrays([0, 1], pairs)
  path = tmp_path / 'a.parquet'
  pq.write_table(pa.table({**{name: [value] for name, value in GOOD.items()}, 'extra': nested}), path)
  with pytest.raises(DataError, match="column 'extra' has 2 fields called 'a'"):
    read_triplets(path)


@pytest.mark.parametrize(
  'line',
  [
    '{"prompt":"p","reference":"r","chosen":"GOOD","rejected":"x","chosen":"OVERWRITES"}',
    '{"prompt":"p","reference":"r","chosen":[{"role":"a","content":"1","content":"2"}],"rejected":"x"}',
    '{"prompt":"p","reference":"r","chosen":"c","rejected":"x","more":[{"deep":{"a":1,"b":2,"\\u0061":3}}]}',
  ],
)
def test_keys_given_twice(tmp_path, line):
  path = tmp_path / 'a.jsonl'
  path.write_text(json.dumps(GOOD) + '\n' + line + '\n')
  with pytest.raises(examples.BadExampleError, match=r"example 2: the key '\w+' occurs 2 times in one object"):
    read_triplets(path)
  assert read_triplets(path, 'skip').skipped[0][0] == 2


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'])
@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz'])
def test_jsonl_of_wide_characters(tmp_path, encoding, name):
  content = (json.dumps(GOOD) + '\n').encode(encoding)
  (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith('gz') else content)
  for mode in ('raise', 'skip'):
    with pytest.raises(DataError, match=rf'not UTF-8; it seems to be UTF-{encoding[4:6]}.*iconv -f UTF-{encoding[4:6]}'):
      read_triplets(tmp_path / name, mode)


def test_a_jsonl_line_of_a_code_page(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(json.dumps({**GOOD, 'prompt': 'Café société'}, ensure_ascii=False).encode('cp1252'))
  with pytest.raises(DataError, match=r'example 1: not UTF-8 .*it seems to be WINDOWS-1252'):
    read_triplets(path)


def test_gzip_under_another_name(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
  with pytest.raises(DataError, match=r'compressed with gzip; give it a name that ends in \.jsonl\.gz'):
    read_triplets(path)
  assert len(read_triplets(path.rename(tmp_path / 'a.jsonl.gz'))) == 1


def test_numbers_of_a_jsonl_file_are_written_as_they_were(tmp_path):
  numbers = [
    '1e400',
    '-0',
    '0.10',
    '1.0',
    '1',
    '1E5',
    '123456789012345678901234567890',
    '0.1000000000000000055511151231257827',
    '9' * 5_000,
  ]
  source = tmp_path / 'a.jsonl'
  source.write_text(f'{{"prompt": "p", "reference": "r", "output": "o", "n": [{", ".join(numbers)}], "x": NaN, "y": -Infinity}}\n')
  (example,) = files.read_examples(source, 'raise', [])
  file = files.RewardFile(tmp_path / 'out.jsonl', {})
  file.write([example], np.array([0.5], np.float32))
  file.finish()
  line = (tmp_path / 'out.jsonl').read_text()
  assert line.endswith(f'"n": [{", ".join(numbers)}], "x": null, "y": null, "reward": 0.5}}\n')
  refuse = lambda constant: pytest.fail(f'{constant} is not JSON')
  json.loads(line.replace('9' * 5_000, '9'), parse_constant=refuse)


def test_a_reward_that_is_not_finite_is_not_written(tmp_path):
  example = files.Example(3, dict(GOOD), None)
  file = files.RewardFile(tmp_path / 'out.jsonl', {})
  with pytest.raises(UserError, match='the reward of example 3 would be nan'):
    file.write([example], np.array([np.nan], np.float32))
  file.close()
  assert files.partial_files(tmp_path / 'out.jsonl')[0].read_bytes() == b''


def test_python_values_are_read_as_before(tmp_path):
  rows = [
    {**GOOD, 'n': 3, 'f': 0.1, 'b': True, 'l': [1, None], 's': {'a': 'x', 'b': [{'c': 1}]}, 'when': datetime.datetime(2024, 5, 6, 7, 8, 9)}
  ]
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / 'a.parquet')
  metadata = read_triplets(tmp_path / 'a.parquet')[0].metadata
  assert {name: metadata[name] for name in 'nfbls'} == {name: rows[0][name] for name in 'nfbls'}
  assert metadata['when'] == '2024-05-06T07:08:09.000000'


@pytest.mark.data
@pytest.mark.parametrize('name', ['ts_ns', 'time', 'dur', 'tz'])
def test_the_reported_parquet_files(data_folder, name):
  path = data_folder / f'cases/rows/{name}.parquet'
  assert len(read_triplets(path)) >= 1
  assert all(json.loads(files.json_text(example.content)) for example in files.read_examples(path, 'raise', []))


@pytest.mark.data
def test_the_reported_names_given_twice(data_folder):
  for name, twice in {'dupcol.parquet': 'rejected', 'dupkeys.jsonl': 'chosen'}.items():
    with pytest.raises(UserError, match=f"'{twice}'"):
      read_triplets(data_folder / 'cases/rows' / name)


@pytest.mark.data
def test_the_reported_saved_data_sets(data_folder, tmp_path):
  cases = data_folder / 'cases'
  for name in ('s2d', 's2d_dict1', 's2d_dict2'):
    assert len(open_triplets(cases / name, 'train')) == 4
  assert len(open_triplets(cases / 's2d_dict2', 'validation')) == 4
  with pytest.raises(NoSplitError, match='its splits are: train'):
    open_triplets(cases / 's2d_dict1', 'validation')
  shutil.copytree(cases / 's2d', tmp_path / 'parent/anything')  # below a folder that is no data set itself
  assert list(open_triplets(tmp_path / 'parent', 'anything')) == list(open_triplets(cases / 's2d', 'train'))


def test_a_table_without_columns(tmp_path):
  sink = io.BytesIO()
  pq.write_table(pa.table({}), sink)
  (tmp_path / 'a.parquet').write_bytes(sink.getvalue())
  with pytest.raises(DataError, match='no valid examples'):
    read_triplets(tmp_path / 'a.parquet')


def test_durations_of_every_unit():
  for unit, digits in (('s', 0), ('ms', 3), ('us', 6), ('ns', 9)):
    (value,) = readers._values(column(pa.duration(unit), 1_234_567))
    assert value == decimal.Decimal(1_234_567) / 10**digits and str(value) == str(decimal.Decimal(1_234_567).scaleb(-digits))


def test_values_that_arrow_holds_in_several_ways():
  nested = pa.array([[['a'], None], []], pa.large_list(pa.list_(pa.large_string())))
  assert readers._values(nested) == [[['a'], None], []]
  buffers = [None, pa.py_buffer(np.array([0, 1, 3], np.int64).tobytes()), pa.py_buffer(b'a\xff\xfe')]
  assert readers._values(pa.Array.from_buffers(pa.large_string(), 2, buffers)) == ['a', b'\xff\xfe']
  kinds = pa.array([0, 1, 0], pa.int8())
  parts = [pa.array([1, None], pa.int64()), pa.array([LATE], pa.timestamp('ns'))]
  union = pa.UnionArray.from_dense(kinds, pa.array([0, 0, 1], pa.int32()), parts)
  assert readers._values(union) == [1, '2023-11-14T22:13:20.123456789', None]
  assert readers._values(pa.array([True, None])) == [True, None] and readers._values(pa.array([{}], pa.struct([]))) == [{}]


@pytest.mark.parametrize('splits', ['3', '[3]', '["train", null]'])
def test_a_damaged_list_of_splits_is_named(tmp_path, splits):
  save(tmp_path / 'train', table_of(['a']))
  (tmp_path / 'dataset_dict.json').write_text(f'{{"splits": {splits}}}')
  with pytest.raises(UserError, match=r'dataset_dict\.json: `splits` must be a list of names; save the data set again'):
    open_triplets(tmp_path, 'train')


def test_only_splits_that_are_there_are_listed(tmp_path):
  save(tmp_path / 'train', table_of(['a']))
  (tmp_path / 'dataset_dict.json').write_text('{"splits": ["train", "gone"]}')
  assert readers.saved_splits(tmp_path) == {'train': tmp_path / 'train'}


@pytest.mark.parametrize('entry', ['"data-00000-of-00001.arrow"', '{"filename": "../data/data-00000-of-00001.arrow"}', '{}', 'null'])
def test_files_of_a_saved_data_set_must_be_named_plainly(tmp_path, entry):
  folder = save(tmp_path / 'data', table_of(['a']))
  (folder / 'state.json').write_text(f'{{"_data_files": [{entry}]}}')
  with pytest.raises(DataError, match=r'state\.json: lists files that are not there'):
    open_triplets(folder, 'train')


def test_only_the_first_line_may_begin_with_a_mark(tmp_path):
  path, line = tmp_path / 'a.jsonl', json.dumps(GOOD).encode()
  path.write_bytes(b'\xef\xbb\xbf' + line + b'\n\xef\xbb\xbf' + line + b'\n\x1f\x8b\n')
  assert [number for number, _ in read_triplets(path, 'skip').skipped] == [2, 3]


def test_what_the_disk_cannot_read_is_named(tmp_path):
  with pytest.raises(DataError, match=rf'{tmp_path}: cannot be read after line 0 \(.*directory'):
    list(readers._read_jsonl(tmp_path))


def test_what_a_file_is_read_by_depends_on_its_name(tmp_path):
  for name, reader in (('a.jsonl', readers._read_jsonl), ('a.jsonl.gz', readers._read_jsonl), ('a.parquet', readers._read_parquet)):
    (tmp_path / name).write_bytes(b'')
    assert readers.reader_of(tmp_path / name) is reader
  assert readers.reader_of(save(tmp_path / 'saved', table_of(['a']))) is readers._read_saved
  (tmp_path / 'saved/dataset_info.json').unlink()
  assert not readers.is_saved_dataset(tmp_path / 'saved') and not readers.is_one_split(tmp_path / 'gone')


def test_damaged_offsets_within_a_column_are_refused(tmp_path):
  folder = save(tmp_path / 'data', table_of(['abcdefgh', 'ijklmnop', 'qrst']).slice(0, 2))
  path = folder / 'data-00000-of-00001.arrow'
  content, offsets = path.read_bytes(), np.array([0, 8, 16], np.int32).tobytes()
  assert content.count(offsets) == 1
  path.write_bytes(content.replace(offsets, np.array([0, 800, 16], np.int32).tobytes()))
  with pytest.raises(DataError, match='not a readable folder'):
    open_triplets(folder, 'train')
