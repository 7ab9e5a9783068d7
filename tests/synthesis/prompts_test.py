from __future__ import annotations

import collections
import gzip
import json

import pytest

from polar_jax.config import ConfigError
from polar_jax.data import tfds
from polar_jax.synthesis import prompts
from polar_jax.types import Prompt, UserError


def jsonl(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  return path


def read(path, max_words=8):
  return list(prompts.PromptFile(path, max_words, 0))


def test_instructions_and_documents(tmp_path):
  messages = [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'u'}]
  path = jsonl(
    tmp_path / 'p.jsonl', [{'prompt': 'Why?', 'id': 7}, {'prompt': messages, 'prompt_id': 'x'}, {'text': 'one two'}, {'text': 'one'}]
  )
  file = prompts.PromptFile(path, 8, 0)
  assert list(file) == [
    ('7', 'Why?', 'instruction', 'p.jsonl'),
    ('x', 's\nu', 'instruction', 'p.jsonl'),
    (None, 'one', 'prefix', 'p.jsonl'),
  ]
  assert file.skipped == 1


def test_a_text_file_holds_a_document_for_each_paragraph(tmp_path):
  (tmp_path / 't.txt').write_text('one two\n \nthree four\nfive six\n\n\n', encoding='utf-8')
  found = read(tmp_path / 't.txt')
  assert [row.kind for row in found] == ['prefix', 'prefix']
  assert found[0].text == 'one' and 'three four'.startswith(found[1].text)


def test_text_files_are_read_line_by_line(tmp_path):
  (tmp_path / 't.txt').write_bytes('\ufeffone two\r\nthree\r\n\r\n'.encode() + b'four five\n')
  assert [row.text.split()[0] for row in read(tmp_path / 't.txt')] == ['one', 'four']
  (tmp_path / 'bad.txt').write_bytes(b'one two\n\nthree \xff four\n')
  rows = iter(prompts.PromptFile(tmp_path / 'bad.txt', 8, 0))
  assert next(rows).text == 'one'  # before the damage
  with pytest.raises(UserError, match=r'bad\.txt, line 3: not UTF-8'):
    next(rows)


def test_a_tfds_data_set_of_prompts(tmp_path):
  examples = [Prompt('Why?', 'Because.', answer='x'), Prompt([{'role': 'user', 'content': 'u'}], 'r')]
  tfds.write_prompts(tmp_path / 'p', 'prompts', {'train': examples, 'validation': examples[:1]}, 'd', {})
  assert [(row.text, row.kind) for row in read(tmp_path / 'p')] == [('Why?', 'instruction'), ('u', 'instruction')]
  next((tmp_path / 'p').glob('**/*train*')).write_bytes(b'x')
  with pytest.raises(UserError, match='not a readable TFDS data set'):
    read(tmp_path / 'p')


def test_lengths_of_beginnings_are_uniform_and_leave_something_to_continue():
  words = [f'w{i}' for i in range(100)]
  lengths = collections.Counter(len(prompts.beginning(' '.join([f'd{i}', *words]), 10, 0).split()) for i in range(5_000))
  assert sorted(lengths) == list(range(1, 11))
  assert all(abs(count / 5_000 - 0.1) < 0.02 for count in lengths.values())  # 4.7 standard errors
  assert prompts.beginning('a b c d', 10, 0) in ('a', 'a b')
  assert prompts.beginning('漢字かな', 10, 0) in ('漢', '漢字')
  assert prompts.beginning(' word ', 10, 0) is None


def test_shares_of_files(tmp_path):
  files = [
    prompts.PromptFile(jsonl(tmp_path / f'{name}.jsonl', [{'prompt': f'{name}{i}'} for i in range(count)]), 8, 0)
    for name, count in (('a', 50), ('b', 9))
  ]
  taken = [row.text for row in prompts.read_prompts(files, [3, 1], 32)]
  assert [t for t in taken if t[0] == 'a'] == [f'a{i}' for i in range(24)] and [t for t in taken if t[0] == 'b'] == [
    f'b{i}' for i in range(8)
  ]
  assert all(abs(sum(t[0] == 'a' for t in taken[:n]) - 0.75 * n) < 1.01 for n in range(1, 33))
  assert len(list(prompts.read_prompts(files, None, None))) == 59 and len(list(prompts.read_prompts(files, None, 3))) == 3
  with pytest.raises(UserError, match=r'b\.jsonl: has 9 prompts, fewer than its share of synthesize\.max_prompts=40; lower'):
    list(prompts.read_prompts(files, [3, 1], 40))
  assert len(list(prompts.read_prompts(files, [3, 1], 36))) == 36  # the remedy


def test_splits_have_their_shares_and_depend_on_the_prompt_alone():
  split = prompts.split_of(0.1, 0.2)
  counts = collections.Counter(split(f'{i}') for i in range(20_000))
  assert counts['validation'] == pytest.approx(2_000, abs=200) and counts['unseen_prompts'] == pytest.approx(4_000, abs=260)
  assert {prompts.split_of(0, 0)(f'{i}') for i in range(99)} == {'train'}
  with pytest.raises(ConfigError, match='are more than all prompts; lower one of them'):
    prompts.split_of(0.6, 0.5)


def test_recorded_answers(tmp_path):
  path = tmp_path / 'r.jsonl.gz'
  rows = [{'prompt_id': 1, 'prompt': 'p', 'policy': 'a', 'run': 0, 'response': 'x', 'correct': True}, {'prompt': 'q', 'response': ''}]
  path.write_bytes(gzip.compress(''.join(json.dumps(row) + '\n' for row in rows).encode()))
  assert list(prompts.read_recorded(path, 'me')) == [('a', '1', 'p', 'x', 'r.jsonl.gz'), ('me', None, 'q', '', 'r.jsonl.gz')]


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ('{"prompt": "p"}', 'row 2: has no field response'),
    ('{"response": "p"}', 'row 2: has no field prompt'),
    ('{"prompt": "p", "response": 3}', 'row 2: field response must be a string or a list of messages'),
    ('{"prompt": "p", "response": "r", "policy": 3}', 'row 2: policy is 3'),
    ('{"prompt": "p", "response": "\\ud800"}', 'row 2: .*surrogates not allowed'),
    ('{"prompt": "p"', 'row 2: not JSON'),
    ('[]', 'row 2: must be a JSON object, not list'),
  ],
)
def test_rows_that_are_no_recorded_answers(tmp_path, row, message):
  path = tmp_path / 'r.jsonl'
  path.write_text('{"prompt": "p", "response": "r"}\n' + row)
  with pytest.raises(UserError, match=f'r.jsonl, {message}'):
    list(prompts.read_recorded(path, 'me'))


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'question': 'q'}, 'row 1: has neither a field prompt .* nor a field text .*; found: question'),
    ({'prompt': ' '}, 'row 1: field prompt is empty; remove the row'),
    ({'prompt': None}, 'row 1: field prompt must be a string'),
  ],
)
def test_rows_that_are_no_prompts(tmp_path, row, message):
  with pytest.raises(UserError, match=message):
    read(jsonl(tmp_path / 'p.jsonl', [row]))


def test_files_that_are_not_there(tmp_path):
  with pytest.raises(ConfigError, match=r'no file at .*none\.txt'):
    prompts.open_files(f'{tmp_path}/none.txt', 8, 0)
  with pytest.raises(UserError, match=r'none\.jsonl: no such file'):
    prompts.open_files(f'{tmp_path}/none.jsonl', 8, 0)
  with pytest.raises(UserError, match=r'p\.csv: unknown kind of file'):
    (tmp_path / 'p.csv').touch()
    prompts.open_files(f'{tmp_path}/p.csv', 8, 0)
