from __future__ import annotations

import sqlite3

import pytest

from polar_jax.synthesis.samples import Failure, Request, Sample
from polar_jax.synthesis.store import Store, StoreError

TRAIN = lambda identifier: 'train'


@pytest.fixture
def store(tmp_path):
  opened = Store(tmp_path / 'data' / 's.sqlite', {'seed': 1})
  opened.add_prompts([('1', 'one', 'prefix', 'f'), (None, 'two', 'instruction', 'g')], TRAIN)
  for name in ('a', 'b'):
    opened.add_policy(name, {'kind': 'openai', 'temperature': 1.0})
  yield opened
  opened.close()


def finish(store, policy, shard, texts, *, sample=0, run=0, counts=None):
  requests = [Request(prompt, sample, 5) for prompt in store.prompts()]
  results = [Failure(text[1:]) if text.startswith('!') else Sample(text, text.endswith('.'), 3) for text in texts]
  store.finish_unit(policy, shard, requests, results, run, counts or {})


def test_prompts_have_ids_of_their_own(store):
  counts = store.add_prompts([('1', 'three', 'prefix', 'g'), ('9', 'one', 'prefix', 'g'), ('1', 'four', 'prefix', 'g')], TRAIN)
  assert counts == {'read': 3, 'added': 2}  # a text that is there is the same prompt
  ids = [prompt.id for prompt in store.prompts()]
  assert ids[0] == '1' and ids[2] == 'g:1' and len(set(ids)) == 4
  assert [prompt.text for prompt in store.prompts(1, 3)] == ['two', 'three'] and [prompt.index for prompt in store.all_prompts()] == [
    0,
    1,
    2,
    3,
  ]
  assert store.count_prompts('kind') == {'instruction': 1, 'prefix': 3}
  store.drop_prompts([0, 3], 'near duplicate')
  assert [prompt.text for prompt in store.all_prompts()] == ['two', 'three']
  assert store.count_prompts('dropped') == {'near duplicate': 2} and store.count_prompts('source') == {'g': 2} and store.num_prompts() == 4


def test_a_unit_is_there_whole_or_not_at_all(store, tmp_path):
  finish(store, 'a', 3, ['x.', '!too long'], counts={'requests': 2})
  with pytest.raises(StoreError, match='UNIQUE'):
    finish(store, 'a', 4, ['new', 'x'], counts={'requests': 4})  # the sample of prompt 0 is there already
  with pytest.raises(ZeroDivisionError), store.transaction():
    store.set_fact('x', 1)
    raise ZeroDivisionError
  store.close()
  again = Store(tmp_path / 'data' / 's.sqlite', {'seed': 1})
  assert again.done_units('a') == {3} and again.done_units('b') == set() and again.fact('x') is None
  assert again.samples(0, 2, 'train') == [(0, 'a', 0, 'x.', True)]
  assert again.failure_counts() == {'a': 1} and again.sample_counts() == {'a': 1} and again.costs() == {'a': {'requests': 2}}
  again.close()


def test_costs_are_those_of_all_runs(store):
  assert (store.start_run(), store.start_run()) == (0, 1)
  finish(store, 'a', 0, ['x', 'y'], counts={'requests': 2, 'tokens': 6})
  finish(store, 'a', 1, ['x', 'y'], sample=1, counts={'requests': 5, 'tokens': 12})  # so far, in the same run
  store.count('a', 1, {'requests': 10})
  store.count('a', 1, {'requests': 9})  # of a thread that looked earlier and stored later
  assert store.costs() == {'a': {'requests': 15, 'tokens': 12}}


def test_samples_by_split_without_dropped_prompts(store):
  store.add_prompts([('3', 'three', 'prefix', 'f')], lambda identifier: 'validation')
  finish(store, 'b', 0, ['x', 'y', '\ud800z'])
  finish(store, 'a', 0, ['u', 'v', 'w'])
  assert [(row.prompt, row.policy, row.text) for row in store.samples(0, 9, 'train')] == [
    (0, 'a', 'u'),
    (0, 'b', 'x'),
    (1, 'a', 'v'),
    (1, 'b', 'y'),
  ]
  assert [(row.policy, row.text) for row in store.samples(2, 9, 'validation')] == [('a', 'w'), ('b', '?z')]
  store.drop_prompts([0], 'x')
  assert [row.prompt for row in store.samples(0, 9, 'train')] == [1, 1] and store.sample_counts() == {'a': 2, 'b': 2}


def test_recorded_answers_are_numbered_in_their_order(store):
  rows = [('r', '1', 'one', 'x', 'f'), ('s', '1', 'one', 'y', 'f'), ('r', '1', 'one', 'z', 'f'), ('r', '5', 'new', 'w', 'f')]
  assert not store.has_pairs([['a'], ['b']])
  assert store.add_recorded(rows, 'instruction', TRAIN) == {'r': 3, 's': 1}
  assert store.samples(0, 9, 'train') == [(0, 'r', 0, 'x', True), (0, 'r', 1, 'z', True), (0, 's', 0, 'y', True), (2, 'r', 0, 'w', True)]
  assert store.has_pairs([['s'], ['r']]) and store.has_pairs([['r', 's']]) and not store.has_pairs([['s'], ['a']])
  store.drop_prompts([0], 'x')
  assert not store.has_pairs([['r', 's']])


def test_other_settings_are_refused_by_name(store, tmp_path):
  store.add_policy('a', {'kind': 'openai', 'temperature': 1.0})
  with pytest.raises(StoreError, match=r"samples of policy 'a' with other settings \(temperature was 1.0 and is 2.0\); give the changed"):
    store.add_policy('a', {'kind': 'openai', 'temperature': 2.0})
  store.close()
  with pytest.raises(StoreError, match=r'another seed \(1, now 2\); continue with the old setting, name another workdir, or remove'):
    Store(tmp_path / 'data' / 's.sqlite', {'seed': 2})


def test_files_that_cannot_be_used(store, tmp_path, monkeypatch):
  monkeypatch.setattr('polar_jax.synthesis.store._PATIENCE', 0.1)
  with pytest.raises(StoreError, match='is in use by another process; wait for it, or stop it'):
    Store(tmp_path / 'data' / 's.sqlite', {'seed': 1})
  (tmp_path / 'other').write_bytes(b'x' * 5_000)
  with pytest.raises(StoreError, match=r'not a readable file of samples .*; remove it to sample everything again'):
    Store(tmp_path / 'other', {})
  connection = sqlite3.connect(tmp_path / 'third')
  connection.execute('CREATE TABLE facts (other INTEGER)')
  connection.close()
  with pytest.raises(StoreError, match='no such column'):
    Store(tmp_path / 'third', {})
