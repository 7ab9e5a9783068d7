"""The life of a request: read, checked, tokenized, scored and answered, or given up as soon as nobody waits for it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from polar_jax.config import ServeConfig
from polar_jax.data.template import Template
from polar_jax.serve.bodies import Body, BodyReader
from polar_jax.serve.encoding import EncodedItem, Encoder
from polar_jax.serve.engine import Engine, EngineError, Job, QueueFullError, TooLateError
from polar_jax.serve.observe import Log, Metrics
from polar_jax.serve.requests import SHORTEST_TIMEOUT, Limits, RequestError, Result, Work, parse_json

_Result = TypeVar('_Result')
_ID = re.compile(r'[\w.:-]{1,128}', re.ASCII)
_STARTING = 5.0  # seconds after which a client may ask again while the server starts or ends


@dataclasses.dataclass
class Record:
  """What is logged of a request."""

  id: str
  endpoint: str = 'other'
  started: float = dataclasses.field(default_factory=time.monotonic)
  sequences: int = 0
  tokens: int = 0
  truncated: int = 0
  reason: str = ''
  aborted: bool = False

  @classmethod
  def of(cls, request_id: str | None) -> Record:
    """Return the record of a request with the id that its client chose, or a new one."""
    return cls(request_id if request_id and _ID.fullmatch(request_id) else uuid.uuid4().hex)


class Service:
  """Everything that a server shares between its requests. It belongs to the event loop.

  Args:
    config: limits.
    engine: scores sequences; started by the caller.
    encoder: tokenizes.
    metrics: of the server.
    log: of the server.
  """

  def __init__(self, config: ServeConfig, engine: Engine, encoder: Encoder, metrics: Metrics, log: Log):
    self.config, self.engine, self.metrics, self.log = config, engine, metrics, log
    self.limits = Limits(config.max_sequences, config.max_characters)
    self._encoder = encoder
    self._bodies = BodyReader.in_mb(config.max_body_mb, config.body_memory_mb)
    self._threads = concurrent.futures.ThreadPoolExecutor(config.threads, 'request')
    self.in_progress = 0
    self.draining = False

  @property
  def template(self) -> Template:
    """Of the model."""
    return self._encoder.template

  @property
  def ready(self) -> bool:
    """Whether requests are accepted."""
    return self.engine.ready.is_set() and self.engine.alive and not self.draining

  @property
  def healthy(self) -> bool:
    """Whether the server can become, or stay, ready."""
    return self.engine.alive

  def check_ready(self) -> None:
    """Check that requests are accepted.

    Raises:
      RequestError: they are not.
    """
    if not self.ready:
      state = 'ending' if self.draining else 'starting' if self.engine.alive else 'out of order'
      raise RequestError(f'the server is {state}', None, 503, 'unavailable', retry_after=_STARTING)

  async def drain(self, seconds: float) -> bool:
    """Accept no further requests, and wait until those in progress are answered. Returns whether all were."""
    self.draining = True
    deadline = time.monotonic() + seconds
    while self.in_progress and time.monotonic() < deadline:
      await asyncio.sleep(0.02)
    return not self.in_progress

  def close(self) -> None:
    """End the threads."""
    self.engine.stop()
    self._threads.shutdown(wait=False, cancel_futures=True)
    self.log.close()

  async def answer(self, request: Request, record: Record, parse: Callable[[Any], Work]) -> Any:
    """Return the JSON of the reply to a request.

    Args:
      request: whose body was not read.
      record: of the request.
      parse: turns the JSON of the body into work.

    Raises:
      RequestError: it is refused.
      ClientDisconnect: the client hung up; its work has left the queue.
    """
    self._admit()
    timeout = _timeout(request, self.config.timeout)
    self.in_progress += 1
    try:
      async with asyncio.timeout(timeout):
        return await self._answer(request, record, parse, time.monotonic() + timeout)
    except (TimeoutError, TooLateError) as error:
      raise RequestError(f'the request was not scored within {timeout:g} s, its deadline', None, 504, 'deadline') from error
    except QueueFullError as error:
      raise _full(error) from error
    except EngineError as error:
      raise RequestError(str(error), None, 500, 'server_error') from error
    finally:
      self.in_progress -= 1

  async def compute(self, request: Request, call: Callable[[Any], Any]) -> Any:
    """Return what `call` makes of the JSON of a request, in a thread. For endpoints that score nothing.

    Raises:
      RequestError: the request is refused.
      ClientDisconnect: the client hung up.
    """
    self._admit()
    timeout = _timeout(request, self.config.timeout)
    self.in_progress += 1
    try:
      async with asyncio.timeout(timeout):
        body = await self._bodies.read(request)
        try:
          return await _while_connected(request, self._in_thread(lambda: call(parse_json(self._bodies.expand(body)))))
        finally:
          body.release()
    except TimeoutError as error:
      raise RequestError(f'the request was not answered within {timeout:g} s, its deadline', None, 504, 'deadline') from error
    finally:
      self.in_progress -= 1

  def _admit(self) -> None:
    """Refuse a request before its body is read, if that is certain already."""
    self.check_ready()
    if self.in_progress >= self.config.max_requests:
      raise RequestError('too many requests are in progress (serve.max_requests)', None, 429, 'busy', retry_after=1.0)
    try:
      self.engine.check_room()
    except QueueFullError as error:
      raise _full(error) from error

  async def _answer(self, request: Request, record: Record, parse: Callable[[Any], Work], deadline: float) -> Any:
    body = await self._bodies.read(request)
    try:
      render, items = await _while_connected(request, self._prepare(body, parse))
    finally:
      body.release()
    record.sequences = len(items)
    record.tokens, record.truncated = sum(len(item.item.ids) for item in items), sum(item.truncated for item in items)
    if record.tokens > self.engine.queue_tokens:
      raise RequestError(
        f'the request has {record.tokens} tokens; at most {self.engine.queue_tokens} may wait (serve.queue_tokens): divide it',
        None,
        413,
        'too_large',
      )
    job = Job([item.item for item in items], deadline)
    self.engine.submit(job)
    try:
      rewards = await _while_connected(request, asyncio.wrap_future(job.future))
    finally:
      if not job.future.done() or job.future.cancelled():
        self.engine.cancel(job)
    self.metrics.scored(record.sequences, record.tokens, record.truncated)
    results = [Result(float(reward), len(item.item.ids), item.truncated) for reward, item in zip(rewards, items, strict=True)]
    return render(results)

  async def _prepare(self, body: Body, parse: Callable[[Any], Work]) -> tuple[Callable[[Sequence[Result]], Any], list[EncodedItem]]:
    """Parse and tokenize a body in threads. Returns what renders the reply, and the sequences; no text is kept while they wait."""

    def parse_body() -> tuple[int, Work]:
      content = self._bodies.expand(body)
      return len(content), parse(parse_json(content))

    size, work = await self._in_thread(parse_body)
    body.replace(size)
    tasks = [
      asyncio.ensure_future(self._in_thread(functools.partial(self._encoder.encode, part))) for part in self._encoder.divide(work.sources)
    ]
    try:
      return work.render, [item for items in await asyncio.gather(*tasks) for item in items]
    finally:
      for task in tasks:
        task.cancel()

  async def _in_thread(self, call: Callable[[], _Result]) -> _Result:
    return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _full(error: QueueFullError) -> RequestError:
  return RequestError('the queue is full (serve.queue_tokens)', None, 429, 'queue_full', retry_after=error.seconds)


def _timeout(request: Request, longest: float) -> float:
  """Return the seconds that a request may take.

  Raises:
    RequestError: its header is no such number.
  """
  header = request.headers.get('x-request-timeout')
  if header is None:
    return longest
  try:
    seconds = float(header)
  except ValueError:
    seconds = math.nan
  if not seconds >= SHORTEST_TIMEOUT:
    raise RequestError(f'X-Request-Timeout must be a number of seconds, at least {SHORTEST_TIMEOUT}', 'X-Request-Timeout')
  return min(seconds, longest)


async def _while_connected(request: Request, work: Awaitable[_Result]) -> _Result:
  """Return the result of some work, unless the client hangs up first, which cancels it.

  Raises:
    ClientDisconnect: the client hung up.
  """
  task = asyncio.ensure_future(work)
  watch = asyncio.ensure_future(_disconnected(request))
  try:
    await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise ClientDisconnect
    return task.result()
  finally:
    watch.cancel()
    task.cancel()


async def _disconnected(request: Request) -> None:
  while (await request.receive())['type'] != 'http.disconnect':
    pass
