"""A client of the reward server, for trainers: `polar_jax.serve.RewardClient`.

Rewards are complete or there is an error: none is dropped, guessed, reordered or not finite. A server that restarts costs a pause, not a
training run (see `polar_jax.serve.sending`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import json
import math
import os
import sys
import threading
import weakref
from collections.abc import Coroutine, Hashable, Sequence
from typing import Any, NamedTuple

from polar_jax.runtime import urls
from polar_jax.serve.sending import RewardRequestError, Sender, load_httpx
from polar_jax.types import Text, UserError

__all__ = ['TOKEN_ENV', 'RewardClient', 'RewardRequestError']

TOKEN_ENV = 'POLAR_SERVER_TOKEN'
WRAPPERS = ('sft', 'pretrain')
# Statuses that can be about one row of a request that holds the rows of several callers.
_ABOUT_A_ROW = (400, 413, 422)


class Row(NamedTuple):
  """One answer to be scored."""

  prompt: Text
  reference: Text
  output: Text


class RewardClient:
  """A client of one or more reward servers that serve the same model.

  All methods can be called from several threads, event loops and forked processes; each process has connections of its own. Calls that
  fail raise `RewardRequestError`; unusable arguments raise `UserError`, which it is a kind of.

  Args:
    address: HOST:PORT or a URL; several in a list, or with commas between them. Requests go to the least loaded one that works.
    wrapper: 'sft' puts a newline between prompt and answer; 'pretrain' puts nothing.
    token_env: the environment variable that holds the server's bearer token, if it wants one.
    timeout: seconds that one try of a request may take.
    deadline: seconds that a request may take with all its tries, of which there is another one if a server cannot be reached, is too
      slow, or replies with status 408, 429 or 5xx.
    batch: most texts of a request. Larger calls are cut into several requests.
    max_in_flight: most requests in flight at once.
    gather: seconds that `score_one` and `ascore_one` wait for other calls, to share a request with them.

  Raises:
    UserError: an address is not a URL, a setting is out of its range, or httpx is not installed.
  """

  def __init__(
    self,
    address: str | Sequence[str],
    *,
    wrapper: str = 'sft',
    token_env: str = TOKEN_ENV,
    timeout: float = 60.0,
    deadline: float = 300.0,
    batch: int = 64,
    max_in_flight: int = 8,
    gather: float = 0.01,
  ):
    self._settings: dict[str, Any] = {
      'address': address,
      'wrapper': wrapper,
      'token_env': token_env,
      'timeout': timeout,
      'deadline': deadline,
      'batch': batch,
      'max_in_flight': max_in_flight,
      'gather': gather,
    }
    if wrapper not in WRAPPERS:
      raise UserError(f'wrapper is {wrapper!r}; it must be one of: {", ".join(WRAPPERS)}')
    for name, lowest in (('batch', 1), ('max_in_flight', 1), ('gather', 0)):
      if not self._settings[name] >= lowest:
        raise UserError(f'{name} is {self._settings[name]!r}; it must be at least {lowest}')
    for name in ('timeout', 'deadline'):
      if not 0 < self._settings[name] < math.inf:
        raise UserError(f'{name} is {self._settings[name]!r}; it must be a positive number of seconds')
    self._urls = _base_urls(address)
    self._wrapper, self._batch, self._closed = wrapper, batch, False
    load_httpx()
    self._forget()
    _CLIENTS.add(self)

  def __reduce__(self) -> tuple[Any, ...]:
    return _rebuild, (self._settings,)

  def _forget(self) -> None:
    """Have neither connections nor a thread. In a process that was forked, those of its parent do not work."""
    self._lock = threading.Lock()
    self._running: Sender | None = None
    self._shared: SharedRequests | None = None

  def _sender(self) -> Sender:
    with self._lock:
      if self._closed:
        raise RewardRequestError('the client is closed')
      if self._running is None:
        s = self._settings
        self._running = Sender(self._urls, _token(s['token_env']), s['token_env'], s['timeout'], s['deadline'], s['max_in_flight'])
        weakref.finalize(self, self._running.stop)
      return self._running

  def close(self) -> None:
    """Give all requests up and close the connections. A client that is no longer used, or whose process ends, does so by itself."""
    with self._lock:
      self._closed, sender = True, self._running
    if sender:
      sender.close()

  def __enter__(self) -> RewardClient:
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def score(self, prompt: Text, reference: Text, outputs: Sequence[Text]) -> list[float]:
    """Return the rewards of any number of answers to one prompt, in order.

    Args:
      prompt: a string or a list of messages, as the other texts.
      reference: an answer of the policy to be recognized.
      outputs: the answers.

    Raises:
      UserError: a text is neither a string nor a list of messages with text; the message names it.
      RewardRequestError: there are no rewards.
    """
    return self._wait(self._score_in_loop(_rows_of_one(prompt, reference, outputs)))

  async def ascore(self, prompt: Text, reference: Text, outputs: Sequence[Text]) -> list[float]:
    """`score` for coroutines."""
    return await self._await(self._score_in_loop(_rows_of_one(prompt, reference, outputs)))

  def score_rows(
    self, prompts: Sequence[Text], references: Sequence[Text], outputs: Sequence[Text], wrapper: str | None = None
  ) -> list[float]:
    """Return the rewards of answers to prompts, references and answers of equal number, in order.

    Answers with the same prompt and reference are sent together, because the server computes what they share once. Equal ones are sent
    once, so that they tie.

    Args:
      prompts: strings or lists of messages, as the other texts.
      references: answers of the policy to be recognized.
      outputs: the answers to score.
      wrapper: 'sft' or 'pretrain'; None: that of the client.

    Raises:
      UserError: a text is neither a string nor a list of messages with text, or the numbers differ.
      RewardRequestError: there are no rewards.
    """
    return self._wait(self._score_in_loop(_rows(prompts, references, outputs), wrapper))

  async def ascore_rows(
    self, prompts: Sequence[Text], references: Sequence[Text], outputs: Sequence[Text], wrapper: str | None = None
  ) -> list[float]:
    """`score_rows` for coroutines."""
    return await self._await(self._score_in_loop(_rows(prompts, references, outputs), wrapper))

  def score_one(self, prompt: Text, reference: Text, output: Text) -> float:
    """Return the reward of one answer, which shares a request with those of other threads and coroutines that come at the same time.

    Raises:
      UserError: a text is neither a string nor a list of messages with text.
      RewardRequestError: there is no reward.
    """
    (row,) = _rows_of_one(prompt, reference, [output])
    return self._wait(self._ascore_shared(row))

  async def ascore_one(self, prompt: Text, reference: Text, output: Text) -> float:
    """`score_one` for coroutines."""
    (row,) = _rows_of_one(prompt, reference, [output])
    return await self._await(self._ascore_shared(row))

  def post(self, path: str, body: Any) -> Any:
    """Send a request to another path of the server, with the same retries, and return the JSON of its reply.

    Raises:
      RewardRequestError: there is none.
    """
    return self._wait(self._sender().post(path, body, lambda reply: reply))

  def _submit(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
    try:
      return self._sender().submit(coroutine)
    except UserError:
      coroutine.close()
      raise

  def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that runs in the sender's loop."""
    future = self._submit(coroutine)
    try:
      return future.result()
    except concurrent.futures.CancelledError as error:
      raise RewardRequestError('the client was closed while a request was open') from error
    except BaseException:  # KeyboardInterrupt: the server need not go on
      future.cancel()
      raise

  async def _await(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that runs in the sender's loop, which is not the caller's. Cancelling this cancels that."""
    future = self._submit(coroutine)
    try:
      return await asyncio.wrap_future(future)
    except asyncio.CancelledError as error:
      if self._closed:
        raise RewardRequestError('the client was closed while a request was open') from error
      raise

  async def _ascore_shared(self, row: Row) -> float:
    if self._shared is None:
      self._shared = SharedRequests(self._score_in_loop, self._settings['gather'], self._batch)
    return await self._shared.score(row)

  async def _score_in_loop(self, rows: Sequence[Row], wrapper: str | None = None) -> list[float]:
    """Return the rewards of rows. For coroutines of the sender's loop."""
    sender = self._sender()
    requests, place = _cut(rows, wrapper or self._wrapper, self._batch)
    tasks = [asyncio.ensure_future(sender.post('/score', request, functools.partial(_parse, request))) for request in requests]
    try:
      replies = await asyncio.gather(*tasks)
    except BaseException:
      for task in tasks:
        task.cancel()
      await asyncio.gather(*tasks, return_exceptions=True)
      raise
    rewards = [reward for reply in replies for reward in reply]
    return [rewards[i] for i in place]


class SharedRequests:
  """Gathers rows that come one by one, from callers that do not know of each other, into calls of many. It lives in one event loop.

  Args:
    score: scores many rows.
    wait: seconds to wait for more rows after the first.
    size: number of rows at which there is no more waiting.
  """

  def __init__(self, score: Any, wait: float, size: int):
    self._score, self._wait, self._size = score, wait, size
    self._waiting: list[tuple[Row, asyncio.Future[float]]] = []
    self._timer: asyncio.TimerHandle | None = None
    self._tasks: set[asyncio.Task[None]] = set()

  async def score(self, row: Row) -> float:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[float] = loop.create_future()
    self._waiting.append((row, future))
    if len(self._waiting) >= self._size:
      self._send()
    elif self._timer is None:
      self._timer = loop.call_later(self._wait, self._send)
    return await future

  def _send(self) -> None:
    if self._timer:
      self._timer.cancel()
    self._timer = None
    waiting, self._waiting = self._waiting, []
    task = asyncio.ensure_future(self._answer([(row, future) for row, future in waiting if not future.done()]))
    self._tasks.add(task)
    task.add_done_callback(self._tasks.discard)

  async def _answer(self, waiting: list[tuple[Row, asyncio.Future[float]]]) -> None:
    try:
      rewards = await self._score([row for row, _ in waiting])
    except UserError as error:
      if len(waiting) > 1 and getattr(error, 'status', None) in _ABOUT_A_ROW:  # let the error meet only its own caller
        await asyncio.gather(*(self._answer([one]) for one in waiting))
        return
      for _, future in waiting:
        if not future.done():
          future.set_exception(error)
      return
    except BaseException:
      for _, future in waiting:
        future.cancel()
      raise
    for (_, future), reward in zip(waiting, rewards, strict=True):
      if not future.done():
        future.set_result(reward)


_CLIENTS: weakref.WeakSet[RewardClient] = weakref.WeakSet()


def _after_fork() -> None:
  for client in list(_CLIENTS):
    client._forget()


if hasattr(os, 'register_at_fork'):
  os.register_at_fork(after_in_child=_after_fork)


def _rebuild(settings: dict[str, Any]) -> RewardClient:
  return RewardClient(**settings)


def _token(variable: str) -> str | None:
  token = os.environ.get(variable, '').strip()
  if not (token.isascii() and token.isprintable()):
    raise UserError(f'the token in the environment variable {variable} must be of printable ASCII characters')
  return token or None


def _base_urls(address: str | Sequence[str]) -> list[str]:
  given = address.split(',') if isinstance(address, str) else list(address)
  found = []
  for one in given:
    url = urls.base_url(one.strip())
    if url is None:
      raise UserError(f'the address of the reward server is {one!r}; it must be HOST:PORT, or a URL that starts with http:// or https://')
    found.append(url)
  if not found:
    raise UserError('the list of addresses of reward servers is empty; give at least one')
  return list(dict.fromkeys(found))


def _check_text(text: Any, name: str) -> None:
  """Check that a text is a string or a list of messages."""
  if isinstance(text, str):
    return
  if not isinstance(text, list) or not text:
    raise UserError(f'{name} must be a string or a list of messages, not {"an empty list" if text == [] else type(text).__name__}')
  for i, message in enumerate(text):
    content = message.get('content') if isinstance(message, dict) else None
    if not isinstance(content, str):
      raise UserError(f'{name}[{i}] must be a message with a content that is a string')


def _rows_of_one(prompt: Text, reference: Text, outputs: Sequence[Text]) -> list[Row]:
  _check_text(prompt, 'prompt')
  _check_text(reference, 'reference')
  if isinstance(outputs, str):
    raise UserError('outputs is a string; it must be a list of answers')
  for i, output in enumerate(outputs):
    _check_text(output, f'outputs[{i}]')
  return [Row(prompt, reference, output) for output in outputs]


def _rows(prompts: Sequence[Text], references: Sequence[Text], outputs: Sequence[Text]) -> list[Row]:
  columns = {'prompts': prompts, 'references': references, 'outputs': outputs}
  for name, column in columns.items():
    if isinstance(column, str):
      raise UserError(f'{name} is a string; it must be a list')
  if not len(prompts) == len(references) == len(outputs):
    raise UserError(f'there are {len(prompts)} prompts, {len(references)} references and {len(outputs)} outputs; there must be as many')
  for name, column in columns.items():
    for i, text in enumerate(column):
      _check_text(text, f'{name}[{i}]')
  return list(map(Row, prompts, references, outputs))


def _key(text: Text) -> Hashable:
  return text if isinstance(text, str) else (json.dumps(text),)  # no string equals the key of messages


def _cut(rows: Sequence[Row], wrapper: str, size: int) -> tuple[list[list[dict[str, Any]]], list[int]]:
  """Return requests of at most `size` texts each, and for each row which of their outputs is its own."""
  keys = [tuple(map(_key, row)) for row in rows]
  groups: dict[tuple[Hashable, ...], dict[Hashable, Row]] = {}
  for row, key in zip(rows, keys, strict=True):
    groups.setdefault(key[:2], {}).setdefault(key[2], row)
  requests: list[list[dict[str, Any]]] = []
  place: dict[tuple[Hashable, ...], int] = {}
  room = 0
  for context, outputs in groups.items():
    left = list(outputs.items())
    while left:
      if not room:
        requests.append([])
        room = size
      part, left = left[:room], left[room:]
      room -= len(part)
      for output, _ in part:
        place[*context, output] = len(place)
      first = part[0][1]
      texts = [row.output for _, row in part]
      requests[-1].append({'prompt': first.prompt, 'reference': first.reference, 'outputs': texts, 'wrapper': wrapper})
  return requests, [place[key] for key in keys]


def _parse(request: list[dict[str, Any]], reply: Any) -> list[float]:
  """Return the rewards of a reply in the order of the request's outputs.

  Raises:
    ValueError: they are not one finite number for each.
  """
  if not isinstance(reply, list) or len(reply) != len(request):
    raise ValueError(f'the reply is not a list of {len(request)} results, one for each of the request')
  rewards: list[float] = []
  for i, (result, group) in enumerate(zip(reply, request, strict=True)):
    found = result.get('rewards') if isinstance(result, dict) else None
    if not isinstance(found, list) or len(found) != len(group['outputs']):
      count = f'{len(found)} rewards' if isinstance(found, list) else 'no rewards'
      raise ValueError(f'result {i} of the reply has {count} for {len(group["outputs"])} outputs')
    for reward in found:
      if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) <= sys.float_info.max:
        raise ValueError(f'result {i} of the reply has a reward that is not a finite number')
    rewards += map(float, found)
  return rewards
