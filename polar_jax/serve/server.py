"""The server as a whole: put together from a model, started, and ended in order."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from polar_jax.api import RewardModel
from polar_jax.config import ServeConfig
from polar_jax.runtime import preemption
from polar_jax.serve import app
from polar_jax.serve.batches import Batches, ExactBatches, PackedBatches
from polar_jax.serve.dialects import Facts
from polar_jax.serve.encoding import Encoder
from polar_jax.serve.engine import Engine
from polar_jax.serve.observe import Log, Metrics
from polar_jax.serve.rendered import RenderedTexts
from polar_jax.serve.service import Service
from polar_jax.types import UserError

_HEADERS = 30.0  # seconds for the headers of a request, and for a client to read when buffers are full
_KEEP_ALIVE = 75  # seconds that an idle connection stays open
_BACKLOG = 2_048
_POLL = 0.05  # seconds
_CLOSING = 3  # seconds for connections to close after the last answer


class RewardServer:
  """A reward model behind HTTP.

  Args:
    model: to serve.
    config: address and limits.
    name: of the model in replies.
    token: that requests must carry; None: none.
    write_log: takes lines of the log; None: to standard output.

  Raises:
    UserError: the address cannot be used.
  """

  def __init__(
    self, model: RewardModel, config: ServeConfig, name: str, token: str | None = None, write_log: Callable[[str], object] | None = None
  ):
    max_length = config.max_length or model.template.config.max_length
    batches: Batches = ExactBatches(model, max_length) if config.exact else PackedBatches(model, max_length, config.batch_tokens)
    log = Log(write_log)
    self.metrics = Metrics(log)
    self.engine = Engine(batches, config.batch_tokens, config.queue_tokens, self.metrics)
    encoder = Encoder(model.template, model.config.known_vocab_size, max_length, share=not config.exact)
    self.config = config
    rendered = RenderedTexts(config.policy)
    self._socket = bind(config.host, config.port)
    self.service = Service(config, self.engine, encoder, self.metrics, log)
    template = model.template
    reward_token = None if template.reward_token_id is None else template.config.reward_token
    facts = Facts(self.service.limits, name, template.config.use_reference, config.pooling_dialect, rendered, reward_token)
    self.app = app.make_app(self.service, token, facts, max_length)

  @property
  def address(self) -> str:
    """URL of the server on this machine."""
    host, port = self._socket.getsockname()[:2]
    host = {'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host)
    return f'http://{f"[{host}]" if ":" in host else host}:{port}'

  def run(
    self, stop: threading.Event, on_ready: Callable[[], object] = lambda: None, on_drain: Callable[[], object] = lambda: None
  ) -> None:
    """Serve until `stop` is set and what was accepted is answered, or `config.drain` seconds have passed.

    Args:
      stop: asks the server to end.
      on_ready: is called when everything is compiled.
      on_drain: is called when no further requests are accepted.

    Raises:
      Exception: of the device thread, if that failed.
    """
    try:
      with asyncio.Runner() as runner:
        runner.run(self._run(stop, on_ready, on_drain))
    finally:
      self.service.close()
      self._socket.close()
    self.engine.thread.join(timeout=_CLOSING)
    preemption.abandon(self.engine.thread)
    if self.engine.failure is not None:
      raise self.engine.failure

  @contextlib.contextmanager
  def in_thread(self) -> Iterator[str]:
    """Serve in a thread of this process, and yield the address once everything is compiled.

    Raises:
      Exception: of the device thread, if that failed.
    """
    stop, ready, failures = threading.Event(), threading.Event(), list[BaseException]()

    def serve() -> None:
      try:
        self.run(stop, ready.set)
      except BaseException as error:  # raised in the thread that waits
        failures.append(error)
      finally:
        ready.set()

    thread = threading.Thread(target=serve, name='server')
    thread.start()
    try:
      ready.wait()
      if not failures:
        yield self.address
    finally:
      stop.set()
      thread.join()
    if failures:
      raise failures[0]

  async def _run(self, stop: threading.Event, on_ready: Callable[[], object], on_drain: Callable[[], object]) -> None:
    server = _Uvicorn(uvicorn.Config(self.app, **_settings()))
    serving = asyncio.create_task(server.serve(sockets=[self._socket]))
    self.engine.start()
    try:
      while not (self.engine.ready.is_set() or stop.is_set() or serving.done()) and self.engine.alive:
        await asyncio.sleep(_POLL)
      if self.service.ready and not stop.is_set():
        self.metrics.warm()
        on_ready()
      while not (stop.is_set() or serving.done()) and self.engine.alive:
        await asyncio.sleep(_POLL)
    finally:
      on_drain()
      await self.service.drain(self.config.drain)
      server.should_exit = True
      await serving


def bind(host: str, port: int) -> socket.socket:
  """Return a socket that listens.

  Raises:
    UserError: the address does not exist, or is in use.
  """
  try:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
  except (OSError, UnicodeError, OverflowError) as error:
    raise UserError(f'serve.host={host}, serve.port={port}: cannot listen there: {error}; choose another, or port 0 for any') from error


def _settings() -> dict[str, Any]:
  """Return the settings of uvicorn. Bodies are limited where they are read, and requests are logged by this package."""
  return {
    'http': _Protocol,
    'ws': 'none',
    'lifespan': 'off',
    'log_config': None,
    'access_log': False,
    'server_header': False,
    'proxy_headers': False,
    'backlog': _BACKLOG,
    'timeout_keep_alive': _KEEP_ALIVE,
    'timeout_graceful_shutdown': _CLOSING,
  }


class _Uvicorn(uvicorn.Server):
  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Leave signals to the stage."""
    yield


class _Protocol(H11Protocol):
  """A connection that is closed when its client neither completes the headers of a request nor reads an answer."""

  _timer: asyncio.TimerHandle | None = None
  _write_timer: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
    super().connection_made(transport)
    self._watch_headers()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    self._watch_headers()

  def connection_lost(self, exc: Exception | None) -> None:
    self._stop_timer()
    self._stop_write_timer()
    super().connection_lost(exc)

  def pause_writing(self) -> None:
    super().pause_writing()
    self._write_timer = self._write_timer or self.loop.call_later(_HEADERS, self.transport.abort)

  def resume_writing(self) -> None:
    self._stop_write_timer()
    super().resume_writing()

  def _watch_headers(self) -> None:
    """Start the timer if a request has begun, or should, and its headers are not complete; else stop it."""
    if self.cycle is None or self.cycle.response_complete:
      self._timer = self._timer or self.loop.call_later(_HEADERS, self.transport.abort)
    else:
      self._stop_timer()

  def _stop_timer(self) -> None:
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None

  def _stop_write_timer(self) -> None:
    if self._write_timer is not None:
      self._write_timer.cancel()
      self._write_timer = None
