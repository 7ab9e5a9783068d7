"""Connections: what is kept open, what is sent again, replies of every form, and TLS."""

from __future__ import annotations

import json
import socket
import ssl
import threading

import pytest
from synthesis import server_stand_in as stand_in
from synthesis.server_stand_in import FakeTime, Server, reply_to, requests, send, usual

from polar_jax.synthesis import connection as connection_lib
from polar_jax.synthesis.connection import Connection, TemporaryError

# Of 127.0.0.1, signed by itself, and of no use to anybody.
CERTIFICATE = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgOX59WKlR+Mjc3v6k
iaHaKGG4TeIMVsd5HmIjQbq0QgqhRANCAATcWk12fpaCFM/ACLG96cx0X7z+PZeO
cqrfLMY5y6/AB1qPlpli4E/kY48zbAsHDcpT8lC+f+3FaUAp/n8QG+1X
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBhTCCASygAwIBAgIUY89eXzEDDNZ0s/NcQ8MnTDBarTMwCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjkyMTIyNTZaGA8yMTI2MTEwNTIxMjI1
NlowDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABNxa
TXZ+loIUz8AIsb3pzHRfvP49l45yqt8sxjnLr8AHWo+WmWLgT+RjjzNsCwcNylPy
UL5/7cVpQCn+fxAb7VejZDBiMB0GA1UdDgQWBBT6KuIkoKPkwCj84bi5zaKUiOi/
mzAfBgNVHSMEGDAWgBT6KuIkoKPkwCj84bi5zaKUiOi/mzAPBgNVHRMBAf8EBTAD
AQH/MA8GA1UdEQQIMAaHBH8AAAEwCgYIKoZIzj0EAwIDRwAwRAIgMN9wUTzKwv75
7XlV4h3uXb4k4ykjGYycuX2kg6vkGhQCIESzMjAgSPHBOkBcHYxdLD8f43Dd2/Hb
najkMyzCoAyq
-----END CERTIFICATE-----
"""


@pytest.fixture
def make():
  """A function that makes samplers, which are closed after the test."""
  with stand_in.making() as build:
    yield build


def then_close(handler, body):
  """Answer, and close the connection without having said so."""
  send()(handler, body)
  handler.close_connection = True


@pytest.mark.parametrize('stale', ['before the request', 'after the request', 'reset after the request'])
def test_a_connection_that_the_server_closed_is_no_failure(make, stale):
  script = {
    'before the request': [then_close],
    'after the request': [send(), stand_in.hang_up],
    'reset after the request': [send(), stand_in.reset],
  }
  with Server(script[stale]) as server:
    fake = FakeTime()
    sampler = make(server, fake=fake, max_in_flight=1)
    for _ in range(3):
      assert sampler.sample(requests()) == usual(requests())
    assert sampler.counts()['retries'] == 0 and fake.slept == 0
    assert server.connections == 2 and len(server.requests) == (3 if stale == 'before the request' else 4)


def test_a_connection_that_is_idle_for_long_is_not_used_again(make, monkeypatch):
  monkeypatch.setattr(connection_lib, '_KEEP_ALIVE', 0.0)
  with Server() as server:
    sampler = make(server, max_in_flight=1)
    for _ in range(3):
      assert sampler.sample(requests()) == usual(requests())
    assert server.connections == 3


def raw(reply, close=True):
  """Return an act that sends some bytes."""

  def act(handler, body):
    handler.wfile.write(reply)
    handler.close_connection = close

  return act


def post(url, timeout=5.0):
  connection = Connection(None)
  try:
    return connection.post(f'{url}/v1/x', {'A': 'b'}, b'{"seed": 1, "prompt": "p", "model": "m"}', timeout)
  finally:
    connection.close()


CHUNKS = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n'


@pytest.mark.parametrize(
  ('reply', 'content'),
  [
    (b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Y: z\r\n\r\nabcde', b'abcde'),
    (CHUNKS + b'0\r\nTrailer: 1\r\n\r\n', b'abcde'),
    (b'HTTP/1.0 200 OK\r\n\r\nabcde', b'abcde'),  # up to the end of the connection
    (b'HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n', b''),
    (b'HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n' + b'x' * 100_000, b'x' * 100_000),
  ],
)
def test_forms_of_replies(reply, content):
  with Server(act=raw(reply)) as server:
    found = post(server.url)
  assert (found.status, found.content) == (200, content)
  assert found.headers.get('x-y') == ('z' if b'X-Y' in reply else None)


@pytest.mark.parametrize(
  ('reply', 'message'),
  [
    (b'', 'closed connection without response'),
    (b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabcde', 'closed the connection 4 bytes before the end'),
    (CHUNKS, 'IncompleteRead'),
    (CHUNKS + b'zz\r\n', 'IncompleteRead'),
    (b'SSH-2.0-OpenSSH\r\n', 'SSH'),
    (b'HTTP/1.1 banana OK\r\n\r\n', 'banana'),
    (b'HTTP/1.1 200 OK\r\n' + b'A: b\r\n' * 200 + b'\r\n', 'headers'),
    (b'HTTP/1.1 200 OK\r\nA: ' + b'x' * 70_000, 'header line'),
  ],
)
def test_replies_that_are_none(reply, message):
  with Server(act=raw(reply)) as server, pytest.raises(TemporaryError, match=message) as caught:
    post(server.url)
  assert '\n' not in str(caught.value)


def test_a_connection_is_kept_whatever_the_form_of_the_reply():
  with Server([raw(CHUNKS + b'0\r\n\r\n', close=False), send(status=500), send(raw=b'')]) as server:
    connection = Connection(None)
    contents = [connection.post(f'{server.url}/x', {}, b'{"seed": 1, "prompt": "p", "model": "m"}', 5.0).content for _ in range(3)]
    connection.close()
    assert contents[::2] == [b'abcde', b''] and server.connections == 1
    assert [path for path, _, _ in server.requests] == ['/x'] * 3


def test_nobody_accepts():
  with socket.socket() as listening:
    listening.bind(('127.0.0.1', 0))
    listening.listen(0)
    waiting = [socket.socket() for _ in range(4)]  # they fill the queue
    for client in waiting:
      client.setblocking(False)
      client.connect_ex(listening.getsockname())
    with pytest.raises(TemporaryError, match=r'no connection within 0\.2 s|no reply within 0\.2 s'):
      post(f'http://127.0.0.1:{listening.getsockname()[1]}', 0.2)
    for client in waiting:
      client.close()


def test_proxies_are_not_used(make, monkeypatch):
  for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
    monkeypatch.setenv(name, 'http://127.0.0.1:9')
  with Server() as server:
    assert make(server).sample(requests()) == usual(requests())


@pytest.fixture
def encrypted(tmp_path):
  """A server with TLS, and the file of its certificate."""
  file = tmp_path / 'certificate.pem'
  file.write_text(CERTIFICATE)
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(file)
  with Server() as server:
    server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
    server.url = server.url.replace('http:', 'https:')
    yield server, file


def test_tls(make, encrypted, monkeypatch):
  server, file = encrypted
  monkeypatch.setenv('SSL_CERT_FILE', str(file))
  server.script = [send(), send(), stand_in.hang_up, stand_in.cut_off, send(raw=b'half')]
  sampler = make(server, max_in_flight=1)
  assert sampler.sample(requests(4, 2)) == usual(requests(4, 2))
  assert sampler.counts()['retries'] == 2 and server.connections == 3  # to hang up between requests is no failure
  server.act = stand_in.hang
  assert 'no reply within 0.1 s' in stand_in.quarantined(make(server, timeout=0.1, patience=0.0), requests())


def test_a_certificate_that_is_not_trusted(make, encrypted, monkeypatch):
  server, _ = encrypted
  monkeypatch.delenv('SSL_CERT_FILE', raising=False)
  assert 'certificate verify failed' in stand_in.quarantined(make(server, patience=0.0), requests())
  assert not server.requests


def test_a_request_over_tls_that_is_aborted_ends_at_once(encrypted, monkeypatch):
  server, file = encrypted
  server.act = stand_in.hang
  context = ssl.create_default_context(cafile=file)
  connection, caught = Connection(context), []

  def work():
    try:
      connection.post(f'{server.url}/x', {}, b'{"seed": 1, "prompt": "p", "model": "m"}', 20.0)
    except TemporaryError as error:
      caught.append(error)

  thread = threading.Thread(target=work)
  thread.start()
  while not server.in_flight:
    pass
  connection.abort()
  thread.join(5)
  assert caught and not thread.is_alive()


def test_replies_of_several_parts(make):
  def act(handler, body):
    content = json.dumps(reply_to(body)).encode()
    handler.send_response(200)
    handler.send_header('Content-Length', str(len(content)))
    handler.end_headers()
    for i in range(0, len(content), 50):
      handler.wfile.write(content[i : i + 50])
      handler.wfile.flush()

  with Server(act=act) as server:
    assert make(server).sample(requests(3)) == usual(requests(3))


def test_what_comes_between_requests_is_no_reply():
  """Some servers say 408 before they close a connection that was idle."""

  def act(handler, body):
    send()(handler, body)
    read.wait(5)
    handler.wfile.write(b'HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n')
    sent.set()

  read, sent = threading.Event(), threading.Event()
  with Server([act]) as server:
    connection, body = Connection(None), b'{"seed": 1, "prompt": "p", "model": "m"}'
    replies = [connection.post(f'{server.url}/x', {}, body, 5.0)]
    read.set()
    sent.wait(5)
    replies += [connection.post(f'{server.url}/x', {}, body, 5.0) for _ in range(2)]
    connection.close()
    assert [reply.status for reply in replies] == [200] * 3 and server.connections == 2
