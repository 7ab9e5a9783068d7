"""Timing for benchmarks: what is compared runs alternately, and medians are reported with their spread."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def alternate(steps: Mapping[str, Callable[[], float | None]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
  """Seconds of every call, round by round, after `warm_up` rounds that do not count.

  A step returns its own seconds, or None for the time that its call took (it must wait for its result).
  """
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for _ in range(warm_up + rounds):
    for name, step in steps.items():
      started = time.perf_counter()
      own = step()
      seconds[name].append(time.perf_counter() - started if own is None else own)
  return {name: values[warm_up:] for name, values in seconds.items()}


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
  """How many times faster: the median of the ratios within each round, which a slow spell of the machine changes least."""
  return statistics.median(s / f for s, f in zip(slower, faster, strict=True))


def milliseconds(values: Sequence[float]) -> str:
  """Median and range."""
  return f'{statistics.median(values) * 1e3:,.1f} [{min(values) * 1e3:,.1f}, {max(values) * 1e3:,.1f}]'


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A table in Markdown."""
  cells = [[str(c) for c in row] for row in (header, *rows)]
  widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
  lines = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + ' |' for row in cells]
  return '\n'.join([lines[0], '|' + '|'.join('-' * (w + 2) for w in widths) + '|', *lines[1:]])


def report(**figures: Any) -> None:
  """The last line of a benchmark: one JSON object."""
  print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}), flush=True)
