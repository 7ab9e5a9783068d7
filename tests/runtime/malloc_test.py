from __future__ import annotations

import subprocess
import sys

import pytest

from polar_jax.runtime import malloc

# Allocates, frees and allocates large blocks from a thread, as XLA does; prints the page faults of the second half.
_CHURN = """
import ctypes, resource, sys, threading
from polar_jax.runtime import malloc
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1] == 'keep':
  assert malloc.keep_freed_memory()
def churn():
  for _ in range(5):
    block = ctypes.c_void_p(libc.malloc(40 << 20))  # glibc always maps blocks of more than 32 MiB, unless told otherwise
    libc.memset(block, 1, 40 << 20)
    libc.free(block)
def run():
  global before
  churn()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  churn()
thread = threading.Thread(target=run)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str) -> int:
  return int(subprocess.run([sys.executable, '-c', _CHURN, how], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='glibc only')
def test_freed_memory_is_used_again():
  # Absolute counts depend on the size of a page, and on who else has memory to give back.
  assert _faults('keep') < _faults('as it is') / 100


@pytest.mark.parametrize(('asked', 'expected'), [('cpu', True), ('cpu,cuda', True), ('cuda', False), ('tpu,cpu', False)])
def test_what_was_asked_for_decides(asked, expected, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', asked)
  assert malloc.runs_on_cpu() is expected


def test_elsewhere_nothing_happens(monkeypatch):
  monkeypatch.setattr(sys, 'platform', 'darwin')
  assert not malloc.keep_freed_memory()
