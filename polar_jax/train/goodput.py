"""What the seconds of a run went to, its earlier starts included."""

from __future__ import annotations

import time
from collections.abc import Mapping

# start: from the stage's beginning to its first step (reading data, restoring). compile: calls that compiled a step. data: waiting for
# a batch. step: what training takes itself. evaluate, save: as they say; an asynchronous save only until the step may go on.
# lost: steps that were logged, then taken again after a restart.
PARTS = ('start', 'compile', 'data', 'step', 'evaluate', 'save', 'lost')


class Clock:
  """Adds up seconds by part: `lap` gives all since the last one to a part."""

  def __init__(self, started: float | None = None) -> None:
    """Start the clock now, or at an earlier reading of `time.perf_counter()`."""
    self.seconds = dict.fromkeys(PARTS, 0.0)
    self._last = time.perf_counter() if started is None else started

  def go_on(self, seconds: Mapping[str, float], lost: float) -> None:
    """Adds what earlier starts of the run took, and what of it was lost."""
    for part in PARTS:
      self.seconds[part] += seconds.get(part, 0.0)
    self.seconds['lost'] += lost

  def lap(self, part: str) -> None:
    now = time.perf_counter()
    self.seconds[part] += now - self._last
    self._last = now

  @property
  def goodput(self) -> float:
    """Share of all seconds that went into steps which count."""
    total = sum(self.seconds.values())
    return self.seconds['step'] / total if total else 0.0
