from __future__ import annotations

import asyncio
import gc
import json
import logging
import multiprocessing
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time

import pytest
from optional import httpx  # noqa: F401
from serve.reward_stand_in import reply_to, reward_of, reward_server, score
from synthesis.server_stand_in import cut_off, error, free_port, hang, hang_up, reset, send, trickle

from polar_jax.serve import RewardClient, RewardRequestError, sending
from polar_jax.types import UserError

pytestmark = [pytest.mark.needs('httpx'), pytest.mark.long]

ROWS = [(f'p{i % 3}', f'r{i % 3}', f'o{i}') for i in range(20)]
EXPECTED = [reward_of(*row) for row in ROWS]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
  monkeypatch.setattr(sending, '_FIRST_PAUSE', 0.01)
  monkeypatch.setattr(sending, '_LONGEST_PAUSE', 0.02)


@pytest.fixture(autouse=True)
def no_threads_left():
  before = set(threading.enumerate())
  yield
  gc.collect()
  for thread in set(threading.enumerate()) - before:
    if thread.name == 'polar_jax reward client':
      thread.join(5)
      assert not thread.is_alive()


def columns(rows):
  return tuple(map(list, zip(*rows, strict=True)))


def texts_of(body):
  return [(group['prompt'], group['reference'], output) for group in body for output in group['outputs']]


def test_rewards_of_one_prompt_come_in_order(monkeypatch):
  for name in ('http_proxy', 'HTTP_PROXY', 'ALL_PROXY'):  # no proxy is used
    monkeypatch.setenv(name, 'http://127.0.0.1:1')
  with reward_server() as server, RewardClient(server.url) as client:
    assert client.score('p', [{'role': 'assistant', 'content': 'r'}], ['b', 'a']) == [reward_of('p', 'r', 'b'), reward_of('p', 'r', 'a')]
    assert asyncio.run(client.ascore('p', 'r', ['a'])) == [reward_of('p', 'r', 'a')]
    assert client.score('p', 'r', []) == [] and client.score_rows([], [], []) == []
  path, headers, body = server.requests[0]
  assert path == '/score' and len(server.requests) == 2
  assert body == [{'prompt': 'p', 'reference': [{'role': 'assistant', 'content': 'r'}], 'outputs': ['b', 'a'], 'wrapper': 'sft'}]
  assert 0 < float(headers['X-Request-Timeout']) <= 60 and len(headers['X-Request-Id']) == 32 and 'Authorization' not in headers


def test_a_large_call_is_cut_and_keeps_its_order():
  with reward_server() as server, RewardClient(server.url, batch=4, wrapper='pretrain') as client:
    assert client.score_rows(*columns(ROWS)) == [reward_of(*row, 'pretrain') for row in ROWS]
    assert client.score_rows(*columns(ROWS), wrapper='sft') == EXPECTED
  assert sorted(len(texts_of(body)) for body in server.bodies()) == [4] * 10
  assert sorted(text for body in server.bodies()[:5] for text in texts_of(body)) == sorted(ROWS)
  # Rows with the same prompt and reference travel together: three groups, and two more where one is cut.
  assert sum(len(body) for body in server.bodies()[:5]) <= 8


def test_equal_rows_are_sent_once_but_messages_are_not_strings():
  messages = [{'role': 'user', 'content': 'x'}]
  with reward_server() as server, RewardClient(server.url) as client:
    rewards = client.score_rows(['p', 'p', 'p', 'p'], ['r'] * 4, ['a', json.dumps(messages), 'a', messages])
  assert rewards == [
    reward_of('p', 'r', 'a'),
    reward_of('p', 'r', json.dumps(messages)),
    reward_of('p', 'r', 'a'),
    reward_of('p', 'r', 'x'),
  ]
  assert server.bodies()[0][0]['outputs'] == ['a', json.dumps(messages), messages]


def test_requests_in_flight_are_bounded_over_threads_and_event_loops():
  with reward_server(act=score(seconds=0.02)) as server, RewardClient(server.url, batch=2, max_in_flight=3) as client:
    found = [None] * 4

    def call(i):
      found[i] = client.score_rows(*columns(ROWS)) if i % 2 else asyncio.run(client.ascore_rows(*columns(ROWS)))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  assert found == [EXPECTED] * 4
  assert server.most == 3 and server.connections == 3  # which stay open


@pytest.mark.parametrize(
  'failure',
  [
    error(503, 'draining'),
    error(500, 'x'),
    error(429, 'full'),
    error(408, 'slow'),
    hang_up,
    reset,
    cut_off_reply := cut_off,
    hang,
    trickle,
  ],
  ids=['503', '500', '429', '408', 'closed', 'reset', 'cut', 'silent', 'trickle'],
)
def test_what_may_pass_is_tried_again(failure, caplog):
  if failure is cut_off:  # which answers a request of another kind
    failure = lambda handler, body: cut_off(handler, {'seed': 1, 'prompt': 'p', 'model': 'm'})
  with reward_server([failure]) as server, RewardClient(server.url, timeout=0.3) as client, caplog.at_level(logging.WARNING):
    assert client.score('secret prompt', 'r', ['a']) == [reward_of('secret prompt', 'r', 'a')]
  assert len(server.requests) == 2
  assert server.requests[0][1]['X-Request-Id'] == server.requests[1][1]['X-Request-Id']
  assert 'trying again' in caplog.text and 'secret' not in caplog.text


@pytest.mark.parametrize('status', [400, 401, 403, 404, 413, 422, 302])
def test_what_cannot_pass_is_not_tried_again(status):
  with (
    reward_server([error(status, 'outputs[0] must be text')]) as server,
    RewardClient(server.url) as client,
    pytest.raises(RewardRequestError, match=rf'/score: refuses the request with status {status}: outputs\[0\] must be text') as caught,
  ):
    client.score('p', 'r', ['a'])
  assert len(server.requests) == 1 and caught.value.status == status
  assert server.requests[0][1]['X-Request-Id'] in str(caught.value)
  copy = pickle.loads(pickle.dumps(caught.value))
  assert str(copy) == str(caught.value) and copy.status == status


@pytest.mark.parametrize(
  ('reply', 'expected'),
  [
    ({'rewards': [1.0]}, 'not a list of 1 results'),
    ([], 'not a list of 1 results'),
    ([{'rewards': [1.0]}], 'result 0 of the reply has 1 rewards for 2 outputs'),
    ([{'error': 'x'}], 'no rewards for 2 outputs'),
    ([{'rewards': [1.0, True]}], 'not a finite number'),
    ([{'rewards': [1.0, None]}], 'not a finite number'),
    ([{'rewards': [1.0, float('nan')]}], 'not a finite number'),
    ([{'rewards': [1.0, 10**400]}], 'not a finite number'),
  ],
)
def test_a_reply_of_another_form_is_an_error(reply, expected):
  with reward_server([send(reply)]) as server, RewardClient(server.url) as client, pytest.raises(RewardRequestError, match=expected):
    client.score('p', 'r', ['a', 'b'])
  assert len(server.requests) == 1


def test_text_that_is_not_json_is_an_error():
  with (
    reward_server([send([], raw=b'<html>')]) as server,
    RewardClient(server.url) as client,
    pytest.raises(RewardRequestError, match='check that the server is one of polar_jax'),
  ):
    client.score('p', 'r', ['a'])


def test_retry_after_is_honored():
  with reward_server([error(429, 'full', Retry_After='0.3')]) as server, RewardClient(server.url) as client:
    started = time.monotonic()
    client.score('p', 'r', ['a'])
    assert time.monotonic() - started >= 0.3
  with (
    reward_server(act=error(503, 'draining', Retry_After='3600')) as server,
    RewardClient(server.url, deadline=100) as client,
    pytest.raises(RewardRequestError, match=r'after 1 tries in 0 s: status 503: draining') as caught,
  ):
    client.score('p', 'r', ['a'])
  assert caught.value.status == 503


def test_retry_after_can_be_a_date():
  class Reply:
    def __init__(self, value):
      self.headers = {'Retry-After': value}

  assert 3e9 > sending._retry_after(Reply('Wed, 21 Oct 2065 07:28:00 GMT')) > 1e8
  for value in ('', 'soon', 'nan', 'inf', '-3', 'Wed, 21 Oct 2015 07:28:00 GMT', 'Wed, 21 Oct 2065 07:28:00'):
    assert sending._retry_after(Reply(value)) == 0


def test_the_deadline_ends_the_tries():
  client = RewardClient(f'127.0.0.1:{free_port()}', deadline=0.3)
  with client, pytest.raises(RewardRequestError, match=r'no rewards after \d+ tries in 0 s: .*raise `deadline` \(0.3 s\)') as caught:
    client.score('p', 'r', ['a'])
  assert caught.value.status is None
  with (
    reward_server(act=hang) as server,
    RewardClient(server.url, deadline=0.3, max_in_flight=1, batch=1) as client,
    pytest.raises(RewardRequestError, match=r'no reply within 0\.3 s|waited 0\.3 s for others'),
  ):
    client.score('p', 'r', ['a', 'b'])


def test_other_addresses_take_over_and_share_the_load():
  with (
    reward_server() as first,
    reward_server() as second,
    RewardClient(f'127.0.0.1:{free_port()}, {first.url},{second.url}/', batch=1) as client,
  ):
    assert client.score_rows(*columns(ROWS)) == EXPECTED
  assert min(len(first.requests), len(second.requests)) >= 5 and len(first.requests) + len(second.requests) == 20


def test_a_busy_address_is_left_alone_while_another_one_works():
  with (
    reward_server(act=error(429, 'full', Retry_After='30')) as busy,
    reward_server() as free,
    RewardClient([busy.url, free.url], batch=1) as client,
  ):
    assert client.score_rows(*columns(ROWS)) == EXPECTED
    assert client.score_rows(*columns(ROWS)) == EXPECTED
  assert len(free.requests) == 40 and len(busy.requests) <= 4


def test_the_token_comes_from_the_environment(monkeypatch):
  monkeypatch.setenv('OTHER_TOKEN', 'abc')
  with reward_server([score(), error(401, 'wrong token')]) as server, RewardClient(server.url, token_env='OTHER_TOKEN') as client:
    client.score('p', 'r', ['a'])
    with pytest.raises(RewardRequestError, match='environment variable OTHER_TOKEN') as caught:
      client.score('p', 'r', ['a'])
  assert server.requests[0][1]['Authorization'] == 'Bearer abc'
  assert 'abc' not in str(caught.value).replace(server.requests[1][1]['X-Request-Id'], '')


def test_a_token_that_no_header_can_carry_is_refused(monkeypatch):
  monkeypatch.setenv('POLAR_SERVER_TOKEN', 'gehéim')
  with RewardClient('h:1') as client, pytest.raises(UserError, match='POLAR_SERVER_TOKEN must be of printable'):
    client.score('p', 'r', ['a'])


@pytest.mark.parametrize(
  ('settings', 'expected'),
  [
    ({'address': ''}, 'HOST:PORT'),
    ({'address': []}, 'empty'),
    ({'address': 'ftp://x'}, 'HOST:PORT'),
    ({'wrapper': 'rl'}, 'wrapper'),
    ({'batch': 0}, 'batch is 0'),
    ({'max_in_flight': 0}, 'max_in_flight'),
    ({'gather': -1}, 'gather'),
    ({'timeout': 0}, 'timeout'),
    ({'deadline': float('inf')}, 'deadline'),
  ],
)
def test_settings_are_checked(settings, expected):
  with pytest.raises(UserError, match=expected):
    RewardClient(**{'address': 'h:1', **settings})


@pytest.mark.parametrize(
  ('call', 'expected'),
  [
    (lambda c: c.score(None, 'r', ['a']), 'prompt must be a string or a list of messages, not NoneType'),
    (lambda c: c.score('p', [], ['a']), 'reference must be .* not an empty list'),
    (lambda c: c.score('p', 'r', 'a'), 'outputs is a string'),
    (lambda c: c.score('p', 'r', ['a', 1]), r'outputs\[1\] must be'),
    (lambda c: c.score('p', 'r', [[{'role': 'user'}]]), r'outputs\[0\]\[0\] must be a message'),
    (lambda c: c.score_one('p', 'r', None), r'outputs\[0\] must be'),
    (lambda c: c.score_rows(['p'], ['r', 'r'], ['a']), '1 prompts, 2 references and 1 outputs'),
    (lambda c: c.score_rows('p', ['r'], ['a']), 'prompts is a string'),
    (lambda c: c.score_rows(['p', 'p'], ['r', None], ['a', 'a']), r'references\[1\] must be'),
  ],
)
def test_texts_are_checked_before_anything_is_sent(call, expected):
  with RewardClient('127.0.0.1:1') as client, pytest.raises(UserError, match=expected):
    call(client)


def test_rows_that_come_one_by_one_share_requests():
  async def call(client):
    return await asyncio.wait_for(asyncio.gather(*(client.ascore_one(*row) for row in ROWS)), 20)

  with reward_server() as server, RewardClient(server.url, gather=1_000, batch=10) as client:
    assert asyncio.run(call(client)) == EXPECTED
    assert len(server.requests) == 2  # which are full
  with reward_server() as server, RewardClient(server.url, gather=0.2) as client:
    found = {}
    threads = [threading.Thread(target=lambda r=row: found.update({r: client.score_one(*r)})) for row in ROWS[:5]]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert [found[row] for row in ROWS[:5]] == EXPECTED[:5] and len(server.requests) == 1


def test_a_refused_row_does_not_cost_its_neighbors_their_rewards():
  def refuse(handler, body):
    bad = any('bad' in text for row in texts_of(body) for text in row)
    (error(400, 'outputs[0] forms a control token') if bad else send(reply_to))(handler, body)

  async def call(client):
    return await asyncio.gather(*(client.ascore_one('p', 'r', o) for o in ('a', 'bad', 'c')), return_exceptions=True)

  with reward_server(act=refuse) as server, RewardClient(server.url) as client:
    first, middle, last = asyncio.run(call(client))
  assert (first, last) == (reward_of('p', 'r', 'a'), reward_of('p', 'r', 'c'))
  assert isinstance(middle, RewardRequestError) and 'control token' in str(middle)


def test_a_coroutine_that_is_cancelled_gives_its_request_up():
  gone = threading.Event()

  def wait(handler, body):
    hang(handler, body)
    gone.set()

  async def call(client):
    await asyncio.wait_for(client.ascore('p', 'r', ['a']), 0.2)

  with reward_server([wait]) as server, RewardClient(server.url) as client:
    with pytest.raises(TimeoutError):
      asyncio.run(call(client))
    assert gone.wait(5)
    assert client.score('p', 'r', ['a']) == [reward_of('p', 'r', 'a')]
  assert len(server.requests) == 2


def test_an_error_gives_the_other_requests_of_a_call_up():
  gone = threading.Event()

  def act(handler, body):
    if texts_of(body)[0][2] == 'bad':
      error(400, 'no')(handler, body)
    else:
      hang(handler, body)
      gone.set()

  with reward_server(act=act) as server, RewardClient(server.url, batch=1, timeout=100) as client:
    with pytest.raises(RewardRequestError, match='status 400'):
      client.score('p', 'r', ['a', 'bad'])
    assert gone.wait(5) and len(server.requests) == 2


def test_a_closed_client_says_so():
  with reward_server(act=hang) as server:
    client = RewardClient(server.url)
    timer = threading.Timer(0.2, client.close)
    timer.start()
    with pytest.raises(RewardRequestError, match='closed while a request was open'):
      client.score('p', 'r', ['a'])
    timer.join()
  with pytest.raises(RewardRequestError, match='the client is closed'):
    client.score('p', 'r', ['a'])
  client.close()


def _score_in_child(client, connection):
  connection.send(client.score_rows(*columns(ROWS)))


@pytest.mark.parametrize('method', ['fork', 'spawn'])
@pytest.mark.filterwarnings('ignore:.*fork.*')
def test_worker_processes_have_connections_of_their_own(method):
  context = multiprocessing.get_context(method)
  with reward_server() as server, RewardClient(server.url, batch=7) as client:
    assert client.score_rows(*columns(ROWS)) == EXPECTED
    ours, theirs = context.Pipe()
    process = context.Process(target=_score_in_child, args=(client, theirs))
    process.start()
    assert ours.poll(60)
    assert ours.recv() == EXPECTED
    process.join()
    assert client.score_rows(*columns(ROWS)) == EXPECTED


def test_a_client_that_nobody_uses_ends_its_thread():
  with reward_server() as server:
    client = RewardClient(server.url)
    client.score_one('p', 'r', 'a')
    del client
    gc.collect()
    # The fixture sees that no thread is left.


def test_importing_the_client_imports_neither_jax_nor_a_server_framework():
  code = 'import polar_jax.serve, sys; polar_jax.serve.RewardClient("h:1"); import polar_jax.serve.adapters.trl; print(*sys.modules)'
  root = pathlib.Path(sending.__file__).parents[2]
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True, env=os.environ | {'PYTHONPATH': str(root)}
  )
  heavy = {'jax', 'flax', 'numpy', 'absl', 'ml_collections', 'starlette', 'uvicorn', 'torch', 'tokenizers'}
  assert not heavy & {name.split('.')[0] for name in result.stdout.split()}


def test_a_missing_httpx_is_one_clear_line(monkeypatch):
  monkeypatch.setitem(sys.modules, 'httpx', None)
  with pytest.raises(UserError, match='needs httpx; run: pip install httpx'):
    RewardClient('h:1')
