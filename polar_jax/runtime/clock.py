"""Wall-clock seconds by phase."""

from __future__ import annotations

import time
from collections.abc import Iterable


class Clock:
  """Adds up the seconds of phases that follow one another.

  Attributes:
    seconds: by phase, in the order in which phases were named.
  """

  def __init__(self, phases: Iterable[str] = (), started: float | None = None) -> None:
    """Start the clock.

    Args:
      phases: reported with zero seconds until their first lap.
      started: an earlier reading of `time.perf_counter()`; None: now.
    """
    self.seconds: dict[str, float] = dict.fromkeys(phases, 0.0)
    self._started = self._last = time.perf_counter() if started is None else started

  def lap(self, phase: str) -> float:
    """Add the seconds since the last lap to `phase`, and return them."""
    now = time.perf_counter()
    spent, self._last = now - self._last, now
    self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
    return spent

  @property
  def elapsed(self) -> float:
    """Seconds since the clock was started, whether they belong to a lap or not."""
    return time.perf_counter() - self._started
