"""Memory that this process can still use, on the host and on its devices."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from polar_jax.runtime import malloc

_PROC, _CGROUPS = pathlib.Path('/proc'), pathlib.Path('/sys/fs/cgroup')
# (folder of the hierarchy, limit, usage, name of reclaimable file pages in memory.stat) of version 2 and version 1.
_VERSIONS = (
  ('', 'memory.max', 'memory.current', 'inactive_file'),
  ('memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file'),
)


def available(device: Any) -> int | None:
  """Return the bytes of memory that are free for one device of this process; None if that is not known.

  The CPU devices of a process share the memory of its host.

  Args:
    device: a local `jax.Device`.
  """
  if device.platform == 'cpu':
    malloc.give_back()  # what glibc keeps for the next allocation counts as used otherwise
    return available_on_host()
  stats = device.memory_stats()
  return None if not stats or 'bytes_limit' not in stats else stats['bytes_limit'] - stats.get('bytes_in_use', 0)


def available_on_host(proc: pathlib.Path = _PROC, cgroups: pathlib.Path = _CGROUPS) -> int | None:
  """Return the bytes of memory that this process can still allocate without swapping, within the limits of its control groups.

  Args:
    proc: where Linux describes processes and memory.
    cgroups: where Linux describes control groups.

  Returns:
    None where the system does not say.
  """
  found = [*_system(proc), *_groups(proc, cgroups)]
  return max(min(found), 0) if found else None


def _system(proc: pathlib.Path) -> Iterator[int]:
  for line in _read(proc / 'meminfo').splitlines():
    name, _, size = line.partition(':')
    if name == 'MemAvailable' and size.split()[:1]:
      yield int(size.split()[0]) * 1024


def _groups(proc: pathlib.Path, cgroups: pathlib.Path) -> Iterator[int]:
  """Yield what each control group of this process, and each above it, has left of its limit."""
  for line in _read(proc / 'self' / 'cgroup').splitlines():
    _, controllers, own = [*line.split(':', 2), '', ''][:3]
    if controllers and 'memory' not in controllers.split(','):
      continue
    root, limit, usage, reclaimable = _VERSIONS[1 if controllers else 0]
    # In a container the path is often that of the host, and its own group is mounted at the root.
    for group in {cgroups / root / parent for parent in (own.strip('/'), *map(str, pathlib.PurePath(own.strip('/')).parents))}:
      bound, used = _read(group / limit).strip(), _read(group / usage).strip()
      if bound.isdigit() and used.isdigit() and int(bound) < 1 << 60:  # version 1 has a number near 2^63 for no limit
        stat = dict(pair for entry in _read(group / 'memory.stat').splitlines() if len(pair := entry.split()) == 2)
        yield int(bound) - int(used) + int(stat.get(reclaimable, 0))


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError):  # another system, or hidden from this process
    return ''
