"""The queue of sequences to score, and the one thread that uses the devices.

A job is the sequences of one request. Jobs take turns, a group of sequences at a time, so that a request of one text does not wait for one
of a thousand. Sequences that begin alike, up to the end of the reference, form a group across jobs. Nothing that a job waits for depends
on another: a job that is cancelled, or whose deadline has passed, leaves the queue.
"""

from __future__ import annotations

import collections
import concurrent.futures
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from polar_jax.serve.batches import Batches, Call

_SPEED_MEMORY = 0.9  # weight of the past in the average speed


class QueueFullError(Exception):
  """No more tokens may wait.

  Attributes:
    seconds: until there may be room.
  """

  def __init__(self, seconds: float):
    super().__init__(f'the queue is full; it may have room in {seconds:.0f} s')
    self.seconds = seconds


class EngineError(Exception):
  """The server failed to score a job that was right. The message is for the client."""


class TooLateError(Exception):
  """The deadline of a job passed while it waited."""


class Item(NamedTuple):
  """A sequence to score.

  Attributes:
    ids: int32 token ids.
    key: of the group: equal keys for sequences that begin alike.
    shared: tokens that are computed once for the whole group.
  """

  ids: np.ndarray
  key: bytes
  shared: int = 0


class Job:
  """The sequences of a request.

  Args:
    sequences: to score.
    deadline: by `time.monotonic`.

  Attributes:
    future: of the rewards, float32, in the order of the sequences. Cancelling it takes the job out of the queue.
  """

  def __init__(self, sequences: Sequence[Item], deadline: float):
    self.sequences, self.deadline = sequences, deadline
    self.rewards = np.full(len(sequences), np.nan, np.float32)
    self.future: concurrent.futures.Future[np.ndarray] = concurrent.futures.Future()
    self.left = len(sequences)  # sequences without a reward
    self.waiting: dict[bytes, list[int]] = {}  # group -> its sequences that are not dispatched
    for i, sequence in enumerate(sequences):
      self.waiting.setdefault(sequence.key, []).append(i)

  @property
  def tokens_waiting(self) -> int:
    """Tokens that are not dispatched."""
    return sum(len(self.sequences[i].ids) for members in self.waiting.values() for i in members)

  def finish(self, error: Exception | None = None) -> None:
    """Set the result of the future, unless it has one or was cancelled."""
    if self.future.done() or not self.future.set_running_or_notify_cancel():
      return
    if error is None:
      self.future.set_result(self.rewards)
    else:
      self.future.set_exception(error)


class _Entry(NamedTuple):
  """A sequence of a job, by its number there."""

  job: Job
  number: int


class _InFlight(NamedTuple):
  call: Call
  members: list[list[_Entry]]  # for each sequence of the batch, those that share its reward


class Observer:
  """What an engine reports; see `observe.Metrics`. The methods of this one do nothing."""

  def compiled(self, shape: str) -> None:
    """A shape was compiled during the warm-up."""

  def batch(self, sequences: int, tokens: int, padded: int) -> None:
    """A batch was dispatched: sequences, their tokens, and the token positions computed for them."""

  def dropped(self, sequences: int, reason: str) -> None:
    """Sequences left the queue unscored: 'cancelled' or 'deadline'."""


class Engine:
  """Scores jobs in one thread of its own. All other methods may be called from any thread.

  Args:
    batches: computes sequences in fixed shapes.
    batch_tokens: tokens of a batch.
    queue_tokens: most tokens that may wait.
    observer: is told what happens.
  """

  def __init__(self, batches: Batches, batch_tokens: int, queue_tokens: int, observer: Observer | None = None):
    self._batches, self._batch_tokens, self._queue_tokens = batches, batch_tokens, queue_tokens
    self._observer = observer or Observer()
    self._changed = threading.Condition()
    self._jobs: collections.deque[Job] = collections.deque()
    self._by_key: dict[bytes, dict[Job, None]] = {}  # the jobs that wait with sequences of a group, oldest first
    self._waiting_tokens = self._waiting_sequences = 0
    self._unfinished: set[Job] = set()
    self._stopping = False
    self._speed, self._busy_since = 0.0, 0.0  # tokens per second, 0: unknown; when the device began what it computes
    self.ready = threading.Event()
    self.failure: BaseException | None = None
    self._thread = threading.Thread(target=self._run, name='device', daemon=True)

  def start(self) -> None:
    """Start the thread, which compiles everything first."""
    self._thread.start()

  @property
  def alive(self) -> bool:
    """Whether the thread runs."""
    return self._thread.is_alive()

  @property
  def thread(self) -> threading.Thread:
    """The thread of the devices."""
    return self._thread

  @property
  def waiting_tokens(self) -> int:
    """Tokens in the queue."""
    return self._waiting_tokens

  @property
  def waiting_sequences(self) -> int:
    """Sequences in the queue."""
    return self._waiting_sequences

  @property
  def queue_tokens(self) -> int:
    """Most tokens that may wait."""
    return self._queue_tokens

  def check_room(self, tokens: int = 1) -> None:
    """Check that so many tokens may be added. An empty queue takes any number up to its limit.

    Raises:
      QueueFullError: they may not.
    """
    if self._waiting_tokens + tokens > self._queue_tokens:
      surplus = self._waiting_tokens + tokens - self._queue_tokens
      raise QueueFullError(min(max(surplus / self._speed, 1.0), 60.0) if self._speed else 1.0)

  def submit(self, job: Job) -> None:
    """Add a job to the queue.

    Raises:
      QueueFullError: too many tokens wait.
      EngineError: the engine has stopped.
    """
    if not job.sequences:
      job.finish()
      return
    tokens = job.tokens_waiting
    with self._changed:
      if self._stopping or self.failure is not None:
        raise EngineError('the engine has stopped')
      self.check_room(tokens)
      self._unfinished.add(job)
      job.future.add_done_callback(lambda _: self._unfinished.discard(job))
      self._jobs.append(job)
      for key in job.waiting:
        self._by_key.setdefault(key, {})[job] = None
      self._waiting_tokens += tokens
      self._waiting_sequences += len(job.sequences)
      self._changed.notify()

  def cancel(self, job: Job, reason: str = 'cancelled') -> None:
    """Take the sequences of a job out of the queue. Those that the device has already are computed, and dropped."""
    job.future.cancel()
    with self._changed:
      self._remove(job, reason)

  def stop(self) -> None:
    """Make the thread end after the calls in flight. Jobs in the queue fail."""
    with self._changed:
      self._stopping = True
      self._changed.notify()

  def _remove(self, job: Job, reason: str) -> None:
    """Take a job out of the queue; the lock must be held."""
    if not job.waiting:
      return
    dropped = sum(map(len, job.waiting.values()))
    self._waiting_tokens -= job.tokens_waiting
    self._waiting_sequences -= dropped
    for key in job.waiting:
      self._leave(key, job)
    job.waiting.clear()
    if job in self._jobs:
      self._jobs.remove(job)
    self._observer.dropped(dropped, reason)

  def _leave(self, key: bytes, job: Job) -> None:
    jobs = self._by_key[key]
    jobs.pop(job, None)
    if not jobs:
      del self._by_key[key]

  def _run(self) -> None:
    try:
      for shape in self._batches.warm_up():
        self._observer.compiled(shape)
        if self._stopping:
          return
      self.ready.set()
      self._serve()
    except BaseException as error:  # nobody waits for this thread; /health shows that it has ended
      logging.exception('the device thread has failed')
      self.failure = error
    finally:
      with self._changed:
        for job in list(self._unfinished):
          self._remove(job, 'stopped')
          job.finish(EngineError('the server stopped before the request was scored'))

  def _serve(self) -> None:
    in_flight: collections.deque[_InFlight] = collections.deque()
    tokens_in_flight = 0
    while True:
      groups = self._take(wait=not in_flight)
      if groups is None:
        return
      if not in_flight:
        self._busy_since = time.monotonic()
      for started in self._dispatch(groups) if groups else ():
        in_flight.append(started)
        tokens_in_flight += started.call.tokens
        # Few enough that a new request need not wait for many.
        while len(in_flight) >= self._batches.in_flight or (len(in_flight) > 1 and tokens_in_flight > 2 * self._batch_tokens):
          tokens_in_flight -= in_flight[0].call.tokens
          self._fetch(in_flight.popleft())
      if not groups and in_flight:
        tokens_in_flight -= in_flight[0].call.tokens
        self._fetch(in_flight.popleft())

  def _take(self, wait: bool) -> list[list[_Entry]] | None:
    """Remove the groups of the next batch from the queue: a group of each job in turn.

    Args:
      wait: until there is a group, if there is none.

    Returns:
      For each group its entries; None: the engine stops, and nothing is in flight.
    """
    with self._changed:
      while wait and not self._jobs and not self._stopping:
        self._changed.wait()
      if self._stopping:
        return None if wait else []
      groups: list[list[_Entry]] = []
      tokens, now = 0, time.monotonic()
      while self._jobs and tokens < self._batch_tokens:
        job = self._jobs[0]
        if job.future.cancelled() or job.deadline < now:
          late = not job.future.cancelled()
          self._remove(job, 'deadline' if late else 'cancelled')
          if late:
            job.finish(TooLateError())
          continue
        self._jobs.rotate(-1)
        key = next(iter(job.waiting))
        # A group that exceeds the batch somewhat is not divided, because its shared beginning would be computed twice.
        entries, taken = self._take_group(job, key, self._batch_tokens)
        groups.append(entries)
        tokens += taken
      return groups

  def _take_group(self, first: Job, key: bytes, room: int) -> tuple[list[_Entry], int]:
    """Remove sequences of a group from the queue: at least one, those of the first job before those of others; the lock must be held.

    Returns:
      (the sequences, how many tokens have to be computed for them).
    """
    entries: list[_Entry] = []
    tokens = 0
    for job in [first, *(job for job in list(self._by_key[key]) if job is not first)]:
      members = job.waiting[key]
      taken = 0
      while taken < len(members) and (tokens < room or not entries):
        item = job.sequences[members[taken]]
        tokens += len(item.ids) - (item.shared if entries else 0)
        entries.append(_Entry(job, members[taken]))
        taken += 1
        self._waiting_tokens -= len(item.ids)
      self._waiting_sequences -= taken
      del members[:taken]
      if not members:
        del job.waiting[key]
        self._leave(key, job)
        if not job.waiting:
          self._jobs.remove(job)
      if tokens >= room:
        break
    return entries, tokens

  def _dispatch(self, groups: Sequence[Sequence[_Entry]]) -> Iterator[_InFlight]:
    """Start the computation of groups. If that fails, the jobs of all of them fail."""
    distinct: dict[bytes, list[_Entry]] = {}
    arrays: list[list[np.ndarray]] = []
    for group in groups:
      fresh: list[np.ndarray] = []
      for entry in group:
        ids = entry.job.sequences[entry.number].ids
        members = distinct.setdefault(ids.tobytes(), [])
        if not members:
          fresh.append(ids)
        members.append(entry)
      if fresh:
        arrays.append(fresh)
    members_of = list(distinct.values())
    computed = 0
    try:
      for call in self._batches.dispatch(arrays):
        computed += call.tokens
        yield _InFlight(call, members_of)
    except Exception as error:
      self._fail([entry for group in groups for entry in group], error)
    tokens = sum(len(ids) for group in arrays for ids in group)
    self._observer.batch(len(members_of), tokens, computed)

  def _fetch(self, item: _InFlight) -> None:
    """Wait for the rewards of a call, and finish the jobs that have all of theirs."""
    index = item.call.members
    entries = [entry for i in index[index >= 0].ravel() for entry in item.members[i]]
    try:
      rewards = np.asarray(jax.device_get(item.call.rewards))
    except Exception as error:
      self._fail(entries, error)
      return
    for i, reward in zip(index[index >= 0].ravel(), rewards[index >= 0].ravel(), strict=True):
      for entry in item.members[i]:
        entry.job.rewards[entry.number] = reward
        entry.job.left -= 1
        if not np.isfinite(reward):
          entry.job.finish(EngineError(f'a reward is {reward}: a parameter is not finite, or the compute dtype overflows'))
        elif entry.job.left == 0:
          entry.job.finish()
    self._learn_speed(sum(len(entry.job.sequences[entry.number].ids) for entry in entries))

  def _learn_speed(self, tokens: int) -> None:
    """Update the average speed by the tokens that the device finished since the last call."""
    now = time.monotonic()
    speed = tokens / max(now - self._busy_since, 1e-6)
    self._busy_since = now
    self._speed = _SPEED_MEMORY * self._speed + (1 - _SPEED_MEMORY) * speed if self._speed else speed

  def _fail(self, entries: Sequence[_Entry], error: Exception) -> None:
    """Fail the jobs of entries because of a fault on the device or in this code."""
    logging.error('a batch failed: %s', error, exc_info=error)
    for job in {entry.job: None for entry in entries}:
      job.finish(EngineError('the server failed to compute the rewards; see its log'))
      with self._changed:
        self._remove(job, 'failed')
