"""Sends the requests of a client: connections that stay open, several addresses, retries, and a limit of time.

All requests of a client run in one event loop, in a thread of its own. Blocking calls of any thread and coroutines of any event loop thus
share connections, and the number of requests in flight has one limit.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import datetime
import email.utils
import importlib
import json
import logging
import random
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from polar_jax.runtime import json_files
from polar_jax.types import UserError

# Not absl's, which a trainer's environment may lack.
_LOG = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds; each pause is twice the one before
_CONNECT = 10.0  # seconds in which a connection must be open: an address that swallows packets must not cost a whole timeout
_KEEP_ALIVE = 4.0  # seconds that an idle connection is kept. Servers close theirs after 5 s, and a request sent just then fails.
_BUSY = (408, 429)  # statuses below 500 after which a retry makes sense
_BETWEEN_WARNINGS = 10.0  # seconds, for each address
_EXCERPT = 200  # characters of a reply in a message
_ADVICE = {
  401: 'set the environment variable {token_env} to the token of the server',
  404: 'check that the server is the one of polar_jax',
  413: 'lower `batch`, the texts of a request, or raise the limit of the server',
}


class RewardRequestError(UserError):
  """There are no rewards: the server refused the request, was down for too long, or sent a reply that cannot be used.

  Attributes:
    status: HTTP status of the last reply; None if there was none.
  """

  def __init__(self, message: str, status: int | None = None):
    super().__init__(message)
    self.status = status

  def __reduce__(self) -> tuple[Any, ...]:
    return type(self), (self.args[0], self.status)


class _TemporaryError(Exception):
  """A request failed, and a retry may succeed after some seconds."""

  def __init__(self, message: str, after: float = 0.0, status: int | None = None):
    super().__init__(message)
    self.after, self.status = after, status


class _Address:
  """A server, with how it did lately."""

  def __init__(self, url: str):
    self.url = url
    self.in_flight = self.sent = self.failures = 0  # failures in a row
    self.rest_until = 0.0  # other addresses come first until then
    self.busy_until = 0.0  # as the server itself said
    self.next_warning = 0.0

  def failed(self, error: _TemporaryError, now: float) -> None:
    if now >= self.rest_until:  # requests that were in flight together count once
      self.failures += 1
    self.busy_until = now + error.after
    self.rest_until = max(self.rest_until, now + max(_pause(self.failures), error.after))
    if now >= self.next_warning:
      self.next_warning = now + _BETWEEN_WARNINGS
      _LOG.warning('%s: %s; trying again', self.url, error)


class Sender:
  """Sends requests to any of several servers.

  Args:
    urls: of the servers, which all serve the same model.
    token: sent as a bearer token; None: none.
    token_env: the variable that the token comes from, for messages.
    timeout: seconds that one try may take.
    deadline: seconds that a request may take with all its tries.
    max_in_flight: most requests in flight at once.

  Raises:
    UserError: httpx is not installed.
  """

  def __init__(self, urls: Sequence[str], token: str | None, token_env: str, timeout: float, deadline: float, max_in_flight: int):
    self._httpx = load_httpx()
    self._addresses = [_Address(url) for url in urls]
    self._token_env, self._timeout, self._deadline = token_env, timeout, deadline
    self._places = asyncio.Semaphore(max_in_flight)
    # No proxies, as in the official client, and no other settings of the environment. A context of the system's certificates is built once.
    verify = ssl.create_default_context() if any(url.startswith('https:') for url in urls) else False
    headers = {'Content-Type': 'application/json', 'Accept': 'application/json', 'Accept-Encoding': 'identity'}
    if token:
      headers['Authorization'] = f'Bearer {token}'
    self._http = self._httpx.AsyncClient(
      headers=headers,
      verify=verify,
      trust_env=False,
      timeout=self._httpx.Timeout(None, connect=_CONNECT),
      limits=self._httpx.Limits(max_connections=None, max_keepalive_connections=max_in_flight, keepalive_expiry=_KEEP_ALIVE),
    )
    self._started = threading.Event()
    self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True, name='polar_jax reward client')
    self._thread.start()
    self._started.wait()

  async def _main(self) -> None:
    self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
    async with self._http:
      self._started.set()
      await self._stop.wait()
      requests = asyncio.all_tasks() - {asyncio.current_task()}
      for request in requests:
        request.cancel()
      await asyncio.gather(*requests, return_exceptions=True)

  def submit(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
    """Run a coroutine in the event loop of this sender."""
    try:
      return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
    except RuntimeError as error:  # the loop is closed
      raise RewardRequestError('the client is closed') from error

  def stop(self) -> None:
    """Give all requests up, and let the thread close the connections and end. A garbage collection may call this: it does not wait."""
    with contextlib.suppress(RuntimeError):  # closed already
      self._loop.call_soon_threadsafe(self._stop.set)

  def close(self) -> None:
    """Give all requests up, close the connections and end the thread."""
    self.stop()
    self._thread.join()

  async def post(self, path: str, body: Any, parse: Callable[[Any], Any]) -> Any:
    """Send a request until it succeeds, and return its parsed reply.

    Args:
      path: below the address.
      body: anything that JSON can express.
      parse: returns the result, given the JSON of the reply. A ValueError says what is wrong with the reply.

    Raises:
      RewardRequestError: no server could answer within the deadline, one refused the request, or sent a reply of a wrong form.
    """
    content = json.dumps(body, allow_nan=False, separators=(',', ':')).encode()
    request, started = uuid.uuid4().hex, time.monotonic()
    tried: set[_Address] = set()
    tries = rounds = 0
    while True:
      async with self._place(started):
        address = self._choose(tried)
        tries += 1
        try:
          return await self._send(address, path, content, request, started, parse)
        except _TemporaryError as error:
          failure, now = error, time.monotonic()
          address.failed(failure, now)
      tried.add(address)
      left = started + self._deadline - now
      pause = 0.0
      if len(tried) == len(self._addresses):  # all of them failed
        rounds += 1
        tried.clear()
        # Between half the pause and all of it, so that requests that failed together do not come back together.
        pause = max(_pause(rounds) * random.uniform(0.5, 1.0), min(a.busy_until for a in self._addresses) - now)
      if pause >= left:
        raise RewardRequestError(
          f'{address.url}{path}: no rewards after {tries} tries in {now - started:.0f} s: {failure}; check the server, or raise '
          f'`deadline` ({self._deadline:g} s) (request {request})',
          failure.status,
        ) from failure
      await asyncio.sleep(pause)

  @contextlib.asynccontextmanager
  async def _place(self, started: float) -> Any:
    """Wait for a place among the requests in flight."""
    try:
      async with asyncio.timeout(started + self._deadline - time.monotonic()):
        await self._places.acquire()
    except TimeoutError as error:
      raise RewardRequestError(
        f'a request waited {self._deadline:g} s for others of this client; raise `deadline` or `max_in_flight`, or start more servers'
      ) from error
    try:
      yield
    finally:
      self._places.release()

  def _choose(self, tried: set[_Address]) -> _Address:
    """Return the least loaded address; one that failed lately only if there is no other."""
    now = time.monotonic()
    return min((a for a in self._addresses if a not in tried), key=lambda a: (a.rest_until > now, a.in_flight, a.sent))

  async def _send(self, address: _Address, path: str, content: bytes, request: str, started: float, parse: Callable[[Any], Any]) -> Any:
    """Send a request once.

    Raises:
      _TemporaryError: a retry may succeed.
      RewardRequestError: a retry would not help.
    """
    limit = max(min(self._timeout, started + self._deadline - time.monotonic()), 0.001)
    headers = {'X-Request-Timeout': f'{limit:.3f}', 'X-Request-Id': request}
    address.in_flight += 1
    address.sent += 1
    try:
      async with asyncio.timeout(limit):
        reply = await self._http.post(address.url + path, content=content, headers=headers)
    except TimeoutError as error:
      raise _TemporaryError(f'no reply within {limit:.3g} s') from error
    except self._httpx.ConnectTimeout as error:
      raise _TemporaryError(f'no connection within {_CONNECT:g} s') from error
    except (self._httpx.TransportError, OSError) as error:
      raise _TemporaryError(str(error) or type(error).__name__) from error
    finally:
      address.in_flight -= 1
    if reply.status_code >= 500 or reply.status_code in _BUSY:
      raise _TemporaryError(f'status {reply.status_code}: {_message(reply.content)}', _retry_after(reply), reply.status_code)
    where = f'{address.url}{path}'
    if reply.status_code != 200:
      advice = _ADVICE.get(reply.status_code, '').format(token_env=self._token_env)
      raise RewardRequestError(
        f'{where}: refuses the request with status {reply.status_code}: {_message(reply.content)}{advice and "; " + advice} '
        f'(request {request})',
        reply.status_code,
      )
    try:
      result = parse(json_files.parse(reply.content))
    except ValueError as error:
      raise RewardRequestError(f'{where}: {error}; check that the server is one of polar_jax (request {request})', 200) from error
    address.failures, address.rest_until = 0, 0.0
    return result


def load_httpx() -> Any:
  """Return the module httpx.

  Raises:
    UserError: it is not installed.
  """
  try:
    return importlib.import_module('httpx')
  except ModuleNotFoundError as error:
    raise UserError("the reward client needs httpx; run: pip install httpx (or 'polar_jax[client]')") from error


def _pause(failures: int) -> float:
  return min(_FIRST_PAUSE * 2 ** min(max(failures - 1, 0), 10), _LONGEST_PAUSE)


def _retry_after(reply: Any) -> float:
  """Return the seconds that a reply asks to wait, 0 if it does not say."""
  value = reply.headers.get('Retry-After', '')
  try:
    return max(float(value), 0.0) if value.strip().lower() not in ('nan', 'inf', 'infinity') else 0.0
  except ValueError:
    pass
  try:
    date = email.utils.parsedate_to_datetime(value)
  except ValueError:
    return 0.0
  return max((date - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0) if date.tzinfo else 0.0


def _message(content: bytes) -> str:
  """Return what a server says about an error, on one line."""
  text = content[:4_096].decode(errors='replace')
  with contextlib.suppress(ValueError, KeyError, TypeError):
    text = str(json.loads(content)['error']['message'])
  line = ' '.join(text.split())
  return (line[:_EXCERPT] + ('...' if len(line) > _EXCERPT else '')) or 'no message'
