from __future__ import annotations

import gzip
import json
import pickle
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polar_jax.data import sources
from polar_jax.types import Triplet

GOOD = {'prompt': 'p', 'reference': 'r', 'chosen': 'c', 'rejected': 'd'}
MESSAGES = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]


def without(field):
  return {key: value for key, value in GOOD.items() if key != field}


def write(path, rows):
  """Rows are dicts, or lines as they are to stand in the file."""
  lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
  data = b''.join(line + b'\n' for line in lines)
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.parquet'])
def test_all_formats_give_the_same_rows(tmp_path, name):
  rows = [
    {**GOOD, 'prompt': MESSAGES, 'wrapper': 'pretrain', 'category': 'easy', 'source': 'x', 'n': 3},
    {'prompt': MESSAGES, 'reference': '', 'chosen': '', 'rejected': '', 'wrapper': None, 'category': None, 'source': '日本', 'n': 4},
  ]
  path = tmp_path / name
  if name.endswith('.parquet'):
    pq.write_table(pa.Table.from_pylist(rows), path)
  else:
    write(path, rows)
  read = sources.read_rows(str(path))
  expected = [
    Triplet(MESSAGES, 'r', 'c', 'd', 'pretrain', 'easy', {'source': 'x', 'n': 3}),
    Triplet(MESSAGES, '', '', '', 'sft', '', {'source': '日本', 'n': 4}),
  ]
  assert list(read) == expected
  assert (len(read), read[-1], read[:1], read.path, read.skipped) == (2, expected[1], expected[:1], path, [])
  with pytest.raises(IndexError):
    read[2]
  assert list(pickle.loads(pickle.dumps(read))) == expected


def test_blank_lines_and_byte_order_mark(tmp_path):
  path = write(tmp_path / 'a.jsonl', [b'\xef\xbb\xbf' + json.dumps(GOOD).encode(), b'', b'  ', GOOD, b'{'])
  read = sources.read_rows(path, 'skip')
  assert len(read) == 2
  assert [number for number, _ in read.skipped] == [5]  # the line of the file


BAD = [
  (b'{"prompt": ', None, 'not JSON'),
  (b'{"prompt": "\xff"}', None, 'not UTF-8'),
  (b'[' * 100_000, None, 'not JSON'),
  (b'{"prompt": ' + b'9' * 5_000 + b'}', None, 'not JSON'),
  (b'[1, 2]', None, 'JSON object, not list'),
  (b'null', None, 'JSON object, not NoneType'),
  *[(without(field), field, f"field '{field}' is missing") for field in GOOD],
  ({**GOOD, 'prompt': None}, 'prompt', 'prompt must be a string or a list of messages, not null'),
  ({**GOOD, 'chosen': 7}, 'chosen', 'not int'),
  ({**GOOD, 'chosen': {'content': 'x'}}, 'chosen', 'not dict'),
  ({**GOOD, 'rejected': []}, 'rejected', 'empty list'),
  ({**GOOD, 'reference': [{'role': 'user'}]}, 'reference', 'reference[0] is a message without content'),
  ({**GOOD, 'reference': [{'content': None}]}, 'reference', 'reference[0].content must be a string, not null'),
  ({**GOOD, 'reference': ['text']}, 'reference', 'reference[0] must be a message'),
  ({**GOOD, 'chosen': '\ud83e'}, 'chosen', 'surrogate'),
  ({**GOOD, 'wrapper': 'chat'}, 'wrapper', "wrapper is 'chat'"),
  ({**GOOD, 'wrapper': ['sft']}, 'wrapper', 'wrapper is'),
  ({**GOOD, 'category': 3}, 'category', 'category must be a string, not int'),
]


@pytest.mark.parametrize(('bad', 'field', 'reason'), BAD)
def test_bad_row(tmp_path, bad, field, reason):
  path = write(tmp_path / 'rows.jsonl', [GOOD, bad, GOOD])
  with pytest.raises(sources.BadRowError) as caught:
    sources.read_rows(path)
  error = caught.value
  assert isinstance(error, ValueError)
  assert (error.path, error.row, error.field) == (path, 2, field)
  assert reason in str(error)
  assert f'{path}, row 2' in str(error)
  assert '\n' not in str(error)
  assert str(pickle.loads(pickle.dumps(error))) == str(error)
  read = sources.read_rows(path, 'skip')
  assert len(read) == 2
  assert [number for number, _ in read.skipped] == [2]
  assert reason in read.skipped[0][1]


def test_bad_parquet_row_and_missing_column(tmp_path):
  path = tmp_path / 'a.parquet'
  pq.write_table(pa.Table.from_pylist([GOOD, {**GOOD, 'chosen': None}]), path)
  with pytest.raises(sources.BadRowError, match='row 2: chosen must be'):
    sources.read_rows(path)
  assert sources.read_rows(path, 'skip').skipped == [(2, 'chosen must be a string or a list of messages, not null')]
  pq.write_table(pa.Table.from_pylist([without('rejected')]), path)
  with pytest.raises(sources.SourceError, match=r"no good rows.*'rejected' is missing"):
    sources.read_rows(path, 'skip')


def test_no_good_rows(tmp_path):
  with pytest.raises(sources.SourceError, match=r'a\.jsonl: no good rows \(0'):
    sources.read_rows(write(tmp_path / 'a.jsonl', []))
  with pytest.raises(sources.SourceError, match=r'no good rows \(1 bad ones; row 1: not JSON'):
    sources.read_rows(write(tmp_path / 'a.jsonl', [b'x']), 'skip')


@pytest.mark.parametrize('damage', ['cut', 'flip', 'plain', 'crc'])
def test_damaged_gzip(tmp_path, damage):
  path = write(tmp_path / 'a.jsonl.gz', [{**GOOD, 'prompt': str(i * 7919)} for i in range(500)])
  data = bytearray(path.read_bytes())
  if damage == 'cut':
    data = data[: len(data) // 2]
  elif damage == 'flip':
    data[len(data) // 2 : len(data) // 2 + 20] = b'\xff' * 20
  elif damage == 'crc':
    data[-6] ^= 1
  path.write_bytes(b'{"prompt": 1}' if damage == 'plain' else bytes(data))
  with pytest.raises(sources.SourceError, match=r'a\.jsonl\.gz.*truncated or damaged'):
    sources.read_rows(path, 'raise')


def test_damaged_parquet(tmp_path):
  path = tmp_path / 'a.parquet'
  path.write_bytes(b'PAR1 nothing PAR1')
  with pytest.raises(sources.SourceError, match=r'a\.parquet: not a parquet file'):
    sources.read_rows(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
  path = tmp_path / 'a.parquet'
  pq.write_table(pa.Table.from_pylist([GOOD]), path)
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(ImportError, match=r'pip install polar_jax\[parquet\]'):
    sources.read_rows(path)


def test_unusable_arguments(tmp_path):
  with pytest.raises(sources.SourceError, match='no such file'):
    sources.read_rows(tmp_path / 'a.jsonl')
  (tmp_path / 'a.csv').write_text('x')
  with pytest.raises(sources.SourceError, match=r'a\.csv: unknown kind.*\.parquet'):
    sources.read_rows(tmp_path / 'a.csv')
  with pytest.raises(ValueError, match='on_bad_row'):
    sources.read_rows(tmp_path / 'a.jsonl', 'ignore')


def test_open_source_of_files_and_folders(tmp_path):
  path = write(tmp_path / 'train.jsonl.gz', [GOOD, b'x'])
  assert len(sources.open_source(path, 'validation', 'skip')) == 1  # a file is its own split
  assert len(sources.open_source(str(tmp_path), 'train', 'skip')) == 1
  with pytest.raises(sources.BadRowError):
    sources.open_source(tmp_path, 'train', 'raise')
  with pytest.raises(sources.SourceError, match=r"no split 'test': looked for .*test\.jsonl.gz.*there is: train\.jsonl\.gz"):
    sources.open_source(tmp_path, 'test', 'raise')
  with pytest.raises(sources.SourceError, match=r'missing: no such file or folder; .* holds: train\.jsonl\.gz'):
    sources.open_source(tmp_path / 'missing', 'train', 'raise')
  write(tmp_path / 'train.jsonl', [GOOD])
  with pytest.raises(sources.SourceError, match='more than once'):
    sources.open_source(tmp_path, 'train', 'raise')


def test_open_source_of_a_tfds_folder(tmp_path, monkeypatch):
  (tmp_path / 'triplets' / '1.0.0').mkdir(parents=True)
  (tmp_path / 'triplets' / '1.0.0' / 'dataset_info.json').write_text('{}')
  opened = []
  fake = types.ModuleType('polar_jax.data.triplet_dataset')
  fake.open_triplets = lambda folder: opened.append(folder) or {'train': [Triplet(**GOOD)], 'validation': []}
  monkeypatch.setitem(sys.modules, 'polar_jax.data.triplet_dataset', fake)
  monkeypatch.setattr('polar_jax.data.triplet_dataset', fake, raising=False)
  assert sources.open_source(tmp_path, 'train', 'raise') == [Triplet(**GOOD)]
  assert opened == [tmp_path]
  with pytest.raises(sources.SourceError, match="no split 'test'; its splits are: train, validation"):
    sources.open_source(tmp_path, 'test', 'raise')


def test_open_source_of_two_tfds_folders(tmp_path):
  for version in ('1.0.0', '2.0.0'):
    (tmp_path / version).mkdir()
    (tmp_path / version / 'dataset_info.json').write_text('{}')
  with pytest.raises(sources.SourceError, match=r'1\.0\.0.*2\.0\.0'):
    sources.open_source(tmp_path, 'train')


@pytest.mark.data
def test_real_preferences_read_cleanly(data_folder):
  files = sorted((data_folder / 'preferences').glob('*.jsonl.gz'))
  assert files
  for path in files:
    with gzip.open(path) as file:
      lines = sum(1 for _ in file)
    assert len(sources.read_rows(path)) == lines
