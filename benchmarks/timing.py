"""Timing for benchmarks: the alternatives take turns, and medians are reported with their range."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def alternate(steps: Mapping[str, Callable[[], float | None]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
  """Run all `steps` in turns, and return the seconds of each by round.

  Args:
    steps: functions by name. A step returns its own seconds, or None for the time of its call (it must then wait for its result).
    rounds: number of rounds that count.
    warm_up: number of rounds before them that do not.
  """
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for _ in range(warm_up + rounds):
    for name, step in steps.items():
      started = time.perf_counter()
      own = step()
      seconds[name].append(time.perf_counter() - started if own is None else own)
  return {name: values[warm_up:] for name, values in seconds.items()}


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
  """Return the median over rounds of the ratio within a round, which is robust to slow periods of the machine."""
  return statistics.median(s / f for s, f in zip(slower, faster, strict=True))


def milliseconds(values: Sequence[float]) -> str:
  """Format the median and range of seconds as milliseconds."""
  return f'{statistics.median(values) * 1e3:,.1f} [{min(values) * 1e3:,.1f}, {max(values) * 1e3:,.1f}]'


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Format a table in Markdown."""
  cells = [[str(c) for c in row] for row in (header, *rows)]
  widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
  lines = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + ' |' for row in cells]
  return '\n'.join([lines[0], '|' + '|'.join('-' * (w + 2) for w in widths) + '|', *lines[1:]])


def report(**metrics: Any) -> None:
  """Print the last line of a benchmark, one JSON object."""
  print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in metrics.items()}), flush=True)
