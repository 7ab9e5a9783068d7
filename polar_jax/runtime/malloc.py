"""Settings of the C library's allocator for runs on CPUs."""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8


def runs_on_cpu() -> bool:
  """Return whether JAX will run on CPUs, without starting it: JAX_PLATFORMS names them, or there is no accelerator."""
  platforms = os.environ.get('JAX_PLATFORMS', '')
  if platforms:
    return platforms.split(',')[0] == 'cpu'
  accelerators = ('nvidia[0-9]*', 'kfd', 'accel*', 'vfio/[0-9]*')
  return not any(True for pattern in accelerators for _ in pathlib.Path('/dev').glob(pattern))


def _glibc() -> ctypes.CDLL | None:
  if not sys.platform.startswith('linux'):
    return None
  libc = ctypes.CDLL(None)
  return libc if hasattr(libc, 'gnu_get_libc_version') else None


def give_back() -> None:
  """Return free memory to the system, once, after work that needed much more than what follows."""
  if libc := _glibc():
    libc.malloc_trim(0)


def keep_freed_memory() -> bool:
  """Make glibc keep freed memory for the next allocation. Returns whether it did; without glibc there is nothing to set.

  XLA allocates the temporaries of a step anew each time. By default glibc maps such blocks from the system and unmaps them, which
  costs a page fault per 4 KiB and step, a tenth of the time of a CPU step. Call this before JAX starts its threads. Memory once used
  stays with the process.
  """
  libc = _glibc()
  if libc is None:
    return False
  # Blocks of any size come from the one arena that grows at its top; other arenas map and unmap large blocks. The top is never
  # returned (-1: a number would have to be less than 2 GiB, and a step's temporaries can be larger).
  settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))
  accepted = [libc.mallopt(name, value) for name, value in settings]
  return all(accepted)


def map_large_blocks() -> bool:
  """Make glibc map large blocks from the system and unmap them when they are freed. Returns whether it did.

  Call it before work whose blocks are large compared with the memory: `keep_freed_memory` lets small blocks settle in a large free
  one, so that the next large one does not fit there, and a process can grow to several times what it uses.
  """
  libc = _glibc()
  return libc is not None and all([libc.mallopt(_MMAP_MAX, 1 << 16), libc.mallopt(_MMAP_THRESHOLD, 16 << 20)])
