"""Evaluation prompts that occur in training files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from polar_jax.evaluate import contamination, sets
from polar_jax.evaluate.sets import Item
from polar_jax.types import UserError

LONG = 'What is the shortest way from the old harbor to the railway station on a rainy day?'


def items(*prompts):
  return [Item(str(i), prompt, ('a', 'b'), sets.pair()) for i, prompt in enumerate(prompts)]


def test_prompts_are_found_by_text_and_by_thirteen_words(tmp_path):
  rows = [
    {'prompt': 'nothing', 'n': 3},
    {
      'prompt': [{'role': 'user', 'content': 'Hello,  WORLD'}],
      'chosen': 'what is the shortest way from the old harbor to the railway station',
    },
    {'text': 'He asked: what is the shortest way, from the old harbor to the "railway" station - on foot?'},
  ]
  (tmp_path / 'train.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / 'book.txt').write_text('Once upon a time. ' + LONG)
  asked = items(LONG, 'hello world!', 'hello', 'What is the shortest way from the old', [{'role': 'user', 'content': LONG}], '...')
  found = contamination.find(asked, [tmp_path / 'train.jsonl', tmp_path / 'book.txt'])
  assert found == {0: 'train.jsonl, row 2', 1: 'train.jsonl, row 2', 4: 'train.jsonl, row 2'}
  assert contamination.find(asked[:1], [tmp_path / 'book.txt']) == {0: 'book.txt, row 1'}
  assert contamination.find(asked, []) == {}


def test_against_a_slow_search(tmp_path):
  rng = np.random.default_rng(0)
  draw = lambda n: ' '.join(rng.choice(['red', 'blue'], n))
  texts, asked = [draw(int(rng.integers(1, 200))) for _ in range(30)], items(*(draw(int(rng.integers(1, 18))) for _ in range(60)))
  (tmp_path / 'train.jsonl').write_text('\n'.join(json.dumps({'a': [text]}) for text in texts))

  def occurs(prompt):
    words = prompt.split()
    if len(words) < 13:
      return prompt in texts
    return any(f' {" ".join(words[i : i + 13])} ' in f' {text} ' for i in range(len(words) - 12) for text in texts)

  expected = [i for i, item in enumerate(asked) if occurs(item.prompt)]
  assert list(contamination.find(asked, [tmp_path / 'train.jsonl'])) == expected and 3 < len(expected) < 57


def test_bad_files_are_named(tmp_path):
  with pytest.raises(UserError, match=r'nothing\.jsonl: no such file'):
    contamination.find(items('a'), [tmp_path / 'nothing.jsonl'])
  (tmp_path / 'bad.jsonl').write_text('{"a": 1}\n{"a"')
  with pytest.raises(UserError, match=r'bad\.jsonl, row 2: .*fix it'):
    contamination.find(items('a'), [tmp_path / 'bad.jsonl'])
