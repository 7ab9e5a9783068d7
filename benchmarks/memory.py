"""Memory of a process, for benchmarks."""

from __future__ import annotations

import pathlib


def resident() -> dict[str, int]:
  """Return the resident memory of this process and its peak (VmRSS, VmHWM), in bytes."""
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return {name: int(line.split()[1]) * 1024 for line in lines for name in ('VmHWM', 'VmRSS') if line.startswith(name)}
