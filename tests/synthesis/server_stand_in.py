"""A stand-in for an OpenAI-compatible server, whose answers depend on the prompt and the seed, and that fails as told; and its samplers."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from polar_jax.synthesis.samples import PoolPrompt, QuarantineError, Request, Sample
from polar_jax.synthesis.server import ServerConfig, ServerSampler


def text_of(prompt: str, seed: int) -> str:
  """Return what the server answers."""
  return f'answer {zlib.crc32(f"{prompt}/{seed}".encode())}'


def prompt_of(body: dict[str, Any]) -> str:
  return body['prompt'] if 'prompt' in body else body['messages'][-1]['content']


def reply_to(body: dict[str, Any], text: str | None = None, finish_reason: str = 'stop') -> dict[str, Any]:
  """Return the usual reply to a request, with another text if one is given."""
  text = text_of(prompt_of(body), body['seed']) if text is None else text
  choice = {'message': {'role': 'assistant', 'content': text}} if 'messages' in body else {'text': text}
  choice |= {'index': 0, 'finish_reason': finish_reason, 'logprobs': None}
  usage = {'prompt_tokens': 5, 'completion_tokens': 7, 'total_tokens': 12}
  return {'id': 'x', 'object': 'text_completion', 'created': 1, 'model': body['model'], 'choices': [choice], 'usage': usage}


Act = Callable[['Handler', dict[str, Any]], None]


class Server:
  """A server in threads.

  Attributes:
    script: what happens to the next requests, in order; then `act` happens. Both are functions of (handler, body of the request).
    requests: (path, headers, body) of every request.
    connections: number of connections that were opened.
    in_flight: number of requests that are being answered.
    most: the largest number of requests that were in flight at once.
  """

  def __init__(self, script: Any = (), act: Act | None = None, port: int = 0):
    self.script, self.act = list(script), act or send()
    self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
    self.connections = self.in_flight = self.most = 0
    self.lock, self.closing = threading.Lock(), threading.Event()
    self._sockets: set[socket.socket] = set()
    self.http = _Http(('127.0.0.1', port), type('Handler', (Handler,), {'outer': self}))
    self.url = f'http://127.0.0.1:{self.http.server_port}'
    threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

  def bodies(self) -> list[dict[str, Any]]:
    return [body for _, _, body in self.requests]

  def close(self) -> None:
    self.closing.set()
    self.http.shutdown()
    self.http.server_close()
    for connection in list(self._sockets):
      with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)

  def __enter__(self) -> Server:
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


class _Http(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, *_: Any) -> None:
    pass


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True  # header and body are two writes
  outer: Server

  def setup(self) -> None:
    super().setup()
    with self.outer.lock:
      self.outer.connections += 1
      self.outer._sockets.add(self.connection)

  def finish(self) -> None:
    with contextlib.suppress(OSError):
      super().finish()
    with self.outer.lock:
      self.outer._sockets.discard(self.connection)

  def do_POST(self) -> None:
    outer = self.outer
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    with outer.lock:
      outer.requests.append((self.path, dict(self.headers.items()), body))
      outer.in_flight += 1
      outer.most = max(outer.most, outer.in_flight)
      act = outer.script.pop(0) if outer.script else outer.act
      self.left = False
    try:
      act(self, body)
    except OSError:  # the client has closed the connection
      self.close_connection = True
    finally:
      self.leave()

  def leave(self) -> None:
    """Count the request as answered: before its last byte is sent, because the client may then send the next one."""
    with self.outer.lock:
      self.outer.in_flight -= not self.left
      self.left = True

  def log_message(self, *_: Any) -> None:
    pass


def send(reply: Any = None, status: int = 200, raw: bytes | None = None, seconds: float = 0.0, **headers: str) -> Act:
  """Answer after some seconds: with the usual reply, what a function of (body) returns, another value or raw bytes."""

  def act(handler: Handler, body: dict[str, Any]) -> None:
    if seconds:
      handler.outer.closing.wait(seconds)
    value = reply_to(body) if reply is None else reply(body) if callable(reply) else reply
    content = json.dumps(value).encode() if raw is None else raw
    handler.send_response(status)
    for name, header in headers.items():
      handler.send_header(name.replace('_', '-'), header)
    handler.send_header('Content-Length', str(len(content)))
    handler.end_headers()
    handler.leave()
    handler.wfile.write(content)

  return act


def error(status: int, message: str, **headers: str) -> Act:
  return send({'error': {'message': message, 'code': status}}, status, **headers)


def hang(handler: Handler, body: dict[str, Any]) -> None:
  """Say nothing until the client gives up, or for 20 s."""
  handler.connection.settimeout(0.02)
  for _ in range(1_000):
    with contextlib.suppress(TimeoutError):
      handler.connection.recv(1)
      return
    if handler.outer.closing.is_set():
      return


def hang_up(handler: Handler, body: dict[str, Any]) -> None:
  """Close the connection without a reply."""
  handler.close_connection = True


def reset(handler: Handler, body: dict[str, Any]) -> None:
  handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
  handler.connection.close()
  handler.close_connection = True


def cut_off(handler: Handler, body: dict[str, Any]) -> None:
  """Close the connection in the middle of the body."""
  content = json.dumps(reply_to(body)).encode()
  handler.send_response(200)
  handler.send_header('Content-Length', str(len(content)))
  handler.end_headers()
  handler.wfile.write(content[:-9])
  handler.close_connection = True


def trickle(handler: Handler, body: dict[str, Any]) -> None:
  """Send a byte now and then, so that no single wait is long."""
  handler.send_response(200)
  handler.send_header('Content-Length', '1000')
  handler.end_headers()
  for _ in range(200):
    handler.wfile.write(b' ')
    time.sleep(0.02)


def free_port() -> int:
  with socket.socket() as sock:
    sock.bind(('127.0.0.1', 0))
    return sock.getsockname()[1]


BASE = ServerConfig(
  base_urls=(),
  model='zoo/m-1b',
  chat=False,
  system=None,
  temperature=0.7,
  top_p=0.9,
  top_k=None,
  max_tokens=64,
  api_key_env=None,
  max_in_flight=8,
  timeout=5.0,
  patience=30.0,
)


class FakeTime:
  """A clock that only `sleep` moves."""

  def __init__(self):
    self.now, self.slept = 1_000.0, 0.0

  def clock(self):
    return self.now

  def sleep(self, seconds):
    assert 0 < seconds <= 0.2  # SIGTERM must not wait longer
    self.now += seconds
    self.slept += seconds


@contextlib.contextmanager
def making() -> Iterator[Any]:
  """Yield a function that makes samplers, which are closed at the end of the block."""
  made: list[ServerSampler] = []

  def build(*servers, fake=None, addresses=None, **settings):
    urls = tuple(server if isinstance(server, str) else server.url for server in servers)
    fake = fake or FakeTime()
    config = dataclasses.replace(BASE, base_urls=urls, **settings)
    made.append(ServerSampler(config, addresses=addresses, clock=fake.clock, sleep=fake.sleep))
    return made[-1]

  yield build
  for sampler in made:
    sampler._shared.close()


def prompt(i, text=None):
  return PoolPrompt(f'p{i}', f'prompt {i}' if text is None else text, 'prefix', 'f.jsonl', i, 'train')


def requests(prompts=1, samples=1, text=None):
  return [Request(prompt(i, text), k, 100 * i + k) for i in range(prompts) for k in range(samples)]


def usual(wanted):
  return [Sample(text_of(r.prompt.text, r.seed), True, 7) for r in wanted]


def quarantined(sampler, wanted):
  with pytest.raises(QuarantineError) as caught:
    sampler.sample(wanted)
  message = str(caught.value)
  assert '\n' not in message and 'None' not in message
  return message
