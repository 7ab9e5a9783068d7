"""SIGTERM as a request to stop, in the main thread and in others."""

from __future__ import annotations

import concurrent.futures
import os
import signal

from polar_jax.runtime.preemption import SigtermFlag


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
