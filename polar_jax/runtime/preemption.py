"""SIGTERM as a request to save and stop, for one process or several."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import jax

from polar_jax.runtime import distributed

_Result = TypeVar('_Result')
_POLL = 0.1  # seconds


class Preempted(Exception):
  """A run stopped after SIGTERM. Its state is saved, and the same command resumes it."""

  def __init__(self, name: str, where: int | str):
    """Build the message.

    Args:
      name: of the run.
      where: the step that was saved, or a description of the progress.
    """
    at = f'saved at step {where}' if isinstance(where, int) else where
    super().__init__(f'{name}: stopped by SIGTERM, {at}. The same command resumes from there.')


class StopRequested(BaseException):
  """SIGTERM arrived in the middle of work that the run repeats when it resumes. The session saves and raises `Preempted`.

  A BaseException, so that a user's reward function that handles all errors does not take it for one.
  """


class SigtermFlag:
  """Context manager whose event is set by SIGTERM.

  Only the main thread can install a signal handler; other threads share the event that is in scope there, if any. With several
  processes JAX handles the signal, and all processes stop after the same step.
  """

  _of_main: ClassVar[threading.Event | None] = None
  _interrupts: ClassVar[bool] = False  # whether the handler raises StopRequested by itself

  def __enter__(self) -> threading.Event:
    self._main = threading.current_thread() is threading.main_thread()
    if not self._main:
      return SigtermFlag._of_main or threading.Event()
    event = _OfAllProcesses() if jax.process_count() > 1 else threading.Event()
    self._old, SigtermFlag._of_main = SigtermFlag._of_main, event
    self._old_handler = signal.signal(signal.SIGTERM, lambda *_: _received(event)) if jax.process_count() == 1 else None
    return event

  def __exit__(self, *_: Any) -> None:
    if self._main:
      SigtermFlag._of_main = self._old
      if self._old_handler is not None:
        signal.signal(signal.SIGTERM, self._old_handler)


class _OfAllProcesses(threading.Event):
  """An event that is set once any process has received SIGTERM, at the same call of `is_set` on every process."""

  def is_set(self) -> bool:
    if not super().is_set() and distributed.preempted():
      self.set()
    return super().is_set()


def _received(event: threading.Event) -> None:
  event.set()
  if SigtermFlag._interrupts:
    raise StopRequested


def check() -> None:
  """Stop if SIGTERM arrived. Loops without a state of their own call it between two rounds; all processes must call it equally often.

  Raises:
    StopRequested: SIGTERM arrived, and a `SigtermFlag` is in scope.
  """
  flag = SigtermFlag._of_main
  if flag is not None and flag.is_set():
    raise StopRequested


def check_this_process() -> None:
  """Stop if SIGTERM arrived, from any thread and as often as one likes. In runs of several processes it does nothing.

  Raises:
    StopRequested: SIGTERM arrived, and a `SigtermFlag` is in scope.
  """
  if not isinstance(SigtermFlag._of_main, _OfAllProcesses):
    check()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Scope in which SIGTERM interrupts the main thread at once, such as a wait for a server.

  In runs of several processes, and outside of a `SigtermFlag`, it changes nothing.

  Raises:
    StopRequested: SIGTERM arrived before or during the scope.
  """
  if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
    yield
    return
  before, SigtermFlag._interrupts = SigtermFlag._interrupts, True
  try:
    check()
    yield
  finally:
    SigtermFlag._interrupts = before


_abandoned: list[threading.Thread] = []


def in_thread(work: Callable[[], _Result]) -> _Result:
  """Return `work()`, computed where SIGTERM can be noticed meanwhile: a compilation takes minutes without returning to Python.

  Outside of a `SigtermFlag`, and in runs of several processes, it is called as it is.

  Raises:
    StopRequested: SIGTERM arrived; the work goes on in the background and its result is dropped.
  """
  flag = SigtermFlag._of_main
  if flag is None or isinstance(flag, _OfAllProcesses) or threading.current_thread() is not threading.main_thread():
    return work()
  results: list[_Result] = []
  errors: list[BaseException] = []

  def run() -> None:
    try:
      results.append(work())
    except BaseException as error:
      errors.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  while thread.is_alive():
    thread.join(_POLL)
    if flag.is_set() and thread.is_alive():
      _abandoned.append(thread)
      raise StopRequested
  if errors:
    raise errors[0]
  return results[0]


def abandon(thread: threading.Thread) -> None:
  """Let `leave` end the process even while this thread still works."""
  _abandoned.append(thread)


def leave(status: int) -> None:
  """End the process at once if work that was given up still goes on; an orderly exit would wait for it, or crash it.

  Args:
    status: exit status of the process.
  """
  if any(thread.is_alive() for thread in _abandoned):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
