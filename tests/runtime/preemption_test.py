"""SIGTERM as a request to stop, in the main thread and in others."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import time

import pytest

from polar_jax.runtime import preemption
from polar_jax.runtime.preemption import SigtermFlag, StopRequested


def test_runs_in_other_threads_share_the_flag_of_the_main_thread():
  def other() -> tuple[bool, int]:
    with SigtermFlag() as flag:
      return flag.is_set(), id(flag)

  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    with SigtermFlag() as flag:
      assert thread.submit(other).result() == (False, id(flag))
      os.kill(os.getpid(), signal.SIGTERM)
      assert flag.wait(10) and thread.submit(other).result() == (True, id(flag))
    assert thread.submit(other).result() != (True, id(flag))  # out of scope: another flag


def test_the_handler_is_restored():
  handler = signal.getsignal(signal.SIGTERM)
  with SigtermFlag() as outer, SigtermFlag() as flag:
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag.wait(10) and not outer.is_set()
  assert signal.getsignal(signal.SIGTERM) == handler


def test_loops_stop_only_in_the_scope_of_a_flag():
  preemption.check()
  with SigtermFlag():
    preemption.check()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(StopRequested):
      preemption.check()
    with pytest.raises(StopRequested), preemption.interruptible():  # it came before
      pytest.fail('entered')
  preemption.check()


def test_loops_whose_rounds_differ_stop_in_any_thread_but_not_in_runs_of_several_processes(monkeypatch):
  preemption.check_this_process()
  with SigtermFlag() as flag, concurrent.futures.ThreadPoolExecutor(1) as thread:
    preemption.check_this_process()
    flag.set()
    assert isinstance(thread.submit(preemption.check_this_process).exception(), StopRequested)
    monkeypatch.setattr(preemption._OfAllProcesses, 'is_set', lambda _: pytest.fail('the processes would have to agree'))
    monkeypatch.setattr(SigtermFlag, '_of_main', preemption._OfAllProcesses())
    preemption.check_this_process()
    monkeypatch.undo()


def test_a_wait_is_interrupted_and_work_after_it_is_not():
  with SigtermFlag() as flag:
    with pytest.raises(StopRequested), preemption.interruptible():
      try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
      except Exception:  # as a reward function may do
        pytest.fail('taken for an error')
    assert flag.is_set()
    os.kill(os.getpid(), signal.SIGTERM)


def test_work_in_a_thread_returns_raises_and_is_given_up():
  release, done = threading.Event(), threading.Event()

  def slow():
    os.kill(os.getpid(), signal.SIGTERM)
    release.wait(60)
    done.set()

  assert preemption.in_thread(lambda: 3) == 3
  with SigtermFlag():
    assert preemption.in_thread(lambda: threading.current_thread() is threading.main_thread()) is False
    with pytest.raises(ZeroDivisionError):
      preemption.in_thread(lambda: 1 // 0)
    with pytest.raises(StopRequested):
      preemption.in_thread(slow)
  assert not done.is_set()
  release.set()
  assert done.wait(60)
