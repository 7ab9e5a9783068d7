"""Freed memory is reused, and runs on CPUs are recognized."""

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
if sys.argv[1] != 'default':
  assert malloc.keep_freed_memory()
if sys.argv[1] == 'map':
  assert malloc.map_large_blocks()
def churn():
  for _ in range(5):
    block = ctypes.c_void_p(libc.malloc(40 << 20))  # by default glibc maps all blocks of more than 32 MiB
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
def test_keep_freed_memory_avoids_page_faults():
  # Absolute counts depend on the page size and on what else the process frees.
  kept = _faults('keep')
  assert kept < _faults('default') / 100
  assert kept < _faults('map') / 100  # given back after each use


@pytest.mark.parametrize(('platforms', 'expected'), [('cpu', True), ('cpu,cuda', True), ('cuda', False), ('tpu,cpu', False)])
def test_runs_on_cpu_follows_jax_platforms(platforms, expected, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  assert malloc.runs_on_cpu() is expected


def test_keep_freed_memory_does_nothing_without_glibc(monkeypatch):
  monkeypatch.setattr(sys, 'platform', 'darwin')
  assert not malloc.keep_freed_memory()
