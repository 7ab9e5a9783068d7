"""What clients may do to a server, by accident or on purpose: it neither crashes nor hangs, and the next request is answered."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import socket
import threading
import time

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = [pytest.mark.needs('uvicorn'), pytest.mark.long]  # on one Python: they take a minute together

GOOD = {'prompt': 'p', 'reference': 'r', 'outputs': ['a', 'b']}
SCORING = ('/score', '/classify', '/encode', '/pooling', '/v1/embeddings', '/get_reward', '/reward')


def wait_until(condition, seconds=20.0):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


@pytest.fixture(autouse=True)
def alive_after(request):
  """After each test with the shared server, it still gives the right answer."""
  yield
  if 'exact_server' in request.fixturenames:
    running, model = request.getfixturevalue('exact_server'), request.getfixturevalue('model')
    assert running.client.post('/score', GOOD).body['rewards'] == rewards_of(model, GOOD)
    wait_until(lambda: running.server.engine.waiting_sequences == 0 and running.server.service._bodies.used == 0)


def rewards_of(model, body):
  from polar_jax.types import Group

  return model.exact_scorer.score([Group(body['prompt'], body['reference'], [output]) for output in body['outputs']]).tolist()


@contextlib.contextmanager
def held(running):
  """Hold the device in its next batch; yields an event that is set once it is there."""
  batches = running.server.engine._batches
  dispatch, gate, entered = batches.dispatch, threading.Event(), threading.Event()

  def wait(groups):
    entered.set()
    assert gate.wait(60)
    yield from dispatch(groups)

  batches.dispatch = wait
  try:
    yield entered
  finally:
    del batches.dispatch
    gate.set()


def open_request(running, body=GOOD, path='/score', complete=True):
  """Return a socket over which a request was sent."""
  data = json.dumps(body).encode()
  sock = socket.create_connection((running.client.host, running.client.port), timeout=30)
  head = f'POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n'.encode()
  sock.sendall(head + (data if complete else data[:-5]))
  return sock


def answer_on(sock):
  """Return the JSON of the answer that arrives on a socket."""
  response = http.client.HTTPResponse(sock)
  response.begin()
  return json.loads(response.read())


@pytest.mark.parametrize(
  ('raw', 'headers', 'status'),
  [
    (b'{"prompt": ', {}, 400),
    (b'\xff\xfe', {}, 400),
    (b'[' * 200_000, {}, 400),
    (b'{"prompt": NaN}', {}, 400),
    (b'{"prompt": "a", "prompt": "b", "reference": "", "outputs": []}', {}, 400),
    (b'{"prompt": "\\ud800", "reference": "", "outputs": []}', {}, 400),
    (json.dumps(GOOD).encode(), {'Content-Type': 'text/plain'}, 415),
    (json.dumps(GOOD).encode(), {'Content-Type': 'application/x-www-form-urlencoded'}, 415),
    (json.dumps(GOOD).encode(), {'Content-Encoding': 'br'}, 415),
    (json.dumps(GOOD).encode(), {'Content-Encoding': 'gzip'}, 400),
    (gzip.compress(json.dumps(GOOD).encode(), mtime=0)[:-4], {'Content-Encoding': 'gzip'}, 400),
    (gzip.compress(json.dumps(GOOD).encode(), mtime=0) + b'x', {'Content-Encoding': 'gzip'}, 400),
    (gzip.compress(json.dumps(GOOD).encode(), mtime=0), {'Content-Encoding': 'gzip'}, 200),
    (json.dumps(GOOD).encode(), {'Content-Type': 'application/json; charset=utf-8'}, 200),
    (json.dumps(GOOD).encode(), {'X-Request-Timeout': 'soon'}, 400),
    (json.dumps(GOOD).encode(), {'X-Request-Timeout': '-1'}, 400),
    (json.dumps(GOOD).encode(), {'X-Request-Timeout': 'nan'}, 400),
    (json.dumps(GOOD).encode(), {'X-Request-Timeout': 'inf'}, 200),
  ],
)
def test_bodies_and_headers(exact_server, raw, headers, status):
  reply = exact_server.client.post('/score', None, raw=raw, headers=headers)
  assert reply.status == status, reply
  if status != 200:
    error = reply.body['error']
    assert error['code'] == status and error['message'] and set(error) == {'message', 'type', 'param', 'code'}


@pytest.mark.parametrize(('path', 'count'), [('/score', 1_000_000), ('/classify', 1_000_000), ('/reward', 100_000)])
def test_very_many_candidates(exact_server, path, count):
  body = {'/score': {**GOOD, 'outputs': ['a'] * count}, '/classify': {'text': ['a'] * count}, '/reward': [{}] * count}[path]
  assert exact_server.client.post(path, body).status == 413


def test_bodies_are_limited_before_and_after_decompression(serve):
  with serve(max_body_mb=1, max_characters=2_000_000) as running:
    large = b' ' * 1_000_001
    for raw, headers in (
      (large, {}),
      (b' ' * 100_000_000, {}),
      (gzip.compress(large, mtime=0), {'Content-Encoding': 'gzip'}),
      (gzip.compress(b'0' * 300_000_000, 1), {'Content-Encoding': 'gzip'}),
    ):
      reply = running.client.post('/score', None, raw=raw, headers=headers)
      assert reply.status == 413 and 'serve.max_body_mb' in reply.body['error']['message']
    chunks = (b' ' * 65_536 for _ in range(100))  # without a declared length
    assert running.client.send('POST', '/score', None, raw=chunks).status == 413
    assert running.client.post('/score', GOOD).status == 200


def test_bodies_of_all_requests_share_a_limit_of_memory(serve):
  with serve(max_body_mb=1, body_memory_mb=1) as running:
    filler = {**GOOD, 'prompt': ' ' * 900_000}
    with contextlib.closing(open_request(running, filler, complete=False)):
      wait_until(lambda: running.server.service._bodies.used > 800_000)
      reply = running.client.post('/score', filler)
      assert (reply.status, reply.headers['retry-after']) == (429, '1')
      assert running.client.post('/score', GOOD).status == 200
    wait_until(lambda: running.server.service._bodies.used == 0)


def test_unknown_paths_and_methods(exact_server):
  assert exact_server.client.get('/nothing').body['error']['code'] == 404
  reply = exact_server.client.get('/score')
  assert (reply.status, reply.headers['allow'], reply.body['error']['type']) == (405, 'POST', 'method_not_allowed')
  assert exact_server.client.send('DELETE', '/health').status == 405
  assert exact_server.client.send('PUT', '/classify', {'text': []}).status == 200


def test_bytes_that_are_not_http(exact_server):
  for data in (
    b'\x16\x03\x01' * 100,
    b'GET / HTTP/1.1\r\nContent-Length: -5\r\n\r\n',
    b'A' * 200_000,
    b'POST /score HTTP/1.1\r\nContent-Length: 9' * 2,
  ):
    with socket.create_connection((exact_server.client.host, exact_server.client.port), timeout=10) as sock, contextlib.suppress(OSError):
      sock.sendall(data)
      sock.shutdown(socket.SHUT_WR)
      assert b'200 OK' not in sock.recv(65_536)


def test_the_token(serve):
  with serve(token='s3cret') as running:
    client = running.client
    for headers in (
      {},
      {'Authorization': 's3cret'},
      {'Authorization': 'Bearer S3cret'},
      {'Authorization': 'Basic s3cret'},
      {'Authorization': 'Bearer \xff'},
    ):
      reply = client.post('/score', GOOD, headers=headers)
      assert (reply.status, reply.headers['www-authenticate']) == (401, 'Bearer')
    assert client.post('/score', GOOD, headers={'Authorization': 'bearer s3cret'}).status == 200
    assert [client.get(path).status for path in ('/health', '/ready', '/metrics', '/v1/models')] == [200, 200, 401, 401]
    assert client.get('/openapi.json', headers={'Authorization': 'Bearer s3cret'}).body['security'] == [{'token': []}]
  assert 's3cret' not in json.dumps(running.log)


def test_the_queue_is_bounded_and_deadlines_and_hang_ups_free_it(serve, model):
  with serve(queue_tokens=1_000) as running:
    client, engine = running.client, running.server.engine
    assert client.post('/score', {**GOOD, 'outputs': ['x' * 90] * 12}).status == 413  # can never fit
    with held(running) as entered, contextlib.ExitStack() as stack:
      first = stack.enter_context(contextlib.closing(open_request(running)))
      assert entered.wait(20)
      waiting = {**GOOD, 'outputs': ['x' * 90] * 9}
      hangs_up = open_request(running, waiting)
      wait_until(lambda: engine.waiting_sequences == 9)
      reply = client.post('/score', {**GOOD, 'outputs': ['y' * 90] * 3})
      assert (reply.status, reply.body['error']['type']) == (429, 'queue_full') and int(reply.headers['retry-after']) >= 1
      assert client.get('/health').status == client.get('/ready').status == 200
      hangs_up.close()
      wait_until(lambda: engine.waiting_sequences == 0)
      reply = client.post('/score', waiting, headers={'X-Request-Timeout': '0.3'})
      assert (reply.status, reply.body['error']['code']) == (504, 504)
      wait_until(lambda: engine.waiting_sequences == 0)
      page = client.get('/metrics').body
      assert 'polar_aborted_total 1.0' in page
      assert 'polar_refused_total{reason="queue_full"} 1.0' in page and 'polar_refused_total{reason="deadline"} 1.0' in page
    # The first request was with the device all the time, and is answered.
    assert client.post('/score', GOOD).body['rewards'] == rewards_of(model, GOOD)
    del first


def test_slow_and_half_open_connections_hold_up_nobody(exact_server, monkeypatch, model):
  from polar_jax.serve import server

  monkeypatch.setattr(server, '_HEADERS', 0.5)
  with contextlib.ExitStack() as stack:
    silent = [
      stack.enter_context(socket.create_connection((exact_server.client.host, exact_server.client.port), timeout=20)) for _ in range(50)
    ]
    for sock in silent[:25]:
      sock.sendall(b'POST /score HTTP/1.1\r\nContent-')
    uploads = [stack.enter_context(contextlib.closing(open_request(exact_server, complete=False))) for _ in range(25)]
    assert exact_server.client.post('/score', GOOD).body['rewards'] == rewards_of(model, GOOD)
    for sock in silent:
      with contextlib.suppress(ConnectionResetError):
        assert sock.recv(1) == b''
    uploads[0].sendall(json.dumps(GOOD).encode()[-5:])  # slow, but it arrives
    assert answer_on(uploads[0])['rewards'] == rewards_of(model, GOOD)


def test_five_hundred_connections_at_once(exact_server, model):
  client = exact_server.client
  bodies = [{'prompt': f'p{i % 7}', 'reference': f'r{i}', 'outputs': [f'a{i}']} for i in range(500)]

  async def ask(body, start):
    reader, writer = await asyncio.open_connection(client.host, client.port)
    await start.wait()
    data = json.dumps(body).encode()
    head = f'POST /score HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n'
    writer.write(head.encode() + data)
    answer = await reader.read()
    writer.close()
    return json.loads(answer.partition(b'\r\n\r\n')[2])['rewards']

  async def crowd():
    start = asyncio.Event()
    tasks = [asyncio.create_task(ask(body, start)) for body in bodies]
    await asyncio.sleep(0.1)
    start.set()
    return await asyncio.gather(*tasks)

  from polar_jax.types import Group

  wanted = model.exact_scorer.score([Group(b['prompt'], b['reference'], [o]) for b in bodies for o in b['outputs']])
  assert asyncio.run(crowd()) == wanted[:, None].tolist()


def test_the_end_answers_what_was_accepted(serve, model):
  with serve() as running:
    with held(running) as entered:
      socks = [open_request(running, {**GOOD, 'outputs': [f'o{i}']}) for i in range(10)]
      assert entered.wait(20)
      wait_until(lambda: running.server.service.in_progress == 10)
      running.stop.set()
      wait_until(lambda: running.server.service.draining)
      reply = running.client.post('/score', GOOD)
      assert (reply.status, reply.headers['retry-after']) == (503, '5') and running.client.get('/ready').status == 503
      assert running.client.get('/health').status == 200
    for i, sock in enumerate(socks):
      with contextlib.closing(sock):
        assert answer_on(sock)['rewards'] == rewards_of(model, {**GOOD, 'outputs': [f'o{i}']})
    running.thread.join(20)
    assert not running.thread.is_alive()


def test_before_it_is_ready(serve, monkeypatch):
  from polar_jax.serve.batches import ExactBatches

  gate = threading.Event()
  monkeypatch.setattr(ExactBatches, 'warm_up', lambda self: iter([gate.wait(60)]))
  with serve(wait=False) as running:
    assert running.client.get('/health').status == 200
    for reply in (running.client.get('/ready'), running.client.post('/score', GOOD)):
      assert (reply.status, reply.headers['retry-after']) == (503, '5') and 'starting' in reply.body['error']['message']
    gate.set()
    wait_until(lambda: running.client.get('/ready').status == 200)


def test_faults_of_the_device(serve, monkeypatch):
  with serve() as running:
    engine = running.server.engine
    monkeypatch.setattr(engine._batches, 'dispatch', lambda groups: (_ for _ in ()).throw(jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED')))
    reply = running.client.post('/score', GOOD)
    assert (reply.status, reply.body['error']['type']) == (500, 'server_error') and 'RESOURCE' not in reply.body['error']['message']
    monkeypatch.undo()
    assert running.client.post('/score', GOOD).status == 200


json_values = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
  max_leaves=8,
)
field_names = st.sampled_from(
  'prompt reference outputs output wrapper text input input_ids query prompts labels label response encoding_format'.split()  # noqa: SIM905
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  st.sampled_from(SCORING),
  json_values
  | st.dictionaries(field_names, json_values, max_size=6)
  | st.lists(st.dictionaries(field_names, json_values, max_size=4), max_size=2),
)
def test_any_json_gets_an_answer_or_a_refusal(exact_server, path, body):
  reply = exact_server.client.post(path, body)
  assert reply.status in (200, 400, 413), reply
  if reply.status != 200:
    assert set(reply.body) == {'error'} and reply.body['error']['message']
