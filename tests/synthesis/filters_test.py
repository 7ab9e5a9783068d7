"""Prompts that occur twice, or in files of evaluation: against slow searches."""

from __future__ import annotations

import gzip
import importlib.util
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_jax.evaluate import contamination, sets
from polar_jax.evaluate.sets import Item
from polar_jax.synthesis import filters
from polar_jax.types import UserError

LONG = 'What is the shortest way from the old harbor to the railway station on a rainy day?'


def write(path, rows):
  path.write_text('\n'.join(map(json.dumps, rows)))
  return path


def test_equal_texts_are_duplicates_without_datasketch(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  texts = ['Hello, world!', 'other', 'hello WORLD', '...', '!', '...', 'Hello world again', 'hello-world', '']
  assert filters.near_duplicates(texts, None) == [2, 5, 7]
  assert filters.near_duplicates(iter([]), None) == []
  with pytest.raises(UserError, match=r'synthesize\.near_duplicates \(0: only equal ones\) needs datasketch; install it with'):
    filters.near_duplicates(texts, 0.5)


@pytest.mark.needs('datasketch')
def test_near_duplicates_against_sets_of_five_words():
  rng = np.random.default_rng(0)
  texts: list[list[str]] = []
  for i in range(120):
    if i % 3 == 0:
      texts.append([f'w{rng.integers(400)}' for _ in range(50)])
      continue
    changed = list(texts[int(rng.integers(len(texts)))])
    for _ in range(int(rng.integers(0, 6))):
      changed[int(rng.integers(len(changed)))] = f'x{rng.integers(400)}'
    texts.append(changed)
  five = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in texts]
  drop = filters.near_duplicates([' '.join(text) for text in texts], 0.5)
  kept = [i for i in range(len(texts)) if i not in drop]
  similarity = lambda i: max((len(five[i] & five[j]) / len(five[i] | five[j]) for j in kept if j < i), default=0.0)
  # The estimate of a similarity has a standard error of some .03.
  assert all(similarity(i) > 0.4 for i in drop) and all(similarity(i) < 0.6 for i in kept)
  assert 20 < len(drop) < 80 and sum(0.1 < similarity(i) < 0.4 for i in kept) > 3
  assert filters.near_duplicates(['a b c', 'A, b: c', 'a b d'], 0.5) == [1]  # fewer than five words


def test_prompts_are_found_by_text_and_by_thirteen_words(tmp_path):
  first = write(
    tmp_path / 'math.jsonl',
    [
      {'question': 'Nothing at all', 'n': 3},
      {'prompt': [{'role': 'user', 'content': 'Hello,  WORLD'}], 'answer': 'yes'},
      {'text': 'He asked: what is the shortest way, from the old harbor to the "railway" station - on foot?'},
    ],
  )
  second = tmp_path / 'more.jsonl.gz'
  second.write_bytes(gzip.compress(json.dumps({'q': [LONG, 'hello world', 'one more']}).encode()))
  prompts = [
    f'Tell me. {LONG}',
    'hello world!',
    'hello',
    'what is the shortest way from the old harbor to the railway',  # twelve words
    'One more',
    'on foot? hello world',
    '...',
    '',
  ]
  expected = {0: 'math.jsonl, row 3', 1: 'math.jsonl, row 2', 4: 'more.jsonl.gz, row 1'}
  assert filters.contaminated(prompts, [first, second], None) == expected
  assert filters.contaminated(prompts, [second, first], None) == dict.fromkeys([0, 1, 4], 'more.jsonl.gz, row 1')
  assert filters.contaminated(prompts, [], None) == {} == filters.contaminated([], [first], None)
  with pytest.raises(UserError, match=r'nothing\.jsonl: no such file'):
    filters.contaminated(prompts, [tmp_path / 'nothing.jsonl'], None)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2**40)), st.lists(st.integers(0, 2**40)), st.sampled_from([1, 2, 4096]))
def test_against_the_search_of_evaluation(tmp_path_factory, prompts, rows, at_once):
  """The relation is symmetric, so that the search for prompts in training files finds the same."""
  text = lambda seed: ' '.join(np.random.default_rng(seed % 50).choice(['red', 'blue'], seed % 31))
  prompts, rows = [text(seed) for seed in prompts], [text(seed) for seed in rows]
  file = write(tmp_path_factory.mktemp('files') / 'test.jsonl', [{'a': [row]} for row in rows])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(filters, '_AT_ONCE', at_once)
    found = filters.contaminated(prompts, [file], None)
  assert found == contamination.find([Item(str(i), prompt, ('a', 'b'), sets.pair()) for i, prompt in enumerate(prompts)], [file])


@pytest.mark.needs('datasketch')
def test_near_prompts_are_found(tmp_path):
  text = [f'w{i}' for i in range(40)]
  changed = [*text[:10], 'x', *text[11:21], 'x', *text[22:32], 'x', *text[33:]]  # no 13-gram stays
  file = write(tmp_path / 'test.jsonl', [{'a': 'other'}, {'a': ' '.join(text)}, {'a': ' '.join(changed)}])
  prompts = [' '.join(changed), 'w1 w2 w3 w4 w5 w6', ' '.join(reversed(text)), 'w1']
  assert filters.contaminated(prompts, [file], None) == {0: 'test.jsonl, row 3'}
  assert filters.contaminated(prompts, [file], near=0.3) == {0: 'test.jsonl, row 2'}
  assert filters.contaminated(prompts, [file], near=0.9) == {0: 'test.jsonl, row 3'}


def test_near_prompts_need_datasketch(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'synthesize\.exclude_near needs datasketch'):
    filters.contaminated(['a'], [], near=0.5)


CHINESE = '从旧港口到火车站，下雨天走哪条路最近？请说明你的理由，并画出一张地图。'  # noqa: RUF001


@pytest.mark.needs('datasketch')
def test_scripts_without_spaces(tmp_path):
  japanese = '雨の日に古い港から鉄道の駅まで歩くなら、どの道が一番近いですか。理由も教えてください。'
  changed = CHINESE.replace('火车', '汽车').replace('画出', '描绘')
  assert filters.near_duplicates([CHINESE, japanese, changed, CHINESE[::-1], f'{japanese}!'], 0.4) == [2, 4]
  assert filters.near_duplicates([CHINESE, changed], 0.9) == []
  file = write(tmp_path / 'test.jsonl', [{'q': '问：' + CHINESE[:20]}, {'q': f'「{japanese}」'}, {'q': '好的'}])  # noqa: RUF001
  prompts = [CHINESE, CHINESE[9:], japanese, CHINESE[22:], '好的', '好的吗']
  expected = {0: 'test.jsonl, row 1', 2: 'test.jsonl, row 2', 4: 'test.jsonl, row 3'}
  assert filters.contaminated(prompts, [file], None) == expected
  assert contamination.find([Item(str(i), prompt, ('a', 'b'), sets.pair()) for i, prompt in enumerate(prompts)], [file]) == expected
