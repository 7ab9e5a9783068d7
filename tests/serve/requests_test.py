"""Bodies and the native request, as pure functions."""

from __future__ import annotations

import json

import pytest

from polar_jax.serve import requests
from polar_jax.serve.requests import Limits, RequestError, Result

LIMITS = Limits(sequences=10, characters=50)
GOOD = {'prompt': 'p', 'reference': 'r', 'outputs': ['a', 'b']}


def parse(body, use_reference=True):
  return requests.parse_score(body, LIMITS, use_reference, 'tiny', True)


@pytest.mark.parametrize(
  ('body', 'reason'),
  [
    (b'', 'not JSON'),
    (b'{"a": 1', 'not JSON'),
    (b'{"a": NaN}', 'NaN is no number'),
    (b'[-Infinity]', 'Infinity is no number'),
    (b'{"a": 1, "a": 2}', "the key 'a' occurs 2 times"),
    (b'\xff\xfe{\x00', 'not UTF-8'),
    (b'[' * 100_000, 'nested too deeply'),
    (b'[' * 100 + b']' * 100, 'nested more than 64'),
    (b'1' * 10_000, 'not JSON'),
    (b'{} {}', 'not JSON'),
  ],
)
def test_bodies_that_are_not_json(body, reason):
  with pytest.raises(RequestError, match=reason) as error:
    requests.parse_json(body)
  assert error.value.status == 400


def test_a_repeated_key_among_many_takes_linear_time():
  body = '{' + ','.join(f'"k{i}":0' for i in range(200_000)) + ',"k199999":0}'
  with pytest.raises(RequestError, match='k199999'):
    requests.parse_json(body.encode())


@pytest.mark.parametrize(
  ('change', 'param'),
  [
    ({'prompt': None}, 'prompt'),
    ({'prompt': 3}, 'prompt'),
    ({'prompt': []}, 'prompt'),
    ({'prompt': ['x']}, 'prompt[0]'),
    ({'prompt': [{'role': 'user'}]}, 'prompt[0].content'),
    ({'prompt': [{'role': 'user', 'content': None}]}, 'prompt[0].content'),
    ({'prompt': [{'role': 'user', 'content': 'x', 'name': 'y'}]}, 'prompt[0].name'),
    ({'prompt': [{'role': 1, 'content': 'x'}]}, 'prompt[0].role'),
    ({'reference': {}}, 'reference'),
    ({'outputs': 'ab'}, 'outputs'),
    ({'outputs': {'0': 'a'}}, 'outputs'),
    ({'outputs': ['a', 1.5]}, 'outputs[1]'),
    ({'outputs': ['a', 'x' * 51]}, 'outputs[1]'),
    ({'outputs': [[{'content': 'x' * 26}, {'content': 'x' * 26}]]}, 'outputs[0]'),
    ({'outputs': ['\udc00 \ud800']}, 'outputs[0]'),
    ({'outputs': ['a'] * 11}, 'outputs'),
    ({'wrapper': 'chat'}, 'wrapper'),
    ({'wrapper': ['sft']}, 'wrapper'),
    ({'wrapper': None}, 'wrapper'),
    ({'output': 'a'}, 'output'),
    ({'file': '/etc/passwd'}, 'file'),
  ],
)
def test_refusals_name_the_field(change, param):
  for body, name in (({**GOOD, **change}, param), ([GOOD, {**GOOD, **change}], f'[1].{param}')):
    with pytest.raises(RequestError) as error:
      parse(body)
    assert error.value.param == name and name.rpartition('.')[2] in str(error.value)


@pytest.mark.parametrize('name', ['prompt', 'reference', 'outputs'])
def test_missing_fields(name):
  with pytest.raises(RequestError, match=f'{name} is missing'):
    parse({key: value for key, value in GOOD.items() if key != name})
  if name == 'reference':
    assert parse({'prompt': 'p', 'outputs': ['a']}, use_reference=False).sources[0].reference == ''


@pytest.mark.parametrize('body', [None, 'x', 5, True, [5], [[GOOD]]])
def test_other_types(body):
  with pytest.raises(RequestError, match='must be an object'):
    parse(body)


def test_limits_count_all_groups():
  with pytest.raises(RequestError, match='12 items') as error:
    parse([GOOD] * 6)
  assert error.value.status == 413


def test_replies():
  results = [Result(0.1, 5, False), Result(-2.0, 6, True), Result(1.0, 7, False), Result(3.0, 8, False)]
  first = {'rewards': [0.1, -2.0], 'tokens': [5, 6], 'truncated': [False, True], 'exact': True, 'model': 'tiny'}
  assert parse(GOOD).render(results[:2]) == first
  assert parse([]).render([]) == []
  replies = parse([GOOD, {**GOOD, 'outputs': []}, GOOD]).render(results)
  assert replies[0] == first and replies[1]['rewards'] == [] and replies[2]['rewards'] == [1.0, 3.0]
  assert json.loads(json.dumps(replies)) == replies
