"""SIGTERM as a request to save and stop, for one process or several."""

from __future__ import annotations

import signal
import threading
from typing import Any, ClassVar

import jax

from polar_jax.runtime import distributed


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


class SigtermFlag:
  """Context manager whose event is set by SIGTERM.

  Only the main thread can install a signal handler; other threads share the event that is in scope there, if any. With several
  processes JAX handles the signal, and all processes stop after the same step.
  """

  _of_main: ClassVar[threading.Event | None] = None

  def __enter__(self) -> threading.Event:
    self._main = threading.current_thread() is threading.main_thread() and jax.process_count() == 1
    if jax.process_count() > 1:
      return _OfAllProcesses()
    if not self._main:
      return SigtermFlag._of_main or threading.Event()
    event = threading.Event()
    self._old, SigtermFlag._of_main = SigtermFlag._of_main, event
    self._old_handler = signal.signal(signal.SIGTERM, lambda *_: event.set())
    return event

  def __exit__(self, *_: Any) -> None:
    if self._main:
      signal.signal(signal.SIGTERM, self._old_handler)
      SigtermFlag._of_main = self._old


class _OfAllProcesses(threading.Event):
  """An event that is set once any process has received SIGTERM, at the same call of `is_set` on every process."""

  def is_set(self) -> bool:
    if not super().is_set() and distributed.preempted():
      self.set()
    return super().is_set()
