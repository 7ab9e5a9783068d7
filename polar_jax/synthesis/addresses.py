"""Requests to the addresses of servers: how many are in flight, which is next, and what is tried again when.

Threads that sample hand in calls (`Addresses.run`), and wait. Threads of `Addresses` take one job at a time: of the calls in turn, so that
no call waits for the end of another. A pause of a job takes no thread and no place at an address.

Every place at an address has a connection of its own. With one pool for all, each request would look at all connections of the pool, which
halves the requests per second at 64 in flight.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from polar_jax.runtime import preemption
from polar_jax.synthesis.connection import Connection, TemporaryError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds; each pause is up to twice the one before
_SLICE = 0.2  # seconds; a wait looks this often whether the run is to stop
_BETWEEN_WARNINGS = 60.0  # seconds, of one address


class Stopped(Exception):
  """The event `Addresses.stop` was set while a call waited."""


class Address:
  """An address with places for requests. All attributes are guarded by the lock of its `Addresses`."""

  def __init__(self, url: str):
    self.url = url
    self.limit = 0
    self.in_flight, self.sent = 0, 0
    self.idle: list[Connection] = []
    self.failures, self.rest_until = 0, 0.0  # failures in a row, and until when only other addresses are asked
    self.next_warning = 0.0

  def failed(self, error: TemporaryError, now: float) -> None:
    """Note a failure. Those of requests that were in flight together count once."""
    if not self.failures or now >= self.rest_until:
      self.failures += 1
      self.rest_until = now + max(_pause(self.failures), error.after)
    if now >= self.next_warning:
      self.next_warning = now + _BETWEEN_WARNINGS
      logging.warning('%s: %s; trying again', self.url, error)


@dataclasses.dataclass(eq=False, slots=True)
class _Job:
  """A request of a call, with what happened to it."""

  index: int
  tries: int = 0
  rounds: int = 0  # how often it failed at all addresses
  first_failure: float | None = None
  failed: set[Address] = dataclasses.field(default_factory=set)  # addresses that failed in this round


class Call:
  """Requests that one thread waits for.

  Args:
    addresses: any of them can answer.
    keys: of the requests; a request's pauses depend on nothing else.
    send: answers request i through a connection to an address. A `TemporaryError` is tried again; any other ends the call.
    give_up: returns the error of a request that failed too long, given the address, the last error, the number of tries and the seconds.
    patience: seconds that a request may fail before the call is given up.
    clock: returns seconds.
    sleep: waits for some seconds.

  Attributes:
    results: of the requests, in order.
    retries: number of requests that were sent again.
  """

  def __init__(
    self,
    addresses: Sequence[Address],
    keys: Sequence[int],
    send: Callable[[int, Address, Connection], Any],
    give_up: Callable[[Address, TemporaryError, int, float], Exception],
    patience: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
  ):
    self.send, self.clock, self.sleep = send, clock, sleep
    self._addresses, self._keys, self._give_up, self._patience = addresses, keys, give_up, patience
    self.ready = collections.deque(map(_Job, range(len(keys))))
    self.again: collections.deque[_Job] = collections.deque()  # jobs that go to another address at once
    self.delayed: list[tuple[float, int, _Job]] = []  # a heap, by when they are due
    self.in_flight: set[Connection] = set()
    self.results: list[Any] = [None] * len(keys)
    self.left, self.retries = len(keys), 0
    self.error: Exception | None = None

  def is_done(self) -> bool:
    """Return whether there is nothing to wait for."""
    return self.error is not None or not self.left

  def next(self) -> tuple[_Job, Address] | None:
    """Remove and return a job with an address that has a place for it, None if there is neither now."""
    for jobs in (self.again, self.ready):
      if jobs and (address := self._choose(jobs[0])):
        return jobs.popleft(), address
    return None

  def _choose(self, job: _Job) -> Address | None:
    """Return the least loaded address. While some are healthy, one that fails gets one request at a time, and only after its rest."""
    candidates = [a for a in self._addresses if a not in job.failed]
    free = [a for a in candidates if a.in_flight < a.limit]
    if any(a.failures for a in candidates) and not all(a.failures for a in candidates):
      now = self.clock()
      free = [a for a in free if not a.failures or (not a.in_flight and now >= a.rest_until)]
    return min(free, key=lambda a: (a.in_flight, a.sent), default=None)

  def finish(self, job: _Job, address: Address, result: Any, error: Exception | None) -> None:
    """Take the result of a job, or decide what follows from its error."""
    if error is None:
      address.failures = 0
      self.results[job.index] = result
      self.left -= 1
    elif isinstance(error, TemporaryError):
      now = self.clock()
      address.failed(error, now)
      self._retry(job, address, error, now)
    else:
      self.error = self.error or error

  def _retry(self, job: _Job, address: Address, error: TemporaryError, now: float) -> None:
    job.tries += 1
    job.first_failure = now if job.first_failure is None else job.first_failure
    job.failed.add(address)
    if len(job.failed) < len(self._addresses):
      self.retries += 1
      self.again.append(job)
      return
    left = job.first_failure + self._patience - now
    if left <= 0:
      self.error = self.error or self._give_up(address, error, job.tries, now - job.first_failure)
      return
    job.failed.clear()
    job.rounds += 1
    self.retries += 1
    # Between half the pause and all of it, so that requests that failed together do not come back together.
    part = 0.5 + zlib.crc32(f'{self._keys[job.index]} {job.rounds}'.encode()) / 2**33
    due = now + min(max(_pause(job.rounds) * part, error.after), left)
    heapq.heappush(self.delayed, (due, job.index, job))

  def wake(self) -> float:
    """Make the jobs ready whose pause is over, and return the seconds until that of the next one is."""
    now = self.clock()
    while self.delayed and self.delayed[0][0] <= now:
      self.ready.append(heapq.heappop(self.delayed)[2])
    return self.delayed[0][0] - now if self.delayed else _SLICE


class Addresses:
  """Addresses that several samplers share, and the threads that send their requests.

  The requests of all samplers in flight to one address are never more than the smallest `max_in_flight` of these samplers.

  Attributes:
    stop: an event that, once set, ends every wait with `Stopped`, within a fraction of a second and in every thread. SIGTERM needs no
      event in a run of one process: inside of a `preemption.SigtermFlag` it ends every wait with `preemption.StopRequested`. In a run of
      several processes it does not, because they must stop together, and only their main threads can agree on when; these set `stop`.
  """

  def __init__(self, stop: threading.Event | None = None):
    self.stop = stop or threading.Event()
    self._context: ssl.SSLContext | None = None  # of all connections with TLS, because making one takes long
    self._lock = threading.Lock()
    self._work, self._progress = threading.Condition(self._lock), threading.Condition(self._lock)
    self._addresses: dict[str, Address] = {}
    self._calls: collections.deque[Call] = collections.deque()
    self._threads: list[threading.Thread] = []
    self._closed = False

  def get(self, url: str, max_in_flight: int) -> Address:
    """Return the address of a URL, with its limit lowered to `max_in_flight`."""
    with self._lock:
      address = self._addresses.setdefault(url, Address(url))
      address.limit = min(address.limit or max_in_flight, max_in_flight)
      if url.startswith('https:') and self._context is None:
        self._context = ssl.create_default_context()
        self._context.set_alpn_protocols(['http/1.1'])
      return address

  def run(self, call: Call) -> list[Any]:
    """Return the results of a call. If it fails, its requests in flight are given up too.

    Raises:
      Stopped: `stop` was set.
      StopRequested: SIGTERM arrived (see `stop`).
      Exception: what `Call.give_up` returned or `Call.send` raised.
    """
    with self._lock:
      if self._closed:
        raise RuntimeError('the addresses are closed')
      self._calls.append(call)
      self._start_threads()
      self._work.notify()
    try:
      while not self._wait(call):
        pass
    finally:
      with self._lock:
        if call in self._calls:
          self._calls.remove(call)
        for connection in call.in_flight:
          connection.abort()
    if call.error:
      raise call.error
    return call.results

  def _start_threads(self) -> None:
    """Have a thread for every request that can be in flight. A thread that waits for a server must not hold up the end of the process."""
    places = sum(address.limit for address in self._addresses.values())
    for _ in range(min(places, sum(call.left for call in self._calls)) - len(self._threads)):
      self._threads.append(threading.Thread(target=self._loop, daemon=True, name='polar_jax server'))
      self._threads[-1].start()

  def _wait(self, call: Call) -> bool:
    """Wait a little, and return whether the call is done."""
    if self.stop.is_set():
      raise Stopped('stopped while requests to servers were open')
    preemption.check_this_process()
    with self._lock:
      if self._closed and not call.is_done():
        raise RuntimeError('the addresses were closed while a call waited')
      pause = min(call.wake(), _SLICE)
      if call.is_done():
        return True
      if call.ready or call.again or call.in_flight:
        self._work.notify()
        self._progress.wait(pause)
        return False
    call.sleep(pause)
    return False

  def _loop(self) -> None:
    """Send requests, in a thread of its own."""
    while True:
      with self._lock:
        while (taken := None if self._closed else self._take()) is None:
          if self._closed:
            return
          self._work.wait()
        self._work.notify()  # there may be more that can be sent: another thread looks, and so on
      call, job, address, connection = taken
      result, error = None, None
      try:
        result = call.send(job.index, address, connection)
      except Exception as failure:
        error = failure
      with self._lock:
        self._give_back(address, connection)
        call.in_flight.remove(connection)
        if call in self._calls:  # otherwise it was given up, and a failure is not the fault of the address
          call.finish(job, address, result, error)
          if error is not None or call.is_done():
            self._progress.notify_all()

  def _take(self) -> tuple[Call, _Job, Address, Connection] | None:
    """Return the next job, with a place for it, of the calls in turn."""
    for _ in range(len(self._calls)):
      call = self._calls[0]
      self._calls.rotate(-1)
      if not call.is_done() and (found := call.next()):
        job, address = found
        address.in_flight += 1
        address.sent += 1
        connection = address.idle.pop() if address.idle else Connection(self._context)
        connection.aborted = False
        call.in_flight.add(connection)
        return call, job, address, connection
    return None

  def _give_back(self, address: Address, connection: Connection) -> None:
    address.in_flight -= 1
    if self._closed:
      connection.close()
    else:
      address.idle.append(connection)

  def close(self) -> None:
    """Give all requests up and end the threads."""
    with self._lock:
      self._closed = True
      self._work.notify_all()
      self._progress.notify_all()
      for call in self._calls:
        for connection in call.in_flight:
          connection.abort()
      for address in self._addresses.values():
        while address.idle:
          address.idle.pop().close()
    for thread in self._threads:
      thread.join(_SLICE)


def _pause(failures: int) -> float:
  return min(_FIRST_PAUSE * 2 ** min(failures - 1, 10), _LONGEST_PAUSE)
