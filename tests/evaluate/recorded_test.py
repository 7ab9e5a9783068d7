"""Recorded rewards: the keys of lines, and what a message names."""

from __future__ import annotations

import json

import pytest

from polar_jax.evaluate import recorded, sets
from polar_jax.evaluate.recorded import Recorded
from polar_jax.evaluate.sets import EvaluationSet, Item
from polar_jax.types import UserError


def read(folder, *lines):
  (folder / 'r.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return Recorded(folder / 'r.jsonl')


def items(*names):
  return [Item(name, 'p', ('a', 'b'), sets.pair()) for name in names]


def test_lines_are_kept_by_set_and_id(tmp_path):
  lines = [{'id': 7, 'rewards': [1]}, {'id': '7', 'set': 3, 'rewards': None}, {'id': '7', 'set': 'a', 'rewards': 'x', 'more': 1}]
  found = read(tmp_path, *lines)
  assert found.rewards == {(None, '7'): (1, [1]), ('3', '7'): (2, None), ('a', '7'): (3, 'x')} and found.path == tmp_path / 'r.jsonl'
  for line in ({'id': True, 'rewards': [1]}, {'id': 1.5, 'rewards': [1]}, {'id': 1}, {'rewards': [1]}, [1], {'id': None, 'rewards': [1]}):
    with pytest.raises(UserError, match=r'r\.jsonl, line 2: must be an object with `id`, a string or integer, and `rewards`'):
      read(tmp_path, {'id': 0, 'rewards': [1]}, line)
  (tmp_path / 'r.jsonl').write_text('{"id": 1, "rewards": [1]}\n{\n')
  with pytest.raises(UserError, match=r'r\.jsonl, line 2: not JSON.*; fix the file'):
    Recorded(tmp_path / 'r.jsonl')


def test_up_to_five_ids_are_named():
  assert recorded._named(list('abcde')) == "'a', 'b', 'c', 'd', 'e'" and recorded._named(list('abcdef')) == "'a', 'b', 'c', 'd', 'e', ..."
  assert recorded._named(['x' * 80]) == "'" + 'x' * 59


def test_with_items_left_out_some_must_have_rewards(tmp_path):
  one, two = EvaluationSet('mine', items('x', 'y')), EvaluationSet('other', items('z'))
  found = read(tmp_path, {'id': 'x', 'rewards': [1, 2]}, {'id': 'q', 'rewards': [1]})
  ((name, (kept, rewards)),) = found.of([one, two], 'skip').items()
  assert name == 'mine' and [item.id for item in kept.items] == ['x'] and rewards[0].tolist() == [1.0, 2.0]
  assert kept.skipped == (('y', 'r.jsonl has no rewards for it'),)
  with pytest.raises(UserError, match=r"2 of 2 ids are of no item of other \('x', 'q'\); remove them"):
    found.of([two], 'skip')
  with pytest.raises(UserError, match=r"has no rewards for 1 of 2 items of mine \('y'\)"):
    found.of([one, two])
