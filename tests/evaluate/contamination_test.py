"""Evaluation prompts that occur in training files."""

from __future__ import annotations

import importlib.util
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


@pytest.mark.needs('datasketch')
def test_near_duplicates_against_sets_of_five_words(tmp_path):
  rng = np.random.default_rng(0)
  words = [f'w{i}' for i in range(300)]
  asked, texts = [], []
  for i in range(40):
    text = [str(w) for w in rng.choice(words, 60)]
    changed = list(text)
    for place in range(11, 60, 12):  # no 13-gram stays
      changed[place] = 'other'
    if i % 4 == 0:
      changed[3::12] = ['more'] * 5
    asked.append(' '.join(text))
    texts.append(' '.join([*changed, *(['end of it'] * (i // 2))]))
  (tmp_path / 'train.jsonl').write_text('\n'.join(json.dumps({'a': text}) for text in texts))
  five = lambda text: {tuple(text.split()[i : i + 5]) for i in range(len(text.split()) - 4)}
  similarity = [len(five(a) & five(b)) / len(five(a) | five(b)) for a, b in zip(asked, texts, strict=True)]
  prompts = items(*asked, 'too short')
  assert contamination.find(prompts, [tmp_path / 'train.jsonl']) == {}
  found = contamination.find(prompts, [tmp_path / 'train.jsonl'], near=0.35)
  # The estimate of a similarity has a standard error of some .03.
  certain = [i for i, s in enumerate(similarity) if abs(s - 0.35) > 0.1]
  assert [i for i in certain if similarity[i] > 0.35] == [i for i in certain if i in found]
  assert 5 < len(found) < 35 and all(place == f'train.jsonl, row {i + 1}' for i, place in found.items())
  assert set(contamination.find(items(*texts), [tmp_path / 'train.jsonl'], near=1.0)) == set(range(40))


def test_near_duplicates_need_datasketch(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"needs datasketch; install it with: pip install 'polar_jax\[contamination\]'"):
    contamination.find(items('a'), [], near=0.5)


@pytest.mark.needs('datasketch')
def test_near_duplicates_have_at_least_five_words_and_256_hashes(tmp_path, monkeypatch):
  import datasketch

  made, minhash = [], datasketch.MinHash
  monkeypatch.setattr(datasketch, 'MinHash', lambda **settings: made.append(settings) or minhash(**settings))
  (tmp_path / 'train.txt').write_text('a b c d e f')  # the two runs of five words, of which the first prompt has one
  assert contamination.find(items('a b c d e', 'a b c d'), [tmp_path / 'train.txt'], near=0.35) == {0: 'train.txt, row 1'}
  assert made and all(settings == {'num_perm': 256, 'seed': 1} for settings in made)
