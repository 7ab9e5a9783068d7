"""Goodput: the seconds of a run by activity, including those of earlier starts of the run."""

from __future__ import annotations

from collections.abc import Mapping

from polar_jax.runtime.clock import Clock

# start: from the beginning of the stage to its first step (reading data, restoring). compile: calls that compiled a step. data: waiting
# for a batch. step: the training itself. evaluate: validation. save: an asynchronous save counts only until the next step can start.
# lost: steps that were logged, then taken again after a restart.
PARTS = ('start', 'compile', 'data', 'step', 'evaluate', 'save', 'lost')


class GoodputClock(Clock):
  """A clock of the parts of a run, which continues over restarts."""

  def __init__(self, started: float | None = None) -> None:
    """Start the clock now, or at an earlier reading of `time.perf_counter()`."""
    super().__init__(PARTS, started)

  def resume(self, seconds: Mapping[str, float], lost: float) -> None:
    """Add the seconds by part of earlier starts, and those of their steps that will be taken again."""
    for part in PARTS:
      self.seconds[part] += seconds.get(part, 0.0)
    self.seconds['lost'] += lost

  @property
  def goodput(self) -> float:
    """Share of all seconds that went into steps that count."""
    total = sum(self.seconds.values())
    return self.seconds['step'] / total if total else 0.0
