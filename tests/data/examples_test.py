from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import pickle
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polar_jax.data import examples as sources
from polar_jax.data import tfds
from polar_jax.types import Prompt, Triplet, UserError

GOOD = {'prompt': 'p', 'reference': 'r', 'chosen': 'c', 'rejected': 'd'}
MESSAGES = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]


def without(field):
  return {key: value for key, value in GOOD.items() if key != field}


def write(path, examples):
  """Write examples, given as dicts or as raw lines."""
  lines = [example if isinstance(example, bytes) else json.dumps(example).encode() for example in examples]
  data = b''.join(line + b'\n' for line in lines)
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.parquet'])
def test_all_formats_give_the_same_examples(tmp_path, name):
  examples = [
    {**GOOD, 'prompt': MESSAGES, 'wrapper': 'pretrain', 'category': 'easy', 'source': 'x', 'n': 3},
    {'prompt': MESSAGES, 'reference': '', 'chosen': '', 'rejected': '', 'wrapper': None, 'category': None, 'source': '日本', 'n': 4},
  ]
  path = tmp_path / name
  if name.endswith('.parquet'):
    pq.write_table(pa.Table.from_pylist(examples), path)
  else:
    write(path, examples)
  read = sources.read_triplets(str(path))
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
  read = sources.read_triplets(path, 'skip')
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
  ({**GOOD, 'category': 'a\ud83e'}, 'category', 'surrogate'),  # the report could not be written
  ({**GOOD, 'wrapper': 'chat'}, 'wrapper', "wrapper is 'chat'"),
  ({**GOOD, 'wrapper': ['sft']}, 'wrapper', 'wrapper is'),
  ({**GOOD, 'category': 3}, 'category', 'category must be a string, not int'),
]


@pytest.mark.parametrize(('bad', 'field', 'reason'), BAD)
def test_bad_example(tmp_path, bad, field, reason):
  path = write(tmp_path / 'examples.jsonl', [GOOD, bad, GOOD])
  with pytest.raises(sources.BadExampleError) as caught:
    sources.read_triplets(path)
  error = caught.value
  assert isinstance(error, ValueError)
  assert (error.path, error.number, error.field) == (path, 2, field)
  assert reason in str(error)
  assert f'{path}, example 2' in str(error)
  assert '\n' not in str(error)
  assert str(pickle.loads(pickle.dumps(error))) == str(error)
  read = sources.read_triplets(path, 'skip')
  assert len(read) == 2
  assert [number for number, _ in read.skipped] == [2]
  assert reason in read.skipped[0][1]


def test_bad_parquet_example_and_missing_column(tmp_path):
  path = tmp_path / 'a.parquet'
  pq.write_table(pa.Table.from_pylist([GOOD, {**GOOD, 'chosen': None}]), path)
  with pytest.raises(sources.BadExampleError, match='example 2: chosen must be'):
    sources.read_triplets(path)
  assert sources.read_triplets(path, 'skip').skipped == [(2, 'chosen must be a string or a list of messages, not null')]
  pq.write_table(pa.Table.from_pylist([without('rejected')]), path)
  with pytest.raises(sources.DataError, match=r"no valid examples.*'rejected' is missing"):
    sources.read_triplets(path, 'skip')


def test_no_valid_examples(tmp_path):
  with pytest.raises(sources.DataError, match=r'a\.jsonl: no valid examples \(0'):
    sources.read_triplets(write(tmp_path / 'a.jsonl', []))
  with pytest.raises(sources.DataError, match=r'no valid examples \(1 bad ones; example 1: not JSON'):
    sources.read_triplets(write(tmp_path / 'a.jsonl', [b'x']), 'skip')


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
  with pytest.raises(sources.DataError, match=rf'a\.jsonl\.gz.*truncated or damaged after line {0 if damage == "plain" else ""}'):
    sources.read_triplets(path, 'raise')


def test_damaged_parquet(tmp_path):
  path = tmp_path / 'a.parquet'
  path.write_bytes(b'PAR1 nothing PAR1')
  with pytest.raises(sources.DataError, match=r'a\.parquet: not a readable parquet file'):
    sources.read_triplets(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
  path = tmp_path / 'a.parquet'
  pq.write_table(pa.Table.from_pylist([GOOD]), path)
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(ImportError, match=r'pip install polar_jax\[parquet\]'):
    sources.read_triplets(path)


def test_unusable_arguments(tmp_path):
  with pytest.raises(sources.DataError, match='no such file'):
    sources.read_triplets(tmp_path / 'a.jsonl')
  (tmp_path / 'a.csv').write_text('x')
  with pytest.raises(sources.DataError, match=r'a\.csv: unknown kind.*\.parquet'):
    sources.read_triplets(tmp_path / 'a.csv')
  with pytest.raises(ValueError, match='on_bad_example'):
    sources.read_triplets(tmp_path / 'a.jsonl', 'ignore')


def test_open_triplets_of_files_and_folders(tmp_path):
  path = write(tmp_path / 'train.jsonl.gz', [GOOD, b'x'])
  assert len(sources.open_triplets(path, 'validation', 'skip')) == 1  # a file is its own split
  assert len(sources.open_triplets(str(tmp_path), 'train', 'skip')) == 1
  with pytest.raises(sources.BadExampleError):
    sources.open_triplets(tmp_path, 'train', 'raise')
  with pytest.raises(sources.DataError, match=r"no split 'test': looked for .*test\.jsonl.gz.*found: train\.jsonl\.gz"):
    sources.open_triplets(tmp_path, 'test', 'raise')
  with pytest.raises(sources.DataError, match=r'missing: no such file or folder; .* contains: train\.jsonl\.gz'):
    sources.open_triplets(tmp_path / 'missing', 'train', 'raise')
  write(tmp_path / 'train.jsonl', [GOOD])
  with pytest.raises(sources.DataError, match='more than one file'):
    sources.open_triplets(tmp_path, 'train', 'raise')


def test_open_triplets_of_a_tfds_folder(tmp_path, monkeypatch):
  (tmp_path / 'triplets' / '1.0.0').mkdir(parents=True)
  (tmp_path / 'triplets' / '1.0.0' / 'dataset_info.json').write_text('{}')
  opened = []
  fake = types.ModuleType('polar_jax.data.tfds')
  fake.open_triplets = lambda folder: opened.append(folder) or {'train': [Triplet(**GOOD)], 'validation': []}
  monkeypatch.setitem(sys.modules, 'polar_jax.data.tfds', fake)
  monkeypatch.setattr('polar_jax.data.tfds', fake, raising=False)
  assert sources.open_triplets(tmp_path, 'train', 'raise') == [Triplet(**GOOD)]
  assert opened == [tmp_path]
  with pytest.raises(sources.DataError, match="no split 'test'; its splits are: train, validation"):
    sources.open_triplets(tmp_path, 'test', 'raise')


def test_open_triplets_of_two_tfds_folders(tmp_path):
  for version in ('1.0.0', '2.0.0'):
    (tmp_path / version).mkdir()
    (tmp_path / version / 'dataset_info.json').write_text('{}')
  with pytest.raises(sources.DataError, match=r'1\.0\.0.*2\.0\.0'):
    sources.open_triplets(tmp_path, 'train')


ASK = [{'role': 'user', 'content': 'Why?'}]
OFFICIAL = {
  'data_source': 'some/set',
  'prompt': ASK,
  'ability': 'math',
  'reward_model': {'style': 'polar', 'ground_truth': [{'role': 'assistant', 'content': 'So 4.'}]},
  'extra_info': {'split': 'train', 'index': 7, 'ability': 'math', 'prompt': ASK},
}


def official(**changes):
  """Return an official example with fields replaced; `reward_model__style` is a nested field, and ... removes one."""
  example = {key: dict(value) if isinstance(value, dict) else value for key, value in OFFICIAL.items()}
  for name, value in changes.items():
    *outer, key = name.split('__')
    section = example[outer[0]] if outer else example
    section.pop(key, None)
    if value is not ...:
      section[key] = value
  return example


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.parquet'])
def test_prompts_of_the_official_format(tmp_path, name):
  examples = [
    OFFICIAL,
    official(extra_info__prompt=[{'role': 'user', 'content': 'Why'}, {'role': 'user', 'content': '?'}], ability='general'),
    official(extra_info__prompt=None, reward_model__ground_truth=[{'role': 'assistant', 'content': '4'}]),
  ]
  path = tmp_path / name
  if name.endswith('.parquet'):
    pq.write_table(pa.Table.from_pylist(examples), path)
  else:
    write(path, examples)
  read = sources.open_prompts(path, 'train')
  metadata = {'data_source': 'some/set', 'split': 'train', 'index': 7}
  assert list(read) == [
    Prompt(ASK, [{'role': 'assistant', 'content': 'So 4.'}], '', 'math', metadata),
    Prompt(
      examples[1]['extra_info']['prompt'], examples[1]['reward_model']['ground_truth'], '', 'general', {**metadata, 'policy_prompt': ASK}
    ),
    Prompt(ASK, [{'role': 'assistant', 'content': '4'}], '', 'math', metadata),
  ]
  assert (read.path, read.skipped) == (path, [])


def test_parquet_gives_every_message_the_fields_of_all(tmp_path):
  """A message field of only one prompt is null in the others of its column, which must not make two prompts differ."""
  text = [{'role': 'assistant', 'content': 'Hello'}]
  examples = [OFFICIAL, official(prompt=[{'role': 'user', 'content': 'Why?', 'name': 'Ann'}], reward_model__ground_truth=text)]
  pq.write_table(pa.Table.from_pylist(examples), tmp_path / 'a.parquet')
  first, second = sources.open_prompts(tmp_path / 'a.parquet', 'train')
  assert 'policy_prompt' not in first.metadata and second.metadata['policy_prompt'][0]['name'] == 'Ann'


@pytest.mark.parametrize('name', ['a.jsonl', 'a.parquet'])
def test_plain_prompts(tmp_path, name):
  examples = [
    {'prompt': 'p', 'reference': 'r', 'answer': '72', 'category': 'math', 'policy_prompt': 'Think. p', 'n': 3},
    {'prompt': 'p', 'reference': ' ', 'answer': None, 'category': None, 'policy_prompt': 'p', 'n': 4},
  ]
  path = tmp_path / name
  if name.endswith('.parquet'):
    pq.write_table(pa.Table.from_pylist(examples), path)
  else:
    write(path, examples)
  expected = [Prompt('p', 'r', '72', 'math', {'n': 3, 'policy_prompt': 'Think. p'}), Prompt('p', ' ', '', '', {'n': 4})]
  assert list(sources.open_prompts(path, 'any')) == expected


BAD_PROMPTS = [
  (b'{', None, 'not JSON'),
  ({'prompt': 'p'}, 'reference', "field 'reference' is missing (in the official format it is reward_model.ground_truth)"),
  ({'reference': 'r'}, 'prompt', "field 'prompt' is missing"),
  ({'prompt': 'p', 'reference': ''}, 'reference', 'reference is empty'),
  ({'prompt': 'p', 'reference': None}, 'reference', 'not null'),
  ({'prompt': 'p', 'reference': [{'content': ''}, {'content': ''}]}, 'reference', 'reference is empty'),
  ({'prompt': '', 'reference': 'r'}, 'prompt', 'prompt is empty'),
  ({'prompt': 3, 'reference': 'r'}, 'prompt', 'not int'),
  ({'prompt': 3, 'policy_prompt': 'p', 'reference': 'r'}, 'prompt', 'not int'),
  ({'prompt': [{'content': 'x'}], 'reference': 'r'}, 'prompt', 'prompt[0] is a message without a role'),
  ({'prompt': 'p', 'policy_prompt': [], 'reference': 'r'}, 'policy_prompt', 'empty list'),
  ({'prompt': 'p', 'reference': 'r', 'answer': 72}, 'answer', 'answer must be a string, not int'),
  ({'prompt': 'p', 'reference': 'r', 'category': 1}, 'category', 'category must be a string, not int'),
  (official(reward_model='polar'), 'reward_model', 'reward_model must be an object, not str'),
  (official(extra_info=[1]), 'extra_info', 'extra_info must be an object, not list'),
  (official(reward_model__style='rule'), 'reward_model.style', "reward_model.style is 'rule'; it must be 'polar'"),
  (official(reward_model__ground_truth=...), 'reward_model.ground_truth', "'reward_model.ground_truth' is missing"),
  (official(reward_model__ground_truth=''), 'reward_model.ground_truth', 'reward_model.ground_truth is empty'),
  (official(reward_model__ground_truth=4), 'reward_model.ground_truth', 'not int'),
  (official(extra_info__prompt=4), 'extra_info.prompt', 'not int'),
  (official(prompt=...), 'prompt', "field 'prompt' is missing"),
  (official(prompt=[{'role': 'user'}]), 'prompt', 'prompt[0] is a message without content'),
  (official(ability=5), 'ability', 'ability must be a string, not int'),
]


@pytest.mark.parametrize(('bad', 'field', 'reason'), BAD_PROMPTS)
def test_bad_prompt(tmp_path, bad, field, reason):
  path = write(tmp_path / 'examples.jsonl', [OFFICIAL, bad, {'prompt': 'p', 'reference': 'r'}])
  with pytest.raises(sources.BadExampleError) as caught:
    sources.open_prompts(path, 'train')
  assert (caught.value.path, caught.value.number, caught.value.field) == (path, 2, field)
  assert reason in str(caught.value) and f'{path}, example 2' in str(caught.value) and '\n' not in str(caught.value)
  read = sources.open_prompts(path, 'train', 'skip')
  assert len(read) == 2
  assert [number for number, _ in read.skipped] == [2] and reason in read.skipped[0][1]


def test_prompts_of_folders(tmp_path):
  write(tmp_path / 'train.jsonl', [OFFICIAL])
  assert len(sources.open_prompts(tmp_path, 'train')) == 1
  with pytest.raises(sources.NoSplitError, match="no split 'test'"):
    sources.open_prompts(tmp_path, 'test')
  with pytest.raises(ValueError, match='on_bad_example'):
    sources.open_prompts(tmp_path, 'train', 'ignore')


def test_prompts_of_a_tfds_folder(tmp_path):
  prompts = [
    Prompt('p', 'r', '72', 'math', {'n': 3, 'policy_prompt': ASK}),
    Prompt([{'role': 'system', 'content': 'Be.'}, *ASK], [{'role': 'assistant', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]),
  ]
  tfds.write_prompts(tmp_path / 'prompts', 'prompts', {'train': prompts, 'test': [Prompt('p', '')]}, 'Prompts.', {})
  assert list(sources.open_prompts(tmp_path / 'prompts', 'train')) == [
    prompts[0],
    Prompt('Be.\nWhy?', 'a\nb', metadata={'policy_prompt': prompts[1].prompt}),  # the same to reward model and policy
  ]
  with pytest.raises(sources.BadExampleError, match='prompts:test, example 1: reference is empty'):
    sources.open_prompts(tmp_path / 'prompts', 'test')
  with pytest.raises(sources.NoSplitError, match='its splits are: test, train'):
    sources.open_prompts(tmp_path / 'prompts', 'validation')
  tfds.write_triplets(
    tmp_path / 'triplets', 'examples', {'train': [Triplet('p', 'r', 'c', 'd', 'pretrain', 'x', {'k': 1})]}, 'Examples.', {}
  )
  assert list(sources.open_prompts(tmp_path / 'triplets', 'train')) == [Prompt('p', 'r', '', 'x', {'k': 1})]


@pytest.mark.data
def test_real_prompts_read_cleanly(data_folder):
  path = data_folder / 'prompts/gsm8k_train.jsonl.gz'
  with gzip.open(path) as file:
    examples = [json.loads(line) for line in file]
  read = sources.open_prompts(path, 'train')
  assert [(p.prompt, p.reference, p.category, p.metadata) for p in read] == [
    (example['prompt'], example['reference'], 'math', {'split': 'train'}) for example in examples
  ]


@pytest.mark.data
def test_real_preferences_read_cleanly(data_folder):
  files = sorted((data_folder / 'preferences').glob('*.jsonl.gz'))
  assert files
  for path in files:
    with gzip.open(path) as file:
      lines = sum(1 for _ in file)
    assert len(sources.read_triplets(path)) == lines


def test_an_example_is_named_by_its_line_or_else_from_one():
  numbered = types.SimpleNamespace(numbers=[1, 3, 8])
  assert [sources.example_number(numbered, i) for i in range(3)] == [1, 3, 8]
  assert [sources.example_number([], i) for i in range(3)] == [1, 2, 3]


def test_examples_that_were_skipped_are_counted_and_the_first_twenty_are_named():
  lines, bad = [], lambda count: [(i, f'reason {i}') for i in range(1, count + 1)]
  assert sources.report_skipped(['a', 'b'], pathlib.Path('f'), lines.append) == ['a', 'b'] and not lines
  assert sources.describe_skipped(pathlib.Path('f.jsonl'), bad(2), 5) == (
    'f.jsonl: skipped 2 bad examples of 7 (example 1: reason 1; example 2: reason 2)'
  )
  named = '; '.join(f'example {i}: reason {i}' for i in range(1, 21))
  assert sources.describe_skipped(pathlib.Path('f.jsonl'), bad(20), 0) == f'f.jsonl: skipped 20 bad examples of 20 ({named})'
  assert sources.describe_skipped(pathlib.Path('f.jsonl'), bad(21), 1) == f'f.jsonl: skipped 21 bad examples of 22 ({named}; ...)'


class Table:
  """Rows by their numbers, as libraries have them that know no Sequence of Python."""

  def __init__(self, rows):
    self._rows = rows

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    return self._rows[index]


def test_examples_in_any_form(tmp_path):
  """A path is opened, objects are returned as they are, and dicts are checked."""
  path = write(tmp_path / 'train.jsonl', [GOOD])
  triplet, prompt = Triplet('p', 'r', 'c', 'd'), Prompt('p', 'r')
  for read, example in ((sources.as_triplets, triplet), (sources.as_prompts, prompt)):
    for own in ([example], Table([example])):
      assert read(own) is own
    with pytest.raises(sources.DataError, match=r'must be a path or a sequence of dicts or .*s, not dict'):
      read(GOOD)
    for given in (path, str(path), tmp_path, [GOOD], iter([GOOD]), (GOOD,)):
      (found,) = read(given)
      assert dataclasses.replace(found, metadata=example.metadata) == example
    with pytest.raises(sources.DataError, match='test'):
      read(tmp_path, 'test')
    skipping = read([GOOD, {'prompt': 3}], 'train', 'skip')
    assert len(skipping) == 1 and skipping.skipped[0][0] == 1
    for given in (GOOD, 3, None):
      with pytest.raises((sources.DataError, TypeError)):
        read(given)
  with pytest.raises(UserError, match='reference'):
    sources.as_prompts([{'prompt': 'p'}])
  (found,) = sources.as_prompts([{'prompt': 'p'}], optional=('reference',))
  assert (found.prompt, found.reference) == ('p', '')
  (found,) = sources.as_prompts([GOOD], optional=('reference',))
  assert found.reference == 'r'


def test_no_examples_and_unknown_ways_to_treat_bad_ones_are_refused():
  for read in (sources.as_triplets, sources.as_prompts):
    with pytest.raises(sources.DataError, match=r'<examples>: no valid examples \(0 bad ones\)'):
      read([])
    with pytest.raises(ValueError, match='on_bad_example'):
      read([GOOD], 'train', 'ignore')


def test_up_to_twelve_names_of_a_folder_are_listed(tmp_path):
  assert sources._listing(tmp_path) == 'nothing'
  names = [f'a{i:02}' for i in range(13)]
  for count, expected in ((12, ', '.join(names[:12])), (13, ', '.join(names[:12]) + ' and 1 more')):
    for name in names[:count]:
      (tmp_path / name).write_text('')
    assert sources._listing(tmp_path) == expected


def test_reasons_are_one_line_of_bounded_length():
  assert sources.BadField('f', 'a\n  b').reason == 'a b' and sources.BadField(None, 'x' * 300).reason == 'x' * 300
  long = sources.BadField(None, 'x' * 301)
  assert long.reason == str(long) == 'x' * 150 + '...' + 'x' * 150 and long.field is None


def test_answers_and_abilities_of_the_official_format():
  """The outer ability has precedence; a reference may be optional."""
  (found,) = sources.as_prompts([official(answer='4', ability='general')])
  assert (found.answer, found.category, found.metadata) == ('4', 'general', {'data_source': 'some/set', 'split': 'train', 'index': 7})
  (found,) = sources.as_prompts([official(ability=None, extra_info__extra='e')], optional=['reference'])
  assert (found.category, found.metadata['extra'], found.reference[0]['content']) == ('math', 'e', 'So 4.')
  (found,) = sources.as_prompts([official(extra_info=None)])
  assert (found.prompt, found.category, found.metadata) == (ASK, 'math', {'data_source': 'some/set'})
