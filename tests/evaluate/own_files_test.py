"""Rows of one answer each, which are grouped by prompt."""

from __future__ import annotations

import json

import pytest

from polar_jax.evaluate import own_files
from polar_jax.types import UserError


def write(folder, rows):
  (folder / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  return folder / 'rows.jsonl'


def answer(prompt, response, correct, **fields):
  return {'prompt': prompt, 'response': response, 'correct': correct, **fields}


def test_answers_to_a_prompt_are_one_item(tmp_path):
  rows = [
    answer('p', 'so 1,000', True, policy='a', source='s', reference='g'),
    answer('q', 'x', True),
    answer('p', 'no number', False, policy='b', source='s', reference='g'),
    answer('q', 'y', True),
    answer('p', '$1000', True, policy='a', source='s', reference='g'),
    answer('r', 'a 1', False, prompt_id='r1', answer='B'),
    answer('r', 'b 2', True, prompt_id='r2', answer=3),
    answer('r', 'c 3', True, prompt_id='r1'),
  ]
  (found,) = own_files.read(write(tmp_path, rows), 'n')
  assert found.skipped == (
    ('rows.jsonl, row 2', 'all 2 answers to its prompt are right'),
    ('rows.jsonl, row 7', 'all 1 answers to its prompt are right'),
  )
  first, second = found.items
  assert (first.id, first.candidates, first.correct, first.reference) == ('1', ('so 1,000', 'no number', '$1000'), (True, False, True), 'g')
  assert first.answers == ('1000', None, '1000') and first.facts['source'] == 's' and 'policy' not in first.facts
  assert {(c.better, c.worse) for c in first.comparisons} == {((0,), (1,)), ((2,), (1,))}
  assert not {'response', 'correct', 'answer', 'prompt_id'} & {*first.facts, *second.facts}
  assert (second.id, second.correct, second.answers) == ('r1', (False, True), ('B', '3'))


def test_rows_of_a_prompt_must_agree(tmp_path):
  rows = [answer('p', 'a', True, reference='g'), answer('p', 'b', False, reference='h'), answer('p', 'c', False, reference='g')]
  path = write(tmp_path, rows)
  with pytest.raises(UserError, match=r'example 2: reference is another one than in row 1, which has the same prompt'):
    own_files.read(path, 'n')
  (found,) = own_files.read(path, 'n', 'skip')
  assert found.items[0].candidates == ('a', 'c') and len(found.skipped) == 1
  with pytest.raises(UserError, match='no prompt has both right and wrong answers'):
    own_files.read(write(tmp_path, [answer('p', 'a', True)]), 'n')


def test_given_answers_of_a_list(tmp_path):
  row = {'prompt': 'p', 'candidates': ['is 1', 'is 2', 'c'], 'correct': [True, False, False]}
  read = lambda **fields: own_files.read(write(tmp_path, [row | fields]), 'n')[0].items[0].answers
  assert set(own_files.read(write(tmp_path, [row | {'answers': None, 'own': 3}]), 'n')[0].items[0].facts) == {'own', 'wrapper'}
  assert read() == ('1', '2', None) and read(answers=['A', None, 2.5]) == ('A', None, '2.5')


def test_messages_are_one_prompt_whatever_the_order_of_their_keys(tmp_path):
  rows = [answer([{'role': 'user', 'content': 'p'}], 'a', True), answer([{'content': 'p', 'role': 'user'}], 'b', False)]
  (item,) = own_files.read(write(tmp_path, rows), 'n')[0].items
  assert item.candidates == ('a', 'b') and item.correct == (True, False)


@pytest.mark.parametrize(('field', 'values'), [('category', ('x', 'y')), ('wrapper', ('sft', 'pretrain'))])
def test_rows_of_a_prompt_have_one_category_and_one_wrapper(tmp_path, field, values):
  rows = [answer('p', 'a', True, **{field: values[0]}), answer('p', 'b', False, **{field: values[1]})]
  with pytest.raises(UserError, match=f'example 2: {field} is another one than in row 1'):
    own_files.read(write(tmp_path, rows), 'n')


@pytest.mark.parametrize('judged', [{'ranks': [2, 1]}, {'correct': [False, True]}])
def test_two_candidates_are_enough_for_a_list(tmp_path, judged):
  (item,) = own_files.read(write(tmp_path, [{'prompt': 'p', 'candidates': ['a', 'b'], **judged}]), 'n')[0].items
  assert item.candidates == ('a', 'b') and item.comparisons == (((1,), (0,)),)


@pytest.mark.parametrize(
  ('splits', 'names'),
  [
    (('test', 'validation'), ['n:test']),
    (('train', 'validation', 'unseen_prompts', 'unseen_policies'), ['n:validation', 'n_unseen_prompts', 'n_unseen_policies']),
    (('test', 'unseen_policies'), ['n:test', 'n_unseen_policies']),
  ],
)
def test_every_held_out_split_of_a_data_set_is_a_set(tmp_path, splits, names):
  for split in splits:
    row = {'prompt': f'in {split}', 'reference': 'r', 'chosen': 'a', 'rejected': 'b', 'metadata': {'reference_policy': 'x'}}
    (tmp_path / f'{split}.jsonl').write_text(json.dumps(row))
  found = own_files.read(tmp_path, 'n')
  assert [one.name for one in found] == [name.split(':')[0] for name in names]
  assert [one.items[0].prompt for one in found] == [f'in {name.split(":")[-1].removeprefix("n_")}' for name in names]


def test_a_data_set_without_held_out_splits_is_refused(tmp_path):
  (tmp_path / 'train.jsonl').write_text(json.dumps({'prompt': 'p', 'reference': 'r', 'chosen': 'a', 'rejected': 'b'}))
  with pytest.raises(UserError, match=r"no split 'validation': looked for .* found: train\.jsonl"):
    own_files.read(tmp_path, 'n')
