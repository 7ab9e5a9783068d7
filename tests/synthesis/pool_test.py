from __future__ import annotations

import json

import pytest

from polar_jax.config import ConfigError
from polar_jax.synthesis.pool import PolicySpec, read_pool

SERVER = {'name': 'a', 'kind': 'openai', 'base_url': 'http://localhost:1/v1', 'model': 'm'}


def write(tmp_path, value, name='pool.json'):
  path = tmp_path / name
  path.write_text(json.dumps(value), encoding='utf-8')
  return path


def entries(*changes):
  return [{**SERVER, 'name': f'p{i}', **change} for i, change in enumerate(changes)]


def test_all_settings_and_their_defaults(tmp_path):
  full = {
    **SERVER,
    'weight': 2,
    'temperature': 0.5,
    'top_p': 1,
    'top_k': 50,
    'max_tokens': 7,
    'system': 'Be brief.',
    'api_key_env': 'KEY',
    'family': 'f',
    'size': 0.5,
    'date': '2025-01',
    'held_out': True,
    'near_to': 'b',
    'prompts': 'any',
  }
  other = {'name': 'b', 'kind': 'ngram', 'path': ['text.txt', '/abs.txt'], 'order': 2, 'window': [0, 0.5], 'held_out': True}
  specs = read_pool(write(tmp_path, {'policies': [full, other], 'defaults': {'top_p': 0.8, 'max_tokens': 9}}))
  settings = {'base_url': ['http://localhost:1/v1'], 'model': 'm', 'system': 'Be brief.', 'api_key_env': 'KEY', 'chat': True}
  assert specs[0] == PolicySpec('a', 'openai', 2.0, 0.5, 1.0, 50, 7, 'f', 0.5, '2025-01', True, ('b',), 'any', settings)
  settings = {'path': [str(tmp_path / 'text.txt'), '/abs.txt'], 'order': 2, 'window': [0.0, 0.5]}
  assert specs[1] == PolicySpec('b', 'ngram', 1.0, 1.0, 0.8, None, 9, held_out=True, settings=settings)


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    ('pool.yaml', 'policies:\n- {name: a, kind: ngram, path: t.txt, date: 2025-01-02}\n'),
    ('pool.py', "def get_pool():\n  return [{'name': 'a', 'kind': 'ngram', 'path': 't.txt', 'date': '2025-01-02'}]\n"),
  ],
)
def test_other_kinds_of_files(tmp_path, name, text):
  (tmp_path / name).write_text(text)
  assert read_pool(tmp_path / name) == [PolicySpec('a', 'ngram', date='2025-01-02', settings={'path': [str(tmp_path / 't.txt')]})]


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ({'policies': 3}, 'a pool is a list of policies'),
    ([], 'the pool has no policies'),
    ({'policies': [SERVER], 'policy': 1}, 'unknown key policy'),
    ({'policies': [SERVER], 'defaults': {'path': 1}}, 'defaults may hold .*, not path'),
    ([3], 'policy 1 is 3; it must be an object'),
    ([{'kind': 'openai'}], 'policy 1 needs a name'),
    (entries({'name': 'two\nlines'}), 'policy 1 needs a name of printable'),
    (entries({'kind': 'opnai'}), "policy 'p0': unknown kind 'opnai'; known: checkpoint, openai"),
    (entries({'path': 'x'}), 'unknown setting path; a policy of kind openai has'),
    (entries({'model': ''}), 'lacks model, which a policy of kind openai needs'),
    (entries({'base_url': 'localhost:8000'}), 'base_url is .*must be an address'),
    (entries({}, {'name': 'p0'}), "two policies have the name 'p0'; give each its own"),
    (entries({'near_to': ['q']}), "near_to names 'q', which is not another policy"),
    (entries({'near_to': 'p0'}), "near_to names 'p0', which is not another policy"),
    (entries({'near_to': 'p1'}, {'held_out': True}), 'only one of them is held out; hold out both or none'),
    (entries({'weight': 0}), 'weight is 0; it must be a number above 0'),
    (entries({'temperature': True}), 'temperature is True; it must be a number above 0'),
    (entries({'top_p': 1.5}), 'top_p is 1.5; it must be a number above 0 and at most 1'),
    (entries({'max_tokens': 2.5}), 'max_tokens is 2.5; it must be a whole number of at least 1'),
    (entries({'held_out': 'yes'}), "held_out is 'yes'; it must be true or false"),
    (entries({'date': 'May'}), "date is 'May'; it must be YYYY"),
    (entries({'prompts': 'all'}), "prompts is 'all'; it must be one of: prefix, instruction, any"),
    (entries({'chat': False, 'system': 's'}), 'only conversations have one'),
    ([{'name': 'n', 'kind': 'ngram', 'path': 't', 'window': [0.5, 0.5]}], 'window is'),
    ([{'name': 'n', 'kind': 'ngram', 'path': 't', 'order': 9}], 'order is 9; it must be at most 5'),
    ([{'name': 'n', 'kind': 'checkpoint', 'path': 't', 'bits': 1}], 'bits is 1; it must be from 2 to 8'),
    ([{'name': 'n', 'kind': 'recorded', 'path': 't', 'temperature': 1}], 'unknown setting temperature'),
  ],
)
def test_what_is_wrong_is_named(tmp_path, value, message):
  with pytest.raises(ConfigError, match=message) as caught:
    read_pool(write(tmp_path, value))
  assert str(caught.value).startswith(str(tmp_path / 'pool.json'))


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('pool.json', b'{"policies": [}', 'not JSON'),
    ('pool.json', '{"policies": []}'.encode('utf-16'), 'not UTF-8'),
    ('pool.json', b'{"policies": [], "policies": []}', "the key 'policies' occurs 2 times"),
    ('pool.yaml', b'a: [', 'not YAML'),
    ('pool.py', b'x = 1', 'has no function get_pool'),
    ('pool.py', b'def get_pool():\n  return 1 / 0', 'get_pool failed .ZeroDivisionError'),
    ('pool.toml', b'', 'unknown kind of file; a pool is a .json, .yaml or .py file'),
  ],
)
def test_files_that_are_no_pool(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ConfigError, match=message):
    read_pool(tmp_path / name)
  with pytest.raises(ConfigError, match='no file at'):
    read_pool(tmp_path / 'other.json')


def test_policies_answer_their_own_kind_of_prompts_or_what_there_is():
  both, settings = ['instruction', 'prefix'], {'chat': True}
  server, chat, base = PolicySpec('a', 'openai'), PolicySpec('b', 'openai', settings=settings), PolicySpec('c', 'checkpoint')
  assert [server.accepts(kind, both) for kind in both] == [True, True]
  assert [chat.accepts(kind, both) for kind in both] == [True, False]
  assert [base.accepts(kind, both) for kind in both] == [False, True]
  assert chat.accepts('prefix', ['prefix']) and base.accepts('instruction', ['instruction'])
  assert not PolicySpec('d', 'openai', prompts='prefix').accepts('instruction', ['instruction'])


def test_the_address_of_a_server_does_not_change_what_its_policy_is(tmp_path):
  first, moved, warmer = read_pool(write(tmp_path, entries({}, {'base_url': 'http://other:2', 'api_key_env': 'K'}, {'temperature': 2})))
  assert first.identity() == moved.identity() != warmer.identity()
