from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_jax.config import ConfigError
from polar_jax.data.examples import BadExampleError, DataError
from polar_jax.scoring import files
from polar_jax.types import Group

MESSAGES = [{'role': 'user', 'content': 'a'}, {'role': 'user', 'content': 'b'}]
GOOD = {'prompt': 'p', 'reference': 'r', 'output': 'o'}


def write(path, examples):
  data = ''.join(json.dumps(example) + '\n' for example in examples).encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


def read(path, on_bad_example='raise', skipped=None, **how):
  return list(files.read_examples(path, on_bad_example, [] if skipped is None else skipped, **how))


def numbered(contents):
  return [files.Example(i, content, None) for i, content in enumerate(contents, 1)]


def save(path, contents, rewards, settings=None):
  """Write a complete file in one window."""
  file = files.RewardFile(path, settings or {})
  file.write(numbered(contents), np.asarray(rewards, np.float32))
  file.finish()
  return file


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.parquet'])
def test_all_formats_give_the_same_examples(tmp_path, name):
  contents = [
    {**GOOD, 'prompt': MESSAGES, 'wrapper': 'pretrain', 'id': 7, 'source': '日本'},
    {**GOOD, 'prompt': MESSAGES[:1], 'wrapper': None, 'id': 8, 'source': 'x'},
  ]
  path = tmp_path / name
  if name.endswith('.parquet'):
    pq.write_table(pa.Table.from_pylist(contents), path)
  else:
    write(path, contents)
  first, second = read(path)
  assert first == (1, contents[0], Group(MESSAGES, 'r', ['o'], 'pretrain'))
  assert second == (2, contents[1], Group(MESSAGES[:1], 'r', ['o'], 'sft'))


@pytest.mark.parametrize(
  ('bad', 'field', 'reason'),
  [
    ({'prompt': 'p', 'reference': 'r'}, 'output', "field 'output' is missing"),
    ({'prompt': 'p', 'output': 'o'}, 'reference', "field 'reference' is missing"),
    ({**GOOD, 'output': 3}, 'output', 'output must be a string or a list of messages, not int'),
    ({**GOOD, 'wrapper': 'chat'}, 'wrapper', "wrapper is 'chat'"),
    ({**GOOD, 'reward': 0.5}, 'reward', "already has a field 'reward'"),
    ([GOOD], None, 'JSON object, not list'),
  ],
)
def test_bad_examples(tmp_path, bad, field, reason):
  path = write(tmp_path / 'a.jsonl', [GOOD, bad, GOOD])
  with pytest.raises(BadExampleError) as caught:
    read(path)
  assert (caught.value.path, caught.value.number, caught.value.field) == (path, 2, field)
  assert reason in str(caught.value)
  skipped = []
  assert [example.number for example in read(path, 'skip', skipped)] == [1, 3]
  assert [number for number, _ in skipped] == [2]
  assert reason in skipped[0][1]


def test_a_null_reward_is_overwritten(tmp_path):
  path = write(tmp_path / 'a.jsonl', [{**GOOD, 'reward': None}])
  (example,) = read(path)
  save(tmp_path / 'out.jsonl', [example.content], [1.5])
  assert json.loads((tmp_path / 'out.jsonl').read_text()) == {**GOOD, 'reward': 1.5}


def test_without_a_reference(tmp_path):
  path = write(tmp_path / 'a.jsonl', [{'prompt': 'p', 'output': 'o'}])
  (example,) = read(path, use_reference=False)
  assert example.group == Group('p', '', ['o'])


def test_bytes_of_a_parquet_file_are_written_in_base64(tmp_path):
  path = tmp_path / 'a.parquet'
  pq.write_table(pa.Table.from_pylist([{**GOOD, 'blob': b'\xff'}]), path)
  save(tmp_path / 'out.jsonl', [read(path)[0].content], [1.0])
  assert json.loads((tmp_path / 'out.jsonl').read_text()) == {**GOOD, 'blob': '/w==', 'reward': 1.0}


def test_an_example_that_is_nested_too_deeply_to_be_written(tmp_path):
  path = tmp_path / 'a.jsonl'
  deep = '[' * 900 + ']' * 900
  path.write_text(json.dumps(GOOD)[:-1] + f', "deep": {deep}}}\n')
  try:
    (example,) = read(path)
    assert f'"deep": {deep}' in files.json_text(example.content)
  except BadExampleError as error:
    assert 'nested' in str(error) or 'recursion' in str(error)


@pytest.mark.parametrize(
  'change',
  [
    lambda lines: [lines[0], lines[1].replace(b'"i": 1', b'"i": 7'), lines[2]],
    lambda lines: [lines[0], lines[1][:-20] + b'\n', lines[2]],
    lambda lines: [lines[0], b'{"reward": true}\n', lines[2]],
    lambda lines: [lines[0], lines[1].replace(b'"reward": 1.0', b'"reward": NaN'), lines[2]],
    lambda lines: [lines[0], b'[1]\n', lines[2]],
    lambda lines: [lines[0], lines[0], lines[1]],
  ],
)
def test_a_damaged_partial_output_is_written_again_from_there(tmp_path, change):
  source, path = write(tmp_path / 'in.jsonl', [{**GOOD, 'i': i} for i in range(4)]), tmp_path / 'out.jsonl'
  contents = [example.content for example in read(source)]
  stop_after(path, contents[:3], {})
  partial, _ = files.partial_files(path)
  partial.write_bytes(b''.join(change(partial.read_bytes().splitlines(keepends=True))))
  file = files.RewardFile(path, {}, files.read_examples(source, 'raise', []))
  assert (file.kept, file.damaged) == (1, True)
  file.write(numbered(contents[1:]), np.arange(1, 4, dtype=np.float32))
  file.finish()
  save(tmp_path / 'whole.jsonl', contents, range(4))
  assert path.read_bytes() == (tmp_path / 'whole.jsonl').read_bytes()


def test_an_undamaged_partial_output_longer_than_the_input(tmp_path):
  source, path = write(tmp_path / 'in.jsonl', [GOOD]), tmp_path / 'out.jsonl'
  stop_after(path, [GOOD] * 2, {})
  file = files.RewardFile(path, {}, files.read_examples(source, 'raise', []))
  assert (file.kept, file.damaged) == (1, True)


def test_no_examples(tmp_path):
  with pytest.raises(DataError, match='no valid examples'):
    read(write(tmp_path / 'a.jsonl', []))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_rewards_read_back_to_the_same_bits(tmp_path_factory, rewards):
  path = tmp_path_factory.getbasetemp() / 'bits.jsonl'
  file = save(path, [GOOD] * len(rewards), rewards)
  back = np.array([json.loads(line)['reward'] for line in path.read_text().splitlines()], np.float32)
  np.testing.assert_array_equal(back.view(np.int32), np.array(rewards, np.float32).view(np.int32))
  assert file.count == len(rewards)


def test_examples_are_written_unchanged(tmp_path):
  contents = [
    {**GOOD, 'prompt': MESSAGES, 'output': 'naïve 日本 \u2028 "quoted"\n', 'extra': {'b': [1, 2.5, None, True], 'a': 2**70}},
    {**GOOD, 'note': 'half \ud83e'},  # only passed on, so it may be a value that no template accepts
  ]
  file = save(tmp_path / 'out.jsonl', contents, [0.1, -2.0])
  raw = (tmp_path / 'out.jsonl').read_bytes()
  lines = raw.split(b'\n')
  assert 'naïve 日本'.encode() in lines[0]
  assert lines[2:] == [b'']
  first, second = (json.loads(line) for line in lines[:2])
  assert first == {**contents[0], 'reward': float(np.float32(0.1))}
  assert list(first) == [*contents[0], 'reward']
  assert second == {**contents[1], 'reward': -2.0}
  assert (file.count, file.mean, file.std) == (2, pytest.approx(-0.95), pytest.approx(1.05))
  assert [p.name for p in tmp_path.iterdir()] == ['out.jsonl']
  for name in ('a.jsonl.gz', 'b.jsonl.gz'):
    save(tmp_path / name, contents, [0.1, -2.0])
  assert gzip.decompress((tmp_path / 'a.jsonl.gz').read_bytes()) == raw
  assert (tmp_path / 'a.jsonl.gz').read_bytes() == (tmp_path / 'b.jsonl.gz').read_bytes()
  assert len(list(tmp_path.iterdir())) == 3


def stop_after(path, contents, settings, torn=b''):
  """Leave the files of a run that was killed after these examples, in the middle of writing another."""
  file = files.RewardFile(path, settings)
  file.write(numbered(contents), np.arange(len(contents), dtype=np.float32))
  file.close()
  partial, _ = files.partial_files(path)
  partial.write_bytes(partial.read_bytes() + torn)


@pytest.mark.parametrize('torn', [b'', b'{"prompt": "p", "rew', b'{"prompt": "p", "reward": 7}'])
@pytest.mark.parametrize('name', ['out.jsonl', 'out.jsonl.gz'])
def test_a_stopped_run_continues(tmp_path, torn, name):
  path, contents = tmp_path / name, [{**GOOD, 'i': i} for i in range(5)]
  stop_after(path, contents[:3], {'model': (1, 2)}, torn)
  assert not path.exists()
  file = files.RewardFile(path, {'model': (1, 2)})
  assert (file.kept, file.count, file.mean, file.changed) == (3, 3, 1.0, [])
  file.write(numbered(contents[3:]), np.array([3, 4], np.float32))
  file.finish()
  whole = tmp_path / f'whole_{name}'
  save(whole, contents, range(5))
  assert path.read_bytes() == whole.read_bytes()
  assert (file.mean, file.std) == (2.0, pytest.approx(2**0.5))
  assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('header', ['other', 'torn', 'gone'])
def test_examples_of_another_run_are_dropped(tmp_path, header):
  path = tmp_path / 'out.jsonl'
  stop_after(path, [GOOD] * 3, {'model': 1, 'input': 2})
  _, header_file = files.partial_files(path)
  if header == 'torn':
    header_file.write_text('{"mod')
  elif header == 'gone':
    header_file.unlink()
  file = files.RewardFile(path, {'model': 2, 'input': 2})
  assert file.kept == 0
  assert file.changed == (['model'] if header == 'other' else ['input', 'model'])
  file.write(numbered([{**GOOD, 'i': 9}]), np.ones(1, np.float32))
  file.close()
  assert files.RewardFile(path, {'model': 2, 'input': 2}).kept == 1  # and its own are kept


def test_an_older_file_stays_until_the_new_one_is_complete(tmp_path):
  path = tmp_path / 'folder' / 'out.jsonl'  # which is created
  save(path, [GOOD], [1.0])
  old = path.read_bytes()
  stop_after(path, [GOOD] * 2, {})
  assert path.read_bytes() == old
  files.RewardFile(path, {}).finish()
  assert len(path.read_text().splitlines()) == 2


def test_impossible_outputs(tmp_path):
  source = write(tmp_path / 'in.jsonl', [GOOD])
  files.check_output(tmp_path / 'out.jsonl', source)
  (tmp_path / 'link.jsonl').symlink_to(source)
  (tmp_path / 'hard.jsonl').hardlink_to(source)
  (tmp_path / 'folder.jsonl').mkdir()
  for name, expected in {
    'out.parquet': 'must end in .jsonl or .jsonl.gz',
    'folder.jsonl': 'is a folder',
    'in.jsonl': 'is the input',
    'folder.jsonl/../in.jsonl': 'is the input',
    'link.jsonl': 'is the input',
    'hard.jsonl': 'is the input',
  }.items():
    with pytest.raises(ConfigError, match=expected):
      files.check_output(tmp_path / name, source)
